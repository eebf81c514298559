"""Warnings that name the line of the user's code that they are about."""

from __future__ import annotations

import sys
import warnings

from fanout import context


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line that called fanout: the first one up the stack that is not fanout's own."""
    from fanout.tracebacks import is_own_file

    level, frame = 1, sys._getframe()
    while frame.f_back is not None and is_own_file(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def warn_of_declaration(text: str) -> None:
    """Warn of what a script declares: not in containers, which import it once more."""
    if context.container is None:
        warn_user(text)
