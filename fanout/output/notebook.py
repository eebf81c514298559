"""A notebook's cell: text in its output, and below it a display that is replaced.

A kernel sends what is written to the cell whose code runs in the same context. Our threads have
another one; so what they write is written in the context in which output was enabled.

Rich's texts know how a notebook displays them. Its `Live` would need `ipywidgets` to replace one.
"""

from __future__ import annotations

import contextvars
import importlib
import sys
from typing import TYPE_CHECKING, Any, TextIO

from fanout.output.streams import write_text
from fanout.output.style import Line, as_text

if TYPE_CHECKING:
    from rich.text import Text


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


class Cell:
    """The cell that enabled output."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._handle: Any = None
        self._shown: Text | None = None

    def write(self, stream: TextIO | None, text: str) -> None:
        """Write to the cell's stdout or stderr. Several threads may: each in a copy."""
        self._context.copy().run(write_text, stream, text)

    def draw(self, lines: list[Line]) -> None:
        """Replace the display by these lines."""
        text = as_text(lines)
        if text != self._shown and (lines or self._handle is not None):
            self._shown = text
            self._context.copy().run(self._display, text)

    def _display(self, text: Text) -> None:
        if self._handle is None:
            display: Any = importlib.import_module("IPython.display").display
            self._handle = display(text, display_id=True)
        else:
            self._handle.update(text)
