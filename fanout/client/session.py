"""A client's connection to its scheduler: one per event loop, kept alive over losses.

A session has a random id that stays the same over reconnects, so the scheduler knows who came back.
What must be true over there is kept here as messages to repeat: apps, definitions, open calls, open
questions. After each connect they are sent again, in that order; everything is harmless to repeat.

::

    idle --first use--> connecting --Welcome--> connected --lost--> connecting again, with backoff
                            |                                             |
                            +-- first connect fails: error to the user    +-- token refused: open
                                                                              calls get that error

While the scheduler is away, calls wait; after a few seconds a line on the log says so.

Everything here runs on the session's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from fanout import config, context, output
from fanout.client.app_run import AppRun
from fanout.client.calls import LiveCall, LiveFetch
from fanout.client.last_words import LastWords
from fanout.client.loop import in_thread
from fanout.client.session_handler import SessionHandler
from fanout.client.waiting import Waiting
from fanout.exceptions import (
    AuthError,
    ConnectionError,
    InvalidError,
    VersionError,
)
from fanout.protocol import messages as m
from fanout.protocol import transport as wire
from fanout.protocol.blob_store import MemoryBlobStore
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import JoinString

logger = logging.getLogger("fanout.client")

RECONNECT_DELAY_MIN_S = 0.05
RECONNECT_DELAY_MAX_S = 2.0
#: A connection that lasted longer than this was not refused.
LASTING_S = 1.0
#: Silence about a scheduler that is away, before a line on the log.
WARN_AFTER_S = 5.0
#: How long a second session of an app waits, after a restart, for the first to open it again.
APP_WAIT_S = 5.0
#: How long an acknowledgement may wait for another message to travel with.
LAZY_DELAY_S = 0.002
#: How often calls that are open make sure that the embedded default has its worker.
WORKER_CHECK_INTERVAL_S = 2.0
#: They name a call, and the call itself has no use for them.
_NOT_FOR_CALLS = (m.Log, m.CallInfo, m.CallProgress)

Question = m.AskCall | m.AskFunction | m.AskStatus | m.AskShutdown | m.AskCallGraph
Answer = m.CallInfo | m.FunctionInfo | m.StatusInfo | m.ShutdownInfo | m.CallGraph | m.ObjectAnswer


class Session:
    """See the module's text."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_gone: Callable[[], None] = lambda: None
    ) -> None:
        self.loop = loop
        #: Called when this session will not connect any more.
        self._on_gone = on_gone
        self.session_id = os.urandom(16)
        self.is_nested = context.container is not None
        self.store = MemoryBlobStore()
        self._blob_pins: dict[bytes, int] = {}
        self.transport: wire.Transport | None = None
        self.exchange: BlobExchange | None = None
        self._lost = asyncio.Event()
        #: Set when something is opened or asked that needs a connection.
        self._wanted = asyncio.Event()
        self._was_found = False
        #: How long to wait before the next connection if this one does not last.
        self._rest_s = RECONNECT_DELAY_MIN_S
        self._opening: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

        self._runs: dict[bytes, AppRun] = {}
        self._definitions: dict[bytes, m.DefineFunction] = {}
        self._calls: dict[bytes, LiveCall] = {}
        self._fetches: dict[bytes, list[LiveFetch]] = {}
        self._requests: dict[int, tuple[m.Message, asyncio.Future[Any]]] = {}
        self._request_counter = 0
        #: Whether queues or dicts were used, and how many ephemeral ones live by this session.
        self.uses_objects = False
        self.ephemeral_count = 0
        #: Acknowledgements that wait for company; see `send_lazily`.
        self._lazy: list[m.Message] = []
        self._lazy_timer: asyncio.TimerHandle | None = None
        self.last_words = LastWords(loop, self.send)
        #: Calls with messages that wait for a blob.
        self._parked_calls: set[LiveCall] = set()
        #: What user code waits for here.
        self.waiting = Waiting(loop, self.send)
        #: Messages about calls that have ended here, or never were.
        self.unknown_count = 0

    # --- connecting ------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return self.transport is not None and not self.transport.is_closed

    @property
    def is_up(self) -> bool:
        """Connected once, and looked after since; at the moment it may be away."""
        if self._task is None or self._opening is None:
            return False
        return self._opening.done() and not self._task.done()

    @property
    def is_awaited(self) -> bool:
        """Somebody waits for a connection that is not there."""
        if self.is_connected or self._opening is None:
            return False
        return bool(self._calls or self._fetches) or not self._opening.done()

    async def connect(self) -> None:
        """Be connected, once; later losses are repaired without the caller.

        Raises:
            ConnectionError: no scheduler can be reached, or it refuses us.
            InvalidError: `FANOUT_URL` is wrong.
        """
        if self._task is not None and self._task.done():
            self._task = self._opening = None
        if self._opening is None:
            self._is_closed = False
            self._opening = self.loop.create_future()
            # A failure nobody waits for any more, because of Ctrl-C, is not worth a traceback.
            self._opening.add_done_callback(lambda f: f.cancelled() or f.exception())
            self._task = self.loop.create_task(self._keep_connected(), name="fanout session")
            if (watcher := output.active) is not None:
                watcher.wake()
        await asyncio.shield(self._opening)

    async def _keep_connected(self) -> None:
        opening = self._opening
        assert opening is not None
        try:
            while not self._is_closed:
                transport = await self._dial(is_first=not opening.done())
                since = time.monotonic()
                await self._await_apps(transport)
                # One that was lost while it was nobody's is told to nobody.
                if not transport.is_closed:
                    self._attach(transport)
                    if not opening.done():
                        opening.set_result(None)
                    await self._wait_lost()
                await self._rest_after(time.monotonic() - since)
                await self._wait_wanted()
        except asyncio.CancelledError:
            # Closed, or the loop ends: what comes next begins with a new session.
            self._on_gone()
            if not opening.done():
                opening.cancel()
            raise
        except Exception as error:
            if not opening.done():
                opening.set_exception(error)
            else:
                self.fail_all(error)
        finally:
            self._queue_lazy()
            self.last_words.flush()
            if self.transport is not None:
                self.transport.close(m.Goodbye("closed", "the client has closed"))
                with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                    await asyncio.wait_for(self.transport.wait_closed(), config.KILL_GRACE_S)

    async def _wait_lost(self) -> None:
        """Return when the connection is gone. Nobody else replaces the worker of the embedded
        default when it was killed, and open calls would wait for ever."""
        interval_s = WORKER_CHECK_INTERVAL_S if self._is_embedded else None
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._lost.wait()
            if self._is_embedded and not self._lost.is_set() and (self._calls or self._fetches):
                from fanout.client import local

                try:
                    await in_thread(local.ensure_worker)
                except (ConnectionError, InvalidError, OSError) as error:
                    logger.warning("the worker of this machine is gone: %s", error)

    async def _rest_after(self, lasted_s: float) -> None:
        """Whoever is turned away at once, again and again, asks less and less often."""
        if lasted_s > LASTING_S:
            self._rest_s = RECONNECT_DELAY_MIN_S
            return
        await asyncio.sleep(self._rest_s)
        self._rest_s = min(2 * self._rest_s, RECONNECT_DELAY_MAX_S)

    async def _wait_wanted(self) -> None:
        """Return when there is something to be connected for. Coming back at once would start the
        daemons of the embedded default again that somebody has just stopped."""
        self._wanted.clear()
        # Whoever waits in `connect` has not come to open anything yet.
        if self._calls or self._fetches or self._requests or not self.is_up:
            return
        if self._is_embedded:
            await self._wanted.wait()

    async def _dial(self, is_first: bool) -> wire.Transport:
        """A connection; after the first one, try for ever. Embedded daemons may leave just then."""
        delay, started = RECONNECT_DELAY_MIN_S, time.monotonic()
        is_warned = False
        while True:
            self._lost.clear()
            try:
                transport = await self._dial_once()
                if is_warned:
                    away_s = time.monotonic() - started
                    logger.warning("the scheduler is back after %.0f s", away_s)
                return transport
            except (AuthError, VersionError, InvalidError):
                raise
            except (ConnectionError, OSError) as error:
                is_gone = self._was_found and time.monotonic() < started + config.CONNECT_TIMEOUT_S
                if is_first and not (self._is_embedded and is_gone):
                    raise
                away_s = time.monotonic() - started
                if not is_warned and away_s > WARN_AFTER_S:
                    is_warned = True
                    logger.warning(
                        "the scheduler has been away for %.0f s (%s); calls wait for it and go on "
                        "when it is back",
                        away_s,
                        error,
                    )
            await asyncio.sleep(delay)
            delay = min(delay * 2, RECONNECT_DELAY_MAX_S)

    @property
    def _is_embedded(self) -> bool:
        return not self.is_nested and not os.environ.get("FANOUT_URL")

    async def _dial_once(self) -> wire.Transport:
        self._was_found = False
        info = {
            "hostname": platform.node(),
            "pid": os.getpid(),
            "python": platform.python_version(),
            "program": os.path.basename(sys.argv[0]) if sys.argv else "",
        }
        container = context.container
        if container is not None:
            hello = m.Hello(
                m.PROTOCOL_VERSION,
                "container",
                str(container.container_id),
                self.session_id,
                container.secret,
                info,
            )
            return await wire.connect_container(
                container.socket_path,
                hello=hello,
                allowed=m.TO_CLIENT,
                handler=lambda transport: SessionHandler(self, transport),
            )
        join = await self._find_scheduler()
        self._was_found = True
        return await wire.connect(
            join,
            role="client",
            session_id=self.session_id,
            info=info,
            handler=lambda transport: SessionHandler(self, transport),
        )

    async def _find_scheduler(self) -> JoinString:
        url = os.environ.get("FANOUT_URL")
        if url:
            return JoinString.parse(url)
        from fanout.client import local

        # The embedded default may have left meanwhile, or be another one now: look each time.
        return await in_thread(local.ensure_cluster)

    async def _await_apps(self, transport: wire.Transport) -> None:
        """After the scheduler's restart an app must be opened by its owner, on another loop's
        connection, before this session can define functions of it."""
        epoch = transport.peer.epoch if isinstance(transport.peer, m.Welcome) else 0
        deadline = time.monotonic() + APP_WAIT_S
        for run in list(self._runs.values()):
            while run.is_open and run.owner is not None and run.owner is not self:
                if run.opened_epoch >= epoch or time.monotonic() > deadline:
                    break
                await asyncio.sleep(RECONNECT_DELAY_MIN_S)

    def _attach(self, transport: wire.Transport) -> None:
        """A new connection: say all that must be true over there."""
        last_words = self.last_words.again()
        self.transport = transport
        self.waiting.forget()
        epoch = transport.peer.epoch if isinstance(transport.peer, m.Welcome) else 0
        self.exchange = BlobExchange(
            self.store,
            transport.send,
            transport.send_bulk,
            self._on_blob_completed,
            self.loop.call_later,
            trusts_peer=True,
        )
        for run in self._runs.values():
            if run.owner is self and not self.is_nested:
                transport.send(m.OpenApp(run.app_id, run.name))
                run.opened_epoch = epoch
        if (watcher := output.active) is not None:
            watcher.connected()
            self.watch(True)
        for definition in self._definitions.values():
            self._send_definition(definition)
        for words in last_words:
            transport.send(words)
        for call in list(self._calls.values()):
            call.resume()
        for fetches in self._fetches.values():
            for fetch in fetches:
                for message in fetch.questions():
                    transport.send(message)
        for message, _ in self._requests.values():
            transport.send(message)
        if self.uses_objects:
            transport.send(m.RequestsRepeated(len(self._requests)))
        self.waiting.review()

    def lose(self, transport: wire.Transport, error: Exception | None) -> None:
        """The connection is gone."""
        if self.transport is not transport:
            return
        logger.debug("= connection lost: %s", error)
        if self.exchange is not None:
            self.exchange.close()
        self.transport = self.exchange = None
        # Calls that still run say it anew, and of the others the last words are repeated.
        self._lazy.clear()
        for call in self._calls.values():
            call.drop_parked()
        self._parked_calls.clear()
        if isinstance(error, AuthError | VersionError) and self._task is not None:
            self.fail_all(error)
        self._lost.set()

    def fail_all(self, error: Exception) -> None:
        """There will be no connection: whoever waits is told."""
        for call in list(self._calls.values()):
            call.fail(error)
        for fetches in list(self._fetches.values()):
            for fetch in list(fetches):
                fetch.fail(error)
        for _, future in self._requests.values():
            if not future.done():
                future.set_exception(error)
        self._requests.clear()

    async def close_all(self) -> None:
        """Close what was opened here: the runs of apps first."""
        for run in [run for run in self._runs.values() if run.owner is self]:
            await self.close_app(run)
        await self.close()

    async def close(self) -> None:
        """Close the connection, what was sent flushed first. It opens again when it is used."""
        self._is_closed = True
        task, self._task, self._opening = self._task, None, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.transport = self.exchange = None

    # --- apps and functions ----------------------------------------------------------------------

    async def open_app(self, run: AppRun) -> None:
        """Begin a run; it ends with `close_app`, or when this session is gone for good."""
        run.owner = self
        await self.connect()
        self._runs[run.app_id] = run
        self.send(m.OpenApp(run.app_id, run.name))
        assert self.transport is not None
        peer = self.transport.peer
        run.opened_epoch = peer.epoch if isinstance(peer, m.Welcome) else 0

    async def close_app(self, run: AppRun) -> None:
        """End a run: its attached calls are cancelled. Closes the connection if it was the last."""
        run.is_open = False
        self._runs.pop(run.app_id, None)
        for call in list(self._calls.values()):
            if call.app_id == run.app_id and not call.state.is_durable:
                call.fail(InvalidError(f"the run of app {run.name!r} ended under this call"))
        for function_id, definition in list(self._definitions.items()):
            if definition.app_id == run.app_id:
                del self._definitions[function_id]
        if run.owner is self and self.is_connected:
            self.send(m.CloseApp(run.app_id))
        await self.close_if_unused()

    async def close_if_unused(self) -> None:
        """Close the connection if nothing hangs on it: no run, call, question, ephemeral object."""
        is_used = self._calls or self._requests or self.ephemeral_count
        if not is_used and not any(run.owner is self for run in self._runs.values()):
            await self.close()

    def use_app(self, run: AppRun) -> None:
        """A call of this session belongs to the run."""
        self._runs.setdefault(run.app_id, run)

    def define(self, definition: m.DefineFunction, sources: bytes | None) -> None:
        """Make sure that the scheduler knows a function before a call of it is opened."""
        if definition.function_id in self._definitions:
            return
        self._definitions[definition.function_id] = definition
        if sources is not None:
            self.pin(definition.blobs[0], sources)
        if self.is_connected:
            self._send_definition(definition)

    def _send_definition(self, definition: m.DefineFunction) -> None:
        if self.exchange is not None:
            for blob_id in definition.blobs:
                if self.store.has(blob_id):
                    self.exchange.offer(blob_id)
        self.send(definition)

    # --- calls and questions ---------------------------------------------------------------------

    def watch(self, is_on: bool) -> None:
        """Be told how calls get on, or no more. A container shows nothing to anybody."""
        if not self.is_nested:
            self.send(m.WatchProgress(is_on))

    def open_call(self, call: LiveCall) -> None:
        """Send a call's messages from its next flush on, and give it what arrives for it. So the
        call and its first inputs leave in one write."""
        self._calls[call.state.call_id] = call
        self._wanted.set()
        if (watcher := output.active) is not None:
            watcher.open_call(call, self._definitions[call.state.function_id].name)

    def close_call(self, call: LiveCall) -> None:
        """Nobody is interested in the call any more."""
        if self._calls.pop(call.state.call_id, None) is not None:
            self._parked_calls.discard(call)
            if (watcher := output.active) is not None:
                watcher.close_call(call)

    def open_fetch(self, fetch: LiveFetch) -> None:
        self._fetches.setdefault(fetch.call_id, []).append(fetch)
        self._wanted.set()
        for message in fetch.questions():
            self.send(message)

    def close_fetch(self, fetch: LiveFetch) -> None:
        fetches = self._fetches.get(fetch.call_id, [])
        if fetch in fetches:
            fetches.remove(fetch)
            self.send(m.StopFetch(fetch.request_id))
        if not fetches:
            self._fetches.pop(fetch.call_id, None)

    def next_request(self) -> int:
        self._request_counter += 1
        return self._request_counter

    async def ask(self, question: Question) -> Any:
        """Send a question and wait for its answer, over reconnects too."""
        await self.connect()
        future = self.post(question)
        waiter = self.waiting.begin()
        try:
            return await future
        finally:
            self.waiting.end(waiter)
            self.drop_request(question.request_id)

    def post(self, question: Any) -> asyncio.Future[Any]:
        """Send a question, and again after each reconnect until `drop_request`; its answer."""
        future: asyncio.Future[Any] = self.loop.create_future()
        self._requests[question.request_id] = (question, future)
        self._wanted.set()
        self.send(question)
        return future

    def drop_request(self, request_id: int) -> None:
        """Nobody waits for this answer any more, or it has come."""
        self._requests.pop(request_id, None)

    def send(self, message: m.Message) -> None:
        """Send if connected; what matters is kept elsewhere and repeated after a reconnect."""
        transport = self.transport
        if transport is None or transport.is_closed:
            return
        if self._lazy:
            self._queue_lazy()
        transport.send(message)

    def send_all(self, messages: Iterable[m.Message]) -> None:
        """Like `send`, in one write and without waiting for the loop's next turn."""
        transport = self.transport
        if transport is None or transport.is_closed:
            return
        if self._lazy:
            self._queue_lazy()
        for message in messages:
            transport.queue(message)
        transport.flush()

    def send_lazily(self, message: m.Message) -> None:
        """Send with the next message, or alone in a moment.

        Acknowledgements make room over there and nobody waits for them; one of its own after each
        single call would cost both sides as much as the call's outputs did.
        """
        self._lazy.append(message)
        if self._lazy_timer is None:
            self._lazy_timer = self.loop.call_later(LAZY_DELAY_S, self._send_lazy_alone)

    def _send_lazy_alone(self) -> None:
        self._queue_lazy()
        self.send_all(())

    def _queue_lazy(self) -> None:
        if self._lazy_timer is not None:
            self._lazy_timer.cancel()
            self._lazy_timer = None
        lazy, self._lazy = self._lazy, []
        if self.transport is not None and not self.transport.is_closed:
            for message in lazy:
                self.transport.queue(message)

    # --- blobs -----------------------------------------------------------------------------------

    def pin(self, blob_id: bytes, data: bytes | memoryview | None = None) -> None:
        """Keep a blob until it was unpinned as often."""
        if data is not None:
            self.store.put(blob_id, data)
        self._blob_pins[blob_id] = self._blob_pins.get(blob_id, 0) + 1

    def unpin(self, blob_id: bytes) -> None:
        count = self._blob_pins.get(blob_id, 0) - 1
        if count > 0:
            self._blob_pins[blob_id] = count
        else:
            self._blob_pins.pop(blob_id, None)
            self.store.drop(blob_id)

    def offer(self, blob_id: bytes) -> None:
        if self.exchange is not None:
            self.exchange.offer(blob_id)

    def _on_blob_completed(self, blob_id: bytes) -> None:
        if blob_id not in self._blob_pins:
            self.store.drop(blob_id)
            return
        for call in list(self._parked_calls):
            if call.unpark():
                self._parked_calls.discard(call)
        for fetches in list(self._fetches.values()):
            for fetch in list(fetches):
                fetch.unpark()

    # --- receiving -------------------------------------------------------------------------------

    def receive(self, messages: list[m.Message]) -> None:
        """All messages of one read."""
        touched: dict[bytes, LiveCall] = {}
        has_ended_wait = False
        for message in messages:
            kind = type(message)
            if kind in m.BLOB_KINDS:
                assert self.exchange is not None
                self.exchange.handle(message)
                continue
            if kind in m.ENDS_WAIT:
                self.waiting.seen += 1
                has_ended_wait = True
            call_id = getattr(message, "call_id", None)
            if call_id is None or isinstance(message, _NOT_FOR_CALLS):
                self._on_other(message)
                continue
            call = self._calls.get(call_id)
            if call is not None:
                if not call.receive(message):
                    self._parked_calls.add(call)
                touched[call_id] = call
            elif call_id in self._fetches:
                for fetch in list(self._fetches[call_id]):
                    fetch.receive(message)
            else:
                self.unknown_count += 1
        for call in touched.values():
            call.settle()
        if has_ended_wait:
            self.waiting.review()

    def _on_other(self, message: m.Message) -> None:
        if isinstance(message, m.Log | m.CallProgress | m.FunctionProgress):
            if (watcher := output.active) is not None:
                watcher.receive(message)
        elif isinstance(message, m.Notice):
            logger.warning("%s", message.text)
        elif isinstance(message, Answer):
            self._on_answer(message)
        elif isinstance(message, m.Goodbye):
            logger.debug("= the scheduler says goodbye: %s", message.text)

    def _on_answer(self, message: Answer) -> None:
        request = self._requests.get(message.request_id)
        if request is not None:
            if not request[1].done():
                request[1].set_result(message)
            return
        if isinstance(message, m.CallInfo):
            for fetch in list(self._fetches.get(message.call_id, ())):
                fetch.receive(message)
