"""A scheduler whose blob files change, or of which peers only say so."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanout.protocol import messages as m
from tests.server_kit import FUNCTION, Daemon, Wire, define, dial, dial_worker, submit

CODE = b"the code of a function " * 5000
OTHER_CALL = b"d" * 16
BLOB = hashlib.sha256(CODE).digest()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "home")
    yield made.start()
    made.end(signal.SIGKILL)


async def bring_code(client: Wire) -> None:
    client.blobs.put(BLOB, CODE)
    client.send(*define(BLOB))
    client.exchange.offer(BLOB)


async def refuse(worker: Wire) -> None:
    """Take the offer, and say that what came is broken."""
    assert await worker.take(m.BlobOffer) == m.BlobOffer(BLOB, len(CODE))
    worker.send(m.BlobWanted(BLOB))
    await worker.take(m.BlobPart)
    worker.send(m.BlobRefused(BLOB, True, "it is broken"))


async def test_who_says_twice_that_a_sound_blob_is_broken_is_thrown_out(daemon: Daemon) -> None:
    client = await dial(daemon.address)
    worker = await dial_worker(daemon.address)
    worker.takes_blobs = False
    await bring_code(client)
    client.send(*submit())
    await worker.take(m.StartContainer)
    await refuse(worker)
    await refuse(worker)
    goodbye = await worker.take(m.Goodbye)
    assert (goodbye.code, "arrived broken twice" in goodbye.text) == ("protocol", True)
    assert (daemon.home / "blobs" / BLOB.hex()).read_bytes() == CODE
    # Its client sees nothing of it, and another worker gets the code.
    other = await dial_worker(daemon.address, number=2)
    start = await other.take(m.StartContainer)
    assert start.function_id == FUNCTION
    await other.until(lambda: other.blobs.has(BLOB), "the code")
    assert not client.lost
    await client.close()
    await other.close()


async def test_code_that_changed_on_disk_is_brought_again_by_its_client(daemon: Daemon) -> None:
    session = b"s" * 16
    client = await dial(daemon.address, session=session)
    worker = await dial_worker(daemon.address)
    worker.takes_blobs = False
    await bring_code(client)
    await client.until_status(lambda status: bool(status["functions"]))
    path = daemon.home / "blobs" / BLOB.hex()
    await client.until(path.exists, "the file of the code")
    path.write_bytes(CODE.upper())
    client.send(*submit())
    await refuse(worker)
    failed = await client.take(m.CallFailed)
    assert b"could not keep the code of f: its file" in bytes(failed.payload)
    assert (await client.take(m.Goodbye)).code == "store"
    assert not path.exists()
    # As the library does it: it comes again, and says all that must be true over there.
    again = await dial(daemon.address, session=session)
    await bring_code(again)
    lengths = (3).to_bytes(4, "little")
    again.send(
        m.OpenCall(OTHER_CALL, FUNCTION, False, True, None),
        m.Inputs(OTHER_CALL, 0, lengths, [], b"abc"),
        m.SealCall(OTHER_CALL, 1),
    )
    worker.takes_blobs = True
    await worker.until(lambda: worker.blobs.has(BLOB), "the code")
    assert bytes(worker.blobs.buffer(BLOB)) == CODE
    await again.close()
    await worker.close()
