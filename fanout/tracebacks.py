"""Tracebacks as plain data, and back as real ones.

A container packs each frame as a row of names and numbers, with the source lines that it can see.
The client makes frames of them: generators that never start, each with a code object that says
where it stands. So `traceback`, debuggers and test runners show the remote frames like any
others, with the marks below the failing part of a line, and no frame holds on to anything.

A source that is not here, or is another one here, is shown as ``<host>:/path``, and `linecache`
knows its lines. Sources that travelled to a worker have their path on this machine again.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
from itertools import islice
from types import CodeType, FunctionType, TracebackType

from fanout import context, exceptions

#: Frames of one exception; of a longer traceback the middle is left out.
FRAMES_MAX = 1000
#: Different frames of an error and all that it was raised from.
ROWS_MAX = 500
#: Source lines of one frame, and the length of each.
LINES_MAX = 6
LINE_CHARS_MAX = 300
#: Names of files and functions may be anything that code compiles under.
NAME_CHARS_MAX = 1000
#: Beyond this no source file goes, and `linecache` needs a list as long as the number.
LINE_NUMBER_MAX = 200_000

#: In the globals of frames that came from a container.
_MARK = "__fanout_remote__"

_PACKAGE_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_WORKER_PART = f"{os.sep}fanout_worker{os.sep}"
_IMPORT_SYSTEM = "<frozen importlib"
_IMPORT_MODULE = os.path.join("importlib", "__init__.py")

#: File, function, its first line, first and last line, first and last column, source lines.
Row = tuple[str, str, int, int, int, int, int, tuple[str, ...]]


def is_own_file(filename: str) -> bool:
    """Whether a frame of this file is fanout's own, which is nobody's concern but ours."""
    return filename.startswith((_PACKAGE_FOLDER, _IMPORT_SYSTEM)) or _WORKER_PART in filename


# --- packing --------------------------------------------------------------------------------------


class FrameTable:
    """The different frames of an error and its causes; tracebacks are lists of their numbers, so
    a recursion of a thousand frames takes a few."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._numbers: dict[tuple[int, int, int], int] = {}
        # Keeps the code objects alive whose ids are keys.
        self._codes: list[CodeType] = []
        #: The row that stands for all frames beyond `ROWS_MAX`.
        self._more = -1

    def add(self, trace: TracebackType | None) -> list[int]:
        """The frames of a traceback, outermost first, less fanout's own."""
        entries: list[TracebackType] = []
        after_own = False
        while trace is not None:
            filename = trace.tb_frame.f_code.co_filename
            if is_own_file(filename):
                after_own = True
            elif not (after_own and filename.endswith(_IMPORT_MODULE)):
                # `import_module` as the loader calls it goes with the loader.
                entries.append(trace)
                after_own = False
            trace = trace.tb_next
        left_out = len(entries) - FRAMES_MAX
        if left_out <= 0:
            return [self._number(entry) for entry in entries]
        half = FRAMES_MAX // 2
        gap = self._gap(f"<{left_out} frames left out>")
        head, tail = entries[:half], entries[-half:]
        return [*map(self._number, head), gap, *map(self._number, tail)]

    def _number(self, entry: TracebackType) -> int:
        code = entry.tb_frame.f_code
        key = (id(code), entry.tb_lasti, entry.tb_lineno)
        number = self._numbers.get(key)
        if number is not None:
            return number
        if len(self._codes) >= ROWS_MAX:
            if self._more < 0:
                self._more = self._gap("<more frames left out>")
            return self._more
        self._codes.append(code)
        self.rows.append(_row(entry))
        number = self._numbers[key] = len(self.rows) - 1
        return number

    def _gap(self, text: str) -> int:
        self.rows.append((text, "...", 1, 1, 1, 0, 0, ()))
        return len(self.rows) - 1


def _row(entry: TracebackType) -> Row:
    code, lineno = entry.tb_frame.f_code, entry.tb_lineno or 1
    positions = next(islice(code.co_positions(), max(0, entry.tb_lasti) // 2, None), (None,) * 4)
    first, last, column, end_column = positions
    if first != lineno or last is None or column is None or end_column is None:
        last, column, end_column = lineno, -1, -1
    filename = code.co_filename
    lines: list[str] = []
    for number in range(lineno, min(last, lineno + LINES_MAX - 1) + 1):
        line = linecache.getline(filename, number, entry.tb_frame.f_globals)
        lines.append(line.rstrip("\n")[:LINE_CHARS_MAX])
    if not any(lines):
        lines = []
    return (
        _travelling_name(filename)[:NAME_CHARS_MAX], code.co_name[:NAME_CHARS_MAX],
        min(code.co_firstlineno, lineno), lineno, last, column, end_column, tuple(lines),
    )  # fmt: skip


def _travelling_name(filename: str) -> str:
    """Files that came from the client are named as they are there, relative to its path."""
    container = context.container
    if container is not None and container.sources:
        folder = container.sources + os.sep
        if filename.startswith(folder):
            return filename[len(folder) :]
    return filename


# --- rebuilding -----------------------------------------------------------------------------------


def rebuild(rows: list[Row], numbers: list[int], host: str) -> TracebackType | None:
    """A real traceback of packed frames; None if there are none, or they are nonsense.

    Args:
        rows: the table of frames.
        numbers: of the frames in it, outermost first.
        host: where they come from.
    """
    trace: TracebackType | None = None
    try:
        for number in reversed(numbers[: FRAMES_MAX + 1]):
            code, offset, lineno = _code_of(rows[number], host)
            generator = FunctionType(code, {"__name__": code.co_filename, _MARK: True})()
            trace = TracebackType(trace, generator.gi_frame, offset, lineno)
    except (IndexError, TypeError, ValueError, OverflowError):
        return None
    return trace


@functools.lru_cache(maxsize=4096)
def _code_of(row: Row, host: str) -> tuple[CodeType, int, int]:
    """A code object that stands where the row says, the offset in it that does, and the line."""
    import ast

    filename, name, first_lineno, lineno, end_lineno, column, end_column, lines = row
    filename = _local_name(filename, lineno, lines, host)
    if column < 0:
        # Nothing is known: the whole line, which is shown without marks.
        text = lines[0] if lines else ""
        column = len(text) - len(text.lstrip())
        end_column = max(column, len(text.rstrip().encode()))
    # The function begins at line 1; replacing its first line moves all the others.
    shift = first_lineno - 1
    here = {
        "lineno": lineno - shift, "end_lineno": max(end_lineno, lineno) - shift,
        "col_offset": column, "end_col_offset": end_column,
    }  # fmt: skip
    top = {"lineno": 1, "end_lineno": 1, "col_offset": 0, "end_col_offset": 0}
    module = ast.parse("def f(): yield")
    for node in ast.walk(module):
        if "lineno" in node._attributes:
            for attribute, value in (here if isinstance(node, ast.Yield) else top).items():
                setattr(node, attribute, value)
    compiled = compile(module, filename, "exec")
    code = next(const for const in compiled.co_consts if isinstance(const, CodeType))
    positions: list[tuple[int | None, ...]] = list(code.co_positions())
    wanted: tuple[int | None, ...] = (here["lineno"], here["end_lineno"], column, end_column)
    if wanted not in positions:
        # An interpreter that leaves columns out (PYTHONNODEBUGRANGES) knows the line.
        wanted = next((p for p in positions if p[0] == here["lineno"]), positions[0])
    offset = 2 * positions.index(wanted)
    code = code.replace(co_name=name, co_qualname=name, co_firstlineno=first_lineno)
    return code, offset, lineno


def _local_name(filename: str, lineno: int, lines: tuple[str, ...], host: str) -> str:
    """The name under which the frame's source is found here."""
    if not lines or lineno > LINE_NUMBER_MAX:
        return filename
    if not _is_foreign(filename):
        folders = [""] if os.path.isabs(filename) else [*sys.path, ""]
        for folder in folders:
            candidate = os.path.join(os.path.abspath(folder), filename) if folder else filename
            linecache.checkcache(candidate)
            found = linecache.getline(candidate, lineno).rstrip("\n")[:LINE_CHARS_MAX]
            if found == lines[0]:
                return candidate
        filename = f"<{host}>:{filename}"
    entry = linecache.cache.get(filename)
    known: list[str] = list(entry[2]) if entry is not None and len(entry) == 4 else []
    known += ["\n"] * (lineno + len(lines) - 1 - len(known))
    known[lineno - 1 : lineno - 1 + len(lines)] = [line + "\n" for line in lines]
    # Without a time of change the entry is never checked against a file.
    linecache.cache[filename] = (sum(map(len, known)), None, known, filename)
    _show_lines_of_uncaught_errors()
    return filename


def _is_foreign(filename: str) -> bool:
    return filename.startswith("<") and ">:" in filename


def _show_lines_of_uncaught_errors() -> None:
    """Before 3.13 the interpreter reads the lines of an uncaught error from files alone; what only
    `linecache` knows is shown by the `traceback` module. A hook of the user's own stays."""
    if sys.version_info < (3, 13) and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_uncaught


def _print_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    import traceback

    if sys.stderr is not None:
        traceback.print_exception(kind, error, trace)


# --- raising --------------------------------------------------------------------------------------


def leave_out_own_frames(error: BaseException) -> None:
    """Take fanout's frames from the head of the traceback of an error that is on its way to the
    user: they say how fanout got to the remote code. For an ``except`` clause of the outermost
    function, followed by a bare ``raise``, which adds no frame.

    An error that is a bug of fanout keeps them, as does what the user's own iterators raise.
    """
    trace = error.__traceback__
    while trace is not None and is_own_file(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    is_plain = isinstance(error, exceptions.Error) and not isinstance(
        error, exceptions.InternalError | exceptions.ProtocolError
    )
    if (trace is None and is_plain) or _has_remote_frame(trace):
        error.__traceback__ = trace


def _has_remote_frame(trace: TracebackType | None) -> bool:
    while trace is not None:
        if _MARK in trace.tb_frame.f_globals:
            return True
        trace = trace.tb_next
    return False
