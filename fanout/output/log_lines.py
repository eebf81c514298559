"""What containers write, as whole lines.

Text arrives in pieces, from many containers at once, and lines of two of them must not be mixed. A
`LineBuffer` is the bit of a terminal that one container's output needs: it knows the newline, the
carriage return, and the step up that nested progress bars make. A row that is written again and
again (tqdm) is one row, of which the last state counts.

Sans-IO.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

#: A row that was rewritten is finished this long after its newline: a nested progress bar goes
#: down a line, draws, and comes up again.
RETURN_GRACE_S = 1.0
#: Longer lines are broken; a container that never ends its line must not fill the memory.
LINE_SIZE_BYTES_MAX = 1 << 20
#: A progress bar that was not moved for this long, and not ended, is finished as it stands.
STALE_S = 30.0
ROWS_MAX = 64
BUFFERS_MAX = 1024

_STEPS = re.compile(rb"(\r|\n|\x1b\[[0-9]*A)")


class _Row:
    def __init__(self) -> None:
        self.text = b""
        #: The cursor is at its beginning: what comes next replaces the text.
        self.is_returned = False
        self.is_rewritten = False
        self.left_at = 0.0


class LineBuffer:
    """One stream of one input.

    Args:
        is_raw: give the bytes on as they are and only keep lines whole.
    """

    def __init__(self, is_raw: bool) -> None:
        self._is_raw = is_raw
        self._held = b""
        self._rows = [_Row()]
        self._cursor = 0
        self.touched_at = 0.0

    def feed(self, data: bytes, now: float) -> bytes:
        """Take a piece of text; returns the lines that it finished, each with its newline."""
        self.touched_at = now
        if self._is_raw:
            return self._feed_raw(data)
        if self.is_empty and data.endswith(b"\n") and b"\r" not in data and b"\x1b" not in data:
            return data
        for step in _STEPS.split(data):
            if step == b"\r":
                self._rows[self._cursor].is_returned = True
            elif step == b"\n":
                self._down(now)
            elif step.startswith(b"\x1b[") and step.endswith(b"A") and _STEPS.fullmatch(step):
                self._cursor = max(0, self._cursor - int(step[2:-1] or 1))
            elif step:
                self._write(step, now)
        return self.settle(now)

    def settle(self, now: float) -> bytes:
        """The rows above the cursor that will not be written again."""
        done: list[bytes] = []
        while self._cursor > 0:
            row = self._rows[0]
            is_fresh = row.is_rewritten and now < row.left_at + RETURN_GRACE_S
            if is_fresh and not self._has_moved_on() and len(self._rows) <= ROWS_MAX:
                break
            del self._rows[0]
            self._cursor -= 1
            done.append(_finished(row))
        return b"".join(done)

    def _has_moved_on(self) -> bool:
        """There is a plain line below: nobody comes up again from there."""
        below = self._rows[1 : self._cursor]
        return any(row.text and not row.is_rewritten for row in below)

    def close(self) -> bytes:
        """All that is left; the last line gets the newline that it lacks."""
        lines, rest = self.release()
        return lines + rest + b"\n" if rest.strip() else lines

    def release(self) -> tuple[bytes, bytes]:
        """All that is left: whole lines, and what is behind the last newline."""
        held, self._held = self._held, b""
        rows, self._rows, self._cursor = self._rows, [_Row()], 0
        last = rows.pop()
        return b"".join(map(_finished, rows)), held or last.text

    @property
    def is_empty(self) -> bool:
        """Nothing waits for its end."""
        return not self._held and len(self._rows) == 1 and not self._rows[0].text

    @property
    def has_rewritten(self) -> bool:
        """There is a progress bar in it."""
        return any(row.is_rewritten for row in self._rows)

    @property
    def live(self) -> list[bytes]:
        """The rows that are not finished, as they stand."""
        return [row.text for row in self._rows if row.text.strip()]

    def _feed_raw(self, data: bytes) -> bytes:
        data = self._held + data
        end = data.rfind(b"\n") + 1
        if len(data) - end > LINE_SIZE_BYTES_MAX:
            end = len(data)
        self._held = data[end:]
        return data[:end]

    def _write(self, text: bytes, now: float) -> None:
        row = self._rows[self._cursor]
        if row.is_returned:
            row.is_returned = False
            row.is_rewritten = True
            row.text = text
        else:
            row.text += text
        if len(row.text) > LINE_SIZE_BYTES_MAX:
            self._down(now)

    def _down(self, now: float) -> None:
        row = self._rows[self._cursor]
        row.left_at = now
        self._cursor += 1
        if self._cursor == len(self._rows):
            self._rows.append(_Row())


def _finished(row: _Row) -> bytes:
    """A row as a line. A bar that wiped itself out leaves none."""
    if row.is_rewritten and not row.text.strip():
        return b""
    return row.text + b"\n"


class Origin(NamedTuple):
    """Who wrote a text."""

    container_id: int
    source: int
    call_id: bytes
    input_index: int


#: Whole lines with their newlines, and who wrote them.
Entry = tuple[Origin, bytes]


class LogBook:
    """The line buffers of all containers.

    Args:
        is_raw: whether a source's text is to be given on as it is.
    """

    def __init__(self, is_raw: Callable[[int], bool]) -> None:
        self._is_raw = is_raw
        self._buffers: dict[Origin, LineBuffer] = {}
        #: Which input of a container wrote last, by container and source.
        self._last: dict[tuple[int, int], Origin] = {}

    def feed(self, origin: Origin, data: bytes, now: float) -> list[Entry]:
        """Take a piece of text; returns what is finished by it."""
        entries: list[Entry] = []
        place = (origin.container_id, origin.source)
        last = self._last.get(place)
        if last is not None and last != origin:
            # What the input before left without a newline ends here; a bar may still move.
            before = self._buffers.get(last)
            if before is not None and not before.has_rewritten:
                self._close(last, entries)
        buffer = self._buffers.get(origin)
        if buffer is None:
            buffer = LineBuffer(self._is_raw(origin.source))
        _note(entries, origin, buffer.feed(data, now))
        if buffer.is_empty:
            self._buffers.pop(origin, None)
            self._last.pop(place, None)
            return entries
        self._last[place] = origin
        self._buffers[origin] = buffer
        if len(self._buffers) > BUFFERS_MAX:
            self._close(next(iter(self._buffers)), entries)
        return entries

    def tick(self, now: float) -> list[Entry]:
        """What is finished because time has passed."""
        entries: list[Entry] = []
        for origin, buffer in list(self._buffers.items()):
            if buffer.has_rewritten and now >= buffer.touched_at + STALE_S:
                self._close(origin, entries)
                continue
            _note(entries, origin, buffer.settle(now))
            if buffer.is_empty:
                del self._buffers[origin]
        return entries

    def end_call(self, call_id: bytes) -> list[Entry]:
        """Nothing more comes of this call."""
        entries: list[Entry] = []
        for origin in [origin for origin in self._buffers if origin.call_id == call_id]:
            self._close(origin, entries)
        return entries

    def close(self) -> list[Entry]:
        """Nothing more comes at all."""
        entries: list[Entry] = []
        for origin in list(self._buffers):
            self._close(origin, entries)
        self._last.clear()
        return entries

    @property
    def is_empty(self) -> bool:
        return not self._buffers

    def live(self, count: int) -> list[Entry]:
        """Unfinished rows, at most `count`: those that began first, so that each keeps its place as
        long as it lasts."""
        rows: list[Entry] = []
        for origin, buffer in self._buffers.items():
            if len(rows) >= count:
                break
            rows += [(origin, row) for row in buffer.live]
        return rows[:count]

    def _close(self, origin: Origin, entries: list[Entry]) -> None:
        _note(entries, origin, self._buffers.pop(origin).close())


def _note(entries: list[Entry], origin: Origin, lines: bytes) -> None:
    if lines:
        entries.append((origin, lines))
