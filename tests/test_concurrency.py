"""Several inputs at a time, and batches, as a user sees them: on one core, with nested calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fanout.exceptions import InputCancelledError
from tests import concurrent_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster, poll_until
from tests.engine_fixture import one_core as one_core
from tests.engine_fixture import wait_until_no_call_is_open


@pytest.fixture(autouse=True)
def running(one_core: Cluster) -> Iterator[None]:
    with kit.app.run():
        yield
    wait_until_no_call_is_open()


def test_inputs_of_one_container_wait_together() -> None:
    begin_s = time.monotonic()
    assert list(kit.sleeps.map([0.4] * 20)) == [None] * 20
    assert time.monotonic() - begin_s < 4 * TIMEOUT_FACTOR, "not eight seconds one after the other"


@pytest.mark.parametrize(
    "function", [kit.in_threads, kit.in_tasks, kit.in_threads_of_their_own], ids=lambda f: f.name
)
def test_a_container_whose_inputs_all_wait_for_calls_gives_its_core_to_them(function: Any) -> None:
    factor = 4 if function is kit.in_threads_of_their_own else 2
    assert list(function.map(range(10))) == [factor * x for x in range(10)]


@pytest.mark.parametrize(
    "function", [kit.waits_or_works_in_threads, kit.waits_or_works_in_tasks], ids=lambda f: f.name
)
def test_a_container_gives_its_core_when_the_last_input_that_runs_has_ended(function: Any) -> None:
    # Both are in one container, as there is only one.
    worked_at, called_at = function.map([True, False])
    assert called_at > worked_at, "the call ran while its caller's container held the only core"


@pytest.mark.parametrize("function", [kit.gives, kit.gives_async], ids=lambda f: f.name)
def test_generators_of_one_container_stream_at_the_same_time(function: Any) -> None:
    streams = [function.remote_gen(2000) for _ in range(3)]
    rows = list(zip(*streams, strict=True))
    assert rows == [(x, x, x) for x in range(2000)]


def test_batches_are_gathered_from_calls_of_many_containers_inputs() -> None:
    assert list(kit.doubled.map(range(10))) == [2 * x for x in range(10)]
    assert list(kit.by_batches.map(range(10))) == [2 * x for x in range(10)]


def test_a_batch_may_make_calls_of_its_own() -> None:
    assert list(kit.batch_of_calls.map(range(7))) == [2 * x for x in range(7)]


def test_a_batch_makes_calls_after_its_first_input_was_cancelled(tmp_path: Path) -> None:
    first = kit.calls_when_told.spawn(1, str(tmp_path))
    second = kit.calls_when_told.spawn(2, str(tmp_path))
    poll_until((tmp_path / "begun").exists, "the batch runs")
    first.cancel()
    with pytest.raises(InputCancelledError):
        first.get(timeout=10 * TIMEOUT_FACTOR)
    (tmp_path / "go").touch()
    assert second.get(timeout=10 * TIMEOUT_FACTOR) == 4


def test_a_buffer_is_a_container_more_than_those_that_run_something(tmp_path: Path) -> None:
    calls = [kit.waits_in.spawn(x, str(tmp_path)) for x in range(3)]
    try:
        poll_until(lambda: len(list(tmp_path.iterdir())) == 3, "all run")
        busy = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
        poll_until(
            lambda: kit.waits_in.get_current_stats().num_total_runners == len(busy) + 1,
            lambda: f"one beside {busy}: {kit.waits_in.get_current_stats()}",
        )
    finally:
        (tmp_path / "go").touch()
    for call in calls:
        call.get(timeout=10 * TIMEOUT_FACTOR)
