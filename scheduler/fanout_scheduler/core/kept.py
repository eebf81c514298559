"""The outputs of a call that are kept: for its client until it acknowledges them, or for whoever
fetches them. A spawned call may have a million frames of them, of which a fetch wants a few."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from fanout.intervals import IntervalSet
from fanout.protocol import messages as m

#: What every empty one holds; nobody changes it. Most calls have no output most of the time.
_NO_STARTS: list[int] = []
_NO_FRAMES: list[m.Outputs] = []


class KeptOutputs:
    """Frames of outputs of different inputs, in the order of the inputs."""

    __slots__ = ("_frames", "_starts")

    def __init__(self) -> None:
        self._starts = _NO_STARTS
        self._frames = _NO_FRAMES

    def __bool__(self) -> bool:
        return bool(self._frames)

    def __iter__(self) -> Iterator[m.Outputs]:
        return iter(self._frames)

    def add(self, outputs: m.Outputs) -> None:
        """Keep these. No output of their inputs is kept yet."""
        start = outputs.start
        if not self._starts:
            self._starts, self._frames = [start], [outputs]
        elif start > self._starts[-1]:
            self._starts.append(start)
            self._frames.append(outputs)
        else:
            position = bisect_left(self._starts, start)
            self._starts.insert(position, start)
            self._frames.insert(position, outputs)

    def replace(self, old: m.Outputs, new: m.Outputs) -> None:
        """Keep other outputs of the same inputs."""
        self._frames[bisect_left(self._starts, old.start)] = new

    def among(self, start: int, stop: int) -> list[m.Outputs]:
        """The frames that have an output of an input from `start` to `stop`."""
        if start >= stop:
            return []
        low = max(bisect_right(self._starts, start) - 1, 0)
        high = bisect_left(self._starts, stop)
        if low < high and stop_of(self._frames[low]) <= start:
            low += 1
        return self._frames[low:high]

    def take(self, indexes: IntervalSet) -> list[m.Outputs]:
        """Remove the first frames, as far as all that is in them is among these indexes."""
        count = 0
        for outputs in self._frames:
            if not indexes.covers(outputs.start, stop_of(outputs)):
                break
            count += 1
        taken = self._frames[:count]
        if count == len(self._frames):
            self.clear()
        elif count:
            del self._frames[:count], self._starts[:count]
        return taken

    def clear(self) -> None:
        self._starts = _NO_STARTS
        self._frames = _NO_FRAMES


def stop_of(outputs: m.Outputs) -> int:
    """One more than the last input whose output is in the frame."""
    return outputs.start + len(outputs.statuses)
