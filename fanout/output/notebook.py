"""A notebook's cell: text in its output, and below it a display that is replaced.

A kernel sends what is written to the cell whose code runs in the same context. Our threads have
another one; so what they write is written in the context in which output was enabled.
"""

from __future__ import annotations

import contextvars
import importlib
import sys
from typing import Any, TextIO

from fanout.output.screen import write_text
from fanout.output.style import Line, rendered


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


class Cell:
    """The cell that enabled output."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._handle: Any = None
        self._shown = ""

    def write(self, stream: TextIO | None, text: str) -> None:
        """Write to the cell's stdout or stderr. Several threads may: each in a copy."""
        self._context.copy().run(write_text, stream, text)

    def draw(self, lines: list[Line]) -> None:
        """Replace the display by these lines."""
        text = "\n".join(rendered(line, has_colours=False) for line in lines)
        if text != self._shown:
            self._shown = text
            self._context.copy().run(self._display, text)

    def _display(self, text: str) -> None:
        display: Any = importlib.import_module("IPython.display").display
        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
