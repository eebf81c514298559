"""Open calls and fetches as the session sees them: a sans-IO state with its blobs and its listener.

A message that names blobs waits here until those are whole, and so does everything behind it for
the same call, since order matters.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from fanout.client.call_state import CallState
from fanout.client.chunk import Batch, ItemBatch, Ready, cut_batch
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m

if TYPE_CHECKING:
    from fanout.client.session import Session

#: What names blobs that the scheduler may not have.
_NAMING = (m.Inputs, m.SubmitCall)

#: Large buffers of a batch: by position in it.
BufferTable = dict[int, list[memoryview]]


class Listener(Protocol):
    """Who uses a call. Called on the session's loop."""

    def call_changed(self) -> None:
        """Something is ready, there is room, or the call has ended."""

    def call_broken(self, error: Exception) -> None:
        """Nothing will come any more."""


class LiveCall:
    """An open call of a session."""

    def __init__(
        self, session: Session, state: CallState, app_id: bytes, listener: Listener
    ) -> None:
        self.session = session
        self.state = state
        state.blob_size = session.store.size
        self.app_id = app_id
        #: How many inputs it will have, if somebody knows: what a progress bar is out of.
        self.count_hint: int | None = None
        #: Inputs that ended with an error.
        self.failed_count = 0
        self._listener = listener
        self._parked: deque[m.Message] = deque()
        #: Buffers of outputs (by input index) and items (by index and number) not taken yet.
        self._buffers: dict[int | tuple[int, int], list[memoryview]] = {}
        self.is_closed = False

    def flush(self) -> None:
        """Send what the state wants to say."""
        state, session = self.state, self.session
        if state.released_blobs:
            for blob_id in state.released_blobs:
                session.unpin(blob_id)
            state.released_blobs.clear()
        outgoing = state.outgoing
        if not outgoing or not session.is_connected:
            return
        if len(outgoing) == 1 and isinstance(outgoing[0], m.Ack):
            session.send_lazily(outgoing[0])
            outgoing.clear()
            return
        for message in outgoing:
            if isinstance(message, _NAMING):
                for _, blob_ids in message.blobs:
                    for blob_id in blob_ids:
                        session.offer(blob_id)
        session.send_all(outgoing)
        outgoing.clear()

    def receive(self, message: m.Message) -> bool:
        """Take a message, or keep it while its blobs are on their way. False if it waits."""
        if type(message) is m.Outputs and not (message.blobs or self._parked):
            # The usual thing, and all that a single call gets.
            self._note_failed(message)
            self.state.handle(message)
            return True
        if isinstance(message, m.Outputs | m.Items):
            for blob_id in _named(message):
                self.session.pin(blob_id)
        if self._parked or not self._has_blobs(message):
            self._parked.append(message)
            return False
        self._take(message)
        return True

    def unpark(self) -> bool:
        """Blobs have come: take what waited for them. True if nothing waits any more."""
        is_changed = False
        while self._parked and self._has_blobs(self._parked[0]):
            self._take(self._parked.popleft())
            is_changed = True
        if is_changed:
            self.settle()
        return not self._parked

    def drop_parked(self) -> None:
        """The connection is gone, and with it what was on its way; it comes again."""
        while self._parked:
            message = self._parked.popleft()
            if isinstance(message, m.Outputs | m.Items):
                self._unpin(message)

    def settle(self) -> None:
        """After messages were taken: send what follows from them, and tell the listener."""
        if self.is_closed:
            return
        self.flush()
        self._listener.call_changed()

    def resume(self) -> None:
        """There is a new connection."""
        self.state.resume()
        self.flush()

    def take(self) -> list[tuple[Ready, BufferTable]]:
        """What is ready for the user, each batch with its large buffers."""
        ready = self.state.take_ready()
        if not self._buffers:
            return [(batch, {}) for batch in ready]
        return [(batch, self._buffers_of(batch)) for batch in ready]

    def consume(self, batches: list[Ready]) -> None:
        """The user has used these up."""
        for batch in batches:
            self.state.consume(batch)
        self.flush()

    def close(self) -> None:
        """Done with: cancel it if it still runs, and forget it."""
        if self.is_closed:
            return
        self.is_closed = True
        state, session = self.state, self.session
        self.drop_parked()
        if state.is_finished and not state.is_durable:
            state.outgoing.clear()
            session.last_words.finish(state.call_id, state.unacked_bytes)
        elif not (state.is_durable and (state.is_sealed or state.is_finished)):
            # A spawned call that was cut off before its end has told nobody its id.
            state.cancel()
        for message in state.outgoing:
            if isinstance(message, m.CancelCall):
                session.last_words.keep(message)
        self.flush()
        self._buffers.clear()
        session.close_call(self)

    def fail(self, error: Exception) -> None:
        """Nothing can come for it any more."""
        self._listener.call_broken(error)
        self.close()

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.Outputs):
            self._note_failed(message)
            for offset, blob_ids in message.blobs:
                index = message.start + offset
                if index not in self.state.received:
                    self._buffers[index] = [self.session.store.buffer(id_) for id_ in blob_ids]
        elif isinstance(message, m.Items):
            for offset, blob_ids in message.blobs:
                key = (message.index, message.number + offset)
                self._buffers[key] = [self.session.store.buffer(id_) for id_ in blob_ids]
        elif isinstance(message, m.CallFailed):
            self.failed_count += self.state.count - self.state.received.count
        self.state.handle(message)
        if isinstance(message, m.Outputs | m.Items):
            self._unpin(message)

    def _note_failed(self, message: m.Outputs) -> None:
        if message.statuses.count(0) == len(message.statuses):
            return
        received = self.state.received
        for index, status in enumerate(message.statuses, message.start):
            if status in (m.Status.ERROR, m.Status.FAILURE) and index not in received:
                self.failed_count += 1

    def _buffers_of(self, batch: Ready) -> BufferTable:
        table: BufferTable = {}
        for offset, _ in batch.blobs:
            key: int | tuple[int, int]
            if isinstance(batch, ItemBatch):
                key = (batch.index, batch.number + offset)
            else:
                key = batch.start + offset
            buffers = self._buffers.pop(key, None)
            if buffers is not None:
                table[offset] = buffers
        return table

    def _has_blobs(self, message: m.Message) -> bool:
        if not isinstance(message, m.Outputs | m.Items):
            return True
        return all(self.session.store.has(blob_id) for blob_id in _named(message))

    def _unpin(self, message: m.Outputs | m.Items) -> None:
        for blob_id in _named(message):
            self.session.unpin(blob_id)


def _named(message: m.Outputs | m.Items) -> list[bytes]:
    return [blob_id for _, blob_ids in message.blobs for blob_id in blob_ids]


class LiveFetch:
    """Somebody reads outputs `start` to `stop` of a spawned call."""

    def __init__(
        self, session: Session, call_id: bytes, start: int, stop: int, listener: Listener
    ) -> None:
        self.session = session
        self.call_id = call_id
        self.request_id = session.next_request()
        self.start = start
        self.stop = stop
        self._listener = listener
        self.received = IntervalSet()
        self.info: m.CallInfo | None = None
        self._parked: list[m.Outputs] = []
        self._ready: list[tuple[Batch, BufferTable]] = []

    def questions(self) -> list[m.Message]:
        """What to send when the connection is new: the answer to the second one comes behind all
        outputs that are there already.

        Outputs come in any order, so after a lost connection there may be several gaps. A request
        has one range; what lies between the gaps comes once more, and is dropped."""
        questions: list[m.Message] = []
        gaps = self.received.missing(self.start, self.stop)
        if gaps:
            low, high = gaps[0][0], gaps[-1][1]
            questions.append(m.FetchOutputs(self.request_id, self.call_id, low, high))
        questions.append(m.AskCall(self.request_id, self.call_id))
        return questions

    def receive(self, message: m.Message) -> None:
        if isinstance(message, m.CallInfo):
            if message.request_id == self.request_id:
                self.info = message
                self._listener.call_changed()
            return
        if not isinstance(message, m.Outputs):
            return
        for blob_id in _named(message):
            self.session.pin(blob_id)
        self._parked.append(message)
        self.unpark()

    def unpark(self) -> None:
        store = self.session.store
        waiting: list[m.Outputs] = []
        for message in self._parked:
            if not all(store.has(blob_id) for blob_id in _named(message)):
                waiting.append(message)
                continue
            self._take(message)
        is_changed = len(waiting) < len(self._parked)
        self._parked = waiting
        if is_changed:
            self._listener.call_changed()

    def _take(self, message: m.Outputs) -> None:
        stop = message.start + len(message.statuses)
        whole = Batch(
            message.start, message.statuses, message.lengths, message.payload, message.blobs, 0
        )
        for low, high in self.received.missing(
            max(message.start, self.start), min(stop, self.stop)
        ):
            batch = cut_batch(whole, low, high)
            store = self.session.store
            table = {at: [store.buffer(id_) for id_ in ids] for at, ids in batch.blobs}
            self.received.add(low, high)
            self._ready.append((batch, table))
        for blob_id in _named(message):
            self.session.unpin(blob_id)

    def take(self) -> list[tuple[Batch, BufferTable]]:
        ready, self._ready = self._ready, []
        return ready

    def fail(self, error: Exception) -> None:
        self._listener.call_broken(error)
        self.session.close_fetch(self)
