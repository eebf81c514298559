"""Text for a terminal: spans with a style of rich, how many columns they take, cutting them to fit.

Rich is loaded by what measures and draws, and so not where output is redirected. Sans-IO.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

#: A piece of text and its style as rich writes it ("bold", "red"), "" for none.
Span = tuple[str, str]
Line = list[Span]

_RESET = "\x1b[0m"

# Rich's decoder of what programs write (`Text.from_ansi`) drops most of what moves the cursor, but
# lets titles, the clipboard and one-byte controls through; it is for text that is trusted.
#: Colours. All else that a terminal obeys would move the cursor or change the window, and goes.
_COLOUR = r"\x1b\[[0-9;:]*m"
_ESCAPE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC: titles, links, the clipboard
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"  # DCS and its like
    rf"|(?!{_COLOUR})\x1b\[[0-?]*[ -/]*[@-~]?"  # CSI but colours
    r"|\x1b(?!\[)[ -/]*[0-~]?"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f\x80-\x9f]")
_ANY_COLOUR = re.compile(_COLOUR)


def clean(text: str, has_colours: bool) -> str:
    """The text without what would do more to a terminal than show it.

    Args:
        text: what a container wrote.
        has_colours: leave colours in; a reset follows if there were any.
    """
    if text.isprintable():
        return text
    if "\x1b" in text:
        text = _ESCAPE.sub("", text)
        if not has_colours:
            text = _ANY_COLOUR.sub("", text)
    text = _CONTROL.sub("", text)
    return text + _RESET if "\x1b" in text else text


def cells(text: str) -> int:
    """How many columns a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, width: int) -> str:
    """The text in at most `width` columns; an ellipsis stands for the rest."""
    from rich.text import Text

    if width <= 0:
        return ""
    shown = Text(text)
    shown.truncate(width, overflow="ellipsis")
    return shown.plain


def width_of(line: Line) -> int:
    """How many columns a line takes."""
    return sum(cells(text) for text, _ in line)


def cut_line(line: Line, width: int) -> Line:
    """The line in at most `width` columns."""
    kept: Line = []
    for text, style in line:
        room = width - width_of(kept)
        if room <= 0:
            break
        kept.append((cut(text, room), style))
    return kept


def plain(line: Line) -> str:
    """The line as bare text."""
    return "".join(text for text, _ in line)


def as_text(lines: Iterable[Line]) -> Text:
    """The lines as rich draws them, none of them wrapped, with no newline behind the last."""
    from rich.text import Text

    newline = Text("\n", no_wrap=True, overflow="ignore", end="")
    return newline.join(Text.assemble(*line) for line in lines)
