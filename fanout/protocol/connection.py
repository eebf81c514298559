"""One end of one connection, without the socket: bytes to messages, messages to bytes.

A connection is always in one of four states:

- *opening*: the handshake runs. Frames have no payload and a small header, and only the message
  that the handshake waits for is taken, so a stranger can make us store 16 KiB and no more.
- *open*: every message of the set that the proved role allows is taken.
- *closing*: one side has said `Goodbye`. What was sent before it still goes out; what comes in is
  dropped, and only looked through for the peer's own Goodbye, after which nobody waits for
  anybody and the socket can be closed. Closing the socket any earlier, with unread bytes in it,
  would make the kernel reset the connection, and the peer might never read why.
- *closed*: the socket is gone.

`TRANSITIONS` is the whole of it: a pair that is not listed is a bug and raises `KeyError`.

The same class serves both ends; the handshake object that it is given makes the difference.
"""

from __future__ import annotations

from enum import Enum, auto

from fanout.exceptions import (
    AuthError,
    ConnectionError,
    Error,
    InternalError,
    PermissionDeniedError,
    ProtocolError,
    VersionError,
)
from fanout.protocol import frames
from fanout.protocol import messages as m
from fanout.protocol.handshake import Handshake, check_version_of_header


class State(Enum):
    OPENING = auto()
    OPEN = auto()
    CLOSING = auto()
    CLOSED = auto()


class Cause(Enum):
    #: The handshake is complete.
    PROVED = auto()
    #: This side closes, because it wants to or because of what the peer sent.
    CLOSED_HERE = auto()
    #: The peer has said Goodbye.
    CLOSED_THERE = auto()
    #: The socket is gone.
    ENDED = auto()


TRANSITIONS: dict[State, dict[Cause, State]] = {
    State.OPENING: {
        Cause.PROVED: State.OPEN,
        Cause.CLOSED_HERE: State.CLOSING,
        Cause.CLOSED_THERE: State.CLOSING,
        Cause.ENDED: State.CLOSED,
    },
    State.OPEN: {
        Cause.CLOSED_HERE: State.CLOSING,
        Cause.CLOSED_THERE: State.CLOSING,
        Cause.ENDED: State.CLOSED,
    },
    State.CLOSING: {
        Cause.CLOSED_THERE: State.CLOSING,
        Cause.ENDED: State.CLOSED,
    },
    State.CLOSED: {},
}

#: Goodbyes that tell of an error, and as what they are raised here. All others are orderly. Only
#: "refused" may be another time: whoever reads that tries again.
ERRORS_BY_CODE: dict[str, type[Error]] = {
    "refused": ConnectionError,
    "auth": AuthError,
    "permission": PermissionDeniedError,
    "version": VersionError,
    "protocol": ProtocolError,
    "internal": InternalError,
}
CODES_BY_ERROR: dict[type[Error], str] = {cls: code for code, cls in ERRORS_BY_CODE.items()}

_GOODBYE_START = m.encode_header(m.Goodbye("", ""))[:2]


class Connection:
    """The state of one end. Feed it what arrives, write what `data_to_send` gives."""

    __slots__ = (
        "_handshake_data",
        "_is_readable",
        "_outgoing",
        "_reader",
        "error",
        "handshake",
        "has_peer_left",
        "outgoing_size",
        "state",
    )

    def __init__(self, handshake: Handshake) -> None:
        self.handshake = handshake
        self.state = State.OPENING
        #: Why the connection closes, None while it does not or when it does so in order.
        self.error: Error | None = None
        #: The peer has said Goodbye: it reads nothing more, and sends nothing.
        self.has_peer_left = False
        self._handshake_data = bytearray()
        self._reader = frames.FrameReader()
        self._is_readable = True
        self._outgoing: list[m.Payload] = []
        self.outgoing_size = 0
        for message in handshake.begin():
            self._queue(message)

    # --- in ---

    def receive_data(self, data: bytes) -> list[m.Message]:
        """Take the bytes of one read; return the messages that are now complete, in order.

        During the handshake there are none: its answers wait in `data_to_send`. A `Goodbye` is
        returned like any other message and is the last one. After an error the connection is
        closing, and a Goodbye that tells the peer why is in `data_to_send`; nothing of the read
        with the error in it is returned.

        Raises:
            ProtocolError: the peer broke a rule; the text says which.
            AuthError: the handshake failed.
            VersionError: the peer speaks another protocol version.
            Exception: whatever the callables given to the handshake raise.
        """
        try:
            if self.state is State.OPEN:
                return self._receive_open(data)
            if self.state is State.OPENING:
                return self._receive_open(self._receive_opening(data))
        except Error as error:
            self._fail(error)
            raise
        except Exception as error:
            self._fail(InternalError(f"internal error: {type(error).__name__}"))
            raise
        self._receive_closing(data)
        return []

    def receive_end(self, reason: str = "the peer went away without a goodbye") -> None:
        """The socket is gone. `error` is set, unless one side had said Goodbye before: to the
        reason, and to whether a frame had come in part."""
        if self._reader.buffered_size:
            reason += ", in the middle of a frame"
        if self.state in (State.OPENING, State.OPEN):
            self.error = ConnectionError(reason)
        if self.state is not State.CLOSED:
            self._move(Cause.ENDED)
        self._outgoing.clear()
        self.outgoing_size = 0

    def _receive_open(self, data: bytes) -> list[m.Message]:
        received: list[m.Message] = []
        allowed = self.handshake.allowed
        for header, payload in self._reader.feed(data) if data else ():
            message = m.decode(header, payload)
            kind = type(message)
            if kind not in allowed:
                raise ProtocolError(f"{kind.__name__} is not allowed to this peer")
            received.append(message)
            if isinstance(message, m.Goodbye):
                self._receive_goodbye(message)
                break
        return received

    def _receive_opening(self, data: bytes) -> bytes:
        """Go on with the handshake; return the bytes that lie behind it.

        The frames are cut one by one here, because other limits hold for those behind."""
        buffer = self._handshake_data
        buffer += data
        while self.state is State.OPENING and len(buffer) >= frames.PREFIX_SIZE_BYTES:
            header_size, payload_size = frames.PREFIX.unpack_from(buffer)
            if not 0 < header_size <= frames.HANDSHAKE_SIZE_BYTES_MAX or payload_size:
                raise ProtocolError(
                    f"a frame of {header_size} + {payload_size} bytes before the handshake is "
                    f"done; allowed are {frames.HANDSHAKE_SIZE_BYTES_MAX} + 0. Is the peer fanout?"
                )
            end = frames.PREFIX_SIZE_BYTES + header_size
            if len(buffer) < end:
                break
            header = bytes(buffer[frames.PREFIX_SIZE_BYTES : end])
            del buffer[:end]
            self._receive_handshake(header)
        if self.state is not State.OPEN:
            return b""
        rest = bytes(buffer)
        buffer.clear()
        return rest

    def _receive_handshake(self, header: bytes) -> None:
        try:
            message = m.decode(header, b"")
        except ProtocolError:
            check_version_of_header(header)
            raise
        if isinstance(message, m.Goodbye):
            self._receive_goodbye(message)
            if self.error is None:
                self.error = ConnectionError(f"the peer refused the connection: {message.text}")
            return
        for answer in self.handshake.receive(message):
            self._queue(answer)
        if self.handshake.is_done:
            self._move(Cause.PROVED)

    def _receive_goodbye(self, message: m.Goodbye) -> None:
        self.has_peer_left = True
        cls = ERRORS_BY_CODE.get(message.code)
        if cls is not None:
            self.error = cls(message.text)
        self._move(Cause.CLOSED_THERE)

    def _receive_closing(self, data: bytes) -> None:
        """Both sides may say Goodbye at the same time, and then neither must wait for the other."""
        if self.state is not State.CLOSING or not self._is_readable or self.has_peer_left:
            return
        try:
            for header, _payload in self._reader.feed(data):
                if header.startswith(_GOODBYE_START):
                    self.has_peer_left = True
        except ProtocolError:
            self._is_readable = False

    # --- out ---

    def send(self, message: m.Message) -> None:
        """Queue a message behind all others. Dropped when the connection is not open any more:
        a loss may always be on its way here unnoticed, so no sender can rely on more.

        Raises:
            ProtocolError: the frame is over a limit; nothing was queued.
        """
        if self.state is State.OPEN:
            self._queue(message)

    def close(self, goodbye: m.Goodbye) -> None:
        """Queue a Goodbye behind all that was sent, and take nothing more. Harmless to repeat."""
        if self.state in (State.OPENING, State.OPEN):
            self._queue(goodbye)
            self._is_readable = self.state is State.OPEN
            self._move(Cause.CLOSED_HERE)

    def data_to_send(self) -> list[m.Payload]:
        """Hand over the buffers that wait to be written, in order."""
        outgoing, self._outgoing = self._outgoing, []
        self.outgoing_size = 0
        return outgoing

    def fail(self, error: Error) -> None:
        """Close because of an error on this side, and tell the peer its kind and text."""
        if self.state in (State.OPENING, State.OPEN):
            self._fail(error)

    def _fail(self, error: Error) -> None:
        self.error = error
        code = CODES_BY_ERROR.get(type(error), "internal")
        self.close(m.Goodbye(code, str(error)))
        self._is_readable = False

    def _queue(self, message: m.Message) -> None:
        buffers = m.encode(message)
        self._outgoing += buffers
        for buffer in buffers:
            self.outgoing_size += len(buffer)

    def _move(self, cause: Cause) -> None:
        self.state = TRANSITIONS[self.state][cause]
