"""Ctrl-C: once is an orderly end, twice is out at once.

The first one is a KeyboardInterrupt, as ever: the user's `finally` and `except` run, calls are
cancelled, connections closed. That may take a moment, or hang in the user's code; so a second one
within a few seconds asks nobody any more.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from fanout.cli.failure import EXIT_INTERRUPTED

#: After this long a Ctrl-C is a first one again: the script may have taken the one before for
#: something else, and gone on.
TWICE_WITHIN_S = 10.0


class Interrupts:
    """For a ``with`` block: handles SIGINT until the process ends.

    Args:
        last_words: gives the sentence that is written when a second one ends the process.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self._last_words = last_words
        self._first_at: float | None = None

    def __enter__(self) -> None:
        # A shell's background job ignores SIGINT, and goes on doing so.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupted)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The handler stays: what is left to do at the interpreter's end may hang as well."""

    def _interrupted(self, number: int, frame: FrameType | None) -> Any:
        now = time.monotonic()
        if self._first_at is not None and now < self._first_at + TWICE_WITHIN_S:
            # Nothing that could wait: no buffers, no locks, no interpreter's end.
            os.write(2, f"\nfanout: {self._last_words()}\n".encode())
            os._exit(EXIT_INTERRUPTED)
        self._first_at = now
        signal.default_int_handler(number, frame)
