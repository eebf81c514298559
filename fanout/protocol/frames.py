"""The wire on one page: how bytes become frames and frames become bytes.

A frame is::

    u32 header length | u32 payload length | header | payload        (little endian)

The header is a small msgpack array whose first element is the message kind; `messages.py` knows
the kinds. The payload is opaque: no relay ever decodes it. Every length is checked before a byte
of the frame is stored for it, so a hostile peer cannot make us allocate what it announces.

This module is sans-IO: bytes in, frames out. It holds no socket and knows no message.
"""

from __future__ import annotations

import struct

from fanout.exceptions import ProtocolError

PREFIX = struct.Struct("<II")
PREFIX_SIZE_BYTES = PREFIX.size

#: A header is a handful of integers, ids and a length table: 4 bytes for each of at most
#: `messages.CHUNK_INPUTS_MAX` inputs, their blob references, or a function's definition.
HEADER_SIZE_BYTES_MAX = 1 << 20

#: What one frame may carry. A value whose pickle is larger than this must travel as blobs, and
#: the client says so before it sends anything.
PAYLOAD_SIZE_BYTES_MAX = 256 << 20

#: Before the peer has proved that it holds the token, it gets no room for more than this.
HANDSHAKE_SIZE_BYTES_MAX = 16 << 10

Frame = tuple[bytes, bytes]


def prefix(header: bytes, payload_size: int) -> bytes:
    """The eight bytes that announce a frame.

    Raises:
        ProtocolError: the frame would be larger than a receiver accepts.
    """
    if len(header) > HEADER_SIZE_BYTES_MAX or payload_size > PAYLOAD_SIZE_BYTES_MAX:
        raise ProtocolError(
            f"a frame of {len(header)} + {payload_size} bytes is over the limit of "
            f"{HEADER_SIZE_BYTES_MAX} (header) + {PAYLOAD_SIZE_BYTES_MAX} (payload) bytes"
        )
    return PREFIX.pack(len(header), payload_size)


class FrameReader:
    """Cuts a stream of bytes into frames.

    `feed` returns every frame that is complete; what is left waits for more bytes. Small frames
    arrive many to a read and are sliced out of it; a large payload arrives in many reads, which
    are kept as they came and joined once, so a frame costs one copy whatever its size.
    """

    __slots__ = ("_parts", "_parts_size", "_needed", "header_size_max", "payload_size_max")

    def __init__(
        self,
        header_size_max: int = HEADER_SIZE_BYTES_MAX,
        payload_size_max: int = PAYLOAD_SIZE_BYTES_MAX,
    ) -> None:
        self.header_size_max = header_size_max
        self.payload_size_max = payload_size_max
        self._parts: list[bytes] = []
        self._parts_size = 0
        #: How many bytes must be there before another attempt to cut can succeed.
        self._needed = PREFIX_SIZE_BYTES

    @property
    def buffered_size(self) -> int:
        """Bytes that belong to a frame which is not complete."""
        return self._parts_size

    def feed(self, data: bytes) -> list[Frame]:
        """Take the bytes of one read; return the frames that are now complete, in order.

        Raises:
            ProtocolError: a length is over its limit. The stream cannot be read on.
        """
        if self._parts:
            self._parts.append(data)
            self._parts_size += len(data)
            if self._parts_size < self._needed:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
            self._parts_size = 0
        size = len(data)
        if size > PREFIX_SIZE_BYTES:
            # Without load a read is one frame.
            header_size, payload_size = PREFIX.unpack_from(data)
            start = PREFIX_SIZE_BYTES + header_size
            if (
                start + payload_size == size
                and 0 < header_size <= self.header_size_max
                and payload_size <= self.payload_size_max
            ):
                return [(data[PREFIX_SIZE_BYTES:start], data[start:])]
        return self._cut(data)

    def _cut(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        position, size = 0, len(data)
        self._needed = PREFIX_SIZE_BYTES
        while size - position >= PREFIX_SIZE_BYTES:
            header_size, payload_size = PREFIX.unpack_from(data, position)
            self._check(header_size, payload_size)
            header_start = position + PREFIX_SIZE_BYTES
            payload_start = header_start + header_size
            end = payload_start + payload_size
            if end > size:
                self._needed = end - position
                break
            frames.append((data[header_start:payload_start], data[payload_start:end]))
            position = end
        if position < size:
            rest = data[position:] if position else data
            self._parts.append(rest)
            self._parts_size = len(rest)
        return frames

    def _check(self, header_size: int, payload_size: int) -> None:
        if header_size == 0 or header_size > self.header_size_max:
            raise ProtocolError(
                f"frame header of {header_size} bytes; allowed are 1 to {self.header_size_max}"
            )
        if payload_size > self.payload_size_max:
            raise ProtocolError(
                f"frame payload of {payload_size} bytes is over the limit of "
                f"{self.payload_size_max}"
            )
