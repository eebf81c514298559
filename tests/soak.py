"""A mixed load on real processes, with random kills of all of them; then everything is counted.

    python tests/soak.py --minutes 30              # as `make soak MINUTES=30`
    python tests/soak.py --minutes 2 --seed 7      # the same kills again, as far as time allows

Clients do one unit of work after the other: maps, spawned calls, generators, nested calls, calls
that are broken off, time limits, retries, a queue and a dict. Each checks every result and notes
it; each run of an input is noted where it runs. Meanwhile the scheduler, workers, containers and
clients are killed (SIGKILL) and stopped for a while (SIGSTOP, SIGCONT). Afterwards each input has
ended exactly once at its client with its own value and has run at least once, spawned results of
clients that died are all there, and daemons and clients have the memory, descriptors, threads,
processes and files that they had before, within the bounds below. In the second half of the time
the daemons themselves are only stopped, so that those that are looked at have lived that long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for part in ("", "scheduler", "worker"):
    sys.path.insert(0, str(ROOT / part))

from fanout.config import CLIENT_GRACE_S, CRASH_LIMIT, WORKER_DEADLINE_S  # noqa: E402
from tests.behaviour_kit import descendants_of  # noqa: E402
from tests.conftest import HandStarted, environment, is_alive, poll_until  # noqa: E402
from tests.soak_kit import UNITS, memory_bytes  # noqa: E402

SCRIPT = ROOT / "tests" / "scripts" / "soak_client.py"
WORKER_COUNT = 2
CLIENT_COUNT = 3
#: Seconds between two strikes, on average.
STRIKE_INTERVAL_S = 2.0
#: A unit of work that takes longer than this, all that strikes it included, hangs.
UNIT_S_MAX = 90.0
#: How long the rest may take when nothing is killed any more, the grace of lost clients included.
HEAL_S = CLIENT_GRACE_S + 90.0
#: How long until what idles has left: containers, receipts, blobs.
SETTLE_S = 100.0

# What may be more afterwards than before, for each daemon and each client.
MEMORY_BYTES_MAX = 16 << 20
#: Clients make and check arrays of megabytes, of which the allocator keeps now more, now less.
CLIENT_MEMORY_BYTES_MAX = 32 << 20
#: The results of spawned calls stay with the scheduler for days: bytes for each input of them.
KEPT_INPUT_BYTES = 1024
DESCRIPTORS_MAX = 3
THREADS_MAX = 1
#: From here on daemons are stopped but not killed, so that what they gather over time is seen.
SPARED_FROM = 0.5
SPARED = {("worker", "kill"), ("scheduler", "kill")}

#: What is done to whom, and how often in proportion.
STRIKES = {
    ("container", "kill"): 6,
    ("container", "stop"): 3,
    ("worker", "kill"): 2,
    ("worker", "stop"): 2,
    ("scheduler", "kill"): 2,
    ("scheduler", "stop"): 2,
    ("client", "kill"): 1,
    ("client", "stop"): 2,
}


class SoakFailed(Exception):
    """Something is not as it must be; the text says what."""


# --- what a process holds -------------------------------------------------------------------------


@dataclass
class Held:
    """What is there when nothing runs."""

    memory_bytes: dict[str, int]
    descriptors: dict[str, int]
    threads: dict[str, int]
    #: Below each daemon; and all that this soak has started, whoever is their parent now.
    #: All that are below each, those included that have ended and were not waited for.
    processes: dict[str, int]
    process_count: int
    files: Counter[str]
    shared_files: set[str]


def files_below(*folders: Path) -> Counter[str]:
    """All files, sockets and folders, without those that are there or not as the moment has it.
    Names that are drawn by lot for each daemon are one name."""
    passing = ("scheduler.db-wal", "scheduler.db-shm", "scheduler.db-journal")
    paths = [path for folder in folders for path in folder.rglob("*") if path.name not in passing]
    return Counter(re.sub(r"/fanout-\w{8}(?=/|$)", "/fanout-*", str(path)) for path in paths)


def own_shared_files() -> set[str]:
    """What of this user is in /dev/shm."""
    found = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                found.add(str(path))
    return found


def pids_with(variable: str) -> set[int]:
    """All processes that have inherited this environment variable with this value."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return set(filter(is_alive, found))


# --- the soak -------------------------------------------------------------------------------------


@dataclass
class Soak:
    """The whole of it: a cluster, clients, whoever strikes, and the count afterwards."""

    folder: Path
    seed: int
    seconds: float
    strikes: dict[tuple[str, str], int]
    units: list[str]
    interval_s: float = STRIKE_INTERVAL_S
    hold_s: float = 0.0
    say: Callable[[str], Any] = sys.stdout.write
    clients: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed: set[str] = field(default_factory=set)
    struck: Counter[str] = field(default_factory=Counter)
    client_count: int = 0
    longest_unit_s: float = 0.0
    memory_peak_bytes: int = 0
    client_growth_bytes: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.marks = self.folder / "marks"
        self.marks.mkdir()
        temporary = self.folder / "tmp"
        temporary.mkdir()
        # Daemons and clients inherit it, so what they leave in it is seen.
        os.environ["TMPDIR"] = str(temporary)
        homes = self.folder / "homes"
        homes.mkdir()
        self.cluster = HandStarted(homes)

    def run(self) -> None:
        """Everything, to the summary.

        Raises:
            SoakFailed: something is not as it must be.
        """
        try:
            self._warm_up()
            before = self._settle(None)
            self._storm()
            self._heal()
            units, inputs, crashed = self._count()
            self._collect()
            after = self._settle(before)
            self._summary(units, inputs, crashed, before, after)
        except SoakFailed as error:
            if self.hold_s:
                self.say(f"FAILED: {error}\neverything stays as it is for {self.hold_s:g} s\n")
                sys.stdout.flush()
                time.sleep(self.hold_s)
            raise
        finally:
            self._stop()

    # --- the cluster ---

    def _warm_up(self) -> None:
        """Each kind of work once, so that what is made only once is there before the first look."""
        self.cluster.start_scheduler()
        for number in range(1, WORKER_COUNT + 1):
            self.cluster.start_worker(f"w{number}", cpu=1)
        for _ in range(2):
            self._start_client("once")
        for name, process in list(self.clients.items()):
            if process.wait(UNIT_S_MAX) != 0:
                raise SoakFailed(f"client {name} failed while nothing was killed: {self.log(name)}")
            del self.clients[name]

    def _start_client(self, mode: str = "endless") -> None:
        self.client_count += 1
        name = f"c{self.client_count}"
        variables = environment(
            FANOUT_URL=self.cluster.client_join, FANOUT_HOME=str(self.cluster.folder / "none")
        )
        seed = str(self.random.randrange(1 << 30))
        with (self.folder / f"{name}.log").open("wb") as log:
            self.clients[name] = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(self.marks), name, seed, mode, *self.units],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        """The end of what a client wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def _stop(self) -> None:
        for process in self.clients.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self.cluster.stop()

    # --- the storm ---

    def _storm(self) -> None:
        end = time.monotonic() + self.seconds
        while len(self.clients) < CLIENT_COUNT:
            self._start_client()
        while time.monotonic() < end:
            self._rest(self.random.expovariate(1 / self.interval_s))
            kinds = list(self.strikes)
            if not kinds:
                continue
            kind, what = self.random.choices(kinds, list(self.strikes.values()))[0]
            is_late = time.monotonic() > end - self.seconds * (1 - SPARED_FROM)
            if not is_late or (kind, what) not in SPARED:
                self._strike(kind, what)

    def _rest(self, seconds: float) -> None:
        """Let the load go on, and look whether it does."""
        end = time.monotonic() + seconds
        while True:
            self._look_after_clients()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.5))

    def _look_after_clients(self) -> None:
        for name, process in list(self.clients.items()):
            code = process.poll()
            if code is not None and not (self.marks / "stop").exists():
                raise SoakFailed(f"client {name} ended with code {code}: {self.log(name)}")
            with contextlib.suppress(FileNotFoundError):
                age_s = time.time() - (self.marks / f"client-{name}").stat().st_mtime
                self.longest_unit_s = max(self.longest_unit_s, age_s)
                if code is None and age_s > UNIT_S_MAX:
                    raise SoakFailed(self._hang(name, process, age_s))
        with contextlib.suppress(OSError):
            assert self.cluster.scheduler is not None
            now = memory_bytes(self.cluster.scheduler.pid)
            self.memory_peak_bytes = max(self.memory_peak_bytes, now)

    def _hang(self, name: str, process: subprocess.Popen[bytes], age_s: float) -> str:
        """What is known of a unit that does not end."""
        process.send_signal(signal.SIGUSR1)
        for pid in self._container_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        last = (self.marks / f"client-{name}").read_text().splitlines()[-1]
        status = self.cluster.status()
        status["calls"] = [call for call in status["calls"] if call["state"] != "over"]
        stacks = [path.read_text() for path in self.marks.glob("stack-*")]
        return (
            f"client {name} has been at {last} for {age_s:.0f} s\n{self.log(name)}\n"
            f"its containers:\n{'---'.join(filter(None, stacks))}\n"
            f"{json.dumps(status, indent=1)[:20_000]}"
        )

    def _strike(self, kind: str, what: str) -> None:
        victim = self._victim(kind)
        if victim is None:
            return
        pid, name = victim
        self.struck[f"{kind}, {what}"] += 1
        if what == "stop":
            self._stop_for_a_while(kind, pid)
        elif kind == "container":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif kind == "scheduler":
            assert self.cluster.scheduler is not None
            self._kill(self.cluster.scheduler)
            self.cluster.start_scheduler()
        elif kind == "worker":
            self._kill(self.cluster.workers.pop(name))
            self.cluster.start_worker(name, cpu=1)
        else:
            self._kill(self.clients.pop(name))
            self.killed.add(name)
            self._start_client()

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        if process in self.cluster.processes:
            self.cluster.processes.remove(process)

    def _stop_for_a_while(self, kind: str, pid: int) -> None:
        seconds = self.random.uniform(0.1, 3.0)
        if kind == "worker" and self.random.random() < 0.2 and self.seconds > 60:
            seconds = WORKER_DEADLINE_S + 2
            self.struck["worker, stop past its deadline"] += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        try:
            self._rest(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _victim(self, kind: str) -> tuple[int, str] | None:
        """The pid and the name of somebody of this kind. All are processes of this soak."""
        if kind == "scheduler":
            assert self.cluster.scheduler is not None
            return self.cluster.scheduler.pid, ""
        if kind == "container":
            pids = self._container_pids()
            return (self.random.choice(pids), "") if pids else None
        processes = self.cluster.workers if kind == "worker" else self.clients
        name = self.random.choice(sorted(processes))
        return processes[name].pid, name

    def _container_pids(self) -> list[int]:
        """Those that have run something."""
        ours = set().union(*(descendants_of(w.pid) for w in self.cluster.workers.values()))
        return sorted(ours & {int(path.name[5:]) for path in self.marks.glob("runs-*")})

    # --- afterwards ---

    def _heal(self) -> None:
        """Nothing is killed any more, so all that was begun must come to its end."""
        (self.marks / "stop").touch()
        end = time.monotonic() + HEAL_S
        while any(process.poll() is None for process in self.clients.values()):
            self._rest(0.1)
            if time.monotonic() > end:
                left = [name for name, p in self.clients.items() if p.poll() is None]
                raise SoakFailed(self._hang(left[0], self.clients[left[0]], HEAL_S))
        for name, process in self.clients.items():
            if process.returncode != 0:
                raise SoakFailed(f"client {name} failed: {self.log(name)}")
        poll_until(lambda: self.cluster.open_call_count() == 0, self._open_calls, HEAL_S)

    def _open_calls(self) -> str:
        calls = [call for call in self.cluster.status()["calls"] if call["state"] != "over"]
        return f"these calls end: {json.dumps(calls, indent=1)}"

    def _journal(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self.marks.glob("client-*")):
            for line in path.read_text().splitlines():
                yield path.name[7:], json.loads(line)

    def _count(self) -> tuple[Counter[str], int, int]:
        """Compare what clients got with what ran."""
        runs = self._runs()
        units: Counter[str] = Counter()
        inputs = crashed = 0
        for name, entry in self._journal():
            if "wrong" in entry:
                raise SoakFailed(f"client {name}: {entry['wrong']}: {entry['text']}")
            if "done" not in entry:
                continue
            units[entry["done"]] += 1
            inputs += entry["inputs"]
            crashed += len(entry["crashed"])
            for index in range(entry["inputs"]):
                if not runs[entry["token"], index]:
                    raise SoakFailed(f"input {index} of {entry} has a result and never ran")
            for index in entry["crashed"]:
                if index >= 0 and runs[entry["token"], index] < CRASH_LIMIT:
                    raise SoakFailed(f"input {index} of {entry} ended before its third crash")
        self._check_clients()
        self.run_count = runs.total()
        self.ran_twice_count = sum(count > 1 for count in runs.values())
        return units, inputs, crashed

    def _check_clients(self) -> None:
        """Each client that lived to its end has what it had after its first units of work."""
        bounds = {
            "memory_bytes": CLIENT_MEMORY_BYTES_MAX,
            "descriptors": DESCRIPTORS_MAX,
            "threads": THREADS_MAX,
        }
        held: dict[str, list[dict[str, int]]] = {}
        for name, entry in self._journal():
            if "held" in entry:
                held.setdefault(name, []).append(entry["held"])
        for name, found in held.items():
            for what, bound in bounds.items():
                grown = found[-1][what] - found[0][what]
                if grown > bound:
                    raise SoakFailed(f"{what} of client {name} grew by {grown}, bound {bound}")
            grown = found[-1]["memory_bytes"] - found[0]["memory_bytes"]
            self.client_growth_bytes = max(self.client_growth_bytes, grown)

    def _runs(self) -> Counter[tuple[str, int]]:
        """How often each input ran, as it noted itself."""
        runs: Counter[tuple[str, int]] = Counter()
        for path in self.marks.glob("runs-*"):
            for row in path.read_text().splitlines():
                token, index = row.split()
                runs[token, int(index)] += 1
        return runs

    def _collect(self) -> None:
        """All spawned calls have all their results, also those of clients that were killed."""
        spawned = [line for _, line in self._journal() if "spawned" in line]
        (self.folder / "spawned.json").write_text(json.dumps(spawned))
        code = f"from tests.soak import collect; collect({str(self.folder / 'spawned.json')!r})"
        done = self.cluster.python("-c", code, timeout_s=60 + len(spawned) / 20)
        if done.returncode != 0:
            raise SoakFailed(f"spawned results are not all there: {done.stdout}{done.stderr}")
        self.spawned_count = sum(line["inputs"] for line in spawned)

    def _settle(self, before: Held | None) -> Held:
        """What is held when nothing runs; waits until it is no more than before."""
        found: list[Held] = []

        def is_back() -> bool:
            time.sleep(0.2)
            held = self._held()
            found[:] = [held]
            return self._containers() == 0 if before is None else not self._excess(before, held)

        def describe() -> str:
            return "afterwards there is more than before: " + "; ".join(
                self._excess(before, found[0]) if before else ["containers have not left"]
            )

        try:
            poll_until(is_back, describe, SETTLE_S)
        except AssertionError as error:
            raise SoakFailed(str(error)) from None
        return found[0]

    def _containers(self) -> int:
        return len(self.cluster.status()["containers"])

    def _daemons(self) -> dict[str, int]:
        assert self.cluster.scheduler is not None
        pids = {name: process.pid for name, process in self.cluster.workers.items()}
        return {"scheduler": self.cluster.scheduler.pid, **pids}

    def _held(self) -> Held:
        pids = self._daemons()
        return Held(
            {name: memory_bytes(pid) for name, pid in pids.items()},
            {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()},
            {name: len(os.listdir(f"/proc/{pid}/task")) for name, pid in pids.items()},
            {name: len(descendants_of(pid)) for name, pid in pids.items()},
            len(pids_with(f"TMPDIR={self.folder / 'tmp'}")),
            files_below(self.cluster.folder, self.folder / "tmp"),
            own_shared_files(),
        )

    def _excess(self, before: Held, after: Held) -> list[str]:
        """What is more than before by more than it may be."""
        wrong = []
        for name in after.processes:
            kept = getattr(self, "spawned_count", 0) * KEPT_INPUT_BYTES
            bounds = {
                "memory_bytes": MEMORY_BYTES_MAX + (kept if name == "scheduler" else 0),
                "descriptors": DESCRIPTORS_MAX,
                "threads": THREADS_MAX,
                "processes": 0,
            }
            for what, bound in bounds.items():
                old, new = getattr(before, what)[name], getattr(after, what)[name]
                if new > old + bound:
                    wrong.append(f"{what} of {name}: {old} before, {new} after, bound {bound}")
        if after.process_count > before.process_count:
            wrong.append(f"processes: {before.process_count} before, {after.process_count} after")
        if new_files := after.files - before.files:
            wrong.append(f"files: {sorted(new_files)[:20]}")
        if new_shared := after.shared_files - before.shared_files:
            wrong.append(f"shared memory: {sorted(new_shared)[:20]}")
        return wrong

    # --- the summary ---

    def _summary(
        self, units: Counter[str], inputs: int, crashed: int, before: Held, after: Held
    ) -> None:
        rows: list[tuple[str, str]] = [("seed", str(self.seed))]
        rows += [(f"units of work: {name}", str(count)) for name, count in sorted(units.items())]
        rows += [(f"strikes: {name}", str(count)) for name, count in sorted(self.struck.items())]
        rows += [
            ("clients that were killed", str(len(self.killed))),
            ("inputs with their own result, each once", str(inputs - crashed)),
            ("inputs that ended because containers died of them three times", str(crashed)),
            ("runs of inputs", str(self.run_count)),
            ("inputs that ran more than once", str(self.ran_twice_count)),
            ("spawned inputs, collected afterwards", str(self.spawned_count)),
            ("longest unit, s", f"{self.longest_unit_s:.1f}"),
            (
                "memory that a client gained at most, MiB",
                f"{self.client_growth_bytes / (1 << 20):.1f}",
            ),
            ("memory of the scheduler at most, MiB", f"{self.memory_peak_bytes / (1 << 20):.1f}"),
        ]
        for name in after.processes:
            rows += [
                (
                    f"{name}: memory before and after, MiB",
                    ", ".join(mebibytes(held.memory_bytes[name]) for held in (before, after)),
                ),
                (
                    f"{name}: descriptors, threads, processes before and after",
                    f"{before.descriptors[name]}, {before.threads[name]}, {before.processes[name]};"
                    f" {after.descriptors[name]}, {after.threads[name]}, {after.processes[name]}",
                ),
            ]
        width = max(len(name) for name, _ in rows)
        self.say("".join(f"{name:{width}}  {value}\n" for name, value in rows))


def mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f}"


def collect(path: str) -> None:
    """Read all results of these calls, in a client that knows nothing but their ids."""
    import fanout
    from fanout.exceptions import ContainerCrashedError

    for line in json.loads(Path(path).read_text()):
        call = fanout.FunctionCall.from_id(line["spawned"])
        for position in range(line["inputs"]):
            try:
                got = call.get(timeout=60, index=position)
            except ContainerCrashedError:
                continue
            if tuple(got) != (line["token"], line["start"] + position):
                raise SoakFailed(f"{line}, position {position}: {got!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--interval", type=float, default=STRIKE_INTERVAL_S, help="seconds between two strikes"
    )
    parser.add_argument("--units", nargs="+", default=list(UNITS), help="kinds of work")
    parser.add_argument(
        "--strikes", nargs="*", default=[f"{kind}:{what}" for kind, what in STRIKES]
    )
    parser.add_argument(
        "--hold", type=float, default=0.0, help="seconds for a look at what runs after a failure"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 20) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="fanout-soak-"))
    sys.stdout.write(f"seed {seed}, {options.minutes:g} minutes, in {folder}\n")
    is_good = False
    try:
        strikes = {key: n for key, n in STRIKES.items() if ":".join(key) in options.strikes}
        seconds, interval_s, hold_s = options.minutes * 60, options.interval, options.hold
        Soak(folder, seed, seconds, strikes, options.units, interval_s, hold_s).run()
        is_good = True
    except SoakFailed as error:
        sys.stdout.write(f"FAILED: {error}\n")
    finally:
        if is_good and not options.keep:
            shutil.rmtree(folder)
        else:
            sys.stdout.write(f"logs and journals are in {folder}; the seed was {seed}\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
