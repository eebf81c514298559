"""The user's iterators, pulled a little at a time and encoded.

An iterator may be quick (a range) or slow (a query), and pulling blocks whoever pulls. So the
number of values pulled at a time follows what a pull costs: one at first, up to `SLICE_COUNT_MAX`
while that takes well under a millisecond, one again when it does not.

A value that cannot be pickled becomes an input that fails with that error where it is decoded, so
it takes its place in the order and counts against nobody else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any

from fanout.client.chunk import CHUNK_BYTES, CHUNK_COUNT_MAX, BlobRef
from fanout.exceptions import InvalidError, SerializationError
from fanout.protocol.blob_store import blob_id_of
from fanout.serialization import (
    CommonKwargs,
    copy_of,
    encode_args,
    encode_plain_column,
    encode_unencodable,
)

SLICE_COUNT_MAX = 64
#: A slice that takes longer than this is followed by a smaller one.
SLICE_S_MAX = 0.5e-3
#: Pulling for one chunk ends after this long, so that results that came meanwhile are seen.
PULL_S_MAX = 1e-3

#: Buffers of earlier inputs that a new one is compared with.
RECENT_COUNT = 2

#: What can be asked for its length at no cost; of anything else that may be a query.
_SIZED = (list, tuple, range, dict, set, frozenset, str, bytes, bytearray, deque)

#: A blob id with its content.
Pin = tuple[bytes, memoryview]


class Encoded:
    """Inputs ready to be added to a call."""

    __slots__ = ("blob_size", "blobs", "inputs", "pins", "size")

    def __init__(self) -> None:
        self.inputs: list[bytes] = []
        self.blobs: list[BlobRef] = []
        #: Bytes of blobs that belong to these inputs alone.
        self.blob_size = 0
        #: Bytes in all.
        self.size = 0
        self.pins: list[Pin] = []


class Encoder:
    """Turns arguments into inputs of one call.

    Args:
        common: keyword arguments that every input gets, or None.
        is_column: rows are single values, each the one argument of its input; else they are
            tuples of arguments.
    """

    def __init__(self, common: dict[str, Any] | None, is_column: bool) -> None:
        self._common = CommonKwargs(common) if common else None
        self._common_pins: dict[int, Pin] = {}
        if self._common is not None:
            for buffer in self._common.buffers:
                self._common_pins[id(buffer)] = (blob_id_of(buffer), buffer)
        self._is_column = is_column
        self._recent: deque[tuple[bytes | bytearray, Pin]] = deque(maxlen=RECENT_COUNT)

    def extend(self, encoded: Encoded, rows: list[Any]) -> None:
        """Add the inputs of some rows."""
        if self._is_column and self._common is None:
            inputs = encode_plain_column(rows)
            if inputs is not None:
                encoded.inputs += inputs
                encoded.size += sum(map(len, inputs))
                return
        for row in rows:
            self._append(encoded, (row,) if self._is_column else row, None)

    def _append(
        self, encoded: Encoded, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> None:
        try:
            data, buffers = encode_args(args, kwargs, self._common)
        except SerializationError as error:
            data, buffers = encode_unencodable(error), []
        if buffers:
            ids = []
            for buffer in buffers:
                pin = self._pin_known(buffer)
                if pin is None:
                    pin = self._pin_new(buffer)
                    encoded.blob_size += buffer.nbytes
                    encoded.size += buffer.nbytes
                encoded.pins.append(pin)
                ids.append(pin[0])
            encoded.blobs.append((len(encoded.inputs), ids))
        encoded.inputs.append(data)
        encoded.size += len(data)

    def _pin_known(self, buffer: memoryview) -> Pin | None:
        """A blob of the common keyword arguments, or of an earlier input with the same content:
        the usual thing where all inputs share an array. Comparing costs a tenth of copying and
        hashing, and such a buffer takes no room of its own on the way."""
        if (pin := self._common_pins.get(id(buffer))) is not None:
            return pin
        for content, pin in self._recent:
            if len(content) == buffer.nbytes and content.startswith(buffer):
                return pin
        return None

    def _pin_new(self, buffer: memoryview) -> Pin:
        content = copy_of(buffer)
        pin = (blob_id_of(content), memoryview(content))
        self._recent.append((content, pin))
        return pin


def pin_copy(buffer: memoryview) -> Pin:
    """A copy of a user's buffer, under its id. A copy, because the user may change the original
    while it is on its way."""
    content = memoryview(copy_of(buffer))
    return blob_id_of(content), content


def encode_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Encoded:
    """The single input of `remote` and `spawn`.

    Raises:
        SerializationError: an argument cannot be pickled.
    """
    encoded = Encoded()
    data, buffers = encode_args(args, kwargs)
    encoded.inputs.append(data)
    encoded.size = len(data)
    if buffers:
        encoded.pins = [pin_copy(buffer) for buffer in buffers]
        encoded.blobs.append((0, [pin[0] for pin in encoded.pins]))
        encoded.blob_size = sum(buffer.nbytes for buffer in buffers)
        encoded.size += encoded.blob_size
    return encoded


# --- what to pull ---------------------------------------------------------------------------------


class Rows:
    """The iterables of a map, checked.

    Args:
        method: the user's method, for messages.
        iterables: what the user gave.
        is_star: the one iterable gives sequences of arguments.

    Raises:
        InvalidError: none given, or one is not iterable.
    """

    def __init__(self, method: str, iterables: tuple[Any, ...], is_star: bool) -> None:
        if not iterables:
            raise InvalidError(
                f"{method}() got no iterator: with nothing to iterate over there is nothing to "
                f"run; for a single call write `.remote()`"
            )
        for position, iterable in enumerate(iterables):
            if not isinstance(iterable, Iterable | AsyncIterable) and not hasattr(
                iterable, "__getitem__"
            ):
                raise InvalidError(
                    f"argument {position} of {method}() is a {type(iterable).__name__}, which is "
                    "not iterable; pass lists, generators, or async iterables"
                )
        self.method = method
        self.iterables = iterables
        self.is_star = is_star
        self.is_column = len(iterables) == 1 and not is_star
        self.is_async = any(
            isinstance(iterable, AsyncIterable) and not isinstance(iterable, Iterable)
            for iterable in iterables
        )

    @property
    def count_hint(self) -> int | None:
        """How many rows there will be; None if that cannot be told beforehand."""
        if not all(isinstance(iterable, _SIZED) for iterable in self.iterables):
            return None
        return min(map(len, self.iterables))

    def start(self) -> Iterator[Any]:
        """Rows for a caller that may block; async iterables run on a loop of their own."""
        iterators = [
            iter(iterable) if _is_sync(iterable) else _blocking(iterable)
            for iterable in self.iterables
        ]
        if self.is_star:
            return map(self.as_arguments, iterators[0])
        return iterators[0] if self.is_column else zip(*iterators, strict=False)

    def start_async(self) -> AsyncIterator[Any]:
        """Rows when at least one iterable is async."""
        if self.is_column:
            return aiter(self.iterables[0])
        return self._zip_async()

    async def _zip_async(self) -> AsyncIterator[Any]:
        iterators = [
            iter(iterable) if _is_sync(iterable) else aiter(iterable) for iterable in self.iterables
        ]
        while True:
            row = []
            for iterator in iterators:
                try:
                    if isinstance(iterator, Iterator):
                        row.append(next(iterator))
                    else:
                        row.append(await anext(iterator))
                except (StopIteration, StopAsyncIteration):
                    return
            yield self.as_arguments(row[0]) if self.is_star else tuple(row)

    def as_arguments(self, row: Any) -> tuple[Any, ...]:
        """What `starmap` unpacks."""
        try:
            return tuple(row)
        except TypeError:
            raise InvalidError(
                f"{self.method}() unpacks each value into arguments, and got a "
                f"{type(row).__name__}; give tuples, or use `.map` for single arguments"
            ) from None


def _is_sync(iterable: Any) -> bool:
    return isinstance(iterable, Iterable) or not isinstance(iterable, AsyncIterable)


def _blocking(iterable: AsyncIterable[Any]) -> Iterator[Any]:
    async def pull() -> tuple[bool, Any]:
        try:
            return True, await anext(iterator)
        except StopAsyncIteration:
            return False, None

    iterator = aiter(iterable)
    with asyncio.Runner() as runner:
        while True:
            is_there, value = runner.run(pull())
            if not is_there:
                return
            yield value


# --- pulling --------------------------------------------------------------------------------------


class Puller:
    """Pulls rows in slices whose size follows their cost.

    An iterator may give some rows at once and then block for long: a page of a query, and nothing
    until the next page is there. Nobody knows before, so while the pulling thread is inside the
    iterator another one may take what has come so far (`rescue`). Outside of it the lock is held.
    """

    def __init__(self, rows: Iterator[Any], encoder: Encoder) -> None:
        self._rows = rows
        self._encoder = encoder
        self._slice = 1
        self._mean_size = 1.0
        #: Pulled and not encoded yet; encoded and not handed over yet.
        self._pulled: deque[Any] = deque()
        self._encoded = Encoded()
        self._lock = threading.Lock()
        #: Since when the pulling thread is inside the iterator, this time.
        self.inside_since: float | None = None
        #: All that was pulled so far, whoever has handed it over.
        self.count = 0
        self.size = 0
        self.is_exhausted = False
        #: The last pull took so long that results which are ready should not wait for another.
        self.is_slow = False

    def pull(self, count_max: int, size_max: int) -> Encoded:
        """The next inputs, as many as are worth a chunk and quickly there; at least one row is
        pulled. Sets `is_exhausted` at the end. Without what was rescued meanwhile.

        Raises:
            Exception: whatever the user's iterator raises.
        """
        count_stop = self.count + min(count_max, CHUNK_COUNT_MAX)
        size_stop = self.size + min(size_max, CHUNK_BYTES)
        self._encoded = Encoded()
        first_count = self.count
        started = now = time.perf_counter()
        while self.count < count_stop and self.size < size_stop:
            before_count = self.count
            wanted = min(
                self._slice,
                count_stop - before_count,
                max(1, int((size_stop - self.size) / self._mean_size)),
            )
            self.inside_since = now
            self._pulled.extend(islice(self._rows, wanted))
            with self._lock:
                self.inside_since = None
                rows = list(self._pulled)
                self._pulled.clear()
                self._encode(rows)
            if self.count - before_count < wanted:
                self.is_exhausted = True
                break
            before_s, now = now, time.perf_counter()
            if now - before_s < SLICE_S_MAX:
                self._slice = min(self._slice * 2, SLICE_COUNT_MAX)
            else:
                self._slice = max(1, self._slice // 4)
            if now - started > PULL_S_MAX:
                break
        self.is_slow = now - started > PULL_S_MAX and self.count - first_count <= 2
        return self._encoded

    def rescue(self, since: float) -> Encoded | None:
        """What has come so far, if the pulling thread is still inside the iterator for the same
        time as when `inside_since` was this. Else it may have handed over something that nobody has
        seen yet, which must go first. Called by another thread; never waits for the pulling one."""
        if self.inside_since is not since or not self._lock.acquire(blocking=False):
            return None
        try:
            if self.inside_since is not since:
                return None
            rows = []
            while self._pulled:
                rows.append(self._pulled.popleft())
            self._encode(rows)
            encoded, self._encoded = self._encoded, Encoded()
        finally:
            self._lock.release()
        return encoded if encoded.inputs else None

    def _encode(self, rows: list[Any]) -> None:
        if not rows:
            return
        before = self._encoded.size
        self._encoder.extend(self._encoded, rows)
        size = self._encoded.size - before
        self._mean_size += 0.5 * (size / len(rows) - self._mean_size)
        self.count += len(rows)
        self.size += size


class AsyncPuller:
    """Pulls rows of an async iterator. What is there at once goes into one chunk; when the
    iterator suspends, the rows so far are handed over first and it is resumed afterwards."""

    def __init__(self, rows: AsyncIterator[Any], encoder: Encoder) -> None:
        self._rows = rows
        self._encoder = encoder
        self._suspended: tuple[Any, Any] | None = None
        self.is_exhausted = False

    async def pull(self, count_max: int, size_max: int) -> Encoded:
        """As `Puller.pull`."""
        encoded = Encoded()
        count_max = min(count_max, CHUNK_COUNT_MAX)
        size_max = min(size_max, CHUNK_BYTES)
        started = time.perf_counter()
        while len(encoded.inputs) < count_max and encoded.size < size_max:
            try:
                if self._suspended is not None:
                    step, first = self._suspended
                    self._suspended = None
                    row = await _Resumed(step, first)
                else:
                    step = _as_generator(anext(self._rows))
                    try:
                        first = step.send(None)
                    except StopIteration as stop:
                        row = stop.value
                    else:
                        self._suspended = (step, first)
                        if encoded.inputs:
                            return encoded
                        continue
            except StopAsyncIteration:
                self.is_exhausted = True
                return encoded
            self._encoder.extend(encoded, [row])
            if time.perf_counter() - started > PULL_S_MAX:
                break
        return encoded


def _as_generator(awaitable: Awaitable[Any]) -> Generator[Any, Any, Any]:
    return (yield from awaitable.__await__())


class _Resumed:
    """Awaits a coroutine whose first step was taken already and gave `first`."""

    def __init__(self, step: Generator[Any, Any, Any], first: Any) -> None:
        self._step = step
        self._first = first

    def __await__(self) -> Generator[Any, Any, Any]:
        yielded = self._first
        try:
            while True:
                try:
                    sent = yield yielded
                except GeneratorExit:
                    self._step.close()
                    raise
                except BaseException as error:
                    yielded = self._step.throw(error)
                else:
                    yielded = self._step.send(sent)
        except StopIteration as stop:
            return stop.value
