"""A second way into a unix socket, for threads other than the event loop's.

A frame that another thread hands to the loop waits until the loop's thread has been woken, which
takes longer than the frame is on its way. So such a thread may write it itself, as long as these
hold:

- The frame is small. Then a unix socket takes it whole or not at all, and no other frame can get
  between its parts.
- Nothing waits to be written before it, neither here nor in the event loop; order is kept.
- The loop and the threads write one at a time: whoever writes holds `lock`.

The descriptor is one of our own. The loop closes its own when the connection ends, and its number
may be that of another file by the time a thread uses it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading

#: More is left to the loop; the kernel makes one packet of so much.
FRAME_SIZE_BYTES_MAX = 16 << 10


class Outlet:
    """See the module's text. Threads may use `write` only; the rest is the loop's.

    Args:
        sink: a connected unix socket, as the event loop has it.
    """

    def __init__(self, sink: asyncio.Transport) -> None:
        self._sink = sink
        self._descriptor = os.dup(sink.get_extra_info("socket").fileno())
        self.lock = threading.Lock()

    @staticmethod
    def fits(sink: asyncio.Transport) -> bool:
        """Whether the connection can have one."""
        sock = sink.get_extra_info("socket")
        return sock is not None and sock.family == socket.AF_UNIX and sock.fileno() >= 0

    def write(self, data: bytes) -> bool:
        """Write a frame at once; the caller holds `lock`. False: nothing was written, because the
        connection is closed or something is to be written before it."""
        if self._descriptor < 0 or len(data) > FRAME_SIZE_BYTES_MAX:
            return False
        if self._sink.get_write_buffer_size():
            return False
        try:
            taken = os.write(self._descriptor, data)
        except OSError:
            # It is full, or gone; in both cases the loop gets to know.
            return False
        assert taken == len(data), "a unix socket takes a small frame whole"
        return True

    def close(self) -> None:
        """Nothing is written any more. Harmless to repeat."""
        with self.lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def abandon(self) -> None:
        """After a fork, in the child: let go of the parent's connection. Its lock may be held by a
        thread that is not here."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
