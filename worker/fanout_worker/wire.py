"""The daemon's end of a container's socketpair: never blocks, keeps order, cuts frames."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from fanout.protocol import frames

_READ_SIZE_BYTES = 256 << 10
_READS_MAX = 4
#: What a container can send without anybody reading it, which has to be less than one `read` takes:
#: what a container leaves when it dies is read once. Linux doubles the number, which makes its own
#: default; on a host that is tuned for fast networks that may be many times more.
_SEND_SIZE_BYTES = 104 << 10


class Wire:
    """One socketpair. Writing before `open` only queues.

    Args:
        on_readable: called when there is something to `read`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_readable: Callable[[], None]) -> None:
        #: The container's end; to be closed here when the container has it.
        self._socket, self.theirs = socket.socketpair()
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_SIZE_BYTES)
        self._socket.setblocking(False)
        self._loop = loop
        self._on_readable = on_readable
        self._reader = frames.FrameReader()
        self._unsent: deque[memoryview] = deque()
        self._is_open = self._is_closed = self._is_writing = False
        self._is_paused = False

    def open(self, first: Iterable[bytes | memoryview]) -> None:
        """The container is there: send `first`, then what was queued."""
        self._is_open = True
        self._unsent.extendleft(map(memoryview, reversed(list(first))))
        self._flush()
        self.set_paused(self._is_paused)

    def set_paused(self, is_paused: bool) -> None:
        """Whether to leave unread what the container sends."""
        self._is_paused = is_paused
        if self._is_closed or not self._is_open:
            return
        if is_paused:
            self._loop.remove_reader(self._socket)
        else:
            self._loop.add_reader(self._socket, self._on_readable)

    def write(self, buffers: Iterable[bytes | memoryview]) -> None:
        """Send in order; what the socket does not take waits for it."""
        if self._is_closed:
            return
        unsent = self._unsent
        is_waiting = bool(unsent)
        for buffer in buffers:
            if len(buffer):
                unsent.append(memoryview(buffer))
        if self._is_open and not is_waiting:
            self._flush()

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """The frames that are there.

        More than the socket can hold is not read at once: what a container prints without end
        must not keep its outputs, or other containers, waiting.

        Raises:
            ProtocolError: the bytes are no frames.
        """
        for _ in range(_READS_MAX):
            try:
                data = self._socket.recv(_READ_SIZE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._socket)
                return
            yield from self._reader.feed(data)
            if len(data) < _READ_SIZE_BYTES:
                return

    def close(self) -> None:
        """Harmless to repeat."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self.theirs.close()
            self._unsent.clear()

    def _flush(self) -> None:
        unsent = self._unsent
        try:
            while unsent:
                # One call for header and payload; the kernel takes what it has room for.
                if len(unsent) <= 2:
                    taken = self._socket.sendmsg(unsent)
                    if taken == sum(map(len, unsent)):
                        unsent.clear()
                        break
                else:
                    taken = self._socket.sendmsg([unsent[0], unsent[1]])
                while unsent and taken >= len(unsent[0]):
                    taken -= len(unsent.popleft())
                if taken:
                    unsent[0] = unsent[0][taken:]
        except BlockingIOError:
            self._is_writing = True
            self._loop.add_writer(self._socket, self._flush)
            return
        except OSError:
            # It has died; its exit is about to be noticed.
            unsent.clear()
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._socket)
