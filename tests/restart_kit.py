"""What the tests of restarts run in containers, and how they kill the scheduler in mid-work."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import fanout
from tests.behaviour_kit import shared_out_bytes, wait_for_file
from tests.conftest import HandStarted, is_alive, poll_until

app = fanout.App("restart")

FULL = os.environ.get("FANOUT_TEST_FULL") == "1"


# --- functions ------------------------------------------------------------------------------------
# Each says which process it ran in, because workers are to keep their containers.


@app.function()
def same(x: int, load: bytes = b"") -> tuple[int, int, bytes]:
    return x, os.getpid(), load


@app.function()
def same_after(x: int, seconds: float) -> tuple[int, int, bytes]:
    time.sleep(seconds)
    return x, os.getpid(), b""


@app.function()
def odd_ones_wait(x: int, path: str) -> int:
    if x % 2:
        wait_for_file(path)
    return x


@app.function()
def items(n: int, size: int) -> Iterator[tuple[int, int, bytes]]:
    pid = os.getpid()
    for number in range(n):
        yield number, pid, bytes(size)


@app.function()
def plus_one(x: int) -> int:
    return x + 1


@app.function(retries=fanout.Retries(2, initial_delay=0))
def nested_and_failing(x: int, folder: str) -> tuple[int, int, bytes]:
    """Makes two calls; every third input raises the first time, between the calls."""
    value = plus_one.remote(x)
    if x % 3 == 0:
        try:
            Path(folder, f"failed-{x}").mkdir()
        except FileExistsError:
            pass
        else:
            raise RuntimeError(f"input {x} fails on purpose, once")
    total = sum(plus_one.map([value, value]))
    return total // 2 - 2, os.getpid(), b""


@app.function()
def unique() -> str:
    """Another value each time it runs."""
    return os.urandom(8).hex()


@app.function()
def size_of(data: bytes) -> int:
    return len(data)


@app.function()
def random_bytes(size: int, runs: str) -> bytes:
    """Not to be compressed; each run leaves a line in the file `runs`."""
    with Path(runs).open("a") as file:
        file.write("run\n")
    return os.urandom(size)


@app.function()
def sealed(x: int, size: int) -> bytes:
    return seal(x, size)


@app.function()
def sealed_items(n: int, size: int) -> Iterator[bytes]:
    for number in range(n):
        yield seal(number, size)


def seal(x: int, size: int) -> bytes:
    """A number and random bytes behind their digest: other ones in each run, whatever the number,
    so that pieces of two runs do not make a whole."""
    content = x.to_bytes(4, "big") + os.urandom(size - 36)
    return hashlib.sha256(content).digest() + content


def unseal(data: bytes, size: int) -> int:
    """The number in what `seal` made.

    Raises:
        AssertionError: it is not as it was made.
    """
    assert len(data) == size
    assert hashlib.sha256(data[32:]).digest() == data[:32]
    return int.from_bytes(data[32:36], "big")


@app.function()
def bytes_when_open(x: int, size: int, gate: str) -> bytes:
    wait_for_file(gate)
    return bytes([x]) * size


# --- killing --------------------------------------------------------------------------------------


def kill_scheduler(cluster: HandStarted) -> None:
    """End the scheduler by SIGKILL, and wait until it is gone."""
    assert cluster.scheduler is not None
    cluster.scheduler.kill()
    cluster.scheduler.wait()


@dataclass
class Ride:
    """Takes the results of one call to their end while the scheduler is killed again and again.

    Args:
        cluster: whose scheduler is killed, and started again.
        count: of the results; they must be (0, pid, load), (1, pid, load) and so on.
        seed: of the points at which it is killed, between 10 % and 90 % of the results.
        kills: how many points.
    """

    cluster: HandStarted
    count: int
    seed: int
    kills: int = 3
    #: Containers that gave results before the first kill, and after the last.
    first_pids: set[int] = field(default_factory=set)
    last_pids: set[int] = field(default_factory=set)
    #: How many of the kills came while the scheduler had something to do.
    kills_at_work: int = 0
    #: How much this process has grown since the first tenth, at most.
    growth_bytes: int = 0

    def take(self, results: Iterable[tuple[int, int, bytes]]) -> None:
        chance = random.Random(self.seed)
        low, high = self.count // 10, self.count * 9 // 10
        points = sorted(chance.sample(range(low, high), self.kills))
        say = f"(seed {self.seed}: killed at {points} of {self.count})"
        first, last = points[0], points[-1]
        baseline = 0
        expected = 0
        for value, pid, _ in results:
            assert value == expected, f"result {expected} is {value} {say}"
            if expected == low:
                baseline = memory_bytes()
            if expected < first:
                self.first_pids.add(pid)
            if points and expected == points[0]:
                points.pop(0)
                self._note_kill()
                kill_scheduler(self.cluster)
                self.cluster.start_scheduler()
                self._note_growth(baseline)
            if expected > last:
                self.last_pids.add(pid)
            expected += 1
        self._note_growth(baseline)
        assert expected == self.count, f"{expected} results {say}"
        gone = {pid for pid in self.first_pids if not is_alive(pid)}
        assert not gone, f"containers {gone} of {self.first_pids} were not kept {say}"

    def _note_kill(self) -> None:
        # After the kill before, the client needs a moment to submit the call again. When it has
        # every result already, and only its user has not, it never does.
        with contextlib.suppress(AssertionError):
            poll_until(self.cluster.open_call_count, "the call is at work", 3)
            self.kills_at_work += 1

    def _note_growth(self, baseline: int) -> None:
        self.growth_bytes = max(self.growth_bytes, memory_bytes() - baseline)


def memory_bytes() -> int:
    """What this process holds; pages that it shares count by its share."""
    return shared_out_bytes({os.getpid()})


# --- a small disk ---------------------------------------------------------------------------------


class SmallDisk(HandStarted):
    """A cluster one of whose daemons has its home on a file system of its own, of a few MiB.

    The file system is mounted where only one process sees it, which does nothing else; others reach
    it through that process. So it goes with the process, also after a test that was killed.
    """

    def __init__(self, folder: Path, size_mib: int, owner: str = "scheduler") -> None:
        super().__init__(folder)
        self._owner = owner
        require_mounts()
        mount = f"mount -t tmpfs -o size={size_mib}m,mode=700 none {folder}"
        self._holder = subprocess.Popen(
            [*UNSHARE, "sh", "-c", f"{mount} && echo ready && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"
        self.disk = Path(f"/proc/{self._holder.pid}/root{folder}")

    def home(self, name: str) -> Path:
        return self.disk / name if name == self._owner else super().home(name)

    def _command(self, name: str, arguments: list[str]) -> list[str]:
        command = super()._command(name, arguments)
        if name != self._owner:
            return command
        # SQLite makes paths absolute and so must see the disk where it is mounted.
        command = [argument.replace(str(self.disk), str(self.folder)) for argument in command]
        return ["nsenter", f"--target={self._holder.pid}", *ENTER, "--", *command]

    def fill(self, room: int = 0) -> None:
        """Leave so many bytes of room."""
        with (self.disk / "filler").open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            file.truncate(file.tell() - room)

    def make_room(self) -> None:
        (self.disk / "filler").unlink()

    def stop(self) -> None:
        super().stop()
        self._holder.communicate()


#: As root it needs no more; others are root in a namespace of users of their own.
IS_ROOT = os.geteuid() == 0
UNSHARE = ["unshare", "--mount"] if IS_ROOT else ["unshare", "--mount", "--map-root-user"]
ENTER = ["--mount"] if IS_ROOT else ["--user", "--preserve-credentials", "--mount"]


def require_mounts() -> None:
    """Skip the test where nothing can be mounted; in CI that is a failure."""
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = done.stderr.strip()
    except FileNotFoundError as error:
        problem = str(error)
    if problem:
        reason = f"this test mounts a small disk, which needs root or user namespaces: {problem}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
