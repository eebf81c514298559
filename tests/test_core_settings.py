"""Settings of a function in the bare core: containers that no input asks for, and too many."""

from __future__ import annotations

from typing import Any

import pytest

from fanout.protocol import messages as m
from tests.core_kit import APP, Bench, exited


def info(bench: Bench, client: int, **changes: Any) -> dict[str, Any]:
    bench.frame(client, m.AskFunction(3, b"f" * 16, changes))
    answer = bench.take(m.FunctionInfo, client)
    assert answer.request_id == 3
    return answer.info


def test_the_numbers_of_a_function_are_told_exactly() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"max_inputs": 3, "max_containers": 2, "scaledown_window": 4}, g={})
    bench.open(client, call=1, count=7)
    bench.open(client, "g", call=2, count=5)
    leases = bench.start_all(worker)
    assert info(bench, client) == {
        "min_containers": 0, "max_containers": 2, "buffer_containers": 0, "scaledown_window": 4.0,
        "backlog": 1, "containers": 2, "running": 6, "headroom": 0,
    }  # fmt: skip
    bench.finish(worker, leases[0], count=2)
    assert info(bench, client)["headroom"] == 1
    bench.frame(client, m.AskFunction(3, b"?" * 16, {}))
    assert bench.take(m.FunctionInfo).info == {"error": "its function is not defined"}


def test_containers_are_started_for_settings_although_no_core_is_free() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "g", call=1, count=1)
    bench.started_lease(worker)
    assert info(bench, client, min_containers=2, max_containers=2)["containers"] == 0
    assert len(bench.take_all(m.StartContainer)) == 2
    assert info(bench, client, min_containers=2, max_containers=2)["max_containers"] == 2


def test_a_buffer_stays_below_the_maximum() -> None:
    bench = Bench()
    bench.worker(cpu=9)
    client = bench.client(f={"buffer_containers": 5, "max_containers": 3})
    bench.open(client, count=1)
    assert len(bench.take_all(m.StartContainer)) == 3


def test_nothing_is_started_for_settings_when_the_app_has_ended() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"min_containers": 1})
    bench.open(client, call=1, count=1, is_durable=True)
    bench.store()
    (lease,) = bench.start_all(worker)
    bench.frame(client, m.CloseApp(APP))
    assert info(bench, client, buffer_containers=1)["containers"] == 1
    bench.frame(worker, exited(lease.container_id, "crash"))
    assert len(bench.take_all(m.StartContainer)) == 1, "for the input alone"


def test_a_container_that_is_leaving_does_not_count_for_the_minimum() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"min_containers": 1})
    bench.open(client, call=1, count=1)
    (lease,) = bench.start_all(worker)
    bench.frame(client, m.TerminateCall(lease.call_id))
    assert bench.take(m.StopContainer).container_id == lease.container_id
    assert len(bench.take_all(m.StartContainer)) == 1


def test_settings_that_were_taken_back_are_not_looked_at_any_more() -> None:
    bench = Bench()
    bench.worker(cpu=2)
    client = bench.client(f={"min_containers": 1})
    assert list(bench.core.state.scaled) == [b"f" * 16]
    info(bench, client, min_containers=0)
    assert not bench.core.state.scaled
    info(bench, client, buffer_containers=1)
    assert list(bench.core.state.scaled) == [b"f" * 16]


def test_a_shorter_window_counts_from_now_on_for_those_that_are_idle() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"scaledown_window": 12})
    bench.open(client, count=1)
    bench.finish(worker, bench.started_lease(worker))
    bench.later(5)
    assert bench.take_all(m.StopContainer) == []
    info(bench, client, scaledown_window=4)
    bench.later(0.001)
    bench.take(m.StopContainer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_containers": -1}, "min_containers=-1 is not valid"),
        ({"max_containers": 0}, "max_containers=0 is not valid"),
        ({"min_containers": 1.5}, "min_containers=1.5 is not valid"),
        ({"scaledown_window": -0.5}, "scaledown_window=-0.5 is not valid"),
        ({"name": 1}, "name=1 is not valid"),
        ({"min_containers": 3, "max_containers": 2},
         "min_containers=3 would be above max_containers=2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(changes: dict[str, Any], words: str) -> None:
    bench = Bench()
    client = bench.client(f={})
    assert info(bench, client, **changes) == {"error": words}
    for allowed in (
        {"min_containers": 2, "max_containers": 2}, {"scaledown_window": 0.5},
        {"scaledown_window": 1}, {"min_containers": 0}, {"buffer_containers": 0},
    ):  # fmt: skip
        assert "error" not in info(bench, client, **allowed)


# --- the end of containers ------------------------------------------------------------------------


def test_a_container_is_stopped_once_and_killed_once() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    call_id = bench.open(client, count=2)
    leases = bench.start_all(worker)
    bench.frame(client, m.AskFunction(1, b"f" * 16, {"max_containers": 1}))
    patient = bench.take(m.StopContainer)
    assert patient.kill is False
    bench.frame(client, m.AskFunction(1, b"f" * 16, {"max_containers": 1}))
    assert bench.take_all(m.StopContainer) == []
    bench.frame(client, m.TerminateCall(call_id))
    stops = bench.take_all(m.StopContainer)
    assert sorted(stop.container_id for stop in stops) == sorted(o.container_id for o in leases)
    assert all(stop.kill for stop in stops)
    bench.frame(client, m.CloseApp(APP))
    assert bench.take_all(m.StopContainer) == []


def test_the_newest_idle_containers_leave_first_when_there_are_too_many() -> None:
    bench = Bench()
    worker = bench.worker(cpu=3)
    client = bench.client(f={})
    bench.open(client, count=3)
    leases = bench.start_all(worker)
    bench.finish(worker, leases[0], input_s=1.0)
    bench.finish(worker, leases[1], input_s=1.0)
    bench.frame(client, m.AskFunction(1, b"f" * 16, {"max_containers": 2}))
    assert bench.take(m.StopContainer).container_id == leases[1].container_id
    bench.frame(client, m.AskFunction(1, b"f" * 16, {"max_containers": 1}))
    assert bench.take(m.StopContainer).container_id == leases[0].container_id
