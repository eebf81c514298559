"""A request that needs more than what becomes free at a time, beside others that need less."""

from __future__ import annotations

from collections import deque
from typing import Any

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
