"""Seeded simulation of a whole fanout: storm, heal, then everything must have ended exactly once.

    python tests/simulation.py                       # as `make sim`: until 10 million events
    python tests/simulation.py --seeds 500           # `make sim SEEDS=500`: seeds 1 to 500
    python tests/simulation.py --seeds 1000-1999     # `make sim SEEDS=1000-1999`
    python tests/simulation.py --seed 7              # replay one seed; -v tells all that happened

Each seed draws its own fault rates, so one run is a gentle network and another a storm of
partitions. During the storm there are: cuts, half-open links, stalls, slow readers, stopped
schedulers and workers (past their deadlines, so that inputs run twice), killed schedulers
(everything that was not stored is lost, also between commit and acknowledgement), killed workers
and containers, containers that cannot start, a full disk, paused consumers, lost clients, cancelled
calls, frames that are said again and frames about what is another's. Then faults end, and within a
bound of virtual time every call must finish, each input must have ended exactly once with its own
value, items in order and none missing, two calls must share a container fairly, and everybody must
be back at the baseline: no lease, every core and permit free, all credit back, no call but the
finished spawned ones, no large value but those of their results.

What is checked all along is in `sim_promises.py` and `sim_peers.py`. A full run fails too if one of
the faults, or one of the late, duplicate and unknown messages that the cores put up with, never
came up (`sim_expected.py`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("", "scheduler", "worker"):
    sys.path.insert(0, str(ROOT / folder))

from tests.sim_expected import EXPECTED  # noqa: E402
from tests.sim_storm import Storm  # noqa: E402
from tests.sim_story import Broken  # noqa: E402

EVENTS_DEFAULT = 10_000_000
STORM_S = 60.0
#: Virtual time after the storm in which everything must have ended. Long enough for a client's
#: grace, a worker's deadline and the retries of what a full disk refused.
HEAL_S = 600.0
#: Lines of a story that are printed, the last ones.
LINES_MAX = 200

Result = tuple[int, Counter[str], str]


def run_seed(seed: int, is_told: bool = False, tells_all: bool = False) -> Result:
    """One storm. Returns events, counts and what failed ("" if nothing); if it `is_told`, with
    the story of the input concerned, or if it `tells_all` of everything."""
    world = Storm(seed, is_told)
    try:
        world.schedule_faults(world.now + STORM_S)
        world.run_until(world.now + STORM_S)
        world.heal()
        healed_at = world.now
        world.run_until(world.now + HEAL_S, world.is_quiet)
        world.counts["longest healing in s"] = round(world.now - healed_at)
        world.verify()
    except Exception as error:
        call_id, index = b"", -1
        if isinstance(error, Broken):
            call_id, index = error.call_id, error.index
        if tells_all:
            call_id, index = b"", -1
        lines = world.story.lines(call_id, index) if is_told else []
        if not tells_all:
            lines = lines[-(LINES_MAX if call_id else LINES_MAX // 4) :]
        title = f"the story of call {call_id.hex()[:6]}" if call_id else "the story"
        title += f", input {index}" if index >= 0 else ""
        lines = [f"--- {title}", *lines, "---"] if lines else []
        failure = "\n".join([*lines, traceback.format_exc().rstrip()])
        return world.event_count, world.counts, failure
    if tells_all:
        sys.stdout.write("\n".join(world.story.lines()) + "\n")
    return world.event_count, world.counts, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--seeds", help="so many, or from-to, instead of counting events")
    parser.add_argument("--events", type=int, default=EVENTS_DEFAULT)
    parser.add_argument("-v", "--verbose", action="store_true", help="tell all of the one seed")
    parser.add_argument("--brief", action="store_true", help="of a failure, no story")
    options = parser.parse_args()
    if options.seed is not None:
        events, counts, failure = run_seed(options.seed, True, options.verbose)
        if failure:
            sys.stdout.write(failure + "\n")
        report(events, counts, 1)
        return bool(failure)
    if options.seeds is None:
        return run_many(1, None, options.events, options.brief)
    first, _, last = options.seeds.rpartition("-")
    try:
        return run_many(int(first or 1), int(last), 0, options.brief)
    except ValueError:
        parser.error(f"--seeds is {options.seeds!r}; it is a number, or a range like 1000-1999")


def run_many(first: int, last: int | None, events_wanted: int, is_brief: bool) -> int:
    """Seeds from `first` on, up to `last` or until there were so many events."""
    events, done, next_seed = 0, 0, first
    counts: Counter[str] = Counter()
    started = time.monotonic()
    processes = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        pending: dict[Future[Result], int] = {}
        while True:
            while len(pending) < 2 * processes and (
                events < events_wanted if last is None else next_seed <= last
            ):
                pending[pool.submit(run_seed, next_seed)] = next_seed
                next_seed += 1
            if not pending:
                break
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                seed = pending.pop(future)
                seed_events, seed_counts, failure = future.result()
                events += seed_events
                done += 1
                add_counts(counts, seed_counts)
                if failure:
                    pool.shutdown(cancel_futures=True)
                    # The same seed does the same: run it again, now with its story.
                    failure = failure if is_brief else run_seed(seed, True)[2]
                    tell_failure(failure, seed, seed_events, events)
                    return 1
    report(events, counts, done)
    sys.stdout.write(f"{time.monotonic() - started:.1f} s on {processes} cores\n")
    never = never_came_up(counts) if events >= EVENTS_DEFAULT and last is None else []
    if never:
        sys.stdout.write("this never came up:\n  " + "\n  ".join(never) + "\n")
    return bool(never)


def never_came_up(counts: Counter[str]) -> list[str]:
    return [name for name in EXPECTED if not counts[name]]


def add_counts(counts: Counter[str], more: Counter[str]) -> None:
    for name, count in more.items():
        is_maximum = name.startswith("longest")
        counts[name] = max(counts[name], count) if is_maximum else counts[name] + count


def tell_failure(failure: str, seed: int, seed_events: int, events: int) -> None:
    sys.stdout.write(failure + "\n")
    sys.stdout.write(
        f"seed {seed} failed after {seed_events} events of its own, {events} in all; "
        "replay it with\n"
        f"    {sys.executable} tests/simulation.py --seed {seed}\n"
    )


def report(events: int, counts: Counter[str], seeds: int) -> None:
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{count:10}  {name}\n")
    sys.stdout.write(f"{events} events over {seeds} seeds\n")


if __name__ == "__main__":
    sys.exit(main())
