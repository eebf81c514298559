"""One call as the client sees it, driven by a small scheduler in memory: whatever is lost, repeated
or late, each input ends exactly once, in order where order was asked for, within the credit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanout.client.call_state import CallState
from fanout.client.chunk import CHUNK_COUNT_MAX, Batch, ItemBatch, split
from fanout.client.item_stream import ITEM_CREDIT_MAX
from fanout.config import ITEM_CREDIT_INITIAL, WINDOW_BYTES, WINDOW_COUNT_MIN
from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m

CALL = b"c" * 16
FUNCTION = b"f" * 16


def make(**options: Any) -> CallState:
    return CallState(CALL, FUNCTION, **options)


def taken(call: CallState, kind: type[m.Message] | None = None) -> list[Any]:
    """What the call wants to send; checked as the wire would check it."""
    outgoing, call.outgoing = call.outgoing, []
    for message in outgoing:
        header, payload = m.encode_header(message), bytes(getattr(message, "payload", b""))
        m.decode(header, payload)
    return [message for message in outgoing if kind is None or isinstance(message, kind)]


def table(values: list[bytes]) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") for value in values)


def outputs(start: int, values: list[bytes], status: int = m.Status.VALUE) -> m.Outputs:
    statuses = bytes([status]) * len(values)
    return m.Outputs(CALL, start, table(values), statuses, [], b"".join(values))


def items(index: int, number: int, values: list[bytes]) -> m.Items:
    return m.Items(CALL, index, number, table(values), [], b"".join(values))


def done(index: int, count: int) -> m.Outputs:
    return outputs(index, [msgpack.packb(count)], m.Status.DONE)


def delivered(call: CallState) -> list[tuple[int, bytes]]:
    """(index, payload) of what is ready, consumed."""
    found = []
    for ready in call.take_ready():
        if isinstance(ready, Batch) and ready.is_repeated:
            values: list[Any] = [ready.payload] * ready.count
        else:
            values = split(ready.lengths, ready.payload)
        for position, value in enumerate(values):
            index = ready.index if isinstance(ready, ItemBatch) else ready.start + position
            found.append((index, bytes(value)))
        call.consume(ready)
    return found


# --- opening and sending --------------------------------------------------------------------------


def test_a_single_call_goes_out_in_one_go() -> None:
    call = make()
    call.add([b"input"], is_last=True)
    kinds = [type(message) for message in taken(call)]
    assert kinds == [m.SubmitCall]
    call.handle(m.CallOpened(CALL, WINDOW_COUNT_MIN, WINDOW_BYTES, []))
    assert taken(call) == []
    call.handle(outputs(0, [b"output"]))
    assert delivered(call) == [(0, b"output")]
    assert call.is_delivered
    assert taken(call) == [], "its owner says that it is over, when it lets go of it"


def test_an_empty_call_is_finished_when_it_is_sealed() -> None:
    call = make()
    call.seal()
    assert call.is_delivered


def test_sending_stops_at_the_count_of_the_window() -> None:
    call = make()
    call.handle(m.CallOpened(CALL, 10, WINDOW_BYTES, []))
    taken(call)
    assert call.room() == (10, WINDOW_BYTES)
    call.add([b"x"] * 25)
    assert [len(frame.lengths) // 4 for frame in taken(call, m.Inputs)] == [10]
    assert call.room() == (0, 0)
    call.handle(outputs(0, [b"y"] * 10))
    assert taken(call, m.Inputs) == [], "what was received is not yet consumed"
    delivered(call)
    assert sum(len(frame.lengths) // 4 for frame in taken(call, m.Inputs)) == 10


def test_sending_stops_at_the_bytes_of_the_window() -> None:
    call = make()
    call.handle(m.CallOpened(CALL, 1000, 100, []))
    taken(call)
    call.add([b"x" * 30] * 5)
    assert sum(len(frame.payload) for frame in taken(call, m.Inputs)) == 90
    call.handle(outputs(0, [b""] * 3))
    delivered(call)
    assert sum(len(frame.payload) for frame in taken(call, m.Inputs)) == 60


def test_an_input_larger_than_the_window_goes_out_alone() -> None:
    call = make()
    call.handle(m.CallOpened(CALL, 1000, 100, []))
    taken(call)
    call.add([b"x" * 500, b"x"])
    assert [len(frame.payload) for frame in taken(call, m.Inputs)] == [500]
    call.handle(outputs(0, [b""]))
    delivered(call)
    assert [len(frame.payload) for frame in taken(call, m.Inputs)] == [1]


def test_blobs_count_against_the_window() -> None:
    call = make()
    call.handle(m.CallOpened(CALL, 1000, 100, []))
    taken(call)
    call.add([b"x"], [(0, [b"b" * 32])], 90)
    call.add([b"x"], [(0, [b"d" * 32])], 90)
    assert len(taken(call, m.Inputs)) == 1
    call.handle(outputs(0, [b""]))
    assert call.released_blobs == [b"b" * 32]
    delivered(call)
    (frame,) = taken(call, m.Inputs)
    assert frame.blobs == [(0, [b"d" * 32])]


def test_a_wider_window_sends_what_waited() -> None:
    call = make()
    call.handle(m.CallOpened(CALL, 5, WINDOW_BYTES, []))
    taken(call)
    call.add([b"x"] * 20)
    taken(call)
    call.handle(m.Window(CALL, 20, WINDOW_BYTES))
    assert [len(frame.lengths) // 4 for frame in taken(call, m.Inputs)] == [15]


def test_acknowledgements_are_batched() -> None:
    call = make()
    call.handle(m.CallOpened(CALL, 400, WINDOW_BYTES, []))
    call.add([b"x"] * 400)
    taken(call)
    for index in range(99):
        call.handle(outputs(index, [b"y"]))
        delivered(call)
    assert taken(call, m.Ack) == []
    call.handle(outputs(99, [b"y"]))
    delivered(call)
    acks = taken(call, m.Ack)
    assert acks[0].received == [(0, 100)]
    assert len(acks) <= 2


# --- receiving ------------------------------------------------------------------------------------


def test_order_is_kept_or_not_as_asked() -> None:
    for is_ordered, expected in ((True, [0, 1, 2, 3]), (False, [2, 3, 0, 1])):
        call = make(is_ordered=is_ordered)
        call.add([b"x"] * 4)
        call.handle(outputs(2, [b"c", b"d"]))
        found = delivered(call)
        assert bool(found) != is_ordered
        call.handle(outputs(0, [b"a", b"b"]))
        assert [index for index, _ in found + delivered(call)] == expected


def test_outputs_that_come_again_are_dropped() -> None:
    call = make()
    call.add([b"x"] * 6)
    call.handle(outputs(1, [b"b", b"c"]))
    call.handle(outputs(0, [b"A", b"B", b"C", b"D"]))
    assert delivered(call) == [(0, b"A"), (1, b"b"), (2, b"c"), (3, b"D")]
    assert call.duplicate_count == 2


def test_an_output_of_an_input_never_sent_breaks_the_protocol() -> None:
    call = make()
    call.add([b"x"])
    with pytest.raises(ProtocolError, match="inputs 1 to 1"):
        call.handle(outputs(1, [b"y"]))


def test_bytes_are_kept_until_the_output_is_here_and_no_longer() -> None:
    call = make(is_ordered=False)
    call.add([bytes(100)] * CHUNK_COUNT_MAX)
    taken(call)
    call.handle(outputs(0, [b""] * (CHUNK_COUNT_MAX - 2)))
    kept = sum(len(chunk.payload) for chunk in call._chunks)
    assert kept == 200, "a chunk with two inputs left keeps the bytes of two"
    call.handle(outputs(CHUNK_COUNT_MAX - 2, [b""] * 2))
    assert call._chunks == []


def test_a_long_call_costs_what_its_window_does() -> None:
    call = make()
    call.handle(m.CallOpened(CALL, 1000, WINDOW_BYTES, []))
    sent = 0
    for _ in range(500):
        count = min(CHUNK_COUNT_MAX, call.room()[0])
        call.add([b"x" * 10] * count)
        sent += count
        taken(call)
        call.handle(outputs(call.received.count, [b"y"] * (sent - call.received.count)))
        delivered(call)
    assert sent > 100_000
    assert call.received.range_count == 1
    assert not call._chunks
    assert not call._ahead


# --- failing and cancelling -----------------------------------------------------------------------


def test_a_failed_call_ends_every_input_without_an_output() -> None:
    call = make()
    call.add([b"x"] * 4)
    call.handle(outputs(1, [b"b"]))
    call.handle(m.CallFailed(CALL, m.Status.FAILURE, b"why"))
    assert delivered(call) == [(0, b"why"), (1, b"b"), (2, b"why"), (3, b"why")]
    call.add([b"x"])
    call.seal()
    assert delivered(call) == [(4, b"why")]
    assert call.is_delivered
    assert call.failure == (m.Status.FAILURE, b"why")
    assert taken(call, m.CancelCall), "what is left of it over there is of no use"


def test_a_spawned_call_that_fails_keeps_no_large_argument() -> None:
    call = make(is_durable=True)
    call.handle(m.CallOpened(CALL, 1000, 100, []))
    call.add([b"x"], [(0, [b"b" * 32])], 10)
    taken(call)
    call.handle(m.CallFailed(CALL, m.Status.FAILURE, b"why"))
    assert call.released_blobs == [b"b" * 32]
    assert call.is_finished
    assert taken(call) == []


def test_a_cancelled_call_takes_and_gives_nothing() -> None:
    call = make()
    call.add([b"x"], [(0, [b"b" * 32])], 10)
    taken(call)
    call.cancel()
    assert [type(message) for message in taken(call)] == [m.CancelCall]
    assert call.released_blobs == [b"b" * 32]
    call.handle(outputs(0, [b"y"]))
    assert call.take_ready() == []
    call.cancel()
    assert taken(call) == []


# --- reconnecting ---------------------------------------------------------------------------------


def test_after_a_reconnect_only_what_is_missing_is_sent_again() -> None:
    call = make()
    call.add([b"0", b"1", b"2", b"3", b"4", b"5"])
    call.seal()
    taken(call)
    call.handle(outputs(0, [b"a"]))
    call.handle(outputs(4, [b"e"]))
    call.resume()
    assert [type(message) for message in taken(call)] == [m.OpenCall]
    call.handle(m.CallOpened(CALL, WINDOW_COUNT_MIN, WINDOW_BYTES, [(2, 1)]))
    ack, first, second, third, seal = taken(call)
    assert ack.received == [(0, 1), (4, 1)]
    assert [(frame.start, bytes(frame.payload)) for frame in (first, second, third)] == [
        (1, b"1"),
        (3, b"3"),
        (5, b"5"),
    ]
    assert seal.count == 6


def test_nothing_but_the_opening_goes_out_before_the_answer() -> None:
    call = make()
    call.add([b"0"])
    taken(call)
    call.resume()
    taken(call)
    call.add([b"1"])
    call.seal()
    assert taken(call) == []
    call.handle(m.CallOpened(CALL, WINDOW_COUNT_MIN, WINDOW_BYTES, []))
    assert [frame.start for frame in taken(call, m.Inputs)] == [0, 1]


def test_a_cancelled_call_is_cancelled_again_after_a_reconnect() -> None:
    call = make()
    call.add([b"0"])
    call.cancel()
    call.resume()
    assert [type(message) for message in taken(call)] == [m.CancelCall]


# --- durable calls --------------------------------------------------------------------------------


def test_a_durable_call_is_finished_when_it_is_stored() -> None:
    call = make(is_durable=True)
    call.add([b"0", b"1"])
    call.seal()
    taken(call)
    call.handle(m.CallOpened(CALL, WINDOW_COUNT_MIN, WINDOW_BYTES, []))
    call.handle(m.InputsStored(CALL, [(0, 2)], False))
    assert not call.is_finished
    assert not call._chunks, "stored inputs are not kept here"
    call.handle(m.InputsStored(CALL, [], True))
    assert call.is_delivered
    assert taken(call) == [], "outputs stay over there, so nothing is acknowledged"


def test_a_durable_call_sends_within_the_window_of_what_is_stored() -> None:
    call = make(is_durable=True)
    call.handle(m.CallOpened(CALL, 10, WINDOW_BYTES, []))
    taken(call)
    call.add([b"x"] * 25)
    assert sum(len(frame.lengths) // 4 for frame in taken(call, m.Inputs)) == 10
    call.handle(m.InputsStored(CALL, [(0, 10)], False))
    assert sum(len(frame.lengths) // 4 for frame in taken(call, m.Inputs)) == 10


# --- generators -----------------------------------------------------------------------------------


def test_items_come_before_the_end_and_streams_one_after_the_other() -> None:
    call = make(is_generator=True)
    call.add([b"x"] * 2)
    call.seal()
    call.handle(items(1, 0, [b"1.0"]))
    assert delivered(call) == []
    call.handle(items(0, 0, [b"0.0", b"0.1"]))
    assert delivered(call) == [(0, b"0.0"), (0, b"0.1")]
    call.handle(done(1, 1))
    assert delivered(call) == []
    call.handle(done(0, 2))
    assert [payload for _, payload in delivered(call)] == [b"\2", b"1.0", b"\1"]
    assert call.is_delivered


def test_an_end_waits_for_the_items_it_counts() -> None:
    call = make(is_generator=True)
    call.add([b"x"])
    call.seal()
    call.handle(done(0, 1))
    assert not call.has_ready
    assert not call.is_delivered
    call.handle(items(0, 0, [b"a"]))
    assert [payload for _, payload in delivered(call)] == [b"a", b"\1"]


def test_items_that_come_again_are_dropped_and_gaps_are_refused() -> None:
    call = make(is_generator=True)
    call.add([b"x"])
    call.handle(items(0, 0, [b"a", b"b"]))
    call.handle(items(0, 1, [b"B", b"c"]))
    call.handle(items(0, 0, [b"A"]))
    assert [payload for _, payload in delivered(call)] == [b"a", b"b", b"c"]
    assert call.duplicate_count == 2
    with pytest.raises(ProtocolError, match="item 9 of input 0 came when 3 was due"):
        call.handle(items(0, 9, [b"z"]))


def test_items_behind_those_that_a_lost_connection_swallowed_wait_for_them() -> None:
    call = make(is_generator=True)
    call.add([b"x"])
    call.seal()
    call.handle(items(0, 0, [b"a"]))
    # Item 1 was on its way when the connection was lost. Item 2 comes on the new one, before the
    # scheduler has heard that the call goes on; then all is repeated from item 1 on.
    call.resume()
    call.handle(items(0, 2, [b"c"]))
    assert [payload for _, payload in delivered(call)] == [b"a"]
    call.handle(m.CallOpened(call.call_id, 10, 1000, [(0, 1)]))
    call.handle(items(0, 1, [b"b"]))
    call.handle(items(0, 2, [b"c"]))
    call.handle(done(0, 3))
    assert [payload for _, payload in delivered(call)] == [b"b", b"c", b"\3"]


def test_credit_grows_while_items_are_consumed_and_only_then() -> None:
    call = make(is_generator=True)
    call.add([b"x"])
    taken(call)
    granted, number = ITEM_CREDIT_INITIAL, 0
    for _ in range(20):
        call.handle(items(0, number, [b"i"] * (granted - number)))
        number = granted
        assert taken(call, m.ItemCredit) == [], "nothing was consumed"
        delivered(call)
        credit = taken(call, m.ItemCredit)[-1]
        assert credit.received == number
        assert number < credit.upto <= number + ITEM_CREDIT_MAX
        granted = credit.upto
    assert granted - number == ITEM_CREDIT_MAX


def test_credit_for_large_items_stays_small() -> None:
    call = make(is_generator=True)
    call.add([b"x"])
    taken(call)
    call.handle(items(0, 0, [bytes(600 << 10)] * 4))
    delivered(call)
    assert taken(call, m.ItemCredit)[-1].upto == 5


def test_a_generator_that_must_run_again_is_told_what_is_here() -> None:
    call = make(is_generator=True)
    call.add([b"x"])
    taken(call)
    call.handle(items(0, 0, [b"a", b"b", b"c"]))
    call.resume()
    taken(call)
    call.handle(m.CallOpened(CALL, WINDOW_COUNT_MIN, WINDOW_BYTES, []))
    kinds = [message for message in taken(call) if not isinstance(message, m.Ack)]
    assert isinstance(kinds[0], m.ItemCredit)
    assert kinds[0].received == 3
    assert isinstance(kinds[1], m.Inputs)


# --- everything together --------------------------------------------------------------------------


class Peer:
    """A scheduler in memory that answers, repeats, forgets and reconnects at random."""

    def __init__(self, call: CallState, rng: random.Random, window: tuple[int, int]) -> None:
        self.call = call
        self.rng = rng
        self.window = window
        self.inputs: dict[int, bytes] = {}
        self.unacknowledged: dict[int, bytes] = {}
        self.consumed = 0
        self.highest = 0
        self.sealed: int | None = None

    def deliver(self) -> None:
        for message in taken(self.call):
            self._take(message)
        assert self.highest - self.consumed <= max(1, self.window[0], WINDOW_COUNT_MIN)

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.OpenCall):
            present = [(index, 1) for index in sorted(self.inputs.keys() | self.unacknowledged)]
            self.call.handle(m.CallOpened(CALL, *self.window, present))
            for index, output in self.unacknowledged.items():
                self.call.handle(outputs(index, [output]))
        elif isinstance(message, m.Inputs):
            for offset, value in enumerate(split(message.lengths, message.payload)):
                index = message.start + offset
                assert index not in self.inputs
                self.inputs[index] = bytes(value)
                self.highest = max(self.highest, index + 1)
        elif isinstance(message, m.Ack):
            for start, count in message.received:
                for index in range(start, start + count):
                    self.unacknowledged.pop(index, None)
            assert message.consumed_count >= self.consumed
            self.consumed = message.consumed_count
        elif isinstance(message, m.SealCall):
            self.sealed = message.count

    def work(self) -> None:
        """Give outputs of a random run of inputs; sometimes of one that has had its output."""
        ready = sorted(self.inputs)
        if not ready:
            return
        start = self.rng.choice(ready)
        count = self.rng.randint(1, 40)
        run = [index for index in range(start, start + count) if index in self.inputs]
        run = run[: next((i for i, index in enumerate(run) if index != start + i), len(run))]
        values = [b"out:" + self.inputs.pop(index) for index in run]
        self.unacknowledged.update(zip(run, values, strict=True))
        self.call.handle(outputs(start, values))
        if self.rng.random() < 0.2:
            self.call.handle(outputs(start, values))

    def break_connection(self) -> None:
        if self.rng.random() < 0.5:
            # The scheduler itself restarted: it knows nothing any more.
            self.inputs.clear()
            self.unacknowledged.clear()
        self.call.resume()


@given(
    seed=st.integers(0, 1 << 32),
    count=st.integers(0, 700),
    is_ordered=st.booleans(),
    window=st.tuples(st.integers(1, 600), st.integers(1, 5000)),
)
def test_each_input_ends_exactly_once_whatever_happens(
    seed: int, count: int, is_ordered: bool, window: tuple[int, int]
) -> None:
    rng = random.Random(seed)
    call = make(is_ordered=is_ordered)
    peer = Peer(call, rng, window)
    found: list[tuple[int, bytes]] = []
    for action in _actions(rng, call, peer, count):
        if action == "take":
            found += delivered(call)
    expected = [(index, b"out:%d" % index) for index in range(count)]
    assert (found if is_ordered else sorted(found)) == expected
    assert call.is_delivered
    while call.outgoing:
        peer.deliver()
    left = len(peer.unacknowledged)
    assert left <= max(1, call.window_count // 4), "the rest is acknowledged as the call ends"
    assert peer.sealed == count


def _actions(rng: random.Random, call: CallState, peer: Peer, count: int) -> Iterator[str]:
    """Drive both sides at random until the call is over; yields when the user may take."""
    for step in range(100_000):
        action = rng.choice(["add", "deliver", "work", "work", "take"])
        if action == "add" and call.count < count:
            room = min(call.room()[0], count - call.count, CHUNK_COUNT_MAX)
            if room:
                size = rng.randint(1, room)
                call.add([b"%d" % (call.count + i) for i in range(size)])
        elif action == "add":
            call.seal()
        elif action == "deliver":
            peer.deliver()
        elif action == "work":
            peer.work()
        yield action
        if step < 500 and rng.random() < 0.01:
            peer.break_connection()
        if call.is_delivered:
            yield "take"
            return
    raise AssertionError("the call makes no progress")
