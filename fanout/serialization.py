"""Values to bytes and back.

Used at both ends: the client encodes inputs and decodes outputs, the container does the reverse.
The formats are those of "What a value is on the wire" in `docs/architecture.md`. Each value gets
bytes of its own, so one that cannot be pickled spoils nobody else.

Three ways to pickle, the cheapest first:

1. Arguments that are exactly of the plain built-in types go straight to `pickle.dumps`.
2. Other values go to the C pickler. It pickles functions and classes by reference, which is right
   for everything that can be imported on the other side, a script's `__main__` included: the
   container makes `__main__` another name for the script's module.
3. What the C pickler refuses (lambdas, closures, local classes) goes to cloudpickle. So does
   everything while `__main__` has no file (a REPL, a notebook, `-c`), because there a reference
   to `__main__` would look fine here and mean nothing over there.

Buffers of at least `config.BLOB_SIZE_BYTES_MIN` leave the pickle and stand beside it. A pickle
that is itself that large becomes such a buffer, and a small pickle that loads it takes its place;
so no value, whatever it is made of, makes a frame large.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from fanout import exceptions
from fanout.config import BLOB_SIZE_BYTES_MIN

Buffers = Sequence[memoryview]

PROTOCOL = 5

#: First byte of an input.
TAG_ARGS = b"\0"
TAG_ARGS_KWARGS = b"\1"
TAG_COMMON_INLINE = b"\2"
TAG_COMMON_BLOB = b"\3"
TAG_UNENCODABLE = b"\4"

#: Common keyword arguments up to this size are repeated in each input; larger ones are a blob
#: that travels once. A reference to a blob costs 34 bytes of frame and a look-up per input.
COMMON_INLINE_SIZE_BYTES_MAX = 1024
#: Large buffers of common keyword arguments that stand beside their pickle.
COMMON_BUFFER_COUNT_MAX = 100
#: Copied at a time: no other thread of the process runs meanwhile, which for a gibibyte would be
#: half a second.
COPY_SIZE_BYTES_MAX = 1 << 20

_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
_dumps = pickle.dumps
_loads = pickle.loads


class CommonKwargs:
    """The `kwargs=` of a map: pickled once, used by every input of the call.

    Raises:
        SerializationError: they cannot be pickled.
    """

    __slots__ = ("buffers", "prefix")

    def __init__(self, kwargs: dict[str, Any]) -> None:
        try:
            pickled, large = _pickle(kwargs)
            if len(large) > COMMON_BUFFER_COUNT_MAX:
                pickled, large = pickle_in_band(kwargs), []
        except _PICKLE_ERRORS as error:
            raise _args_error((), kwargs, error) from error
        #: Where they travel as blobs, the pickle and its large buffers; copies, as the user may
        #: change his. Always the same objects, so that they are hashed once.
        self.buffers: list[memoryview] = []
        if not large and len(pickled) <= COMMON_INLINE_SIZE_BYTES_MAX:
            self.prefix = TAG_COMMON_INLINE + len(pickled).to_bytes(4, "little") + pickled
        else:
            self.buffers = [memoryview(pickled), *(memoryview(copy_of(view)) for view in large)]
            self.prefix = TAG_COMMON_BLOB + bytes([len(self.buffers)])


def copy_of(buffer: memoryview) -> bytes | bytearray:
    """The bytes of a large buffer of the user's, who may change them afterwards.

    Args:
        buffer: one-dimensional, of bytes, as pickling gives it.
    """
    size_bytes = buffer.nbytes
    if size_bytes <= COPY_SIZE_BYTES_MAX:
        return bytes(buffer)
    copy = bytearray()
    for start in range(0, size_bytes, COPY_SIZE_BYTES_MAX):
        copy += buffer[start : start + COPY_SIZE_BYTES_MAX]
        # Let others go first who wait; they would have to wait for milliseconds otherwise.
        time.sleep(0)
    return copy


# --- arguments -----------------------------------------------------------------------------------


def encode_args(
    args: tuple[Any, ...], kwargs: dict[str, Any] | None, common: CommonKwargs | None = None
) -> tuple[bytes, list[memoryview]]:
    """The bytes of one input, and the large buffers that stand beside them.

    The buffers are views of the caller's own memory.

    Args:
        args: positional arguments.
        kwargs: keyword arguments of this input alone; not together with `common`.
        common: keyword arguments that all inputs of the call share.

    Raises:
        SerializationError: an argument cannot be pickled; the text says which one.
    """
    assert not (kwargs and common), "an input has keyword arguments of its own or common ones"
    value: Any = (args, kwargs) if kwargs else args
    if not kwargs and _PLAIN.issuperset(map(type, args)):
        pickled = _dumps(args, PROTOCOL)
        if common is None and len(pickled) < BLOB_SIZE_BYTES_MIN:
            return TAG_ARGS + pickled, []
    try:
        pickled, buffers = _pickle(value)
    except _PICKLE_ERRORS as error:
        raise _args_error(args, kwargs or {}, error) from error
    if common is not None:
        return common.prefix + pickled, [*common.buffers, *buffers]
    return (TAG_ARGS_KWARGS if kwargs else TAG_ARGS) + pickled, buffers


def encode_plain_column(values: list[Any]) -> list[bytes] | None:
    """The inputs ``(value,)`` for each of `values`, or None when one needs `encode_args`.

    One pass for a whole chunk of a map, because a call per input costs as much as the pickling.
    """
    if not _PLAIN.issuperset(map(type, values)):
        return None
    dumps = _dumps
    inputs = [b"\0" + dumps((value,), 5) for value in values]
    if max(map(len, inputs), default=0) > BLOB_SIZE_BYTES_MIN:
        return None
    return inputs


def encode_unencodable(error: exceptions.SerializationError) -> bytes:
    """An input that could not be encoded: decoding it raises the error, so that it fails like any
    other input and in its own place."""
    return TAG_UNENCODABLE + str(error).encode(errors="replace")


def decode_args(
    data: bytes | memoryview, buffers: Buffers
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an input.

    Args:
        data: what `encode_args` returned, as bytes or any view of them.
        buffers: the buffers beside it, in order.

    Raises:
        DeserializationError: they cannot be unpickled here; the text says why.
        SerializationError: the client could not pickle them (see `encode_unencodable`).
    """
    tag = data[0]
    if tag == 4:
        raise exceptions.SerializationError(bytes(data[1:]).decode())
    try:
        if tag == 0:
            args = _loads(data[1:], buffers=buffers) if buffers else _loads(data[1:])
            return args, {}
        if tag == 1:
            args, kwargs = _loads(data[1:], buffers=buffers)
            return args, kwargs
        if tag == 2:
            size = int.from_bytes(data[1:5], "little")
            kwargs = _loads(data[5 : 5 + size])
            return _loads(data[5 + size :], buffers=buffers), kwargs
        if tag == 3:
            count = data[1]
            kwargs = _loads(buffers[0], buffers=buffers[1:count])
            return _loads(data[2:], buffers=buffers[count:]), kwargs
    except Exception as error:
        raise _decode_failed("the arguments", error) from error
    raise exceptions.DeserializationError(
        f"the arguments cannot be unpickled: {tag} is no known tag of an input (0 to 4 are); "
        "client and worker may run different versions of fanout"
    )


# --- values --------------------------------------------------------------------------------------


def encode_value(value: Any) -> tuple[bytes, list[memoryview]]:
    """The bytes of an output or an item, and the large buffers that stand beside them.

    Raises:
        SerializationError: the value cannot be pickled.
    """
    if type(value) in _PLAIN:
        pickled = _dumps(value, PROTOCOL)
        if len(pickled) < BLOB_SIZE_BYTES_MIN:
            return pickled, []
    try:
        return _pickle(value)
    except _PICKLE_ERRORS as error:
        raise exceptions.SerializationError(
            f"the value that the function gave, a {type_name(value)}, cannot be pickled: "
            f"{described(error)}. Give plain data instead, or a path to where it is stored"
        ) from error


def decode_value(data: bytes | memoryview, buffers: Buffers) -> Any:
    """The value of an output or an item.

    Raises:
        DeserializationError: it cannot be unpickled here; the text says why.
    """
    try:
        return _loads(data, buffers=buffers)
    except Exception as error:
        raise _decode_failed("the output", error) from error


def encode_in_band(value: Any, what: str) -> bytes:
    """A value as one piece, with nothing beside it: an item of a queue, a value of a dict.

    Args:
        what: names it in the error.

    Raises:
        SerializationError: it cannot be pickled.
    """
    try:
        return _dumps(value, PROTOCOL) if type(value) in _PLAIN else pickle_in_band(value)
    except _PICKLE_ERRORS as error:
        raise exceptions.SerializationError(
            f"{what}, a {type_name(value)}, cannot be pickled: {described(error)}"
        ) from error


def decode_in_band(data: bytes | memoryview, what: str) -> Any:
    """The value that `encode_in_band` was given.

    Raises:
        DeserializationError: it cannot be unpickled here; the text says why.
    """
    try:
        return _loads(data)
    except Exception as error:
        raise _decode_failed(what, error) from error


def encode_key(key: Any) -> bytes:
    """A key of a dict. Keys are the same when their bytes are, so nothing may depend on which
    parts of the value happen to be one object: the pickler keeps no memo.

    Raises:
        SerializationError: it cannot be pickled.
    """
    if type(key) in _PLAIN:
        return _dumps(key, PROTOCOL)
    make: Any = pickle.Pickler if is_main_importable() else _cloud_pickler()
    file = io.BytesIO()
    pickler = make(file, protocol=PROTOCOL)
    pickler.fast = True
    try:
        pickler.dump(key)
    except _PICKLE_ERRORS:
        # Without a memo nothing cyclic can be pickled, and a class may have no importable name.
        return encode_in_band(key, "the key")
    return file.getvalue()


# --- pickling ------------------------------------------------------------------------------------

#: A user's `__reduce__` may raise anything; all of it means that the value cannot be pickled.
_PICKLE_ERRORS = (Exception,)


def pickle_by_value(value: Any) -> bytes:
    """Cloudpickle of a function that has no importable name; one piece, no buffers beside it.

    Raises:
        Exception: whatever the value's own reduction raises.
    """
    return _cloud_dumps(value, None)


def is_main_importable() -> bool:
    """Whether a reference to `__main__` can be resolved elsewhere: it has a file of its own."""
    return _is_file(getattr(sys.modules.get("__main__"), "__file__", None))


@functools.lru_cache(maxsize=8)
def _is_file(path: str | None) -> bool:
    return isinstance(path, str) and os.path.isfile(path)


class _BufferSieve:
    """Buffer callback of a pickler: takes large buffers out and leaves small ones in."""

    __slots__ = ("buffers",)

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True
        if raw.nbytes < BLOB_SIZE_BYTES_MIN:
            return True
        self.buffers.append(raw)
        return False


def _pickle(value: Any) -> tuple[bytes, list[memoryview]]:
    pickled: bytes | None = None
    sieve = _BufferSieve()
    if is_main_importable():
        try:
            pickled = _dumps(value, PROTOCOL, buffer_callback=sieve)
        except Exception:
            # Lambdas, closures and local classes are what cloudpickle is for; if the value is
            # beyond that too, the second attempt says so.
            sieve = _BufferSieve()
    if pickled is None:
        pickled = _cloud_dumps(value, sieve)
    if len(pickled) < BLOB_SIZE_BYTES_MIN:
        return pickled, sieve.buffers
    outer = _BufferSieve()
    pickled = _dumps(_Nested(pickled, sieve.buffers), PROTOCOL, buffer_callback=outer)
    return pickled, outer.buffers


def pickle_in_band(value: Any) -> bytes:
    """The pickle of a value in one piece, whatever its size.

    Raises:
        Exception: whatever the value's own reduction raises.
    """
    if is_main_importable():
        try:
            return _dumps(value, PROTOCOL)
        except Exception:
            # As in `_pickle`: cloudpickle has the last word.
            return _cloud_dumps(value, None)
    return _cloud_dumps(value, None)


class _Nested:
    """Pickles as "load this buffer as a pickle, with those buffers beside it"."""

    def __init__(self, pickled: bytes, buffers: list[memoryview]) -> None:
        self.pickled = pickled
        self.buffers = buffers

    def __reduce__(self) -> tuple[Any, ...]:
        beside = [pickle.PickleBuffer(buffer) for buffer in self.buffers]
        return _load_nested, (pickle.PickleBuffer(self.pickled), beside)


def _load_nested(pickled: Any, buffers: list[Any]) -> Any:
    return _loads(pickled, buffers=buffers)


@functools.cache
def _cloud_pickler() -> Any:
    """The pickler class for what has no importable name; cloudpickle is imported when needed,
    because plain data never needs it."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            is_named = isinstance(obj, FunctionType | type)
            if is_named and obj.__module__ == "__main__" and _is_reachable_in_main(obj):
                return NotImplemented
            return super().reducer_override(obj)

    return Pickler


def _is_reachable_in_main(value: Any) -> bool:
    if not is_main_importable():
        return False
    found: Any = sys.modules["__main__"]
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _cloud_dumps(value: Any, callback: Callable[[pickle.PickleBuffer], bool] | None) -> bytes:
    file = io.BytesIO()
    _cloud_pickler()(file, protocol=PROTOCOL, buffer_callback=callback).dump(value)
    return file.getvalue()


def _args_error(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> exceptions.SerializationError:
    """Says which argument it is, by trying each on its own; the error path may be slow."""
    named = [(f"argument {position}", value) for position, value in enumerate(args)]
    named += [(f"argument {name}=", value) for name, value in kwargs.items()]
    for name, value in named:
        try:
            pickle_in_band(value)
        except Exception as reason:
            return exceptions.SerializationError(
                f"{name}, a {type_name(value)}, cannot be pickled: {described(reason)}. "
                "Pass plain data instead, and make such objects inside the function"
            )
    return exceptions.SerializationError(f"the arguments cannot be pickled: {described(error)}")


def _decode_failed(what: str, error: Exception) -> exceptions.DeserializationError:
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f". The module {error.name!r} is not importable in this process (pid {os.getpid()})"
    elif isinstance(error, AttributeError):
        hint = ". The code here may differ from the code that made the value"
    return exceptions.DeserializationError(f"{what} cannot be unpickled: {described(error)}{hint}")


def type_name(value: Any) -> str:
    """The full name of the value's class; of a builtin class without the module."""
    kind = type(value)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def described(error: BaseException) -> str:
    """An exception in one line: its type and what it says."""
    return f"{type(error).__name__}: {safe_str(error)}".rstrip(": ")


def safe_str(error: BaseException) -> str:
    """What an exception says, even if its `__str__` fails."""
    try:
        return str(error)
    except Exception as failure:
        return f"<its __str__ raised {type(failure).__name__}>"
