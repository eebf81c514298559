"""How the command line shows that something went wrong.

A wrong command line gets a sentence and exit code 2; a scheduler that is not there gets a sentence
and 1; an exception of the user's code gets its traceback, beginning at the user's file, and 1.
"""

from __future__ import annotations

import os
import sys
import traceback

#: Frames of these files say how fanout got to the user's code, which is nobody's question.
_PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_IMPORT_SYSTEM = "<frozen importlib"

EXIT_ERROR = 1
EXIT_USAGE = 2
#: What a shell reports for a program that SIGINT ended.
EXIT_INTERRUPTED = 130


def complain(text: str) -> None:
    """Write one message for a person to stderr."""
    sys.stderr.write(f"fanout: {text}\n")


def show_traceback(error: BaseException) -> None:
    """Write an exception of the user's code to stderr as the interpreter would, less the frames
    that are fanout's own. If there are no others it is fanout's error, and all are shown."""
    shown = traceback.TracebackException.from_exception(error)
    _strip(shown)
    sys.stdout.flush()
    sys.stderr.write("".join(shown.format()))


def _strip(shown: traceback.TracebackException) -> None:
    seen: set[int] = set()
    pending: list[traceback.TracebackException | None] = [shown]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        kept = [frame for frame in current.stack if not _is_ours(frame.filename)]
        # A syntax error has no frame of the file it is in and names that file by itself. One with a
        # cause may have come from a container, whose frames the cause shows.
        if kept or _is_syntax_error(current) or current.__cause__ is not None:
            current.stack = traceback.StackSummary.from_list(kept)
        pending += [current.__cause__, current.__context__]
        pending += current.exceptions or []


def _is_ours(filename: str) -> bool:
    return filename.startswith((_PACKAGE_FOLDER, _IMPORT_SYSTEM))


def _is_syntax_error(shown: traceback.TracebackException) -> bool:
    return shown.exc_type is not None and issubclass(shown.exc_type, SyntaxError)
