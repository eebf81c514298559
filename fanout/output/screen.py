"""A terminal that shows lines for good, and below them a few that are redrawn.

What the script itself prints goes through here, too: it comes above the redrawn lines, which step
aside for it and are back at the next drawing. While nothing is to be redrawn, it passes through
untouched, prompts without a newline included.

Rich says what the terminal can do, and renders text and what moves the cursor. Its `Live` is not
used. It draws again with each print, and hides the cursor, which stays hidden where a process ends
at once; it knows the rows that it drew, and not those that they became in a window that was made
narrow; and it writes to the terminal of a shell that has put us into the background.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from fanout.output.log_lines import LineBuffer
from fanout.output.streams import write_text
from fanout.output.style import Line, as_text, cells, clean, cut, width_of

_SIZE_DEFAULT = (80, 24)
#: Rows of the script's own that are redrawn: its last line, as long as it has no end.
_LOCAL_ROWS_MAX = 2
_TAIL_MAX = 4096
#: Written at a time, so that it can be seen whether a slow terminal takes anything at all.
_WRITE_MAX = 8192


def console_on(stream: TextIO) -> Console:
    """What rich knows of a terminal: whether it can be redrawn, its colours, its encoding.

    Args:
        stream: the terminal.
    """
    # A kernel of a notebook has a display of its own.
    return Console(file=stream, force_jupyter=False)


def rendered(console: Console, *lines: Line) -> str:
    """The lines with the colours that the terminal has, with no newline behind the last."""
    with console.capture() as capture:
        console.print(as_text(lines), end="", soft_wrap=True)
    return capture.get()


class Screen:
    """One terminal.

    Args:
        stream: where it is drawn; a terminal.
        console: what rich knows of it.
        before_local: called before the script's own text is written, so that what containers have
            written until then comes first. Gives text.
    """

    def __init__(self, stream: TextIO, console: Console, before_local: Callable[[], str]) -> None:
        self.stream = stream
        self.is_unicode = not console.options.ascii_only
        self._console = console
        #: Held while the terminal is written to. Reentrant: a signal handler may print.
        self.lock = threading.RLock()
        #: Grows while the terminal takes what is written to it.
        self.written = 0
        self._before_local = before_local
        #: Columns of each line that is drawn at the moment.
        self._drawn: list[int] = []
        #: Lines are being redrawn; the script's unfinished line is one of them.
        self._is_active = False
        self._local = LineBuffer(is_raw=False)
        #: The end of what passed through, since its last newline.
        self._tail = ""

    def size(self) -> tuple[int, int]:
        """Columns and rows. Rich would let `COLUMNS` say them, which a window that is made smaller
        does not change; lines that are too long would be wrapped and not be found again."""
        try:
            width, height = os.get_terminal_size(self.stream.fileno())
        except (OSError, ValueError):
            return _SIZE_DEFAULT
        return width or _SIZE_DEFAULT[0], height or _SIZE_DEFAULT[1]

    def draw(self, above: str, lines: list[Line], now: float) -> None:
        """Write whole lines for good and replace those below them."""
        with self.lock:
            width, height = self.size()
            erased = self._erase(width)
            if lines and not self._is_active:
                erased += self._begin(now, width)
            if self._is_active:
                above += _text(self._local.settle(now))
            if not lines and self._is_active:
                above += self._end()
            elif not self._is_active:
                above = self._above_tail(above, width)
            drawn = []
            if lines and self._is_foreground():
                local = self._local.live[-_LOCAL_ROWS_MAX:]
                drawn = [[(cut(_shown(row), width - 1), "")] for row in local] + lines
                # What has left the screen at its top cannot be erased.
                drawn = drawn[-max(1, height - 1) :]
            self._drawn = [width_of(line) for line in drawn]
            text = rendered(self._console, *drawn) if drawn else ""
            if erased or above or text:
                self._write(self.stream, erased + above + self._fitted(text))

    def write_local(self, stream: TextIO, text: str, now: float) -> None:
        """The script prints."""
        with self.lock:
            above = self._before_local()
            if not self._is_active:
                above = self._above_tail(above, self.size()[0])
                self._tail = _unfinished(self._tail + text)
                self._write(stream, above + text)
                return
            above += _text(self._local.feed(text.encode(errors="surrogateescape"), now))
            if above:
                width, _ = self.size()
                erased, self._drawn = self._erase(width), []
                self._write(stream, erased + above)

    def close(self, above: str) -> None:
        """Write the last lines, and leave the terminal as it was found."""
        with self.lock:
            width, _ = self.size()
            erased, self._drawn = self._erase(width), []
            if self._is_active:
                text = erased + above + self._end()
            else:
                text = self._above_tail(above, width)
            if text:
                self._write(self.stream, text)

    def abandon(self) -> None:
        """In a forked child: let everything through from now on. The lock may be held for ever, by
        a thread that is not here."""
        self.lock = threading.RLock()
        self._before_local = lambda: ""
        self._is_active = False
        self._drawn = []

    def _begin(self, now: float, width: int) -> str:
        """From now on the script's unfinished line is redrawn with the others."""
        self._is_active = True
        tail, self._tail = self._tail, ""
        if not tail:
            return ""
        if cells(_shown(tail)) >= width:
            return "\n"
        self._local.feed(tail.encode(errors="surrogateescape"), now)
        return _erased(1)

    def _end(self) -> str:
        """The script's unfinished line becomes its own again."""
        self._is_active = False
        lines, rest = self._local.release()
        self._tail = _text(rest)
        return _text(lines) + self._tail

    def _above_tail(self, above: str, width: int) -> str:
        """What writes whole lines above the script's unfinished line, which has passed through."""
        if not above or not self._tail:
            return above
        if cells(_shown(self._tail)) < width:
            return _erased(1) + above + self._tail
        self._tail = ""
        return "\n" + above

    def _erase(self, width: int) -> str:
        """What removes the drawn lines. They may have been wrapped since, by a narrower window."""
        if not self._drawn:
            return ""
        return _erased(sum(max(1, -(-columns // width)) for columns in self._drawn))

    def _is_foreground(self) -> bool:
        """Whether the terminal is ours to draw on: not while we run behind a shell's prompt."""
        try:
            return os.tcgetpgrp(self.stream.fileno()) == os.getpgrp()
        except (OSError, ValueError):
            return True

    def _fitted(self, text: str) -> str:
        """What can be written of a drawn text, in as many columns at most."""
        if self.is_unicode:
            return text
        # Rich cuts with an ellipsis in every encoding. And stderr writes `\xe9` for what it cannot
        # encode: the row would be wrapped, and not be found again.
        text = text.replace("…", "~").replace("│", "|")
        encoding = self._console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def _write(self, stream: TextIO, text: str) -> None:
        for start in range(0, len(text), _WRITE_MAX):
            write_text(stream, text[start : start + _WRITE_MAX])
            self.written += 1


def _erased(rows: int) -> str:
    """What removes the cursor's row and those above it, `rows` in all."""
    wiped = (ControlType.ERASE_IN_LINE, 2)
    above = ((ControlType.CURSOR_UP, 1), wiped) * (rows - 1)
    return str(Control(ControlType.CARRIAGE_RETURN, wiped, *above))


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _unfinished(text: str) -> str:
    """What a terminal shows of a text behind its last newline. A carriage return at its end has
    wiped nothing yet."""
    tail = text.rpartition("\n")[2]
    shown = tail.rstrip("\r")
    return shown.rpartition("\r")[2][-_TAIL_MAX:] + ("\r" if shown != tail else "")


def _shown(row: bytes | str) -> str:
    text = row if isinstance(row, str) else _text(row)
    return clean(text, has_colours=False).expandtabs()
