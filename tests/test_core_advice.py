"""Who is told that a function holds cores which it does not use, and who is not."""

from __future__ import annotations

from typing import Any

import pytest

from fanout.protocol import messages as m
from tests.core_kit import Bench


def run_one_input(
    cpu_ms: int, input_s: float, count: int = 100, **options: Any
) -> tuple[Bench, int, int, m.Lease]:
    """A function whose first input took so long, and so much processor time; others wait."""
    bench = Bench()
    worker = bench.worker(cpu=options.get("cpu", 1.0))
    client = bench.client(f=options)
    bench.open(client, "f", count=count)
    lease = bench.started_lease(worker)
    bench.finish(worker, lease, 1, input_s=input_s)
    bench.frame(worker, m.CpuTimes([(lease.container_id, cpu_ms)]))
    return bench, worker, client, lease


def test_a_function_that_mostly_waits_is_told_how_more_of_it_would_run() -> None:
    bench, _, client, _ = run_one_input(cpu_ms=500, input_s=25)
    notice = bench.take(m.Notice, client)
    assert notice.code == "mostly_waits"
    assert "f computes for at most 2 % of the time" in notice.text
    assert "98 inputs wait for a core" in notice.text
    assert "cpu=0.05 20 of them" in notice.text


def test_it_is_told_once() -> None:
    bench, worker, client, lease = run_one_input(cpu_ms=500, input_s=25)
    bench.take(m.Notice, client)
    bench.frame(worker, m.CpuTimes([(lease.container_id, 510)]))
    assert bench.take_all(m.Notice) == []


@pytest.mark.parametrize(("cpu_ms", "advised"), [(1000, "0.05"), (1900, "0.1"), (4900, "0.25")])
def test_what_is_advised_leaves_a_reserve(cpu_ms: int, advised: str) -> None:
    bench, _, client, _ = run_one_input(cpu_ms=cpu_ms, input_s=25)
    assert f"cpu={advised} " in bench.take(m.Notice, client).text


@pytest.mark.parametrize(
    ("cpu_ms", "input_s", "options"),
    [
        (6000, 25, {}),
        (100, 19, {}),
        (100, 25, {"cpu": 0.05}),
        (100, 25, {"is_generator": True}),
    ],
    ids=["it computes", "it ran for too short a time", "it asks for little", "a generator"],
)
def test_others_are_left_in_peace(cpu_ms: int, input_s: float, options: dict[str, Any]) -> None:
    bench, *_ = run_one_input(cpu_ms=cpu_ms, input_s=input_s, **options)
    assert bench.take_all(m.Notice) == []


def test_who_has_no_input_that_waits_is_left_in_peace() -> None:
    bench, *_ = run_one_input(cpu_ms=100, input_s=25, count=1)
    assert bench.take_all(m.Notice) == []


def test_who_waits_for_calls_of_its_own_is_left_in_peace() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, "f", count=100)
    lease = bench.started_lease(worker)
    bench.connect("nested", worker=worker, container_id=lease.container_id)
    bench.finish(worker, lease, 1, input_s=25)
    bench.frame(worker, m.CpuTimes([(lease.container_id, 100)]))
    assert bench.take_all(m.Notice) == []


def test_a_worker_can_say_nothing_about_the_containers_of_another() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    other = bench.worker(cpu=0, number=2)
    client = bench.client(f={})
    bench.open(client, "f", count=100)
    lease = bench.started_lease(worker)
    bench.finish(worker, lease, 1, input_s=25)
    bench.frame(other, m.CpuTimes([(lease.container_id, 100), (7, 100)]))
    assert bench.take_all(m.Notice) == []


def test_who_waits_for_a_permit_is_left_in_peace_as_more_cores_would_not_help() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"max_containers": 1})
    bench.open(client, "f", count=100)
    lease = bench.started_lease(worker)
    bench.finish(worker, lease, 1, input_s=25)
    bench.frame(worker, m.CpuTimes([(lease.container_id, 100)]))
    assert bench.take_all(m.Notice) == []


def test_a_container_that_made_the_call_is_nobody_to_be_told() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "g", call=2, count=100, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    lease = bench.started_lease(worker)
    bench.finish(worker, lease, 1, input_s=25)
    bench.frame(worker, m.CpuTimes([(lease.container_id, 100)]))
    assert bench.take_all(m.Notice) == []
