"""The scheduler is killed in the middle of calls of every kind: all of them go on.

Killed is `kill -9` of the real process. The points are drawn by chance, and a failure prints the
seed; `FANOUT_TEST_SEED` draws them again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import restart_kit as kit
from tests.conftest import HandStarted, poll_until
from tests.test_faults import open_call_count

Start = Callable[..., HandStarted]

SEED = int(os.environ.get("FANOUT_TEST_SEED") or random.randrange(1 << 32))
ROUNDS = range(10 if kit.FULL else 1)
#: What the client may grow by over a call, restarts included: a part of the 32 MiB that the credit
#: of a call lets it hold. Keeping every result of 100,000 would show with small ones only as a
#: growth that follows the count, which is why the counts are large.
GROWTH_BYTES_MAX = 12 << 20


def ride(cluster: HandStarted, count: int, round_number: int) -> kit.Ride:
    return kit.Ride(cluster, count, SEED + round_number)


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_a_large_ordered_map_survives_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    journey = ride(cluster, 100_000, round_number)
    with kit.app.run():
        journey.take(kit.same.map(range(100_000)))
    assert journey.last_pids == journey.first_pids, "the same containers went on"
    assert journey.growth_bytes < GROWTH_BYTES_MAX, print("GROWTH", journey.growth_bytes)
    poll_until(lambda: open_call_count(cluster) == 0, "the call ends at the scheduler too")


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_a_spawned_map_survives_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    count = 100_000 if kit.FULL else 20_000
    journey = ride(cluster, count, round_number)
    with kit.app.run():
        call = kit.same.spawn_map(range(count))
        journey.take(call.iter())
        assert [x for x, _ in call.iter(start=count - 50)] == list(range(count - 50, count))
    assert journey.last_pids == journey.first_pids, "the same containers went on"
    assert journey.growth_bytes < GROWTH_BYTES_MAX, print("GROWTH", journey.growth_bytes)
    poll_until(lambda: open_call_count(cluster) == 0, "the call ends at the scheduler too")


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_a_generator_survives_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    count = 200_000 if kit.FULL else 50_000
    journey = ride(cluster, count, round_number)
    with kit.app.run():
        journey.take(kit.items.remote_gen(count))
    assert journey.last_pids == journey.first_pids, "the same container went on"
    assert journey.growth_bytes < GROWTH_BYTES_MAX, print("GROWTH", journey.growth_bytes)
    poll_until(lambda: open_call_count(cluster) == 0, "the call ends at the scheduler too")


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_nested_calls_and_retries_survive_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, tmp_path: Path, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    count = 600 if kit.FULL else 200
    journey = ride(cluster, count, round_number)
    with kit.app.run():
        journey.take(kit.nested_and_failing.map(range(count), kwargs={"folder": str(tmp_path)}))
    failed = {int(path.name.partition("-")[2]) for path in tmp_path.glob("failed-*")}
    assert failed == set(range(0, count, 3)), "a third of the inputs was retried"
    assert journey.growth_bytes < GROWTH_BYTES_MAX, print("GROWTH", journey.growth_bytes)
    poll_until(lambda: open_call_count(cluster) == 0, "no call is left, nested ones included")
