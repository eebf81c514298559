"""Processes of a benchmark: engines that answer requests, clusters of their own, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CORE_COUNT = 2
ANSWER_TIMEOUT_S = 30.0
SAMPLE_INTERVAL_S = 0.02


class BenchmarkError(Exception):
    """An engine or a script failed; the text holds what it wrote."""


def variables(home: Path) -> dict[str, str]:
    """The environment of a client of the cluster in `home`, free of other settings of fanout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FANOUT_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "FANOUT_HOME": str(home),
        "FANOUT_CPU": str(CORE_COUNT),
        "FANOUT_IDLE_TIMEOUT": "120",
    }


def stop_cluster(home: Path) -> None:
    """End the daemons of a cluster; nothing happens where there are none."""
    subprocess.run(
        [sys.executable, "-m", "fanout.cli.main", "stop", "--force"],
        env=variables(home),
        cwd=ROOT,
        check=False,
        capture_output=True,
        timeout=60,
    )


@contextmanager
def cluster_home() -> Iterator[Path]:
    """A folder for an embedded cluster, whose daemons end with the block."""
    with tempfile.TemporaryDirectory(prefix="fanout-bench-") as folder:
        home = Path(folder)
        try:
            yield home
        finally:
            stop_cluster(home)


class EngineProcess:
    """One engine of `engines.py` in a process of its own; `start` begins it."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.home = home
        #: False before the start, and from a failure on.
        self.is_running = False

    def start(self) -> None:
        """Start the process; after a failure, start another one.

        Raises:
            BenchmarkError: it did not come up.
        """
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engines", self.name],
            env=variables(self.home),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.is_running = True
        self._request = "its start"
        self.pid: int = self._read(ANSWER_TIMEOUT_S)["ready"]

    def ask(self, measure: str, *, timeout_s: float = ANSWER_TIMEOUT_S, **arguments: Any) -> Any:
        """What the engine measured; None if it has no such thing.

        Raises:
            BenchmarkError: it failed, or took longer than `timeout_s`.
        """
        assert self.is_running
        assert self.process.stdin is not None
        self._request = json.dumps({"measure": measure, "arguments": arguments})
        # An engine that died since its last answer is noticed where this one is read.
        with suppress(BrokenPipeError):
            self.process.stdin.write(self._request + "\n")
            self.process.stdin.flush()
        return self._read(timeout_s)["result"]

    def close(self) -> None:
        """Let it end by itself, and make it where it does not; harmless to repeat."""
        if not self.is_running:
            return
        self.is_running = False
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self._errors.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        limit = threading.Timer(timeout_s, self.process.kill)
        limit.start()
        try:
            line = self.process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            self.process.wait()
            self._errors.seek(0)
            text = self._errors.read()[-4000:]
            self.close()
            raise BenchmarkError(
                f"engine {self.name} failed, or took over {timeout_s:g} s, at "
                f"{self._request}\n{text}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def daemon_pids(home: Path) -> list[int]:
    """The pids of the scheduler and the worker daemon of a cluster."""
    files = [path for name in ("scheduler", "worker") for path in home.rglob(f"{name}.json")]
    return [json.loads(path.read_text())["pid"] for path in files]


@dataclass
class Memory:
    """Bytes that some processes occupy together: proportional and unshared."""

    pss: int = 0
    uss: int = 0


def memory_of(pids: list[int]) -> Memory:
    total = Memory()
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, size_kib = line.split()[:2]
            if name == "Pss:":
                total.pss += int(size_kib) << 10
            elif name in ("Private_Clean:", "Private_Dirty:"):
                total.uss += int(size_kib) << 10
    return total


class MemorySampler(threading.Thread):
    """Notes the peak of what some processes occupy, from `start` to `finish`."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids = pids
        self.peak = Memory()
        self.sample_count = 0
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(SAMPLE_INTERVAL_S):
            now = memory_of(self.pids)
            self.peak.pss = max(self.peak.pss, now.pss)
            self.peak.uss = max(self.peak.uss, now.uss)
            self.sample_count += 1

    def finish(self) -> Memory:
        """The peak.

        Raises:
            BenchmarkError: the measured span was too short to say anything.
        """
        self._is_over.set()
        self.join()
        if self.sample_count < 3:
            raise BenchmarkError(f"only {self.sample_count} memory samples: measure more inputs")
        return self.peak
