"""Methods of classes in the process that calls `.local`: which hooks have run, and when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import fanout
from fanout.exceptions import InvalidError

app = fanout.App("local-methods")


@app.cls()
class Failing:
    """Its second hook fails as often as its object is told."""

    @fanout.enter()
    def first(self) -> None:
        self.runs = [*getattr(self, "runs", []), "first"]

    @fanout.enter()
    def second(self) -> None:
        self.failures_left: int
        if self.failures_left:
            self.failures_left -= 1
            raise LookupError("no weights here")

    @fanout.method()
    def shown(self) -> list[str]:
        return self.runs


@app.cls()
class Gated:
    """Its hook waits for others; it calls a method of its own object meanwhile."""

    @fanout.enter()
    def begin(self) -> None:
        self.begun: threading.Event
        self.go: threading.Event
        self.begun.set()
        assert self.go.wait(10)
        self.value = 0
        self.value = self.ask.local() + 1

    @fanout.method()
    def ask(self) -> int:
        return self.value


@app.cls()
class Slow:
    """Its hook is async."""

    count_of_runs = 0

    @fanout.enter()
    async def begin(self) -> None:
        await asyncio.sleep(0)
        assert await self.runs.local() == self.count_of_runs
        self.count_of_runs += 1

    @fanout.method()
    async def runs(self) -> int:
        return self.count_of_runs

    @fanout.method()
    async def items(self, n: int) -> AsyncIterator[int]:
        for x in range(n):
            yield self.count_of_runs + x

    @fanout.method()
    def plain(self) -> int:
        return self.count_of_runs


def test_hooks_that_failed_run_again_at_the_next_call() -> None:
    obj: Any = Failing()
    obj._locally().instance.failures_left = 2
    for _ in range(2):
        with pytest.raises(LookupError):
            obj.shown.local()
    assert obj.shown.local() == ["first"] * 3
    assert obj.shown.local() == ["first"] * 3


def test_a_thread_waits_for_the_hooks_that_another_one_runs() -> None:
    obj: Any = Gated()
    instance = obj._locally().instance
    instance.begun, instance.go = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(obj.ask.local)
        assert instance.begun.wait(10)
        second = pool.submit(obj.ask.local)
        assert not second.done()
        instance.go.set()
        assert (first.result(10), second.result(10)) == (1, 1)


async def test_calls_wait_for_one_run_of_an_async_hook() -> None:
    obj: Any = Slow()
    assert await asyncio.gather(*(obj.runs.local() for _ in range(3))) == [1, 1, 1]
    assert obj.plain.local() == 1


async def test_an_async_generator_runs_behind_an_async_hook() -> None:
    obj: Any = Slow()
    assert [x async for x in obj.items.local(2)] == [1, 2]


async def test_a_cancelled_hook_runs_again() -> None:
    obj: Any = Slow()
    task = asyncio.ensure_future(obj.runs.local())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await obj.runs.local() == 1


def test_a_sync_method_that_would_wait_for_an_async_hook_is_refused() -> None:
    obj: Any = Slow()
    with pytest.raises(InvalidError, match=r"Slow\.plain\.local.*'begin' is async.*runs\.local"):
        obj.plain.local()
