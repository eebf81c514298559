"""Blob stores and exchanges: two exchanges joined by a queue, and over a real connection."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanout.exceptions import ProtocolError, StorageError
from fanout.protocol import blobs, transport
from fanout.protocol import messages as m
from fanout.protocol.blob_store import (
    LARGE_SIZE_BYTES,
    BlobStore,
    BlobWriter,
    Buffer,
    FileBlobStore,
    MemoryBlobStore,
    blob_id_of,
)
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import Address, JoinString, Token
from fanout.protocol.transport import Transport

PART = m.BLOB_PART_SIZE_BYTES
SIZES = [0, 1, PART - 1, PART, PART + 1, 5 * PART + 123]


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return MemoryBlobStore() if request.param == "memory" else FileBlobStore(tmp_path / "blobs")


class End:
    """An exchange whose messages wait in a queue until the test carries them over."""

    def __init__(self, store: BlobStore, trusts_peer: bool = False) -> None:
        self.store = store
        self.queue: deque[m.Message] = deque()
        self.bulk: deque[Iterator[m.Message]] = deque()
        self.completed: list[bytes] = []
        self.failed: list[bytes] = []
        self.refused: list[str] = []
        self.doubted: list[bytes] = []
        self.delivered: list[bytes] = []
        self.later: list[Callable[[], None]] = []
        self.sent: list[m.Message] = []
        self.exchange = BlobExchange(
            store,
            self.queue.append,
            self.bulk.append,
            self.completed.append,
            lambda delay_s, callback: self.later.append(callback),
            failed=lambda blob_id, error: self.failed.append(blob_id),
            refused=lambda blob_id, text: self.refused.append(text),
            delivered=self.delivered.append,
            doubted=self.doubted.append,
            trusts_peer=trusts_peer,
        )

    def take(self) -> m.Message | None:
        """The next message: ordinary ones first, then a part of each source in turn."""
        message: m.Message | None = None
        if self.queue:
            message = self.queue.popleft()
        while message is None and self.bulk:
            source = self.bulk.popleft()
            message = next(source, None)
            if message is not None:
                self.bulk.append(source)
        if message is not None:
            self.sent.append(message)
        return message


def carry(source: End, target: End) -> None:
    """Carry one message, which is there."""
    message = source.take()
    assert message is not None
    target.exchange.handle(message)


def run(left: End, right: End, has_others: bool = False) -> None:
    """Carry messages both ways until there are none.

    Args:
        has_others: some are not about transfers, but for somebody else.
    """
    is_moving = True
    while is_moving:
        is_moving = False
        for source, target in ((left, right), (right, left)):
            message = source.take()
            if message is not None:
                is_moving = True
                assert target.exchange.handle(message) or has_others


def kinds(end: End) -> list[str]:
    return [type(message).__name__ for message in end.sent]


def sender_of(*contents: bytes) -> tuple[End, list[bytes]]:
    end = End(MemoryBlobStore())
    ids = [blob_id_of(content) for content in contents]
    for blob_id, content in zip(ids, contents, strict=True):
        end.store.put(blob_id, content)
    return end, ids


# --- stores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_store_gives_back_what_was_put(store: BlobStore, size: int) -> None:
    content = os.urandom(size)
    blob_id = blob_id_of(content)
    assert not store.has(blob_id)
    with pytest.raises(KeyError):
        store.buffer(blob_id)
    with pytest.raises(KeyError):
        store.size(blob_id)
    for _ in range(2):
        store.put(blob_id, content)
    assert store.has(blob_id)
    assert store.size(blob_id) == size
    assert store.buffer(blob_id) == content
    assert store.buffer(blob_id).readonly


def test_a_large_file_is_gone_at_once_though_it_is_freed_in_a_thread(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    store.put(b"l" * 32, bytes(LARGE_SIZE_BYTES))
    store.drop(b"l" * 32)
    assert not store.has(b"l" * 32)
    assert list(tmp_path.iterdir()) == []
    store.drop(b"l" * 32)


def test_a_buffer_outlives_the_drop_of_its_blob(store: BlobStore) -> None:
    content = os.urandom(100_000)
    blob_id = blob_id_of(content)
    store.put(blob_id, content)
    buffer = store.buffer(blob_id)
    for _ in range(2):
        store.drop(blob_id)
    assert not store.has(blob_id)
    assert buffer == content


def test_a_blob_is_invisible_until_its_writer_has_finished(store: BlobStore) -> None:
    blob_id = blob_id_of(b"one two")
    writer = store.open_writer(blob_id)
    writer.write(b"one ")
    assert not store.has(blob_id)
    writer.write(memoryview(b"two"))
    writer.finish()
    writer.abort()
    assert bytes(store.buffer(blob_id)) == b"one two"


def test_an_aborted_writer_leaves_nothing(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    writer = store.open_writer(bytes(32))
    writer.write(b"half")
    for _ in range(2):
        writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_blob_do_not_meet(store: BlobStore) -> None:
    blob_id = blob_id_of(b"same")
    first, second = store.open_writer(blob_id), store.open_writer(blob_id)
    first.write(b"sa")
    second.write(b"same")
    second.finish()
    first.write(b"me")
    first.finish()
    assert bytes(store.buffer(blob_id)) == b"same"


def test_files_are_private_and_drafts_of_an_earlier_life_can_be_removed(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path / "blobs")
    blob_id = blob_id_of(b"kept")
    store.put(blob_id, b"kept")
    writer = store.open_writer(bytes(32))
    writer.write(b"half")
    assert len(list(store.folder.iterdir())) == 2
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert store.path(blob_id).stat().st_mode & 0o777 == 0o600
    store.remove_drafts()
    assert store.ids() == [blob_id]
    writer.abort()


def test_writing_to_a_private_buffer_changes_nobody_elses_content(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    blob_id = blob_id_of(b"content")
    store.put(blob_id, b"content")
    mine, other = store.private_buffer(blob_id), store.private_buffer(blob_id)
    mine[0] = ord("C")
    assert bytes(mine) == b"Content"
    assert bytes(other) == bytes(store.buffer(blob_id)) == b"content"


def test_a_disk_that_takes_no_more_is_a_storage_error(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path / "blobs")
    store.folder.rmdir()
    with pytest.raises(StorageError, match="cannot write a blob"):
        store.put(bytes(32), b"content")


# --- exchanges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_blob_arrives_whole_and_is_announced_once(store: BlobStore, size: int) -> None:
    content = os.urandom(size)
    sender, (blob_id,) = sender_of(content)
    receiver = End(store)
    sender.exchange.offer(blob_id)
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    assert receiver.completed == [blob_id]
    assert store.buffer(blob_id) == content
    part_count = max(1, -(-size // PART))
    assert kinds(sender) == ["BlobOffer"] + ["BlobPart"] * part_count
    assert set(kinds(receiver)) <= {"BlobWanted", "BlobCredit", "BlobHeld"}
    assert sender.delivered == [blob_id]


def test_a_blob_that_is_there_is_not_sent_again(store: BlobStore) -> None:
    sender, (blob_id,) = sender_of(b"content")
    receiver = End(store)
    store.put(blob_id, b"content")
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    assert kinds(receiver) == ["BlobHeld"]
    assert receiver.completed == []


def test_offering_during_a_transfer_does_nothing_and_after_a_drop_sends_again() -> None:
    sender, (blob_id,) = sender_of(bytes(4 * PART))
    receiver = End(MemoryBlobStore())
    sender.exchange.offer(blob_id)
    for source, target in ((sender, receiver), (receiver, sender), (sender, receiver)):
        carry(source, target)
    sender.exchange.offer(blob_id)
    assert not sender.queue
    run(sender, receiver)
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    assert kinds(receiver) == ["BlobWanted", "BlobHeld", "BlobHeld"]
    receiver.store.drop(blob_id)
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    assert receiver.completed == [blob_id, blob_id]


def test_a_blob_dropped_after_the_offer_is_still_sent() -> None:
    sender, (blob_id,) = sender_of(b"content")
    receiver = End(MemoryBlobStore())
    sender.exchange.offer(blob_id)
    sender.store.drop(blob_id)
    run(sender, receiver)
    assert receiver.completed == [blob_id]
    with pytest.raises(KeyError):
        sender.exchange.offer(blob_id)


def test_blobs_of_both_directions_and_many_at_once_all_arrive(store: BlobStore) -> None:
    contents = [os.urandom(3 * PART + number) for number in range(40)]
    left, ids = sender_of(*contents[:35])
    right = End(store)
    for content in contents[35:]:
        store.put(blob_id_of(content), content)
        right.exchange.offer(blob_id_of(content))
    for blob_id in ids:
        left.exchange.offer(blob_id)
    run(left, right)
    assert sorted(right.completed) == sorted(ids)
    assert sorted(left.completed) == sorted(map(blob_id_of, contents[35:]))


def test_a_receiver_wants_few_blobs_at_a_time(tmp_path: Path) -> None:
    receiver = End(FileBlobStore(tmp_path))
    for number in range(100):
        receiver.exchange.handle(m.BlobOffer(bytes([number]) * 32, 10))
    assert len(receiver.queue) == blobs.INCOMING_COUNT_MAX
    assert list(tmp_path.iterdir()) == [], "an offer alone must not make a file"


def test_offers_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "WAITING_COUNT_MAX", 3)
    receiver = End(MemoryBlobStore())
    for number in range(blobs.INCOMING_COUNT_MAX + 3):
        receiver.exchange.handle(m.BlobOffer(bytes([number]) * 32, 10))
    with pytest.raises(ProtocolError, match="more than 3 blobs"):
        receiver.exchange.handle(m.BlobOffer(b"x" * 32, 10))


def test_one_who_waits_is_told_held_when_the_blob_came_another_way() -> None:
    receiver = End(MemoryBlobStore())
    sender, ids = sender_of(*(bytes([number]) for number in range(blobs.INCOMING_COUNT_MAX + 1)))
    for blob_id in ids:
        sender.exchange.offer(blob_id)
    while sender.queue:
        message = sender.take()
        assert message is not None
        receiver.exchange.handle(message)
    receiver.store.put(ids[-1], bytes([blobs.INCOMING_COUNT_MAX]))
    run(sender, receiver)
    assert kinds(receiver).count("BlobHeld") == len(ids)
    assert sorted(receiver.completed) == sorted(ids), "what waits for it goes on"


class FullStore(MemoryBlobStore):
    """A store whose disk has room for `room` bytes of each blob."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def open_writer(self, blob_id: bytes, size_bytes: int = 0) -> BlobWriter:
        return _FullWriter(super().open_writer(blob_id, size_bytes), self)


class _FullWriter:
    def __init__(self, writer: BlobWriter, store: FullStore) -> None:
        self._writer = writer
        self._store = store
        self._size = 0
        self.abort = writer.abort

    def write(self, data: Buffer) -> None:
        self._size += len(data)
        self._check()
        self._writer.write(data)

    def finish(self) -> None:
        self._check()
        self._writer.finish()

    def _check(self) -> None:
        if self._size > self._store.room:
            raise StorageError("the disk is full")


@pytest.mark.parametrize("room", [0, PART, 5 * PART - 1])
def test_a_blob_that_is_refused_is_offered_again_until_there_is_room(room: int) -> None:
    content = os.urandom(5 * PART)
    sender, (blob_id, other_id) = sender_of(content, bytes(10))
    store = FullStore(room)
    receiver = End(store)
    for _ in range(3):
        sender.exchange.offer(blob_id)
        run(sender, receiver)
        assert not store.has(blob_id)
        assert (len(sender.later), sender.delivered) == (1, [])
        sender.later.pop()()
        assert sender.queue, "it is offered again"
    assert receiver.failed == [blob_id] * 3
    store.room = 5 * PART
    sender.exchange.offer(other_id)
    run(sender, receiver)
    assert receiver.completed == sender.delivered
    assert sorted(receiver.completed) == sorted([blob_id, other_id])
    assert store.buffer(blob_id) == content


def test_a_blob_that_is_withdrawn_on_its_way_is_forgotten_when_it_has_arrived() -> None:
    sender, (blob_id,) = sender_of(bytes(4 * PART))
    receiver = End(MemoryBlobStore())
    sender.exchange.offer(blob_id)
    for source, target in ((sender, receiver), (receiver, sender), (sender, receiver)):
        carry(source, target)
    sender.exchange.withdraw(blob_id)
    assert not sender.queue
    run(sender, receiver, has_others=True)
    assert receiver.completed == [blob_id]
    assert sender.sent[-1] == m.BlobDrop(blob_id)


def test_a_blob_that_is_offered_again_is_not_withdrawn() -> None:
    sender, (blob_id,) = sender_of(bytes(4 * PART))
    receiver = End(MemoryBlobStore())
    sender.exchange.offer(blob_id)
    sender.exchange.withdraw(blob_id)
    sender.exchange.offer(blob_id)
    run(sender, receiver, has_others=True)
    assert "BlobDrop" not in kinds(sender)
    sender.exchange.withdraw(blob_id)
    assert sender.take() == m.BlobDrop(blob_id)


def test_a_refused_blob_that_is_withdrawn_is_not_offered_again_by_itself() -> None:
    sender, (blob_id,) = sender_of(bytes(PART))
    receiver = End(FullStore(0))
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    assert sender.refused == ["the disk is full"]
    sender.exchange.withdraw(blob_id)
    run(sender, receiver, has_others=True)
    sender.later.pop()()
    assert not sender.queue


def test_an_answer_to_the_first_of_two_rounds_comes_before_that_to_the_second() -> None:
    """All parts have left when it is offered again; the first round ends with a refusal."""
    content = os.urandom(3 * PART)
    sender, (blob_id,) = sender_of(content)
    store = FullStore(PART)
    receiver = End(store)
    sender.exchange.offer(blob_id)
    for source, target in ((sender, receiver), (receiver, sender)):
        carry(source, target)
    parts = [sender.take() for _ in range(3)]
    sender.exchange.offer(blob_id)
    for part in parts:
        assert part is not None
        receiver.exchange.handle(part)
    store.room = 3 * PART
    run(sender, receiver)
    assert kinds(receiver) == ["BlobWanted", "BlobRefused", "BlobWanted", "BlobHeld"]
    assert sender.delivered == [blob_id]
    assert store.buffer(blob_id) == content


@pytest.mark.parametrize("size", [PART, 3 * PART])
def test_what_arrives_broken_is_told_to_one_who_is_trusted_and_may_come_again(size: int) -> None:
    content = os.urandom(size)
    blob_id = blob_id_of(content)
    sender = End(MemoryBlobStore())
    sender.store.put(blob_id, content[:-1] + bytes([content[-1] ^ 1]))
    receiver = End(MemoryBlobStore(), trusts_peer=True)
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    assert (sender.doubted, receiver.completed, sender.later) == ([blob_id], [], [])
    sender.store.drop(blob_id)
    sender.store.put(blob_id, content)
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    assert receiver.completed == sender.delivered == [blob_id]


def test_a_blob_for_which_there_is_no_room_is_refused_before_it_is_written(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    with pytest.raises(StorageError, match="No space left"):
        store.open_writer(bytes(32), 1 << 60)
    assert not list(tmp_path.iterdir())


def test_a_file_is_found_to_be_sound_changed_or_gone(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    blob_id = blob_id_of(b"content")
    assert store.inspect(blob_id) == "gone"
    store.put(blob_id, b"content")
    assert store.inspect(blob_id) == "sound"
    store.path(blob_id).write_bytes(b"CONTENT")
    assert store.inspect(blob_id) == "changed"
    assert not store.has(blob_id)
    store.path(blob_id).mkdir()
    assert store.inspect(blob_id) == "unknown"


def test_a_refused_blob_that_nobody_needs_is_not_offered_again() -> None:
    sender, (blob_id,) = sender_of(bytes(PART))
    receiver = End(FullStore(0))
    sender.exchange.offer(blob_id)
    run(sender, receiver)
    sender.store.drop(blob_id)
    sender.later.pop()()
    assert not sender.queue


def test_closing_leaves_no_part_behind(tmp_path: Path) -> None:
    sender, (blob_id,) = sender_of(bytes(3 * PART))
    receiver = End(FileBlobStore(tmp_path))
    sender.exchange.offer(blob_id)
    for source, target in ((sender, receiver), (receiver, sender), (sender, receiver)):
        carry(source, target)
    assert len(list(tmp_path.iterdir())) == 1
    receiver.exchange.close()
    sender.exchange.close()
    assert list(tmp_path.iterdir()) == []
    assert sender.take() is None
    assert receiver.completed == []


def test_other_messages_are_left_to_others() -> None:
    assert not End(MemoryBlobStore()).exchange.handle(m.Heartbeat(1))
    assert not End(MemoryBlobStore()).exchange.handle(m.BlobDrop(bytes(32)))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (m.BlobPart(b"o" * 32, 0, b"x"), "not wanted"),
        (m.BlobWanted(b"o" * 32), "not offered"),
        (m.BlobHeld(b"o" * 32), "not offered"),
        (m.BlobRefused(b"o" * 32, False, "full"), "not sent"),
        (m.BlobPart(b"w" * 32, 1, b"x"), "at 1 instead of 0"),
        (m.BlobPart(b"w" * 32, 0, b"x" * 11), "announced with 10 bytes"),
        (m.BlobPart(b"w" * 32, 0, b""), "announced with 10 bytes"),
        (m.BlobPart(b"w" * 32, 0, b"x" * 10), "another digest"),
    ],
)
def test_a_peer_that_breaks_the_rules_is_refused(
    tmp_path: Path, message: m.Message, text: str
) -> None:
    receiver = End(FileBlobStore(tmp_path))
    receiver.exchange.handle(m.BlobOffer(b"w" * 32, 10))
    with pytest.raises(ProtocolError, match=text):
        receiver.exchange.handle(message)
    receiver.exchange.close()
    assert receiver.completed == []
    assert list(tmp_path.iterdir()) == []


ids = st.sampled_from([b"a" * 32, b"b" * 32, blob_id_of(b""), blob_id_of(b"xx")])
hostile = st.one_of(
    st.builds(m.BlobOffer, ids, st.integers(0, 4)),
    st.builds(m.BlobPart, ids, st.integers(0, 4), st.sampled_from([b"", b"x", b"xx"])),
    st.builds(m.BlobWanted, ids),
    st.builds(m.BlobHeld, ids),
    st.builds(m.BlobRefused, ids, st.booleans(), st.just("full")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile, max_size=30))
def test_no_order_of_messages_brings_in_a_blob_with_another_digest(
    messages: list[m.Message],
) -> None:
    receiver = End(MemoryBlobStore())
    for message in messages:
        try:
            receiver.exchange.handle(message)
        except ProtocolError:
            break
    for blob_id in receiver.completed:
        assert blob_id_of(receiver.store.buffer(blob_id)) == blob_id


# --- over a connection ----------------------------------------------------------------------------


class Exchanging:
    """A handler that exchanges blobs and counts all else."""

    def __init__(self, own: Transport, store: BlobStore) -> None:
        self.transport = own
        self.completed: list[bytes] = []
        self.other_count = 0
        self.changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.exchange = BlobExchange(
            store, own.send, own.send_bulk, self._complete, loop.call_later
        )

    def _complete(self, blob_id: bytes) -> None:
        self.completed.append(blob_id)
        self.changed.set()

    def messages_received(self, messages: list[m.Message]) -> None:
        for message in messages:
            self.other_count += not self.exchange.handle(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.exchange.close()

    def writable_changed(self, is_writable: bool) -> None:
        pass


async def test_blobs_cross_a_connection_into_files_both_ways(tmp_path: Path) -> None:
    stores = [FileBlobStore(tmp_path / "listener"), FileBlobStore(tmp_path / "dialler")]
    token = Token.new("client")
    ends: list[Exchanging] = []

    def handler_of(own: Transport, store: BlobStore) -> Exchanging:
        ends.append(Exchanging(own, store))
        return ends[-1]

    server = await transport.serve(
        Address("127.0.0.1"),
        tokens={token.token_id: token}.get,
        welcome=lambda hello, role: m.Welcome(1, {}),
        handler=lambda own, hello, role: handler_of(own, stores[0]),
        tls=None,
    )
    join = JoinString.of(token, Address("127.0.0.1", server.port))
    await transport.connect(
        join,
        role="client",
        session_id=bytes(16),
        info={},
        handler=lambda own: handler_of(own, stores[1]),
    )
    sent: dict[int, set[bytes]] = {0: set(), 1: set()}
    for number, store in enumerate(stores):
        for size in (0, 10, 12 << 20, 3 << 20):
            content = os.urandom(size)
            store.put(blob_id_of(content), content)
            sent[number].add(blob_id_of(content))
    for number, end in enumerate(ends):
        for blob_id in sent[number]:
            end.exchange.offer(blob_id)
    async with asyncio.timeout(10):
        for number, end in enumerate(ends):
            # The empty blob is on both sides already.
            while len(end.completed) < 3:
                end.changed.clear()
                await end.changed.wait()
            for blob_id in sent[1 - number]:
                assert blob_id_of(stores[number].buffer(blob_id)) == blob_id
        server.close()
        await server.wait_closed()
        await ends[1].transport.wait_closed()
    for store in stores:
        assert all(len(name) == 64 for name in os.listdir(store.folder)), "a part is left"


def test_little_of_a_blob_is_under_way_until_the_receiver_allows_more() -> None:
    sender, (blob_id,) = sender_of(bytes(4 * m.BLOB_CREDIT_BYTES))
    sender.exchange.offer(blob_id)
    sender.take()
    sender.exchange.handle(m.BlobWanted(blob_id))
    parts = 0
    while sender.take() is not None:
        parts += 1
    assert parts * PART == m.BLOB_CREDIT_BYTES
    sender.exchange.handle(m.BlobCredit(blob_id, m.BLOB_CREDIT_BYTES + PART))
    assert sender.take() is not None
    assert sender.take() is None


def test_a_part_beyond_the_credit_is_refused() -> None:
    receiver = End(MemoryBlobStore())
    content = bytes(2 * m.BLOB_CREDIT_BYTES)
    blob_id = blob_id_of(content)
    receiver.exchange.handle(m.BlobOffer(blob_id, len(content)))
    with pytest.raises(ProtocolError, match="credit"):
        receiver.exchange.handle(m.BlobPart(blob_id, 0, content))
