"""The classes that `test_classes.py` calls; also imported by their containers."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import fanout

app = fanout.App("classes-kit")


@app.cls(cpu=0.1)
class Counter:
    start: int = fanout.parameter(default=0)
    folder: str = fanout.parameter(default="")
    fixed: str = fanout.parameter(default="fixed", init=False)

    @fanout.enter()
    def begin(self) -> None:
        self.value = self.start
        self.entered = getattr(self, "entered", 0) + 1
        if self.folder:
            Path(self.folder, f"enter-{os.getpid()}").touch()

    @fanout.method()
    def add(self, by: int = 1) -> tuple[int, int]:
        """The process, and what was counted in it so far."""
        self.value += by
        return os.getpid(), self.value

    @fanout.method()
    def state(self) -> tuple[int, str, int]:
        return self.start, self.fixed, self.entered

    @fanout.method()
    def count_to(self, stop: int) -> Iterator[int]:
        yield from range(self.start, stop)

    @fanout.method()
    async def later(self, x: int) -> int:
        await asyncio.sleep(0)
        return self.start + x

    @fanout.method()
    async def later_items(self, stop: int) -> AsyncIterator[int]:
        for x in range(self.start, stop):
            yield x

    @fanout.method()
    def by_way_of_another(self, x: int) -> int:
        """Calls a method of itself in another container, one in this one, and a plain one."""
        far: int = self.later.remote(x)
        _, near = self.add.local(by=0)
        return far + near + self.helper()

    def helper(self) -> int:
        return 1000

    @fanout.exit()
    def end(self) -> None:
        if self.folder:
            Path(self.folder, f"exit-{os.getpid()}").touch()


class Base:
    """Decorated by nobody; its hooks and methods come to those who inherit."""

    name: str = fanout.parameter(default="base")

    @fanout.enter()
    def first(self) -> None:
        self.order = ["first"]

    @fanout.method()
    def who(self) -> str:
        return f"{type(self).__name__} {self.name} {self.order}"

    @fanout.method()
    def replaced(self) -> str:
        return "base"


@app.cls(cpu=0.1)
class Derived(Base):
    @fanout.enter()
    def second(self) -> None:
        self.order.append("second")

    @fanout.method()
    def replaced(self) -> str:
        return "derived"


@app.cls(cpu=0.1)
class Unready:
    @fanout.enter()
    def fail(self) -> None:
        raise LookupError("no weights here")

    @fanout.method()
    def use(self, x: int) -> int:
        return x


@app.cls(cpu=0.1, scaledown_window=0.1)
class Short:
    folder: str = fanout.parameter()

    @fanout.enter()
    async def begin(self) -> None:
        await asyncio.sleep(0)
        self.is_ready = True

    @fanout.method()
    def ask(self) -> bool:
        return self.is_ready

    @fanout.exit()
    async def end(self) -> None:
        await asyncio.to_thread(Path(self.folder, "left").touch)


mark: ContextVar[str] = ContextVar("mark", default="not set")


@app.cls(cpu=0.1, scaledown_window=0.1)
class Blocking:
    """Its hooks are sync and wait for the scheduler, its only method is async."""

    notes: str = fanout.parameter()

    @fanout.enter()
    def begin(self) -> None:
        self.dict = fanout.Dict.from_id(self.notes)
        self.start = self.dict["start"]
        self.dict["entered"] = True
        self.thread = threading.get_ident()
        mark.set("set by a hook")

    @fanout.method()
    async def ask(self) -> tuple[int, str, bool]:
        await asyncio.sleep(0)
        return self.start, mark.get(), threading.get_ident() == self.thread

    @fanout.exit()
    def end(self) -> None:
        self.dict["left"] = True


@app.cls(cpu=0.1, env={"KIT_VARIABLE": "own"})
class Environ:
    @fanout.method()
    def variable(self, name: str) -> str | None:
        return os.environ.get(name)


@app.function(cpu=0.1)
def ask_both(handle: Any, name: str) -> tuple[Any, Any]:
    """In a container of its own, and in this one, where its class is loaded."""
    return handle.variable.remote(name), handle.variable.local(name)


@app.function(cpu=0.1)
def count_up(n: int) -> Iterator[int]:
    yield from range(n)


@app.function(cpu=0.1)
def use_handle(handle: Any, x: int) -> Any:
    """Call a method of an object, or of a class, that came as an argument."""
    counter = handle if isinstance(handle, fanout.cls.Obj) else handle(start=100)
    return counter.later.remote(x)


@app.function(cpu=0.1)
def make_handle(start: int) -> Any:
    counter: Any = Counter
    return counter(start=start)


# --- scaling --------------------------------------------------------------------------------------


@app.function(cpu=0.1)
def pid_of(x: int = 0, seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return os.getpid()


@app.function(cpu=0.1, env={"KIT_VARIABLE": "set", "KIT_NOTHING": None})
def variable(name: str) -> str | None:
    return os.environ.get(name)


@app.function(cpu=0.1, single_use_containers=True)
def once(x: int) -> int:
    return os.getpid()


@app.function(cpu=0.1, min_containers=2, max_containers=2, scaledown_window=0.2)
def kept(x: int = 0) -> int:
    return os.getpid()


@app.function(cpu=0.1, retries=fanout.Retries(max_retries=2, initial_delay=0.0))
def third_time(path: str) -> int:
    with open(path, "a") as file:
        file.write("x")
    tries = os.path.getsize(path)
    if tries < 3:
        raise OSError(f"attempt {tries}")
    return tries
