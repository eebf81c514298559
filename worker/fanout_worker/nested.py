"""Nested calls: containers reach the scheduler through their daemon's connection.

A container has no token. It connects to the daemon's unix socket with the secret it was started
with; what its client says travels as `Relay`, and the scheduler treats it as a client that may do
less. While the scheduler is out of reach there are no sessions: a container that tries is cut off,
and its client comes again by itself.
"""

from __future__ import annotations

import hmac
import logging
import os
import tempfile
from collections.abc import Callable

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m
from fanout.protocol.transport import Server, Transport, serve_containers

logger = logging.getLogger("fanout.worker")

#: As many as the largest number of 64 bits has.
_ID_DIGITS_MAX = 20


def _container_id_of(hello: m.Hello) -> int | None:
    """Which container somebody says to be; None if that is no number."""
    text = hello.token_id
    is_number = text.isascii() and text.isdecimal() and len(text) <= _ID_DIGITS_MAX
    return int(text) if is_number else None


class _Session:
    """One connection of a container. The handler of its transport."""

    def __init__(self, owner: NestedServer, transport: Transport) -> None:
        hello = transport.peer
        assert isinstance(hello, m.Hello)
        self.session_id = hello.session_id
        container_id = _container_id_of(hello)
        assert container_id is not None
        self.container_id = container_id
        self.transport = transport
        self._owner = owner

    def messages_received(self, messages: list[m.Message]) -> None:
        for message in messages:
            if not isinstance(message, m.Goodbye | m.Heartbeat):
                header = m.encode_header(message)
                payload: m.Payload = message.payload if message.HAS_PAYLOAD else b""  # type: ignore[attr-defined]
                self._owner.send(m.Relay(self.session_id, header, payload))

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.forget(self)

    def writable_changed(self, is_writable: bool) -> None:
        """A container that does not read holds back only itself: what it can be sent is bounded
        by the credit that it gave."""


class NestedServer:
    """The unix socket and the sessions behind it.

    Args:
        find_secret: the secret of a container that lives, by its id; None if there is none.
        send: sends a message to the scheduler; only called while connected.
    """

    def __init__(
        self, find_secret: Callable[[int], bytes | None], send: Callable[[m.Message], None]
    ) -> None:
        self.send = send
        self._find_secret = find_secret
        self._sessions: dict[bytes, _Session] = {}
        self._epoch: int | None = None
        self._server: Server | None = None
        # The path of a socket is short by law, the user's home may not be.
        self._folder = tempfile.mkdtemp(prefix="fanout-")
        self.path = os.path.join(self._folder, "daemon")

    async def start(self) -> None:
        self._server = await serve_containers(
            self.path, accept=self._accept, allowed=m.FROM_NESTED_CLIENT, handler=self._open
        )

    def connected(self, epoch: int) -> None:
        """The scheduler is there; containers may come."""
        self._epoch = epoch

    def disconnected(self) -> None:
        """The scheduler is out of reach: it has lost its side of every session."""
        self._epoch = None
        for session in list(self._sessions.values()):
            session.transport.abort()
        self._sessions.clear()

    def set_writable(self, is_writable: bool) -> None:
        """Whether the scheduler's connection takes more."""
        for session in self._sessions.values():
            if is_writable:
                session.transport.resume_reading()
            else:
                session.transport.pause_reading()

    def handle(self, message: m.Message) -> bool:
        """Take a message of the scheduler. False if it is not about a session."""
        if isinstance(message, m.Relay):
            self._on_relay(message)
        elif isinstance(message, m.SessionClosed):
            session = self._sessions.pop(message.session_id, None)
            if session is not None:
                session.transport.close(m.Goodbye("refused", "the scheduler closed the session"))
        else:
            return False
        return True

    def close(self) -> None:
        self.disconnected()
        if self._server is not None:
            self._server.close()
        for name in os.listdir(self._folder):
            os.unlink(os.path.join(self._folder, name))
        os.rmdir(self._folder)

    def forget(self, session: _Session) -> None:
        """Its connection is gone."""
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
            self.send(m.SessionClosed(session.session_id))

    def _accept(self, hello: m.Hello) -> m.Welcome | None:
        container_id = _container_id_of(hello)
        if hello.role != "container" or container_id is None:
            return None
        secret = self._find_secret(container_id)
        if secret is None or not hmac.compare_digest(secret, hello.nonce):
            logger.warning("a stranger called at the socket for containers")
            return None
        return m.Welcome(self._epoch or 0, {})

    def _open(self, transport: Transport) -> _Session:
        session = _Session(self, transport)
        if self._epoch is None:
            transport.abort()
            return session
        old = self._sessions.pop(session.session_id, None)
        if old is not None:
            old.transport.abort()
            self.send(m.SessionClosed(session.session_id))
        self._sessions[session.session_id] = session
        self.send(m.SessionOpened(session.session_id, session.container_id))
        return session

    def _on_relay(self, relay: m.Relay) -> None:
        session = self._sessions.get(relay.session_id)
        if session is None:
            # It has just gone; SessionClosed is on its way.
            return
        message = m.decode(relay.header, bytes(relay.payload))
        if type(message) not in m.TO_CLIENT:
            raise ProtocolError(f"the scheduler relayed a {type(message).__name__} to a client")
        session.transport.send(message)
