"""One peer of the core, as the shell sees it: what comes from it, and what of that is the shell's
own affair (sessions that are relayed, blobs, a goodbye). All else goes to the core.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fanout.exceptions import ProtocolError, StorageError
from fanout.protocol import messages as m
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import Token
from fanout.protocol.transport import Transport
from fanout_scheduler.core.events import BlobRefused, FrameReceived, PeerId, PeerWritable
from fanout_scheduler.relay import VirtualTransport, unwrap

if TYPE_CHECKING:
    from fanout_scheduler.server import SchedulerServer

log = logging.getLogger("fanout.scheduler")

AnyTransport = Transport | VirtualTransport

#: Frames that the shell deals with itself or must look into; all others go straight to the core.
_SHELL_TYPES: frozenset[type[m.Message]] = m.BLOB_KINDS | {
    m.Relay, m.SessionOpened, m.SessionClosed, m.Goodbye,
}  # fmt: skip


class Peer:
    """One peer of the core: a connection, or a session relayed over a worker's connection."""

    __slots__ = (
        "_server",
        "doubted",
        "exchange",
        "is_gone",
        "peer_id",
        "reason",
        "role",
        "sessions",
        "token",
        "transport",
        "unfinished_count",
        "worker",
    )

    def __init__(
        self,
        server: SchedulerServer,
        peer_id: PeerId,
        role: str,
        transport: AnyTransport,
        token: Token | None = None,
    ) -> None:
        self._server = server
        self.peer_id = peer_id
        self.role = role
        #: What it was let in by; None for a session, which ends with its worker.
        self.token = token
        self.transport = transport
        self.exchange = BlobExchange(
            server.blobs.store,
            transport.send,
            transport.send_bulk,
            self._blob_completed,
            server.later,
            is_needed=server.core.has_blob,
            failed=self._blob_failed,
            refused=self._blob_refused,
            doubted=lambda blob_id: server.verifier.ask(blob_id, self),
        )
        #: Of a worker: its nested clients by session id.
        self.sessions: dict[bytes, Peer] = {}
        #: Of a nested client: the worker through which it speaks.
        self.worker: Peer | None = None
        self.is_gone = False
        self.reason = ""
        #: Blobs that it found to be broken, and that were sound here.
        self.doubted: set[bytes] = set()
        #: As last seen; see `Transport`.
        self.unfinished_count = 0

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
            self.exchange.handle(message)
            if isinstance(message, m.BlobOffer) and self.role == "worker":
                self._claim_if_here(message.blob_id)

    def _claim_if_here(self, blob_id: bytes) -> None:
        """A worker that is told that a blob is here will name it, be it much later."""
        if self._server.blobs.store.has(blob_id):
            self._blob_completed(blob_id)

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
        self._server.events.append(self._server.completed(blob_id, self.peer_id))
        self._server.schedule_turn()

    def _blob_failed(self, blob_id: bytes, error: StorageError) -> None:
        """A full disk. The calls of a client that need the blob fail, and it offers those that
        others of its calls need again, as a worker does with what its outputs need."""
        log.error("= peer %d: %s", self.peer_id, error)
        self._server.events.append(BlobRefused(blob_id, str(error)))
        self._server.schedule_turn()

    def _blob_refused(self, blob_id: bytes, text: str) -> None:
        log.warning("= peer %d has no room for blob %s: %s", self.peer_id, blob_id.hex(), text)
