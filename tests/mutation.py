"""Change the scheduler's core at random and count the changes that its tests notice.

    python tests/mutation.py                       # as `make mutation`
    python tests/mutation.py --sample 1000 --seed 7
    python tests/mutation.py --only 'fanout_scheduler.core.graph.*'

mutmut makes the mutants and runs the tests, each mutant in a process forked from one that has
imported everything: the tests of the core that reach the mutated function, then a few short storms
of the simulation. All mutants take hours, so that a sample of them is drawn, from a seed.

mutmut wants the package in the root of what it works on, so it works on a copy. The same copy can
be used again (`--folder`): only what has changed since then is made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fanout", "scheduler/fanout_scheduler", "worker/fanout_worker", "tests")
TESTS = ("test_core*.py", "test_object_*.py", "test_queue_core.py", "test_progress.py")
STORMS = "mutation_seeds.py"
#: 95 % of samples are within so many standard errors.
CONFIDENCE_Z = 1.96
KILLED = {"killed", "timeout", "segfault"}

SETTINGS = """\
[tool.mutmut]
source_paths = ["fanout_scheduler"]
only_mutate = ["fanout_scheduler/core/*"]
also_copy = ["fanout", "fanout_worker"]
pytest_add_cli_args = ["--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:asyncio"]
pytest_add_cli_args_test_selection = [{tests}]
use_git_change_detection = false
track_dependencies = false
timeout_multiplier = 3.0
timeout_constant = 2.0
"""
#: In place of the conftest.py that starts daemons and looks for what they leave behind.
CONFTEST = (
    "from tests.mutation_seeds import pytest_collection_modifyitems as _order  # noqa: F401\n"
)


def lay_out(folder: Path, has_storms: bool) -> None:
    """Copy what is needed into `folder`; files that are the same stay as they are."""
    for name in PACKAGES:
        for source in (ROOT / name).rglob("*.py"):
            target = folder / Path(name).name / source.relative_to(ROOT / name)
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    (folder / "tests" / "conftest.py").write_text(CONFTEST)
    patterns = (*TESTS, STORMS) if has_storms else TESTS
    tests = [path for pattern in patterns for path in sorted((folder / "tests").glob(pattern))]
    names = ", ".join(f'"tests/{path.name}"' for path in tests)
    (folder / "pyproject.toml").write_text(SETTINGS.format(tests=names))


def mutmut(folder: Path, *arguments: str) -> str:
    """Run it in `folder`, one child at a time and behind everybody else."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.nice(19),
    )
    if done.returncode:
        sys.exit(f"mutmut {arguments[0]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def results_of(folder: Path) -> dict[str, int | None]:
    """How the tests ended for each mutant; None where they have not run."""
    found: dict[str, int | None] = {}
    for path in sorted((folder / "mutants" / "fanout_scheduler" / "core").glob("*.meta")):
        found.update(json.loads(path.read_text())["exit_code_by_key"])
    return found


def interval_of(killed: int, count: int) -> tuple[float, float]:
    """Between what the rate of all mutants is, by Wilson, with a confidence of 95 %."""
    rate, z = killed / count, CONFIDENCE_Z
    middle = rate + z * z / (2 * count)
    reach = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - reach) / scale, (middle + reach) / scale


def status_of(exit_code: int | None) -> str:
    from mutmut.stats import status_by_exit_code

    return str(status_by_exit_code[exit_code])


def diff_of(folder: Path, name: str) -> str:
    """What the mutant changes."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    path = Path(*name.split(".")[:3]).with_suffix(".py")
    with contextlib.chdir(folder):
        lines = get_diff_for_mutant(name, path=path).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def report(folder: Path, sample: list[str], population: int, seed: int) -> int:
    results = results_of(folder)
    statuses = {name: status_of(results[name]) for name in sample}
    killed = sum(status in KILLED for status in statuses.values())
    by_file: dict[str, Counter[bool]] = {}
    for name, status in statuses.items():
        by_file.setdefault(name.split(".")[2], Counter())[status in KILLED] += 1
    for name in sample:
        if statuses[name] not in KILLED:
            sys.stdout.write(f"# {name}: {statuses[name]}\n{diff_of(folder, name)}\n\n")
    for file, counts in sorted(by_file.items()):
        sys.stdout.write(f"{counts[True]:5} of {sum(counts.values()):4}  {file}.py\n")
    for status, count in Counter(statuses.values()).most_common():
        sys.stdout.write(f"{count:5} {status}\n")
    low, high = interval_of(killed, len(sample))
    sys.stdout.write(
        f"seed {seed}: {killed} of {len(sample)} mutants killed, {killed / len(sample):.1%} "
        f"(95 % confidence: {low:.1%} to {high:.1%}), of {population} mutants of the core\n"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=400, help="how many mutants; 0: all of them")
    parser.add_argument("--seed", type=int, default=1, help="which of them")
    parser.add_argument("--only", action="append", help="names or patterns, in place of a sample")
    parser.add_argument("--without-storms", action="store_true", help="the tests of the core alone")
    parser.add_argument("--folder", type=Path, help="where to work, to go on from there later")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fanout-mutation-"))
    try:
        lay_out(folder, not options.without_storms)
        # Names of mutants are known when they have been made; one has to run for that.
        mutmut(folder, "run", "--max-children", "1", "fanout_scheduler.core.scaling.*_1")
        everything = sorted(results_of(folder))
        sample = choose(everything, options.only, options.sample, options.seed)
        mutmut(folder, "run", "--max-children", "1", *sample)
        return report(folder, sample, len(everything), options.seed)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def choose(everything: list[str], only: list[str] | None, size: int, seed: int) -> list[str]:
    from fnmatch import fnmatchcase

    if only:
        return [name for name in everything if any(fnmatchcase(name, wanted) for wanted in only)]
    if not size or size >= len(everything):
        return everything
    return sorted(random.Random(seed).sample(everything, size))


if __name__ == "__main__":
    sys.exit(main())
