"""One mechanism for methods that exist twice: `f(...)` blocks, `f.aio(...)` is for asyncio.

A `Twin` stands in the class body where a method would. On an instance it gives a `BoundTwin` that
is called for the blocking form and has `aio` for the other; both have the parameters of the method,
as type checkers see them too. Most methods are written once, as a coroutine, and `twin` derives the
blocking form, which runs it on the background loop. Where that hop costs too much (`remote`, `map`)
both forms are written and paired with `Twin`.

Methods whose parameters are a `ParamSpec` must take `self` as positional-only (`self, /`), or else
a user's keyword argument `self` would clash with it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from inspect import CO_COROUTINE
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

S = TypeVar("S")
P = ParamSpec("P")
#: What the blocking form returns, and the other one.
R = TypeVar("R")
A = TypeVar("A")


class BoundTwin(Generic[P, R, A]):
    """A twin of one object: call it, or call its `aio`."""

    __slots__ = ("_aio", "_blocking", "_owner")

    def __init__(self, owner: Any, blocking: Callable[..., R], aio: Callable[..., A]) -> None:
        self._owner = owner
        self._blocking = blocking
        self._aio = aio

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return self._blocking(self._owner, *args, **kwargs)
        except BaseException as error:
            shorten(error)
            raise

    def aio(self, *args: P.args, **kwargs: P.kwargs) -> A:
        """The same for asyncio."""
        if not is_coroutine_function(self._aio):
            return self._aio(self._owner, *args, **kwargs)
        guarded: Any = _guarded(self._aio, self._owner, args, kwargs)
        guarded.__name__, guarded.__qualname__ = self._aio.__name__, self._aio.__qualname__
        return cast(A, guarded)

    def __repr__(self) -> str:
        return f"<{self._blocking.__name__.lstrip('_')} of {self._owner!r}; `.aio` for asyncio>"


def is_coroutine_function(function: Any) -> bool:
    """As of `inspect`, at a tenth of its price; each call asks."""
    return bool(function.__code__.co_flags & CO_COROUTINE)


async def _guarded(function: Any, owner: Any, args: Any, kwargs: Any) -> Any:
    # The coroutine is made in here: this one may be cancelled before its first step, and the other
    # would then complain that nobody awaited it.
    try:
        return await function(owner, *args, **kwargs)
    except BaseException as error:
        shorten(error)
        raise


def shorten(error: BaseException) -> None:
    """Take fanout's own frames from the traceback of an error that leaves for the user's code, in
    the ``except`` clause of the outermost function, before a bare ``raise``."""
    if isinstance(error, GeneratorExit):
        # No error, and it may come so late that nothing can be imported any more.
        return
    from fanout.tracebacks import leave_out_own_frames

    leave_out_own_frames(error)


class Twin(Generic[S, P, R, A]):
    """A method in two forms. See the module's text."""

    def __init__(
        self, blocking: Callable[Concatenate[S, P], R], aio: Callable[Concatenate[S, P], A]
    ) -> None:
        self._blocking = blocking
        self._aio = aio
        self.__doc__ = blocking.__doc__ or aio.__doc__

    @overload
    def __get__(self, instance: None, owner: Any) -> Twin[S, P, R, A]: ...
    @overload
    def __get__(self, instance: S, owner: Any) -> BoundTwin[P, R, A]: ...
    def __get__(self, instance: S | None, owner: Any) -> Any:
        return self if instance is None else BoundTwin(instance, self._blocking, self._aio)


def twin(
    aio: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
    before: Callable[..., None] | None = None,
) -> Twin[S, P, R, Coroutine[Any, Any, R]]:
    """Make a twin of a coroutine method: its blocking form runs it on the background loop.

    Args:
        aio: the method.
        before: is given its arguments first, by both forms: by the blocking one in the thread of
            the caller, as the user's lines are not on the stack of the background loop.
    """

    def blocking(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        from fanout.client import loop

        example = getattr(type(self), "_EXAMPLE", "call")
        loop.forbid_in_loop(f"{type(self).__name__}.{name}", f"await {example}.{name}.aio(...)")
        if before is not None:
            before(*args, **kwargs)
        return loop.run(lambda: aio(self, *args, **kwargs))

    async def checked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        assert before is not None
        before(*args, **kwargs)
        return await aio(self, *args, **kwargs)

    name = aio.__name__.lstrip("_")
    blocking.__name__ = checked.__name__ = aio.__name__
    checked.__qualname__ = aio.__qualname__
    blocking.__doc__ = checked.__doc__ = aio.__doc__
    return Twin(blocking, aio if before is None else checked)
