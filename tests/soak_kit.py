"""What the soak runs: functions that note each of their runs, and a client that checks each result.

Containers import this module, so it imports nothing that is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fanout
from fanout.exceptions import ContainerCrashedError, FunctionTimeoutError, InputCancelledError

app = fanout.App("soak")

#: Longer than any soak waits for it to end by itself.
FOREVER_S = 600.0
#: How long a client tries to reach the scheduler in the beginning.
OPEN_S_MAX = 30.0
#: Idle containers leave soon, so that afterwards nothing but the daemons is left.
SCALEDOWN_S = 2


_stack_files: list[Any] = []


def mark(folder: str, token: str, index: int) -> None:
    """Note that an input runs: one line, written at once, so that a kill cannot tear it."""
    if not _stack_files:
        # `soak.py` asks for it where a unit of work hangs.
        _stack_files.append(open(os.path.join(folder, f"stack-{os.getpid()}"), "wb"))  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, _stack_files[0], all_threads=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    fd = os.open(os.path.join(folder, f"runs-{os.getpid()}"), flags, 0o600)
    try:
        os.write(fd, f"{token} {index}\n".encode())
    finally:
        os.close(fd)


# --- functions ------------------------------------------------------------------------------------


@app.function(cpu=0.5, scaledown_window=SCALEDOWN_S)
def work(x: int, folder: str, token: str, seconds: float = 0.0) -> tuple[str, int]:
    mark(folder, token, x)
    time.sleep(seconds)
    return token, x


@app.function(cpu=0.25, scaledown_window=SCALEDOWN_S, max_containers=2)
@fanout.concurrent(max_inputs=8)
async def work_async(x: int, folder: str, token: str, seconds: float = 0.0) -> tuple[str, int]:
    mark(folder, token, x)
    await asyncio.sleep(seconds)
    return token, x


@app.function(cpu=0.5, scaledown_window=SCALEDOWN_S)
def items(count: int, folder: str, token: str) -> Iterator[tuple[str, int]]:
    mark(folder, token, 0)
    for number in range(count):
        yield token, number


@app.function(cpu=0.5, scaledown_window=SCALEDOWN_S)
def trunk(x: int, folder: str, token: str) -> tuple[str, int]:
    mark(folder, token, x)
    rows = work.map(range(4), kwargs={"folder": folder, "token": f"{token}/{x}"})
    return token, x + sum(value for _, value in rows)


@app.function(cpu=0.5, scaledown_window=SCALEDOWN_S, timeout=0.5)
def hang(x: int, folder: str, token: str) -> None:
    mark(folder, token, x)
    time.sleep(FOREVER_S)


@app.function(cpu=0.5, scaledown_window=SCALEDOWN_S, retries=fanout.Retries(3, initial_delay=0))
def fail_twice(x: int, folder: str, token: str) -> tuple[str, int]:
    mark(folder, token, x)
    for attempt in (1, 2):
        try:
            Path(folder, f"attempt-{token}-{x}-{attempt}").mkdir()
        except FileExistsError:
            continue
        raise ValueError(f"attempt {attempt} of input {x}")
    return token, x


@app.function(cpu=0.5, scaledown_window=SCALEDOWN_S)
def change(x: int, array: Any, folder: str, token: str) -> tuple[str, int, Any]:
    """Its argument and its result are too large for a frame and travel as blobs."""
    mark(folder, token, x)
    array += 1
    return token, x, array


@app.cls(cpu=0.5, scaledown_window=SCALEDOWN_S)
class Adder:
    start: int = fanout.parameter()

    @fanout.enter()
    def load(self) -> None:
        self.base = self.start

    @fanout.method()
    def add(self, x: int, folder: str, token: str) -> tuple[str, int]:
        mark(folder, token, x)
        return token, self.base + x

    @fanout.exit()
    def leave(self) -> None:
        self.base = -1


# --- the client -----------------------------------------------------------------------------------


def memory_bytes(pid: int) -> int:
    """The memory that is a process's own; pages of libraries do not count."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) << 10
    return 0


class Wrong(Exception):
    """A result that is not what it must be."""


def require(is_right: bool, text: str) -> None:
    if not is_right:
        raise Wrong(text)


class Client:
    """One client process: one unit of work after the other, each checked and written down."""

    def __init__(self, folder: str, name: str, seed: int) -> None:
        self.folder = folder
        self.name = name
        self.random = random.Random(seed)
        self.journal_path = Path(folder, f"client-{name}")
        self.token = ""
        self.number = 0
        self.crashed: list[int] = []

    def note(self, **what: Any) -> None:
        """Write a line of the journal, at once."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        fd = os.open(self.journal_path, flags, 0o600)
        try:
            os.write(fd, (json.dumps(what) + "\n").encode())
        finally:
            os.close(fd)

    def run(self, kinds: list[str], is_endless: bool) -> None:
        """Do each of these kinds of work once; then, if endless, any until there is a file
        `stop`."""
        with contextlib.ExitStack() as stack:
            self.open_app(stack)
            for kind in self.random.sample(kinds, len(kinds)):
                self.do(kind)
            self.note_held()
            while is_endless and not Path(self.folder, "stop").exists():
                self.do(self.random.choice(kinds))
            self.note_held()

    def open_app(self, stack: contextlib.ExitStack) -> None:
        """A client that begins while the scheduler is being started again is told so, and tries
        again."""
        end = time.monotonic() + OPEN_S_MAX
        while True:
            try:
                stack.enter_context(app.run())
                return
            except fanout.exceptions.ConnectionError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def note_held(self) -> None:
        """Write down what this process has, nothing of its own being open."""
        gc.collect()
        held = {
            "memory_bytes": memory_bytes(os.getpid()),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }
        self.note(held=held)

    def do(self, kind: str) -> None:
        self.number += 1
        self.token = f"{self.name}.{self.number}"
        self.crashed = []
        self.note(begun=kind, token=self.token)
        try:
            count = UNITS[kind](self)
        except BaseException:
            self.note(wrong=kind, token=self.token, text=traceback.format_exc())
            raise
        self.note(done=kind, token=self.token, inputs=count, crashed=self.crashed)

    # --- what all units use ---

    def common(self, **more: Any) -> dict[str, Any]:
        return {"folder": self.folder, "token": self.token, **more}

    def options(self, **more: Any) -> dict[str, Any]:
        """Of a map: what its inputs have in common, and that errors are results."""
        return {"return_exceptions": True, "kwargs": self.common(**more)}

    def check(self, index: int, got: Any, expected: int) -> None:
        """One result: the right value, or an error that says that its containers died of it."""
        if isinstance(got, ContainerCrashedError):
            require(got.crash_count == 3, f"crash_count {got.crash_count} of input {index}")
            self.crashed.append(index)
            return
        if isinstance(got, BaseException):
            raise got
        require(tuple(got) == (self.token, expected), f"input {index} gave {got!r}")

    def check_all(self, rows: list[Any], count: int) -> None:
        require(len(rows) == count, f"{len(rows)} results of {count} inputs")
        for index, got in enumerate(rows):
            self.check(index, got, index)

    def seconds(self) -> float:
        return self.random.choice([0.0, 0.0, 0.002, 0.02])

    # --- the units ---

    def map(self) -> int:
        seconds = self.seconds()
        count = self.random.randint(20, 2000) if seconds == 0 else self.random.randint(20, 100)
        function: Any = self.random.choice([work, work_async])
        options = self.options(seconds=seconds)
        self.check_all(list(function.map(range(count), **options)), count)
        return count

    def map_unordered(self) -> int:
        count = self.random.randint(20, 500)
        options = self.options(seconds=self.seconds())
        rows = list(work.map(range(count), order_outputs=False, **options))
        require(len(rows) == count, f"{len(rows)} results of {count} inputs")
        good = sorted(row[1] for row in rows if not isinstance(row, BaseException))
        require(len(set(good)) == len(good), "an input came twice")
        for row in rows:
            self.check(-1, row, -1 if isinstance(row, BaseException) else row[1])
        return count

    def remote(self) -> int:
        for index in range(5):
            try:
                got: Any = work.remote(index, **self.common(seconds=self.seconds()))
            except ContainerCrashedError as error:
                got = error
            self.check(index, got, index)
        return 5

    def spawn(self) -> int:
        calls = []
        for index in range(3):
            call = work.spawn(index, **self.common(seconds=self.seconds()))
            self.note(spawned=call.object_id, token=self.token, start=index, inputs=1)
            calls.append(call)
        if self.random.random() < 0.5:
            for index, call in enumerate(calls):
                self.check(index, result_of(call, 0), index)
        return 3

    def spawn_map(self) -> int:
        count = self.random.randint(10, 300)
        call = work.spawn_map(range(count), kwargs=self.common(seconds=0.001))
        self.note(spawned=call.object_id, token=self.token, start=0, inputs=count)
        if self.random.random() < 0.5:
            require(call.num_inputs() == count, "num_inputs is wrong")
            self.check_all([result_of(call, index) for index in range(count)], count)
        return count

    def generator(self) -> int:
        count = self.random.randint(10, 1000)
        try:
            for number, row in enumerate(items.remote_gen(count, **self.common())):
                self.check(number, row, number)
            require(number == count - 1, f"{number + 1} items of {count}")
        except ContainerCrashedError as error:
            self.check(0, error, 0)
        return 1

    def nested(self) -> int:
        rows = list(trunk.map(range(4), kwargs=self.common(), return_exceptions=True))
        require(len(rows) == 4, f"{len(rows)} results of 4 inputs")
        for index, got in enumerate(rows):
            self.check(index, got, index + 6)
        return 4

    def cancel_map(self) -> int:
        """Break off in the middle: what came is right, and nothing of the rest is left."""
        options = self.options(seconds=0.005)
        results: Any = work.map(range(10_000), **options)
        count = self.random.randint(1, 20)
        for index in range(count):
            self.check(index, next(results), index)
        results.close()
        return count

    def cancel_spawn(self) -> int:
        call = work.spawn(0, **self.common(seconds=FOREVER_S))
        call.cancel(terminate_containers=self.random.random() < 0.3)
        try:
            call.get()
        except InputCancelledError:
            return 0
        except ContainerCrashedError:
            self.crashed.append(0)
            return 0
        raise Wrong("a cancelled call has a result")

    def timeout(self) -> int:
        rows: list[Any] = list(hang.map(range(2), kwargs=self.common(), return_exceptions=True))
        require(len(rows) == 2, f"{len(rows)} results of 2 inputs")
        for index, got in enumerate(rows):
            if not isinstance(got, FunctionTimeoutError):
                require(isinstance(got, ContainerCrashedError), f"input {index} gave {got!r}")
                self.check(index, got, index)
        return 2

    def retry(self) -> int:
        rows = list(fail_twice.map(range(5), kwargs=self.common(), return_exceptions=True))
        self.check_all(rows, 5)
        return 5

    def large_values(self) -> int:
        import numpy

        size = (2 << 20) // 8
        arrays = [numpy.full(size, self.number * 8 + x, dtype=numpy.int64) for x in range(4)]
        rows = list(change.map(range(4), arrays, kwargs=self.common(), return_exceptions=True))
        require(len(rows) == 4, f"{len(rows)} results of 4 inputs")
        for index, got in enumerate(rows):
            row: Any = got
            if not isinstance(row, BaseException):
                token, x, array = row
                is_same = bool((array == self.number * 8 + index + 1).all())
                require(len(array) == size and is_same, f"array {index} is another one")
                row = token, x
            self.check(index, row, index)
        return 4

    def methods(self) -> int:
        adder: Any = Adder
        start = self.random.randint(0, 2)
        options = self.options()
        rows = list(adder(start=start).add.map(range(20), **options))
        require(len(rows) == 20, f"{len(rows)} results of 20 inputs")
        for index, got in enumerate(rows):
            self.check(index, got, start + index)
        return 20

    def async_calls(self) -> int:
        """On an event loop of its own, and so over a connection of its own."""

        async def run() -> list[Any]:
            options = self.options(seconds=0.002)
            calls = [work.remote.aio(x, **self.common()) for x in range(50, 60)]
            rows, single = await asyncio.gather(
                work.map.aio(range(50), **options), asyncio.gather(*calls, return_exceptions=True)
            )
            return [*rows, *single]

        try:
            rows = asyncio.run(run())
        except fanout.exceptions.ConnectionError:
            # The first connection of a loop is not tried twice.
            return 0
        if not any(isinstance(row, fanout.exceptions.ConnectionError) for row in rows):
            self.check_all(rows, 60)
            return 60
        return 0

    def objects(self) -> int:
        """A named queue and a named dict: each item once, in order; each change once."""
        name = f"soak-{self.token}"
        queue = fanout.Queue.from_name(name, create_if_missing=True)
        queue.put_many(list(range(50)))
        for number in range(50, 60):
            queue.put(number)
        got = [queue.get() for _ in range(10)] + queue.get_many(50)
        require(got == list(range(60)) and queue.len() == 0, f"the queue gave {got}")
        table = fanout.Dict.from_name(name, create_if_missing=True)
        for number in range(10):
            require(table.put(number, number, skip_if_exists=True), f"key {number} was there")
        for number in range(0, 10, 2):
            require(table.pop(number) == number, f"another value under {number}")
        require(sorted(table.keys()) == [1, 3, 5, 7, 9], "the keys are wrong")
        fanout.Queue.delete(name)
        fanout.Dict.delete(name)
        return 0


def result_of(call: fanout.FunctionCall[Any], index: int) -> Any:
    """A result, or the error that says that its containers died of it."""
    try:
        return call.get(index=index)
    except ContainerCrashedError as error:
        return error


UNITS: dict[str, Callable[[Client], int]] = {
    "map": Client.map,
    "unordered map": Client.map_unordered,
    "remote": Client.remote,
    "spawn": Client.spawn,
    "spawn_map": Client.spawn_map,
    "generator": Client.generator,
    "nested": Client.nested,
    "broken-off map": Client.cancel_map,
    "cancelled spawn": Client.cancel_spawn,
    "time limit": Client.timeout,
    "retries": Client.retry,
    "queue and dict": Client.objects,
    "large values": Client.large_values,
    "methods of a class": Client.methods,
    "calls on a loop": Client.async_calls,
}
