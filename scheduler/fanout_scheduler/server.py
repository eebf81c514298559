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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanout.config import SPAWNED_SIZE_BYTES_MAX
from fanout.exceptions import ConnectionError, InternalError, ProtocolError
from fanout.protocol import messages as m
from fanout.protocol.blob_store import FileBlobStore, Finding
from fanout.protocol.join import Address, JoinString, Token
from fanout.protocol.transport import Server, Transport, serve
from fanout_scheduler.blobs import BlobKeeper
from fanout_scheduler.clock import TICK_INTERVAL_S, Clock
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import (
    BlobCompleted,
    BlobLost,
    Command,
    Disconnect,
    DropBlob,
    Event,
    Exit,
    FrameReceived,
    PeerConnected,
    PeerHeard,
    PeerId,
    PeerLost,
    PeerWritable,
    Send,
    SendBlob,
    Store,
    Stored,
    StoreFailed,
    TimePassed,
    WithdrawBlob,
)
from fanout_scheduler.crash import describe, write_crash
from fanout_scheduler.home import Home, boot_id
from fanout_scheduler.peer import AnyTransport, Peer
from fanout_scheduler.relay import VirtualTransport
from fanout_scheduler.store import StoreThread, load_key
from fanout_scheduler.tokens import REVOKED, Tokens
from fanout_scheduler.verifier import Verifier

if TYPE_CHECKING:
    from fanout.protocol.tls import TlsIdentity

log = logging.getLogger("fanout.scheduler")

#: What the timers of uvloop are exact to. One that is due in less fires at once, and any may be a
#: part of a step early: a turn that comes before its deadline only costs time.
TIMER_STEP_S = 0.001
#: Turns less than this apart mean load: then events are gathered.
BUSY_GAP_S = 0.0001

#: Peers get this long to take what was sent to them before a scheduler that leaves.
LEAVE_TIMEOUT_S = 2.0
#: The cipher is loaded this long after the start, out of the way of the first client.
_WARM_DELAY_S = 1.0
#: After so many failed decisions in a row the core will not recover by itself.
_DECIDE_FAILURES_MAX = 3
_DECIDE_RETRY_S = 0.05

EXIT_OK = 0
EXIT_BROKEN = 70

#: Frames that name blobs; see `blobs.py`.
_NAMING_TYPES: frozenset[type[m.Message]] = frozenset(
    {m.DefineFunction, m.Inputs, m.SubmitCall, m.LeaseOutputs, m.LeaseItems}
)


@dataclass(slots=True)
class Options:
    """How a scheduler is run."""

    #: Where to listen; port 0 is any.
    address: Address
    #: Seconds without clients and open calls after which it leaves; None for never.
    idle_timeout_s: float | None
    #: The host that join strings name; needed for a port.
    public_host: str = ""
    tls: TlsIdentity | None = None
    #: How much memory spawned calls may take.
    spawned_bytes_max: int = SPAWNED_SIZE_BYTES_MAX
    #: More clients and workers are refused.
    connection_count_max: int = 1 << 20


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
        #: What join strings name.
        self._address = options.address
        self.tokens = Tokens(home.tokens)
        key = load_key(home.key, home.database)
        self._files = FileBlobStore(home.blobs)
        # Inputs may be stored while their blobs are still on the way.
        sync_blobs = self._files.sync
        self.store = StoreThread(home.database, key, self._on_stored, sync_blobs=sync_blobs)
        self.epoch = self.store.epoch()
        self.clock = Clock()
        self.core = Scheduler(self.epoch, options.spawned_bytes_max)
        self.blobs = BlobKeeper(self._files)
        self.verifier = Verifier(self._files, self._on_verified)
        now, present = self.clock.now(), self.blobs.sizes()
        self.core.restore(self.store.load(), now, time.time(), present)
        self.blobs.clean(self.core.state.present_blobs)
        #: What the core has not been told yet.
        self.events: list[Event] = []
        self.late_relay_count = 0
        self._peers: dict[PeerId, Peer] = {}
        self._peer_count = 0
        self._connection_count = 0
        self._is_turn_due = False
        self._turn_ended_at = 0.0
        self._decide_failures = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_deadline = 0.0
        self._idle_since: float | None = None
        self._exit_code: asyncio.Future[int] | None = None
        self._exit_reason = ""
        #: The tokens have changed, and where it stands that they have could not be written yet.
        self._is_address_old = False
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
            options.address,
            tokens=self.tokens.lookup,
            welcome=self._welcome,
            handler=self._connected,
            tls=options.tls,
        )
        if not options.address.path:
            self._address = Address(options.public_host, listener.port)
        record = self._record()
        self.home.publish(record)
        self._tick()
        self.schedule_turn()
        loop.call_later(_WARM_DELAY_S, self.store.warm)
        ready(record)
        log.info("epoch %d, listening on %s", self.epoch, self._address)
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

    def _record(self) -> dict[str, Any]:
        """The content of `scheduler.json`."""
        tls = self.options.tls
        fingerprint = None if tls is None else tls.fingerprint
        joins = {
            f"{role}_join": str(
                JoinString.of(self.tokens.of_role(role), self._address, fingerprint)
            )
            for role in ("client", "worker")
        }
        return {
            "pid": os.getpid(),
            "boot_id": boot_id(),
            "started": time.time(),
            "address": str(self._address),
            "epoch": self.epoch,
            **joins,
            "tokens": self.tokens.digest,
            "version": _version(),
            "python": sys.executable,
        }

    # --- peers -----------------------------------------------------------------------------------

    def _welcome(self, hello: m.Hello, role: str) -> m.Welcome:
        if self._connection_count >= self.options.connection_count_max:
            text = (
                f"the scheduler has {self._connection_count} connections, and its limit of open "
                f"files allows no more. Start it again with a higher one (`ulimit -n`)"
            )
            # Not for good: others leave, and calls must not end with it. It comes again and again
            # meanwhile, so the log is left to the transport, which counts.
            raise ConnectionError(text)
        info = {"fanout": _version(), "python": platform.python_version(), "pid": os.getpid()}
        return m.Welcome(self.epoch, info)

    def _connected(self, transport: Transport, hello: m.Hello, role: str) -> Peer:
        peer = self._add_peer(role, transport, self.tokens.lookup(hello.token_id))
        self._connection_count += 1
        info = hello.info | {"token_id": hello.token_id}
        self.events.append(PeerConnected(peer.peer_id, role, hello.session_id, info))
        self.schedule_turn()
        return peer

    def _add_peer(self, role: str, transport: AnyTransport, token: Token | None = None) -> Peer:
        self._peer_count += 1
        peer = Peer(self, PeerId(self._peer_count), role, transport, token)
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
        session.worker = worker
        info = {"worker": worker.peer_id, "container_id": opened.container_id}
        self.events.append(PeerConnected(session.peer_id, "nested", opened.session_id, info))
        if isinstance(carrier, Transport) and not carrier.is_writable:
            self.events.append(PeerWritable(session.peer_id, False))

    def _reread_tokens(self) -> None:
        """Follow the token file: whoever came with a token that is not in it any more goes, and
        does not come back, so nothing waits for it."""
        if not self.tokens.reread():
            if self._is_address_old:
                self._publish_again()
            return
        for peer in list(self._peers.values()):
            if peer.token is not None and self.tokens.lookup(peer.token.token_id) != peer.token:
                text = REVOKED.format(token_id=peer.token.token_id)
                self.disconnect(peer, "auth", text)
                self.lose(peer, text, is_final=True)
        self._publish_again()

    def _publish_again(self) -> None:
        """Say that a change of the tokens is in force, and which ones new clients shall use."""
        try:
            self.home.publish(self._record())
        except OSError as error:
            if not self._is_address_old:
                log.error("%s cannot be written: %s", self.home.address, error)
            self._is_address_old = True
        else:
            self._is_address_old = False

    def lose(self, peer: Peer, reason: str, is_final: bool = False) -> None:
        """A peer is gone, and with a worker the sessions that came through it."""
        if peer.is_gone:
            return
        peer.is_gone = True
        for session in list(peer.sessions.values()):
            session.transport.abort()
            self.lose(session, f"its worker is gone: {reason}")
        peer.exchange.close()
        del self._peers[peer.peer_id]
        self._connection_count -= isinstance(peer.transport, Transport)
        if isinstance(peer.transport, VirtualTransport) and peer.worker is not None:
            session_id = peer.transport.session_id
            if peer.worker.sessions.get(session_id) is peer:
                del peer.worker.sessions[session_id]
        log.info("= peer %d (%s) lost: %s", peer.peer_id, peer.role, reason)
        self.events.append(PeerLost(peer.peer_id, reason, is_final))
        self.schedule_turn()

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
        elif isinstance(command, WithdrawBlob):
            peer = self._peers.get(command.peer_id)
            if peer is not None:
                peer.exchange.withdraw(command.blob_id)
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

    def _on_verified(self, blob_id: bytes, finding: Finding, askers: list[Peer]) -> None:
        """Peers got another content than the id promises: was it the fault of our disk?"""
        if finding == "changed":
            log.error("= blob %s has changed on disk and is removed", blob_id.hex())
        for peer in askers:
            if finding in ("changed", "gone"):
                self.blobs.keep(blob_id)
                self.events.append(BlobLost(blob_id, peer.peer_id))
                self.schedule_turn()
            elif not peer.is_gone:
                self._on_false_doubt(peer, blob_id, finding)

    def _on_false_doubt(self, peer: Peer, blob_id: bytes, finding: Finding) -> None:
        """It may have been the network, once."""
        log.warning("= peer %d: blob %s, broken there, is %s", peer.peer_id, blob_id.hex(), finding)
        if blob_id in peer.doubted and finding == "sound":
            text = "a large value arrived broken twice, and is whole here; is that memory sound?"
            self.disconnect(peer, "protocol", text)
        else:
            peer.doubted.add(blob_id)
            peer.exchange.offer_later(blob_id)

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call a function in so many seconds."""
        self._loop.call_later(delay_s, callback)

    def completed(self, blob_id: bytes, peer_id: PeerId | None = None) -> BlobCompleted:
        """The news that a blob is whole."""
        self.blobs.keep(blob_id)
        return BlobCompleted(blob_id, self.blobs.store.size(blob_id), peer_id)

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
        # Whatever fails below, a full disk or a folder that is gone, the next tick has to come.
        self._loop.call_later(TICK_INTERVAL_S, self._tick)
        now = self.clock.now()
        self._hear_unfinished()
        self._leave_if_idle(now)
        self._reread_tokens()
        self.blobs.expire(now)

    def _hear_unfinished(self) -> None:
        """A frame of many megabytes may take longer than a worker may be silent, and nothing else
        comes beside it."""
        for peer in self._peers.values():
            transport = peer.transport
            if not isinstance(transport, Transport):
                continue
            if transport.unfinished_count != peer.unfinished_count:
                peer.unfinished_count = transport.unfinished_count
                self.events.append(PeerHeard(peer.peer_id))
                self.schedule_turn()

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
        return not self.core.open_call_count


def _version() -> str:
    import fanout

    return str(getattr(fanout, "__version__", "0"))
