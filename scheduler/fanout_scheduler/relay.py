"""A nested client: a client inside a container, whose frames come through its worker.

The worker's connection carries the frames of any number of such sessions, each wrapped into a
`Relay`. To the core a session is a peer like any other, and to the rest of the shell it has
something that sends like a transport. Only the wrapping is here; who is connected is the server's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m


class Carrier(Protocol):
    """What a session needs of the connection that carries it."""

    def send(self, message: m.Message) -> None: ...

    def queue(self, message: m.Message) -> None: ...

    def flush(self) -> None: ...

    def send_bulk(self, messages: Iterator[m.Message]) -> None: ...


class VirtualTransport:
    """The sending side of one relayed session.

    Args:
        carrier: the connection to the worker.
        session_id: which of its sessions this is.
    """

    __slots__ = ("_carrier", "is_closed", "session_id")

    def __init__(self, carrier: Carrier, session_id: bytes) -> None:
        self._carrier = carrier
        self.session_id = session_id
        self.is_closed = False

    def send(self, message: m.Message) -> None:
        """Send a frame to the nested client; nothing once the session is closed."""
        if not self.is_closed:
            self._carrier.send(wrap(self.session_id, message))

    def queue(self, message: m.Message) -> None:
        """Like `send`, for a caller that flushes when it has said all."""
        if not self.is_closed:
            self._carrier.queue(wrap(self.session_id, message))

    def flush(self) -> None:
        self._carrier.flush()

    def send_bulk(self, messages: Iterator[m.Message]) -> None:
        """Send these frames behind the carrier's other traffic, while the session is open."""
        self._carrier.send_bulk(self._wrapped(messages))

    def _wrapped(self, messages: Iterator[m.Message]) -> Iterator[m.Message]:
        for message in messages:
            if self.is_closed:
                return
            yield wrap(self.session_id, message)

    def close(self, goodbye: m.Goodbye | None = None) -> None:
        """End the session: the client is told why, and its worker that no frame follows."""
        if self.is_closed:
            return
        if goodbye is not None:
            self._carrier.send(wrap(self.session_id, goodbye))
        self._carrier.send(m.SessionClosed(self.session_id))
        self.is_closed = True

    def abort(self) -> None:
        """The session ended on the other side; there is nobody to tell."""
        self.is_closed = True


def wrap(session_id: bytes, message: m.Message) -> m.Relay:
    """A frame of a session as a frame of its worker's connection; the payload is not copied."""
    payload: m.Payload = message.payload if message.HAS_PAYLOAD else b""  # type: ignore[attr-defined]
    return m.Relay(session_id, m.encode_header(message), payload)


def unwrap(relay: m.Relay) -> m.Message:
    """The frame that a nested client sent.

    Raises:
        ProtocolError: it is malformed, or nothing a nested client may send.
    """
    message = m.decode(relay.header, relay.payload)  # type: ignore[arg-type]
    if type(message) not in m.FROM_NESTED_CLIENT:
        raise ProtocolError(f"a client in a container may not send {type(message).__name__}")
    return message
