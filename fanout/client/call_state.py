"""One open call, seen from the client: what may be sent, what the user gets next, what to send
again after a reconnect.

Sans-IO. Chunks of inputs and messages of the scheduler go in; messages for the scheduler collect
in `outgoing`, results for the user in `take_ready`. Whoever owns the object sends the former, in
order, and hands out the latter.

States, each a pair of flags::

    open       From the beginning: OpenCall goes out with the first inputs, within the smallest
               window that a scheduler gives, and the scheduler says so when there is more. So a
               single call costs one round trip and no frame beside it.
    resuming   The connection is new. OpenCall is sent again, and nothing else until CallOpened
               says which inputs the scheduler still has; then the others are sent again.
    finished   Sealed, and each input has its output here. The owner says so when it lets go of
               the call (`CallsFinished`), and the scheduler forgets it; no last `Ack` is needed.
    failed     The call as a whole failed. Each input without an output gets that failure, also
               one that is added later.
    cancelled  Nothing is sent or handed out any more.

Credit. An input counts against the window from the moment it is sent until the scheduler has been
told (`Ack`) that the user consumed its output. Counting up to the `Ack`, rather than up to the
consumption itself, keeps both sides' books equal. Acknowledging is batched: once for every quarter
of the window, so at least three quarters of it are always in use.

Memory. The bytes of an input are kept until its output is here, since the scheduler may lose them.
What is done costs nothing but ranges in an interval set; so a million inputs cost what a window
of them does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fanout.client.chunk import (
    CHUNK_BYTES,
    CHUNK_COUNT_MAX,
    Batch,
    BlobRef,
    Chunk,
    ItemBatch,
    Ready,
    cut,
    cut_batch,
    cut_items,
    length_table,
    sizes,
    start_of,
    unpack_count,
)
from fanout.client.item_stream import ItemStream
from fanout.config import WINDOW_BYTES, WINDOW_COUNT_MIN
from fanout.exceptions import ProtocolError
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m

#: A chunk of which less than this part is still without output is cut to what is missing.
COMPACT_RATIO = 4
#: Chunks smaller than this are not worth cutting.
COMPACT_SIZE_MIN = 4 << 10


class CallState:
    """See the module's text. Not safe for threads."""

    def __init__(
        self,
        call_id: bytes,
        function_id: bytes,
        *,
        is_ordered: bool = True,
        is_durable: bool = False,
        is_generator: bool = False,
        parent: tuple[int, int] | None = None,
        method: str = "",
    ) -> None:
        self.call_id = call_id
        self.function_id = function_id
        self.is_ordered = is_ordered
        self.is_durable = is_durable
        self.is_generator = is_generator
        self.parent = parent
        self.method = method

        self.is_resuming = False
        #: Messages for the scheduler, in order. The owner sends them and clears the list.
        self.outgoing: list[m.Message] = []
        self._is_opened = False
        #: Blobs that no input needs any more, once for each input that named them.
        self.released_blobs: list[bytes] = []
        #: The size of a blob that is here; what names blobs counts with them.
        self.blob_size: Callable[[bytes], int] = lambda blob_id: 0
        #: Outputs and items that came again and were dropped.
        self.duplicate_count = 0

        self.window_count = WINDOW_COUNT_MIN
        self.window_bytes = WINDOW_BYTES
        #: So much of a window is told at a time; see `_ack_if_due`.
        self._ack_count = WINDOW_COUNT_MIN // 4
        self._ack_bytes = WINDOW_BYTES // 4
        self.is_cancelled = False
        #: The scheduler has all of a durable call on disk.
        self.is_stored = False
        self._failure: tuple[int, m.Payload] | None = None

        self._added_count = 0
        self._sent_count = 0
        self.is_sealed = False
        self._is_seal_sent = False
        #: Not sent for want of credit; at most one chunk as long as `room` is respected.
        self._pending: deque[Chunk] = deque()
        #: Sent, and at least one output missing; sorted by start.
        self._chunks: list[Chunk] = []

        self.received = IntervalSet()
        #: Ranges and bytes of outputs that came since the last `Ack`.
        self._unacked = IntervalSet()
        self.unacked_bytes = 0
        #: Consumed by the user: outputs, their bytes, the bytes of their inputs.
        self._consumed_count = 0
        self._consumed_bytes = 0
        self._consumed_input_bytes = 0
        #: The same as the last `Ack` told them.
        self._acked_count = 0
        self._acked_bytes = 0
        self._acked_input_bytes = 0
        self._sent_bytes = 0

        #: Next index to hand out when ordered; batches ahead of it, by start.
        self._next = 0
        self._ahead: dict[int, Batch] = {}
        self._ready: deque[Ready] = deque()
        self._streams: dict[int, ItemStream] = {}

    # --- what the user adds ----------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many inputs were added."""
        return self._added_count

    @property
    def is_finished(self) -> bool:
        """Each input has its output here (a durable call: is on disk there)."""
        if self.is_durable:
            return self.is_stored or self._failure is not None
        return self.is_sealed and self.received.count == self._added_count

    @property
    def is_delivered(self) -> bool:
        """Finished, and `take_ready` has given it all."""
        if not self.is_finished or self._ready:
            return False
        return self.is_durable or not (self._ahead or self._streams)

    @property
    def failure(self) -> tuple[int, m.Payload] | None:
        """(status, payload) of a call that failed as a whole."""
        return self._failure

    @property
    def in_flight(self) -> tuple[int, int]:
        """How many inputs, and bytes of them, count against the window."""
        return self._sent_count - self._acked_count, self._sent_bytes - self._acked_input_bytes

    def room(self) -> tuple[int, int]:
        """How many inputs, and bytes of them, may be added now without waiting for credit."""
        if self._failure is not None:
            return CHUNK_COUNT_MAX, CHUNK_BYTES
        if self._pending or self.is_sealed:
            return 0, 0
        in_flight_count, in_flight_bytes = self.in_flight
        if in_flight_count == 0:
            return max(1, self.window_count), max(1, self.window_bytes)
        count = self.window_count - in_flight_count
        size = self.window_bytes - in_flight_bytes
        return (count, size) if count > 0 and size > 0 else (0, 0)

    def add(
        self,
        inputs: Sequence[bytes],
        blobs: list[BlobRef] | None = None,
        blob_size: int = 0,
        is_last: bool = False,
    ) -> None:
        """Add inputs behind those that are there.

        Args:
            inputs: the bytes of each; at most `CHUNK_COUNT_MAX`.
            blobs: which of them name blobs, counted from the first of `inputs`.
            blob_size: bytes of the blobs that count against the window.
            is_last: no input follows, as `seal` says. If these are all, one frame holds the call.
        """
        assert not self.is_sealed, "no input follows a seal"
        count = len(inputs)
        assert 0 < count <= CHUNK_COUNT_MAX, count
        payload = inputs[0] if count == 1 else b"".join(inputs)
        size = len(payload) + blob_size
        chunk = Chunk(
            self._added_count, count, length_table(inputs), payload, blobs or [], size, count
        )
        self._added_count += count
        self.is_sealed = is_last
        if self._failure is not None:
            self._release_blobs(chunk)
            self._fail_range(chunk.start, chunk.stop)
            return
        self._pending.append(chunk)
        self._send_pending()

    def seal(self) -> None:
        """No input follows."""
        if not self.is_sealed:
            self.is_sealed = True
            self._send_pending()

    def cancel(self) -> None:
        """End the call. What arrives for it from now on is dropped."""
        if self.is_cancelled or (self.is_finished and not self.is_durable):
            return
        self.is_cancelled = True
        self._drop_inputs()
        self._ready.clear()
        self._ahead.clear()
        self._streams.clear()
        if self._is_opened:
            self.outgoing.append(m.CancelCall(self.call_id))

    # --- what the user takes ---------------------------------------------------------------------

    def take_ready(self) -> list[Ready]:
        """All that can be handed out now, in order. Call `consume` for each, when it is used."""
        if not self._ready:
            return []
        ready = list(self._ready)
        self._ready.clear()
        return ready

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    def consume(self, batch: Ready) -> None:
        """The user has used up a batch of `take_ready`: this makes room for more."""
        if self.is_cancelled:
            return
        if isinstance(batch, ItemBatch):
            self._consume_items(batch)
            return
        self._consumed_count += batch.count
        self._consumed_bytes += batch.size
        self._consumed_input_bytes += batch.input_size
        self._ack_if_due()
        self._send_pending()

    # --- what the scheduler says -----------------------------------------------------------------

    def handle(self, message: m.Message) -> None:
        """Take a message about this call.

        Raises:
            ProtocolError: it speaks of inputs that were never sent.
        """
        if self.is_cancelled:
            return
        if isinstance(message, m.Outputs):
            self._on_outputs(message)
        elif isinstance(message, m.Items):
            self._on_items(message)
        elif isinstance(message, m.CallOpened):
            self._on_opened(message)
        elif isinstance(message, m.Window):
            self._set_window(message.window_count, message.window_bytes)
            self._send_pending()
        elif isinstance(message, m.CallFailed):
            self._on_failed(message)
        elif isinstance(message, m.InputsStored):
            self._mark_stored(message.stored)
            self.is_stored = self.is_stored or message.is_sealed
            self._send_pending()
        else:
            raise ProtocolError(f"{type(message).__name__} is not about a call")

    def resume(self) -> None:
        """The connection is new: what was not sent is forgotten, and the call opened again."""
        self.outgoing.clear()
        if self.is_cancelled:
            self.outgoing.append(m.CancelCall(self.call_id))
            return
        self.is_resuming = True
        self._open()

    def _open(self) -> None:
        """Tell of the call, before anything else that is said of it."""
        self._is_opened = True
        opening = m.OpenCall(
            self.call_id, self.function_id, self.is_durable, self.is_ordered, self.parent,
            self.is_resuming, self.method,
        )  # fmt: skip
        self.outgoing.append(opening)

    def _on_opened(self, message: m.CallOpened) -> None:
        self._set_window(message.window_count, message.window_bytes)
        if self.is_resuming:
            self.is_resuming = False
            self._resend(message.present)
        self._send_pending()
        self._ack_if_due()

    def _set_window(self, count: int, size: int) -> None:
        self.window_count, self.window_bytes = count, size
        self._ack_count, self._ack_bytes = max(1, count // 4), max(1, size // 4)

    def _resend(self, present: Iterable[Sequence[int]]) -> None:
        """Tell what is done, then send what has no output and is not there."""
        held = IntervalSet((start, start + count) for start, count in present)
        if self.is_durable:
            self._mark_stored([(start, stop - start) for start, stop in held])
        else:
            self._unacked = IntervalSet(self.received)
            self._ack()
        # Before the inputs, so that a generator which must run again skips what is here already.
        for index, stream in self._streams.items():
            if stream.end is None and stream.received:
                self._grant(index, stream)
        for chunk in list(self._chunks):
            for start, stop in self.received.missing(chunk.start, chunk.stop):
                for low, high in held.missing(start, stop):
                    self.outgoing.append(self._inputs_message(cut(chunk, low, high)))
        self._is_seal_sent = False

    # --- sending ---------------------------------------------------------------------------------

    def _send_pending(self) -> None:
        if self.is_resuming or self.is_cancelled or self._failure is not None:
            return
        while self._pending:
            chunk = self._pending[0]
            fitting = self._fitting_count(chunk)
            if fitting == 0 and self._consumed_count > self._acked_count:
                self._ack()
                fitting = self._fitting_count(chunk)
            if fitting == 0:
                return
            if fitting < chunk.count:
                middle = chunk.start + fitting
                self._pending[0] = cut(chunk, middle, chunk.stop)
                chunk = cut(chunk, chunk.start, middle)
            else:
                self._pending.popleft()
            self._send(chunk)
        if self.is_sealed and not self._is_seal_sent:
            self._is_seal_sent = True
            if not self._is_opened:
                self._open()
            self.outgoing.append(m.SealCall(self.call_id, self._added_count))

    def _fitting_count(self, chunk: Chunk) -> int:
        """How many inputs of the chunk the credit allows; at least one if nothing is in flight."""
        in_flight, in_flight_bytes = self.in_flight
        count = self.window_count - in_flight
        size = self.window_bytes - in_flight_bytes
        if chunk.count <= count and chunk.size <= size:
            return chunk.count
        fitting = 0
        count = min(count, chunk.count)
        for length in sizes(chunk):
            size -= length
            if fitting >= count or size < 0:
                break
            fitting += 1
        return 1 if fitting == 0 and in_flight == 0 else fitting

    def _send(self, chunk: Chunk) -> None:
        self._sent_count += chunk.count
        self._sent_bytes += chunk.size
        self._chunks.append(chunk)
        if self.is_generator:
            for index in range(chunk.start, chunk.stop):
                self._streams[index] = ItemStream()
        if self._is_opened:
            self.outgoing.append(self._inputs_message(chunk))
        elif self.is_sealed and chunk.count == self._added_count:
            self._is_opened = self._is_seal_sent = True
            self.outgoing.append(self._submit_message(chunk))
        else:
            self._open()
            self.outgoing.append(self._inputs_message(chunk))

    def _submit_message(self, chunk: Chunk) -> m.SubmitCall:
        return m.SubmitCall(
            self.call_id, self.function_id, self.is_durable, self.is_ordered, self.parent,
            self.method, chunk.lengths, chunk.blobs, chunk.payload,
        )  # fmt: skip

    def _inputs_message(self, chunk: Chunk) -> m.Inputs:
        return m.Inputs(self.call_id, chunk.start, chunk.lengths, chunk.blobs, chunk.payload)

    # --- acknowledging ---------------------------------------------------------------------------

    def _ack_if_due(self) -> None:
        if self.is_resuming or self.is_cancelled or self._failure is not None:
            return
        if self.is_durable:
            self._acked_count = self._consumed_count
            self._acked_input_bytes = self._consumed_input_bytes
            return
        count, size = self._ack_count, self._ack_bytes
        if (
            self._unacked.count >= count
            or self.unacked_bytes >= size
            or self._consumed_count - self._acked_count >= count
            or self._consumed_bytes - self._acked_bytes >= size
            or self._consumed_input_bytes - self._acked_input_bytes >= size
        ):
            self._ack()

    def _ack(self) -> None:
        self._acked_count = self._consumed_count
        self._acked_bytes = self._consumed_bytes
        self._acked_input_bytes = self._consumed_input_bytes
        pairs = [(start, stop - start) for start, stop in self._unacked]
        self._unacked = IntervalSet()
        self.unacked_bytes = 0
        for position in range(0, max(1, len(pairs)), m.LIST_LENGTH_MAX):
            some = pairs[position : position + m.LIST_LENGTH_MAX]
            self.outgoing.append(
                m.Ack(self.call_id, some, self._consumed_count, self._consumed_bytes)
            )

    # --- outputs ---------------------------------------------------------------------------------

    def _on_outputs(self, message: m.Outputs) -> None:
        start, count = message.start, len(message.statuses)
        stop = start + count
        if stop > self._sent_count:
            raise ProtocolError(
                f"outputs of inputs {start} to {stop - 1}, of which only {self._sent_count} "
                "were sent"
            )
        whole = Batch(start, message.statuses, message.lengths, message.payload, message.blobs, 0)
        gaps = self.received.missing(start, stop)
        if gaps == [(start, stop)]:
            self._receive(whole)
        else:
            self.duplicate_count += count - sum(high - low for low, high in gaps)
            for low, high in gaps:
                self._receive(cut_batch(whole, low, high))
        self._ack_if_due()

    def _receive(self, batch: Batch) -> None:
        start, stop = batch.start, batch.start + batch.count
        batch.input_size = self._release(start, stop)
        self.received.add(start, stop)
        self._unacked.add(start, stop)
        size = self._size_of(batch) if batch.blobs else len(batch.payload)
        batch.size = size * batch.count if batch.is_repeated else size
        self.unacked_bytes += batch.size
        if self.is_generator:
            for index in range(start, stop):
                self._end_stream(index, cut_batch(batch, index, index + 1))
        elif self.is_ordered and start == self._next and not self._ahead:
            self._next = stop
            self._ready.append(batch)
        elif self.is_ordered:
            self._ahead[start] = batch
            self._advance()
        else:
            self._ready.append(batch)

    def _size_of(self, batch: Ready) -> int:
        size = len(batch.payload)
        for _, blob_ids in batch.blobs:
            size += sum(map(self.blob_size, blob_ids))
        return size

    def _advance(self) -> None:
        ahead = self._ahead
        while (batch := ahead.pop(self._next, None)) is not None:
            self._ready.append(batch)
            self._next += batch.count

    def _release(self, start: int, stop: int) -> int:
        """Forget the bytes of inputs that have their output; return how many bytes they were."""
        chunks = self._chunks
        if len(chunks) == 1 and start == chunks[0].start and stop == chunks[0].stop:
            chunk = chunks.pop()
            self._release_blobs(chunk)
            return chunk.size
        position = max(bisect_right(chunks, start, key=start_of) - 1, 0)
        size = 0
        while position < len(chunks) and chunks[position].start < stop:
            chunk = chunks[position]
            low, high = max(start, chunk.start), min(stop, chunk.stop)
            if low >= high:
                position += 1
                continue
            size += chunk.size if high - low == chunk.count else cut(chunk, low, high).size
            chunk.missing -= high - low
            if chunk.missing == 0:
                self._release_blobs(chunk)
                del chunks[position]
                continue
            if chunk.missing * COMPACT_RATIO <= chunk.count and chunk.size >= COMPACT_SIZE_MIN:
                position += self._compact(position, low, high)
                continue
            position += 1
        return size

    def _compact(self, position: int, low: int, high: int) -> int:
        """Cut a chunk to the inputs that still miss their output; return how many pieces."""
        chunk = self._chunks[position]
        done = IntervalSet(self.received.common(chunk.start, chunk.stop))
        done.add(low, high)
        pieces = [cut(chunk, a, b) for a, b in done.missing(chunk.start, chunk.stop)]
        kept = {blob_id for piece in pieces for _, ids in piece.blobs for blob_id in ids}
        for _, ids in chunk.blobs:
            self.released_blobs += [blob_id for blob_id in ids if blob_id not in kept]
        for piece in pieces:
            piece.payload = bytes(piece.payload)
        self._chunks[position : position + 1] = pieces
        return len(pieces)

    def _drop_inputs(self) -> None:
        """None of them will be sent any more."""
        for chunk in [*self._chunks, *self._pending]:
            self._release_blobs(chunk)
        self._chunks.clear()
        self._pending.clear()

    def _release_blobs(self, chunk: Chunk) -> None:
        for _, ids in chunk.blobs:
            self.released_blobs += ids

    def _mark_stored(self, pairs: Iterable[Sequence[int]]) -> None:
        """Inputs of a durable call that are safe over there count as consumed here."""
        for start, count in pairs:
            for low, high in self.received.missing(start, min(start + count, self._sent_count)):
                self._consumed_input_bytes += self._release(low, high)
                self._consumed_count += high - low
                self.received.add(low, high)
        self._ack_if_due()

    def _on_failed(self, message: m.CallFailed) -> None:
        if self._failure is not None:
            return
        self._failure = (message.status, message.payload)
        self.is_resuming = False
        if self.is_durable:
            self._drop_inputs()
            return
        for chunk in self._pending:
            self._release_blobs(chunk)
        self._pending.clear()
        # What it left over there is of no use to anybody.
        self.outgoing.append(m.CancelCall(self.call_id))
        self._fail_range(0, self._added_count)

    def _fail_range(self, start: int, stop: int) -> None:
        assert self._failure is not None
        if self.is_durable:
            return
        status, payload = self._failure
        for low, high in self.received.missing(start, stop):
            if self.is_generator:
                for index in range(low, high):
                    self._streams.setdefault(index, ItemStream())
            statuses = bytes([status]) * (high - low)
            self._receive(Batch(low, statuses, b"", payload, [], 0, is_repeated=True))

    # --- items -----------------------------------------------------------------------------------

    def _on_items(self, message: m.Items) -> None:
        stream = self._streams.get(message.index)
        count = len(message.lengths) // 4
        if stream is None:
            if message.index in self.received:
                self.duplicate_count += count
                return
            raise ProtocolError(f"items of input {message.index}, which was never sent")
        batch = ItemBatch(
            message.index, message.number, message.lengths, message.payload, message.blobs
        )
        behind = stream.received - batch.number
        if behind < 0 and self.is_resuming:
            # Those before it were lost with the old connection. The answer to our OpenCall brings
            # all of them again, and this one behind them.
            return
        if behind < 0:
            raise ProtocolError(
                f"item {batch.number} of input {batch.index} came when {stream.received} was due"
            )
        self.duplicate_count += min(behind, count)
        if behind >= count:
            return
        if behind:
            batch = cut_items(batch, behind)
        stream.received += batch.count
        batch.size = self._size_of(batch)
        stream.received_bytes += batch.size
        if self.is_ordered and batch.index != self._next:
            stream.held.append(batch)
        else:
            self._ready.append(batch)
        self._try_end(batch.index, stream)

    def _end_stream(self, index: int, end: Batch) -> None:
        stream = self._streams.get(index)
        assert stream is not None, index
        stream.end = end
        if end.statuses[0] == m.Status.DONE:
            stream.total = unpack_count(end.payload)
        self._try_end(index, stream)

    def _try_end(self, index: int, stream: ItemStream) -> None:
        """Hand out the end of a stream behind its items, and let the next one have its turn."""
        if stream.end is None or stream.received < stream.total:
            return
        if not self.is_ordered:
            self._ready.append(stream.end)
            del self._streams[index]
            return
        if index != self._next:
            return
        while True:
            assert stream.end is not None
            self._ready.append(stream.end)
            del self._streams[self._next]
            self._next += 1
            following = self._streams.get(self._next)
            if following is None:
                return
            stream = following
            self._ready += stream.held
            stream.held.clear()
            if stream.end is None or stream.received < stream.total:
                return

    def _consume_items(self, batch: ItemBatch) -> None:
        stream = self._streams.get(batch.index)
        if stream is None:
            return
        if stream.consume(batch.count) and not self.is_resuming:
            self._grant(batch.index, stream)

    def _grant(self, index: int, stream: ItemStream) -> None:
        credit = m.ItemCredit(self.call_id, index, stream.granted, stream.received)
        self.outgoing.append(credit)
