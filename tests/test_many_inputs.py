"""`@concurrent` and `@batched` as a user sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout.exceptions import (
    ContainerCrashedError,
    FunctionTimeoutError,
    InvalidError,
)
from tests import many_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster

Embedder: Any = kit.Embedder


@pytest.fixture
def running(cluster: Cluster) -> Iterator[None]:
    with kit.app.run():
        yield


# --- concurrent -----------------------------------------------------------------------------------


def test_async_inputs_run_together_in_one_container(running: None) -> None:
    results = list(kit.meet.map(range(3 * kit.TASK_COUNT)))
    assert len({pid for pid, _ in results}) == 1
    assert [x for _, x in results] == list(range(3 * kit.TASK_COUNT))


def test_sync_inputs_run_together_in_threads(running: None) -> None:
    results = list(kit.meet_in_threads.map(range(kit.THREAD_COUNT)))
    assert len({pid for pid, _ in results}) == 1
    assert len({thread for _, thread in results}) == kit.THREAD_COUNT


async def test_calls_of_different_callers_meet_in_one_container(cluster: Cluster) -> None:
    async with kit.app.run():
        calls = [kit.meet.remote.aio(x) for x in range(kit.TASK_COUNT)]
        async with asyncio.timeout(30 * TIMEOUT_FACTOR):
            results = await asyncio.gather(*calls)
    assert len({pid for pid, _ in results}) == 1


def test_with_concurrency_is_the_same_from_outside(running: None, tmp_path: Path) -> None:
    assert max(kit.one_at_a_time.map([str(tmp_path)] * 12)) == 1
    many = kit.one_at_a_time.with_options(max_containers=1).with_concurrency(max_inputs=6)
    assert max(many.map([str(tmp_path)] * 12)) > 1


def test_a_timeout_of_one_thread_leaves_its_neighbours_alone(running: None) -> None:
    kit.spins_in_threads.remote(0)
    results: list[Any] = list(kit.spins_in_threads.map([0.01, 60, 0.02], return_exceptions=True))
    assert (results[0], results[2]) == (0.01, 0.02)
    assert isinstance(results[1], FunctionTimeoutError)
    assert results[1].timeout == 0.5


def test_generators_stream_side_by_side(running: None) -> None:
    assert list(kit.numbers.map([3, 2, 4])) == [0, 1, 2, 0, 1, 0, 1, 2, 3]


def test_only_the_input_that_kills_its_container_fails(running: None) -> None:
    results: list[Any] = list(kit.dies_for.map(range(6), kwargs={"bad": 2}, return_exceptions=True))
    error = results.pop(2)
    assert isinstance(error, ContainerCrashedError)
    assert results == [0, 1, 3, 4, 5]


# --- batched --------------------------------------------------------------------------------------


def test_single_inputs_are_gathered_and_each_gets_its_own_result(running: None) -> None:
    results = list(kit.add_in_batches.map(range(10), range(10)))
    assert [total for total, _ in results] == [2 * x for x in range(10)]
    assert max(size for _, size in results) == 4


def test_a_batch_that_is_not_full_runs_when_its_time_has_come(running: None) -> None:
    kit.add_in_batches.remote(0, 0)
    started = time.monotonic()
    assert kit.add_in_batches.remote(1, ys=2) == (3, 1)
    assert time.monotonic() - started >= 0.19


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("raise", ZeroDivisionError, "the whole batch"),
        ("short", InvalidError, "1"),
        ("text", InvalidError, "list"),
    ],
)
def test_a_batch_that_fails_fails_every_input(
    running: None, value: str, kind: type[Exception], words: str
) -> None:
    results: list[Any] = list(kit.broken_batches.map([value, "fine"], return_exceptions=True))
    assert [type(result) for result in results] == [kind, kind]
    assert words in str(results[0])


def test_an_input_that_does_not_fit_fails_alone(running: None) -> None:
    good = kit.add_in_batches.spawn(1, 2)
    with pytest.raises((InvalidError, TypeError)):
        kit.add_in_batches.remote(1, 2, 3)
    with pytest.raises((InvalidError, TypeError)):
        kit.add_in_batches.remote(1, zs=3)
    assert good.get(timeout=30 * TIMEOUT_FACTOR)[0] == 3


def test_methods_can_be_batched_and_concurrent(running: None) -> None:
    results = list(Embedder(scale=10).embed.map(["a", "bb", "ccc", "dddd", "eeeee", "f"]))
    assert [size for size, _ in results] == [10, 20, 30, 40, 50, 10]
    assert max(count for _, count in results) == 3


def test_a_container_may_call_a_batched_function(running: None) -> None:
    assert kit.batches_from_a_container.remote(9) == [2 * x for x in range(9)]


def test_with_batching_is_the_same_from_outside(running: None) -> None:
    @kit.app.function(serialized=True, cpu=0.1, max_containers=1)
    def sizes(xs: list[int]) -> list[int]:
        return [len(xs)] * len(xs)

    batched = sizes.with_batching(max_batch_size=5, wait_ms=100)
    results: list[Any] = list(batched.map(range(10)))
    assert max(results) == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fanout.concurrent(max_inputs=0), "max_inputs=0"),
        (lambda: fanout.concurrent(max_inputs=2, target_inputs=3), "is above max_inputs=2"),
        (lambda: fanout.batched(max_batch_size=1001, wait_ms=1), "max_batch_size=1001"),
        (lambda: fanout.batched(max_batch_size=2, wait_ms=-1), "wait_ms=-1"),
        (lambda: fanout.batched(max_batch_size=2, wait_ms=1)(lambda x=1: x), "has a default"),
        (lambda: kit.squares.with_batching(max_batch_size=2, wait_ms=1), "generator"),
    ],
)
def test_wrong_uses_are_refused_where_they_are_written(make: Any, words: str) -> None:
    with pytest.raises((InvalidError, TypeError), match=words):
        make()
