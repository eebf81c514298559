"""Generators that hold the place which their own consumer waits for."""

from __future__ import annotations

from typing import Any

import pytest

from fanout.protocol import messages as m
from tests.core_kit import APP, Bench

FOUR = (1).to_bytes(4, "little") * 4


class Program:
    """A client, one worker, and a generator `g` of which some inputs wait for credit."""

    def __init__(self, count: int = 1, cpu: float = 4, **options: Any) -> None:
        self.bench = Bench()
        self.worker = self.bench.worker(cpu=cpu)
        self.client = self.bench.client(g={"is_generator": True, **options}, f=dict(options))
        self.first = self.bench.open(self.client, "g", call=1, count=count)
        self.waiting: dict[int, m.Lease] = {}
        self.sequence = 0

    def fill(self) -> None:
        """All leases give what their credit allows, and wait."""
        bench = self.bench
        for order in bench.take_all(m.StartContainer):
            bench.start(self.worker, order.container_id)
        for lease in bench.take_all(m.Lease):
            self.give(lease)
            bench.frame(self.worker, m.LeaseWaits(lease.lease_id, 4))
            self.waiting[lease.start] = lease
        bench.forget(m.DefineFunction, m.Items, m.OutputsAck, m.Window)

    def give(self, lease: m.Lease) -> None:
        """It gives its first four items."""
        self.sequence += 1
        at = (lease.lease_id, lease.call_id, lease.start)
        self.bench.frame(self.worker, m.LeaseItems(self.sequence, *at, 0, FOUR, [], b"abcd"))

    def later(self, seconds: float) -> None:
        self.bench.later(seconds)
        self.bench.frame(self.worker, m.Heartbeat(0))


def test_the_second_of_two_maps_that_are_consumed_side_by_side_gets_the_only_permit() -> None:
    program = Program(max_containers=1)
    program.fill()
    bench = program.bench
    program.later(5)
    second = bench.open(program.client, "g", call=2, count=1)
    program.later(0.9)
    assert bench.take_all(m.CancelLease) == [], "its consumer may just be slow"
    program.later(0.2)
    assert bench.take(m.CancelLease, program.worker).lease_id == program.waiting[0].lease_id
    lease = bench.take(m.Lease)
    assert lease.call_id == second
    text = bench.take(m.Notice, program.client).text
    assert "g was stopped while it waited for its items to be taken" in text
    assert "max_containers" in text
    # What the stopped one reports is nobody's output, and it runs again when there is a place.
    bench.finish(program.worker, program.waiting[0], status=m.Status.FAILURE)
    assert bench.take_all(m.Outputs) == []
    bench.finish(program.worker, lease, status=m.Status.DONE)
    bench.take(m.Outputs, program.client)
    again = bench.take(m.Lease)
    assert (again.call_id, again.skip) == (program.first, 4)
    counts = {"generator evicted": 1, "failure under a void lease": 1}
    assert bench.core.snapshot()["counts"] == counts


def test_it_is_told_once_however_often_it_happens() -> None:
    program = Program(max_containers=1)
    program.fill()
    program.bench.open(program.client, "g", call=2, count=1)
    for _ in range(3):
        program.later(1.1)
        program.bench.take(m.CancelLease)
        program.fill()
    assert len(program.bench.take_all(m.Notice)) == 1


def test_two_maps_that_take_turns_at_the_only_permit_are_charged_for_nothing() -> None:
    """Each is stopped more often than an input may crash, or than any would be tried again."""
    program = Program(max_containers=1)
    program.fill()
    bench = program.bench
    stopped = program.waiting[0]
    calls = [program.first, bench.open(program.client, "g", call=2, count=1)]
    for number in range(8):
        program.later(1.1)
        assert bench.take(m.CancelLease).lease_id == stopped.lease_id
        running = bench.take(m.Lease)
        assert [stopped.call_id, running.call_id] == [calls[number % 2], calls[1 - number % 2]]
        # How it ends that is stopped: by the order, by what its code made of it, or as if well.
        status = (m.Status.FAILURE, m.Status.ERROR, m.Status.DONE)[number % 3]
        bench.finish(program.worker, stopped, status=status)
        assert bench.take_all(m.Outputs) == []
        for call_id in calls:
            call = bench.core.state.calls[call_id]
            assert (call.crashes, call.attempts, list(call.suspects)) == ({}, {}, [])
        if number == 0:
            program.give(running)
        bench.frame(program.worker, m.LeaseWaits(running.lease_id, 4))
        stopped = running
    assert bench.core.snapshot()["counts"]["generator evicted"] == 8
    bench.finish(program.worker, stopped, status=m.Status.DONE)
    bench.finish(program.worker, bench.take(m.Lease), status=m.Status.DONE)
    ended = [(outputs.call_id, outputs.statuses) for outputs in bench.take_all(m.Outputs)]
    assert ended == [(call_id, bytes([m.Status.DONE])) for call_id in calls]


def test_a_generator_whose_consumer_takes_items_in_time_stays() -> None:
    program = Program(max_containers=1)
    program.fill()
    bench = program.bench
    bench.open(program.client, "g", call=2, count=1)
    for number in range(8, 40, 4):
        program.later(0.9)
        bench.frame(program.client, m.ItemCredit(program.first, 0, number, number - 4))
        bench.take(m.LeaseCredit)
        lease_id = program.waiting[0].lease_id
        at = (lease_id, program.first, 0)
        bench.frame(program.worker, m.LeaseItems(number, *at, number - 4, FOUR, [], b"abcd"))
        bench.frame(program.worker, m.LeaseWaits(lease_id, number))
    assert bench.take_all(m.CancelLease) == []


@pytest.mark.parametrize("is_ordered", [True, False])
def test_the_highest_index_gives_way_to_the_head_of_an_ordered_map(is_ordered: bool) -> None:
    """An unordered one has what its consumer can take, as long as any of its inputs has a place."""
    program = Program(count=3, max_containers=2)
    bench = program.bench
    bench.core.state.calls[program.first].is_ordered = is_ordered
    program.fill()
    bench.finish(program.worker, program.waiting[0], status=m.Status.DONE, input_s=5)
    program.fill()
    second = bench.open(program.client, "g", call=2, count=1)
    # The head is lost, and as the second call has had less, it gets the place.
    lost = program.waiting[1].container_id
    bench.frame(program.worker, m.ContainerExited(lost, "stopped", [], {}, b""))
    taken = bench.take(m.Lease)
    assert taken.call_id == second
    at = (taken.lease_id, taken.call_id, taken.start)
    bench.take_all(m.StartContainer)
    bench.start(program.worker, taken.container_id)
    bench.frame(program.worker, m.LeaseItems(9, *at, 0, FOUR, [], b"abcd"))
    bench.frame(program.worker, m.LeaseWaits(taken.lease_id, 4))
    program.later(1.1)
    stopped = [order.lease_id for order in bench.take_all(m.CancelLease)]
    if is_ordered:
        assert stopped == [program.waiting[2].lease_id]
        lease = bench.take(m.Lease)
        assert (lease.call_id, lease.start, lease.skip) == (program.first, 1, 4)
    else:
        assert stopped == []


@pytest.mark.parametrize("is_same_program", [True, False])
def test_generators_of_other_programs_stay(is_same_program: bool) -> None:
    program = Program(max_containers=1)
    program.fill()
    bench = program.bench
    client = program.client
    if not is_same_program:
        client = bench.connect()
        bench.frame(client, m.OpenApp(b"a" * 16, "app"))
    bench.open(client, "g", call=2, count=1)
    program.later(5)
    assert bool(bench.take_all(m.CancelLease)) == is_same_program


def test_a_place_that_somebody_will_leave_is_waited_for() -> None:
    program = Program(count=1, max_containers=2)
    program.fill()
    bench = program.bench
    bench.open(program.client, "g", call=2, count=1)
    bench.take(m.StartContainer)
    assert bench.take(m.Lease).call_id == bytes([2]) * 16, "it runs, and will end or wait"
    bench.open(program.client, "g", call=3, count=1)
    program.later(5)
    assert bench.take_all(m.CancelLease) == []


def test_a_map_whose_head_has_its_place_waits_for_its_consumer() -> None:
    program = Program(count=3, max_containers=1)
    program.fill()
    program.later(5)
    assert program.bench.take_all(m.CancelLease) == []


def test_a_generator_that_waits_for_the_call_itself_is_no_solution() -> None:
    program = Program(max_containers=1)
    bench = program.bench
    lease = bench.started_lease(program.worker)
    nested = bench.connect("nested", worker=program.worker, container_id=lease.container_id)
    bench.frame(nested, m.SessionWaits(0))
    bench.open(nested, "g", call=2, count=1, parent=(lease.lease_id, 0))
    assert b"g -> g" in bytes(bench.take(m.CallFailed).payload)
    program.later(5)
    assert bench.take_all(m.CancelLease) == []


def test_of_its_own_callers_none_is_stopped() -> None:
    program = Program(count=2, max_containers=2)
    bench = program.bench
    for order in bench.take_all(m.StartContainer):
        bench.start(program.worker, order.container_id)
    waiting, calling = bench.take_all(m.Lease)
    at = (waiting.lease_id, waiting.call_id, waiting.start)
    bench.frame(program.worker, m.LeaseItems(1, *at, 0, FOUR, [], b"abcd"))
    bench.frame(program.worker, m.LeaseWaits(waiting.lease_id, 4))
    nested = bench.connect("nested", worker=program.worker, container_id=calling.container_id)
    bench.frame(nested, m.SessionWaits(0))
    bench.open(nested, "g", call=2, count=1, parent=(calling.lease_id, 1))
    program.later(1.1)
    assert bench.take(m.CancelLease).lease_id == waiting.lease_id


def test_a_nested_call_gets_the_place_of_a_generator_whose_consumer_waits_for_its_caller() -> None:
    program = Program(max_containers=1)
    program.fill()
    bench = program.bench
    bench.open(program.client, "f", call=2, count=1)
    outer = bench.started_lease(program.worker)
    nested = bench.connect("nested", worker=program.worker, container_id=outer.container_id)
    bench.open(nested, "g", call=3, count=1, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    program.later(1.1)
    bench.take(m.CancelLease)
    assert bench.take(m.Lease).call_id == bytes([3]) * 16


def test_a_generator_gives_its_memory_to_the_call_that_its_consumer_waits_for() -> None:
    program = Program(memory=600)
    program.fill()
    bench = program.bench
    bench.open(program.client, "f", call=2, count=1)
    program.later(1.1)
    container_id = bench.take(m.StopContainer).container_id
    bench.take(m.CancelLease)
    assert bench.take_all(m.Lease) == [], "the memory is not free yet"
    bench.frame(program.worker, m.ContainerExited(container_id, "stopped", [], {}, b""))
    bench.take_all(m.StartContainer)
    assert bench.take(m.Lease).call_id == bytes([2]) * 16


def test_where_two_have_to_go_the_first_does_not_come_back_before_the_second_has_gone() -> None:
    program = Program(count=2, memory=400)
    bench = program.bench
    program.fill()
    bench.define(program.client, "h", {"memory": 900})
    bench.open(program.client, "h", call=2, count=1)
    for _ in range(2):
        program.later(1.1)
        stopped = bench.take(m.StopContainer)
        bench.frame(program.worker, m.ContainerExited(stopped.container_id, "stopped", [], {}, b""))
    assert bench.take(m.Lease).call_id == bytes([2]) * 16


def test_the_second_begins_when_the_last_of_those_who_hold_a_place_began_to_wait() -> None:
    """A call that was blocked before, and not while somebody got on, has not waited in vain."""
    program = Program(count=1, max_containers=2)
    program.fill()
    bench = program.bench
    first = program.waiting[0].lease_id
    other = bench.connect()
    bench.frame(other, m.OpenApp(APP, "app"))
    bench.open(other, "g", call=5, count=1)
    program.fill()
    second = program.waiting[0].lease_id
    bench.open(program.client, "g", call=2, count=1)
    program.later(0.9)
    bench.frame(other, m.ItemCredit(bytes([5]) * 16, 0, 8, 4))
    bench.take(m.LeaseCredit)
    program.later(0.9)
    bench.frame(program.worker, m.LeaseItems(9, second, bytes([5]) * 16, 0, 4, FOUR, [], b"abcd"))
    bench.frame(program.worker, m.LeaseWaits(second, 8))
    program.later(0.9)
    assert bench.take_all(m.CancelLease) == []
    program.later(0.2)
    assert bench.take(m.CancelLease).lease_id == first


def pass_seconds(program: Program, seconds: int) -> None:
    for _ in range(seconds):
        program.later(1)


def test_a_worker_that_is_kept_for_another_program_keeps_no_generator_in_its_place() -> None:
    program = Program(memory=600)
    bench = program.bench
    bench.start_all(program.worker)
    generator = bench.core.state.leases.copy().popitem()[1]
    other = bench.connect()
    bench.frame(other, m.OpenApp(APP, "app"))
    bench.define(other, "l", {"memory": 1000})
    bench.define(other, "s", {"memory": 300})
    large = bench.open(other, "l", call=8, count=1)
    pass_seconds(program, 31)
    small = bench.open(other, "s", call=9, count=1)
    assert bench.core.snapshot()["workers"][0]["reserved_for"] == "l"
    assert bench.core.state.calls[small].waits_for == (
        "a worker: what is free is kept for another request"
    )
    at = (generator.lease_id, program.first, 0)
    bench.frame(program.worker, m.LeaseItems(1, *at, 0, FOUR, [], b"abcd"))
    bench.frame(program.worker, m.LeaseWaits(generator.lease_id, 4))
    bench.open(program.client, "f", call=2, count=1)
    pass_seconds(program, 2)
    assert bench.take(m.CancelLease).lease_id == generator.lease_id
    stopped = bench.take(m.StopContainer).container_id
    bench.frame(program.worker, m.ContainerExited(stopped, "stopped", [], {}, b""))
    lease = next(lease for lease in bench.start_all(program.worker) if lease.call_id[0] == 2)
    # The other has waited for longer than anybody, so it is the next.
    bench.finish(program.worker, lease)
    for stop in bench.take_all(m.StopContainer):
        bench.frame(program.worker, m.ContainerExited(stop.container_id, "stopped", [], {}, b""))
    assert large in [lease.call_id for lease in bench.start_all(program.worker)]


def test_what_one_program_has_had_stopped_is_not_taken_by_the_next_before_it_is_enough() -> None:
    """And if it never is, then the other has its turn."""
    program = Program(count=1, memory=500)
    bench = program.bench
    other = bench.connect()
    bench.frame(other, m.OpenApp(APP, "app"))
    bench.open(other, "g", call=5, count=1)
    program.fill()
    bench.define(program.client, "h", {"memory": 900})
    bench.open(program.client, "h", call=2, count=1)
    program.later(1.1)
    stopped = bench.take(m.StopContainer).container_id
    bench.frame(program.worker, m.ContainerExited(stopped, "stopped", [], {}, b""))
    bench.define(other, "k", {"memory": 900})
    bench.open(other, "k", call=3, count=1)
    pass_seconds(program, 6)
    assert bench.take_all(m.StopContainer) == []
    pass_seconds(program, 6)
    stopped = bench.take(m.StopContainer).container_id
    bench.frame(program.worker, m.ContainerExited(stopped, "stopped", [], {}, b""))
    assert bytes([3]) * 16 in [lease.call_id for lease in bench.start_all(program.worker)]
