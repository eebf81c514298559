"""The inputs of one frame, kept as they came until each of them has its output."""

from __future__ import annotations

from array import array
from itertools import accumulate

from fanout.protocol import messages as m

#: The place of an input in its frame, and the ids of its blobs.
BlobRef = tuple[int, list[bytes]]


class Chunk:
    """Consecutive inputs as they came in one frame. Part of it is cut out by its length table."""

    __slots__ = ("_offsets", "blobs", "lengths", "open_count", "payload", "start", "stop")

    def __init__(self, message: m.Inputs) -> None:
        self.start = message.start
        #: As it came: views would cost a call of one input as much as all else of its chunk.
        self.lengths = message.lengths
        self.payload = message.payload
        self.blobs = message.blobs
        #: Inputs of it that have no output yet; at zero the chunk is dropped.
        self.open_count = len(message.lengths) // 4
        self.stop = self.start + self.open_count
        self._offsets: array[int] | None = None

    def cut(self, start: int, stop: int) -> tuple[bytes, list[BlobRef], m.Payload]:
        """Length table, blob references and bytes of inputs `start` to `stop`; nothing is
        re-encoded, and the bytes are not copied."""
        low, high = start - self.start, stop - self.start
        if start == self.start and stop == self.stop:
            return self.lengths, self.blobs, self.payload
        if self._offsets is None:
            lengths = memoryview(self.lengths).cast("I")
            self._offsets = array("L", accumulate(lengths, initial=0))
        payload = memoryview(self.payload)[self._offsets[low] : self._offsets[high]]
        blobs = [(at - low, ids) for at, ids in self.blobs if low <= at < high]
        return self.lengths[4 * low : 4 * high], blobs, payload
