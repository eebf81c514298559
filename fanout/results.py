"""What `f.map(...)` and `f.remote_gen(...)` return: results that are there once somebody asks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import AsyncIterator, Callable, Generator
from types import TracebackType
from typing import Any, Protocol, TypeVar

from fanout.exceptions import InvalidError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Results(Protocol[T]):
    """What `f.map.aio(...)` returns: iterate with ``async for``, or ``await`` it for a list."""

    def __aiter__(self) -> AsyncIterator[T]: ...

    def __await__(self) -> Generator[Any, None, list[T]]: ...

    async def aclose(self) -> None: ...


class BlockingResults(Generator[T_co, None, None]):
    """Results for a thread that blocks: iterate with ``for``, end early with `close`.

    Inside a running event loop a ``for`` would stop that loop, and is an error; ``async for`` works
    there. Nothing runs before the first result is asked for. Leaving the loop early cancels the
    call as soon as nobody holds the object any more.

    Args:
        name: the user's method, for messages.
        begin: makes the iterator of the blocking form.
        begin_async: makes that of the other.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[], Generator[T_co, None, None]],
        begin_async: Callable[[], Any],
    ) -> None:
        self._name = name
        #: Until one of them is used; they hold the user's iterators.
        self._begins: tuple[Callable[[], Generator[T_co, None, None]], Callable[[], Any]] | None
        self._begins = begin, begin_async
        self._values: Generator[T_co, None, None] | None = None
        self._async_values: Any = None
        #: Somebody asked for results, in vain or not.
        self._is_used = False

    def __iter__(self) -> Generator[T_co, None, None]:
        # The bare generator, so that a loop pays nothing for this object.
        return self._started()

    def __next__(self) -> T_co:
        return next(self._started())

    def send(self, value: None) -> T_co:
        return self._started().send(value)

    def throw(
        self,
        kind: Any,
        value: BaseException | object = None,
        trace: TracebackType | None = None,
        /,
    ) -> T_co:
        error = kind if isinstance(kind, BaseException) else value
        return self._started().throw(error if isinstance(error, BaseException) else kind())

    def close(self) -> None:
        """Nobody wants the rest: what runs is stopped, what waits does not run."""
        self._is_used = True
        self._begins = None
        if self._async_values is not None:
            self._async_values.cancel()
        if self._values is not None:
            self._values.close()

    def __aiter__(self) -> AsyncIterator[T_co]:
        self._is_used = True
        if self._values is not None:
            raise InvalidError(
                f"{self._name}(...) is iterated over with `for` already; make a second call for "
                "`async for`"
            )
        if self._begins is not None:
            (_, begin), self._begins = self._begins, None
            self._async_values = begin()
        if self._async_values is None:
            return _nothing_async()
        values: AsyncIterator[T_co] = aiter(self._async_values)
        return values

    async def aclose(self) -> None:
        """`close`, for asyncio."""
        self.close()

    def _started(self) -> Generator[T_co, None, None]:
        if self._values is not None:
            return self._values
        self._is_used = True
        if self._begins is None:
            if self._async_values is not None:
                raise InvalidError(
                    f"{self._name}(...) is iterated over with `async for` already; make a second "
                    "call for `for`"
                )
            return _nothing()
        from fanout.client.loop import forbid_in_loop

        forbid_in_loop(f"iterating over {self._name}(...)", f"async for x in {self._name}.aio(...)")
        (begin, _), self._begins = self._begins, None
        self._values = begin()
        return self._values

    def __repr__(self) -> str:
        return f"<results of {self._name}(...)>"

    def __del__(self) -> None:
        if not self._is_used:
            warn_unused(self._name)


def warn_unused(name: str) -> None:
    """Results that were dropped before anybody asked for one: most likely a mistake."""
    if sys.is_finalizing():
        return
    warnings.warn(
        f"nobody iterated over {name}(...), so none of its inputs has run; write "
        f"`for x in {name}(...)` or `list({name}(...))`, or for_each where the results do not "
        "matter",
        RuntimeWarning,
        stacklevel=3,
    )


def warn_wrapping(wrap_returned_exceptions: bool | None) -> None:
    """An option of Modal's that does nothing there any more, and nothing here."""
    if wrap_returned_exceptions is not None:
        from fanout.warning import warn_user

        warn_user(
            "wrap_returned_exceptions= does nothing: with return_exceptions=True the exceptions "
            "come as they are; remove it",
            DeprecationWarning,
        )


def _nothing() -> Generator[Any, None, None]:
    yield from ()


async def _nothing_async() -> AsyncIterator[Any]:
    empty: tuple[Any, ...] = ()
    for value in empty:
        yield value
