"""How long a map takes when one of two workers is lost in its middle.

    python -m benchmarks.recovery            # SIGKILL after a second, the median of 5 runs
    python -m benchmarks.recovery --stop     # SIGSTOP: it is lost when nothing was heard for 15 s

A killed worker's inputs run again at once, so the map should take what one worker needs for the
rest. Of a stopped one nobody knows until its deadline, and then its last inputs run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fanout
from benchmarks.process import ROOT, BenchmarkError, variables
from fanout.config import WORKER_DEADLINE_S

app = fanout.App("recovery")

WORKER_NAMES = ("stays", "lost")
INPUT_COUNT = 200
INPUT_S = 0.05
LOST_AFTER_S = 1.0
#: By one slot, what is left when the other is lost. Half of what runs then is done for nothing.
IDEAL_S = LOST_AFTER_S + INPUT_COUNT * INPUT_S - len(WORKER_NAMES) * LOST_AFTER_S
START_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.01


@app.function()
def nap(x: int) -> int:
    time.sleep(INPUT_S)
    return x


class Cluster:
    """A scheduler and two workers of one core, started by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        record = self._start("scheduler", "fanout_scheduler", ["--port", "0"], {})
        self.client_join: str = record["client_join"]
        join = {"FANOUT_WORKER_JOIN": record["worker_join"]}
        for name in WORKER_NAMES:
            self._start(name, "fanout_worker", ["--name", name, "--cpu", "1"], join)

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait()

    def _start(
        self, name: str, module: str, arguments: list[str], extra: dict[str, str]
    ) -> dict[str, Any]:
        home = self.folder / name
        home.mkdir(mode=0o700)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--home", str(home), *arguments],
                env={**variables(self.folder / "none"), **extra},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes[name] = process
        path = home / f"{module.removeprefix('fanout_')}.json"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                text = (self.folder / f"{name}.log").read_text()
                raise BenchmarkError(f"{name} did not start:\n{text[-4000:]}")
            time.sleep(POLL_INTERVAL_S)
        record: dict[str, Any] = json.loads(path.read_text())
        return record


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Daemons that end with the block, which uses them."""
    with tempfile.TemporaryDirectory(prefix="fanout-bench-") as folder:
        made = Cluster(Path(folder))
        os.environ["FANOUT_URL"] = made.client_join
        try:
            yield made
        finally:
            made.close()


def measure(number: int) -> float:
    """Seconds that one map takes whose second worker gets this signal after a second."""
    with cluster() as made, app.run():
        # Both have a container now, so what is measured is no start.
        list(nap.map(range(20)))
        timer = threading.Timer(LOST_AFTER_S, made.processes["lost"].send_signal, [number])
        begin_s = time.monotonic()
        timer.start()
        results = list(nap.map(range(INPUT_COUNT)))
        taken_s = time.monotonic() - begin_s
        timer.join()
        if results != list(range(INPUT_COUNT)):
            raise BenchmarkError(f"wrong results: {results}")
        return taken_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stop", action="store_true", help="SIGSTOP instead of SIGKILL")
    parser.add_argument("--runs", type=int, default=5, help="default: 5")
    arguments = parser.parse_args()
    number = signal.SIGSTOP if arguments.stop else signal.SIGKILL
    if arguments.stop:
        ideal_s, what = LOST_AFTER_S + WORKER_DEADLINE_S, "signal and deadline"
    else:
        ideal_s, what = IDEAL_S, "ideal"
    times_s = []
    for run in range(arguments.runs):
        times_s.append(measure(number))
        print(f"run {run + 1}: {times_s[-1]:.3f} s, {times_s[-1] - ideal_s:+.3f} s")
    median_s = statistics.median(times_s)
    print(
        f"{number.name} of one of two workers at {LOST_AFTER_S:g} s of {INPUT_COUNT} inputs of "
        f"{1000 * INPUT_S:g} ms: median {median_s:.3f} s; {what} {ideal_s:g} s; "
        f"over it by {median_s - ideal_s:.3f} s"
    )


if __name__ == "__main__":
    main()
