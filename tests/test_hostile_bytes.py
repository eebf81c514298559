"""Mutated conversations: whoever sends them is told why and closed, and nothing else happens.

Real frames of every kind, spoilt in seeded ways. `FANOUT_TEST_FULL=1` sends a million of them; a
failure names its seed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator

import pytest

from fanout.exceptions import (
    AuthError,
    ConnectionError,
    Error,
    PermissionDeniedError,
    ProtocolError,
    VersionError,
)
from fanout.protocol import frames
from fanout.protocol import messages as m
from fanout.protocol.blob_store import MemoryBlobStore
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.connection import Connection, State
from fanout.protocol.join import Token
from tests.hostile_kit import (
    CLIENT,
    WORKER,
    Mutator,
    decoded,
    dialling,
    encoded,
    handshake_of,
    listening,
    open_listening,
    outgoing,
    sample,
)

IS_FULL = os.environ.get("FANOUT_TEST_FULL") == "1"
#: Together about 200,000 frames, or a million.
SCALE = 5 if IS_FULL else 1
FRAME_COUNT = 140_000 * SCALE
HANDSHAKE_COUNT = 10_000 * SCALE
CHALLENGE_COUNT = 5_000 * SCALE
#: Of up to 14 frames each.
TRANSFER_COUNT = 5_000 * SCALE

#: What a peer may be closed with; anything else is a bug of ours.
REFUSALS = (ProtocolError, AuthError, VersionError, PermissionDeniedError)


def _feed(connection: Connection, mutator: Mutator, data: bytes) -> Error | None:
    """Let a connection read; what it closes with, if it does."""
    for piece in mutator.pieces(data):
        try:
            received = connection.receive_data(piece)
        except REFUSALS as error:
            assert connection.state is State.CLOSING
            return error
        assert all(type(message) in connection.handshake.allowed for message in received)
    return None


def _check_goodbye(connection: Connection, error: Error) -> None:
    """The peer was told the reason, and that is the last thing that it is sent."""
    goodbye = decoded(outgoing(connection))[-1]
    assert isinstance(goodbye, m.Goodbye)
    assert goodbye.text == str(error)
    assert connection.receive_data(b"more") == []
    assert outgoing(connection) == b""


@pytest.mark.parametrize("token", [CLIENT, WORKER], ids=["client", "worker"])
def test_a_mutated_frame_is_taken_or_closes_its_connection_with_the_reason(
    token: Token,
) -> None:
    hello = handshake_of(token)
    kinds = sorted(m.KINDS.values(), key=lambda cls: cls.KIND)
    good = [encoded(sample(cls)) for cls in kinds]
    ends: Counter[str] = Counter()
    connection: Connection | None = None
    for seed in range(FRAME_COUNT // 2):
        mutator = Mutator(seed)
        if connection is None:
            connection = open_listening(hello)
        data = mutator.random.choice(good)
        try:
            error = _feed(connection, mutator, mutator.spoil(data))
        except BaseException as bug:
            raise AssertionError(f"seed {seed}: {bug!r}") from bug
        if error is not None:
            _check_goodbye(connection, error)
        # A cut frame waits for its rest, which the next one is then taken for.
        ends["taken" if error is None else str(error).split()[0]] += 1
        if error is not None or connection.state is not State.OPEN or seed % 7 == 0:
            connection = None
    assert ends["taken"] > 1000
    assert sum(ends.values()) - ends["taken"] > 1000
    assert len(ends) > 20, ends


def test_a_stream_that_ends_says_whether_that_was_in_the_middle_of_a_frame() -> None:
    hello = handshake_of(CLIENT)
    sent = [encoded(sample(cls)) for cls in (m.Heartbeat, m.Inputs, m.AskStatus)]
    stream, whole = b"".join(sent), {0, *itertools.accumulate(map(len, sent))}
    for cut in range(len(stream) + 1):
        for size in (1, cut or 1):
            connection = open_listening(hello)
            for at in range(0, cut, size):
                connection.receive_data(stream[at : min(cut, at + size)])
            connection.receive_end()
            assert isinstance(connection.error, ConnectionError)
            end = "" if cut in whole else ", in the middle of a frame"
            assert str(connection.error) == f"the peer went away without a goodbye{end}", cut


def test_a_mutated_handshake_lets_nobody_in() -> None:
    """Only what is the same message lets somebody in: nothing of the proof can be changed."""
    conversations = {token.role: handshake_of(token) for token in (CLIENT, WORKER)}
    let_in = 0
    for seed in range(HANDSHAKE_COUNT):
        mutator = Mutator(seed)
        role = mutator.random.choice(["client", "worker"])
        sent = list(conversations[role])
        spoilt = mutator.random.randrange(2)
        sent[spoilt] = mutator.spoil(sent[spoilt])
        connection = listening()
        try:
            error = next((e for data in sent if (e := _feed(connection, mutator, data))), None)
        except BaseException as bug:
            raise AssertionError(f"seed {seed}: {bug!r}") from bug
        if error is not None:
            _check_goodbye(connection, error)
        if connection.state is State.OPEN:
            let_in += 1
            # The fields under the proof are as they were; `info` is not among them.
            hello = decoded(sent[0])[0]
            assert isinstance(hello, m.Hello)
            assert (hello.role, hello.session_id) == (role, bytes(16)), f"seed {seed}"
    assert let_in < HANDSHAKE_COUNT // 5


def test_a_mutated_listener_does_not_get_the_diallers_proof() -> None:
    for seed in range(CHALLENGE_COUNT):
        mutator = Mutator(seed)
        ours, theirs = dialling(CLIENT), listening()
        theirs.receive_data(outgoing(ours))
        challenge = outgoing(theirs)
        spoilt = mutator.spoil(challenge)
        error = _feed(ours, mutator, spoilt)
        answers = decoded(outgoing(ours))
        if any(isinstance(answer, m.Proof) for answer in answers):
            # It was the true challenge, with something behind it perhaps.
            assert spoilt.startswith(challenge), f"seed {seed}"
        assert error is None or answers


def _transfer(content: bytes, blob_id: bytes) -> Iterator[m.Message]:
    yield m.BlobOffer(blob_id, len(content))
    size = max(1, len(content) // 4)
    for offset in range(0, len(content), size):
        yield m.BlobPart(blob_id, offset, content[offset : offset + size])
    yield m.BlobHeld(blob_id)
    yield m.BlobRefused(blob_id, False, "the disk is full")
    yield m.BlobCredit(blob_id, 1 << 20)


def test_no_mutated_transfer_brings_in_a_blob_that_is_not_its_name() -> None:
    completed_count = refused_count = 0
    content = bytes(range(256)) * 40
    blob_id = hashlib.sha256(content).digest()
    other = b"o" * 32
    allowed = m.BLOB_KINDS
    for seed in range(TRANSFER_COUNT):
        mutator = Mutator(seed)
        store = MemoryBlobStore()
        completed: list[bytes] = []
        exchange = BlobExchange(
            store,
            lambda message: None,
            lambda parts: None,
            completed.append,
            lambda delay_s, callback: None,
        )
        conversation = [*_transfer(content, blob_id), *_transfer(content[:100], other)]
        if mutator.random.random() < 0.5:
            mutator.random.shuffle(conversation)
        try:
            for message in conversation:
                data = encoded(message)
                if mutator.random.random() < 0.2:
                    data = mutator.spoil(data)
                for header, payload in frames.FrameReader().feed(data):
                    taken = m.decode(header, payload)
                    if type(taken) in allowed:
                        exchange.handle(taken)
        except ProtocolError:
            refused_count += 1
        except BaseException as bug:
            raise AssertionError(f"seed {seed}: {bug!r}") from bug
        for known in completed:
            assert hashlib.sha256(store.buffer(known)).digest() == known, f"seed {seed}"
        completed_count += len(completed)
        exchange.close()
    assert completed_count > 50
    assert refused_count > 500
