"""The scheduler is killed in the middle of calls of every kind: all of them go on.

Killed is `kill -9` of the real process. The points are drawn by chance, and a failure prints the
seed; `FANOUT_TEST_SEED` draws them again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import restart_kit as kit
from tests.conftest import ROOT, TIMEOUT_FACTOR, HandStarted, environment, poll_until

Start = Callable[..., HandStarted]

SEED = int(os.environ.get("FANOUT_TEST_SEED") or random.randrange(1 << 32))
ROUNDS = range(10 if kit.FULL else 1)
#: What a result carries in the tests that look at the client's memory. With 100,000 of them, a
#: client that kept what it had delivered, or what it had sent, would hold 100 MB more.
LOAD_SIZE_BYTES = 1000
#: What the client may grow by over a call, restarts included. Usual is about 1 MiB.
GROWTH_BYTES_MAX = 8 << 20


def ride(cluster: HandStarted, count: int, round_number: int) -> kit.Ride:
    return kit.Ride(cluster, count, SEED + round_number)


def require_flat(journey: kit.Ride) -> None:
    growth_mib = journey.growth_bytes / (1 << 20)
    assert journey.growth_bytes < GROWTH_BYTES_MAX, f"the client grew by {growth_mib:.1f} MiB"


def require_over(cluster: HandStarted) -> None:
    poll_until(lambda: cluster.open_call_count() == 0, "the call ends at the scheduler too")


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_a_large_ordered_map_survives_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    count = 100_000
    journey = ride(cluster, count, round_number)
    loads = itertools.repeat(bytes(LOAD_SIZE_BYTES), count)
    with kit.app.run():
        journey.take(kit.same.map(range(count), loads))
    assert journey.kills_at_work == journey.kills
    assert journey.last_pids == journey.first_pids, "the same containers went on"
    require_flat(journey)
    require_over(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_a_spawned_map_survives_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    count = 100_000 if kit.FULL else 6_000
    journey = ride(cluster, count, round_number)
    with kit.app.run():
        call = kit.same_after.spawn_map(range(count), kwargs={"seconds": 0.0005})
        journey.take(call.iter())
        again = call.iter(start=count - 50)
        assert [x for x, _, _ in again] == list(range(count - 50, count)), "results are kept"
    assert journey.kills_at_work == journey.kills
    assert journey.last_pids == journey.first_pids, "the same containers went on"
    require_over(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_a_generator_survives_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    count = 500_000 if kit.FULL else 100_000
    journey = ride(cluster, count, round_number)
    with kit.app.run():
        journey.take(kit.items.remote_gen(count, LOAD_SIZE_BYTES))
    assert journey.kills_at_work == journey.kills
    assert journey.last_pids == journey.first_pids, "the same container went on"
    require_flat(journey)
    require_over(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("round_number", ROUNDS)
def test_nested_calls_and_retries_survive_three_kills_of_the_scheduler(
    scheduler_and_workers: Start, tmp_path: Path, round_number: int
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    count = 1_000 if kit.FULL else 300
    journey = ride(cluster, count, round_number)
    with kit.app.run():
        journey.take(kit.nested_and_failing.map(range(count), kwargs={"folder": str(tmp_path)}))
    failed = {int(path.name.partition("-")[2]) for path in tmp_path.glob("failed-*")}
    assert failed == set(range(0, count, 3)), "a third of the inputs was retried"
    # An ordered map may hold back many results for one that is late.
    assert journey.kills_at_work > 0
    assert journey.last_pids & journey.first_pids, "containers of before went on"
    require_over(cluster)


CLIENT_OF_NESTED_CALLS = """
import sys
from tests import restart_kit as kit
with kit.app.run():
    results = kit.nested_and_failing.map(range(200), kwargs={"folder": sys.argv[1]})
    print(next(results)[0], flush=True)
    print([x for x, _, _ in results] == list(range(1, 200)))
"""


def test_containers_that_call_wait_for_a_client_that_comes_back_later(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    """Workers keep containers of attached calls for a client that is late, and these containers
    have clients of their own, which are early: they must learn that nobody hears them yet."""
    cluster = scheduler_and_workers(1, cpu=1)
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT_OF_NESTED_CALLS, str(tmp_path)],
        env=environment(FANOUT_URL=cluster.client_join),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    name = "nested client of an unknown container"
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"0\n"
        client.send_signal(signal.SIGSTOP)
        kit.kill_scheduler(cluster)
        cluster.start_scheduler()
        poll_until(lambda: cluster.status()["counts"].get(name), "a container is early")
        client.send_signal(signal.SIGCONT)
        rest, _ = client.communicate(timeout=20 * TIMEOUT_FACTOR)
        assert rest == b"True\n"
    finally:
        client.kill()
        client.communicate()


async def test_results_that_came_out_of_order_before_a_restart_leave_no_gap(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    """What a reader lacks after a lost connection is not one range: results come in any order."""
    cluster = scheduler_and_workers(1, cpu=5)
    gate = tmp_path / "gate"
    async with kit.app.run():
        call = await kit.odd_ones_wait.spawn_map.aio(range(5), kwargs={"path": str(gate)})
        results = call.iter.aio()
        async with asyncio.timeout(20 * TIMEOUT_FACTOR):
            got = [await anext(results)]
            # Whoever reads all the results is sent these as well, and before.
            assert [await call.get.aio(index=index) for index in (2, 4)] == [2, 4]
            kit.kill_scheduler(cluster)
            cluster.start_scheduler()
            gate.touch()
            got += [x async for x in results]
    assert got == list(range(5))
