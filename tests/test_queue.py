"""Queues as a user has them: names, limits, waiting, several processes, restarts."""

from __future__ import annotations

import asyncio
import os
import queue as standard
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout import exceptions
from fanout.client import sessions
from tests.conftest import (
    TIMEOUT_FACTOR,
    Cluster,
    HandStarted,
    WaitUntil,
    environment,
)

app = fanout.App("queues")


class Unwelcome:
    """Pickles, and cannot be unpickled in a process that says so."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ImportError("not here")


class Deadly:
    """The first process that unpickles it dies of it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return _die_once, (self.folder,)


def _die_once(folder: str) -> str:
    marker = Path(folder) / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


@app.function()
def fill(target: fanout.Queue, count: int) -> fanout.Queue:
    for number in range(count):
        target.put(number)
    return target


@app.function()
def wait_for_item(source: fanout.Queue, partition: str | None = None) -> Any:
    return source.get(partition=partition)


@app.function()
async def wait_for_item_aio(source: fanout.Queue) -> Any:
    return await source.get.aio()


@app.function()
def echo(value: Any) -> Any:
    return value


def in_background(action: Callable[[], Any]) -> Future[Any]:
    """Run something that blocks in a daemon thread, so that a failing test does not hang on it."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def result_of(future: Future[Any]) -> Any:
    return future.result(20 * TIMEOUT_FACTOR)


def waiting_count() -> int:
    """How many requests of this process's blocking API are under way."""
    from fanout.client import loop
    from fanout.client.sessions import session_here

    async def count() -> int:
        return len(session_here()._requests)

    return loop.run(count)


@pytest.fixture
def queue(cluster: Cluster) -> Iterator[fanout.Queue]:
    with fanout.Queue.ephemeral() as made:
        yield made


# --- names and ids -------------------------------------------------------------------------------


def test_making_one_without_a_name_says_what_to_write() -> None:
    with pytest.raises(RuntimeError, match=r"Queue\.from_name.*Queue\.ephemeral"):
        fanout.Queue()


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a/b", None, 7])
def test_a_bad_name_is_refused(name: Any) -> None:
    with pytest.raises(exceptions.InvalidError, match="cannot be the name of a queue"):
        fanout.Queue.from_name(name)


def test_options_of_a_cloud_are_refused() -> None:
    with pytest.raises(exceptions.InvalidError, match="no environments"):
        fanout.Queue.from_name("q", environment_name="main")
    with pytest.raises(exceptions.InvalidError, match="FANOUT_URL"):
        fanout.Queue.from_name("q", client=object())


def test_a_handle_is_lazy_and_a_missing_queue_is_missed_at_its_first_use(cluster: Cluster) -> None:
    handle = fanout.Queue.from_name("nobody-made-it")
    assert cluster.daemon_pids() == {}
    with pytest.raises(exceptions.NotFoundError, match="'nobody-made-it'.*create_if_missing"):
        handle.put(1)
    with pytest.raises(exceptions.ExecutionError, match="hydrate"):
        handle.object_id  # noqa: B018


def test_a_name_means_one_queue_to_all(cluster: Cluster) -> None:
    fanout.Queue.from_name("shared", create_if_missing=True).put("hello")
    code = "import fanout; q = fanout.Queue.from_name('shared'); print(q.get()); q.put('back')"
    done = cluster.python("-c", code)
    assert done.stdout == "hello\n", done.stderr
    assert fanout.Queue.from_name("shared").get() == "back"


def test_an_id_finds_the_queue(cluster: Cluster) -> None:
    made = fanout.Queue.from_name("by-id", create_if_missing=True).hydrate()
    assert made.object_id.startswith("qu-")
    found = fanout.Queue.from_id(made.object_id)
    made.put(1)
    assert found.get() == 1
    assert found.info().name == "by-id"
    assert abs(found.info().created_at.timestamp() - time.time()) < 60
    with pytest.raises(exceptions.NotFoundError, match="deleted, or it was ephemeral"):
        fanout.Queue.from_id("qu-" + 32 * "0").len()
    with pytest.raises(exceptions.InvalidError, match="means nothing to queue 'by-id'"):
        fanout.Dict.from_id(made.object_id.replace("qu-", "di-")).get(1)


@pytest.mark.parametrize("text", ["", "qu-", "di-" + 32 * "0", "qu-" + 31 * "0", "qu-" + 32 * "g"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(exceptions.InvalidError, match="not the id of a queue"):
        fanout.Queue.from_id(text)


def test_queues_are_made_listed_and_deleted_by_name(cluster: Cluster) -> None:
    manager = fanout.Queue.objects
    manager.create("one")
    manager.create("two")
    manager.create("one", allow_existing=True)
    with pytest.raises(exceptions.AlreadyExistsError, match="'one'"):
        manager.create("one")
    assert [found.name for found in manager.list()] == ["two", "one"]
    assert [found.name for found in manager.list(max_objects=1)] == ["two"]
    assert manager.list(created_before="2020-01-01") == []
    assert fanout.Dict.objects.list() == []
    manager.delete("one")
    fanout.Queue.delete("two")
    assert manager.list() == []
    with pytest.raises(exceptions.NotFoundError, match="'one'"):
        manager.delete("one")
    manager.delete("one", allow_missing=True)


async def test_managers_have_an_async_form(cluster: Cluster) -> None:
    await fanout.Queue.objects.create.aio("one")
    assert [found.name for found in await fanout.Queue.objects.list.aio()] == ["one"]
    await fanout.Queue.delete.aio("one")
    assert await fanout.Queue.objects.list.aio() == []
    await sessions.close_here()


# --- putting and getting -------------------------------------------------------------------------


def test_items_come_out_in_the_order_in_which_they_went_in(queue: fanout.Queue) -> None:
    queue.put("a")
    queue.put_many([1, None, {"x": [1.5]}])
    assert queue.len() == 4
    assert queue.get() == "a"
    assert queue.get_many(2) == [1, None]
    assert queue.get_many(10) == [{"x": [1.5]}]
    assert queue.len() == 0


def test_an_empty_queue_answers_at_once_or_in_time(queue: fanout.Queue) -> None:
    assert queue.get(block=False) is None
    assert queue.get_many(3, block=False) == []
    assert queue.get_many(0) == []
    begin_s = time.monotonic()
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.2)
    assert 0.2 <= time.monotonic() - begin_s < 5 * TIMEOUT_FACTOR
    with pytest.raises(standard.Empty):
        queue.get_many(2, timeout=0)


def test_a_timeout_without_blocking_is_warned_of(queue: fanout.Queue) -> None:
    with pytest.warns(UserWarning, match="block=False") as caught:
        assert queue.get(block=False, timeout=5) is None
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="block=False"):
        assert queue.get_many(2, False, 5) == []


async def test_a_timeout_without_blocking_is_warned_of_by_the_async_form(cluster: Cluster) -> None:
    async with fanout.Queue.ephemeral() as queue:
        with pytest.warns(UserWarning, match="block=False") as caught:
            assert await queue.get.aio(block=False, timeout=5) is None
        assert [warning.filename for warning in caught] == [__file__]


def test_iterating_needs_an_end(queue: fanout.Queue) -> None:
    wrong: Any = None
    with pytest.raises(
        exceptions.InvalidError, match="item_poll_timeout=None: must be at least 0 seconds"
    ):
        next(queue.iterate(item_poll_timeout=wrong))


def test_a_get_waits_for_a_put(queue: fanout.Queue, wait_until: WaitUntil) -> None:
    waiting = in_background(queue.get)
    wait_until(waiting_count, "the get waits")
    queue.put("at last")
    assert result_of(waiting) == "at last"


def test_a_full_partition_refuses_and_lets_wait(queue: fanout.Queue, wait_until: WaitUntil) -> None:
    queue.put_many([0] * 4999)
    queue.put(1)
    with pytest.raises(standard.Full):
        queue.put(2, block=False)
    with pytest.raises(standard.Full):
        queue.put(2, timeout=0.05)
    queue.put(3, partition="another")
    waiting = in_background(lambda: queue.put("last"))
    wait_until(waiting_count, "the put waits")
    assert len(queue.get_many(5000)) == 5000
    result_of(waiting)
    assert queue.get() == "last"


def test_partitions_are_apart(queue: fanout.Queue) -> None:
    queue.put(1)
    queue.put_many([2, 3], partition="b")
    assert queue.len() == 1
    assert queue.len(partition="b") == 2
    assert queue.len(total=True) == 3
    assert queue.get(partition="b") == 2
    queue.clear(partition="b")
    assert (queue.len(partition="b"), queue.len(total=True)) == (0, 1)
    queue.put(4, partition="ü" * 32)
    queue.clear(all=True)
    assert queue.len(total=True) == 0


def test_a_partition_expires_some_time_after_its_last_put(
    queue: fanout.Queue, wait_until: WaitUntil
) -> None:
    queue.put("short", partition="p", partition_ttl=0.2)
    queue.put("long", partition="q", partition_ttl=100)
    wait_until(lambda: queue.len(partition="p") == 0, "the partition has expired")
    assert queue.len(partition="q") == 1


def test_iterating_leaves_items_where_they_are(queue: fanout.Queue) -> None:
    queue.put_many(list(range(2500)))
    assert list(queue.iterate()) == list(range(2500))
    assert queue.len() == 2500
    assert list(queue.iterate(partition="empty")) == []


def test_iterating_waits_for_new_items_for_a_while(queue: fanout.Queue) -> None:
    queue.put(0)
    found = queue.iterate(item_poll_timeout=5)
    assert next(found) == 0
    queue.put(1)
    assert next(found) == 1
    assert list(queue.iterate(item_poll_timeout=0.05)) == [0, 1]


async def test_everything_has_an_async_form(cluster: Cluster) -> None:
    async with fanout.Queue.ephemeral() as queue:
        waiting = asyncio.create_task(queue.get.aio())
        await queue.put.aio(1)
        assert await waiting == 1
        await queue.put_many.aio([2, 3, 4])
        assert [x async for x in queue.iterate.aio()] == [2, 3, 4]
        assert await queue.len.aio() == 3
        assert await queue.get_many.aio(2) == [2, 3]
        await queue.clear.aio()
        with pytest.raises(standard.Empty):
            await queue.get.aio(timeout=0.01)
        with pytest.raises(exceptions.InvalidError, match=r"await queue\.get\.aio"):
            queue.get()
    with pytest.raises(exceptions.NotFoundError):
        await queue.len.aio()
    await sessions.close_here()


async def test_a_cancelled_get_takes_nothing(cluster: Cluster) -> None:
    async with fanout.Queue.ephemeral() as queue:
        endings = Counter[bool]()
        for turns in range(60):
            waiting = asyncio.create_task(queue.get.aio())
            putting = asyncio.create_task(queue.put.aio("x"))
            # From before anything was sent until after both are done.
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            if turns % 3 == 0:
                await putting
            waiting.cancel()
            got = (await asyncio.gather(waiting, putting, return_exceptions=True))[0]
            endings[got == "x"] += 1
            if got != "x":
                assert await queue.get.aio(timeout=10 * TIMEOUT_FACTOR) == "x"
        assert await queue.len.aio() == 0
        assert endings[False], "some were cancelled in time"


def test_an_item_that_cannot_be_unpickled_stays_in_the_queue(queue: fanout.Queue) -> None:
    queue.put_many([1, Unwelcome()])
    with pytest.raises(exceptions.DeserializationError, match="not here.*All 2 items are in the"):
        queue.get_many(2)
    assert queue.get() == 1
    with pytest.raises(exceptions.DeserializationError, match="The item is in the queue again"):
        queue.get()
    assert queue.len() == 1


# --- limits --------------------------------------------------------------------------------------


def test_limits_are_checked_before_anything_is_sent() -> None:
    queue = fanout.Queue.from_name("never-reached")
    with pytest.raises(exceptions.RequestSizeError, match="item 1 has .* at most 1048576"):
        queue.put_many(["a", b"x" * (1 << 20)])
    with pytest.raises(exceptions.RequestSizeError, match="20 items .* together"):
        queue.put_many([b"x" * 1_000_000] * 20)
    with pytest.raises(exceptions.InvalidError, match="5001 items at once"):
        queue.put_many(list(range(5001)))
    with pytest.raises(exceptions.SerializationError, match="the item, a _thread.lock"):
        queue.put(threading.Lock())
    for partition in ("", "x" * 65, "ü" * 33, b"x"):
        with pytest.raises(exceptions.InvalidError, match="1 to 64 bytes"):
            queue.get(partition=partition)  # type: ignore[arg-type]
    for timeout in (-1, float("nan"), "1"):
        with pytest.raises(exceptions.InvalidError, match="timeout"):
            queue.get(timeout=timeout)  # type: ignore[arg-type]
    for ttl in (0, -1, 8 * 24 * 3600):
        with pytest.raises(exceptions.InvalidError, match="partition_ttl"):
            queue.put(1, partition_ttl=ttl)
    with pytest.raises(exceptions.InvalidError, match="n_values"):
        queue.get_many(-1)


# --- in containers -------------------------------------------------------------------------------


def test_a_handle_works_as_argument_and_as_result(queue: fanout.Queue) -> None:
    named = fanout.Queue.from_name("named", create_if_missing=True)
    with app.run():
        assert fill.remote(queue, 3).get_many(10) == [0, 1, 2]
        assert fill.remote(named, 2).object_id == named.hydrate().object_id
    assert named.get_many(10) == [0, 1]


def test_functions_and_their_caller_talk_while_they_run(queue: fanout.Queue) -> None:
    with app.run():
        call = wait_for_item.spawn(queue)
        queue.put("for the function")
        assert call.get(timeout=20 * TIMEOUT_FACTOR) == "for the function"
        results = wait_for_item_aio.map([queue] * 4)
        queue.put_many([1, 2, 3, 4])
        assert sorted(results) == [1, 2, 3, 4]


def test_a_waiting_get_gives_its_core_to_others(
    scheduler_and_workers: Callable[..., HandStarted],
) -> None:
    scheduler_and_workers(1, cpu=1)
    with fanout.Queue.ephemeral() as queue, app.run():
        calls = [wait_for_item.spawn(queue) for _ in range(3)]
        assert echo.remote("one core is enough") == "one core is enough"
        assert fill.remote(queue, 3).name is None
        got = sorted(call.get(timeout=20 * TIMEOUT_FACTOR) for call in calls)
        assert got == [0, 1, 2]


def test_an_item_whose_container_dies_before_it_has_it_goes_to_the_next_one(
    queue: fanout.Queue, tmp_path: Path
) -> None:
    queue.put(Deadly(str(tmp_path)))
    with app.run():
        assert wait_for_item.remote(queue) == "survived"
    assert (tmp_path / "died").exists()
    assert queue.len() == 0


def test_an_item_that_a_function_got_is_gone_though_its_container_ends_at_once(
    queue: fanout.Queue,
) -> None:
    queue.put_many(list(range(8)))
    got = []
    for _ in range(8):
        with app.run():
            got.append(wait_for_item.remote(queue))
    assert got == list(range(8))
    assert queue.len() == 0


def test_the_end_of_an_app_leaves_a_waiting_get_alone(
    queue: fanout.Queue, wait_until: WaitUntil
) -> None:
    waiting = in_background(queue.get)
    wait_until(waiting_count, "the get waits")
    with app.run():
        assert echo.remote(1) == 1
    queue.put("still here")
    assert result_of(waiting) == "still here"


# --- losses --------------------------------------------------------------------------------------


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_what_was_put_survives_a_killed_scheduler(
    scheduler_and_workers: Callable[..., HandStarted],
) -> None:
    started = scheduler_and_workers(0)
    queue = fanout.Queue.from_name("durable", create_if_missing=True)
    queue.put_many(["a", "b", "c"])
    queue.put("p", partition="p")
    assert queue.get() == "a"
    assert started.scheduler is not None
    kill(started.scheduler)
    started.start_scheduler()
    assert queue.get_many(10) == ["b", "c"]
    assert fanout.Queue.from_name("durable").get(partition="p") == "p"
    assert queue.get(block=False) is None


def test_a_waiting_get_survives_a_killed_scheduler(
    scheduler_and_workers: Callable[..., HandStarted], wait_until: WaitUntil
) -> None:
    started = scheduler_and_workers(0)
    queue = fanout.Queue.from_name("durable", create_if_missing=True)
    waiting = in_background(queue.get)
    wait_until(waiting_count, "the get waits")
    assert started.scheduler is not None
    kill(started.scheduler)
    started.start_scheduler()
    queue.put("after the restart")
    assert result_of(waiting) == "after the restart"


def test_a_function_that_waits_at_a_queue_survives_a_killed_scheduler(
    scheduler_and_workers: Callable[..., HandStarted], wait_until: WaitUntil
) -> None:
    started = scheduler_and_workers(1)
    queue = fanout.Queue.from_name("durable", create_if_missing=True)
    with app.run():
        call = wait_for_item.spawn(queue)
        wait_until(lambda: _waits_at_queue(started), "the function waits at the queue", 20)
        assert started.scheduler is not None
        kill(started.scheduler)
        started.start_scheduler()
        wait_until(lambda: _waits_at_queue(started), "it waits again", 30)
        queue.put("after the restart")
        assert call.get(timeout=30 * TIMEOUT_FACTOR) == "after the restart"
    assert queue.get(block=False) is None


def _waits_at_queue(started: HandStarted) -> bool:
    status = started.python("-m", "fanout.cli.main", "status", "--json")
    return "queue 'durable'" in status.stdout


def test_a_get_with_a_time_limit_ends_in_time_without_a_scheduler(
    scheduler_and_workers: Callable[..., HandStarted],
) -> None:
    started = scheduler_and_workers(0)
    queue = fanout.Queue.from_name("durable", create_if_missing=True).hydrate()
    assert started.scheduler is not None
    kill(started.scheduler)
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.2)
    started.start_scheduler()
    queue.put("kept")
    assert queue.get() == "kept"


def test_an_ephemeral_queue_ends_with_its_scheduler_and_says_so(
    scheduler_and_workers: Callable[..., HandStarted],
) -> None:
    started = scheduler_and_workers(0)
    with fanout.Queue.ephemeral() as queue:
        queue.put(1)
        assert started.scheduler is not None
        kill(started.scheduler)
        started.start_scheduler()
        with pytest.raises(exceptions.NotFoundError, match="ended with its client or with the sch"):
            queue.get()


CONSUMER = """
import sys, fanout
queue = fanout.Queue.from_name("work")
for value in iter(queue.get, None):
    print(value, flush=True)
"""


def test_no_item_is_lost_or_doubled_by_consumers_and_a_scheduler_that_are_killed(
    scheduler_and_workers: Callable[..., HandStarted], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Consumers print each item when they have it. The scheduler is killed while they consume;
    then one consumer that waits for an item is killed, and none is lost to it."""
    started = scheduler_and_workers(0)
    queue = fanout.Queue.from_name("work", create_if_missing=True).hydrate()
    variables = environment(FANOUT_URL=started.client_join)
    paths = [tmp_path / f"out-{number}" for number in range(3)]
    consumers = []
    for path in paths:
        with path.open("wb") as out:
            arguments = [sys.executable, "-c", CONSUMER]
            consumers.append(subprocess.Popen(arguments, stdout=out, env=variables))

    def seen() -> list[int]:
        return [int(line) for path in paths for line in path.read_text().split()]

    try:
        with ThreadPoolExecutor(1) as pool:
            putting = pool.submit(lambda: [queue.put(number) for number in range(400)])
            # One that is not connected yet when the scheduler is killed would give up.
            wait_until(lambda: all(map(os.path.getsize, paths)), "consumers consume", 30)
            wait_until(lambda: len(seen()) > 100, "consumers consume", 30)
            assert started.scheduler is not None
            kill(started.scheduler)
            started.start_scheduler()
            putting.result(60 * TIMEOUT_FACTOR)
        wait_until(lambda: len(seen()) >= 400, lambda: f"all are consumed: {len(seen())}", 30)
        kill(consumers.pop())
        queue.put_many(list(range(400, 420)))
        wait_until(lambda: len(seen()) >= 420, lambda: f"all are consumed: {len(seen())}", 60)
        assert Counter(seen()) == Counter(range(420))
        queue.put_many([None, None])
        for consumer in consumers:
            assert consumer.wait(20 * TIMEOUT_FACTOR) == 0
    finally:
        for consumer in consumers:
            kill(consumer)


def test_no_warning_comes_from_using_a_queue(queue: fanout.Queue) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queue.put(1)
        assert queue.get() == 1
