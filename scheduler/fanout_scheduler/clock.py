"""The scheduler's clock: it leaves out the time in which the process did not run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("fanout.scheduler")

#: How often the clock is looked at when nothing happens, and what beyond that is a gap.
TICK_INTERVAL_S = 0.5
GAP_S = 1.0


class Clock:
    """Seconds since some point, growing only while this process runs.

    It must be asked at least every `TICK_INTERVAL_S`; when it was not asked for `GAP_S` longer
    than that, the process did not run, and the time since it was last asked is left out. So a
    deadline that was not reached before the gap is not reached by it.
    """

    __slots__ = ("_last", "_time", "skipped_s")

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._time = source
        self._last = source()
        self.skipped_s = 0.0

    def now(self) -> float:
        current = self._time()
        elapsed = current - self._last
        self._last = current
        if elapsed > TICK_INTERVAL_S + GAP_S:
            self.skipped_s += elapsed
            log.warning("the scheduler did not run for %.1f s; deadlines are moved", elapsed)
        return current - self.skipped_s
