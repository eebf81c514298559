"""Much at a time, with real processes: connections, open calls, spawned inputs.

`FANOUT_TEST_FULL=1` makes the counts those that fanout is to bear.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fanout
from benchmarks.process import memory_of
from fanout.exceptions import ConnectionError, StorageError
from fanout.protocol import messages as m
from fanout.serialization import encode_args
from tests import behaviour_kit as kit
from tests.conftest import ROOT, HandStarted, environment, poll_until
from tests.server_kit import Daemon, Wire, define, dial, submit
from tests.soak_kit import memory_bytes

Start = Callable[..., HandStarted]

IS_FULL = os.environ.get("FANOUT_TEST_FULL") == "1"
WORKER_COUNT = 1000 if IS_FULL else 100
CALL_COUNT = 10_000 if IS_FULL else 1000
SPAWNED_COUNT = 1_000_000 if IS_FULL else 100_000
MAPPED_COUNT = 1_000_000 if IS_FULL else 200_000
#: How long an input of a made-up container takes: all have one when some of them vanish.
INPUT_S = 0.5
#: What a waiting input may cost the scheduler beyond its payload, and what its memory may differ by
#: from one moment to another for no such reason.
INPUT_BYTES_MAX = 20
NOISE_BYTES_MAX = 2 << 20
#: What the processes of each kind may grow by while a long map is under way. Usual is nothing, or
#: 2 MiB of a library that the scheduler loads a second after its start. Whoever kept 60 bytes of
#: each input would hold 8 MiB more at the ninth tenth than at the second.
MAP_GROWTH_BYTES_MAX = 5 << 20
TIMEOUT_S = 300.0 if IS_FULL else 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "scheduler"
    home.mkdir(mode=0o700)
    return home


def started(home: Path, **options: object) -> Iterator[Daemon]:
    daemon = Daemon(home, **options).start()  # type: ignore[arg-type]
    try:
        yield daemon
    finally:
        daemon.end()


async def dial_many(address: dict[str, object], count: int) -> list[Wire]:
    """So many clients, a few at a time."""
    wires: list[Wire] = []
    for _ in range(0, count, 20):
        wires += await asyncio.gather(*[dial(address) for _ in range(20)])
    return wires


async def close_all(wires: list[Wire]) -> None:
    for wire in wires:
        wire.transport.abort()
    await asyncio.gather(*[wire.transport.wait_closed() for wire in wires])


# --- connections ----------------------------------------------------------------------------------


@pytest.fixture
def daemon_with_few_files(folder: Path) -> Iterator[Daemon]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    yield from started(folder, descriptors=(64, hard))


async def test_a_low_soft_limit_of_open_files_does_not_keep_workers_out(
    daemon_with_few_files: Daemon,
) -> None:
    wires = await dial_many(daemon_with_few_files.address, 120)
    status = await wires[-1].ask_status()
    assert status["sessions"] == 120
    await close_all(wires)


@pytest.fixture
def daemon_for_forty(folder: Path) -> Iterator[Daemon]:
    yield from started(folder, descriptors=(360, 360))


async def test_whom_open_files_leave_no_room_for_is_told_so_and_nobody_else_suffers(
    daemon_for_forty: Daemon,
) -> None:
    wires = await dial_many(daemon_for_forty.address, 40)
    with pytest.raises(ConnectionError, match=r"40 connections.*ulimit -n"):
        await dial(daemon_for_forty.address)
    wires[0].send(*define(), *submit(is_durable=True))
    assert list((await wires[0].take(m.InputsStored)).stored[0]) == [0, 1]
    await close_all([wires.pop()])
    await wires[0].until_status(lambda status: status["sessions"] == 39)
    wires.append(await dial(daemon_for_forty.address))
    await close_all(wires)


# --- workers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def made_up_workers(
    cluster: HandStarted, count: int, input_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with so many workers of eight containers each: the connections are real ones, and
    the state behind them is the daemon's own. Their containers wait for so long, and give None."""
    arguments = [cluster.state["worker_join"], str(count), "8", str(input_s)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fleet_workers", *arguments],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_workers(cluster: HandStarted, count: int) -> None:
    poll_until(lambda: cluster.status()["worker_count"] == count, f"{count} workers", TIMEOUT_S)


def is_at_rest(status: dict[str, Any]) -> bool:
    """Whether no call is open, no container has a lease and no core is given out."""
    return (
        status["open_call_count"] == 0
        and all(container["leases"] == 0 for container in status["containers"])
        and all(worker["cpu_free"] == worker["cpu"] for worker in status["workers"])
    )


def test_each_input_ends_once_when_half_of_many_workers_vanish(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(0)
    half = WORKER_COUNT // 2
    with (
        made_up_workers(cluster, half, INPUT_S),
        made_up_workers(cluster, WORKER_COUNT - half, INPUT_S) as doomed,
        kit.app.run(),
    ):
        wait_for_workers(cluster, WORKER_COUNT)
        results = kit.nap.map(range(40 * WORKER_COUNT), order_outputs=False)
        for _ in range(4 * WORKER_COUNT):
            assert next(results) is None
        status = cluster.status()
        assert status["container_count"] == 8 * WORKER_COUNT
        # Each of them has been given inputs, which it will not end.
        assert status["calls"][0]["running"] > 4 * WORKER_COUNT
        doomed.kill()
        assert sum(result is None for result in results) == 36 * WORKER_COUNT
        wait_for_workers(cluster, half)
        poll_until(lambda: is_at_rest(cluster.status()), "the scheduler is at rest", TIMEOUT_S)


# --- calls ----------------------------------------------------------------------------------------


waiting_app = fanout.App("fleet-tests")


@waiting_app.function(cpu=1000)
def unplaceable(x: int) -> int:
    """No machine has so many cores, so its calls wait."""
    return x


async def in_thread(action: Callable[..., Any], *arguments: Any) -> None:
    """Run what blocks beside the loop, in a thread that is gone afterwards."""
    with ThreadPoolExecutor(1) as executor:
        await asyncio.get_running_loop().run_in_executor(executor, action, *arguments)


async def until_open(cluster: HandStarted, count: int) -> None:
    def is_so() -> bool:
        return bool(cluster.status()["open_call_count"] == count)

    await in_thread(poll_until, is_so, f"{count} open calls", TIMEOUT_S)


async def test_many_calls_are_open_at_once_while_others_run(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    async with waiting_app.run(), kit.app.run():
        waiting = [asyncio.ensure_future(unplaceable.remote.aio(x)) for x in range(CALL_COUNT)]
        spawned = await asyncio.gather(*[unplaceable.spawn.aio(x) for x in range(100)])
        await until_open(cluster, CALL_COUNT + 100)
        assert await kit.same.remote.aio(7) == 7
        assert await asyncio.gather(*[kit.same.remote.aio(x) for x in range(500)]) == [*range(500)]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until_open(cluster, 100)
        for call in spawned:
            await call.cancel.aio()
        await until_open(cluster, 0)


async def test_many_calls_that_were_spawned_at_once_end_with_their_results(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(0)
    async with kit.app.run():
        calls = await asyncio.gather(*[kit.same.spawn.aio(x) for x in range(CALL_COUNT)])
        await until_open(cluster, CALL_COUNT)
        await in_thread(cluster.start_worker, "late", 2)
        await until_open(cluster, 0)
        results = await asyncio.gather(*[call.get.aio() for call in calls])
        assert results == [*range(CALL_COUNT)]


# --- inputs ---------------------------------------------------------------------------------------


def scheduler_bytes(cluster: HandStarted) -> int:
    assert cluster.scheduler is not None
    return memory_of([cluster.scheduler.pid]).uss


def test_many_spawned_inputs_wait_at_the_cost_of_their_payload_and_are_drained(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(0)
    with kit.app.run():
        kit.same.spawn_map(range(1000)).cancel()
        before = scheduler_bytes(cluster)
        call = kit.same.spawn_map(range(SPAWNED_COUNT))
        grown = scheduler_bytes(cluster) - before
        payload = len(encode_args((SPAWNED_COUNT,), None)[0]) * SPAWNED_COUNT
        assert grown < payload + INPUT_BYTES_MAX * SPAWNED_COUNT + NOISE_BYTES_MAX
        cluster.start_worker("late", 2)
        for expected, result in enumerate(call.iter()):
            assert result == expected
        assert expected == SPAWNED_COUNT - 1
        # Its outputs are kept, its inputs are not.
        kept = scheduler_bytes(cluster) - before
        assert kept < 2 * payload + INPUT_BYTES_MAX * SPAWNED_COUNT + 2 * NOISE_BYTES_MAX


class MapMemory:
    """What all processes hold while the results of a long map come: is it the same all the time?

    The later looks are compared with the larger of two early ones, because to look is a pause, and
    only a pause of the reader fills the buffers. Not all of the later ones come at the end, which
    may set free what was held for each input.
    """

    def __init__(self, cluster: HandStarted) -> None:
        self._cluster = cluster
        self._early = {MAPPED_COUNT * tenths // 10 for tenths in (1, 2)}
        self._late = {MAPPED_COUNT // 2, MAPPED_COUNT * 9 // 10, MAPPED_COUNT}
        self._pids: dict[str, list[int]] = {}
        self._before: Counter[str] = Counter()
        self._count = 0
        self._total = 0
        self.grown: Counter[str] = Counter()

    def take(self, value: int) -> None:
        """The next result."""
        self._count += 1
        self._total += value
        if self._count in self._early:
            self._pids = self._pids_now()
            self._before |= self._held()
        elif self._count in self._late:
            self.grown |= self._held() - self._before

    def require_constant(self) -> None:
        assert self._count == MAPPED_COUNT
        assert self._total == sum(range(MAPPED_COUNT))
        assert max(self.grown.values(), default=0) < MAP_GROWTH_BYTES_MAX, self.grown

    def _held(self) -> Counter[str]:
        return Counter({name: sum(map(memory_bytes, pids)) for name, pids in self._pids.items()})

    def _pids_now(self) -> dict[str, list[int]]:
        assert self._cluster.scheduler is not None
        worker = self._cluster.workers["w1"].pid
        return {
            "client": [os.getpid()],
            "scheduler": [self._cluster.scheduler.pid],
            "worker": [worker],
            "containers": sorted(kit.descendants_of(worker)),
        }


@pytest.mark.slow
@pytest.mark.parametrize("is_ordered", [True, False], ids=["ordered", "unordered"])
def test_a_map_of_very_many_inputs_takes_constant_memory_in_every_process(
    scheduler_and_workers: Start, is_ordered: bool
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    with kit.app.run():
        memory = MapMemory(cluster)
        inputs = (number for number in range(MAPPED_COUNT))
        for value in kit.same.map(inputs, order_outputs=is_ordered):
            memory.take(value)
    memory.require_constant()


@pytest.mark.slow
async def test_an_async_map_of_very_many_inputs_takes_constant_memory_in_every_process(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    async with kit.app.run():
        memory = MapMemory(cluster)
        async for value in kit.same.map.aio(number for number in range(MAPPED_COUNT)):
            memory.take(value)
    memory.require_constant()


@pytest.fixture
def daemon_with_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    for daemon in started(folder, FANOUT_SPAWNED_MEMORY="4"):
        monkeypatch.setenv("FANOUT_URL", daemon.address["client_join"])
        yield daemon


def test_a_spawn_beyond_the_memory_for_spawned_calls_fails_and_others_go_on(
    daemon_with_little_memory: Daemon,
) -> None:
    with kit.app.run():
        kept = kit.same.spawn_map(range(100))
        with pytest.raises(StorageError, match=r"4 MiB are allowed.*FANOUT_SPAWNED_MEMORY"):
            kit.same.spawn_map(bytes(10_000) for _ in range(1000))
        assert kept.num_inputs() == 100
        assert kit.same.spawn(1).num_inputs() == 1
        for call in (kept, kit.same.spawn(2)):
            call.cancel()
