"""Which inputs run together, decided without any I/O.

A batch begins with an input and is ready when it is full, or when its first input has waited long
enough. Ready batches run as soon as fewer than the limit run; while they wait for that, they fill.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """Gathers inputs; times are seconds of any one clock.

    Args:
        size_max: inputs in a batch.
        wait_s: how long the first input of a batch waits for others.
        running_max: batches that run at a time.
    """

    def __init__(self, size_max: int, wait_s: float, running_max: int) -> None:
        self._size_max = size_max
        self._wait_s = wait_s
        self._running_max = running_max
        self._running_count = 0
        #: By method: the inputs that wait, and until when.
        self._waiting: dict[str, deque[tuple[T, float]]] = {}

    def add(self, method: str, thing: T, now: float) -> None:
        """An input came."""
        self._waiting.setdefault(method, deque()).append((thing, now + self._wait_s))

    def drop(self, method: str, thing: T) -> None:
        """An input that waits is not to run."""
        waiting = self._waiting[method]
        kept = [entry for entry in waiting if entry[0] is not thing]
        assert len(kept) == len(waiting) - 1, "an input that does not wait"
        waiting.clear()
        waiting.extend(kept)

    def take(self, now: float, is_hurried: bool = False) -> list[T]:
        """The next batch to run, empty if there is none now; `ended` is to be called behind it.
        `is_hurried`: nothing more will come, so wait for nothing."""
        if self._running_count >= self._running_max:
            return []
        for waiting in self._waiting.values():
            if waiting and (is_hurried or len(waiting) >= self._size_max or waiting[0][1] <= now):
                self._running_count += 1
                count = min(len(waiting), self._size_max)
                return [waiting.popleft()[0] for _ in range(count)]
        return []

    def ended(self) -> None:
        """A batch that ran has ended."""
        self._running_count -= 1

    def deadline(self) -> float | None:
        """When to take again, if nothing happens before; None if nothing would be there."""
        if self._running_count >= self._running_max:
            return None
        return min((waiting[0][1] for waiting in self._waiting.values() if waiting), default=None)
