"""A terminal with a program in it: what a person would type, and what he would see."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import TracebackType
from typing import Any

import pyte

from tests.conftest import poll_until

INTERRUPT = "\x03"


class Terminal:
    """Runs a command in a terminal of its own; for a ``with`` block.

    Args:
        arguments: the command.
        variables: its environment.
        columns: of the terminal.
        rows: of the terminal.
        options: for `subprocess.Popen`: a stream that is not to be the terminal.
    """

    def __init__(
        self,
        arguments: list[str],
        variables: dict[str, str],
        columns: int = 100,
        rows: int = 30,
        **options: Any,
    ) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=100_000, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._ours = ours
        streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self._process = subprocess.Popen(
            arguments,
            env={"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **variables},
            start_new_session=True,
            preexec_fn=_take_terminal,
            **{**streams, **options},
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._ours)

    def read(self) -> None:
        """Take what has been written since."""
        while select.select([self._ours], [], [], 0)[0]:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:
                return
            if not data:
                return
            self.raw += data
            self._stream.feed(data)

    @property
    def lines(self) -> list[str]:
        """The lines on the screen, from the top, without those that are empty at its end."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def all_lines(self) -> list[str]:
        """These, and those that have left it at the top."""
        history = self._screen.history.top
        width = self._screen.columns
        return ["".join(row[x].data for x in range(width)).rstrip() for row in history] + self.lines

    def sees(self, *parts: str) -> str:
        """Wait until one line of the screen holds all parts; gives the line."""

        def find() -> str:
            self.read()
            matching = (line for line in self.lines if all(part in line for part in parts))
            return next(matching, "")

        shown: str = poll_until(find, lambda: f"{parts} on the screen:\n{self}", timeout_s=30)
        return shown

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._ours, text.encode())

    def ends(self) -> int:
        """Wait for the command; gives its exit code."""

        def is_over() -> bool:
            self.read()
            return self._process.poll() is not None

        poll_until(is_over, lambda: f"the command has ended:\n{self}", timeout_s=30)
        self.read()
        return self._process.returncode

    def __str__(self) -> str:
        return "\n".join(self.lines)


def fanout_run(*arguments: str | Path) -> list[str]:
    """The command line of `fanout run`."""
    return [sys.executable, "-m", "fanout.cli.main", "run", *map(str, arguments)]


def _take_terminal() -> None:
    """Make descriptor 0 the controlling terminal, so that it delivers SIGINT."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
