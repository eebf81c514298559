"""The shell round the core: sockets, clock, disk and signals of one scheduler process.

Everything happens in *turns*. Whatever comes in (frames, lost connections, `Stored`) is put into
a list, and a turn is due. One turn gives the core all events of the list, fires its deadlines,
asks it once to decide, and carries out the commands. Callbacks of one round of the loop all come
before the turn they asked for, so under load a turn serves many sockets, and without load it
follows the read at once. Nothing in a turn awaits anything.

The clock leaves out the time in which this process did not run (stopped, a paused virtual
machine): its peers could not reach it then, and must not be taken for lost when it comes back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanout.exceptions import InternalError, ProtocolError, StorageError
from fanout.protocol import messages as m
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import JoinString
from fanout.protocol.transport import Server, Transport, serve
from fanout_scheduler.blobs import BlobKeeper
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import (
    BlobCompleted,
    BlobRefused,
    Command,
    Disconnect,
    DropBlob,
    Event,
    Exit,
    FrameReceived,
    PeerConnected,
    PeerId,
    PeerLost,
    PeerWritable,
    Record,
    Send,
    SendBlob,
    Store,
    Stored,
    StoreFailed,
    TimePassed,
)
from fanout_scheduler.crash import describe, write_crash
from fanout_scheduler.home import Home, boot_id
from fanout_scheduler.relay import VirtualTransport, unwrap
from fanout_scheduler.store import StoreThread, blob_ids_of, load_key
from fanout_scheduler.tokens import Tokens

if TYPE_CHECKING:
    from fanout.protocol.tls import TlsIdentity

log = logging.getLogger("fanout.scheduler")

#: What the timers of uvloop are exact to. One that is due in less fires at once, and any may be a
#: part of a step early: a turn that comes before its deadline only costs time.
TIMER_STEP_S = 0.001
#: Turns less than this apart mean load: then events are gathered.
BUSY_GAP_S = 0.0001

#: How often the clock is looked at when nothing happens, and what beyond that is a gap.
TICK_INTERVAL_S = 0.5
GAP_S = 1.0
#: Peers get this long to take what was sent to them before a scheduler that leaves.
LEAVE_TIMEOUT_S = 2.0
#: The cipher is loaded this long after the start, out of the way of the first client.
_WARM_DELAY_S = 1.0
#: After so many failed decisions in a row the core will not recover by itself.
_DECIDE_FAILURES_MAX = 3
_DECIDE_RETRY_S = 0.05

EXIT_OK = 0
EXIT_BROKEN = 70

#: Frames that the shell deals with itself or must look into; all others go straight to the core.
_SHELL_TYPES: frozenset[type[m.Message]] = m.BLOB_KINDS | {
    m.Relay, m.SessionOpened, m.SessionClosed, m.Goodbye,
}  # fmt: skip
#: Frames that name blobs; see `blobs.py`.
_NAMING_TYPES: frozenset[type[m.Message]] = frozenset(
    {m.DefineFunction, m.Inputs, m.SubmitCall, m.LeaseOutputs, m.LeaseItems}
)


AnyTransport = Transport | VirtualTransport


class Clock:
    """Seconds since some point, growing only while this process runs.

    It must be asked at least every `TICK_INTERVAL_S`; when it was not asked for `GAP_S` longer
    than that, the process did not run, and the time since it was last asked is left out. So a
    deadline that was not reached before the gap is not reached by it.
    """

    __slots__ = ("_last", "_time", "skipped_s")

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._time = source
        self._last = source()
        self.skipped_s = 0.0

    def now(self) -> float:
        current = self._time()
        elapsed = current - self._last
        self._last = current
        if elapsed > TICK_INTERVAL_S + GAP_S:
            self.skipped_s += elapsed
            log.warning("the scheduler did not run for %.1f s; deadlines are moved", elapsed)
        return current - self.skipped_s


@dataclass(slots=True)
class Options:
    """How a scheduler is run."""

    #: Address to listen on, and the one that join strings name.
    host: str
    public_host: str
    #: 0 for any.
    port: int
    #: Seconds without clients and open calls after which it leaves; None for never.
    idle_timeout_s: float | None
    tls: TlsIdentity | None = None


class Peer:
    """One peer of the core: a connection, or a session relayed over a worker's connection."""

    __slots__ = (
        "_server",
        "exchange",
        "is_gone",
        "peer_id",
        "reason",
        "role",
        "sessions",
        "transport",
    )

    def __init__(
        self,
        server: SchedulerServer,
        peer_id: PeerId,
        role: str,
        transport: Transport | VirtualTransport,
    ) -> None:
        self._server = server
        self.peer_id = peer_id
        self.role = role
        self.transport = transport
        self.exchange = BlobExchange(
            server.blobs.store, transport.send, transport.send_bulk, self._blob_completed
        )
        #: Of a worker: its nested clients by session id.
        self.sessions: dict[bytes, Peer] = {}
        self.is_gone = False
        self.reason = ""

    # --- called by the transport -----------------------------------------------------------------

    def messages_received(self, messages: list[m.Message]) -> None:
        if self.is_gone:
            return
        server = self._server
        events, peer_id = server.events, self.peer_id
        try:
            for message in messages:
                if type(message) in _SHELL_TYPES:
                    self._take(message)
                else:
                    events.append(FrameReceived(peer_id, message))
        finally:
            # A ProtocolError goes on to the transport, which closes the connection; what the peer
            # sent before it is good.
            server.turn_soon()

    def connection_lost(self, error: Exception | None) -> None:
        self._server.lose(self, self.reason or (str(error) if error is not None else "closed"))

    def writable_changed(self, is_writable: bool) -> None:
        server = self._server
        for peer in (self, *self.sessions.values()):
            server.events.append(PeerWritable(peer.peer_id, is_writable))
        server.schedule_turn()

    # --- what the shell does itself --------------------------------------------------------------

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.Relay):
            self._relay(message)
        elif isinstance(message, m.SessionOpened):
            self._server.open_session(self, message)
        elif isinstance(message, m.SessionClosed):
            session = self.sessions.get(message.session_id)
            if session is not None:
                session.transport.abort()
                self._server.lose(session, "its container closed it")
        elif isinstance(message, m.Goodbye):
            self.reason = f"{message.code}: {message.text}"
        else:
            if isinstance(message, m.BlobOffer):
                self._server.blobs.keep_offered(message.blob_id, self._server.clock.now())
            try:
                self.exchange.handle(message)
            except StorageError as error:
                # A full disk. The transfer ends with the connection; the peer comes back, learns
                # which of its calls failed, and offers again what it still needs to send.
                log.error("= peer %d: %s", self.peer_id, error)
                if isinstance(message, m.BlobPart):
                    self._server.events.append(BlobRefused(message.blob_id, str(error)))
                self._server.disconnect(self, "store", str(error))

    def _relay(self, relay: m.Relay) -> None:
        session = self.sessions.get(relay.session_id)
        if session is None:
            # The session was closed on this side while the frame was on its way.
            self._server.late_relay_count += 1
            return
        try:
            message = unwrap(relay)
            if type(message) in _SHELL_TYPES:
                session._take(message)
            else:
                self._server.events.append(FrameReceived(session.peer_id, message))
        except ProtocolError as error:
            # The fault is the container's; its worker and the worker's other sessions go on.
            log.warning("peer %d (nested) broke the protocol: %s", session.peer_id, error)
            self._server.disconnect(session, "protocol", str(error))

    def _blob_completed(self, blob_id: bytes) -> None:
        self._server.events.append(self._server.completed(blob_id))
        self._server.schedule_turn()


class SchedulerServer:
    """One scheduler, from `start` to the end of `run`.

    Args:
        home: its folder, locked.
        options: how it is run.

    Raises:
        StorageError: the store, the tokens or the key cannot be read.
    """

    def __init__(self, home: Home, options: Options) -> None:
        self.home = home
        self.options = options
        self.tokens = Tokens(home.tokens)
        key = load_key(home.key, home.database)
        self.store = StoreThread(home.database, key, self._on_stored, sync_blobs=self._sync_blobs)
        self.epoch = self.store.epoch()
        self.clock = Clock()
        self.core = Scheduler(self.epoch)
        wanted: set[bytes] = set()
        records = _noting_blobs(self.store.load(), wanted)
        self.core.restore(records, self.clock.now(), time.time())
        self.blobs = BlobKeeper(home.blobs, wanted)
        #: What the core has not been told yet.
        self.events: list[Event] = [self.completed(blob_id) for blob_id in self.blobs.present]
        self.late_relay_count = 0
        self._peers: dict[PeerId, Peer] = {}
        self._peer_count = 0
        self._is_turn_due = False
        self._turn_ended_at = 0.0
        self._decide_failures = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_deadline = 0.0
        self._idle_since: float | None = None
        self._exit_code: asyncio.Future[int] | None = None
        self._exit_reason = ""
        self._is_leaving = False

    # --- life ------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[dict[str, Any]], None]) -> int:
        """Serve until told to leave; gives the exit code of the process.

        Args:
            ready: called once with the content of `scheduler.json`, when it has been written.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._exit_code = loop.create_future()
        self.store.start(loop)
        options = self.options
        listener = await serve(
            options.host,
            options.port,
            tokens=self.tokens.lookup,
            welcome=self._welcome,
            handler=self._connected,
            tls=options.tls,
        )
        address = self._address(listener.port)
        self.home.publish(address)
        self._tick()
        self.schedule_turn()
        loop.call_later(_WARM_DELAY_S, self.store.warm)
        ready(address)
        log.info("epoch %d, listening on %s:%d", self.epoch, options.host, listener.port)
        try:
            code = await self._exit_code
        finally:
            self._is_leaving = True
            self.home.withdraw()
            await self._say_goodbye(listener)
            self.store.close()
        log.info("leaving: %s", self._exit_reason)
        return code

    def leave(self, reason: str, code: int = EXIT_OK) -> None:
        """Have `run` come to its end; what was sent and stored before is completed."""
        assert self._exit_code is not None
        if not self._exit_code.done():
            self._exit_reason = reason
            self._exit_code.set_result(code)

    async def _say_goodbye(self, listener: Server) -> None:
        goodbye = m.Goodbye("shutdown", f"the scheduler leaves: {self._exit_reason}")
        transports = [peer.transport for peer in self._peers.values()]
        for transport in transports:
            if isinstance(transport, Transport):
                transport.close(goodbye)
        listener.close()
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await listener.wait_closed()
        except TimeoutError:
            # What is left goes with the process, strangers in mid-handshake among it.
            for transport in transports:
                transport.abort()

    def _address(self, port: int) -> dict[str, Any]:
        tls = self.options.tls
        fingerprint = None if tls is None else tls.fingerprint
        host = self.options.public_host
        joins = {
            f"{role}_join": str(JoinString.of(self.tokens.of_role(role), host, port, fingerprint))
            for role in ("client", "worker")
        }
        return {
            "pid": os.getpid(),
            "boot_id": boot_id(),
            "started": time.time(),
            "host": host,
            "port": port,
            "epoch": self.epoch,
            **joins,
            "version": _version(),
            "python": sys.executable,
        }

    # --- peers -----------------------------------------------------------------------------------

    def _welcome(self, hello: m.Hello, role: str) -> m.Welcome:
        info = {"fanout": _version(), "python": platform.python_version(), "pid": os.getpid()}
        return m.Welcome(self.epoch, info)

    def _connected(self, transport: Transport, hello: m.Hello, role: str) -> Peer:
        peer = self._add_peer(role, transport)
        self.events.append(PeerConnected(peer.peer_id, role, hello.session_id, hello.info))
        self.schedule_turn()
        return peer

    def _add_peer(self, role: str, transport: AnyTransport) -> Peer:
        self._peer_count += 1
        peer = Peer(self, PeerId(self._peer_count), role, transport)
        self._peers[peer.peer_id] = peer
        log.info("= peer %d (%s) connected", peer.peer_id, role)
        return peer

    def open_session(self, worker: Peer, opened: m.SessionOpened) -> None:
        """A container of this worker begins to make calls of its own."""
        if opened.session_id in worker.sessions:
            raise ProtocolError(f"session {opened.session_id.hex()} is open already")
        carrier = worker.transport
        session = self._add_peer("nested", VirtualTransport(carrier, opened.session_id))
        worker.sessions[opened.session_id] = session
        info = {"worker": worker.peer_id, "container_id": opened.container_id}
        self.events.append(PeerConnected(session.peer_id, "nested", opened.session_id, info))
        if isinstance(carrier, Transport) and not carrier.is_writable:
            self.events.append(PeerWritable(session.peer_id, False))

    def lose(self, peer: Peer, reason: str) -> None:
        """A peer is gone, and with a worker the sessions that came through it."""
        if peer.is_gone:
            return
        peer.is_gone = True
        for session in list(peer.sessions.values()):
            session.transport.abort()
            self.lose(session, f"its worker is gone: {reason}")
        peer.exchange.close()
        del self._peers[peer.peer_id]
        if isinstance(peer.transport, VirtualTransport):
            self._forget_session(peer.transport.session_id, peer)
        log.info("= peer %d (%s) lost: %s", peer.peer_id, peer.role, reason)
        self.events.append(PeerLost(peer.peer_id, reason))
        self.schedule_turn()

    def _forget_session(self, session_id: bytes, session: Peer) -> None:
        for peer in self._peers.values():
            if peer.sessions.get(session_id) is session:
                del peer.sessions[session_id]
                return

    # --- turns -----------------------------------------------------------------------------------

    def schedule_turn(self) -> None:
        """Have a turn follow the callbacks that are ready now."""
        if not self._is_turn_due and not self._is_leaving:
            self._is_turn_due = True
            self._loop.call_soon(self._turn)

    def turn_soon(self) -> None:
        """Have a turn now, when the last one is a while ago: then nothing else is likely to be
        ready, and waiting for the loop's next round would only cost time. Under load the last one
        was just now; then one turn serves all sockets that are ready."""
        if self._is_turn_due or self._is_leaving:
            return
        if time.monotonic() - self._turn_ended_at > BUSY_GAP_S:
            self._turn()
        else:
            self.schedule_turn()

    def _turn(self) -> None:
        self._is_turn_due = False
        self._take_turn()
        self._turn_ended_at = time.monotonic()

    def _take_turn(self) -> None:
        core = self.core
        now = self.clock.now()
        events, self.events = self.events, []
        if self.blobs.has_dropped:
            self._revive_blobs(events, now)
        for event in events:
            try:
                core.handle(event, now)
            except Exception as error:
                self._core_failed(error, event)
        try:
            deadline = core.next_deadline()
            if deadline is not None and deadline <= now:
                core.handle(TimePassed(), now)
            commands = core.decide(now)
            deadline = core.next_deadline()
            self._decide_failures = 0
        except Exception as error:
            self._decide_failures += 1
            self._core_failed(error, None)
            self._loop.call_later(_DECIDE_RETRY_S, self.schedule_turn)
            return
        if deadline is not None:
            self._arm(deadline, now)
        if commands:
            # Last, because whoever is written to may get this processor at once.
            self._execute(commands, now)
            if self.blobs.has_dropped:
                # What was let go of in this very turn may be named by a frame of it, too.
                for blob_id in self._revived(events):
                    self.events.append(self.completed(blob_id))
                    self.schedule_turn()

    def _execute(self, commands: list[Command], now: float) -> None:
        peers = self._peers
        addressed: dict[int, AnyTransport] = {}
        for command in commands:
            if type(command) is Send:
                peer = peers.get(command.peer_id)
                if peer is not None:
                    addressed[command.peer_id] = peer.transport
                    try:
                        peer.transport.queue(command.message)
                    except ProtocolError as error:
                        self._core_failed(error, command)
            else:
                try:
                    self._execute_rare(command, now)
                except Exception as error:
                    self._core_failed(error, command)
        for transport in addressed.values():
            transport.flush()

    def _execute_rare(self, command: Command, now: float) -> None:
        if isinstance(command, Store):
            self.store.submit(command)
        elif isinstance(command, DropBlob):
            self.blobs.drop(command.blob_id, now)
        elif isinstance(command, SendBlob):
            peer = self._peers.get(command.peer_id)
            if peer is not None:
                peer.exchange.offer(command.blob_id)
        elif isinstance(command, Disconnect):
            peer = self._peers.get(command.peer_id)
            if peer is not None:
                self.disconnect(peer, command.code, command.text)
        elif isinstance(command, Exit):
            self.leave(command.reason)
        else:
            raise AssertionError(f"no such command: {command!r}")

    def disconnect(self, peer: Peer, code: str, text: str) -> None:
        """Say why, and close; of a relayed session only the session ends."""
        peer.reason = peer.reason or text
        peer.transport.close(m.Goodbye(code, text))
        if isinstance(peer.transport, VirtualTransport):
            self.lose(peer, text)

    def _revive_blobs(self, events: list[Event], now: float) -> None:
        """Tell the core of blobs that it let go of and that frames of this turn name again, before
        it sees the frames."""
        for blob_id in self._revived(events):
            self.core.handle(self.completed(blob_id), now)

    def completed(self, blob_id: bytes) -> BlobCompleted:
        """The news that a blob is whole."""
        return BlobCompleted(blob_id, self.blobs.store.size(blob_id))

    def _revived(self, events: list[Event]) -> Iterator[bytes]:
        """The dropped blobs that these frames name. They are kept again."""
        for event in events:
            if type(event) is FrameReceived and type(event.message) in _NAMING_TYPES:
                yield from self.blobs.revive(event.message)

    def _arm(self, deadline: float, now: float) -> None:
        """Have a turn when the core's next deadline comes. A timer that is set for an earlier time
        stays; it then arms the next one. So deadlines that keep moving away cost nothing."""
        if self._timer is not None:
            if self._timer_deadline <= deadline:
                return
            self._timer.cancel()
        self._timer_deadline = deadline
        self._timer = self._loop.call_later(max(deadline - now, 0.0) + TIMER_STEP_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.schedule_turn()

    def _on_stored(self, event: Stored | StoreFailed) -> None:
        self.events.append(event)
        self.schedule_turn()

    def _sync_blobs(self, blob_ids: Iterable[bytes]) -> None:
        self.blobs.sync(blob_ids)

    # --- bugs ------------------------------------------------------------------------------------

    def _core_failed(self, error: Exception, culprit: Event | Command | None) -> None:
        """The core has a bug. Go on without this event if the rest of its state is sound."""
        doing = "decide" if culprit is None else describe(culprit)
        log.error("the core failed on %s", doing, exc_info=error)
        path = write_crash(self.home.path, error, doing, self.core.snapshot)
        if path is not None:
            log.error("details are in %s", path)
        try:
            self.core.check()
            if self._decide_failures >= _DECIDE_FAILURES_MAX:
                raise InternalError(f"{self._decide_failures} decisions in a row failed")
        except Exception as broken:
            log.critical("the core's state is broken: %s", broken)
            self.leave(f"internal error: {broken}", EXIT_BROKEN)
            return
        if isinstance(culprit, FrameReceived | Send | SendBlob):
            # The conversation lacks a frame now, and somebody would wait for its effect for ever.
            peer = self._peers.get(culprit.peer_id)
            if peer is not None:
                text = f"the scheduler failed on a frame: {type(error).__name__}: {error}"
                self.disconnect(peer, "internal", text[:1000])

    # --- time ------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.clock.now()
        self.blobs.expire(now)
        self._leave_if_idle(now)
        self._loop.call_later(TICK_INTERVAL_S, self._tick)

    def _leave_if_idle(self, now: float) -> None:
        timeout_s = self.options.idle_timeout_s
        if timeout_s is None:
            return
        if not self._is_idle():
            self._idle_since = None
            return
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since < timeout_s:
            return
        # A client that looks for a scheduler holds this lock. With it in hand nobody can be about
        # to connect; whoever comes next waits for the lock until this process has ended, finds no
        # address and starts another scheduler.
        if self.home.try_start_lock():
            self.home.withdraw()
            self.leave(f"idle for {timeout_s:g} s")

    def _is_idle(self) -> bool:
        """No client is connected and no call is open. Workers alone keep nobody busy."""
        if self.events or any(peer.role != "worker" for peer in self._peers.values()):
            return False
        return not self.core.snapshot()["open_call_count"]


def _noting_blobs(records: Iterator[Record], wanted: set[bytes]) -> Iterator[Record]:
    for record in records:
        wanted.update(blob_ids_of(record))
        yield record


def _version() -> str:
    import fanout

    return str(getattr(fanout, "__version__", "0"))
