"""One connection on a socket: moves the bytes of a `connection.Connection`, and decides nothing.

`transport.py` makes these, by dialling and by listening, and is where to import from.

How bytes leave. `send` only queues. All that is queued in one turn of the event loop leaves in one
write: at the end of the read that caused it, or when the loop comes round. Bulk messages (parts of
blobs) are pulled from their iterators one by one, round robin, and only while little is unsent
here; `TCP_NOTSENT_LOWAT` makes the kernel keep little too. So a message that is sent while a blob
streams waits behind a few hundred KiB at most, however large the blob is.

How a connection ends. `close` queues a Goodbye and goes on reading, without using what it reads,
until the peer has left too or makes no progress any more. See `connection.py` for why.

Handlers are called from the event loop only, never from inside `send` or `close`, so they may call
both from anywhere. An exception that a handler lets out closes its own connection and no other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, cast

from fanout.exceptions import ConnectionError, Error, InternalError, ProtocolError
from fanout.protocol import messages as m
from fanout.protocol.connection import Connection, State

logger = logging.getLogger("fanout.protocol")

#: A closing connection is dropped when the peer has read nothing for this long.
CLOSE_TIMEOUT_S = 5.0

#: Over the high mark `is_writable` is false, until the low mark is reached.
WRITE_SIZE_BYTES_HIGH = 1 << 20
WRITE_SIZE_BYTES_LOW = 256 << 10
#: The same for bulk, much lower, as everything else waits behind it.
BULK_SIZE_BYTES_HIGH = 128 << 10
BULK_SIZE_BYTES_LOW = 64 << 10
#: Bulk pulled in one turn of the loop, so that the loop has time for others.
BULK_TURN_SIZE_BYTES = 128 << 10
#: Unsent bytes in the kernel beyond which it takes no more from us.
NOTSENT_SIZE_BYTES_MAX = 128 << 10
#: Queued bytes that are written before the turn ends, so that `is_writable` tells the truth to
#: one who sends in a loop.
PENDING_SIZE_BYTES_MAX = 256 << 10
#: Smaller buffers are copied together: one copy is cheaper than one more element of a writev.
JOIN_SIZE_BYTES_MAX = 32 << 10

#: The peer's machine is gone when it has answered nothing for this long. Keepalive sees to it
#: where nothing is under way, `_look_for_silence` where something is. (With `TCP_USER_TIMEOUT` the
#: kernel would also drop a peer that is alive and does not read, as one does that was stopped.)
SILENCE_S = 20.0
KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 3
KEEPALIVE_COUNT = 5
SILENCE_LOOK_INTERVAL_S = 2.5
#: Questions that are under way may yet be answered. A peer that does not read is asked less and
#: less often, up to every two minutes, and so was not heard of for longer than `SILENCE_S`.
UNANSWERED_COUNT_MIN = 2
#: The first fields of Linux' `struct tcp_info`, of which three are used: how often the oldest
#: unacknowledged bytes were sent again, probes without an answer, and as the last one the
#: milliseconds since any acknowledgement came.
TCP_INFO = struct.Struct("=xxBB4x48xI")
#: Linux' `struct ucred`: pid, uid, gid.
PEER_CREDENTIALS = struct.Struct("iII")


#: Warnings about strangers in an interval, so that nobody without a token fills a log.
STRANGER_WARNINGS_MAX = 10
STRANGER_INTERVAL_S = 60.0


class _StrangerLog:
    """Warns of peers that were turned away before they had proved anything: of the first few in an
    interval by their faults, of the others by their number, with the first of the next interval."""

    def __init__(self) -> None:
        self._began_at = 0.0
        self._count = 0

    def warn(self, now: float, text: str) -> None:
        if now >= self._began_at + STRANGER_INTERVAL_S:
            unnamed = self._count - STRANGER_WARNINGS_MAX
            if unnamed > 0:
                logger.warning("%d more strangers were turned away", unnamed)
            self._began_at, self._count = now, 0
        self._count += 1
        if self._count <= STRANGER_WARNINGS_MAX:
            logger.warning("turning a stranger away, %s", text)


_strangers = _StrangerLog()


class PeerHandler(Protocol):
    """What happens at an open connection. Called from the event loop."""

    def messages_received(self, messages: list[m.Message]) -> None:
        """All messages of one read, in order; never empty. A Goodbye of the peer comes last."""

    def connection_lost(self, error: Exception | None) -> None:
        """Called once, last. None if either side closed in order, else why: a `ConnectionError`
        if the peer vanished, else what one side found wrong with the other."""

    def writable_changed(self, is_writable: bool) -> None:
        """More than 1 MiB is unsent (False), or less than 256 KiB again (True)."""


class Transport(asyncio.Protocol):
    """One connection. Users of it call `send`, `send_bulk`, `close`, `abort`, `wait_closed`; the
    other public methods are called by asyncio."""

    def __init__(
        self,
        make_connection: Callable[[asyncio.Transport], Connection],
        make_handler: Callable[[Transport], PeerHandler],
        on_lost: Callable[[Transport], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_connection = make_connection
        self._make_handler = make_handler
        self._on_lost = on_lost
        self._connection: Connection
        self._socket: asyncio.Transport | None = None
        self._handler: PeerHandler | None = None
        self._error: Exception | None = None
        self._bulk: deque[Iterator[m.Message]] = deque()
        self._is_bulk_held = False
        self._is_pump_due = False
        self._is_flush_due = False
        self._is_receiving = False
        self._is_writable_told = True
        self._closing_timer: asyncio.TimerHandle | None = None
        #: Kept, as the socket does not know it any more when it is gone.
        self._address = "a process of this machine"
        self._silence_timer: asyncio.TimerHandle | None = None
        self._is_silent = False
        #: Open, or lost before it was: what `connect` waits for.
        self._settled = asyncio.Event()
        self._lost = asyncio.Event()
        #: False while so much is unsent that the sender should wait; see `PeerHandler`.
        self.is_writable = True
        #: Reads that completed no message: they tell that the peer lives, and nothing else.
        self.unfinished_count = 0
        #: True from `close`, `abort`, a Goodbye of the peer or the loss on: sending is useless.
        self.is_closed = False

    def __repr__(self) -> str:
        state = self._connection.state.name.lower() if self._socket else "opening"
        return f"<Transport {state} to {self.address}>"

    @property
    def peer(self) -> m.Hello | m.Welcome:
        """What the other side said of itself."""
        peer = self._connection.handshake.peer
        assert peer is not None, "the handshake is not done"
        return peer

    @property
    def address(self) -> str:
        """The peer's address, for people."""
        return self._address

    # --- sending ---

    def send(self, message: m.Message) -> None:
        """Queue a message; frames leave in order. Never blocks, dropped once `is_closed`.

        Raises:
            ProtocolError: its frame is over a limit of `frames.py`; nothing was queued.
        """
        connection = self._connection
        connection.send(message)
        if connection.outgoing_size > PENDING_SIZE_BYTES_MAX:
            self._flush()
        elif not self._is_flush_due and not self._is_receiving:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def queue(self, message: m.Message) -> None:
        """Like `send`, for a caller that has more to say and calls `flush` when it is done: that
        saves a turn of the event loop.

        Raises:
            ProtocolError: as `send`.
        """
        connection = self._connection
        connection.send(message)
        if connection.outgoing_size > PENDING_SIZE_BYTES_MAX:
            self._flush()

    def flush(self) -> None:
        """Write what is queued. While a read is handled that happens at its end anyway."""
        if not self._is_receiving:
            self._flush()

    def send_bulk(self, messages: Iterator[m.Message]) -> None:
        """Send what the iterator gives, one by one and only while little is unsent. Several
        iterators take turns. What was not pulled when the connection closes is dropped."""
        if not self.is_closed:
            self._bulk.append(messages)
            self._plan_pump()

    def close(self, goodbye: m.Goodbye | None = None) -> None:
        """Send what is queued and a Goodbye, then close. Harmless to repeat."""
        self.is_closed = True
        self._bulk.clear()
        if self._socket is None:
            return
        self._connection.close(goodbye or m.Goodbye("closed", "the other side has closed"))
        self._flush()
        self._linger()

    def abort(self) -> None:
        """Close now, with what is queued unsent."""
        self.is_closed = True
        self._bulk.clear()
        if self._socket is not None:
            self._socket.abort()

    def abandon(self) -> None:
        """After a fork, in the child: put /dev/null in the place of the inherited socket. The
        connection belongs to the parent alone then, and whatever closes the number later closes
        nothing of value."""
        sock = self._socket.get_extra_info("socket") if self._socket is not None else None
        number = sock.fileno() if sock is not None else -1
        if number < 0:
            return
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.dup2(null, number, inheritable=False)
        finally:
            os.close(null)

    async def wait_closed(self) -> None:
        """Until the socket is gone and `connection_lost` was called."""
        await self._lost.wait()

    def pause_reading(self) -> None:
        """Read nothing until `resume_reading`, so that the peer comes to a halt. Harmless to
        repeat."""
        if self._socket is not None and not self._socket.is_closing():
            self._socket.pause_reading()

    def resume_reading(self) -> None:
        """Undo `pause_reading`. Harmless to repeat."""
        if self._socket is not None and not self._socket.is_closing():
            self._socket.resume_reading()

    # --- called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)
        self._address = _address_of(self._socket) or self._address
        if _set_options(self._socket):
            self._look_for_silence()
        self._socket.set_write_buffer_limits(high=BULK_SIZE_BYTES_HIGH, low=BULK_SIZE_BYTES_LOW)
        self._connection = self._make_connection(self._socket)
        if self.is_closed:
            self._socket.abort()
        self._flush()

    def data_received(self, data: bytes) -> None:
        connection = self._connection
        try:
            messages = connection.receive_data(data)
            if self._handler is None and connection.state is State.OPEN:
                self._handler = self._make_handler(self)
                self._settled.set()
        except Exception as error:
            self._receive_failed(error)
            return
        if not messages:
            self.unfinished_count += 1
        elif self._handler is not None:
            self._is_receiving = True
            try:
                self._handler.messages_received(messages)
            except Exception as error:
                self._receive_failed(error)
            finally:
                self._is_receiving = False
        if connection.outgoing_size:
            self._flush()
        if connection.has_peer_left and self._socket is not None:
            # It reads nothing and sends nothing more, so there is nothing to linger for.
            self.is_closed = True
            self._bulk.clear()
            self._socket.close()

    def eof_received(self) -> None:
        """Returning None makes asyncio write what is left and close."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._bulk.clear()
        if self._closing_timer is not None:
            self._closing_timer.cancel()
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        connection = self._connection
        how = "went away without a goodbye" if exc is None else f"broke the connection: {exc}"
        if self._is_silent:
            how = f"has answered nothing for {SILENCE_S:g} s"
        if connection.state is State.OPENING:
            how += " (during the handshake; does it need TLS, so a join string with ?fp=...?)"
        connection.receive_end(f"{self.address} {how}")
        self._error = self._error or connection.error
        if self._on_lost is not None:
            self._on_lost(self)
        handler, self._handler = self._handler, None
        if handler is not None:
            try:
                handler.connection_lost(self._error)
            except Exception:
                logger.exception("handler of %r failed in connection_lost", self)
        self._settled.set()
        self._lost.set()

    def pause_writing(self) -> None:
        self._is_bulk_held = True

    def resume_writing(self) -> None:
        self._is_bulk_held = False
        if not self.is_writable:
            self._set_writable(True)
        if self._bulk:
            self._plan_pump()

    # --- the rest is private ---

    async def wait_open(self) -> None:
        """Until the handshake is done (for `connect`).

        Raises:
            ConnectionError: it failed; or its subclasses, which say why.
        """
        await self._settled.wait()
        if self._connection.handshake.is_done and self._error is None:
            return
        error = self._error
        if isinstance(error, ConnectionError):
            raise error
        raise ConnectionError(f"the handshake failed: {error}") from error

    def fail(self, error: Error) -> None:
        """Close and tell the peer this error."""
        self._error = error
        self.is_closed = True
        self._bulk.clear()
        self._connection.fail(error)
        self._flush()
        self._linger()

    def _receive_failed(self, error: Exception) -> None:
        if isinstance(error, ProtocolError | ConnectionError):
            if self._handler is not None:
                logger.warning("closing the connection to %s: %s", self.address, error)
            elif self._on_lost is not None:
                # A listener's. Who has dialled is told by an exception, and is no host here.
                _strangers.warn(self._loop.time(), f"{self.address}: {error}")
            self.fail(error)
            return
        logger.error("a bug closes the connection to %s", self.address, exc_info=error)
        self.fail(InternalError(f"internal error: {type(error).__name__}: {error}"))

    def _flush(self) -> None:
        self._is_flush_due = False
        sink = self._socket
        if sink is None:
            return
        size = self._connection.outgoing_size
        buffers = self._connection.data_to_send()
        if not buffers or sink.is_closing():
            return
        if len(buffers) == 1:
            sink.write(buffers[0])
        elif size <= JOIN_SIZE_BYTES_MAX:
            sink.write(b"".join(buffers))
        else:
            parts = join_small(buffers)
            if len(parts) == 1:
                sink.write(parts[0])
            else:
                sink.writelines(parts)
        if self.is_writable and sink.get_write_buffer_size() > WRITE_SIZE_BYTES_HIGH:
            self._set_writable(False)

    def _set_writable(self, is_writable: bool) -> None:
        """asyncio has one pair of marks; it is moved to the one that matters next."""
        assert self._socket is not None
        self.is_writable = is_writable
        if is_writable:
            low, high = BULK_SIZE_BYTES_LOW, BULK_SIZE_BYTES_HIGH
        else:
            low, high = WRITE_SIZE_BYTES_LOW, WRITE_SIZE_BYTES_HIGH
        self._socket.set_write_buffer_limits(high=high, low=low)
        # Told later, as this may happen inside a send of the handler that is to be told.
        self._loop.call_soon(self._tell_writable)

    def _tell_writable(self) -> None:
        if self._handler is None or self._is_writable_told == self.is_writable:
            return
        self._is_writable_told = self.is_writable
        try:
            self._handler.writable_changed(self.is_writable)
        except Exception as error:
            self._receive_failed(error)

    def _plan_pump(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        self._flush()
        budget = BULK_TURN_SIZE_BYTES
        connection = self._connection
        while self._bulk and not self._is_bulk_held and budget > 0:
            source = self._bulk.popleft()
            try:
                message = next(source)
                connection.send(message)
            except StopIteration:
                continue
            except Exception as error:
                self._receive_failed(error)
                return
            self._bulk.append(source)
            budget -= connection.outgoing_size
            self._flush()
        if self._bulk and not self._is_bulk_held:
            self._plan_pump()

    def _look_for_silence(self) -> None:
        assert self._socket is not None
        if _is_silent(self._socket):
            self._is_silent = True
            self.abort()
        else:
            self._silence_timer = self._loop.call_later(
                SILENCE_LOOK_INTERVAL_S, self._look_for_silence
            )

    def _linger(self) -> None:
        """Drop the connection when the peer neither leaves nor reads."""
        sink = self._socket
        if sink is not None and not sink.is_closing() and self._closing_timer is None:
            unsent = sink.get_write_buffer_size()
            self._closing_timer = self._loop.call_later(CLOSE_TIMEOUT_S, self._end_linger, unsent)

    def _end_linger(self, unsent_before: int) -> None:
        self._closing_timer = None
        assert self._socket is not None
        if 0 < self._socket.get_write_buffer_size() < unsent_before:
            self._linger()
        else:
            self._socket.abort()


def join_small(buffers: list[m.Payload]) -> list[m.Payload]:
    """The same bytes in fewer buffers: neighbours that are small are copied together."""
    parts: list[m.Payload] = []
    small: list[m.Payload] = []
    for buffer in buffers:
        if len(buffer) <= JOIN_SIZE_BYTES_MAX:
            small.append(buffer)
            continue
        if small:
            parts.append(b"".join(small))
            small = []
        parts.append(buffer)
    if small:
        parts.append(b"".join(small))
    return parts


def _address_of(sink: asyncio.Transport) -> str:
    """The peer's address, or which process it is; "" where neither can be told."""
    name = sink.get_extra_info("peername")
    if isinstance(name, tuple):
        return f"{name[0]}:{name[1]}"
    sock = sink.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX or sys.platform != "linux":
        return ""
    pid, _, _ = PEER_CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    )
    # 0 for a process that this one cannot see, in another pid namespace.
    return f"process {pid}" if pid else ""


def _set_options(sink: asyncio.Transport) -> bool:
    """Returns whether this is a TCP connection of which the kernel tells how it is."""
    sock = sink.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
        ("TCP_NOTSENT_LOWAT", NOTSENT_SIZE_BYTES_MAX),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sys.platform == "linux"


def _is_silent(sink: asyncio.Transport) -> bool:
    """Whether the peer's kernel has left what was sent, or probes, without an answer for long."""
    sock = sink.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return False
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    resent_count, probe_count, *_, unheard_ms = TCP_INFO.unpack(info)
    is_asked = max(resent_count, probe_count) >= UNANSWERED_COUNT_MIN
    return is_asked and int(unheard_ms) >= SILENCE_S * 1000
