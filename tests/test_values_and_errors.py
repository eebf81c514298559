"""Errors keep their type and their place, and fail alone; and the finer points of the calls."""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout.exceptions import (
    ContainerCrashedError,
    DeserializationError,
    Error,
    NotFoundError,
    ResourceExhaustedError,
    SerializationError,
)
from tests import behaviour_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster
from tests.engine_fixture import engine as engine
from tests.engine_fixture import running as running
from tests.engine_fixture import wait_until_no_call_is_open

SCRIPTS = Path(__file__).parent / "scripts"


class Unpicklable:
    """A value that refuses to be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("refuses to be pickled")


# --- errors ---------------------------------------------------------------------------------------


def test_a_value_that_cannot_travel_is_the_error_of_its_input_alone(running: None) -> None:
    inputs = [1, Unpicklable(), 2, kit.RefusesToBeRebuilt(), 3]
    one, unpicklable, two, unbuildable, three = kit.same.map(inputs, return_exceptions=True)
    assert (one, two, three) == (1, 2, 3)
    assert isinstance(unpicklable, SerializationError)
    assert "refuses to be pickled" in str(unpicklable)
    assert isinstance(unbuildable, DeserializationError)
    assert "refuses to be rebuilt" in str(unbuildable)


def test_a_result_that_cannot_travel_is_the_error_of_its_input_alone(running: None) -> None:
    lock, point, refuses = kit.give.map(["lock", "point", "refuses"], return_exceptions=True)
    assert isinstance(lock, SerializationError)
    assert point == kit.Point(1)
    assert isinstance(refuses, DeserializationError)
    assert "refuses to be rebuilt" in str(refuses)


def test_an_exception_keeps_its_type_and_state_and_shows_where_it_was_raised(
    running: None,
) -> None:
    with pytest.raises(kit.Coded) as caught:
        kit.fail.remote(8)
    assert caught.value.code == 8
    text = "".join(traceback.format_exception(caught.value))
    assert re.search(r'behaviour_kit\.py", line \d+, in fail', text), text
    assert "raise Coded(x)" in text
    assert "fanout_worker" not in text, "the frames of the runtime are nobody's concern"


def test_the_cause_of_an_exception_is_readable(running: None) -> None:
    with pytest.raises(kit.Coded) as caught:
        kit.fail_from_cause.remote()
    text = "".join(traceback.format_exception(caught.value))
    assert "KeyError: 'FANOUT_TEST_MISSING'" in text
    assert "direct cause" in text


def test_the_first_error_comes_in_the_order_of_inputs_after_the_results_before_it(
    running: None,
) -> None:
    got: list[int] = []
    with pytest.raises(kit.Coded) as caught:
        got.extend(kit.fail.map(range(100)))
    assert (got, caught.value.code) == ([0, 1, 2], 3)
    mixed = list(kit.fail.map(range(100), return_exceptions=True))
    codes = [value.code if isinstance(value, kit.Coded) else value for value in mixed]
    assert codes == list(range(100))
    assert sum(isinstance(value, kit.Coded) for value in mixed) == 20


@pytest.mark.parametrize("code", [0, 3, "with words"])
def test_leaving_the_interpreter_is_the_error_of_the_input(running: None, code: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        kit.leave.remote(code)
    assert caught.value.code == code
    assert kit.same.remote(1) == 1


def test_an_input_that_kills_its_container_is_charged_alone(running: None, tmp_path: Path) -> None:
    results = list(
        kit.kill_itself.map(range(50), kwargs={"folder": str(tmp_path)}, return_exceptions=True)
    )
    assert isinstance(results[3], ContainerCrashedError)
    assert "SIGKILL" in str(results[3])
    assert results[:3] + results[4:] == [0, 1, 2, *range(4, 50)]
    assert (tmp_path / "deaths").read_text() == "xxx", "it is tried three times"


def test_an_input_whose_container_died_once_gets_another(running: None, tmp_path: Path) -> None:
    kwargs = {"folder": str(tmp_path)}
    assert list(kit.kill_itself_once.map(range(50), kwargs=kwargs)) == list(range(50))
    assert (tmp_path / "died").exists()


def test_a_request_that_no_worker_can_satisfy_fails_at_once(running: None) -> None:
    begin_s = time.monotonic()
    with pytest.raises(ResourceExhaustedError, match="64"):
        kit.too_large.remote()
    assert time.monotonic() - begin_s < 1 * TIMEOUT_FACTOR


def test_a_module_that_cannot_be_imported_in_a_container_is_named(
    engine: Cluster, tmp_path: Path
) -> None:
    script = tmp_path / "works_only_here.py"
    script.write_text(
        "import sys, traceback, fanout\n"
        "app = fanout.App('imports')\n"
        "if __name__ != '__main__':\n"
        "    import no_such_module_anywhere\n"
        "@app.function()\n"
        "def f(x): return x\n"
        "if __name__ == '__main__':\n"
        "    with app.run():\n"
        "        try:\n"
        "            list(f.map(range(10)))\n"
        "        except ImportError as error:\n"
        "            sys.stdout.write(traceback.format_exc())\n"
    )
    done = engine.python(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Error: No module named 'no_such_module_anywhere'\n")
    files = [line.split(", ")[:2] for line in done.stdout.splitlines() if "File" in line]
    here = f'  File "{script}"'
    assert files == [[here, "line 10"], [here, "line 4"]], "the user's lines, and no other"
    wait_until_no_call_is_open()


def test_a_function_that_says_a_lot_is_not_slowed_to_a_stop(running: None) -> None:
    assert kit.chatter.remote(50_000) == 50_000


# --- inputs ---------------------------------------------------------------------------------------


async def numbers(stop: int) -> AsyncIterator[int]:
    for number in range(stop):
        await asyncio.sleep(0)
        yield number


def pair_up(*iterators: Any, **options: Any) -> list[Any]:
    return [value[0] for value in kit.nap.map(*iterators, **options)]


def test_the_shortest_iterator_ends_a_map(running: None) -> None:
    assert pair_up(itertools.count(), [0.0] * 5) == [0, 1, 2, 3, 4]
    assert pair_up(range(3), itertools.repeat(0.0)) == [0, 1, 2]


def test_async_iterables_are_inputs_of_a_blocking_map(running: None) -> None:
    assert list(kit.same.map(numbers(2000))) == list(range(2000))


def test_the_iterators_are_asked_lazily_and_never_after_their_end(running: None) -> None:
    asked: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(10):
            asked.append(number)
            yield number
        asked.append(-1)

    results = kit.same.map(inputs())
    assert asked == [], "nothing is pulled before the first result is asked for"
    assert list(results) == list(range(10))
    assert asked == [*range(10), -1]


def test_for_each_takes_generators_too(running: None) -> None:
    kit.items.for_each([3, 4])
    kit.items_async.for_each([3, 4])
    assert list(kit.items_async.map([2, 3])) == [0, 1, 0, 1, 2]


def test_an_unknown_call_is_told_apart_from_one_that_is_not_ready(running: None) -> None:
    unknown: fanout.FunctionCall[int] = fanout.FunctionCall.from_id("fc-" + "ab" * 16)
    for use in (unknown.get, unknown.num_inputs, unknown.cancel, lambda: list(unknown.iter())):
        with pytest.raises(NotFoundError):
            use()
    waits = kit.nap.spawn(1, 60.0)
    with pytest.raises(TimeoutError) as caught:
        waits.get(timeout=0)
    assert not isinstance(caught.value, Error), "it is the builtin, as Modal raises it"
    waits.cancel()


def test_a_part_of_a_spawned_call_can_be_read(running: None) -> None:
    call = kit.same.spawn_map(range(1000))
    assert call.num_inputs() == 1000
    assert list(call.iter(start=990)) == list(range(990, 1000))
    assert list(call.iter(start=5, end=5)) == []
    assert list(call.iter()) == list(call.iter()) == list(range(1000))


# --- threads and loops ----------------------------------------------------------------------------


def test_eight_threads_map_at_once(running: None) -> None:
    with ThreadPoolExecutor(8) as pool:
        lists = list(pool.map(lambda n: list(kit.same.map(range(n, n + 2000))), range(8)))
    assert lists == [list(range(n, n + 2000)) for n in range(8)]


def test_two_maps_that_feed_each_other_by_turns(running: None) -> None:
    first, second = kit.same.map(itertools.count()), kit.same.map(itertools.count(1000))
    pairs = list(itertools.islice(zip(first, second, strict=False), 3000))
    assert pairs == [(n, n + 1000) for n in range(3000)]
    kit.close(first)
    kit.close(second)


async def test_a_running_loop_is_not_blocked_by_a_map(engine: Cluster) -> None:
    """As in a notebook: other tasks of the loop go on while results are waited for."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async with kit.app.run():
        task = asyncio.create_task(tick())
        values = [x async for x in kit.nap.map.aio(range(8), kwargs={"seconds": 0.1})]
        task.cancel()
    assert [x for x, _ in values] == list(range(8))
    assert ticks > 10


async def test_two_loops_one_after_the_other_use_one_app(engine: Cluster) -> None:
    async with kit.app.run():
        assert await kit.same.remote.aio(1) == 1

        def other_loop() -> list[int]:
            async def use() -> list[int]:
                values: list[int] = await kit.same.map.aio(range(100))
                return values

            return asyncio.run(use())

        with ThreadPoolExecutor(1) as pool:
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(pool, other_loop) == list(range(100))


# --- whole programs -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["return", "exit", "error", "generator"])
def test_a_program_that_ends_in_mid_map_ends_quietly(engine: Cluster, way: str) -> None:
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPTS / "ends_in_the_middle.py", way],
        env=engine.variables,
        capture_output=True,
        text=True,
        timeout=60 * TIMEOUT_FACTOR,
    )
    assert time.monotonic() - begin_s < 5 * TIMEOUT_FACTOR
    if way == "error":
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == 1, done.stderr
        assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    else:
        assert (done.returncode, done.stderr) == (3 if way == "exit" else 0, "")
    wait_until_no_call_is_open()


def test_a_fork_in_mid_map_leaves_the_parent_alone(engine: Cluster) -> None:
    done = engine.python(SCRIPTS / "forks.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "child ok\nparent ok\n", "")


def test_threads_that_outlive_the_run_get_an_error(engine: Cluster) -> None:
    got: list[BaseException | None] = []

    def consume() -> None:
        try:
            for _ in kit.same.map(itertools.count()):
                pass
        except BaseException as error:
            got.append(error)
        else:
            got.append(None)

    with kit.app.run():
        assert kit.same.remote(1) == 1
        thread = threading.Thread(target=consume)
        thread.start()
        assert kit.same.remote(1) == 1
    thread.join(20 * TIMEOUT_FACTOR)
    assert not thread.is_alive()
    assert isinstance(got[0], Error)
    wait_until_no_call_is_open()
