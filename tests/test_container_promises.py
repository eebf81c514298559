"""What is promised of containers, where it is easy to lose: outputs too large for the
way that small ones take, the time that code has to stop, and how plain a sync container is."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from fanout.protocol.blob_store import FileBlobStore, blob_id_of
from fanout.serialization import decode_value
from fanout_worker import shared
from tests.conftest import TIMEOUT_FACTOR, poll_until
from tests.worker_kit import Kit, containers, lease_of, let_pass

HEAD = "import asyncio, os, signal, threading, time\n"
KINDS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])

# --- large outputs leave before the next input starts ---------------------------------------------

#: Below a third of the ring, so that all three fit if nobody reads, though none of them would wait
#: for room; over half of it, so that the second goes through the socket then; and a file.
THIRD_SIZE_BYTES, FRAME_SIZE_BYTES, BLOB_SIZE_BYTES = 300_000, 700_000, 3 << 20
SIZES = [THIRD_SIZE_BYTES, FRAME_SIZE_BYTES, BLOB_SIZE_BYTES]
SIZE_NAMES = {THIRD_SIZE_BYTES: "ring", FRAME_SIZE_BYTES: "frame", BLOB_SIZE_BYTES: "blob"}
BY_SIZE = pytest.mark.parametrize("size", SIZES, ids=SIZE_NAMES.get)
assert shared.ENTRY_SIZE_BYTES_MAX < THIRD_SIZE_BYTES < shared.RING_SIZE_BYTES / 3
assert shared.RING_SIZE_BYTES / 2 < FRAME_SIZE_BYTES < shared.RING_SIZE_BYTES

#: Three inputs give large outputs; the next one ends the process, or never ends.
LAST = 3
LARGE = (
    HEAD
    + """
def f(x, size, folder):
    open(f"{folder}/begun-{x}", "w").close()
    if x == 3: END
    return bytearray([x]) * size
"""
)
DEATH = LARGE.replace("END", "os._exit(1)")
LOOP = LARGE.replace("END", "sum(range(10**11))")


def large(kit: Kit, size: int) -> list[tuple[Any, ...]]:
    """Five inputs of `LARGE`."""
    return [(x, size, str(kit.folder)) for x in range(5)]


def of_kind(code: str, is_async: bool) -> str:
    return code.replace("def f", "async def f") if is_async else code


def check_outputs(kit: Kit, size: int) -> None:
    """The three outputs are there, whole, and so are the blobs that they are made of."""
    assert sorted(kit.events.outputs) == list(range(LAST))
    store = FileBlobStore(kit.folder / "blobs")
    for x in range(LAST):
        status, data = kit.events.outputs[x]
        ids = kit.events.output_blobs.get(x, [])
        assert bool(ids) == (size == BLOB_SIZE_BYTES)
        held = [store.buffer(blob_id) for blob_id in ids]
        assert [blob_id_of(buffer) for buffer in held] == ids
        assert (status, decode_value(data, held)) == (0, bytearray([x]) * size)
    assert not list((kit.folder / "blobs").glob("*.part")), "a file that belongs to no output"


async def begins(kit: Kit, x: int) -> None:
    """Wait until input `x` has begun, by no help of what the container tells."""
    loop = asyncio.get_running_loop()
    exists = (kit.folder / f"begun-{x}").exists
    await loop.run_in_executor(None, poll_until, exists, f"input {x} begins")


@BY_SIZE
@KINDS
async def test_large_outputs_survive_the_death_of_the_input_behind_them(
    is_async: bool, size: int
) -> None:
    async with containers() as kit:
        container = await kit.start(of_kind(DEATH, is_async), is_async=is_async)
        container.give(lease_of(large(kit, size), lease_id=5))
        await kit.until(lambda: kit.events.exits, "the container died")
        assert kit.events.exits[1][:2] == ("crash", [(5, LAST)])
        check_outputs(kit, size)


@BY_SIZE
@KINDS
async def test_large_outputs_leave_while_the_input_behind_them_loops_in_c(
    is_async: bool, size: int
) -> None:
    async with containers() as kit:
        container = await kit.start(of_kind(LOOP, is_async), is_async=is_async)
        container.give(lease_of(large(kit, size)))
        await kit.outputs(LAST)
        await begins(kit, LAST)
        assert container.is_active
        assert not kit.events.exits
        check_outputs(kit, size)


@pytest.mark.parametrize("size", [THIRD_SIZE_BYTES, BLOB_SIZE_BYTES], ids=SIZE_NAMES.get)
@KINDS
async def test_large_outputs_that_nobody_has_read_survive_a_death(
    is_async: bool, size: int
) -> None:
    async with containers() as kit:
        container = await kit.start(of_kind(DEATH, is_async), is_async=is_async)
        container.set_paused(True)
        container.give(lease_of(large(kit, size), lease_id=5))
        await kit.until(lambda: kit.events.exits, "the container died")
        assert kit.events.exits[1][:2] == ("crash", [(5, LAST)])
        check_outputs(kit, size)


@KINDS
async def test_no_input_begins_while_a_large_output_before_it_cannot_leave(is_async: bool) -> None:
    async with containers() as kit:
        container = await kit.start(of_kind(DEATH, is_async), is_async=is_async)
        container.set_paused(True)
        container.give(lease_of(large(kit, FRAME_SIZE_BYTES), lease_id=5))
        await begins(kit, 1)
        await let_pass(0.3)
        assert not (kit.folder / "begun-2").exists()
        container.set_paused(False)
        await kit.until(lambda: kit.events.exits, "the container died")
        assert kit.events.exits[1][:2] == ("crash", [(5, LAST)])
        check_outputs(kit, FRAME_SIZE_BYTES)


async def test_large_outputs_survive_where_sockets_hold_more_than_is_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a host that is tuned for fast networks, as far as this one allows it."""
    make_pair = socket.socketpair

    def make_roomy_pair(*args: Any) -> tuple[socket.socket, socket.socket]:
        pair = make_pair(*args)
        for end in pair:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        return pair

    monkeypatch.setattr(socket, "socketpair", make_roomy_pair)
    async with containers() as kit:
        container = await kit.start(DEATH)
        container.set_paused(True)
        container.give(lease_of(large(kit, FRAME_SIZE_BYTES), lease_id=5))
        await begins(kit, 1)
        # As long as a busy daemon may take.
        await let_pass(0.3)
        container.set_paused(False)
        await kit.until(lambda: kit.events.exits, "the container died")
        assert kit.events.exits[1][:2] == ("crash", [(5, LAST)])
        check_outputs(kit, FRAME_SIZE_BYTES)


# --- who is asked to stop has its grace -----------------------------------------------------------

#: What it does after it was asked to stop takes longer than all that it had. Others wait for a
#: file, or say where they run.
CLEANS_UP = (
    HEAD
    + """
def f(what):
    if what == "too long":
        try:
            print("begun")
            time.sleep(100)
        finally:
            end = time.monotonic() + CLEANUP_S
            while time.monotonic() < end: time.sleep(0.01)
            print("saved")
    elif what != "pid":
        print("begun")
        while not os.path.exists(what): time.sleep(0.001)
    return os.getpid()
"""
)
LOOKS_UP = "while True: time.sleep(0.01)"
IN_ALL_WAYS = pytest.mark.parametrize(
    ("is_async", "max_inputs"),
    [(False, 1), (True, 1), (False, 2), (True, 2)],
    ids=["sync", "async", "threads", "tasks"],
)


def cleaning_up(is_async: bool, max_inputs: int, seconds: float) -> str:
    code = of_kind(CLEANS_UP, is_async).replace("CLEANUP_S", str(seconds))
    if is_async:
        return code.replace("time.sleep", "await asyncio.sleep")
    # No signal comes to a thread that is not the first one, so it has to look up by itself.
    return code if max_inputs == 1 else code.replace("time.sleep(100)", LOOKS_UP)


@IN_ALL_WAYS
async def test_code_that_is_stopped_may_clean_up_and_its_container_goes_on(
    is_async: bool, max_inputs: int
) -> None:
    async with containers(kill_grace_s=5.0 * TIMEOUT_FACTOR) as kit:
        code = cleaning_up(is_async, max_inputs, 1.0)
        container = await kit.start(code, is_async=is_async, max_inputs=max_inputs, timeout=0.3)
        container.give(lease_of([("too long",), ("pid",)]))
        await kit.outputs(2)
        assert kit.events.failure(0) == "timeout"
        assert kit.events.text() == "begun\nsaved\n"
        assert kit.events.value(1) == container.pid
        container.give(lease_of([("pid",)], lease_id=2, start=2))
        await kit.outputs(3)
        assert kit.events.value(2) == container.pid
        assert not kit.events.exits


@IN_ALL_WAYS
async def test_code_that_cleans_up_for_longer_than_its_grace_is_killed(
    is_async: bool, max_inputs: int
) -> None:
    async with containers(kill_grace_s=0.3) as kit:
        code = cleaning_up(is_async, max_inputs, 100)
        container = await kit.start(code, is_async=is_async, max_inputs=max_inputs, timeout=0.3)
        container.give(lease_of([("too long",)]))
        await kit.until(lambda: kit.events.exits, "the container was killed")
        assert kit.events.exits[1][:2] == ("timeout", [])
        assert kit.events.failure(0) == "timeout"
        assert kit.events.text() == "begun\n"


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "tasks"])
async def test_a_neighbour_runs_on_while_a_cancelled_input_cleans_up(is_async: bool) -> None:
    async with containers(kill_grace_s=5.0 * TIMEOUT_FACTOR) as kit:
        code = cleaning_up(is_async, 2, 0.5)
        container = await kit.start(code, is_async=is_async, max_inputs=2)
        path = kit.folder / "go"
        container.give(lease_of([("too long",)], lease_id=1))
        container.give(lease_of([(str(path),)], lease_id=2, start=1))
        await kit.until(lambda: kit.events.text() == "begun\n" * 2, "both run")
        container.lower_limit(1, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        assert kit.events.text().endswith("saved\n")
        path.touch()
        await kit.outputs(2)
        assert kit.events.value(1) == container.pid
        assert not kit.events.exits


# --- a sync container is a plain process ----------------------------------------------------------


async def test_a_sync_container_has_one_thread_and_no_event_loop() -> None:
    async with containers() as kit:
        code = """
def f(size):
    print("some text")
    files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    found = (
        len(os.listdir("/proc/self/task")),
        threading.current_thread() is threading.main_thread(),
        asyncio._get_running_loop(),
        any("eventpoll" in name for name in files),
    )
    return found, bytearray(size)
"""
        container = await kit.start(HEAD + code)
        # Of all sizes, as an output that is large takes another way.
        sizes = [0, 300_000, 900_000, 900_000, 0]
        container.give(lease_of([(size,) for size in sizes]))
        await kit.outputs(len(sizes))
        container.give(lease_of([(0,)], lease_id=2, start=len(sizes)))
        await kit.outputs(len(sizes) + 1)
        found = [kit.events.value(index)[0] for index in range(len(sizes) + 1)]
        assert set(found) == {(1, True, None, False)}


async def test_a_sync_function_may_run_an_event_loop_of_its_own() -> None:
    async with containers() as kit:
        code = """
async def work(seconds):
    await asyncio.sleep(seconds)
    return await asyncio.to_thread(threading.get_ident) != threading.get_ident()

def f(seconds): return asyncio.run(work(seconds))
"""
        container = await kit.start(HEAD + code, timeout=0.5)
        container.give(lease_of([(0,), (0.01,), (100,), (0,)]))
        await kit.outputs(4)
        assert [kit.events.value(index) for index in (0, 1, 3)] == [True] * 3
        assert kit.events.failure(2) == "timeout", "a loop that is not ours is stopped, too"
        assert not kit.events.exits


async def test_a_sync_function_may_set_a_signal_handler_and_a_timer() -> None:
    async with containers() as kit:
        code = """
def on_alarm(number, frame): raise TimeoutError(signal.Signals(number).name)

def f(is_set):
    if is_set:
        signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(100)
    except TimeoutError as error:
        return str(error)
"""
        container = await kit.start(HEAD + code, timeout=0.5)
        container.give(lease_of([(True,), (True,), (False,), (True,)]))
        await kit.outputs(4)
        assert [kit.events.value(index) for index in (0, 1, 3)] == ["SIGALRM"] * 3
        assert kit.events.failure(2) == "timeout", "the signal that stops it is ours still"
        assert not kit.events.exits
