"""The library against a real embedded cluster: calls, maps, generators, spawned calls; both forms
of each."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import uvloop

import fanout
from fanout.config import WINDOW_COUNT_MIN
from fanout.exceptions import (
    ContainerCrashedError,
    FunctionTimeoutError,
    InputCancelledError,
    InvalidError,
    NotFoundError,
    SerializationError,
)
from tests.conftest import Cluster, poll_until

#: libuv keeps one pipe for signals in each process; made here, it is no leak of a test.
uvloop.new_event_loop().close()

app = fanout.App("api")


@dataclass
class Point:
    x: int


class Stubborn(Exception):
    """Cannot be made again from its `args`."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


@app.function()
def square(x: int) -> int:
    return x * x


@app.function()
def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@app.function()
def move(point: Point) -> Point:
    return Point(point.x + 1)


@app.function()
def fail_at_three(x: int) -> int:
    if x == 3:
        raise ValueError("three")
    return x


@app.function()
def fail_stubbornly() -> None:
    raise Stubborn("one", "two")


@app.function()
def stop_iteration(x: int) -> int:
    raise StopIteration(x)


@app.function()
def leave() -> None:
    sys.exit(3)


@app.function()
def locked() -> Any:
    return threading.Lock()


@app.function()
def increment(array: Any) -> Any:
    array += 1
    return array


@app.function(timeout=0.3)
def hang() -> None:
    threading.Event().wait()


@app.function()
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.function()
def wait_for_file(path: str) -> str:
    poll_until(lambda: Path(path).exists(), "the test lets the function go", 60)
    return path


@app.function(retries=fanout.Retries(3, initial_delay=0))
def fail_twice(folder: str) -> int:
    attempt = len(list(Path(folder).iterdir()))
    (Path(folder) / str(attempt)).touch()
    if attempt < 2:
        raise ValueError("not yet")
    return attempt


@app.function()
def count(n: int) -> Iterator[int]:
    for i in range(n):
        if i == 7:
            raise ValueError("seven")
        yield i


@app.function()
def sum_of_squares(n: int) -> int:
    return sum(square.map(range(n)))


@app.function()
def call(function: Any, x: int) -> Any:
    return function.remote(x)


@app.function()
async def later(x: int) -> int:
    return await asyncio.wait_for(asyncio.shield(_soon(x + 1)), 60)


async def _soon(x: int) -> int:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, x)
    result: int = await future
    return result


@app.function()
async def later_items(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


@pytest.fixture
def running(cluster: Cluster) -> Iterator[None]:
    with app.run():
        yield


def open_calls() -> int:
    """Calls of the blocking API that are not over, once the loop has seen all that was said."""
    from fanout.client import loop, sessions

    async def look() -> int:
        return len(sessions.session_here()._calls)

    return loop.run(look)


def test_values_and_arguments_arrive(running: None) -> None:
    assert square.remote(7) == 49
    assert echo.remote(1, "a", key=None) == ((1, "a"), {"key": None})
    assert move.remote(Point(1)) == Point(2)
    assert later.remote(1) == 2
    assert list(square.map(range(3000))) == [x * x for x in range(3000)]
    assert sorted(square.map(range(100), order_outputs=False)) == [x * x for x in range(100)]
    assert list(echo.map([1, 2], "ab", kwargs={"c": 3})) == [
        ((1, "a"), {"c": 3}),
        ((2, "b"), {"c": 3}),
    ]
    large = "x" * 100_000
    assert [kwargs == {"c": large} for _, kwargs in echo.map([1, 2], kwargs={"c": large})] == [
        True,
        True,
    ]
    assert list(echo.starmap([(1, 2), [3]])) == [((1, 2), {}), ((3,), {})]
    assert list(square.map([])) == []
    assert list(square.map(square.map(range(4)))) == [0, 1, 16, 81]
    square.for_each(range(10))
    assert open_calls() == 0


def test_errors_arrive_as_their_own_type_in_the_order_of_inputs(running: None) -> None:
    with pytest.raises(ValueError, match="three") as caught:
        fail_at_three.remote(3)
    assert "in fail_at_three" in "".join(traceback.format_exception(caught.value))
    got: list[Any] = []
    with pytest.raises(ValueError, match="three"):
        got.extend(fail_at_three.map(range(6)))
    assert got == [0, 1, 2]
    results = list(fail_at_three.map(range(6), return_exceptions=True))
    assert [type(value) for value in results] == [int, int, int, ValueError, int, int]
    with pytest.raises(ValueError, match="three"):
        fail_at_three.for_each(range(6))
    fail_at_three.for_each(range(6), ignore_exceptions=True)
    with pytest.raises(Stubborn, match="^onetwo$"):
        fail_stubbornly.remote()
    with pytest.raises(SystemExit):
        leave.remote()
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(stop_iteration.map([1]))
    assert open_calls() == 0


def test_what_ends_an_input_from_outside_has_its_own_error(running: None) -> None:
    with pytest.raises(FunctionTimeoutError, match=r"0\.3 s"):
        hang.remote()
    with pytest.raises(ContainerCrashedError, match="SIGKILL"):
        die.remote()


def test_values_that_cannot_be_pickled_fail_alone(running: None) -> None:
    with pytest.raises(SerializationError, match=r"argument 0, a _thread\.lock"):
        square.remote(threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match=r"_thread\.lock"):
        locked.remote()
    mixed = [1, threading.Lock(), 3]
    first, second, third = square.map(mixed, return_exceptions=True)
    assert (first, third) == (1, 9)
    assert isinstance(second, SerializationError)
    got: list[Any] = []
    with pytest.raises(SerializationError):
        got.extend(square.map(mixed))
    assert got == [1]


def test_an_error_of_the_users_iterator_reaches_the_caller(running: None) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        list(square.map(broken()))
    poll_until(lambda: open_calls() == 0, "the call is cancelled")


def test_generators_stream_and_are_mapped_flat(running: None) -> None:
    assert list(count.remote_gen(5)) == [0, 1, 2, 3, 4]
    assert list(later_items.remote_gen(3)) == [0, 1, 2]
    assert list(count.map([2, 0, 3])) == [0, 1, 0, 1, 2]
    assert sorted(count.map([2, 2], order_outputs=False)) == [0, 0, 1, 1]
    got: list[Any] = []
    with pytest.raises(ValueError, match="seven"):
        got.extend(count.remote_gen(9))
    assert got == list(range(7))
    mixed = list(count.map([1, 8, 2], return_exceptions=True))
    assert mixed[:8] == [0, *range(7)]
    assert isinstance(mixed[8], ValueError)
    assert mixed[9:] == [0, 1]
    assert len(list(later_items.remote_gen(5000))) == 5000


def test_large_values_travel_beside_and_are_the_receivers_own(running: None) -> None:
    array = numpy.zeros(300_000)
    back = increment.remote(array)
    assert array[0] == 0
    back += 1
    assert back.sum() == 2 * len(array)
    buffer = numpy.zeros(200_000)

    def reused() -> Iterator[Any]:
        for number in range(20):
            buffer[:] = number
            yield buffer

    assert [result[0] for result in increment.map(reused())] == list(range(1, 21))
    value = [b"x" * 3_000_000]
    assert echo.remote(value, key=value) == ((value,), {"key": value})
    from fanout.client import loop, sessions

    async def held() -> int:
        return len(sessions.session_here()._blob_pins)

    assert loop.run(held) == 0, "no blob outlives its use"


def test_retries_run_an_input_again(running: None, tmp_path: Path) -> None:
    folder = tmp_path / "attempts"
    folder.mkdir()
    assert fail_twice.remote(str(folder)) == 2


def test_functions_call_functions(running: None) -> None:
    assert sum_of_squares.remote(50) == sum(x * x for x in range(50))
    assert list(sum_of_squares.map([1, 2, 3, 4])) == [0, 1, 5, 14]
    assert call.remote(square, 5) == 25


def test_closures_travel_by_value(running: None) -> None:
    offset = 10

    @app.function(serialized=True)
    def shifted(x: int) -> int:
        return x + offset

    assert shifted.remote(1) == 11


def test_inputs_are_pulled_only_as_far_as_the_credit_goes(running: None) -> None:
    pulled = itertools.count()
    results = square.map(pulled)
    for _, _ in zip(range(100), results, strict=False):
        pass
    assert next(pulled) < 100 + 2 * 64 * WINDOW_COUNT_MIN
    del results
    poll_until(lambda: open_calls() == 0, "dropping the iterator cancels the call")


def test_leaving_a_loop_early_cancels_the_call(running: None, tmp_path: Path) -> None:
    for _ in square.map(itertools.count()):
        break
    gc.collect()
    poll_until(lambda: open_calls() == 0, "the call is cancelled")
    assert square.remote(2) == 4


def test_spawned_calls_are_collected_later(running: None, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    spawned = wait_for_file.spawn(str(gate))
    with pytest.raises(TimeoutError, match="no result of input 0 after 0 s"):
        spawned.get(timeout=0)
    with pytest.raises(TimeoutError):
        spawned.get(timeout=0.05)
    gate.touch()
    again = fanout.FunctionCall.from_id(spawned.object_id)
    assert again.get(timeout=30) == again.get() == str(gate)
    many = square.spawn_map(range(3000))
    assert many.num_inputs() == 3000
    assert list(many.iter()) == [x * x for x in range(3000)]
    assert list(many.iter(start=10, end=13)) == [100, 121, 144]
    assert many.get(index=2999) == 2999**2
    assert fanout.FunctionCall.gather(square.spawn(1), square.spawn(2)) == [1, 4]
    with pytest.raises(InvalidError, match="has 3000 inputs"):
        many.get(index=3000)
    with pytest.raises(ValueError, match="3000 inputs"):
        list(many.iter(end=3001))
    with pytest.raises(NotFoundError, match="knows no call fc-0"):
        fanout.FunctionCall.from_id("fc-" + "0" * 32).get()
    failed = fail_at_three.spawn_map(range(5))
    got: list[Any] = []
    with pytest.raises(ValueError, match="three"):
        got.extend(failed.iter())
    assert got == [0, 1, 2]


def test_a_spawned_call_can_be_cancelled(running: None, tmp_path: Path) -> None:
    spawned = wait_for_file.spawn(str(tmp_path / "never"))
    spawned.cancel()
    with pytest.raises(InputCancelledError):
        spawned.get(timeout=30)


def test_threads_share_the_connection(running: None) -> None:
    sums: list[int] = []

    def use() -> None:
        sums.append(sum(square.map(range(500))) + square.remote(1))

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [sum(x * x for x in range(500)) + 1] * 6


def test_a_forked_child_has_a_connection_of_its_own(running: None) -> None:
    assert square.remote(2) == 4
    forked = multiprocessing.get_context("fork")
    results = forked.SimpleQueue()
    child = forked.Process(target=lambda: results.put(square.remote(3)))
    child.start()
    assert results.get() == 9
    child.join()
    assert child.exitcode == 0
    child.close()
    results.close()
    assert square.remote(4) == 16


def test_blocking_calls_of_many_threads_survive_the_scheduler(cluster: Cluster) -> None:
    def call_often(first: int) -> list[int]:
        return [square.remote(x) for x in range(first, first + 200)]

    with app.run(), ThreadPoolExecutor(6) as pool:
        running = [pool.submit(call_often, 1000 * number) for number in range(6)]
        for done_count in (50, 50, 50):
            for x in range(done_count):
                assert square.remote(x) == x * x
            os.kill(cluster.daemon_pids()["scheduler"], signal.SIGKILL)
        for number, calls in enumerate(running):
            assert calls.result() == [x * x for x in range(1000 * number, 1000 * number + 200)]


def test_calls_survive_the_scheduler(cluster: Cluster) -> None:
    with app.run():
        results = square.map(range(20_000))
        got = list(itertools.islice(results, 100))
        (state,) = cluster.home.glob("*/*/scheduler.json")
        os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
        got += results
        assert got == [x * x for x in range(20_000)]
        assert square.remote(3) == 9


def test_an_app_runs_again_and_not_twice_at_once(cluster: Cluster) -> None:
    for _ in range(2):
        with app.run():
            assert app.app_id is not None
            with pytest.raises(InvalidError, match="running already"):
                app.run().__enter__()
            assert square.remote(2) == 4
    assert app.app_id is None


# --- asyncio --------------------------------------------------------------------------------------


async def in_thread(action: Callable[[], Any]) -> Any:
    """Run something that blocks, in a thread that is gone afterwards."""
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, action)


async def test_everything_has_its_asyncio_form(cluster: Cluster) -> None:
    async with app.run():
        assert await square.remote.aio(3) == 9
        assert await asyncio.gather(*(square.remote.aio(x) for x in range(50))) == [
            x * x for x in range(50)
        ]
        assert await square.map.aio(range(3000)) == [x * x for x in range(3000)]
        assert [x async for x in square.map.aio([1, 2])] == [1, 4]
        assert await echo.starmap.aio([(1, 2)]) == [((1, 2), {})]
        assert [x async for x in count.remote_gen.aio(3)] == [0, 1, 2]
        assert await count.map.aio([1, 2]) == [0, 0, 1]
        await square.for_each.aio(range(3))
        spawned = await square.spawn.aio(5)
        assert await spawned.get.aio() == 25
        many = await square.spawn_map.aio(range(10))
        assert [x async for x in many.iter.aio()] == [x * x for x in range(10)]
        assert await many.num_inputs.aio() == 10
        assert await fanout.FunctionCall.gather.aio(spawned, many) == [25, 0]
        with pytest.raises(ValueError, match="three"):
            await fail_at_three.remote.aio(3)
        with pytest.raises(ValueError, match="three"):
            await fail_at_three.map.aio(range(6))
        assert await in_thread(lambda: square.remote(4)) == 16


async def test_async_iterables_are_pulled_on_the_users_loop(cluster: Cluster) -> None:
    here = asyncio.get_running_loop()

    async def numbers() -> AsyncIterator[int]:
        for number in range(300):
            assert asyncio.get_running_loop() is here
            if number % 50 == 0:
                await _soon(number)
            yield number

    async def broken() -> AsyncIterator[int]:
        yield 1
        raise OSError("mine")

    async with app.run():
        assert await square.map.aio(numbers()) == [x * x for x in range(300)]
        assert await echo.map.aio(numbers(), "ab") == [((0, "a"), {}), ((1, "b"), {})]
        with pytest.raises(OSError, match="mine"):
            await square.map.aio(broken())


async def test_a_cancelled_task_cancels_its_call(cluster: Cluster, tmp_path: Path) -> None:
    from fanout.client.sessions import session_here

    async with app.run():
        assert await square.remote.aio(1) == 1
        session = session_here()
        task = asyncio.create_task(wait_for_file.remote.aio(str(tmp_path / "never")))
        await in_thread(lambda: poll_until(lambda: session._calls, "the call is open"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not session._calls
        async for _ in square.map.aio(itertools.count()):
            break
        gc.collect()
        await in_thread(lambda: poll_until(lambda: not session._calls, "the call is cancelled"))


# --- whole programs -------------------------------------------------------------------------------

PROGRAM = """
import signal, sys, threading, os
import fanout
app = fanout.App("program")
@app.function()
def wait(path):
    open(path, "w").close()
    threading.Event().wait()
@app.function()
def same(x): return x
class Mine:
    def __init__(self, x): self.x = x
if __name__ == "__main__":
    mode, path = sys.argv[1:]
    if mode == "leave":
        app.run().__enter__()
        results = same.map(range(100000))
        next(results)
    elif mode == "class":
        with app.run():
            back = same.remote(Mine(5))
            sys.stdout.write(f"{type(back) is Mine} {back.x}")
    else:
        with app.run():
            try:
                wait.remote(path) if mode == "remote" else list(wait.map([path]))
            except KeyboardInterrupt:
                sys.stdout.write(f"interrupted {same.remote(3)}")
"""


@pytest.fixture
def program(cluster: Cluster, tmp_path: Path) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, "-W", "error", str(path)]


@pytest.mark.parametrize("mode", ["remote", "map"])
def test_ctrl_c_cancels_the_call_and_the_program_goes_on(
    cluster: Cluster, program: list[str], tmp_path: Path, mode: str
) -> None:
    begun = tmp_path / "begun"
    with subprocess.Popen(
        [*program, mode, str(begun)],
        env=cluster.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        poll_until(begun.exists, "the function runs", 30)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "interrupted 3", "")


def test_a_program_may_end_in_the_middle(cluster: Cluster, program: list[str]) -> None:
    done = subprocess.run(
        [*program, "leave", ""], env=cluster.variables, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_classes_of_a_script_keep_their_identity(cluster: Cluster, program: list[str]) -> None:
    done = subprocess.run(
        [*program, "class", ""], env=cluster.variables, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 5", "")
