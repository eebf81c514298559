"""Text for a terminal: spans with a style, how many columns they take, cutting them to fit.

Sans-IO.
"""

from __future__ import annotations

import re
from unicodedata import combining, east_asian_width

#: A piece of text and the name of its style, "" for none.
Span = tuple[str, str]
Line = list[Span]

_CODES = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_RESET = "\x1b[0m"

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
    if text.isascii():
        return len(text)
    return sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    if combining(character) or character in "\u200b\u200d\ufe0e\ufe0f":
        return 0
    return 2 if east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """The text in at most `width` columns; an ellipsis stands for the rest."""
    if cells(text) <= width:
        return text
    if width <= 0:
        return ""
    taken, column = [], 0
    for character in text:
        column += _cells_of(character)
        if column > width - 1:
            break
        taken.append(character)
    return "".join(taken) + "…"


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


def rendered(line: Line, has_colours: bool) -> str:
    """The line with its colours, or as plain text."""
    if not has_colours:
        return "".join(text for text, _ in line)
    return "".join(
        f"\x1b[{_CODES[style]}m{text}{_RESET}" if style else text for text, style in line
    )
