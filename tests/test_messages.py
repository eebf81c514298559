"""Every message kind there and back, and everything that is not one refused by name."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanout.exceptions import ProtocolError
from fanout.protocol import frames
from fanout.protocol import messages as m
from tests.strategies import any_message, frame_of, messages_of

KINDS = sorted(m.KINDS.items())


def through_the_wire(message: m.Message) -> m.Message:
    (frame,) = frames.FrameReader().feed(frame_of(message))
    return m.decode(*frame)


@pytest.mark.parametrize(("kind", "cls"), KINDS, ids=[cls.__name__ for _, cls in KINDS])
def test_every_kind_survives_the_wire(kind: int, cls: type[m.Message]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(messages_of(cls))
    def check(message: m.Message) -> None:
        decoded = through_the_wire(message)
        assert type(decoded) is cls
        assert decoded == message
        assert frame_of(decoded) == frame_of(message)

    check()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=20))
def test_garbage_gives_a_protocol_error_and_nothing_else(header: bytes, payload: bytes) -> None:
    try:
        message = m.decode(header, payload)
    except ProtocolError:
        return
    # A few bytes can be a message by chance; then they are a whole one.
    assert through_the_wire(message) == message


@settings(max_examples=300, deadline=None)
@given(any_message(), st.data())
def test_a_mutated_frame_is_a_valid_message_or_a_protocol_error(
    message: m.Message, data: st.DataObject
) -> None:
    frame = bytearray(frame_of(message))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(frame) - 1))
        frame[position] = data.draw(st.integers(0, 255))
    reader = frames.FrameReader()
    try:
        decoded = [m.decode(*cut) for cut in reader.feed(bytes(frame))]
    except ProtocolError:
        return
    for one in decoded:
        assert through_the_wire(one) == one


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.none() | st.integers() | st.text() | st.binary()))
def test_fields_of_other_types_are_refused_by_name(
    entry: tuple[int, type[m.Message]], values: list[Any]
) -> None:
    kind, cls = entry
    try:
        header = msgpack.packb([kind, *values])
    except OverflowError:
        return
    text = f"{cls.__name__}"
    try:
        m.decode(header, b"")
    except ProtocolError as error:
        text = str(error)
    assert cls.__name__ in text


def test_nesting_is_bounded_at_every_depth_that_msgpack_itself_would_take() -> None:
    for depth in (m.NESTING_MAX - 1, m.NESTING_MAX, 500, 960, 1023, 1024, 5000):
        nested = b"\x91" * depth + b"\xc0"
        with pytest.raises(ProtocolError):
            m.decode(b"\x93\x05" + nested + b"\xa0", b"")
        in_map = m.encode_header(m.StatusInfo(1, {}))[:-1] + b"\x81\xa1a" + nested
        if depth < m.NESTING_MAX:
            assert isinstance(m.decode(in_map, b""), m.StatusInfo)
        else:
            with pytest.raises(ProtocolError):
                m.decode(in_map, b"")


@pytest.mark.parametrize(
    ("header", "payload", "text"),
    [
        ([], b"", "begins with a kind"),
        (["text"], b"", "begins with a kind"),
        ([True], b"", "begins with a kind"),
        ({"a": 1}, b"", "begins with a kind"),
        ([255], b"", "unknown message kind 255"),
        ([6], b"", "Heartbeat has 1 fields, the frame gave 0"),
        ([6, 1, 2], b"", "Heartbeat has 1 fields, the frame gave 2"),
        ([6, True], b"", "Heartbeat.sequence is not valid: True"),
        ([6, -1], b"", "Heartbeat.sequence is not valid: -1"),
        ([6, m.INDEX_MAX + 1], b"", "Heartbeat.sequence is not valid"),
        ([6, 1], b"x", "Heartbeat carries no payload, the frame gave 1"),
        ([101, b"short"], b"", "BlobWanted.blob_id is not valid"),
        ([5, "c", "t" * (m.TEXT_SIZE_MAX + 1)], b"", "Goodbye.text is not valid"),
    ],
)
def test_what_is_wrong_is_named(header: Any, payload: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        m.decode(msgpack.packb(header), payload)


def inputs(lengths: list[int], payload: bytes) -> m.Inputs:
    return m.Inputs(bytes(16), 0, struct.pack(f"<{len(lengths)}I", *lengths), [], payload)


def outputs(lengths: list[int], statuses: bytes) -> m.Outputs:
    table = struct.pack(f"<{len(lengths)}I", *lengths)
    return m.Outputs(bytes(16), 0, table, statuses, [], bytes(sum(lengths)))


def test_a_length_table_must_describe_the_payload() -> None:
    through_the_wire(inputs([1, 0, 2], b"abc"))
    through_the_wire(inputs([0] * m.CHUNK_INPUTS_MAX, b""))
    with pytest.raises(ProtocolError, match="add up to 4, the payload has 3"):
        through_the_wire(inputs([1, 3], b"abc"))
    with pytest.raises(ProtocolError, match="add up to"):
        through_the_wire(inputs([2**32 - 1] * 3, b"abc"))
    with pytest.raises(ProtocolError, match="lengths is not valid"):
        through_the_wire(inputs([0] * (m.CHUNK_INPUTS_MAX + 1), b""))


def test_statuses_must_fit_the_length_table() -> None:
    through_the_wire(outputs([1, 2], bytes([m.Status.VALUE, m.Status.FAILURE])))
    with pytest.raises(ProtocolError, match="1 statuses for 2 outputs"):
        through_the_wire(outputs([1, 2], b"\0"))
    with pytest.raises(ProtocolError, match="unknown status 4"):
        through_the_wire(outputs([1], b"\4"))


def test_a_payload_may_be_a_slice_of_something_larger() -> None:
    whole = memoryview(b"0123456789")
    message = m.BlobPart(bytes(32), 0, whole[2:5])
    assert through_the_wire(message) == m.BlobPart(bytes(32), 0, b"234")


def test_a_worker_may_not_submit_calls_and_a_client_may_not_report_outputs() -> None:
    submitting = {m.OpenApp, m.DefineFunction, m.OpenCall, m.Inputs, m.SealCall, m.AskShutdown}
    reporting = {m.WorkerReady, m.LeaseOutputs, m.LeaseItems, m.ContainerExited, m.Relay}
    assert not submitting & m.FROM_WORKER
    assert not reporting & m.FROM_CLIENT
    assert m.AskShutdown not in m.FROM_NESTED_CLIENT
    handshake = {m.Hello, m.Challenge, m.Proof, m.Welcome}
    for allowed in (m.FROM_CLIENT, m.FROM_NESTED_CLIENT, m.FROM_WORKER, m.TO_CLIENT, m.TO_WORKER):
        assert not handshake & allowed


def test_a_failure_payload_reads_back() -> None:
    assert msgpack.unpackb(m.failure_payload("timeout", "late")) == ["timeout", "late", {}]
