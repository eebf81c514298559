"""What the scheduler tells a client that watches of how its calls get on, and when."""

from __future__ import annotations

import pytest

from fanout.protocol import messages as m
from fanout_scheduler.core import progress
from fanout_scheduler.core.events import PeerId, PeerWritable
from tests.core_kit import Bench, ack

KINDS = (m.CallProgress, m.FunctionProgress)


def watching(**functions: dict[str, object]) -> tuple[Bench, int, int]:
    """A bench with a worker and a client that watches."""
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(**(functions or {"f": {}}))
    bench.frame(client, m.WatchProgress(True))
    bench.later(1)
    assert not any(bench.take_all(kind) for kind in KINDS), "nothing is open"
    return bench, worker, client


def call_rows(bench: Bench) -> list[m.CallProgress]:
    return bench.take_all(m.CallProgress)


def test_a_client_that_does_not_watch_is_told_nothing() -> None:
    bench = Bench()
    worker = bench.worker()
    bench.open(bench.client(f={"max_containers": 1}), count=3)
    bench.started_lease(worker)
    bench.later(5)
    assert not any(bench.take_all(kind) for kind in KINDS)


def test_a_call_is_told_when_it_has_been_open_for_a_moment() -> None:
    bench, worker, client = watching()
    bench.open(client, count=3)
    (start,) = bench.take_all(m.StartContainer, worker)[:1]
    assert call_rows(bench) == []
    bench.later(progress.INTERVAL_S)
    (row,) = call_rows(bench)
    assert (row.name, row.input_count, row.finished_count, row.is_sealed) == ("f", 3, 0, True)
    assert (row.running, row.starting) == (0, 2)
    (function,) = bench.take_all(m.FunctionProgress)
    assert (function.running, function.starting) == (0, 2)
    bench.start(worker, start.container_id)
    bench.later(progress.INTERVAL_S)
    (row,) = call_rows(bench)
    assert (row.running, row.starting) == (1, 1)
    (function,) = bench.take_all(m.FunctionProgress)
    assert (function.running, function.starting) == (1, 1)


def test_nothing_is_said_twice() -> None:
    bench, _, client = watching()
    bench.open(client, count=3)
    bench.later(progress.INTERVAL_S)
    assert len(call_rows(bench)) == 1
    bench.take_all(m.FunctionProgress)
    bench.later(10)
    assert not any(bench.take_all(kind) for kind in KINDS)


def test_numbers_that_change_all_the_time_are_told_a_few_times_a_second() -> None:
    bench, worker, client = watching(f={"max_containers": 1})
    bench.open(client, count=1000)
    waiting = [bench.started_lease(worker)]
    rows = 0
    for _ in range(100):
        bench.later(0.01)
        bench.finish(worker, waiting.pop(0), input_s=0.01)
        waiting += bench.take_all(m.Lease, worker)
        rows += len(call_rows(bench))
    assert 4 <= rows <= 5


def test_the_end_is_told_once_and_then_nobody_looks_any_more() -> None:
    bench, worker, client = watching(f={"max_containers": 1})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.later(progress.INTERVAL_S)
    call_rows(bench)
    bench.finish(worker, lease)
    bench.frame(client, ack(call_id, 0, 1, 1))
    bench.later(1)
    (row,) = call_rows(bench)
    assert row.is_over
    (*_, function) = bench.take_all(m.FunctionProgress)
    assert (function.running, function.starting) == (0, 0)
    assert not any(kind == "progress" for _, _, kind, _ in bench.core.state.deadlines)


def test_a_call_that_is_quickly_over_is_never_told() -> None:
    bench, worker, client = watching(f={"max_containers": 1})
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    for number in range(2, 50):
        bench.finish(worker, lease)
        bench.frame(client, ack(lease.call_id, 0, 1, 1))
        bench.open(client, call=number, count=1)
        lease = bench.take(m.Lease, worker)
    deadlines = [kind for _, _, kind, _ in bench.core.state.deadlines if kind == "progress"]
    assert len(deadlines) == 1
    assert not any(bench.take_all(kind) for kind in KINDS)


def test_a_nested_call_is_named_before_its_first_text() -> None:
    bench, worker, client = watching(f={"max_containers": 1}, g={})
    bench.open(client, "f", count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    call_id = bench.open(nested, "g", call=2, count=1, parent=(outer.lease_id, 0))
    inner = bench.take(m.StartContainer, worker)
    bench.orders.clear()
    text = m.ContainerLog(inner.container_id, call_id, 0, m.Source.STDOUT, b"hello\n")
    bench.frame(worker, text, text)
    kinds = [type(order.message) for order in bench.orders]  # type: ignore[union-attr]
    assert kinds == [m.CallProgress, m.Log, m.Log]
    row = bench.take(m.CallProgress, client)
    assert (row.name, row.is_nested) == ("g", True)
    bench.frame(worker, m.ContainerLog(outer.container_id, outer.call_id, 0, 1, b"mine\n"))
    assert call_rows(bench) == [], "its own calls a client knows"


def test_a_container_that_runs_several_inputs_counts_for_each() -> None:
    bench, worker, client = watching(f={"max_inputs": 4, "max_containers": 1})
    bench.open(client, call=1, count=3)
    lease = bench.started_lease(worker)
    bench.open(client, call=2, count=5)
    bench.later(progress.INTERVAL_S)
    assert {row.call_id[0]: row.running for row in call_rows(bench)} == {1: 3, 2: 1}
    (function,) = bench.take_all(m.FunctionProgress)
    assert function.running == 4
    bench.finish(worker, lease, count=2)
    bench.later(progress.INTERVAL_S)
    assert {row.call_id[0]: row.running for row in call_rows(bench)} == {1: 1, 2: 3}


def test_a_container_that_runs_one_input_after_the_other_counts_as_one() -> None:
    bench, worker, client = watching(f={"max_containers": 1})
    bench.open(client, count=1000)
    first = bench.started_lease(worker)
    bench.finish(worker, first, input_s=0.001)
    leases = bench.take_all(m.Lease, worker)
    assert sum(len(lease.payload) for lease in leases) > 1, "it has many"
    bench.later(progress.INTERVAL_S)
    (row,) = call_rows(bench)
    assert row.running == 1
    (function,) = bench.take_all(m.FunctionProgress)
    assert function.running == 1


def test_inputs_that_wait_for_nested_calls_do_not_run() -> None:
    bench, worker, client = watching(f={"max_inputs": 2, "max_containers": 1}, g={})
    bench.open(client, count=2)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "g", call=2, count=1, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    bench.later(progress.INTERVAL_S)
    assert {row.name: row.running for row in call_rows(bench)} == {"f": 0, "g": 0}


def test_a_spawned_call_is_told_as_long_as_it_runs() -> None:
    bench, worker, client = watching(f={"max_containers": 1})
    bench.open(client, count=2, is_durable=True)
    bench.store()
    lease = bench.started_lease(worker)
    bench.later(progress.INTERVAL_S)
    (row,) = call_rows(bench)
    assert row.is_durable
    bench.finish(worker, lease)
    bench.store()
    bench.orders = [o for o in bench.orders if not isinstance(getattr(o, "message", None), m.Lease)]
    bench.later(progress.INTERVAL_S)
    assert all(row.finished_count >= 1 for row in call_rows(bench))


@pytest.mark.parametrize("how", ["lost", "off"])
def test_a_client_that_is_gone_or_has_seen_enough_is_told_no_more(how: str) -> None:
    bench, _, client = watching()
    bench.open(client, count=3)
    if how == "lost":
        bench.lose(client)
    else:
        bench.frame(client, m.WatchProgress(False))
    bench.later(5)
    assert not any(bench.take_all(kind) for kind in KINDS)


def test_a_look_goes_through_no_more_than_a_person_reads() -> None:
    bench, _, client = watching(f={"max_containers": 1})
    for number in range(1, 200):
        bench.open(client, call=number, count=1)
    bench.later(progress.INTERVAL_S)
    assert len(call_rows(bench)) == progress.CALLS_MAX


def test_a_client_in_a_container_may_not_watch() -> None:
    assert m.WatchProgress not in m.FROM_NESTED_CLIENT
    assert m.WatchProgress not in m.FROM_WORKER


def test_each_number_is_that_of_the_call() -> None:
    bench, worker, client = watching(f={"max_containers": 1}, g={})
    call_id = bench.open(client, call=1, count=5, is_sealed=False)
    bench.finish(worker, bench.started_lease(worker), input_s=1.0)
    bench.later(progress.INTERVAL_S)
    (row,) = call_rows(bench)
    assert row == m.CallProgress(
        call_id=call_id, name="f", is_durable=False, is_nested=False, is_sealed=False,
        is_over=False, input_count=5, finished_count=1, running=1, starting=0,
        waits_for="a permit: max_containers are in use",
    )  # fmt: skip
    bench.frame(client, m.SealCall(call_id, 7))
    bench.later(progress.INTERVAL_S)
    (row,) = call_rows(bench)
    assert (row.is_sealed, row.input_count) == (True, 7)


def test_the_end_of_a_call_is_told_with_what_it_had() -> None:
    bench, worker, client = watching(f={"max_containers": 1})
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    lease = bench.started_lease(worker)
    bench.later(progress.INTERVAL_S)
    (last,) = call_rows(bench)
    assert (last.running, last.finished_count, last.waits_for != "") == (1, 0, True)
    bench.finish(worker, lease, input_s=1.0)
    bench.finish(worker, bench.take(m.Lease), input_s=1.0)
    bench.store()
    bench.later(progress.INTERVAL_S)
    (end,) = call_rows(bench)
    told = (end.call_id, end.is_over, end.finished_count, end.running, end.starting, end.waits_for)
    assert told == (call_id, True, 2, 0, 0, "")


def test_a_function_that_is_gone_runs_nothing() -> None:
    bench, worker, client = watching(f={"max_containers": 1})
    bench.open(client, count=1)
    bench.later(progress.INTERVAL_S)
    (seen,) = bench.take_all(m.FunctionProgress)
    assert (seen.running, seen.starting) == (0, 1)
    bench.started_lease(worker)
    bench.later(progress.INTERVAL_S)
    (seen,) = bench.take_all(m.FunctionProgress)
    assert (seen.function_id, seen.name, seen.running) == (b"f" * 16, "f", 1)
    bench.frame(client, m.CloseApp(b"a" * 16))
    bench.later(progress.INTERVAL_S)
    (seen,) = bench.take_all(m.FunctionProgress)
    told = (seen.function_id, seen.name, seen.running, seen.starting)
    assert told == (b"f" * 16, "f", 0, 0)
    bench.later(10)
    assert bench.take_all(m.FunctionProgress) == []
    assert not any(kind == "progress" for _, _, kind, _ in bench.core.state.deadlines)


def test_of_many_functions_the_newest_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FUNCTIONS_MAX", 2)
    monkeypatch.setattr(progress, "CALLS_MAX", 3)
    monkeypatch.setattr(progress, "WAITS_FOR_MAX", 6)
    bench, worker, client = watching(f={}, g={}, h={}, i={})
    worker = bench.worker(cpu=9, number=2)
    for number, name in enumerate("fghi", 1):
        bench.open(client, name, call=number, count=1)
    bench.later(progress.INTERVAL_S)
    assert {row.name for row in bench.take_all(m.FunctionProgress)} == {"h", "i"}
    assert sorted(row.call_id[0] for row in call_rows(bench)) == [2, 3, 4]
    assert worker
    bench.lose(worker)
    bench.lose(1)
    bench.later(progress.INTERVAL_S)
    assert {row.waits_for for row in call_rows(bench)} == {"a work"}


def test_a_client_that_does_not_read_is_told_when_it_does() -> None:
    bench, _, client = watching()
    bench.tell(PeerWritable(PeerId(client), False))
    bench.open(client, count=3)
    bench.later(1)
    assert not any(bench.take_all(kind) for kind in KINDS)
    bench.tell(PeerWritable(PeerId(client), True))
    bench.later(progress.INTERVAL_S)
    assert len(call_rows(bench)) == 1


def test_containers_of_a_function_are_added_up() -> None:
    bench, worker, client = watching()
    bench.open(client, count=2)
    bench.start_all(worker)
    bench.later(progress.INTERVAL_S)
    (function,) = bench.take_all(m.FunctionProgress)
    assert (function.running, function.starting) == (2, 0)
