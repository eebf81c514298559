"""Fixtures that run the real thing: daemons as processes, scripts as a user runs them.

Every test that starts a daemon has a state folder of its own, and whatever it started is gone when
it ends. `FANOUT_TEST_TIMEOUT_FACTOR` stretches every deadline, for slow machines;
`FANOUT_TEST_NO_SKIP=1` turns a skip into a failure, so that CI leaves nothing out.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

ROOT = Path(__file__).parent.parent
TIMEOUT_FACTOR = float(os.environ.get("FANOUT_TEST_TIMEOUT_FACTOR") or 1)
POLL_INTERVAL_S = 0.005
#: How long after a test its sockets, threads and children may need to go away.
LEAK_TIMEOUT_S = 2.0
TASK_TIMEOUT_S = 1.0

WaitUntil = Callable[..., Any]


# --- waiting --------------------------------------------------------------------------------------


def poll_until(
    predicate: Callable[[], Any],
    describe: str | Callable[[], str],
    timeout_s: float = 10.0,
    interval_s: float = POLL_INTERVAL_S,
) -> Any:
    """What `predicate` returns as soon as that is true.

    Args:
        predicate: called again and again.
        describe: what is waited for, for the failure; a function is called when it is needed.
        timeout_s: seconds, multiplied by `FANOUT_TEST_TIMEOUT_FACTOR`.
        interval_s: seconds between calls; more where the predicate is dear or the wait is long.

    Raises:
        AssertionError: the time is up.
    """
    deadline = time.monotonic() + timeout_s * TIMEOUT_FACTOR
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            text = describe() if callable(describe) else describe
            raise AssertionError(f"not within {timeout_s * TIMEOUT_FACTOR:g} s: {text}")
        time.sleep(interval_s)


@pytest.fixture
def wait_until() -> WaitUntil:
    """`wait_until(predicate, describe, timeout_s=10)`: see `poll_until`."""
    return poll_until


# --- processes ------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children_of(pid: int) -> set[int]:
    """The children of all threads of a process."""
    pids: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pids.update(map(int, path.read_text().split()))
    return pids


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without any FANOUT_ one, with the checkout on the path."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("FANOUT_")}
    folders = [str(ROOT), str(ROOT / "scheduler"), str(ROOT / "worker")]
    variables["PYTHONPATH"] = os.pathsep.join(folders)
    variables.update(changes)
    return variables


def read_state(path: Path) -> dict[str, Any] | None:
    """The content of a daemon's state file, None while there is none."""
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return state


@dataclass
class Cluster:
    """The embedded default in a state folder of its own."""

    home: Path
    variables: dict[str, str]

    def python(
        self, *arguments: str | Path, timeout_s: float = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run this interpreter with these arguments as a client of the cluster."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=self.variables,
            timeout=timeout_s * TIMEOUT_FACTOR,
            text=True,
            **{"capture_output": True, "cwd": ROOT, **options},
        )

    def fanout(
        self, *arguments: str | Path, timeout_s: float = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line as a client of the cluster."""
        return self.python("-m", "fanout.cli.main", *arguments, timeout_s=timeout_s, **options)

    def daemon_pids(self) -> dict[str, int]:
        """The pids by name ("scheduler", "worker") of the daemons that run now."""
        pids = {}
        for name in ("scheduler", "worker"):
            for path in self.home.rglob(f"{name}.json"):
                state = read_state(path)
                if state is not None and is_alive(state["pid"]):
                    pids[name] = state["pid"]
        return pids

    def stop(self) -> None:
        """End the daemons: politely by the command line, and if that does not do it, by signal."""
        if not self.daemon_pids():
            return
        result = self.fanout("stop", "--force")
        try:
            poll_until(lambda: not self.daemon_pids(), "the daemons have left")
        except AssertionError:
            for pid in self.daemon_pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(
                f"`fanout stop --force` left daemons running: {result.stdout}{result.stderr}"
            ) from None


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An embedded cluster of two cores that starts when something first uses it.

    This process's own variables name it too, so `import fanout` in the test uses it.
    """
    home = tmp_path / "fanout-home"
    changes = {"FANOUT_HOME": str(home), "FANOUT_CPU": "2", "FANOUT_IDLE_TIMEOUT": "120"}
    for name in [name for name in os.environ if name.startswith("FANOUT_")]:
        if not name.startswith("FANOUT_TEST_"):
            monkeypatch.delenv(name)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    made = Cluster(home, environment(**changes))
    try:
        yield made
    finally:
        made.stop()


@dataclass
class HandStarted:
    """A scheduler and workers that the test started by hand, each a child process of the test."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    scheduler: subprocess.Popen[bytes] | None = None
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    port: int = 0
    #: For all daemons that are started from now on.
    variables: dict[str, str] = field(default_factory=dict)
    #: What the interpreter is to run as the scheduler.
    entry: list[str] = field(default_factory=lambda: ["-m", "fanout_scheduler"])

    def home(self, name: str) -> Path:
        """Where a daemon of this name keeps its files."""
        return self.folder / name

    @property
    def scheduler_home(self) -> Path:
        return self.home("scheduler")

    @property
    def state(self) -> dict[str, Any]:
        """The scheduler's state file: join strings, address, epoch."""
        state = read_state(self.scheduler_home / "scheduler.json")
        assert state is not None, "the scheduler has not been started"
        return state

    @property
    def client_join(self) -> str:
        join: str = self.state["client_join"]
        return join

    def status(self) -> dict[str, Any]:
        """What the scheduler says of itself."""
        from fanout.client.local import ask_status
        from fanout.protocol.join import JoinString

        return ask_status(JoinString.parse(self.client_join))

    def open_call_count(self) -> int:
        """How many calls the scheduler has to do something for."""
        return int(self.status()["open_call_count"])

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        """Start it, or start it again on the same port, and wait until it listens."""
        self.scheduler_home.mkdir(mode=0o700, exist_ok=True)
        arguments = ["--home", str(self.scheduler_home), "--port", str(self.port)]
        process = self._start("scheduler", [*self.entry, *arguments], {})
        path = self.scheduler_home / "scheduler.json"

        def is_ready() -> bool:
            self._require_alive("scheduler", process)
            state = read_state(path)
            return state is not None and state["pid"] == process.pid

        poll_until(is_ready, lambda: f"the scheduler listens; its log: {self.log('scheduler')}")
        self.scheduler = process
        self.port = int(self.state["address"].rpartition(":")[2])
        return process

    def start_worker(
        self, name: str = "w1", cpu: float = 2, join: str = "", prefix: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a worker and wait until the scheduler has accepted it.

        Args:
            join: with which it joins; "" for the token that the scheduler was born with.
            prefix: a command that executes the one that follows it, in the same process.
        """
        home = self.home(name)
        home.mkdir(mode=0o700, exist_ok=True)
        arguments = ["-m", "fanout_worker", "--home", str(home), "--name", name, "--cpu", str(cpu)]
        variables = {"FANOUT_WORKER_JOIN": join or self.state["worker_join"]}
        process = self._start(name, arguments, variables, prefix)

        def is_ready() -> bool:
            self._require_alive(name, process)
            state = read_state(home / "worker.json")
            return state is not None and state["pid"] == process.pid

        poll_until(is_ready, lambda: f"worker {name} was accepted; its log: {self.log(name)}")
        self.workers[name] = process
        return process

    def python(
        self, *arguments: str | Path, timeout_s: float = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run this interpreter with these arguments as a client of this scheduler."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment(FANOUT_URL=self.client_join, FANOUT_HOME=str(self.folder / "none")),
            timeout=timeout_s * TIMEOUT_FACTOR,
            text=True,
            **{"capture_output": True, "cwd": ROOT, **options},
        )

    def log(self, name: str) -> str:
        """What a daemon has written so far."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self) -> None:
        """End everything that was started: workers first, so that they can say goodbye."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)  # a test may have stopped it
                process.terminate()
        for process in self.processes:
            try:
                process.wait(10 * TIMEOUT_FACTOR)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _command(self, name: str, arguments: list[str]) -> list[str]:
        return [sys.executable, *arguments]

    def _start(
        self,
        name: str,
        arguments: list[str],
        variables: dict[str, str],
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*prefix, *self._command(name, arguments)],
                env=environment(**self.variables, **variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def _require_alive(self, name: str, process: subprocess.Popen[bytes]) -> None:
        code = process.poll()
        assert code is None, f"{name} ended with code {code}; its log: {self.log(name)}"


@pytest.fixture
def scheduler_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., HandStarted]]:
    """`scheduler_and_workers(2, cpu=1)`: a scheduler with two workers, named by `FANOUT_URL`."""
    made: list[HandStarted] = []

    def start(worker_count: int = 1, cpu: float = 2) -> HandStarted:
        folder = tmp_path / f"cluster-{len(made)}"
        folder.mkdir()
        started = HandStarted(folder)
        made.append(started)
        started.start_scheduler()
        for number in range(1, worker_count + 1):
            started.start_worker(f"w{number}", cpu)
        monkeypatch.setenv("FANOUT_URL", started.client_join)
        return started

    try:
        yield start
    finally:
        for started in made:
            started.stop()


# --- leaks ----------------------------------------------------------------------------------------


def _held() -> dict[str, set[Any]]:
    """What a test must leave as it found it."""
    descriptors = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(path)
            if target.startswith(("socket:", "pipe:")):
                descriptors.add(f"{path.name} -> {target}")
    return {
        "child processes": children_of(os.getpid()),
        "sockets and pipes": descriptors,
        "threads": {thread for thread in threading.enumerate() if not thread.daemon},
    }


def _close_client() -> None:
    """Close the blocking API's connection: the next test has another cluster, or none."""
    loop = sys.modules.get("fanout.client.loop")
    if loop is not None:
        loop.stop()


@pytest.fixture(scope="session", autouse=True)
def loop_of_libuv() -> None:
    """The first loop of a process makes a pipe that libuv keeps for ever, which is no leak."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a child process, a socket, a pipe, a thread or a task behind."""
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("dangling_task_check")
    # After the loop of an async test was made, because pytest closes it only after this check.
    before = _held()
    yield
    _close_client()
    left: dict[str, set[Any]] = {}

    def is_clean() -> bool:
        left.clear()
        left.update({name: extra for name, now in _held().items() if (extra := now - before[name])})
        if left:
            gc.collect()
        return not left

    poll_until(is_clean, lambda: f"the test left behind {left}", LEAK_TIMEOUT_S)


@pytest.fixture
async def dangling_task_check() -> AsyncIterator[None]:
    """Fails an async test that ends while a task that it started still runs."""
    before = asyncio.all_tasks()
    yield
    sessions = sys.modules.get("fanout.client.sessions")
    if sessions is not None:
        await sessions.close_here()
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _done, left = await asyncio.wait(left, timeout=TASK_TIMEOUT_S * TIMEOUT_FACTOR)
    assert not left, f"the test left tasks running: {left}"


# --- nothing is skipped in CI ---------------------------------------------------------------------


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    is_expected_failure = hasattr(report, "wasxfail")
    if not report.skipped or is_expected_failure or os.environ.get("FANOUT_TEST_NO_SKIP") != "1":
        return
    report.outcome = "failed"
    report.longrepr = f"skipped, and FANOUT_TEST_NO_SKIP=1 forbids it: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report
