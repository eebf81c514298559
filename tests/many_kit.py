"""What `test_many_inputs.py` runs in containers; also imported by them."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fanout

app = fanout.App("many-kit")


#: In each container, how many of these meet.
TASK_COUNT = 20
THREAD_COUNT = 8
tasks_meet = asyncio.Barrier(TASK_COUNT)
threads_meet = threading.Barrier(THREAD_COUNT)


@app.function(cpu=0.1, max_containers=1)
@fanout.concurrent(max_inputs=TASK_COUNT)
async def meet(x: int) -> tuple[int, int]:
    """Returns when all are here at the same time."""
    await tasks_meet.wait()
    return os.getpid(), x


@app.function(cpu=0.1, max_containers=1)
@fanout.concurrent(max_inputs=THREAD_COUNT)
def meet_in_threads(x: int) -> tuple[int, str]:
    threads_meet.wait()
    return os.getpid(), threading.current_thread().name


@app.function(cpu=0.1)
def one_at_a_time(folder: str) -> int:
    """How many of its kind ran in this process at most."""
    with Path(folder, str(os.getpid())).open("a") as file:
        file.write("x")
    time.sleep(0.05)
    most = os.path.getsize(Path(folder, str(os.getpid())))
    with Path(folder, str(os.getpid())).open("r+") as file:
        file.truncate(most - 1)
    return most


@app.function(cpu=0.1, timeout=0.5, max_containers=1)
@fanout.concurrent(max_inputs=4)
def spins_in_threads(seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


@app.function(cpu=0.1, max_containers=1)
@fanout.concurrent(max_inputs=4)
async def numbers(n: int) -> AsyncIterator[int]:
    for x in range(n):
        await asyncio.sleep(0)
        yield x


@app.function(cpu=0.1, max_containers=1)
@fanout.concurrent(max_inputs=6)
def dies_for(x: int, bad: int) -> int:
    time.sleep(0.1)
    if x == bad:
        os.kill(os.getpid(), 9)
    return x


@app.function(cpu=0.1, max_containers=1)
@fanout.batched(max_batch_size=4, wait_ms=200)
def add_in_batches(xs: list[int], ys: list[int]) -> list[tuple[int, int]]:
    """Each sum, and the size of the batch."""
    return [(x + y, len(xs)) for x, y in zip(xs, ys, strict=True)]


@app.function(cpu=0.1, max_containers=1)
@fanout.batched(max_batch_size=8, wait_ms=50)
async def broken_batches(xs: list[Any]) -> Any:
    if "raise" in xs:
        raise ZeroDivisionError("the whole batch")
    if "short" in xs:
        return xs[:-1]
    if "text" in xs:
        return "no list"
    return xs


@app.cls(cpu=0.1, max_containers=1)
@fanout.concurrent(max_inputs=2)
class Embedder:
    scale: int = fanout.parameter(default=1)

    @fanout.enter()
    def load(self) -> None:
        self.calls = 0

    @fanout.batched(max_batch_size=3, wait_ms=100)
    def embed(self, texts: list[str]) -> list[tuple[int, int]]:
        self.calls += 1
        return [(self.scale * len(text), len(texts)) for text in texts]


@app.function(cpu=0.1)
def batches_from_a_container(n: int) -> list[int]:
    return [total for total, _ in add_in_batches.map(range(n), range(n))]


@app.function(cpu=0.1)
def squares(n: int) -> Iterator[int]:
    yield from (x * x for x in range(n))
