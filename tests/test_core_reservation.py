"""A request that needs more than what becomes free at a time, beside others that need less."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from fanout.protocol import messages as m
from tests.core_kit import Bench


class Busy:
    """A worker whose cores are all taken by one-second inputs of a small function, one after the
    other and never all at the same time, and a large request that comes later."""

    def __init__(self, large: dict[str, Any], small: dict[str, Any] | None = None) -> None:
        self.bench = Bench()
        self.worker = self.bench.worker(cpu=2, is_embedded=False)
        self.client = self.bench.client(s=small or {}, l=large, h={})
        self.bench.open(self.client, "s", call=1, count=1000)
        self.running: deque[m.Lease] = deque()
        self.large: list[m.Lease] = []
        self.small_count = 0
        self.take()
        self.bench.open(self.client, "l", call=2, count=1)

    def take(self) -> None:
        """Do what the scheduler orders: start and stop containers, run leases."""
        bench = self.bench
        while orders := bench.take_all(m.StartContainer) + bench.take_all(m.StopContainer):
            for order in orders:
                if isinstance(order, m.StartContainer):
                    bench.start(self.worker, order.container_id)
                else:
                    exited = m.ContainerExited(order.container_id, "stopped", [], {}, b"")
                    bench.frame(self.worker, exited)
        for lease in bench.take_all(m.Lease):
            if lease.call_id[0] in (2, 3):
                self.large.append(lease)
            else:
                self.running.append(lease)
                self.small_count += 1
        bench.forget(m.DefineFunction, m.DropFunction, m.Outputs, m.OutputsAck, m.Window)

    def run(self, seconds: float) -> None:
        """The oldest input ends every half second."""
        for _ in range(int(seconds * 2)):
            self.bench.later(0.5)
            self.bench.frame(self.worker, m.Heartbeat(0))
            if self.running:
                self.bench.finish(self.worker, self.running.popleft(), input_s=1.0)
            self.take()


def test_a_request_for_more_cores_than_become_free_at_a_time_is_served_after_a_while() -> None:
    busy = Busy(large={"cpu": 2})
    busy.run(29)
    assert busy.large == []
    busy.run(4)
    assert len(busy.large) == 1, "both cores were kept for it until they were free"
    assert not busy.running


def test_the_others_go_on_when_it_has_begun() -> None:
    busy = Busy(large={"cpu": 2})
    busy.run(35)
    before = busy.small_count
    busy.bench.finish(busy.worker, busy.large[0])
    busy.take()
    busy.run(5)
    assert busy.small_count >= before + 10


def test_a_request_for_memory_that_warm_containers_hold_is_served_after_a_while() -> None:
    busy = Busy(large={"cpu": 1, "memory": 800}, small={"memory": 400})
    busy.run(29)
    assert busy.large == []
    busy.run(4)
    assert len(busy.large) == 1


def test_a_request_that_is_served_again_and_again_keeps_nothing_free() -> None:
    busy = Busy(large={"cpu": 2})
    busy.run(35)
    busy.bench.finish(busy.worker, busy.large[0])
    busy.take()
    busy.bench.open(busy.client, "l", call=3, count=1)
    busy.run(25)
    assert len(busy.large) == 1, "the second has not waited for long"


def test_what_is_kept_free_for_a_call_that_ends_is_given_to_others() -> None:
    busy = Busy(large={"cpu": 2})
    busy.run(29.5)
    before = busy.small_count
    busy.run(0.5)
    assert busy.small_count == before, "it is kept free"
    assert busy.bench.core.snapshot()["workers"][0]["reserved_for"] == "l"
    busy.bench.frame(busy.client, m.CancelCall(bytes([2]) * 16))
    busy.take()
    assert len(busy.running) == 2


def test_a_reservation_ends_with_its_worker() -> None:
    busy = Busy(large={"cpu": 2})
    busy.run(30)
    busy.bench.lose(busy.worker)
    busy.running.clear()
    busy.worker = busy.bench.worker(cpu=1, number=2, is_embedded=False)
    busy.take()
    busy.run(10)
    assert len(busy.running) == 1, "the large one does not fit there, so the small one runs"
    busy.worker = busy.bench.worker(cpu=2, number=3, is_embedded=False)
    busy.take()
    assert len(busy.large) == 1


def test_a_reservation_ends_with_the_app_of_its_function() -> None:
    busy = Busy(large={"cpu": 2})
    other = busy.bench.connect()
    app = b"b" * 16
    busy.bench.frame(
        other,
        m.OpenApp(app, "other"),
        m.DefineFunction(b"x" * 16, app, "x", {"cpu": 2}, [], b"code"),
    )
    busy.bench.frame(busy.client, m.CancelCall(bytes([2]) * 16))
    busy.bench.open(other, "x", call=3, count=1)
    busy.run(30)
    assert busy.bench.core.snapshot()["workers"][0]["reserved_for"] == "x"
    busy.bench.frame(other, m.CloseApp(app))
    busy.take()
    busy.run(5)
    assert len(busy.running) == 2


def test_a_nested_call_runs_also_where_cores_are_kept_free() -> None:
    """Its caller holds the memory that the large request waits for."""
    busy = Busy(large={"cpu": 1, "memory": 800}, small={"memory": 400})
    bench = busy.bench
    outer = busy.running.popleft()
    busy.run(31)
    assert busy.large == []
    nested = bench.connect("nested", worker=busy.worker, container_id=outer.container_id)
    bench.open(nested, "h", call=9, count=1, parent=(outer.lease_id, outer.start))
    bench.frame(nested, m.SessionWaits(0))
    busy.take()
    assert [lease.call_id for lease in busy.running] == [bytes([9]) * 16]


def test_requests_of_one_size_keep_nothing_free() -> None:
    """Whichever was served least is first for every core that becomes free, and that is enough."""
    busy = Busy(large={"cpu": 1})
    busy.running.clear()
    busy.run(100)
    assert busy.bench.core.snapshot()["workers"][0]["reserved_for"] == ""


@pytest.mark.parametrize("cpu", [1, 2], ids=["of the same size", "a larger one"])
def test_a_container_of_several_inputs_gives_its_core_back_though_it_could_have_more(
    cpu: int,
) -> None:
    """There is never a moment at which it has none, unless it gets no more."""
    bench = Bench()
    worker = bench.worker(cpu=cpu, is_embedded=False)
    client = bench.client(g={"max_inputs": 4}, f={"cpu": cpu})
    bench.open(client, "g", call=1, count=1000)
    running = bench.start_all(worker)
    bench.open(client, "f", call=2, count=3)
    served: list[float] = []
    for step in range(300):
        bench.later(0.25)
        bench.frame(worker, m.Heartbeat(0))
        lease = running.pop(0)
        for at in range(len(lease.lengths) // 4):
            bench.finish(worker, lease, count=1, skip=at, input_s=1.0)
        for new in bench.start_all(worker):
            if new.call_id[0] == 2:
                served.append(step / 4)
            running.append(new)
    assert len(served) == 3
    assert served[0] < 35
    assert bench.core.state.calls[bytes([1]) * 16].finished.count > 100


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_container_that_goes_on_gets_its_core_from_one_of_several_inputs(is_nested: bool) -> None:
    """What the inputs of others wait for goes into the container all the same."""
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={"max_inputs": 4})
    bench.open(client, "f", call=1, count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    parent = (outer.lease_id, 0)
    asked = bench.open(nested, "g", call=2, count=1, parent=parent)
    bench.open(nested, "g", call=3, count=1, parent=parent)
    bench.frame(nested, m.SessionWaits(0))
    running = bench.start_all(worker)
    bench.open(client, "g", call=4, count=100)
    running += bench.take_all(m.Lease)
    first = next(lease for lease in running if lease.call_id == asked)
    bench.finish(worker, first)
    assert bench.core.state.resuming
    bench.orders.clear()
    if is_nested:
        bench.open(nested, "g", call=5, count=1, parent=parent)
        assert [lease.call_id[0] for lease in bench.take_all(m.Lease)] == [5]
        return
    running.remove(first)
    for lease in running:
        for at in range(len(lease.lengths) // 4):
            bench.finish(worker, lease, count=1, skip=at)
    bench.forget(m.Lease)
    assert not bench.core.state.resuming
    assert bench.take_all(m.Outputs, nested)
