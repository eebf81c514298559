"""The script's streams: writing to them whatever has become of them, and standing for them while a
screen is drawn.

What draws is in `screen`, which loads rich; this is loaded where nothing is drawn, too.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from fanout.output.screen import Screen


class LocalStream(io.TextIOBase):
    """Stands for `sys.stdout` or `sys.stderr` while a screen is drawn. Rich's proxy for that keeps
    a text back until its newline, and so would hide a prompt."""

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
