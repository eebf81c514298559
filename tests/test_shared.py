"""The memory that a daemon and a container share: what is written is what is read, in order."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from fanout.exceptions import ProtocolError
from fanout_worker import shared


@dataclass
class Pair:
    """Both ends of a ring, and how often the bell rang."""

    memory: shared.SharedMemory
    bells: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = shared.Writer(self.memory, lambda: self.bells.append(1))
        self.reader = shared.Reader(self.memory)

    def read(self) -> list[shared.Segment]:
        return self.reader.read(self.reader.head())


@pytest.fixture
def pair() -> Iterator[Pair]:
    memory = shared.SharedMemory.create("fanout-test")
    try:
        yield Pair(memory)
    finally:
        memory.close()


def values_of(segments: list[shared.Segment]) -> list[tuple[int, int, bytes]]:
    """(slot, index, bytes) of each output."""
    values = []
    for segment in segments:
        position = 0
        for at, length in enumerate(memoryview(segment.lengths).cast("I")):
            data = segment.payload[position : position + length]
            values.append((segment.slot, segment.index + at, data))
            position += length
        assert position == len(segment.payload)
        assert len(segment.statuses) == segment.count
    return values


def test_outputs_of_one_lease_come_as_one_segment(pair: Pair) -> None:
    pair.writer.mark(2, shared.KIND_OUTPUT, 70, 0)
    for number in range(5):
        assert pair.writer.put(number % 2, b"x" * number, 1500)
    (segment,) = pair.read()
    assert (segment.slot, segment.index, segment.count, segment.busy_us) == (2, 70, 5, 7)
    assert segment.statuses == bytes([0, 1, 0, 1, 0])
    assert values_of([segment])[3] == (2, 73, b"xxx")


def test_nothing_is_read_twice(pair: Pair) -> None:
    pair.writer.mark(0, shared.KIND_OUTPUT, 0, 0)
    pair.writer.put(0, b"a", 0)
    assert len(values_of(pair.read())) == 1
    assert pair.read() == []


def test_the_bell_rings_only_for_a_reader_that_has_read_all(pair: Pair) -> None:
    pair.writer.mark(0, shared.KIND_OUTPUT, 0, 0)
    for _ in range(3):
        pair.writer.put(0, b"a", 0)
    assert len(pair.bells) == 1
    pair.read()
    pair.writer.put(0, b"a", 0)
    assert len(pair.bells) == 2


def test_the_bell_is_still_for_a_reader_that_looks_by_itself_until_the_lease_ends(
    pair: Pair,
) -> None:
    pair.reader.set_polled(True)
    pair.writer.mark(0, shared.KIND_OUTPUT, 0, 0)
    pair.writer.put(0, b"a", 0)
    assert pair.bells == []
    pair.writer.flush()
    assert len(pair.bells) == 1
    pair.writer.flush()
    assert len(pair.bells) == 1, "one bell is enough"


def test_a_full_ring_takes_nothing_until_it_is_read(pair: Pair) -> None:
    pair.writer.mark(0, shared.KIND_OUTPUT, 0, 0)
    piece = b"p" * (shared.RING_SIZE_BYTES // 4)
    assert [pair.writer.put(0, piece, 0) for _ in range(5)] == [True, True, True, True, False]
    assert len(values_of(pair.read())) == 4
    assert pair.writer.put(0, piece, 0)


def test_the_table_of_entries_has_a_limit_too(pair: Pair) -> None:
    pair.writer.mark(0, shared.KIND_OUTPUT, 0, 0)
    taken = 0
    while pair.writer.put(0, b"", 0):
        taken += 1
    assert taken == shared.ENTRIES
    assert sum(segment.count for segment in pair.read()) == shared.ENTRIES


def test_items_keep_their_numbers_and_end_before_the_output(pair: Pair) -> None:
    pair.writer.mark(1, shared.KIND_ITEM, 9, 4)
    pair.writer.put(0, b"four", 0)
    pair.writer.put(0, b"five", 0)
    pair.writer.mark(1, shared.KIND_OUTPUT, 9, 0)
    pair.writer.put(2, b"\x06", 0)
    items, done = pair.read()
    assert (items.kind, items.index, items.number, items.count) == (shared.KIND_ITEM, 9, 4, 2)
    assert (done.kind, done.index, done.statuses) == (shared.KIND_OUTPUT, 9, b"\x02")


def test_a_mark_without_entries_is_replaced(pair: Pair) -> None:
    for index in range(10_000):
        pair.writer.mark(0, shared.KIND_OUTPUT, index, 0)
    pair.writer.put(0, b"a", 0)
    assert values_of(pair.read()) == [(0, 9_999, b"a")]


def test_any_mix_of_leases_sizes_and_reads_arrives_in_order(pair: Pair) -> None:
    chance = random.Random(5)
    sent: list[tuple[int, int, bytes]] = []
    got: list[tuple[int, int, bytes]] = []
    index = slot = 0
    pair.writer.mark(slot, shared.KIND_OUTPUT, index, 0)
    for step in range(60_000):
        if chance.random() < 0.01:
            slot, index = (slot + 1) % shared.SLOTS, chance.randrange(1 << 40)
            pair.writer.mark(slot, shared.KIND_OUTPUT, index, 0)
        data = step.to_bytes(4, "little") * chance.choice([0, 1, 1, 2, 40, 900])
        while not pair.writer.put(0, data, 0):
            got += values_of(pair.read())
        sent.append((slot, index, data))
        index += 1
        if chance.random() < 0.002:
            got += values_of(pair.read())
    got += values_of(pair.read())
    assert got == sent


def test_another_process_sees_the_same(pair: Pair) -> None:
    pid = os.fork()
    if pid == 0:
        memory = shared.SharedMemory(os.dup(pair.memory.fd))
        writer = shared.Writer(memory, lambda: None)
        memory.words[shared.SINCE_NS] = 123
        memory.words[shared.PROGRESS] = shared.place(3, 1 << 40) | shared.TENTATIVE
        writer.mark(0, shared.KIND_OUTPUT, 5, 0)
        writer.put(0, b"from there", 0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert values_of(pair.read()) == [(0, 5, b"from there")]
    progress = pair.memory.progress()
    assert progress == shared.Progress(slot=3, index=1 << 40, is_tentative=True, since_ns=123)


def test_no_progress_means_nothing_runs(pair: Pair) -> None:
    assert pair.memory.progress() is None


@pytest.mark.parametrize(
    ("word", "value"), [(shared.HEAD, 1 << 60), (shared.HEAD, 1), (shared.MARK_HEAD, 1 << 60)]
)
def test_nonsense_in_the_words_is_refused(pair: Pair, word: int, value: int) -> None:
    pair.memory.words[word] = value
    pair.memory.words[shared.HEAD] = max(1, pair.memory.words[shared.HEAD])
    with pytest.raises(ProtocolError):
        pair.read()


def test_random_bytes_all_over_raise_nothing_but_protocol_errors() -> None:
    chance = random.Random(11)
    for _ in range(60):
        memory = shared.SharedMemory.create("fanout-test")
        pair = Pair(memory)
        pair.writer.mark(0, shared.KIND_OUTPUT, 0, 0)
        pair.writer.put(0, b"good", 0)
        with mmap.mmap(memory.fd, shared.SIZE_BYTES) as raw:
            for _ in range(40):
                start = chance.randrange(shared.SIZE_BYTES - 4096)
                raw[start : start + 4096] = chance.randbytes(4096)
            memory.words[shared.HEAD] = chance.choice([1, 2, 40, 4096])
        try:
            segments = pair.read()
        except ProtocolError:
            continue
        finally:
            memory.close()
        assert all(segment.slot < shared.SLOTS for segment in segments)
