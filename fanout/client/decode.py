"""Batches of outputs and items to the user's values."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any

from fanout.client.calls import BufferTable
from fanout.client.chunk import Batch, ItemBatch, Ready, split
from fanout.exceptions import DeserializationError, RemoteError, SteeringError
from fanout.protocol import messages as m
from fanout.remote_errors import decode_error, decode_failure
from fanout.serialization import decode_value, described

_loads = pickle.loads

#: Exceptions that steer the interpreter. A remote one raised here as it is would end somebody's
#: loop or task in silence, or look like the Ctrl-C of somebody who sits here.
_STEERING = (
    StopIteration, StopAsyncIteration, GeneratorExit, KeyboardInterrupt, asyncio.CancelledError,
)  # fmt: skip


def decode(
    ready: Ready, buffers: BufferTable, return_exceptions: bool
) -> tuple[list[Any], BaseException | None]:
    """The values of a batch, and the error that ends them.

    With `return_exceptions` errors are among the values, and nothing ends them.
    """
    if isinstance(ready, ItemBatch):
        return _decode_items(ready, buffers, return_exceptions)
    if not buffers and not ready.is_repeated and not any(ready.statuses):
        try:
            return [_loads(part) for part in split(ready.lengths, ready.payload)], None
        except Exception:
            # One of them cannot be unpickled: go through them again, each on its own.
            return _decode_each(ready, buffers, return_exceptions)
    return _decode_each(ready, buffers, return_exceptions)


def _decode_each(
    batch: Batch, buffers: BufferTable, return_exceptions: bool
) -> tuple[list[Any], BaseException | None]:
    values: list[Any] = []
    parts = None if batch.is_repeated else split(batch.lengths, batch.payload)
    for position, status in enumerate(batch.statuses):
        payload = batch.payload if parts is None else parts[position]
        if status == m.Status.DONE:
            continue
        if status == m.Status.VALUE:
            try:
                values.append(decode_value(payload, writable(buffers.get(position, ()))))
                continue
            except DeserializationError as failure:
                error: BaseException = failure
        else:
            error = error_of(status, payload)
            if isinstance(error, RemoteError) and error.input_index is None:
                # A failure of the whole call is the same bytes for each of its inputs.
                error.input_index = batch.start + position
        if not return_exceptions:
            return values, raisable(error)
        values.append(error)
    return values, None


def _decode_items(
    batch: ItemBatch, buffers: BufferTable, return_exceptions: bool
) -> tuple[list[Any], BaseException | None]:
    values: list[Any] = []
    for position, payload in enumerate(split(batch.lengths, batch.payload)):
        try:
            values.append(decode_value(payload, writable(buffers.get(position, ()))))
        except DeserializationError as error:
            if not return_exceptions:
                return values, error
            values.append(error)
    return values, None


def error_of(status: int, payload: m.Payload) -> BaseException:
    """The exception of an output that is not a value."""
    return decode_error(payload) if status == m.Status.ERROR else decode_failure(payload)


def writable(buffers: Sequence[memoryview]) -> list[memoryview]:
    """Copies of the user's own, so that an array that came back can be changed in place."""
    return [memoryview(bytearray(buffer)) for buffer in buffers]


def raisable(error: BaseException) -> BaseException:
    """The error as it may be raised here; see `_STEERING`."""
    if not isinstance(error, _STEERING):
        return error
    wrapped = SteeringError(f"the function raised {described(error)}")
    wrapped.__cause__ = error
    return wrapped
