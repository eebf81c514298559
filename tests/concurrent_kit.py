"""What `test_concurrency.py` runs in containers, on one core; also imported by them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import fanout

app = fanout.App("concurrent-kit")

#: How long an input of `works` keeps its container's core.
WORK_S = 0.5


@app.function(cpu=1)
def leaf(x: int) -> tuple[int, float]:
    """Twice the argument, and when that was."""
    return 2 * x, time.monotonic()


@app.function(cpu=1)
@fanout.concurrent(max_inputs=4)
def in_threads(x: int) -> int:
    return leaf.remote(x)[0]


@app.function(cpu=1)
@fanout.concurrent(max_inputs=4)
async def in_tasks(x: int) -> int:
    both = await asyncio.gather(leaf.remote.aio(x), leaf.remote.aio(x))
    return both[0][0]


@app.function(cpu=1)
@fanout.concurrent(max_inputs=4)
def in_threads_of_their_own(x: int) -> int:
    """Its calls are made in threads that do not know for which input they are."""
    with ThreadPoolExecutor(2) as pool:
        return sum(value for value, _ in pool.map(leaf.remote, [x, x]))


@app.function(cpu=1, max_containers=1)
@fanout.concurrent(max_inputs=2)
def waits_or_works_in_threads(works: bool) -> float:
    """When it had done its work, or when somebody else had done it."""
    if works:
        time.sleep(WORK_S)
        return time.monotonic()
    return leaf.remote(1)[1]


@app.function(cpu=1, max_containers=1)
@fanout.concurrent(max_inputs=2)
async def waits_or_works_in_tasks(works: bool) -> float:
    if works:
        await asyncio.sleep(WORK_S)
        return time.monotonic()
    return (await leaf.remote.aio(1))[1]


@app.function(cpu=1)
@fanout.concurrent(max_inputs=3)
def gives(n: int) -> Iterator[int]:
    yield from range(n)


@app.function(cpu=1)
@fanout.concurrent(max_inputs=3)
async def gives_async(n: int) -> AsyncIterator[int]:
    for x in range(n):
        yield x


@app.function(cpu=1)
@fanout.batched(max_batch_size=4, wait_ms=50)
def doubled(xs: list[int]) -> list[int]:
    return [2 * x for x in xs]


@app.function(cpu=1)
@fanout.concurrent(max_inputs=4)
def by_batches(x: int) -> int:
    y: int = doubled.remote(x)
    return y


@app.function(cpu=1)
@fanout.batched(max_batch_size=3, wait_ms=50)
def batch_of_calls(xs: list[int]) -> list[int]:
    return [value for value, _ in leaf.map(xs)]


@app.function(cpu=1)
@fanout.concurrent(max_inputs=20)
async def sleeps(seconds: float) -> None:
    await asyncio.sleep(seconds)
