"""Calls on the user's own event loop: the asyncio forms of `stream.py`.

No thread stands in between. Iterators are pulled by a task beside the user's code, in short slices,
and a consumer that is slow stops it by the call's credit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from fanout.client.calls import LiveCall
from fanout.client.decode import decode
from fanout.client.inputs import AsyncPuller, Encoded, Encoder, Puller, Rows
from fanout.client.sessions import connected
from fanout.client.stream import Delivery, Plan, add_to, failure_of, raise_first
from fanout.results import warn_unused
from fanout.twin import shorten


class AsyncStream:
    """A call on the user's own loop. Iterators are pulled by a task of their own."""

    def __init__(self, plan: Plan, rows: Rows | None, encoder: Encoder | None) -> None:
        self.plan = plan
        if rows is not None:
            plan.count_hint = rows.count_hint
        self._rows = rows
        self._encoder = encoder
        self.loop = asyncio.get_running_loop()
        self.call: LiveCall | None = None
        self._deliveries: deque[Delivery] = deque()
        self._error: BaseException | None = None
        self._is_ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._room_waiter: asyncio.Future[None] | None = None
        self._pump: asyncio.Task[None] | None = None

    async def start(self, encoded: Encoded | None = None) -> None:
        """Open the call; with `encoded` these are all its inputs."""
        session = await connected()
        self.call = self.plan.open(session, self)
        if encoded is not None:
            add_to(self.call, encoded, is_last=True)
            self.call.flush()
        else:
            self._pump = self.loop.create_task(self._feed(), name="fanout map inputs")

    async def next_delivery(self) -> Delivery | None:
        """The next batches, None after the last.

        Raises:
            BaseException: what the user's iterator raised, or why the call broke.
        """
        while not self._deliveries:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                return None
            assert self.call is not None
            self._waiter = self.loop.create_future()
            session = self.call.session
            waiter = session.waiting.begin()
            try:
                await self._waiter
            finally:
                session.waiting.end(waiter)
                self._waiter = None
        return self._deliveries.popleft()

    def consume(self, delivery: Delivery) -> None:
        """The user is through with these."""
        if self.call is not None and not self.call.is_closed:
            self.call.consume([batch for batch, _ in delivery])
            self.call_changed()

    def cancel(self) -> None:
        """End the call and the pulling. Harmless to repeat."""
        self._is_ended = True
        if self._pump is not None:
            self._pump.cancel()
        if self.call is not None:
            self.call.close()

    def call_changed(self) -> None:
        call = self.call
        if call is None or self._is_ended:
            return
        delivery = call.take()
        if delivery:
            self._deliveries.append(delivery)
        if call.state.is_delivered:
            self._is_ended = True
            if self.plan.is_durable:
                self._error = failure_of(call)
            call.close()
        if delivery or self._is_ended:
            _wake(self._waiter)
        if call.state.room()[0] > 0:
            _wake(self._room_waiter)

    def call_broken(self, error: BaseException) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._error = error
            _wake(self._waiter)
            _wake(self._room_waiter)

    async def _feed(self) -> None:
        try:
            await self._pull_all()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The user's iterator: its error goes to whoever iterates over the results.
            self.call_broken(error)
            if self.call is not None:
                self.call.close()

    async def _pull_all(self) -> None:
        call, rows, encoder = self.call, self._rows, self._encoder
        self._rows = None
        assert call is not None
        assert rows is not None
        assert encoder is not None
        puller: Puller | AsyncPuller
        if rows.is_async:
            puller = AsyncPuller(rows.start_async(), encoder)
        else:
            puller = Puller(rows.start(), encoder)
        while not puller.is_exhausted and not self._is_ended:
            count, size = call.state.room()
            if count <= 0:
                self._room_waiter = self.loop.create_future()
                await self._room_waiter
                continue
            if isinstance(puller, AsyncPuller):
                encoded = await puller.pull(count, size)
            else:
                encoded = puller.pull(count, size)
            if call.is_closed:
                return
            if encoded.inputs:
                add_to(call, encoded)
                call.settle()
            await asyncio.sleep(0)
        if not call.is_closed:
            call.state.seal()
            call.settle()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class AsyncResults:
    """What `f.map.aio(...)` gives: ``async for`` over it, or ``await`` it for a list. Leaving the
    loop early cancels the call when the object is dropped or closed."""

    def __init__(
        self,
        name: str,
        make_plan: Callable[[], Plan],
        rows: Rows | None,
        common: dict[str, Any],
        return_exceptions: bool,
        encoded: Encoded | None = None,
    ) -> None:
        self._name = name
        self._is_begun = False
        self._make_plan = make_plan
        self._rows = rows
        self._common = common
        self._return_exceptions = return_exceptions
        self._encoded = encoded
        self._stream: AsyncStream | None = None
        self._values: Iterator[Any] = iter(())
        self._used: Delivery = []
        self._pending: Delivery = []
        self._error: BaseException | None = None
        self._is_over = False

    def __aiter__(self) -> AsyncResults:
        return self

    async def __anext__(self) -> Any:
        for value in self._values:
            return value
        try:
            while await self._next_batch():
                for value in self._values:
                    return value
        except BaseException as error:
            shorten(error)
            raise
        raise StopAsyncIteration

    def __await__(self) -> Generator[Any, None, list[Any]]:
        self._is_begun = True
        return self._collect().__await__()

    async def _collect(self) -> list[Any]:
        values = list(self._values)
        try:
            while await self._next_batch():
                values += self._values
        except BaseException as error:
            await self.aclose()
            shorten(error)
            raise
        return values

    async def _next_batch(self) -> bool:
        """Decode the next batch into `_values`; False at the end."""
        self._is_begun = True
        if self._error is not None:
            error, self._error = self._error, None
            await self.aclose()
            raise error
        if self._is_over:
            return False
        if self._stream is None:
            encoder = None
            if self._rows is not None:
                encoder = Encoder(self._common, self._rows.is_column)
            self._stream = AsyncStream(self._make_plan(), self._rows, encoder)
            await self._stream.start(self._encoded)
        if not self._pending:
            if self._used:
                self._stream.consume(self._used)
            delivery = await self._stream.next_delivery()
            if delivery is None:
                self._is_over = True
                return False
            self._pending = delivery[::-1]
            self._used = delivery
        batch, buffers = self._pending.pop()
        values, self._error = decode(batch, buffers, self._return_exceptions)
        self._values = iter(values)
        return True

    async def aclose(self) -> None:
        """Cancel the call, if it still runs."""
        self.cancel()

    def cancel(self) -> None:
        """`aclose`, for whoever cannot await."""
        self._is_begun = self._is_over = True
        self._rows = None
        self._values = iter(())
        if self._stream is not None:
            self._stream.cancel()

    def __del__(self) -> None:
        if not self._is_begun:
            warn_unused(self._name)
        stream = self._stream
        if stream is None or self._is_over or stream.loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):
            stream.loop.call_soon_threadsafe(stream.cancel)


async def call_async(plan: Plan, encoded: Encoded) -> Any:
    """One input, one output, on the user's own loop.

    Raises:
        BaseException: what the function raised, or why it could not run.
    """
    stream = AsyncStream(plan, None, None)
    try:
        await stream.start(encoded)
        stream.call_changed()
        delivery = await stream.next_delivery()
    finally:
        stream.cancel()
    if delivery is None:
        return None
    batch, buffers = delivery[0]
    values, error = decode(batch, buffers, return_exceptions=False)
    if error is not None:
        raise error
    return values[0]


async def run_to_end_async(
    make_plan: Callable[[], Plan], rows: Rows, common: dict[str, Any], ignore_exceptions: bool
) -> bytes:
    """As `run_to_end`, on the user's own loop."""
    plan = make_plan()
    stream = AsyncStream(plan, rows, Encoder(common, rows.is_column))
    try:
        await stream.start()
        while (delivery := await stream.next_delivery()) is not None:
            for batch, _ in delivery:
                if not ignore_exceptions:
                    raise_first(batch)
            stream.consume(delivery)
    finally:
        stream.cancel()
    return plan.call_id
