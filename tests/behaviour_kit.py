"""What the tests of behaviour run in containers, and how they look at the processes of fanout.

Containers import this module, so it imports nothing that is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fanout

app = fanout.App("behaviour")

#: Longer than any test waits for it to end by itself.
FOREVER_S = 600.0


# --- looking at processes -------------------------------------------------------------------------


def descendants_of(pid: int) -> set[int]:
    """All processes below one, without it."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for path in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = set(map(int, path.read_text().split())) - found
                found |= children
                waiting.extend(children)
    return found


def shared_out_bytes(pids: set[int]) -> int:
    """The memory of some processes; what they share counts once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def io_bytes(pid: int) -> int:
    """The bytes that a process has read by system calls, from files and sockets."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError(f"/proc/{pid}/io has no rchar")


def wait_for_file(path: str | Path, timeout_s: float = 60.0) -> None:
    """Return as soon as the file exists.

    Raises:
        TimeoutError: the time is up.
    """
    deadline = time.monotonic() + timeout_s
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has not come within {timeout_s:g} s")
        time.sleep(0.002)


def touch(folder: str, name: str) -> None:
    """Leave a mark for the test."""
    Path(folder, name).touch()


def close(results: Any) -> None:
    """End a map before its last result; what it returns is typed as a plain iterator."""
    results.close()


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
    """Hold a core for a moment, and note it in the folder if somebody else does so too."""
    with open(os.path.join(folder, "core"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            Path(folder, f"overlap-{os.getpid()}").touch()
        time.sleep(0.002)
        yield


# --- how long calls take --------------------------------------------------------------------------

#: A pause, so that whoever measures does not take the cores from what is measured.
BETWEEN_CALLS_S = 0.002


def time_calls(is_over: Callable[[], bool]) -> list[tuple[float, float]]:
    """Make small calls, one after the other; when each began, and how many seconds it took."""
    times: list[tuple[float, float]] = []
    while not is_over():
        begin_s = time.monotonic()
        assert same.remote(len(times)) == len(times)
        times.append((begin_s, time.monotonic() - begin_s))
    return times


# --- values ---------------------------------------------------------------------------------------


@dataclass
class Point:
    x: int


class RefusesToBeRebuilt:
    """Pickles well and fails when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ValueError("refuses to be rebuilt")


class Coded(Exception):
    """An exception with a state of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


# --- functions ------------------------------------------------------------------------------------


@app.function()
def same(x: Any) -> Any:
    return x


@app.function()
def nap(x: int, seconds: float = 0.0) -> tuple[int, int]:
    time.sleep(seconds)
    return x, os.getpid()


@app.function()
def sleep_first(x: int) -> int:
    if x == 0:
        time.sleep(10)
    return x


@app.function()
def spin_first(x: int) -> int:
    return sum(range(10**11)) if x == 0 else x


@app.function()
def second_waits(x: int, folder: str) -> int:
    if x == 1:
        wait_for_file(os.path.join(folder, "seen"))
    return x


@app.function()
def first_byte(data: bytes) -> int:
    return data[0]


@app.function()
def note_and_wait(x: int, folder: str, seconds: float = FOREVER_S) -> int:
    """Leaves `begun-<x>` holding its pid, waits, leaves `ended-<x>`."""
    path = Path(folder, f"begun-{x}")
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)
    time.sleep(seconds)
    Path(folder, f"ended-{x}").touch()
    return x


@app.function()
async def note_and_wait_async(folder: str) -> None:
    touch(folder, "begun")
    try:
        await asyncio.sleep(FOREVER_S)
    finally:
        touch(folder, "stopped")


@app.function()
def note_and_spin(folder: str) -> int:
    Path(folder, "begun").write_text(str(os.getpid()))
    return sum(range(10**11))


@app.function(timeout=0.5)
def spin_too_long() -> int:
    return sum(range(10**11))


@app.function(timeout=0.5)
def sleep_too_long(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@app.function(timeout=0.5, retries=fanout.Retries(1, initial_delay=0))
def hang_once(folder: str) -> str:
    try:
        Path(folder, "attempt").mkdir()
    except FileExistsError:
        return "second attempt"
    time.sleep(FOREVER_S)
    return "first attempt"


@app.function(retries=fanout.Retries(2, initial_delay=0))
def fail_until(folder: str, success_at: int) -> int:
    """Raises in each attempt before the one numbered `success_at`, counted from 1."""
    attempt = 1
    while True:
        try:
            Path(folder, f"attempt-{attempt}").mkdir()
        except FileExistsError:
            attempt += 1
        else:
            break
    if attempt < success_at:
        raise Coded(attempt)
    return attempt


# --- functions that call functions ----------------------------------------------------------------


@app.function()
def leaf(x: int, folder: str) -> int:
    with alone(folder):
        return x + 1


@app.function()
def trunk(x: int, folder: str) -> int:
    with alone(folder):
        pass
    value = leaf.remote(x, folder)
    with alone(folder):
        pass
    value = sum(leaf.map([value, value], kwargs={"folder": folder}))
    with alone(folder):
        return value


@app.function()
async def trunk_async(x: int) -> int:
    values = await asyncio.gather(*(same.remote.aio(x + i) for i in range(5)))
    async for value in same.map.aio(range(5)):
        values.append(value)
    return sum(values)


@app.function()
def depth(n: int) -> int:
    return 0 if n == 0 else 1 + depth.remote(n - 1)


@app.function(max_containers=1)
def alone_and_deep(n: int) -> int:
    return 0 if n == 0 else 1 + alone_and_deep.remote(n - 1)


@app.function(max_containers=1)
def ping(n: int) -> int:
    return 0 if n == 0 else 1 + pong.remote(n - 1)


@app.function(max_containers=1)
def pong(n: int) -> int:
    return 0 if n == 0 else 1 + ping.remote(n - 1)


@app.function()
def each_after_the_other(n: int) -> list[int]:
    return [same.remote(value) for value in same.map(range(n))]


@app.function()
def items(n: int) -> Iterator[int]:
    yield from range(n)


@app.function()
async def items_async(n: int) -> AsyncIterator[int]:
    for number in range(n):
        await asyncio.sleep(0)
        yield number


@app.function()
def large_result(x: int, size_bytes: int) -> bytes:
    return bytes([x % 256]) * size_bytes


@app.function()
def large_and_late(x: int, size_bytes: int, late: int, folder: str) -> bytes:
    """The first run of input `late` waits for a file and kills its container then."""
    if x == late and not os.path.exists(os.path.join(folder, "begun")):
        touch(folder, "begun")
        wait_for_file(os.path.join(folder, "die"))
        os._exit(1)
    return bytes([x % 256]) * size_bytes


@app.function()
def large_items(size_bytes: int) -> Iterator[bytes]:
    """Endless."""
    for x in itertools.count():
        yield bytes([x % 256]) * size_bytes


@app.function()
def note_items(folder: str) -> Iterator[int]:
    """Endless; leaves `closed` when it is closed."""
    number = 0
    try:
        while True:
            yield number
            number += 1
            Path(folder, "made").write_text(str(number))
    finally:
        Path(folder, "closed").touch()


# --- functions that go wrong ----------------------------------------------------------------------


@app.function()
def fail(x: int) -> int:
    if x % 5 == 3:
        raise Coded(x)
    return x


@app.function()
def fail_from_cause() -> None:
    try:
        os.environ["FANOUT_TEST_MISSING"]
    except KeyError as error:
        raise Coded(7) from error


@app.function()
def kill_itself(x: int, folder: str) -> int:
    """Input 3 dies and leaves a mark at each attempt."""
    if x == 3:
        with open(os.path.join(folder, "deaths"), "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@app.function()
def kill_itself_once(x: int, folder: str) -> int:
    if x == 3:
        with contextlib.suppress(FileExistsError):
            Path(folder, "died").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
    return x


@app.function()
def leave(code: Any) -> None:
    sys.exit(code)


@app.function()
def give(kind: str) -> Any:
    if kind == "point":
        return Point(1)
    return threading.Lock() if kind == "lock" else RefusesToBeRebuilt()


@app.function()
def chatter(line_count: int) -> int:
    for number in range(line_count):
        sys.stdout.write(f"line {number} of a function that says a lot\n")
    return line_count


@app.function(cpu=64)
def too_large() -> None:
    pass


# --- large values ---------------------------------------------------------------------------------


@app.function()
def change_in_place(x: int, array: Any) -> int:
    """What the first element was when it came; changes it afterwards."""
    was = int(array[0])
    array[0] = was + 1 + x
    return was


@app.function()
def ones(size_bytes: int) -> Any:
    import numpy

    array = numpy.ones(size_bytes, dtype=numpy.uint8)
    array[-1] = 7
    return array


@app.function()
def checksum(array: Any) -> tuple[int, int]:
    import zlib

    return len(array), zlib.crc32(array)
