"""What docs and design promise of containers, where it is easy to lose: outputs too large for the
way that small ones take, the time that code has to stop, and how plain a sync container is."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from fanout.protocol.blobs import FileBlobStore, blob_id_of
from fanout.serialization import decode_value
from fanout_worker import shared
from tests.conftest import poll_until
from tests.worker_kit import Kit, containers, lease_of, let_pass

HEAD = "import asyncio, os, signal, threading, time\n"
KINDS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])

# --- large outputs leave before the next input starts ---------------------------------------------

#: Over what is sure of a place in the ring, but three find one there if nothing else does; over
#: half of the ring, so the second goes through the socket if nobody reads; and a file.
RING_SIZE_BYTES, FRAME_SIZE_BYTES, BLOB_SIZE_BYTES = 300_000, 700_000, 3 << 20
SIZES = [RING_SIZE_BYTES, FRAME_SIZE_BYTES, BLOB_SIZE_BYTES]
SIZE_NAMES = {RING_SIZE_BYTES: "ring", FRAME_SIZE_BYTES: "frame", BLOB_SIZE_BYTES: "blob"}
BY_SIZE = pytest.mark.parametrize("size", SIZES, ids=SIZE_NAMES.get)
assert shared.ENTRY_SIZE_BYTES_MAX < RING_SIZE_BYTES < shared.RING_SIZE_BYTES / 3
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


@pytest.mark.parametrize("size", [RING_SIZE_BYTES, BLOB_SIZE_BYTES], ids=SIZE_NAMES.get)
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
