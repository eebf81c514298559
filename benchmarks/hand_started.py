"""A scheduler and a worker started by hand for a benchmark, and what they use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT, BenchmarkError, memory_of, variables

START_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.02
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class HandStarted:
    """One scheduler and at most one worker daemon, in folders of their own."""

    def __init__(self, folder: Path, profile: str | None = None) -> None:
        self.folder = folder
        #: Where to write a profile of the scheduler by cProfile, under which it is half as fast.
        self.profile = profile
        self.scheduler = self._start("scheduler", "fanout_scheduler", ["--port", "0"], {})
        self.address = self._record("scheduler", self.scheduler)
        self.worker: subprocess.Popen[bytes] | None = None

    def start_worker(self, cpu: float = 1.0) -> None:
        """Start the worker daemon, and wait until the scheduler has accepted it."""
        join = {"FANOUT_WORKER_JOIN": self.address["worker_join"]}
        self.worker = self._start("worker", "fanout_worker", ["--cpu", str(cpu)], join)
        self._record("worker", self.worker)

    def close(self) -> None:
        """End both."""
        for process in (self.worker, self.scheduler):
            if process is not None:
                process.terminate()
                process.wait()

    # --- what they use ---

    def scheduler_bytes(self) -> int:
        """Memory that only the scheduler has."""
        return memory_of([self.scheduler.pid]).uss

    def scheduler_peak_bytes(self) -> int:
        """The most memory that the scheduler has ever had, shared libraries included."""
        for line in Path(f"/proc/{self.scheduler.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise BenchmarkError("the system does not say how much memory a process had at most")

    def scheduler_cpu_s(self) -> float:
        """Seconds of a core that the scheduler has used since its start."""
        return cpu_s_of(self.scheduler.pid)

    # --- processes ---

    def _start(
        self, name: str, module: str, arguments: list[str], extra: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        home = self.folder / name
        home.mkdir(mode=0o700, exist_ok=True)
        profiler: list[str] = []
        if name == "scheduler" and self.profile is not None:
            profiler = ["-m", "cProfile", "-o", os.path.abspath(self.profile)]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *profiler, "-m", module, "--home", str(home), *arguments],
                env={**variables(self.folder / "none"), **extra},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _record(self, name: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """What a daemon wrote when it was ready."""
        path = self.folder / name / f"{name}.json"

        def is_ready() -> bool:
            if process.poll() is not None:
                log = (self.folder / f"{name}.log").read_text()
                raise BenchmarkError(f"the {name} ended with {process.returncode}:\n{log[-4000:]}")
            return path.exists()

        wait_until(is_ready, f"the {name} is ready", START_TIMEOUT_S)
        record: dict[str, Any] = json.loads(path.read_text())
        return record


def cpu_s_of(pid: int) -> float:
    """Seconds of a core that a process has used since its start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


@contextmanager
def hand_started(profile: str | None = None) -> Iterator[HandStarted]:
    """A scheduler that ends with the block, and the worker too if one was started."""
    with tempfile.TemporaryDirectory(prefix="fanout-bench-") as folder:
        started = HandStarted(Path(folder), profile)
        try:
            yield started
        finally:
            started.close()


def wait_until(predicate: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Ask again and again until something is true.

    Raises:
        BenchmarkError: it was not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_INTERVAL_S)
