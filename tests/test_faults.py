"""Processes of every kind are killed in mid-work: nothing is lost, doubled or left running."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout.config import CLIENT_GRACE_S
from tests import behaviour_kit as kit
from tests.conftest import (
    ROOT,
    TIMEOUT_FACTOR,
    Cluster,
    HandStarted,
    environment,
    is_alive,
    poll_until,
)

Start = Callable[..., HandStarted]
SCRIPTS = Path(__file__).parent / "scripts"

#: Rounds of killing the scheduler behind a spawn; all of them with FANOUT_TEST_FULL=1.
SPAWN_ROUNDS = 200 if os.environ.get("FANOUT_TEST_FULL") == "1" else 8


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process by SIGKILL, and wait until it is gone."""
    process.kill()
    process.wait()


def killed_after_s(pid: int) -> float:
    """End a process by SIGKILL; give the seconds until it had the signal, counted from the call.

    Inside `kill` only this thread's processor time counts: the signal is there before the process
    wakes, and a process that dies on this core does so before `kill` returns here.
    """
    begin_s = time.monotonic()
    own_begin_s = time.thread_time()
    waited_s = time.monotonic() - begin_s
    os.kill(pid, signal.SIGKILL)
    return waited_s + time.thread_time() - own_begin_s


def inputs_of(results: Iterator[Any], pids: set[int], count: int) -> list[int]:
    """The inputs of the next results of `nap`; their containers are noted."""
    got = []
    for x, pid in itertools.islice(results, count):
        got.append(x)
        pids.add(pid)
    return got


# --- containers and workers -----------------------------------------------------------------------


@dataclass
class DeadClient:
    """A client that was killed, what it had running, and the folder of that."""

    cluster: HandStarted
    folder: Path
    input_pid: int


@pytest.fixture(scope="module")
def dead_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeadClient]:
    """Its grace passes while the other tests of this file run."""
    folder = tmp_path_factory.mktemp("dead-client")
    cluster = HandStarted(folder)
    try:
        cluster.start_scheduler()
        cluster.start_worker("w1", cpu=1)
        variables = environment(
            FANOUT_URL=cluster.client_join, FANOUT_HOME=str(cluster.folder / "none")
        )
        with subprocess.Popen(
            [sys.executable, SCRIPTS / "endless.py", str(folder)], env=variables, cwd=ROOT
        ) as client:
            begun = folder / "begun-5"
            poll_until(begun.exists, "the input that never ends begins")
            kill(client)
        yield DeadClient(cluster, folder, int(begun.read_text()))
    finally:
        cluster.stop()


def test_what_a_client_that_was_killed_had_running_goes_on_for_now(dead_client: DeadClient) -> None:
    assert is_alive(dead_client.input_pid)
    assert dead_client.cluster.open_call_count() == 1


@pytest.mark.parametrize("is_ordered", [True, False], ids=["ordered", "unordered"])
def test_containers_that_are_killed_lose_and_double_nothing(
    scheduler_and_workers: Start, is_ordered: bool
) -> None:
    scheduler_and_workers(1, cpu=2)
    with kit.app.run():
        results = kit.nap.map(range(1500), kwargs={"seconds": 0.001}, order_outputs=is_ordered)
        pids: set[int] = set()
        got = inputs_of(results, pids, 50)
        for _ in range(4):
            victims = [pid for pid in pids if is_alive(pid)]
            pids.clear()
            os.kill(victims[-1], signal.SIGKILL)
            got += inputs_of(results, pids, 200)
        got += inputs_of(results, pids, 1500)
    assert (got if is_ordered else sorted(got)) == list(range(1500))


def test_a_worker_that_is_killed_loses_and_doubles_nothing(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(2, cpu=1)
    with kit.app.run():
        results = kit.nap.map(range(1000), kwargs={"seconds": 0.002}, order_outputs=False)
        pids: set[int] = set()
        got = inputs_of(results, pids, 100)
        containers = set().union(
            *(kit.descendants_of(worker.pid) for worker in cluster.workers.values())
        )
        of_first = kit.descendants_of(cluster.workers["w1"].pid)
        kill(cluster.workers["w1"])
        got += inputs_of(results, pids, 1000)
        assert sorted(got) == list(range(1000))
        assert of_first < containers
        poll_until(
            lambda: not any(map(is_alive, of_first)), "the processes of the killed worker end"
        )
        poll_until(lambda: cluster.open_call_count() == 0, "the last acknowledgement arrives")


def test_work_goes_on_when_the_last_worker_is_replaced(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    with kit.app.run():
        results = kit.nap.map(range(400), kwargs={"seconds": 0.002})
        pids: set[int] = set()
        got = inputs_of(results, pids, 50)
        kill(cluster.workers["w1"])
        cluster.start_worker("w2", cpu=1)
        got += inputs_of(results, pids, 400)
    assert got == list(range(400))


def test_the_embedded_worker_is_replaced_when_it_is_killed(cluster: Cluster) -> None:
    with kit.app.run():
        results = kit.nap.map(range(400), kwargs={"seconds": 0.002})
        pids: set[int] = set()
        got = inputs_of(results, pids, 50)
        os.kill(cluster.daemon_pids()["worker"], signal.SIGKILL)
        got += inputs_of(results, pids, 400)
    assert got == list(range(400))


# --- clients --------------------------------------------------------------------------------------


# --- the scheduler --------------------------------------------------------------------------------


def test_an_acknowledged_spawn_survives_the_scheduler(scheduler_and_workers: Start) -> None:
    """The scheduler is killed as soon as `spawn` has returned, again and again."""
    cluster = scheduler_and_workers(1, cpu=1)
    calls: list[fanout.FunctionCall[Any]] = []
    delays_s = []
    with kit.app.run():
        for number in range(SPAWN_ROUNDS):
            calls.append(kit.same.spawn(number))
            assert cluster.scheduler is not None
            delays_s.append(killed_after_s(cluster.scheduler.pid))
            cluster.scheduler.wait()
            cluster.start_scheduler()
        assert sorted(delays_s)[len(delays_s) // 2] < 0.001
        for number, call in enumerate(calls):
            assert call.get(timeout=30) == number
        assert len(set(calls)) == SPAWN_ROUNDS
    poll_until(lambda: cluster.open_call_count() == 0, "no call is left open")


def test_a_map_goes_on_when_the_scheduler_comes_back(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    with kit.app.run():
        results = kit.same.map(range(20_000))
        got = list(itertools.islice(results, 100))
        for _ in range(2):
            assert cluster.scheduler is not None
            kill(cluster.scheduler)
            cluster.start_scheduler()
            got += itertools.islice(results, 4000)
        got += results
    assert got == list(range(20_000))


def test_a_generator_goes_on_when_the_scheduler_comes_back(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    with kit.app.run():
        results = kit.items.remote_gen(20_000)
        got = list(itertools.islice(results, 100))
        assert cluster.scheduler is not None
        kill(cluster.scheduler)
        cluster.start_scheduler()
        got += results
    assert got == list(range(20_000))


def test_a_generator_goes_on_in_another_worker(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    with kit.app.run():
        results = kit.items.remote_gen(5000)
        got = list(itertools.islice(results, 100))
        kill(cluster.workers["w1"])
        cluster.start_worker("w2", cpu=1)
        got += results
    assert got == list(range(5000))


def test_a_large_argument_goes_on_when_the_scheduler_comes_back(
    scheduler_and_workers: Start,
) -> None:
    import zlib

    import numpy

    cluster = scheduler_and_workers(1, cpu=1)
    array = numpy.arange(16 << 18, dtype=numpy.uint32)
    with kit.app.run():
        results = kit.checksum.map([array] * 30)
        got = [next(results)]
        assert cluster.scheduler is not None
        kill(cluster.scheduler)
        cluster.start_scheduler()
        got += results
    assert got == [(len(array), zlib.crc32(array.data))] * 30


def test_a_nested_map_goes_on_when_the_scheduler_comes_back(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    with kit.app.run():
        results = kit.trunk.map(range(60), kwargs={"folder": str(tmp_path)})
        got = [next(results)]
        assert cluster.scheduler is not None
        kill(cluster.scheduler)
        cluster.start_scheduler()
        got += results
    assert got == [2 * (x + 2) for x in range(60)]


def test_a_known_function_gets_more_containers_after_the_scheduler_came_back(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    with kit.app.run():
        _, first = kit.nap.remote(0)
        assert cluster.scheduler is not None
        kill(cluster.scheduler)
        cluster.start_scheduler()
        pids: set[int] = set()
        results = kit.nap.map(range(40), kwargs={"seconds": 0.05})
        assert inputs_of(results, pids, 40) == list(range(40))
    assert first in pids, "the warm container is kept"
    assert len(pids) == 2


# --- daemons that leave ---------------------------------------------------------------------------


def test_an_idle_scheduler_leaves_although_its_folder_is_gone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    arguments = ["--home", str(home), "--embedded", "--idle-timeout", "0.2"]
    with subprocess.Popen(
        [sys.executable, "-m", "fanout_scheduler", *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        poll_until(lambda: (home / "scheduler.json").exists() or process.poll() is not None, "up")
        shutil.rmtree(home)
        try:
            assert process.wait(10 * TIMEOUT_FACTOR) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("victims", [("scheduler",), ("worker",), ("scheduler", "worker")])
def test_embedded_daemons_that_were_killed_are_started_anew(
    cluster: Cluster, victims: tuple[str, ...]
) -> None:
    with kit.app.run():
        assert kit.same.remote(1) == 1
    pids = cluster.daemon_pids()
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    with kit.app.run():
        assert kit.same.remote(2) == 2


@pytest.mark.slow
def test_nothing_runs_on_for_a_client_that_was_killed(
    dead_client: DeadClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = dead_client.cluster
    timeout_s = CLIENT_GRACE_S + 15
    # The code sleeps, so it can be stopped without the process; it runs until it is.
    poll_until(
        lambda: cluster.open_call_count() == 0, "the call of the dead client ends", timeout_s
    )
    monkeypatch.setenv("FANOUT_URL", cluster.client_join)
    with kit.app.run():
        assert kit.same.remote(1) == 1, "the core is free"
    assert not (dead_client.folder / "ended-5").exists()
