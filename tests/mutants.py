"""Mistakes planted one at a time: does the simulation see them?

    python tests/mutants.py             # as `make mutants`: all of them
    python tests/mutants.py skip tail   # those whose name has one of these words

Each mutant is a replacement of text that must match exactly once, in a copy of the tree; so one
that no longer fits the code fails the run and has to be written anew. The simulation runs a bounded
number of seeds over it. One that it does not see fails the run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fanout", "scheduler", "worker", "tests")
CORE = "scheduler/fanout_scheduler/core/"
CLIENT = "fanout/client/"
WORKER = "worker/fanout_worker/"
#: Seeds that the simulation is given to see a mutant, and seconds: one may hang it.
SEEDS = 120
SEED_LIMIT_S = 600.0
#: Seeds in which it has to see nothing while nothing is planted.
CONTROL_SEEDS = 4


@dataclass
class Mutant:
    name: str
    path: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "attempt ignored: a failure of a past attempt counts",
        CORE + "outputs.py",
        '        state.note("failure under a void lease")\n        return False\n',
        '        state.note("failure under a void lease")\n',
    ),
    Mutant(
        "attempt ignored: attempts are not counted",
        CORE + "outputs.py",
        "failed = call.attempts.get(index, 0) + 1",
        "failed = 1",
    ),
    Mutant(
        "epoch ignored",
        CORE + "state.py",
        "return self.epoch << m.EPOCH_SHIFT | self.next_number()",
        "return self.next_number()",
    ),
    Mutant(
        "acknowledged before stored: an output, to its worker",
        CORE + "durable.py",
        "return store_sequence not in state.unsafe_stores",
        "return True",
    ),
    Mutant(
        "acknowledged before stored: an output that came before",
        CORE + "outputs.py",
        "waits += durable.stores_of(call, start, stop)",
        "pass",
    ),
    Mutant(
        "acknowledged before stored: a spawn, to its client",
        CORE + "durable.py",
        "lambda: _store(state, call, [message]))\n\n\ndef store_outputs",
        "lambda: _store(state, call, [message]))\n    call.sealed_count = message.count\n"
        "    tell_stored(state, call, [])\n\n\ndef store_outputs",
    ),
    Mutant(
        "an old deadline used: of a client's grace",
        CORE + "calls.py",
        "if session.peer_id is None and session.lost_at + CLIENT_GRACE_S <= state.now:",
        "if session.peer_id is None:",
    ),
    Mutant(
        "an old deadline used: of a worker",
        CORE + "workers.py",
        "if worker.heard_at + WORKER_DEADLINE_S > state.now:",
        "if False:",
    ),
    Mutant(
        "slot not returned on cancel",
        CORE + "outputs.py",
        '        state.note("output of an ended call")\n        if lease is not None:\n',
        '        state.note("output of an ended call")\n        if False:\n',
    ),
    Mutant(
        "credit lost on a dropped duplicate",
        CLIENT + "call_state.py",
        "self.duplicate_count += count - sum(high - low for low, high in gaps)",
        "self._consumed_count -= count - sum(high - low for low, high in gaps)",
    ),
    Mutant(
        "credit doubled after reconnect",
        CLIENT + "call_state.py",
        "_on_opened(self, message: m.CallOpened) -> None:\n"
        "        self._set_window(message.window_count,",
        "_on_opened(self, message: m.CallOpened) -> None:\n"
        "        self._set_window(message.window_count * (1 + self.is_resuming),",
    ),
    Mutant(
        "tail split off by one: an input too few comes back",
        CORE + "leasing.py",
        "ranges = lease.open.common(message.stop, lease.stop)",
        "ranges = lease.open.common(message.stop + 1, lease.stop)",
    ),
    Mutant(
        "tail split off by one: an input too many comes back",
        CORE + "leasing.py",
        "ranges = lease.open.common(message.stop, lease.stop)",
        "ranges = lease.open.common(max(0, message.stop - 1), lease.stop)",
    ),
    Mutant(
        "skip count off by one: an item too many",
        CORE + "leasing.py",
        "skip=generator.next_number if generator else 0",
        "skip=generator.next_number + (generator.next_number > 0) if generator else 0",
    ),
    Mutant(
        "skip count off by one: an item too few",
        CORE + "leasing.py",
        "skip=generator.next_number if generator else 0",
        "skip=max(0, generator.next_number - 1) if generator else 0",
    ),
    Mutant(
        "grace not stopped by reconnect",
        CORE + "calls.py",
        "if session.peer_id is None and session.lost_at + CLIENT_GRACE_S <= state.now:",
        "if session.lost_at + CLIENT_GRACE_S <= state.now:",
    ),
    Mutant(
        "fairness pointer frozen: the clock of service",
        CORE + "placement.py",
        "state.service_clock_s = max(state.service_clock_s, taken[1])",
        "state.service_clock_s = 0.0",
    ),
    Mutant(
        "fairness pointer frozen: what a call got",
        CORE + "outputs.py",
        "lease.call.service_s += busy_s",
        "lease.call.service_s += 0.0",
    ),
    Mutant(
        "void lease not fenced",
        CORE + "workers.py",
        "            state.send(peer.peer_id, m.CancelLease(lease_id))",
        "            pass",
    ),
    Mutant(
        "permit leaked on failed start",
        CORE + "workers.py",
        "    container.function.containers.pop(container.container_id, None)",
        '    if container.state != "starting":\n'
        "        container.function.containers.pop(container.container_id, None)",
    ),
    Mutant(
        "large value: not asked for again after its connection was lost",
        CORE + "calls.py",
        "        if call.parked:\n            present =",
        "        if False:\n            present =",
    ),
    Mutant(
        "large value: a report that names it is sent ahead of it",
        WORKER + "worker_state.py",
        "if report.blobs and any(blob_id not in self._delivered for blob_id in report.blobs):",
        "if False:",
    ),
    Mutant(
        "large value: kept from an earlier connection",
        WORKER + "worker_state.py",
        "        forgotten, self._sent_here = self._sent_here, set()\n",
        "        forgotten: set[bytes] = set()\n",
    ),
    Mutant(
        "large value: kept though nobody has named it",
        CORE + "core.py",
        "        blobs.end_claims(state, worker, ids)\n",
        "",
    ),
    Mutant(
        "large value: kept by a client whose spawn failed",
        CLIENT + "call_state.py",
        "        if self.is_durable:\n            self._drop_inputs()\n            return\n",
        "        if self.is_durable:\n            return\n",
    ),
]


def main(words: list[str]) -> int:
    chosen = [each for each in MUTANTS if not words or any(word in each.name for word in words)]
    if not chosen:
        sys.stdout.write(f"no mutant is named like any of {words}\n")
        return 1
    wrong = [text for mutant in MUTANTS if (text := misfit(mutant))]
    if wrong:
        sys.stdout.write("\n".join(wrong) + "\n")
        return 1
    survivors = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fanout-mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        if seen := ask_simulation(tree, CONTROL_SEEDS):
            sys.stdout.write(f"the simulation fails with nothing planted: {seen}\n")
            return 1
        for mutant in chosen:
            caught = try_mutant(tree, mutant)
            sys.stdout.write(f"{mutant.name:58} {caught or 'SURVIVED'}\n")
            sys.stdout.flush()
            if not caught:
                survivors.append(mutant.name)
    took_s = time.monotonic() - started
    sys.stdout.write(f"{len(chosen) - len(survivors)} of {len(chosen)} caught, {took_s:.0f} s\n")
    return bool(survivors)


def misfit(mutant: Mutant) -> str:
    """Why a mutant cannot be planted, "" if it can."""
    count = (ROOT / mutant.path).read_text().count(mutant.old)
    if count == 1:
        return ""
    return f"{mutant.name}: its text is {count} times in {mutant.path}, and must be there once"


def copy_tree(tree: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)


def try_mutant(tree: Path, mutant: Mutant) -> str:
    """Plant it, see what catches it, and take it out. Returns what, "" if nothing did."""
    path = tree / mutant.path
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return ask_simulation(tree)
    finally:
        path.write_text(text)


def ask_simulation(tree: Path, seeds: int = SEEDS) -> str:
    command = [sys.executable, "tests/simulation.py", "--seeds", str(seeds), "--brief"]
    try:
        done = subprocess.run(
            command, cwd=tree, capture_output=True, text=True, timeout=SEED_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        sys.stdout.write(f"(undecided: {seeds} seeds took more than {SEED_LIMIT_S:g} s)\n")
        return ""
    if done.returncode == 0:
        return ""
    failed = re.search(r"^seed (\d+) failed after .* own, (\d+) in all", done.stdout, re.M)
    if failed is None:
        return "the simulation: it cannot run at all: " + done.stderr.strip()[-200:]
    causes = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Broken|Exception)\b.*)$", done.stdout, re.M)
    cause = causes[-1] if causes else "?"
    return f"seed {failed[1]:>3} after {int(failed[2]):>9,} events: {cause[:110]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
