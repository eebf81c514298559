"""Containers and workers are lost in mid-work: the right input is charged, what was finished does
not run again, the rest is there in time, and nothing of theirs is left running."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanout import exceptions
from fanout.config import WORKER_DEADLINE_S
from fanout_worker import leftovers
from tests import crash_kit as kit
from tests.behaviour_kit import descendants_of
from tests.conftest import (
    TIMEOUT_FACTOR,
    Cluster,
    HandStarted,
    environment,
    is_alive,
    poll_until,
)
from tests.engine_fixture import engine as engine
from tests.engine_fixture import wait_until_no_call_is_open
from tests.hosts_kit import require_namespaces
from tests.worker_kit import containers, lease_of

Start = Callable[..., HandStarted]

LEASE_COUNT = 256
IS_FULL = os.environ.get("FANOUT_TEST_FULL") == "1"
SEEDS = range(40 if IS_FULL else 3)
#: What a busy machine may take longer than the ideal.
SLACK_S = 1.5


# --- a segmentation fault in the middle of a lease ------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_fault_in_a_lease_names_its_input_and_keeps_what_was_finished(seed: int) -> None:
    bad = random.Random(seed).randrange(LEASE_COUNT)
    async with containers() as daemon:
        container = await daemon.start(
            "import ctypes\ndef f(x, bad): return ctypes.string_at(0) if x == bad else x\n"
        )
        container.give(lease_of([(x, bad) for x in range(LEASE_COUNT)]))
        await daemon.until(lambda: daemon.events.exits, "the container died")
        reason, running, details, _ = daemon.events.exits[1]
        assert (reason, running, details["signal"]) == ("crash", [(1, bad)], "SIGSEGV")
        assert sorted(daemon.events.outputs) == list(range(bad))


@pytest.fixture
def running(engine: Cluster) -> Iterator[None]:
    with kit.app.run():
        yield
    wait_until_no_call_is_open()


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_input_that_faults_runs_again(running: None, tmp_path: Path, seed: int) -> None:
    bad = random.Random(seed).randrange(LEASE_COUNT)
    options = {"bad": bad, "folder": str(tmp_path)}
    results = list(kit.fault_at.map(range(LEASE_COUNT), kwargs=options, return_exceptions=True))
    error = results.pop(bad)
    assert isinstance(error, exceptions.ContainerCrashedError)
    assert (error.signal, error.input_index, error.crash_count) == ("SIGSEGV", bad, 3)
    others = [x for x in range(LEASE_COUNT) if x != bad]
    assert results == others
    assert sorted(kit.runs(tmp_path)) == sorted([*others, bad, bad, bad])


@pytest.mark.parametrize("seed", SEEDS)
def test_an_input_that_faults_once_succeeds_at_its_second_attempt(
    running: None, tmp_path: Path, seed: int
) -> None:
    bad = random.Random(seed).randrange(LEASE_COUNT)
    options = {"bad": bad, "folder": str(tmp_path), "times": 1}
    function: Any = kit.fault_at
    results = list(function.with_options(retries=1).map(range(LEASE_COUNT), kwargs=options))
    assert results == list(range(LEASE_COUNT))
    assert sorted(kit.runs(tmp_path)) == sorted([*range(LEASE_COUNT), bad])


# --- a worker that is killed, or stopped ----------------------------------------------------------


def use_both(cluster: HandStarted) -> dict[int, str]:
    """Have a container in each worker. Returns the names of their workers by the containers'
    pids."""
    results = kit.nap.map(range(40), kwargs={"seconds": 0.02})
    return {pid: worker_of(cluster, pid) for _, pid in results}


def worker_of(cluster: HandStarted, pid: int) -> str:
    """The name of the worker to which a container belongs."""
    workers = cluster.workers.items()
    return next(name for name, process in workers if pid in descendants_of(process.pid))


def test_a_killed_workers_inputs_run_again_at_once(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(2, cpu=1)
    count, input_s, killed_after_s = 40, 0.05, 0.5
    with kit.app.run():
        assert sorted(use_both(cluster).values()) == ["w1", "w2"]
        begin_s = time.monotonic()
        results = kit.nap.map(range(count), kwargs={"seconds": input_s}, order_outputs=False)
        got = [x for x, _ in itertools.islice(results, int(2 * killed_after_s / input_s))]
        cluster.workers["w1"].kill()
        killed_s = time.monotonic() - begin_s
        got += [x for x, _ in results]
        taken_s = time.monotonic() - begin_s
    cluster.workers["w1"].wait()
    assert sorted(got) == list(range(count))
    ideal_s = killed_s + count * input_s - 2 * killed_after_s
    assert taken_s < ideal_s + SLACK_S * TIMEOUT_FACTOR


@pytest.mark.slow
def test_a_worker_stopped_past_its_deadline_comes_back_with_its_container(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(2, cpu=1)
    bad, count = 0, 30
    with kit.app.run():
        options = {"bad": bad, "folder": str(tmp_path)}
        results = kit.hang_at_first.map(range(count), kwargs=options, order_outputs=False)
        got = [next(results)]
        poll_until((tmp_path / "begun").exists, "the input that hangs begins")
        container = int((tmp_path / "begun").read_text())
        name = worker_of(cluster, container)
        cluster.workers[name].send_signal(signal.SIGSTOP)
        begin_s = time.monotonic()
        got += results
        taken_s = time.monotonic() - begin_s
        assert sorted(got) == list(range(count)), "each once"
        assert kit.runs(tmp_path).count(bad) == 2
        assert taken_s < WORKER_DEADLINE_S + SLACK_S * TIMEOUT_FACTOR
        assert len(cluster.status()["workers"]) == 1
        assert not (tmp_path / "stopped").exists(), "nobody can tell it yet"

        cluster.workers[name].send_signal(signal.SIGCONT)
        poll_until((tmp_path / "stopped").exists, "the void lease is stopped")
        poll_until(lambda: len(cluster.status()["workers"]) == 2, "the worker is taken back")
        poll_until(lambda: all_free(cluster), lambda: f"all cores are free: {cluster.status()}")
        assert is_alive(container), "it keeps its container"
        meet = kit.meet.map(range(2), kwargs={"folder": str(tmp_path), "count": 2})
        assert list(meet) == [0, 1], "both workers work"
        again = kit.hang_at_first.map(range(count), kwargs=options | {"bad": -1})
        assert list(again) == list(range(count))
        assert is_alive(container)
    assert container_log(cluster, name) == ""


def all_free(cluster: HandStarted) -> bool:
    return all(worker["cpu_free"] == worker["cpu"] for worker in cluster.status()["workers"])


def container_log(cluster: HandStarted, name: str) -> str:
    """Lines of a worker's log that tell of an error."""
    return "\n".join(line for line in cluster.log(name).splitlines() if " ERROR " in line)


# --- code that is asked to stop -------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_setting_code_has_ten_seconds_to_stop(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    assert "FANOUT_KILL_GRACE" not in environment()
    scheduler_and_workers(1, cpu=2)
    grace_s, folder = 10.0, str(tmp_path)
    with kit.app.run():
        clean_up = kit.clean_up.with_options(timeout=kit.TIMEOUT_S)
        run = kit.run.with_options(timeout=kit.TIMEOUT_S)
        pid = clean_up.remote(0, folder)
        assert run.remote("nothing") == "nothing"
        begin_s = time.monotonic()
        cleans_up = clean_up.spawn(0.8 * grace_s, folder)
        with pytest.raises(exceptions.FunctionTimeoutError):
            run.remote("c-loop", "c-loop", folder)
        taken_s = time.monotonic() - begin_s - kit.TIMEOUT_S
        assert grace_s <= taken_s < grace_s + SLACK_S * TIMEOUT_FACTOR
        with pytest.raises(exceptions.FunctionTimeoutError):
            cleans_up.get()
        assert (tmp_path / "saved").exists()
        assert clean_up.remote(0, folder) == pid, "its container goes on"


# --- what a worker leaves behind ------------------------------------------------------------------


def has_groups() -> bool:
    """Whether a worker that is started here can have control groups."""
    try:
        leftovers.make_group("test").rmdir()
    except OSError:
        return False
    return True


def without_groups(command: str = "mount -o remount,bind,ro") -> list[str]:
    """Executes a command where control groups can be read and not written, as in Docker, or where
    another command has done something else to what is mounted of them."""
    require_namespaces()
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    folders = [fields[1] for line in mounts if (fields := line.split())[2] == "cgroup2"]
    commands = [f"{command} {folder}" for folder in folders]
    shell = shutil.which("sh") or "/bin/sh"
    return ["unshare", "--mount", shell, "-c", "; ".join([*commands, 'exec "$@"']), "sh"]


@contextlib.contextmanager
def two_families(tmp_path: Path) -> Iterator[list[Path]]:
    """Where two containers, of which the second dies, tell of the processes that they start. With
    the daemon, which has ended by the end of this, all of those end."""
    folders = [tmp_path / "neighbour", tmp_path / "dead"]
    try:
        yield folders
        may_live = set() if has_groups() else {kit.STRANGER}
        poll_until(lambda: set().union(*map(alive_of, folders)) <= may_live, "all end")
    finally:
        for pid in filter(is_alive, {**kit.noted(folders[0]), **kit.noted(folders[1])}):
            os.kill(pid, signal.SIGKILL)


async def test_what_a_dead_container_started_dies_and_what_its_neighbour_started_lives(
    tmp_path: Path,
) -> None:
    with two_families(tmp_path) as folders:
        async with containers() as daemon:
            for number, deed in enumerate(("children", "children-and-death")):
                folders[number].mkdir()
                container = await daemon.start(
                    "from tests import crash_kit\n"
                    "def f(folder, deed): return crash_kit.do(deed, folder)\n",
                    container_id=number,
                )
                inputs = [(str(folders[number]), deed)]
                container.give(lease_of(inputs, lease_id=number, start=number))
                await daemon.until(lambda: daemon.events.outputs, "the neighbour has children")
            await daemon.until(lambda: daemon.events.exits, "the other container died")
            poll_until(lambda: alive_of(folders[1]) <= {kit.STRANGER}, "its children end")
            assert alive_of(folders[0]) == kit.CHILDREN


@pytest.mark.parametrize("max_inputs", [1, 2])
@pytest.mark.parametrize("reason", ["timeout", "cancelled"])
async def test_nothing_of_the_tree_of_a_container_that_had_to_be_killed_is_left(
    tmp_path: Path, reason: str, max_inputs: int
) -> None:
    timeout_s = 1.5 * TIMEOUT_FACTOR if reason == "timeout" else None
    with two_families(tmp_path) as folders:
        async with containers(kill_grace_s=0.2) as daemon:
            for number, deeds in enumerate((["children"], ["children", "c-loop"])):
                folders[number].mkdir()
                container = await daemon.start(
                    "from tests import crash_kit\n"
                    "def f(folder, deeds):\n"
                    "  for deed in deeds:\n"
                    "    print(deed)\n"
                    "    crash_kit.do(deed, folder)\n",
                    container_id=number,
                    timeout=timeout_s,
                    max_inputs=max_inputs,
                )
                inputs = [(str(folders[number]), deeds)]
                container.give(lease_of(inputs, container_id=number, lease_id=number, start=number))
                await daemon.until(lambda: daemon.events.outputs, "the neighbour has children")
            await daemon.until(lambda: "c-loop" in daemon.events.text(), "it has children, too")
            assert alive_of(folders[1]) == kit.CHILDREN
            if reason == "cancelled":
                container.lower_limit(1, 0, True)
            await daemon.until(lambda: daemon.events.exits, "the container was killed")
            assert daemon.events.exits[1][:2] == (reason, [])
            assert daemon.events.failure(1) == reason
            poll_until(lambda: alive_of(folders[1]) <= {kit.STRANGER}, "its children end")
            assert alive_of(folders[0]) == kit.CHILDREN


def alive_of(folder: Path) -> set[str]:
    """The names of those that live of what was started."""
    return {name for pid, name in kit.noted(folder).items() if is_alive(pid)}


@pytest.mark.parametrize("is_limited", [False, True], ids=["as-here", "without-control-groups"])
def test_a_killed_worker_leaves_nothing_running(
    scheduler_and_workers: Start, tmp_path: Path, is_limited: bool
) -> None:
    cluster = scheduler_and_workers(0)
    worker = cluster.start_worker("w1", 2, prefix=without_groups() if is_limited else ())
    with kit.app.run():
        call = kit.start_children_and_wait.spawn(str(tmp_path))
        poll_until((tmp_path / "begun").exists, "children are there")
        started = kit.noted(tmp_path)
        assert set(started.values()) == kit.CHILDREN
        everybody = {*descendants_of(worker.pid), *started}
        worker.kill()
        worker.wait()
        if is_limited or not has_groups():
            # Nothing tells where it comes from; see worker/README.md.
            everybody -= {pid for pid, name in started.items() if name == kit.STRANGER}
        try:
            poll_until(
                lambda: not any(map(is_alive, everybody)),
                lambda: f"all end: {[(p, started.get(p)) for p in everybody if is_alive(p)]}",
                2.0,
            )
        finally:
            for pid in filter(is_alive, started):
                os.kill(pid, signal.SIGKILL)
        call.cancel()


def test_without_control_groups_nothing_outlives_the_last_container(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(0)
    worker = cluster.start_worker("w1", 2, prefix=without_groups())
    with kit.app.run():
        assert kit.run.remote("children", "children", str(tmp_path)) == "children"
        assert set(kit.noted(tmp_path).values()) == kit.CHILDREN
        assert all(map(is_alive, kit.noted(tmp_path))), "while the container lives they may run"
    poll_until(
        lambda: not any(map(is_alive, kit.noted(tmp_path))),
        lambda: f"all end: {[n for p, n in kit.noted(tmp_path).items() if is_alive(p)]}",
    )
    assert worker.poll() is None


def told_of_groups(log: str) -> list[str]:
    """The lines of a log that are about control groups."""
    return [line for line in log.splitlines() if "control group" in line]


@pytest.mark.parametrize(
    ("command", "reason"),
    [("mount -o remount,bind,ro", "Read-only file system"), ("umount --lazy", "can be seen here")],
    ids=["read-only", "not-mounted"],
)
def test_a_worker_without_control_groups_says_once_what_may_outlive_it(
    scheduler_and_workers: Start, command: str, reason: str
) -> None:
    cluster = scheduler_and_workers(0)
    cluster.start_worker("w1", 2, prefix=without_groups(command))
    with kit.app.run():
        assert kit.nap.remote(1, 0)[0] == 1
    (line,) = told_of_groups(cluster.log("w1"))
    assert " WARNING " in line
    assert reason in line
    assert "left session and parent and cleared its variables may outlive it" in line


def test_a_worker_with_control_groups_says_nothing_of_them(scheduler_and_workers: Start) -> None:
    if not has_groups():
        pytest.skip("no control groups here")
    cluster = scheduler_and_workers(1)
    with kit.app.run():
        assert kit.nap.remote(1, 0)[0] == 1
    assert told_of_groups(cluster.log("w1")) == []


def test_an_embedded_worker_without_control_groups_keeps_that_to_its_own_log(
    cluster: Cluster,
) -> None:
    """It starts with the first script of the day, whose author has asked for no worker."""
    cluster.variables["FANOUT_LOG"] = "info"
    code = "from tests.crash_kit import app, nap\nwith app.run(): nap.remote(1, 0)\n"
    done = subprocess.run(
        [*without_groups(), sys.executable, "-c", code],
        env=cluster.variables,
        timeout=60 * TIMEOUT_FACTOR,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert told_of_groups(done.stdout + done.stderr) == []
    (path,) = cluster.home.rglob("worker.output")
    (line,) = told_of_groups(path.read_text())
    assert " INFO " in line
