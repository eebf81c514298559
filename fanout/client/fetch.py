"""Results of spawned calls, read from the scheduler that keeps them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from fanout.client.calls import BufferTable, LiveFetch
from fanout.client.chunk import Batch
from fanout.client.decode import decode
from fanout.client.session import Session
from fanout.client.sessions import connected
from fanout.exceptions import InvalidError
from fanout.protocol import messages as m

if TYPE_CHECKING:
    from fanout.types import InputInfo

logger = logging.getLogger("fanout.client")

#: Outputs asked for at a time, and about how many bytes of them are wanted here at once.
RANGE_COUNT_MAX = 1024
RANGE_BYTES = 8 << 20

#: States of a call of which the scheduler has nothing, as `CallInfo.state` says it.
GONE = ("unknown", "expired")


class _Listener:
    """Wakes whoever waits for a fetch."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None
        self.error: Exception | None = None

    def call_changed(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def call_broken(self, error: Exception) -> None:
        self.error = error
        self.call_changed()

    async def wait(self, session: Session) -> None:
        """Until something changed."""
        self._waiter = session.loop.create_future()
        waiter = session.waiting.begin()
        try:
            await self._waiter
        finally:
            session.waiting.end(waiter)
            self._waiter = None


class _Fetch:
    """An open fetch and its listener, as one thing to wait on."""

    def __init__(self, session: Session, call_id: bytes, start: int, stop: int) -> None:
        self._session = session
        self._listener = _Listener()
        self.live = LiveFetch(session, call_id, start, stop, self._listener)
        session.open_fetch(self.live)

    async def next_batches(self) -> list[tuple[Batch, BufferTable]]:
        """What has come; waits until there is something."""
        while not (batches := self.live.take()):
            if self._listener.error is not None:
                raise self._listener.error
            if self.live.info is not None and self.live.info.state in GONE:
                return []
            await self._listener.wait(self._session)
        return batches

    async def wait_for_info(self) -> m.CallInfo:
        """What the call is, known after everything that was there already has come."""
        while self.live.info is None:
            if self._listener.error is not None:
                raise self._listener.error
            await self._listener.wait(self._session)
        return self.live.info

    def close(self) -> None:
        self._session.close_fetch(self.live)


async def get_output(call_id: bytes, index: int, timeout: float | None, object_id: str) -> Any:
    """See `FunctionCall.get`."""
    from fanout.call import gone

    if type(index) is not int or index < 0:
        raise InvalidError(f"index={index!r}: must be an int of at least 0")
    if timeout is not None and not timeout >= 0:
        raise InvalidError(f"timeout={timeout!r}: must be None or at least 0 seconds")
    fetch = _Fetch(await connected(), call_id, index, index + 1)
    started = time.monotonic()
    try:
        info = await fetch.wait_for_info()
        if info.state in GONE:
            raise gone(object_id, info.state)
        if info.state != "open" and index >= info.input_count:
            raise InvalidError(
                f"index={index}: call {object_id} has {info.input_count} inputs, numbered from 0"
            )
        batches = fetch.live.take()
        if not batches:
            rest = None if timeout is None else timeout - (time.monotonic() - started)
            try:
                async with asyncio.timeout(rest):
                    batches = await fetch.next_batches()
            except TimeoutError:
                raise TimeoutError(
                    f"call {object_id} has no result of input {index} after {timeout:g} s"
                ) from None
    finally:
        fetch.close()
    if not batches:
        raise gone(object_id, info.state)
    batch, buffers = batches[0]
    values, error = decode(batch, buffers, return_exceptions=False)
    if error is not None:
        raise error
    return values[0]


async def ask_call(call_id: bytes) -> m.CallInfo:
    """What the scheduler says of a spawned call."""
    session = await connected()
    info: m.CallInfo = await session.ask(m.AskCall(session.next_request(), call_id))
    return info


async def cancel_call(call_id: bytes, terminate_containers: bool) -> None:
    """Cancel a spawned call, and wait until the scheduler has seen it."""
    kind = m.TerminateCall if terminate_containers else m.CancelCall
    state = "open"
    while state in ("open", "sealed"):
        # Only the question is repeated over a lost connection, so what it asks for may be lost.
        session = await connected()
        session.send(kind(call_id))
        info: m.CallInfo = await session.ask(m.AskCall(session.next_request(), call_id))
        state = info.state


async def ask_graph(call_id: bytes, object_id: str) -> list[InputInfo]:
    """See `FunctionCall.get_call_graph`."""
    from fanout.call import PREFIX, gone
    from fanout.types import InputInfo, InputStatus

    session = await connected()
    answer: m.CallGraph = await session.ask(m.AskCallGraph(session.next_request(), call_id))
    if not answer.graph:
        raise gone(object_id, (await ask_call(call_id)).state)
    calls = answer.graph["calls"]
    infos: list[InputInfo] = []
    roots: list[InputInfo] = []
    for position, index, above, status, container in answer.graph["inputs"]:
        call_hex, function, module = calls[position]
        info = InputInfo(
            input_id=f"in-{call_hex}-{index}",
            function_call_id=PREFIX + call_hex,
            task_id=container,
            status=InputStatus[status.upper()],
            function_name=function,
            module_name=module,
        )
        infos.append(info)
        (roots if above < 0 else infos[above].children).append(info)
    if answer.graph["is_cut"]:
        logger.warning(
            "the call graph of %s is not whole: the scheduler sends the %d inputs nearest to the "
            "call, and forgets old calls that have ended",
            object_id,
            len(infos),
        )
    return roots


class Reader:
    """Results of inputs `start` to `stop` of a spawned call, in order, a range at a time."""

    def __init__(self, call_id: bytes, start: int, stop: int) -> None:
        self._call_id = call_id
        self._next = start
        self._stop = stop
        self._fetch: _Fetch | None = None
        self._fetch_stop = start
        self._ahead: dict[int, tuple[Batch, BufferTable]] = {}
        self._mean_size = 1.0
        self._error: BaseException | None = None

    async def next_values(self) -> list[Any] | None:
        """The next values, as many as are there; None at the end.

        Raises:
            BaseException: what the function raised in the place of the next value.
        """
        from fanout.call import PREFIX, gone

        if self._error is not None:
            raise self._error
        while self._next not in self._ahead:
            if self._next >= self._stop:
                self.close()
                return None
            if self._next >= self._fetch_stop:
                await self._open_next()
            assert self._fetch is not None
            batches = await self._fetch.next_batches()
            if not batches:
                state = (await self._fetch.wait_for_info()).state
                raise gone(PREFIX + self._call_id.hex(), state)
            for batch, buffers in batches:
                self._ahead[batch.start] = (batch, buffers)
                size = len(batch.payload) + sum(b.nbytes for row in buffers.values() for b in row)
                self._mean_size += 0.5 * (size / batch.count - self._mean_size)
        batch, buffers = self._ahead.pop(self._next)
        self._next += batch.count
        values, self._error = decode(batch, buffers, return_exceptions=False)
        if self._error is not None and not values:
            raise self._error
        return values

    async def _open_next(self) -> None:
        self.close()
        count = max(1, min(RANGE_COUNT_MAX, int(RANGE_BYTES / max(1.0, self._mean_size))))
        if self._mean_size == 1.0:
            # Nothing is known of their size yet.
            count = min(count, 64)
        self._fetch_stop = min(self._stop, self._next + count)
        self._fetch = _Fetch(await connected(), self._call_id, self._next, self._fetch_stop)

    def close(self) -> None:
        """Ask for no more."""
        if self._fetch is not None:
            self._fetch.close()
            self._fetch = None
