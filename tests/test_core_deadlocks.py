"""Nested calls that only their own callers stand in the way of are told so, and no others are."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fanout.protocol import messages as m
from fanout_scheduler.core import placement
from tests.core_kit import Bench, exited
from tests.object_kit import ObjectBench


def text_of(failed: m.CallFailed) -> tuple[str, str]:
    code, text, _ = msgpack.unpackb(failed.payload)
    return code, text


def nest(bench: Bench, options: dict[str, Any], depth: int) -> None:
    """Calls of f within each other, all of which wait for the next one."""
    worker = bench.worker(cpu=9)
    client = bench.client(f=options)
    bench.open(client, count=1)
    for number in range(2, 2 + depth):
        lease = bench.started_lease(worker)
        nested = bench.connect("nested", worker=worker, container_id=lease.container_id)
        bench.open(nested, call=number, count=1, parent=(lease.lease_id, 0))
        bench.frame(nested, m.SessionWaits(0))


def test_permits_that_are_held_by_those_who_wait_are_counted_in_the_error() -> None:
    bench = Bench()
    nest(bench, {"max_containers": 2}, 2)
    code, text = text_of(bench.take(m.CallFailed))
    assert code == "deadlock"
    assert text == (
        "f -> f -> f: all 2 permits of f (max_containers) are held by inputs that wait for calls "
        "like this one. Raise max_containers, or call the function with .local()"
    )


def test_containers_that_are_held_by_those_who_wait_are_counted_in_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "CONTAINERS_MAX", 3)
    bench = Bench()
    nest(bench, {}, 3)
    code, text = text_of(bench.take(m.CallFailed))
    assert code == "deadlock"
    assert text.startswith("f -> f -> f -> f: all 3 containers that the workers can hold are taken")


def test_memory_that_is_held_by_those_who_wait_is_told_in_the_error() -> None:
    bench = Bench()
    nest(bench, {"memory": 400}, 2)
    code, text = text_of(bench.take(m.CallFailed))
    assert code == "deadlock"
    assert text.startswith(
        "f -> f -> f: the memory that it needs is held in 2 containers by inputs"
    )


def test_a_container_that_will_be_idle_is_room_for_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "CONTAINERS_MAX", 2)
    bench = Bench()
    worker = bench.worker(cpu=9)
    client = bench.client(f={}, g={})
    bench.open(client, "g", call=9, count=1)
    other = bench.started_lease(worker)
    bench.open(client, call=1, count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, call=2, count=1, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    assert bench.take_all(m.CallFailed) == []
    bench.finish(worker, other)
    bench.frame(worker, exited(bench.take(m.StopContainer).container_id))
    assert bench.started_lease(worker).call_id == bytes([2]) * 16


def test_one_container_that_gets_on_is_enough() -> None:
    bench = Bench()
    worker = bench.worker(cpu=9)
    client = bench.client(f={"max_containers": 2})
    bench.open(client, call=1, count=2)
    leases = bench.start_all(worker)
    nested = [
        bench.connect("nested", worker=worker, container_id=lease.container_id) for lease in leases
    ]
    bench.open(nested[0], call=2, count=1, parent=(leases[0].lease_id, 0))
    bench.frame(nested[0], m.SessionWaits(0))
    # The other one waits too, but for nothing that it has called: it goes on by itself.
    bench.frame(nested[1], m.SessionWaits(0))
    assert bench.take_all(m.CallFailed) == []
    assert (
        bench.core.state.calls[bytes([2]) * 16].waits_for == "a permit: max_containers are in use"
    )
    bench.frame(nested[1], m.SessionRuns())
    bench.finish(worker, leases[1], input_s=1.0)
    assert bench.take(m.Lease).call_id == bytes([2]) * 16


def two_callers(bench: Bench, **functions: Any) -> tuple[int, int, list[m.Lease], list[int]]:
    """Both containers that f may have run an input, and each has a client of its own."""
    worker = bench.worker(cpu=9)
    client = bench.client(f={"max_containers": 2}, **functions)
    bench.open(client, call=1, count=2)
    leases = bench.start_all(worker)
    peers = [
        bench.connect("nested", worker=worker, container_id=lease.container_id) for lease in leases
    ]
    return worker, client, leases, peers


def test_who_waits_at_a_queue_may_get_on() -> None:
    bench = ObjectBench()
    _, client, leases, peers = two_callers(bench)
    bench.make(client)
    bench.get(peers[1])
    for number, (peer, lease) in enumerate(zip(peers, leases, strict=True), 2):
        parent = (lease.lease_id, lease.start)
        bench.open(peer, call=number, count=1, parent=parent)
        bench.frame(peer, m.SessionWaits(0))
    assert bench.take_all(m.CallFailed) == []
    bench.put(client, b"a")
    bench.write()
    bench.answer(client)
    assert bench.values(peers[1]) == [b"a"]


def test_who_waits_for_an_input_that_backs_off_gets_on() -> None:
    bench = Bench()
    worker, _, leases, peers = two_callers(bench, g={"retries": [1, 50.0, 1.0, 60.0]})
    bench.open(peers[0], "g", call=2, count=1, parent=(leases[0].lease_id, 0))
    inner = bench.started_lease(worker)
    bench.finish(worker, inner, status=m.Status.ERROR)
    bench.frame(peers[0], m.SessionWaits(0))
    bench.open(peers[1], call=3, count=1, parent=(leases[1].lease_id, 1))
    bench.frame(peers[1], m.SessionWaits(0))
    assert bench.take_all(m.CallFailed) == []


def test_who_waits_for_an_input_that_runs_gets_on_unless_that_one_waits_too() -> None:
    bench = Bench()
    worker, _, leases, peers = two_callers(bench, g={})
    bench.open(peers[0], "g", call=2, count=1, parent=(leases[0].lease_id, 0))
    inner = bench.started_lease(worker)
    bench.frame(peers[0], m.SessionWaits(0))
    bench.open(peers[1], call=3, count=1, parent=(leases[1].lease_id, 1))
    bench.frame(peers[1], m.SessionWaits(0))
    assert bench.take_all(m.CallFailed) == []
    deepest = bench.connect("nested", worker=worker, container_id=inner.container_id)
    bench.open(deepest, call=4, count=1, parent=(inner.lease_id, 0))
    bench.frame(deepest, m.SessionWaits(0))
    chains = [text_of(failed)[1].partition(":")[0] for failed in bench.take_all(m.CallFailed)]
    assert chains == ["f -> g -> f"], "and the caller beside it gets on when that one does"


def test_a_call_that_fits_beside_one_that_waits_gets_on() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(
        f={"max_containers": 1}, h={"max_inputs": 2, "max_containers": 1}, g={}
    )  # fmt: skip
    bench.open(client, "f", call=1, count=1)
    outer = bench.started_lease(worker)
    caller = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.frame(caller, m.SessionWaits(0))
    bench.open(client, "h", call=2, count=1)
    beside = bench.started_lease(worker)
    other = bench.connect("nested", worker=worker, container_id=beside.container_id)
    bench.open(other, "f", call=3, count=1, parent=(beside.lease_id, 0))
    bench.frame(other, m.SessionWaits(0))
    bench.open(client, "g", call=4, count=1)
    busy = bench.started_lease(worker)
    bench.open(caller, "h", call=5, count=1, parent=(outer.lease_id, 0))
    assert bench.take_all(m.CallFailed) == [], "it waits for the core alone"
    bench.finish(worker, busy)
    inner = bench.take(m.Lease)
    assert (inner.call_id[0], inner.container_id) == (5, beside.container_id)


@pytest.mark.parametrize(("cpu", "memory"), [(0.5, 9000), (9, 50)])
def test_room_on_a_worker_where_the_call_does_not_fit_is_none(
    monkeypatch: pytest.MonkeyPatch, cpu: float, memory: int
) -> None:
    monkeypatch.setattr(placement, "CONTAINERS_MAX", 2)
    bench = Bench()
    small = bench.connect("worker")
    bench.frame(small, m.WorkerReady(b"s" * 16, "small", cpu, memory, True, [], []))
    bench.forget(m.WorkerAccepted)
    nest(bench, {"memory": 100}, 2)
    assert text_of(bench.take(m.CallFailed))[0] == "deadlock"


def test_a_call_that_lacks_only_a_core_gets_on() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_containers": 1}, g={}, h={})
    bench.open(client, "f", call=1, count=1)
    outer = bench.started_lease(worker)
    caller = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.frame(caller, m.SessionWaits(0))
    bench.open(client, "h", call=2, count=1)
    beside = bench.started_lease(worker)
    other = bench.connect("nested", worker=worker, container_id=beside.container_id)
    bench.open(other, "f", call=3, count=1, parent=(beside.lease_id, 0))
    bench.frame(other, m.SessionWaits(0))
    bench.open(client, "h", call=4, count=1)
    busy = bench.started_lease(worker)
    bench.open(caller, "g", call=5, count=1, parent=(outer.lease_id, 0))
    assert bench.take_all(m.CallFailed) == []
    bench.finish(worker, busy)
    assert bench.started_lease(worker).call_id[0] == 5
