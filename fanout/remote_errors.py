"""What an input failed with, to bytes and back.

An error travels as the graph of all exceptions that can be reached from it: causes, contexts,
members of groups. Each keeps its own type, state, notes and traceback. The format is that of
"What a value is on the wire" in `docs/architecture.md`.

An exception is packed in the first of four ways that gives it back as it was. The container tries
each by unpacking it again, because classes whose `__init__` asks for more than `args` pickle
without complaint and fail, or come out changed, on the other side.

1. Its own pickle.
2. Its parts: type, `args`, attributes. No code of the class runs when it is put together again.
3. Its parts, where what cannot travel (a lock, a connection, megabytes) is a text about it.
4. Its name and what it said; it arrives as `UnknownExceptionError`.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import msgpack

from fanout import exceptions
from fanout.config import BLOB_SIZE_BYTES_MIN
from fanout.context import CALL_PREFIX
from fanout.serialization import described, pickle_in_band, safe_str, type_name
from fanout.tracebacks import FrameTable, Row, rebuild

#: Exceptions of one error; beyond them the chain ends.
EXCEPTIONS_MAX = 256
#: What exceptions say, and remote tracebacks as text; longer ones lose their middle.
TEXT_CHARS_MAX = 64 << 10
#: An attribute or argument whose pickle is larger than this arrives as a text about it, if the
#: whole exception is larger than `PICKLED_SIZE_BYTES_MAX`.
PART_SIZE_BYTES_MAX = 64 << 10
PICKLED_SIZE_BYTES_MAX = BLOB_SIZE_BYTES_MIN // 2
#: What exceptions that are not the error itself say, where they travel as text.
_TEXT_CHARS_MAX_CAUSE = 2 << 10
#: About this much for all exceptions of an error; what comes later travels as text.
ERROR_SIZE_BYTES_MAX = BLOB_SIZE_BYTES_MIN
NOTES_MAX = 32
NOTE_CHARS_MAX = 4 << 10

#: How an exception was packed.
_TEXT, _PICKLE, _PARTS, _GROUP = range(4)


def encode_error(error: BaseException) -> bytes:
    """The payload of a `Status.ERROR` output. Never fails: what cannot be pickled, or cannot be
    unpickled again, travels as text only."""
    try:
        packed = _encode(error)
    except Exception as failure:
        # Whatever the user's classes do, somebody waits for the error.
        reason = f"it cannot be looked into: {described(failure)}"
        node = [_TEXT, reason, None, [], -1, -1, False, [], [], "", ""]
        packed = [type_name(error), _shortened(safe_str(error)), "", [], [node]]
    data: bytes = msgpack.packb(packed, unicode_errors="surrogatepass")
    return data


def decode_error(data: bytes | memoryview) -> BaseException:
    """The exception in a `Status.ERROR` payload, of its own type, with the remote traceback and
    what it was raised from; an `UnknownExceptionError` if its type cannot be rebuilt here."""
    try:
        name, text, host, rows, nodes = msgpack.unpackb(data, unicode_errors="surrogatepass")
        nodes[0][_TYPE_NAME], nodes[0][_SAID] = name, text
        table = [(*row[:-1], tuple(row[-1])) for row in rows]
        return _Decoder(nodes, table, host).root()
    except Exception as error:
        return exceptions.InternalError(f"an error arrived that cannot be decoded: {error}")


# --- packing --------------------------------------------------------------------------------------

# The fields of an exception on the wire, by position.
(
    _FORM, _REASON, _PICKLED, _FRAMES, _CAUSE, _CONTEXT, _IS_SUPPRESSED, _MEMBERS, _NOTES,
    _TYPE_NAME, _SAID,
) = range(11)  # fmt: skip


def _encode(error: BaseException) -> list[Any]:
    graph = _reachable(error)
    numbers = {id(one): number for number, one in enumerate(graph)}
    table = FrameTable()
    nodes: list[list[Any]] = []
    size = 0
    for one in graph:
        has_room = size < ERROR_SIZE_BYTES_MAX
        form, detail, pickled = _packed(one) if has_room else _TOO_MUCH
        is_root = one is error
        text = "" if is_root else _shortened(safe_str(one), _TEXT_CHARS_MAX_CAUSE)
        notes = _notes(one) if has_room else []
        size += len(pickled or b"") + len(text) + sum(map(len, notes))
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        nodes.append(
            [
                form,
                detail,
                pickled,
                table.add(one.__traceback__),
                numbers.get(id(one.__cause__), -1),
                numbers.get(id(one.__context__), -1),
                bool(one.__suppress_context__),
                [numbers.get(id(member), -1) for member in members],
                notes,
                "" if is_root else type_name(one),
                text,
            ]
        )
    text = _shortened(safe_str(error))
    return [type_name(error), text, os.uname().nodename, table.rows, nodes]


def _reachable(error: BaseException) -> list[BaseException]:
    """The error and all that it was raised from, the nearest first."""
    graph = [error]
    seen = {id(error)}
    for one in graph:
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for other in (*members, one.__cause__, one.__context__):
            if other is not None and id(other) not in seen and len(graph) < EXCEPTIONS_MAX:
                seen.add(id(other))
                graph.append(other)
    return graph


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    if not isinstance(notes, list | tuple):
        return []
    return [_shortened(str(note), NOTE_CHARS_MAX) for note in notes[:NOTES_MAX]]


_Packed = tuple[int, str, bytes | None]

_TOO_MUCH: _Packed = (_TEXT, f"the error is over {ERROR_SIZE_BYTES_MAX >> 20} MiB", None)


def _packed(error: BaseException) -> _Packed:
    """How the exception travels, why not as itself, and its bytes."""
    if isinstance(error, BaseExceptionGroup):
        return _packed_group(error)
    said = safe_str(error)
    candidates: list[_Packed] = []
    reason = "it cannot be pickled"
    for form, pack in ((_PICKLE, pickle_in_band), (_PARTS, _pickled_parts)):
        try:
            pickled = pack(error)
            if len(pickled) > PICKLED_SIZE_BYTES_MAX:
                continue
            back = pickle.loads(pickled) if form == _PICKLE else _from_parts(pickled)
            if type(back) is type(error):
                if safe_str(back) == said:
                    return form, "", pickled
                candidates.append((form, "", pickled))
        except Exception as failure:
            # The next way may do; the user's classes may raise anything here.
            reason = f"it cannot be pickled: {described(failure)}"
    if candidates:
        # What it says differs from one object to the next, as an address does.
        return candidates[0]
    try:
        pickled = _pickled_parts(error, is_lossy=True)
        if type(_from_parts(pickled)) is type(error):
            return _PARTS, "", pickled
    except Exception as failure:
        reason = f"it cannot be pickled: {described(failure)}"
    return _TEXT, _shortened(reason, NOTE_CHARS_MAX), None


def _packed_group(error: BaseExceptionGroup[BaseException]) -> _Packed:
    """A group without its members, which travel each by itself."""
    for is_lossy in (False, True):
        try:
            pickled = _pickled_parts(error, is_lossy)
            if len(pickled) > PICKLED_SIZE_BYTES_MAX:
                continue
            if type(_group_of(pickled, list(error.exceptions))) is type(error):
                return _GROUP, "", pickled
        except Exception as failure:
            reason = f"it cannot be pickled: {described(failure)}"
    return _TEXT, _shortened(reason, NOTE_CHARS_MAX), None


def _pickled_parts(error: BaseException, is_lossy: bool = False) -> bytes:
    args: tuple[Any, ...]
    if isinstance(error, BaseExceptionGroup):
        args = (error.message,)
    else:
        # An OSError has more to it than its `args` tell.
        reduced: Any = _builtin_base(type(error)).__reduce__(error)
        args = reduced[1]
    state = {name: value for name, value in vars(error).items() if name != "__notes__"}
    if is_lossy:
        changed: list[str] = []
        args = tuple(
            _lossy(value, f"argument {position}", changed) for position, value in enumerate(args)
        )
        state = {name: _lossy(value, name, changed) for name, value in state.items()}
        state["__notes__"] = [
            *_notes(error),
            f"({', '.join(changed)}: could not travel, and is a text about it here)",
        ]
    return pickle_in_band((type(error), args, state))


def _lossy(value: Any, name: str, changed: list[str]) -> Any:
    """The value, or a text about it."""
    try:
        if len(pickle_in_band(value)) <= PART_SIZE_BYTES_MAX:
            return value
    except Exception:
        # It does not matter why: a text always travels.
        pass
    changed.append(name)
    try:
        return _shortened(value if isinstance(value, str) else repr(value), PART_SIZE_BYTES_MAX)
    except Exception:
        return f"<{type_name(value)} object>"


# --- rebuilding -----------------------------------------------------------------------------------


def _from_parts(pickled: bytes) -> BaseException:
    """An exception of its parts. Only the builtin class that it is based on initialises it."""
    kind, args, state = pickle.loads(pickled)
    base = _builtin_base(kind)
    error: BaseException = base.__new__(kind, *args)
    try:
        base.__init__(error, *args)
    except Exception:
        # The class has never called it, so the arguments need not fit.
        error.args = args
    vars(error).update(state)
    return error


def _builtin_base(kind: type[BaseException]) -> type[BaseException]:
    return next(base for base in kind.__mro__ if base.__module__ == "builtins")


def _group_of(pickled: bytes, members: list[Any]) -> BaseException:
    kind, (message,), state = pickle.loads(pickled)
    error: BaseException = kind.__new__(kind, message, members)
    vars(error).update(state)
    return error


class _UnbuildableError(Exception):
    """Why an exception is known by its text alone."""


class _Decoder:
    """Puts the exceptions of one error together."""

    def __init__(self, nodes: list[list[Any]], rows: list[Row], host: str) -> None:
        self._nodes = nodes
        self._rows = rows
        self._host = host
        self._made: dict[int, BaseException] = {}
        self._is_root_unknown = False

    def root(self) -> BaseException:
        for number in range(len(self._nodes)):
            self._make(number)
        for number, error in self._made.items():
            self._dress(error, self._nodes[number])
        root = self._made[0]
        if self._is_root_unknown:
            assert isinstance(root, exceptions.UnknownExceptionError)
            self._tell_all(root)
        return root

    def _make(self, number: int) -> BaseException:
        made = self._made.get(number)
        if made is None:
            node = self._nodes[number]
            try:
                made = self._rebuilt(node)
            except Exception as failure:
                is_ours = isinstance(failure, _UnbuildableError)
                made = _unknown(node, str(failure) if is_ours else described(failure))
                self._is_root_unknown |= number == 0
            self._made[number] = made
        return made

    def _rebuilt(self, node: list[Any]) -> BaseException:
        form, pickled = node[_FORM], node[_PICKLED]
        if form == _TEXT:
            raise _UnbuildableError(node[_REASON])
        if form == _GROUP:
            return _group_of(pickled, self._members(node))
        back = pickle.loads(pickled) if form == _PICKLE else _from_parts(pickled)
        if not isinstance(back, BaseException):
            raise _UnbuildableError(f"its pickle gave a {type(back).__name__}")
        return back

    def _members(self, node: list[Any]) -> list[BaseException]:
        members = [self._make(number) for number in node[_MEMBERS] if number >= 0]
        left_out = len(node[_MEMBERS]) - len(members)
        if left_out:
            members.append(exceptions.RemoteError(f"{left_out} more exceptions, left out here"))
        return members

    def _dress(self, error: BaseException, node: list[Any]) -> None:
        """Give an exception its traceback, its notes, and what it was raised from."""
        error.__traceback__ = rebuild(self._rows, node[_FRAMES], self._host)
        error.__cause__ = self._made.get(node[_CAUSE])
        error.__context__ = self._made.get(node[_CONTEXT])
        error.__suppress_context__ = node[_IS_SUPPRESSED]
        if node[_NOTES] and not getattr(error, "__notes__", None):
            error.__notes__ = node[_NOTES]

    def _tell_all(self, root: exceptions.UnknownExceptionError) -> None:
        """An error of unknown type holds its traceback as text, and that of all that it was raised
        from, so that whoever logs its text alone has them."""
        import traceback

        node = self._nodes[0]
        members = self._members(node)
        base = BaseExceptionGroup if members else Exception
        kind = type(node[_TYPE_NAME], (base,), {"__module__": "builtins"})
        shown = kind(node[_SAID], members) if members else kind(node[_SAID])
        self._dress(shown, node)
        trace = _shortened("".join(traceback.format_exception(shown)).rstrip())
        root.traceback_text = trace
        root.args = (f"{root}. Remote traceback:\n{trace}",)
        root.__traceback__ = root.__cause__ = root.__context__ = None


def _unknown(node: list[Any], reason: str) -> exceptions.UnknownExceptionError:
    name, said = node[_TYPE_NAME], node[_SAID]
    error = exceptions.UnknownExceptionError(
        f"{name}: {said}\n\n(The exception's own type could not be rebuilt here: {reason})"
    )
    error.type_name, error.text = name, said
    return error


# --- failures -------------------------------------------------------------------------------------

_FAILURES: dict[str, type[exceptions.Error]] = {
    "timeout": exceptions.FunctionTimeoutError,
    "crash": exceptions.ContainerCrashedError,
    "cancelled": exceptions.InputCancelledError,
    "start": exceptions.ContainerStartError,
    "deadlock": exceptions.DeadlockError,
    "unplaceable": exceptions.ResourceExhaustedError,
    "serialization": exceptions.SerializationError,
    "store": exceptions.StorageError,
    "internal": exceptions.InternalError,
}


def decode_failure(data: bytes | memoryview) -> Exception:
    """What the client raises for a `Status.FAILURE` payload. What is known of it becomes the
    attributes that its class declares."""
    try:
        code, text, details = msgpack.unpackb(data, unicode_errors="surrogatepass")
        kind = _FAILURES.get(code)
        if kind is None:
            return exceptions.InternalError(f"unknown failure {code!r}: {text}")
        failure = kind(text)
        for name, value in details.items():
            if name == "call_id" and isinstance(value, bytes):
                value = CALL_PREFIX + value.hex()
            if name in _ATTRIBUTES and hasattr(kind, name):
                setattr(failure, name, value)
    except Exception as error:
        return exceptions.InternalError(f"a failure arrived that cannot be decoded: {error}")
    return failure


#: What details may become attributes; a class has those of them that it declares.
_ATTRIBUTES = frozenset(
    {
        "call_id", "crash_count", "exit_code", "input_index", "is_out_of_memory",
        "memory_limit_mib", "memory_mib", "peak_memory_mib", "signal", "timeout",
    }
)  # fmt: skip


def _shortened(text: str, size_max: int = TEXT_CHARS_MAX) -> str:
    if len(text) <= size_max:
        return text
    half = size_max // 2
    return f"{text[:half]}\n  [{len(text) - 2 * half} characters left out]\n{text[-half:]}"
