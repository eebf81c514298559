"""How long it takes from `python script.py` to its first result, and where the time goes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import ROOT, BenchmarkError, cluster_home, stop_cluster, variables

SCRIPT = ROOT / "benchmarks" / "first_result.py"
IMPORT = (
    "import time; start = time.perf_counter(); import fanout; fanout.App;"
    "print(time.perf_counter() - start)"
)


@dataclass
class Start:
    """Medians, in seconds: to the first result, and each stage by name."""

    first_result_s: float
    stages: dict[str, float]


def run_python(arguments: list[str], home: Path) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        env=variables(home),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if result.returncode:
        raise BenchmarkError(f"python {' '.join(arguments)} failed:\n{result.stderr}")
    return result.stdout


def stages_once(home: Path) -> dict[str, float]:
    """Seconds of each stage of one run."""
    begin = time.time()
    times = json.loads(run_python([str(SCRIPT)], home))
    stages, before = {}, begin
    for name, end in times.items():
        stages[name] = end - before
        before = end
    return stages


def median_start(runs: list[dict[str, float]]) -> Start:
    until_first = ("interpreter", "import fanout", "app.run()", "first remote()")
    return Start(
        first_result_s=statistics.median(sum(run[name] for name in until_first) for run in runs),
        stages={name: statistics.median(run[name] for run in runs) for name in runs[0]},
    )


def measure_starts(cold_count: int, warm_count: int) -> tuple[Start, Start]:
    """(cold, warm): with no daemon there, and with daemons that have a warm template."""
    with cluster_home() as home:
        cold = []
        for _ in range(cold_count):
            stop_cluster(home)
            cold.append(stages_once(home))
        warm = [stages_once(home) for _ in range(warm_count)]
    return median_start(cold), median_start(warm)


def measure_import_s(count: int) -> float:
    """Median seconds of `import fanout` in a fresh interpreter."""
    with cluster_home() as home:
        return statistics.median(float(run_python(["-c", IMPORT], home)) for _ in range(count))
