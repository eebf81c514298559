"""A terminal that shows lines for good, and below them a few that are redrawn.

What the script itself prints goes through here, too: it comes above the redrawn lines, which step
aside for it and are back at the next drawing. While nothing is to be redrawn, it passes through
untouched, prompts without a newline included.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from fanout.output.log_lines import LineBuffer
from fanout.output.style import Line, cells, clean, cut, rendered, width_of

_SIZE_DEFAULT = (80, 24)
#: Rows of the script's own that are redrawn: its last line, as long as it has no end.
_LOCAL_ROWS_MAX = 2
_TAIL_MAX = 4096
#: Written at a time, so that it can be seen whether a slow terminal takes anything at all.
_WRITE_MAX = 8192


class Screen:
    """One terminal.

    Args:
        stream: where it is drawn; a terminal.
        has_colours: whether it may be coloured.
        before_local: called before the script's own text is written, so that what containers have
            written until then comes first. Gives text.
    """

    def __init__(self, stream: TextIO, has_colours: bool, before_local: Callable[[], str]) -> None:
        self.stream = stream
        self.has_colours = has_colours
        self.is_unicode = _can_encode(stream, "━⠋│…")
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
        """Columns and rows."""
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
            text = "\n".join(rendered(line, self.has_colours) for line in drawn)
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
        return "\r\x1b[J"

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
            return "\r\x1b[J" + above + self._tail
        self._tail = ""
        return "\n" + above

    def _erase(self, width: int) -> str:
        """What removes the drawn lines. They may have been wrapped since, by a narrower window."""
        if not self._drawn:
            return ""
        rows = sum(max(1, -(-columns // width)) for columns in self._drawn)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"

    def _is_foreground(self) -> bool:
        """Whether the terminal is ours to draw on: not while we run behind a shell's prompt."""
        try:
            return os.tcgetpgrp(self.stream.fileno()) == os.getpgrp()
        except (OSError, ValueError):
            return True

    def _fitted(self, text: str) -> str:
        return text if self.is_unicode else text.replace("…", "~").replace("│", "|")

    def _write(self, stream: TextIO, text: str) -> None:
        for start in range(0, len(text), _WRITE_MAX):
            write_text(stream, text[start : start + _WRITE_MAX])
            self.written += 1


class LocalStream(io.TextIOBase):
    """Stands for `sys.stdout` or `sys.stderr` while a screen is drawn."""

    def __init__(self, screen: Screen, stream: TextIO, clock: Callable[[], float]) -> None:
        self.inner = stream
        self._screen = screen
        self._clock = clock

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._screen.write_local(self.inner, text, self._clock())
        return len(text)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.inner.flush()

    def fileno(self) -> int:
        return self.inner.fileno()

    def isatty(self) -> bool:
        return self.inner.isatty()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.inner.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.inner.errors

    @property
    def buffer(self) -> Any:
        return self.inner.buffer

    def close(self) -> None:
        """It is only lent; closing it would close the interpreter's own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def write_text(stream: TextIO | None, text: str) -> None:
    """Write and flush, whatever has become of the stream."""
    if stream is None or stream.closed:
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):
        # Nobody reads it any more; the calls are none the worse for it.
        return


def replace_streams(screen: Screen, clock: Callable[[], float]) -> Callable[[], None]:
    """Have what the script prints to the terminal go through the screen; gives what ends that."""
    replaced: list[tuple[str, LocalStream]] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if is_terminal(stream):
            local = LocalStream(screen, stream, clock)
            setattr(sys, name, local)
            replaced.append((name, local))

    def restore() -> None:
        for name, local in replaced:
            # Somebody may have put a stream of his own there meanwhile; it stays.
            if getattr(sys, name) is local:
                setattr(sys, name, local.inner)

    return restore


def is_terminal(stream: Any) -> bool:
    """Whether a person sees what is written there."""
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:
        return False


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


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
