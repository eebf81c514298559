"""Runs of inputs, outputs and items, and how they are cut.

All three are a table of lengths and the bytes end to end, as in the frames they travel in; cutting
one slices both and re-encodes nothing. Sans-IO.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgpack

from fanout.protocol import messages as m

#: Inputs in one `Inputs` frame. A no-op map is fastest at a few hundred.
CHUNK_COUNT_MAX = 512
#: Bytes of inputs, blobs included, after which a chunk is closed.
CHUNK_BYTES = 256 << 10

#: A length table of one element.
_LENGTH = struct.Struct("=I")

BlobRef = tuple[int, list[bytes]]


@dataclass(slots=True)
class Chunk:
    """Consecutive inputs. `size` counts their bytes and those of the blobs they alone name."""

    start: int
    count: int
    lengths: bytes
    payload: m.Payload
    blobs: list[BlobRef]
    size: int
    #: How many of them have no output yet.
    missing: int

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(slots=True)
class Batch:
    """Outputs of consecutive inputs, for the user. Consume each batch once, when its last value
    is handed out. With `is_repeated` the payload is one output, the same for all of them."""

    start: int
    statuses: bytes
    lengths: bytes
    payload: m.Payload
    blobs: list[BlobRef]
    #: Bytes of the inputs that these are the outputs of.
    input_size: int
    is_repeated: bool = False
    #: Bytes of the outputs, those of their blobs included; known once they are received.
    size: int = 0

    @property
    def count(self) -> int:
        return len(self.statuses)


@dataclass(slots=True)
class ItemBatch:
    """Consecutive items of the generator of input `index`, for the user."""

    index: int
    number: int
    lengths: bytes
    payload: m.Payload
    blobs: list[BlobRef]
    #: Bytes of the items, those of their blobs included; known once they are received.
    size: int = 0

    @property
    def count(self) -> int:
        return len(self.lengths) // 4


Ready = Batch | ItemBatch


def start_of(chunk: Chunk) -> int:
    """Sort key of chunks."""
    return chunk.start


def length_table(values: Sequence[bytes]) -> bytes:
    """The u32 table of the lengths of `values`."""
    if len(values) == 1:
        return _LENGTH.pack(len(values[0]))
    return array("I", map(len, values)).tobytes()


def sizes(chunk: Chunk) -> list[int]:
    """What each input of a chunk counts against the credit. The bytes of its blobs, which the
    chunk knows only in sum, are spread over the inputs that name some."""
    lengths = list(memoryview(chunk.lengths).cast("I"))
    beside = chunk.size - len(chunk.payload)
    if beside and chunk.blobs:
        share, rest = divmod(beside, len(chunk.blobs))
        for position, (offset, _) in enumerate(chunk.blobs):
            lengths[offset] += share + (rest if position == 0 else 0)
    return lengths


def bounds(lengths: bytes, low: int, high: int) -> tuple[int, int]:
    """Where elements `low` to `high` of a table begin and end in the payload."""
    table = memoryview(lengths).cast("I")
    begin = sum(table[:low])
    return begin, begin + sum(table[low:high])


def cut(chunk: Chunk, start: int, stop: int) -> Chunk:
    """Inputs `start` to `stop` of a chunk; the payload is a view of the chunk's."""
    low, high = start - chunk.start, stop - chunk.start
    if low == 0 and high == chunk.count:
        return chunk
    begin, end = bounds(chunk.lengths, low, high)
    return Chunk(
        start,
        stop - start,
        chunk.lengths[4 * low : 4 * high],
        memoryview(chunk.payload)[begin:end],
        [(at - low, ids) for at, ids in chunk.blobs if low <= at < high],
        sum(sizes(chunk)[low:high]),
        stop - start,
    )


def cut_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Outputs of inputs `start` to `stop` of a batch whose inputs were not counted yet."""
    low, high = start - batch.start, stop - batch.start
    if low == 0 and high == batch.count:
        return batch
    if batch.is_repeated:
        return Batch(start, batch.statuses[low:high], b"", batch.payload, [], 0, True)
    begin, end = bounds(batch.lengths, low, high)
    return Batch(
        start,
        batch.statuses[low:high],
        batch.lengths[4 * low : 4 * high],
        memoryview(batch.payload)[begin:end],
        [(at - low, ids) for at, ids in batch.blobs if low <= at < high],
        0,
    )


def cut_items(batch: ItemBatch, count: int) -> ItemBatch:
    """A batch of items without its first `count`."""
    begin, _ = bounds(batch.lengths, count, count)
    return ItemBatch(
        batch.index,
        batch.number + count,
        batch.lengths[4 * count :],
        memoryview(batch.payload)[begin:],
        [(at - count, ids) for at, ids in batch.blobs if at >= count],
    )


def split(lengths: bytes, payload: m.Payload) -> list[m.Payload]:
    """The elements of a run, one by one."""
    if len(lengths) == 4:
        return [payload]
    ends = list(accumulate(memoryview(lengths).cast("I")))
    return [payload[low:high] for low, high in zip([0, *ends], ends, strict=False)]


def unpack_count(payload: m.Payload) -> int:
    """How many items a generator gave, from the payload of its `Status.DONE`."""
    count = msgpack.unpackb(payload)
    return count if type(count) is int else 0
