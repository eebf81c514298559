"""What one step of the scheduler's core costs when there is much of everything.

Cost is counted in lines of Python that run, so a test says the same on every machine.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable
from typing import Any

from fanout.config import RESULT_RETENTION_S
from fanout.protocol import messages as m
from fanout_scheduler.core.check import check
from fanout_scheduler.core.events import FrameReceived, PeerId, Send, TimePassed
from tests.core_kit import APP, Bench, inputs, steps, table

#: What is few and what is many; a step beside the many may cost this much more.
FEW, MANY = 20, 400
GROWTH_MAX = 1.5


def cost_beside(count: int, prepare: Callable[[Bench, int], Callable[[], Any]]) -> int:
    """Lines that a step takes in a core in which `prepare` made `count` of something."""
    bench = unchecked()
    action = prepare(bench, count)
    cost = steps(action)
    check(bench.core.state)
    return cost


def unchecked() -> Bench:
    """A bench that checks nothing after each step: that is a search through all there is."""
    bench = Bench()
    bench.core.check = lambda: None  # type: ignore[method-assign]
    return bench


def assert_flat(prepare: Callable[[Bench, int], Callable[[], Any]]) -> None:
    few, many = cost_beside(FEW, prepare), cost_beside(MANY, prepare)
    assert many <= GROWTH_MAX * few, f"{few} lines beside {FEW}, {many} beside {MANY}"


def spawn_one_each(bench: Bench, client: int, count: int) -> list[bytes]:
    """So many spawned calls of one input, all on disk."""
    call_ids = [os.urandom(16) for _ in range(count)]
    lengths, payload = table([b"x"])
    with bench.one_turn():
        for call_id in call_ids:
            message = m.SubmitCall(call_id, b"f" * 16, True, True, None, "", lengths, [], payload)
            bench.core.handle(FrameReceived(PeerId(client), message), bench.now)
    bench.store()
    bench.orders.clear()
    return call_ids


def test_the_end_of_a_fetch_costs_the_same_however_many_calls_there_are() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        client = bench.client(f={})
        call_ids = spawn_one_each(bench, client, count)
        bench.frame(client, m.FetchOutputs(7, call_ids[3], 0, 1))
        return lambda: bench.frame(client, m.StopFetch(7))

    assert_flat(prepare)


def test_a_lost_client_that_fetches_costs_the_same_however_many_calls_there_are() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        spawner = bench.client(f={})
        call_ids = spawn_one_each(bench, spawner, count)
        reader = bench.connect()
        bench.frame(reader, m.FetchOutputs(7, call_ids[3], 0, 1))
        return lambda: bench.lose(reader)

    assert_flat(prepare)


def finished_call(bench: Bench, client: int, count: int) -> bytes:
    """A spawned call of `count` inputs, each with an output in a frame of its own."""
    worker = bench.worker(cpu=1)
    call_id = bench.open(client, count=count, is_durable=True)
    bench.store()
    for _ in range(count):
        for lease in bench.take_all(m.Lease):
            for at in range(len(lease.lengths) // 4):
                bench.finish(worker, lease, count=1, skip=at)
        bench.store()
    assert bench.core.state.calls[call_id].is_over
    bench.orders.clear()
    return call_id


def test_fetching_one_output_costs_the_same_however_many_the_call_has() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        client = bench.client(f={})
        call_id = finished_call(bench, client, count)
        return lambda: bench.frame(client, m.FetchOutputs(7, call_id, count - 2, count - 1))

    assert_flat(prepare)


def test_a_report_that_is_said_again_costs_the_same_however_much_is_on_its_way_to_disk() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        worker = bench.worker(cpu=1)
        client = bench.client(f={})
        bench.open(client, count=count, is_durable=True)
        bench.store()
        leases = [bench.started_lease(worker)]
        for lease in leases:
            for at in range(len(lease.lengths) // 4):
                bench.finish(worker, lease, count=1, skip=at)
            leases += bench.take_all(m.Lease)
        bench.orders.clear()
        return lambda: bench.finish(worker, leases[-1], count=1)

    assert_flat(prepare)


def test_calls_are_forgotten_at_a_cost_for_each_that_does_not_grow() -> None:
    def cost_of_each(count: int) -> float:
        bench = unchecked()
        client = bench.client(f={})
        call_ids = spawn_one_each(bench, client, count)
        with bench.one_turn():
            for call_id in call_ids:
                bench.frame(client, m.CancelCall(call_id))
        bench.frame(client, m.CloseApp(APP))
        bench.store()
        bench.now += RESULT_RETENTION_S + 1
        cost = steps(lambda: bench.tell(TimePassed()))
        check(bench.core.state)
        assert not bench.core.state.calls
        assert not bench.core.state.apps
        return cost / count

    assert cost_of_each(MANY) <= GROWTH_MAX * cost_of_each(FEW)


# --- a fleet --------------------------------------------------------------------------------------


def add_workers(bench: Bench, count: int, cpu: float = 1.0) -> list[int]:
    """So many workers; their peers."""
    peers = []
    for number in range(count):
        peers.append(bench.connect("worker"))
        worker_id = number.to_bytes(16, "big")
        ready = m.WorkerReady(worker_id, f"w{number}", cpu, 1000, False, [], [])
        bench.frame(peers[-1], ready)
    bench.orders.clear()
    return peers


def busy_fleet(bench: Bench, count: int, waiting_count: int, **options: Any) -> dict[int, m.Lease]:
    """So many workers with one container each that runs one input, while others wait; the leases
    by the peers of their workers."""
    peers = add_workers(bench, count)
    client = bench.client(f=options)
    bench.open(client, count=count + waiting_count)
    leases = {}
    for order in bench.orders:
        if isinstance(order, Send) and isinstance(order.message, m.Lease):
            leases[int(order.peer_id)] = order.message
    assert len(leases) == count
    with bench.one_turn():
        for peer, lease in leases.items():
            bench.start(peer, lease.container_id)
    bench.orders.clear()
    assert leases.keys() == set(peers)
    return leases


def test_a_container_that_is_done_gets_its_next_input_however_many_others_there_are() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        peer, lease = busy_fleet(bench, count, waiting_count=50).popitem()

        def act() -> None:
            bench.finish(peer, lease, input_s=10.0)
            assert bench.take_all(m.Lease)

        return act

    assert_flat(prepare)


def test_a_turn_costs_the_same_however_many_containers_run_and_nothing_waits() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        peers = list(busy_fleet(bench, count, waiting_count=0))
        add = m.WorkerReady(b"idle" * 4, "idle", 1.0, 1000, False, [], [])
        bench.frame(bench.connect("worker"), add)
        bench.now += 1.0
        return lambda: bench.frame(peers[0], m.Heartbeat(1))

    assert_flat(prepare)


def test_a_container_starts_at_the_same_cost_however_many_workers_there_are() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        add_workers(bench, count)
        client = bench.client(f={})

        def act() -> None:
            bench.open(client, count=1)
            bench.take(m.StartContainer)

        return act

    assert_flat(prepare)


def test_many_containers_start_at_a_cost_for_each_that_does_not_grow() -> None:
    def cost_of_each(count: int) -> float:
        bench = unchecked()
        add_workers(bench, count)
        client = bench.client(f={})
        cost = steps(lambda: bench.open(client, count=count))
        assert len(bench.take_all(m.StartContainer)) == count
        return cost / count

    assert cost_of_each(MANY) <= GROWTH_MAX * cost_of_each(FEW)


def test_a_container_leaves_when_idle_however_many_others_there_are() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        leases = busy_fleet(bench, count, waiting_count=0, scaledown_window=1.0)
        peer, lease = leases.popitem()
        bench.finish(peer, lease)
        bench.orders.clear()

        def act() -> None:
            bench.now += 2.0
            bench.tell(TimePassed())
            assert bench.take(m.StopContainer).container_id == lease.container_id

        return act

    assert_flat(prepare)


def test_a_report_is_acknowledged_however_many_workers_have_others() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        leases = busy_fleet(bench, count, waiting_count=0)
        last = leases.popitem()
        with bench.one_turn():
            for peer, lease in leases.items():
                bench.finish(peer, lease, input_s=10.0)
        return lambda: bench.finish(*last, input_s=10.0)

    assert_flat(prepare)


def test_what_waits_for_the_disk_costs_other_workers_nothing() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        leases = busy_fleet(bench, count, waiting_count=0)
        with bench.one_turn():
            for peer, lease in leases.items():
                bench.finish(peer, lease, input_s=10.0)
        client = bench.connect()
        call_id = os.urandom(16)
        bench.orders.clear()
        bench.frame(client, m.OpenCall(call_id, b"f" * 16, True, True, None))
        return bench.store

    assert_flat(prepare)


def test_a_turn_costs_the_same_however_many_calls_wait_for_permits_of_those_who_wait() -> None:
    """Nested callers, as they are everywhere: there is no generator that could give its place."""

    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        worker = bench.worker(cpu=4.0, is_embedded=False)
        client = bench.client(f={"max_containers": 4}, g={})
        lengths, payload = table([b"x"])
        with bench.one_turn():
            for number in range(count + 4):
                at = (number.to_bytes(16, "big"), b"f" * 16, False, True, None, "")
                bench.frame(client, m.SubmitCall(*at, lengths, [], payload))
        for lease in bench.start_all(worker):
            nested = bench.connect("nested", worker=worker, container_id=lease.container_id)
            parent = (lease.lease_id, lease.start)
            bench.frame(nested, m.OpenCall(os.urandom(16), b"g" * 16, False, True, parent))
            bench.frame(nested, m.SessionWaits(0))
        assert all(c.is_waiting for c in bench.core.state.containers.values())
        return lambda: bench.core.decide(bench.now)

    assert_flat(prepare)


def test_advice_costs_the_same_however_many_containers_and_calls_a_function_has() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        leases = busy_fleet(bench, count, waiting_count=50)
        spawn_one_each(bench, bench.connect(), count)
        for container in bench.core.state.containers.values():
            container.cpu_s = container.busy_s = 100.0
        times = [(peer, m.CpuTimes([(lease.container_id, 1000)])) for peer, lease in leases.items()]

        def act() -> None:
            for peer, message in times[:FEW]:
                bench.core.handle(FrameReceived(PeerId(peer), message), bench.now)

        act()
        return act

    assert_flat(prepare)


def test_looking_for_memory_costs_the_same_however_many_containers_work() -> None:
    def prepare(bench: Bench, count: int) -> Callable[[], Any]:
        worker = bench.worker(cpu=count + 10.0, is_embedded=False)
        client = bench.client(f={"memory": 2}, l={"memory": 990})
        bench.open(client, count=count // 2)
        bench.start_all(worker)
        bench.open(client, "l", call=2, count=1)
        assert bench.core.state.calls[bytes([2]) * 16].waits_for == "free memory"
        return lambda: bench.core.decide(bench.now)

    assert_flat(prepare)


# --- memory ---------------------------------------------------------------------------------------

#: What a spawned call of one input may cost the core while it waits, and an input of a chunk.
CALL_BYTES_MAX = 3072
INPUT_BYTES_MAX = 10


def bytes_of(action: Callable[[], Any]) -> int:
    """What is allocated by this and stays."""
    gc.collect()
    tracemalloc.start()
    try:
        action()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_spawned_call_that_waits_costs_three_kilobytes() -> None:
    bench = Bench()
    client = bench.client(f={})
    spawn_one_each(bench, client, 10)
    used = bytes_of(lambda: spawn_one_each(bench, client, 1000))
    assert used / 1000 < CALL_BYTES_MAX


def test_a_spawned_input_that_waits_costs_ten_bytes_beyond_its_payload() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, is_durable=True, is_sealed=False)
    bench.store()
    size, part, parts = 20, 512, 40

    def spawn() -> None:
        for number in range(parts):
            bench.frame(client, inputs(call_id, number * part, part, size))
            bench.store()
            bench.orders.clear()

    beyond = bytes_of(spawn) / (part * parts) - size
    assert beyond < INPUT_BYTES_MAX
