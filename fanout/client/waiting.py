"""What a session in a container tells the scheduler of whether the container waits.

A container that waits gives its core away, so the scheduler is told when all that runs there does
nothing but wait for it. What it sends may have ended a wait already; therefore `SessionWaits` says
how many of the frames that can do so were seen, and is void if there was another.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

from fanout import context
from fanout.protocol import messages as m


class Waiting:
    """The waits of one session. Used on its loop, but for `waits_changed`.

    Args:
        loop: the session's.
        send: sends a message if the session is connected.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[m.Message], None]) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._send = send
        #: Those of the whole container; None in any other process.
        self._waits = context.container.waits if context.container is not None else None
        if self._waits is not None:
            self._waits.watch(self)
        #: Frames received of the kinds that can end a wait, in this connection. The session counts
        #: each before it does what the frame says.
        self.seen = 0
        #: Waits under way that are this session's.
        self._count = 0
        #: What `seen` was when the scheduler was last told of a wait; -1 when it knows of none.
        self._told_at = -1

    def begin(self) -> context.InputContext | None:
        """User code waits for the scheduler. Returns what `end` is to be given."""
        self._count += 1
        if self._waits is None:
            return None
        waiter = self._waits.begin(self)
        if self._waits.are_all:
            self._tell()
        return waiter

    def end(self, waiter: context.InputContext | None) -> None:
        self._count -= 1
        assert self._count >= 0
        if self._waits is not None:
            self._waits.end(waiter, self)
            self.review()

    def forget(self) -> None:
        """On a new connection nothing was seen, and the scheduler knows nothing."""
        self.seen, self._told_at = 0, -1

    def waits_changed(self) -> None:
        """Another part of the container has begun or ended to wait; in any thread."""
        if threading.get_ident() == self._thread:
            self.review()
            return
        # The loop may be gone.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.review)

    def review(self) -> None:
        """Tell the scheduler if it does not know whether this container waits."""
        if self._waits is None:
            return
        if self._waits.are_all:
            if self._count and self._told_at != self.seen:
                self._tell()
        elif self._told_at == self.seen:
            # No frame ended it, so the scheduler takes this container for a waiting one.
            self._told_at = -1
            self._send(m.SessionRuns())

    def _tell(self) -> None:
        self._told_at = self.seen
        self._send(m.SessionWaits(self.seen))
