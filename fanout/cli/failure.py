"""How the command line shows that something went wrong.

A wrong command line gets a sentence and exit code 2; a scheduler that is not there gets a sentence
and 1; an exception of the user's code gets its traceback, beginning at the user's file, and 1.
"""

from __future__ import annotations

import sys
import traceback

from fanout.exceptions import RemoteError, TimeoutError
from fanout.tracebacks import is_own_file

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
        kept = [frame for frame in current.stack if not is_own_file(frame.filename)]
        # A syntax error has no frame of the file it is in and names that file by itself; what ends
        # an input from outside has no frame of the user's.
        if kept or _is_any(current, SyntaxError, RemoteError, TimeoutError):
            current.stack = traceback.StackSummary.from_list(kept)
        pending += [current.__cause__, current.__context__]
        pending += current.exceptions or []


def _is_any(shown: traceback.TracebackException, *kinds: type[BaseException]) -> bool:
    return shown.exc_type is not None and issubclass(shown.exc_type, kinds)
