"""The memory that a worker daemon and one container both see; the same module on both sides.

A memfd that both map. It holds single words that one side writes and the other reads, and the
ring through which outputs leave the container. Each word is eight aligned bytes that are stored
by one machine instruction (a memoryview of format "Q" does that), so no reader sees half of one.

**Progress.** Before each input the container stores the input's place with the `TENTATIVE` bit,
reads the lease's limit, and stores the place without the bit if the input is below the limit. So
the daemon, which lowers the limit first and reads progress a moment later, can always tell an
input that runs from one that is about to be refused.

**Outputs.** An output is in the ring before the next input begins, so it outlives its container.
The daemon must handle thousands of them in a few microseconds; so what one output needs is kept
in columns (length, status, duration) beside the bytes, which stand end to end, and a batch leaves
as a few slices. To whom the entries belong is said by *marks*: "from entry N on: outputs of the
lease in slot S, the first for index I". The container writes a mark when a lease begins, and
wherever the count is interrupted.

Entries and bytes are counted from zero and never wrap (only their positions do), so "how many are
unread" is one subtraction.

**Doorbell.** The container rings only if the daemon had read all before the new entry, and has
not announced that it will look again by itself (`IS_POLLED`). Both sides first store their word
and then load the other's, and a processor may let the load overtake the store; then neither
notices the other. That is why the daemon also looks every 20 ms while a lease is active.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from fanout.exceptions import ProtocolError

# --- words that the container writes ---
PROGRESS = 0
SINCE_NS = 1
HEAD = 2
MARK_HEAD = 3
#: How many leases the container has passed. It passes them in the order in which it got them.
ENDED = 4
# --- words that the daemon writes; another cache line ---
TAIL = 8
TAIL_BYTES = 9
IS_POLLED = 10
CANCEL_TARGET = 11
CANCEL_REASON = 12
#: A lease waits for a slot, so the container rings when it has passed one.
IS_AWAITED = 13

#: Leases that a container may have and not have passed. At most two of them have inputs to run,
#: but a lease that was withdrawn keeps its slot until the container has come by it: were the slot
#: used again before, the limit of the new lease would let the withdrawn inputs run. While an input
#: runs for long, one lease after another may be given behind it and withdrawn.
SLOTS = 16
#: One word for each lease slot.
LIMIT = 16
CREDIT = LIMIT + SLOTS

#: Entries that may be unread. One `LeaseOutputs` frame takes no more than this either.
ENTRIES = 4096
RING_SIZE_BYTES = 1 << 20

#: An output larger than this goes through the socket, so that it does not push others out.
ENTRY_SIZE_BYTES_MAX = RING_SIZE_BYTES // 4

#: Why the daemon asks an input to stop (`CANCEL_REASON`).
REASON_CANCELLED = 1
REASON_TIMEOUT = 2

#: What the entries after a mark are.
KIND_OUTPUT = 0
KIND_ITEM = 1

#: In `SINCE_NS`: the runtime waits for the daemon, which is not the input's fault.
CLOCK_HELD = (1 << 63) - 1

TENTATIVE = 1 << 47
_SLOT_SHIFT = 48
_INDEX_MASK = (1 << 41) - 1

_ENTRY_MASK = ENTRIES - 1
_RING_MASK = RING_SIZE_BYTES - 1
_MARK_WORDS = 4

_WORDS_OFFSET = 0
_DURATIONS_OFFSET = 4096
_LENGTHS_OFFSET = _DURATIONS_OFFSET + 8 * ENTRIES
_STATUSES_OFFSET = _LENGTHS_OFFSET + 4 * ENTRIES
_MARKS_OFFSET = _STATUSES_OFFSET + ENTRIES
_RING_OFFSET = _MARKS_OFFSET + 8 * _MARK_WORDS * ENTRIES
SIZE_BYTES = _RING_OFFSET + RING_SIZE_BYTES


def place(slot: int, index: int) -> int:
    """The progress word for an input that runs; 0 is kept for "nothing runs"."""
    return (slot + 1) << _SLOT_SHIFT | index


@dataclass(slots=True)
class Progress:
    """What the progress word said: the input with this place runs, or is about to."""

    slot: int
    index: int
    is_tentative: bool
    since_ns: int


@dataclass(slots=True)
class Segment:
    """Entries read from the ring that follow one another in one lease.

    For `KIND_OUTPUT` they are the outputs of inputs `index`, `index` + 1, ...; for `KIND_ITEM`
    the items `number`, `number` + 1, ... of the one input `index`. `lengths` is the length table
    of a frame (u32), `payload` the bytes end to end.
    """

    slot: int
    kind: int
    index: int
    number: int
    count: int
    busy_us: int
    lengths: bytes
    statuses: bytes
    payload: bytes


class SharedMemory:
    """The mapping and its columns. Use `create` in the daemon and `attach` in the container."""

    __slots__ = ("fd", "map", "words", "durations", "lengths", "statuses", "marks", "_views")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, SIZE_BYTES)
        whole = memoryview(self.map)
        self.words = whole[_WORDS_OFFSET:_DURATIONS_OFFSET].cast("Q")
        self.durations = whole[_DURATIONS_OFFSET:_LENGTHS_OFFSET].cast("Q")
        self.lengths = whole[_LENGTHS_OFFSET:_STATUSES_OFFSET].cast("I")
        self.statuses = whole[_STATUSES_OFFSET:_MARKS_OFFSET]
        self.marks = whole[_MARKS_OFFSET:_RING_OFFSET].cast("Q")
        self._views = [
            self.words, self.durations, self.lengths, self.statuses, self.marks, whole,
        ]  # fmt: skip

    @classmethod
    def create(cls, name: str) -> SharedMemory:
        """New memory, all zero; `fd` is to be passed to the container. /proc shows the name."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE_BYTES)
        return cls(fd)

    def close(self) -> None:
        for view in self._views:
            view.release()
        self.map.close()
        os.close(self.fd)

    def progress(self) -> Progress | None:
        """What runs now, or None."""
        words = self.words
        since_ns = words[SINCE_NS]
        value = words[PROGRESS]
        if value == 0:
            return None
        return Progress(
            slot=(value >> _SLOT_SHIFT) - 1,
            index=value & _INDEX_MASK,
            is_tentative=bool(value & TENTATIVE),
            since_ns=since_ns,
        )


class Writer:
    """The container's end of the output ring. One thread uses it.

    `ring_bell` is called when the daemon has to be woken.
    """

    __slots__ = (
        "_words", "_durations", "_lengths", "_statuses", "_marks", "_map", "_entry", "_position",
        "_entry_end", "_position_end", "_mark", "_mark_entry", "_bell_entry", "_ring_bell",
    )  # fmt: skip

    def __init__(self, memory: SharedMemory, ring_bell: Callable[[], None]) -> None:
        self._words = memory.words
        self._durations = memory.durations
        self._lengths = memory.lengths
        self._statuses = memory.statuses
        self._marks = memory.marks
        self._map = memory.map
        self._ring_bell = ring_bell
        self._entry = 0
        self._position = 0
        # Up to where there is room as far as we know; looked up again only when that is used up.
        self._entry_end = ENTRIES
        self._position_end = RING_SIZE_BYTES
        self._mark = 0
        self._mark_entry = -1
        self._bell_entry = 0

    @property
    def entry(self) -> int:
        """The number that the next entry will have."""
        return self._entry

    def mark(self, slot: int, kind: int, index: int, number: int) -> None:
        """Say to whom the entries from the next one on belong."""
        if self._mark_entry == self._entry:
            # Nothing was written under the last mark, so it is replaced. That keeps marks at
            # most as many as entries, and so their ring needs no check of its own.
            self._mark -= 1
        at = (self._mark & _ENTRY_MASK) * _MARK_WORDS
        marks = self._marks
        marks[at] = self._entry
        marks[at + 1] = slot | kind << 8
        marks[at + 2] = index
        marks[at + 3] = number
        self._mark += 1
        self._mark_entry = self._entry
        self._words[MARK_HEAD] = self._mark

    def put(self, status: int, data: bytes, duration_ns: int) -> bool:
        """Hand one entry over; afterwards it is the daemon's. False: there is no room now."""
        size = len(data)
        entry = self._entry
        position = self._position
        if (
            entry >= self._entry_end or position + size > self._position_end
        ) and not self._has_room(size):
            return False
        at = entry & _ENTRY_MASK
        self._lengths[at] = size
        self._statuses[at] = status
        self._durations[at] = duration_ns
        start = position & _RING_MASK
        end = start + size
        if end <= RING_SIZE_BYTES:
            self._map[_RING_OFFSET + start : _RING_OFFSET + end] = data
        else:
            first = RING_SIZE_BYTES - start
            self._map[_RING_OFFSET + start : SIZE_BYTES] = data[:first]
            self._map[_RING_OFFSET : _RING_OFFSET + end - RING_SIZE_BYTES] = data[first:]
        self._position = position + size
        self._entry = entry + 1
        words = self._words
        words[HEAD] = entry + 1
        if words[TAIL] == entry and not words[IS_POLLED]:
            self._bell_entry = entry + 1
            self._ring_bell()
        return True

    def flush(self) -> None:
        """Wake the daemon if anything is unread: a lease has ended, it can be refilled."""
        if self._words[TAIL] != self._entry and self._bell_entry != self._entry:
            self._bell_entry = self._entry
            self._ring_bell()

    def _has_room(self, size: int) -> bool:
        words = self._words
        self._position_end = words[TAIL_BYTES] + RING_SIZE_BYTES
        self._entry_end = words[TAIL] + ENTRIES
        return self._entry < self._entry_end and self._position + size <= self._position_end


class Reader:
    """The daemon's end of the output ring.

    The container runs user code, which can write anywhere: whatever is read here is checked, and
    nonsense raises ProtocolError.
    """

    __slots__ = ("_memory", "_tail", "_tail_bytes", "_mark")

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._tail = 0
        self._tail_bytes = 0
        self._mark = -1

    @property
    def tail(self) -> int:
        """The number of the first unread entry."""
        return self._tail

    def head(self) -> int:
        """The number after the last entry that was written."""
        return self._memory.words[HEAD]

    def set_polled(self, is_polled: bool) -> None:
        """Whether the container may keep still because we look again by ourselves."""
        self._memory.words[IS_POLLED] = is_polled

    def read(self, upto: int) -> list[Segment]:
        """Take the entries below number `upto`.

        Raises:
            ProtocolError: the memory holds what no container of ours wrote.
        """
        segments: list[Segment] = []
        if not self._tail <= upto <= self._tail + ENTRIES:
            raise ProtocolError(f"output ring: entry {upto} after {self._tail} is out of range")
        while self._tail < upto:
            first, belongs, index, number, end = self._next_mark(upto)
            ahead = self._tail - first
            kind = belongs >> 8
            segments.append(
                self._take(
                    end,
                    belongs & 0xFF,
                    kind,
                    index + (ahead if kind == KIND_OUTPUT else 0),
                    number + (ahead if kind == KIND_ITEM else 0),
                )
            )
        words = self._memory.words
        words[TAIL_BYTES] = self._tail_bytes
        words[TAIL] = self._tail
        return segments

    def _next_mark(self, upto: int) -> tuple[int, int, int, int, int]:
        """The mark that covers the first unread entry, and the entry at which it ends."""
        marks, head = self._memory.marks, self._memory.words[MARK_HEAD]
        if head > self._mark + 1 + ENTRIES:
            raise ProtocolError(f"output ring: mark {head} after {self._mark} is out of range")
        end = upto
        while self._mark + 1 < head:
            following = marks[((self._mark + 1) & _ENTRY_MASK) * _MARK_WORDS]
            if following > self._tail:
                end = min(upto, following)
                break
            self._mark += 1
        if self._mark < 0:
            raise ProtocolError("output ring: an entry before the first mark")
        at = (self._mark & _ENTRY_MASK) * _MARK_WORDS
        first, belongs, index, number = marks[at : at + _MARK_WORDS]
        if first > self._tail or belongs & 0xFF >= SLOTS or belongs >> 8 > KIND_ITEM:
            raise ProtocolError(f"output ring: mark ({first}, {belongs}) is not valid")
        return first, belongs, index, number, end

    def _take(self, end: int, slot: int, kind: int, index: int, number: int) -> Segment:
        memory, count = self._memory, end - self._tail
        low = self._tail & _ENTRY_MASK
        if count == 1:
            size, busy_ns = memory.lengths[low], memory.durations[low]
            lengths, statuses = size.to_bytes(4, "little"), bytes((memory.statuses[low],))
        else:
            lengths, statuses, busy_ns = self._columns(low, low + count)
            size = sum(memoryview(lengths).cast("I"))
        if size > RING_SIZE_BYTES:
            raise ProtocolError(f"output ring: {size} unread bytes, it holds {RING_SIZE_BYTES}")
        start = _RING_OFFSET + (self._tail_bytes & _RING_MASK)
        over = start + size - SIZE_BYTES
        if over <= 0:
            payload = memory.map[start : start + size]
        else:
            payload = memory.map[start:SIZE_BYTES] + memory.map[_RING_OFFSET : _RING_OFFSET + over]
        self._tail = end
        self._tail_bytes += size
        return Segment(
            slot, kind, index, number, count, busy_ns // 1000, lengths, statuses, payload
        )

    def _columns(self, low: int, high: int) -> tuple[bytes, bytes, int]:
        """Lengths and statuses of entries, and how long they took together."""
        memory = self._memory
        lengths = _column(memory.lengths, low, high)
        statuses = _column(memory.statuses, low, high)
        if high <= ENTRIES:
            return lengths, statuses, sum(memory.durations[low:high])
        busy_ns = sum(memory.durations[low:]) + sum(memory.durations[: high - ENTRIES])
        return lengths, statuses, busy_ns


def _column(column: memoryview, low: int, high: int) -> bytes:
    if high <= ENTRIES:
        return bytes(column[low:high])
    return bytes(column[low:]) + bytes(column[: high - ENTRIES])
