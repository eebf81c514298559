"""Which inputs of a container wait, so that it knows when to give its core away."""

from __future__ import annotations

import threading

from fanout import context


class Watcher:
    def __init__(self) -> None:
        self.count = 0

    def waits_changed(self) -> None:
        self.count += 1


def test_a_container_waits_when_all_its_inputs_do_however_many_things_each_waits_for() -> None:
    waits, watcher = context.Waits(), Watcher()
    waits.watch(watcher)
    waits.run_many()
    one, two = context.InputContext(b"", 1, 1), context.InputContext(b"", 2, 1)
    waits.input_began(one)
    waits.input_began(two)
    assert waits.running_count == 2
    token = context.current_input.set(one)
    begun = [waits.begin(), waits.begin()]
    assert begun == [one, one]
    assert not waits.are_all
    context.current_input.set(two)
    second = waits.begin()
    assert waits.are_all
    assert watcher.count == 1
    context.current_input.reset(token)
    waits.end(one)
    assert waits.are_all, "one of two things that the input waits for is over"
    waits.end(one)
    assert not waits.are_all
    waits.input_ended(one)
    assert waits.are_all, "what is left waits"
    waits.input_ended(two)
    assert not waits.are_all, "nothing runs, and what was left behind is nobody's wait"
    waits.end(second)
    assert watcher.count == 4


def test_with_one_input_at_a_time_any_wait_is_the_containers() -> None:
    waits = context.Waits()
    assert not waits.are_all
    waits.end(waits.begin())
    assert not waits.are_all
    begun = waits.begin()
    assert waits.are_all
    waits.end(begun)


def test_waits_are_counted_in_all_threads_at_once() -> None:
    waits = context.Waits()
    waits.run_many()

    def work() -> None:
        for number in range(2000):
            place = context.InputContext(b"", number, 1)
            context.current_input.set(place)
            waits.input_began(place)
            waits.end(waits.begin())
            waits.input_ended(place)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waits.running_count == 0
    assert not waits.are_all
