"""What the scheduler is told of calls that are over here, so that it forgets them too.

It keeps the outputs of an attached call until then. Many calls may end in a moment, each of one
input, and nobody waits for this; so their ids are gathered and go in one frame. Every word is kept
for a while and said again after a reconnect, as nobody confirms it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from fanout.protocol import messages as m

#: Calls in one frame, bytes of their outputs, and seconds, after which the frame goes.
COUNT_MAX = 32
SIZE_BYTES_MAX = 256 << 10
DELAY_S = 0.005
#: Frames that are said again after a reconnect.
KEPT_MAX = 1024


class LastWords:
    """The last words of one session.

    Args:
        loop: the session's.
        send: sends a message if there is a connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[m.Message], None]) -> None:
        self._loop = loop
        self._send = send
        self._call_ids: list[bytes] = []
        self._size_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._said: deque[m.Message] = deque(maxlen=KEPT_MAX)

    def finish(self, call_id: bytes, size_bytes: int) -> None:
        """All outputs of an attached call, of so many bytes, are here."""
        self._call_ids.append(call_id)
        self._size_bytes += size_bytes
        if len(self._call_ids) >= COUNT_MAX or self._size_bytes >= SIZE_BYTES_MAX:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(DELAY_S, self.flush)

    def keep(self, message: m.Message) -> None:
        """A message that the caller sends himself, and that is to be said again."""
        self._said.append(message)

    def flush(self) -> None:
        """Say what is gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._call_ids:
            message = m.CallsFinished(self._call_ids)
            self._call_ids = []
            self._size_bytes = 0
            self._said.append(message)
            self._send(message)

    def again(self) -> list[m.Message]:
        """All that must be said on a new connection."""
        self.flush()
        return list(self._said)
