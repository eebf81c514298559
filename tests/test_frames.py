"""The frame reader: cutting, waiting, and refusing before anything is stored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanout.exceptions import ProtocolError
from fanout.protocol import frames

small_frames = st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.binary(max_size=80)))


def wire(items: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(frames.prefix(h, len(p)) + h + p for h, p in items)


@given(small_frames, st.lists(st.integers(1, 50)))
def test_frames_come_out_as_they_went_in_however_the_reads_fall(
    items: list[tuple[bytes, bytes]], sizes: list[int]
) -> None:
    data, reader, found, position = wire(items), frames.FrameReader(), [], 0
    for size in sizes:
        found += reader.feed(data[position : position + size])
        position += size
    found += reader.feed(data[position:])
    assert found == items
    assert reader.buffered_size == 0


@given(small_frames)
def test_frames_survive_one_byte_at_a_time(items: list[tuple[bytes, bytes]]) -> None:
    reader = frames.FrameReader()
    found = [frame for byte in wire(items) for frame in reader.feed(bytes([byte]))]
    assert found == items


def test_bytes_of_an_unfinished_frame_wait_for_the_rest() -> None:
    reader = frames.FrameReader()
    data = wire([(b"one", b"1"), (b"two", b"2" * 1000)])
    assert reader.feed(data[:-1]) == [(b"one", b"1")]
    assert reader.buffered_size == len(wire([(b"two", b"2" * 1000)])) - 1
    assert reader.feed(data[-1:] + b"\x01") == [(b"two", b"2" * 1000)]
    assert reader.buffered_size == 1


@pytest.mark.parametrize(
    ("header_size", "payload_size", "text"),
    [
        (0, 0, "header of 0 bytes"),
        (frames.HEADER_SIZE_BYTES_MAX + 1, 0, "header of"),
        (1, frames.PAYLOAD_SIZE_BYTES_MAX + 1, "payload of"),
        (2**32 - 1, 2**32 - 1, "header of"),
    ],
)
def test_oversize_is_refused_from_the_prefix_alone(
    header_size: int, payload_size: int, text: str
) -> None:
    reader = frames.FrameReader()
    with pytest.raises(ProtocolError, match=text):
        reader.feed(frames.PREFIX.pack(header_size, payload_size))
    assert reader.buffered_size == 0


def test_the_largest_allowed_sizes_are_taken() -> None:
    reader = frames.FrameReader(header_size_max=10, payload_size_max=20)
    assert reader.feed(wire([(b"h" * 10, b"p" * 20)])) == [(b"h" * 10, b"p" * 20)]
    with pytest.raises(ProtocolError):
        reader.feed(wire([(b"h" * 11, b"")]))


def test_a_frame_that_no_receiver_would_take_is_not_made() -> None:
    frames.prefix(bytes(frames.HEADER_SIZE_BYTES_MAX), frames.PAYLOAD_SIZE_BYTES_MAX)
    with pytest.raises(ProtocolError, match="over the limit"):
        frames.prefix(bytes(frames.HEADER_SIZE_BYTES_MAX + 1), 0)
    with pytest.raises(ProtocolError, match="over the limit"):
        frames.prefix(b"h", frames.PAYLOAD_SIZE_BYTES_MAX + 1)
