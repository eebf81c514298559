"""Sets of indexes kept as disjoint ranges: a million inputs that are done cost one pair.

Everything that counts inputs uses this: what is queued, finished, acknowledged, received. A range
is ``[start, stop)``. Adding and removing are idempotent, so a duplicate report changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]

#: The ranges of every empty set; nobody changes it. Most sets of a small call stay empty.
_NONE: list[int] = []


class IntervalSet:
    """A set of integers, stored as sorted, disjoint, non-touching ranges."""

    __slots__ = ("_starts", "_stops", "count")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts = _NONE
        self._stops = _NONE
        #: How many integers are in the set.
        self.count = 0
        for start, stop in ranges:
            self.add(start, stop)

    @classmethod
    def of(cls, start: int, stop: int) -> IntervalSet:
        """The set that is one range, which must not be empty."""
        made = cls()
        made._starts, made._stops = [start], [stop]
        made.count = stop - start
        return made

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[Range]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __contains__(self, index: int) -> bool:
        position = bisect_right(self._starts, index) - 1
        return position >= 0 and index < self._stops[position]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntervalSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IntervalSet({list(self)})"

    @property
    def range_count(self) -> int:
        """How many ranges hold the set: what it costs."""
        return len(self._starts)

    @property
    def first(self) -> int:
        """The smallest member. The set must not be empty."""
        return self._starts[0]

    @property
    def end(self) -> int:
        """One more than the largest member; 0 when empty."""
        return self._stops[-1] if self._stops else 0

    def clear(self) -> None:
        """Remove everything."""
        self._starts = _NONE
        self._stops = _NONE
        self.count = 0

    def covers(self, start: int, stop: int) -> bool:
        """Whether all of ``[start, stop)`` is in the set; an empty range is."""
        if start >= stop:
            return True
        position = bisect_right(self._starts, start) - 1
        return position >= 0 and stop <= self._stops[position]

    def add(self, start: int, stop: int) -> int:
        """Add ``[start, stop)``; return how many of it were not there before."""
        if start >= stop:
            return 0
        starts, stops = self._starts, self._stops
        # The usual cases: the set is empty, or the range continues the last one.
        if not starts:
            self._starts, self._stops = [start], [stop]
            self.count = stop - start
            return stop - start
        if start == stops[-1]:
            stops[-1] = stop
            self.count += stop - start
            return stop - start
        # All ranges from `low` to `high` touch the new one and become one with it.
        low = bisect_left(stops, start)
        high = bisect_right(starts, stop)
        before = 0
        new_start, new_stop = start, stop
        if low < high:
            new_start = min(start, starts[low])
            new_stop = max(stop, stops[high - 1])
            before = sum(stops[i] - starts[i] for i in range(low, high))
        starts[low:high] = [new_start]
        stops[low:high] = [new_stop]
        added = new_stop - new_start - before
        self.count += added
        return added

    def remove(self, start: int, stop: int) -> int:
        """Remove ``[start, stop)``; return how many of it were there."""
        starts, stops = self._starts, self._stops
        if not starts:
            return 0
        if start <= starts[0] and stops[-1] <= stop:
            removed = self.count
            self.clear()
            return removed
        low = bisect_right(stops, start)
        high = bisect_left(starts, stop)
        if start >= stop or low >= high:
            return 0
        removed = 0
        keep: list[Range] = []
        for i in range(low, high):
            removed += min(stop, stops[i]) - max(start, starts[i])
            if starts[i] < start:
                keep.append((starts[i], start))
            if stops[i] > stop:
                keep.append((stop, stops[i]))
        starts[low:high] = [r[0] for r in keep]
        stops[low:high] = [r[1] for r in keep]
        self.count -= removed
        return removed

    def pop_front(self, count_max: int, stop_max: int) -> Range:
        """Remove and return the lowest range, cut to `count_max` members and below `stop_max`.

        The set must not be empty and its first member must lie below `stop_max`.
        """
        start = self._starts[0]
        stop = min(self._stops[0], start + count_max, stop_max)
        assert start < stop, (start, stop)
        if stop == self._stops[0]:
            del self._starts[0], self._stops[0]
        else:
            self._starts[0] = stop
        self.count -= stop - start
        return start, stop

    def missing(self, start: int, stop: int) -> list[Range]:
        """The ranges of ``[start, stop)`` that are not in the set, in order."""
        if not self._starts:
            return [(start, stop)] if start < stop else []
        gaps: list[Range] = []
        position = max(bisect_right(self._starts, start) - 1, 0)
        for i in range(position, len(self._starts)):
            if self._starts[i] >= stop:
                break
            if self._stops[i] <= start:
                continue
            if self._starts[i] > start:
                gaps.append((start, self._starts[i]))
            start = self._stops[i]
        if start < stop:
            gaps.append((start, stop))
        return gaps

    def common(self, start: int, stop: int) -> list[Range]:
        """The ranges of ``[start, stop)`` that are in the set, in order."""
        if not self._starts:
            return []
        found: list[Range] = []
        position = max(bisect_right(self._starts, start) - 1, 0)
        for i in range(position, len(self._starts)):
            if self._starts[i] >= stop:
                break
            low, high = max(start, self._starts[i]), min(stop, self._stops[i])
            if low < high:
                found.append((low, high))
        return found
