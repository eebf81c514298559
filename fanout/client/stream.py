"""Calls in use: the two ends of a map, a generator or a single call.

`Plan` says what is called. `BlockingStream` serves a thread that blocks: it lives on the background
loop and hands whole batches over; pulling the user's iterators, pickling and unpickling happen on
the user's thread, in `iterate`. `async_stream.py` has what serves coroutines.

The bridge of `BlockingStream` has three parts. Batches go to the user through a `SimpleQueue`.
Chunks go to the loop by `call_soon_threadsafe`, with what was consumed since. And what may be sent
is published as two totals, `allowed_count` and `allowed_size`, that the user's thread compares with
what it has handed over in all: totals cannot be misread, however late one side looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from fanout import config
from fanout.client.app_run import AppRun
from fanout.client.call_state import CallState
from fanout.client.calls import BufferTable, LiveCall
from fanout.client.chunk import Batch, Ready
from fanout.client.decode import decode, error_of
from fanout.client.inputs import Encoded, Encoder, Puller, Rows, encode_one
from fanout.client.loop import background_loop
from fanout.client.session import Session
from fanout.client.sessions import connected, session_here
from fanout.context import InputContext
from fanout.exceptions import InternalError
from fanout.protocol import messages as m
from fanout.twin import shorten

#: A user's iterator that has blocked for this long does not keep back what it has given before.
RESCUE_AFTER_S = 0.02
#: How often that is looked at while nobody pulls.
RESCUE_LOOK_S_MAX = 0.5

#: The call is over: nothing follows on the queue.
_END = object()
#: There may be room for inputs again.
_ROOM = object()

Delivery = list[tuple[Ready, BufferTable]]


@dataclass(slots=True)
class Plan:
    """What is called, and how its results are to come."""

    run: AppRun
    definition: m.DefineFunction
    #: Content of the blob with the sources, where code must travel.
    sources: bytes | None
    is_generator: bool
    is_ordered: bool = True
    is_durable: bool = False
    parent: tuple[int, int] | None = None
    method: str = ""
    call_id: bytes = field(default_factory=lambda: os.urandom(16))
    #: How many inputs there will be, if that is known.
    count_hint: int | None = 1

    def open(self, session: Session, listener: Any) -> LiveCall:
        """Begin the call on a session."""
        session.use_app(self.run)
        session.define(self.definition, self.sources)
        state = CallState(
            self.call_id,
            self.definition.function_id,
            is_ordered=self.is_ordered,
            is_durable=self.is_durable,
            is_generator=self.is_generator,
            parent=self.parent,
            method=self.method,
        )
        if self.is_durable:
            self.run.spawned_ids.append(self.call_id)
            self.run.spawned_count += 1
        call = LiveCall(session, state, self.run.app_id, listener)
        call.count_hint = self.count_hint
        session.open_call(call)
        return call


def add_to(call: LiveCall, encoded: Encoded, is_last: bool = False) -> None:
    """Give encoded inputs to a call; with `is_last` none follows."""
    if call.is_closed:
        return
    for blob_id, content in encoded.pins:
        call.session.pin(blob_id, content)
    call.state.add(encoded.inputs, encoded.blobs, encoded.blob_size, is_last)


def failure_of(call: LiveCall) -> BaseException | None:
    """The error of a call that failed as a whole."""
    failure = call.state.failure
    return None if failure is None else error_of(*failure)


# --- blocking -------------------------------------------------------------------------------------


class _Opener:
    """What both blocking forms share: to open a call on the background loop, now if the session is
    connected, as soon as it is otherwise."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.call: LiveCall | None = None
        self.is_cancelled = False
        self._is_waiting = False
        self._is_wait_told = False
        self._waiter: InputContext | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        session = session_here()
        if session.is_up:
            self._open(session)
        else:
            self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            self._open(await connected())
        except Exception as error:
            self.call_broken(error)

    def _open(self, session: Session) -> None:
        if not self.is_cancelled:
            self.call = self.plan.open(session, self)
            self.opened(self.call)
            if self._is_waiting:
                self.begin_wait()

    def cancel(self) -> None:
        self.is_cancelled = True
        self.end_wait()
        if self.call is not None:
            self.call.close()

    def begin_wait(self) -> None:
        """The user's thread has nothing to do but wait. It may be so before the call is open."""
        self._is_waiting = True
        if self.call is not None and not self._is_wait_told:
            self._is_wait_told = True
            self._waiter = self.call.session.waiting.begin()

    def end_wait(self) -> None:
        self._is_waiting = False
        if self._is_wait_told:
            self._is_wait_told = False
            assert self.call is not None
            self.call.session.waiting.end(self._waiter)

    def opened(self, call: LiveCall) -> None:
        raise NotImplementedError

    def call_broken(self, error: Exception) -> None:
        raise NotImplementedError


class BlockingCall(_Opener):
    """One input, one output, one thread blocked on it."""

    def __init__(self, plan: Plan, encoded: Encoded) -> None:
        super().__init__(plan)
        self._encoded = encoded
        self._done = threading.Lock()
        self._done.acquire()
        self._delivery: Delivery = []
        self._error: BaseException | None = None
        self._is_done = False

    def result(self) -> Any:
        """Make the call and wait for its value.

        Raises:
            BaseException: what the function raised, or why it could not run.
        """
        loop = background_loop()
        loop.call_soon_threadsafe(self.open)
        try:
            self._done.acquire()
        except BaseException:
            loop.call_soon_threadsafe(self.cancel)
            raise
        if self._error is not None:
            raise self._error
        if not self._delivery:
            return None
        (batch, buffers) = self._delivery[0]
        values, error = decode(batch, buffers, return_exceptions=False)
        if error is not None:
            raise error
        return values[0]

    def opened(self, call: LiveCall) -> None:
        add_to(call, self._encoded, is_last=True)
        call.flush()
        if call.session.is_nested:
            self.begin_wait()
        self.call_changed()

    def call_changed(self) -> None:
        call = self.call
        if call is None or self._is_done:
            return
        if self.plan.is_durable:
            if call.state.is_finished:
                self._finish(failure_of(call))
            return
        delivery = call.take()
        if delivery:
            self._delivery = delivery
            self._finish(None)

    def call_broken(self, error: Exception) -> None:
        if not self._is_done:
            self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        self._is_done = True
        self._error = error
        self.end_wait()
        self._done.release()
        if self.call is not None:
            self.call.close()


def call_blocking(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One input, one output, for a thread that blocks.

    Raises:
        SerializationError: an argument cannot be pickled.
        BaseException: what the function raised, or why it could not run.
    """
    return BlockingCall(plan, encode_one(args, kwargs)).result()


class BlockingStream(_Opener):
    """The loop's end of a call whose results a thread iterates over. See the module's text."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.queue: SimpleQueue[Any] = SimpleQueue()
        #: How much the user's thread may hand over in all.
        self.allowed_count = config.WINDOW_COUNT_MIN
        self.allowed_size = config.WINDOW_BYTES
        #: Set by the user's thread before it blocks for want of room.
        self.wants_room = False
        #: Where the inputs come from, unless they are all there.
        self.puller: Puller | None = None
        self._early: list[tuple[Encoded, bool]] = []
        self._added_size = 0
        self._put_count = 0
        self._is_ended = False

    # On the loop.

    def opened(self, call: LiveCall) -> None:
        early, self._early = self._early, []
        for encoded, is_last in early:
            self._add(encoded, is_last)
        call.flush()
        self.call_changed()
        if self.puller is not None:
            self._look_later(RESCUE_AFTER_S)

    def _look_later(self, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self._look, delay_s)

    def _look(self, delay_s: float) -> None:
        """See whether the user's thread is stuck in its iterator, now and then."""
        puller, call = self.puller, self.call
        if puller is None or puller.is_exhausted or call is None or call.is_closed:
            return
        since = puller.inside_since
        if since is None:
            self._look_later(min(2 * delay_s, RESCUE_LOOK_S_MAX))
            return
        self._look_later(RESCUE_AFTER_S)
        if time.perf_counter() - since >= RESCUE_AFTER_S:
            # Behind what the user's thread had handed over before it went inside.
            asyncio.get_running_loop().call_soon(self._rescue, since)

    def _rescue(self, since: float) -> None:
        puller = self.puller
        encoded = None if puller is None else puller.rescue(since)
        if encoded is not None:
            self.exchange([], encoded, False)

    def exchange(self, used: list[Ready], encoded: Encoded | None, is_last: bool) -> None:
        """Take what the user's thread hands over: batches used up, inputs, the end of inputs."""
        call = self.call
        if call is None:
            if encoded is not None:
                self._early.append((encoded, is_last))
            return
        if call.is_closed:
            return
        for batch in used:
            call.state.consume(batch)
        if encoded is not None:
            self._add(encoded, is_last)
        call.flush()
        self.call_changed()

    def _add(self, encoded: Encoded, is_last: bool) -> None:
        assert self.call is not None
        self._added_size += encoded.size
        if encoded.inputs:
            add_to(self.call, encoded, is_last)
        elif is_last:
            self.call.state.seal()

    def call_changed(self) -> None:
        call = self.call
        if call is None or self._is_ended:
            return
        delivery = call.take()
        count, size = call.state.room()
        self.allowed_count = call.state.count + count
        self.allowed_size = self._added_size + size
        if delivery:
            self._put(delivery)
        if call.state.is_delivered:
            self._end(_END if not self.plan.is_durable else failure_of(call) or _END)
        elif self.wants_room and count > 0:
            self.wants_room = False
            self._put(_ROOM)

    def call_broken(self, error: Exception) -> None:
        if not self._is_ended:
            self._end(error)

    def _end(self, last: Any) -> None:
        self._is_ended = True
        self._put(last)
        if self.call is not None:
            self.call.close()

    def _put(self, thing: Any) -> None:
        self.end_wait()
        self._put_count += 1
        self.queue.put(thing)

    def wait_if_idle(self, taken_count: int) -> None:
        """The user's thread blocks, having taken so many things from the queue."""
        if taken_count == self._put_count and not self._is_ended:
            self.begin_wait()


class _Feed:
    """The user's end of a `BlockingStream`. Without a puller all inputs are there already."""

    def __init__(self, stream: BlockingStream, puller: Puller | None) -> None:
        self.stream = stream
        stream.puller = self._puller = puller
        self._loop = background_loop()
        self._taken_count = 0
        self.used: list[Ready] = []

    def next_delivery(self) -> Delivery | None:
        """The next batches, None after the last. Pulls inputs while there are none.

        Raises:
            BaseException: what the user's iterator raised, or why the call broke.
        """
        queue, puller = self.stream.queue, self._puller
        while True:
            is_ready = not queue.empty()
            if puller is not None and puller.is_exhausted:
                puller = self._puller = self.stream.puller = None
            if puller is not None and not (is_ready and puller.is_slow) and self._top_up(puller):
                if not is_ready:
                    continue
            elif self.used:
                self._exchange(None, False)
            if puller is not None:
                puller.is_slow = False
            if not is_ready:
                self._before_blocking()
            thing = queue.get()
            self._taken_count += 1
            if thing is _END:
                return None
            if isinstance(thing, BaseException):
                raise thing
            if thing is not _ROOM:
                delivery: Delivery = thing
                return delivery

    def close(self) -> None:
        """Nobody iterates any more: end the call, if it is not over."""
        # The user's iterator is let go of here, in the user's thread.
        self._puller = self.stream.puller = None
        # The loop may be gone already, at the interpreter's exit.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.stream.cancel)

    def _top_up(self, puller: Puller) -> bool:
        """Hand over another chunk if there is room for one."""
        stream = self.stream
        count = stream.allowed_count - puller.count
        size = stream.allowed_size - puller.size
        if count <= 0 or size <= 0:
            return False
        encoded = puller.pull(count, size)
        self._exchange(encoded, puller.is_exhausted)
        return True

    def _exchange(self, encoded: Encoded | None, is_last: bool) -> None:
        used, self.used = self.used, []
        self._loop.call_soon_threadsafe(self.stream.exchange, used, encoded, is_last)

    def _before_blocking(self) -> None:
        stream = self.stream
        if self._puller is not None:
            stream.wants_room = True
            if (
                stream.allowed_count > self._puller.count
                and stream.allowed_size > self._puller.size
            ):
                # Room came between the look and the flag.
                stream.queue.put(_ROOM)
                self._taken_count -= 1
        if stream.plan.parent is not None:
            self._loop.call_soon_threadsafe(stream.wait_if_idle, self._taken_count)


def iterate(
    make_plan: Callable[[], Plan], rows: Rows, common: dict[str, Any], return_exceptions: bool
) -> Generator[Any, None, None]:
    """The results of a map, for a thread. Nothing happens before the first `next`; closing or
    dropping the iterator cancels the call."""
    try:
        encoder = Encoder(common, rows.is_column)
        plan = make_plan()
        plan.count_hint = rows.count_hint
        stream = BlockingStream(plan)
        feed = _Feed(stream, Puller(rows.start(), encoder))
        background_loop().call_soon_threadsafe(stream.open)
        yield from _values(stream, feed, return_exceptions)
    except BaseException as error:
        shorten(error)
        raise


def _values(
    stream: BlockingStream, feed: _Feed, return_exceptions: bool
) -> Generator[Any, None, None]:
    try:
        while (delivery := feed.next_delivery()) is not None:
            for batch, buffers in delivery:
                values, error = decode(batch, buffers, return_exceptions)
                yield from values
                if error is not None:
                    raise error
                feed.used.append(batch)
    finally:
        feed.close()


def iterate_one(plan: Plan, encoded: Encoded) -> Generator[Any, None, None]:
    """The items of one generator, for a thread."""
    stream = BlockingStream(plan)
    feed = _Feed(stream, None)
    loop = background_loop()
    loop.call_soon_threadsafe(stream.open)
    loop.call_soon_threadsafe(stream.exchange, [], encoded, True)
    try:
        yield from _values(stream, feed, return_exceptions=False)
    except BaseException as error:
        shorten(error)
        raise


def run_to_end(
    make_plan: Callable[[], Plan], rows: Rows, common: dict[str, Any], ignore_exceptions: bool
) -> bytes:
    """Run a map for its effects alone; return the call's id. Values are not even unpickled.

    Raises:
        BaseException: the first error that arrived, unless they are ignored.
    """
    plan = make_plan()
    plan.count_hint = rows.count_hint
    encoder = Encoder(common, rows.is_column)
    stream = BlockingStream(plan)
    feed = _Feed(stream, Puller(rows.start(), encoder))
    background_loop().call_soon_threadsafe(stream.open)
    try:
        while (delivery := feed.next_delivery()) is not None:
            for batch, _ in delivery:
                if not ignore_exceptions:
                    raise_first(batch)
                feed.used.append(batch)
    finally:
        feed.close()
    return plan.call_id


def raise_first(batch: Ready) -> None:
    """Raise the first error of a batch, if there is one."""
    if isinstance(batch, Batch) and any(
        status in (m.Status.ERROR, m.Status.FAILURE) for status in batch.statuses
    ):
        _, error = decode(batch, {}, return_exceptions=False)
        if error is None:
            error = InternalError("an output said that it was an error and was none")
        raise error
