"""What decorators say of functions and classes before `@app.function` or `@app.cls` sees them.

A `PartialFunction` stands in the class body, or at the module level, where the function would. It
is plain data beside the raw function, so that a container can read it too: this module needs only
the standard library.

On an instance of a class that `@app.cls` decorated, a method gives the `Function` that calls it in
containers; on one of any other class, a base class say, it is the plain method.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload

from fanout.exceptions import InvalidError

if TYPE_CHECKING:
    from typing import Concatenate

    from fanout.function import Function

P = ParamSpec("P")
R = TypeVar("R")
O = TypeVar("O")  # noqa: E741
F = TypeVar("F")

BATCH_SIZE_MAX = 1000
BATCH_WAIT_MS_MAX = 600_000
CONCURRENT_INPUTS_MAX = 1000


class _Nothing(Enum):
    """No default. An enum, as its one value stays itself over pickles."""

    NOTHING = 0


NOTHING = _Nothing.NOTHING

#: Where an instance keeps the `fanout.cls.Obj` that it belongs to.
HANDLE = "_fanout_object"


@dataclass(frozen=True, slots=True)
class Batching:
    """See `batched`."""

    max_batch_size: int
    wait_ms: int


@dataclass(frozen=True, slots=True)
class Concurrency:
    """See `concurrent`."""

    max_inputs: int
    target_inputs: int | None = None


class PartialFunction(Generic[P, R, O]):
    """A function, or a class, with what its decorators said."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.is_method = False
        self.is_enter = False
        self.is_exit = False
        #: As given to `method`; None: found out.
        self.generator_flag: bool | None = None
        self.batching: Batching | None = None
        self.concurrency: Concurrency | None = None
        self.__name__ = raw.__name__
        self.__qualname__ = raw.__qualname__
        self.__module__ = raw.__module__
        self.__doc__ = raw.__doc__
        self.__wrapped__ = raw

    @property
    def is_generator(self) -> bool:
        """Whether calling it gives a generator."""
        if self.generator_flag is not None:
            return self.generator_flag
        return inspect.isgeneratorfunction(self.raw) or inspect.isasyncgenfunction(self.raw)

    @property
    def is_async(self) -> bool:
        """Whether it needs an event loop."""
        return inspect.iscoroutinefunction(self.raw) or inspect.isasyncgenfunction(self.raw)

    def __repr__(self) -> str:
        return f"<{self.__qualname__}, decorated by fanout>"

    @overload
    def __get__(self, instance: None, owner: Any) -> PartialFunction[P, R, O]: ...
    @overload
    def __get__(self, instance: object, owner: Any) -> Function[P, R, O]: ...
    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        handle = getattr(instance, "__dict__", {}).get(HANDLE)
        if handle is not None and (self.is_method or self.batching is not None):
            return getattr(handle, self.__name__)
        return self.raw.__get__(instance, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise InvalidError(
            f"{self.__qualname__} is decorated by fanout and belongs to no app yet; put "
            "`@app.function()` on top of its decorators, or `@app.cls()` on top of its class"
        )


def as_partial(thing: Any, decorator: str) -> PartialFunction[..., Any, Any]:
    """The partial function that a decorator adds to: a new one, or the one below it."""
    if isinstance(thing, PartialFunction):
        return thing
    if not inspect.isfunction(thing) and not inspect.isclass(thing):
        raise InvalidError(
            f"@fanout.{decorator} is for functions and methods, and this is a "
            f"{type(thing).__name__}; write it directly above `def`, below @app.function() or "
            "within a class"
        )
    return PartialFunction(thing)


def _forbid_bare(thing: Any, decorator: str) -> None:
    if thing is not None:
        raise InvalidError(f"write `@fanout.{decorator}()`, with parentheses")


class _MethodDecorator(Protocol):
    """What `method()` returns; the overloads tell a type checker what `.remote` gives."""

    @overload
    def __call__(
        self, f: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]
    ) -> PartialFunction[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[Any, P], AsyncGenerator[R, Any]]
    ) -> PartialFunction[P, R, AsyncGenerator[R, Any]]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[Any, P], AsyncIterator[R]]
    ) -> PartialFunction[P, R, AsyncIterator[R]]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[Any, P], Generator[R, Any, Any]]
    ) -> PartialFunction[P, R, Generator[R, Any, Any]]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[Any, P], Iterator[R]]
    ) -> PartialFunction[P, R, Iterator[R]]: ...
    @overload
    def __call__(self, f: Callable[Concatenate[Any, P], R]) -> PartialFunction[P, R, R]: ...


def method(misplaced: Any = None, *, is_generator: bool | None = None) -> _MethodDecorator:
    """Decorator: a method that runs in the containers of its class.

    Args:
        misplaced: nothing; catches `@method` without parentheses.
        is_generator: whether calling it gives a generator; found out if None.

    Raises:
        InvalidError: not above a function of a class.
    """
    _forbid_bare(misplaced, "method")

    def decorate(f: Any) -> Any:
        partial = as_partial(f, "method()")
        if partial.concurrency is not None:
            raise InvalidError(
                f"@fanout.concurrent() stands on method {partial.__qualname__!r}; it belongs on "
                "the class, below @app.cls(), as its methods share their containers"
            )
        partial.is_method = True
        partial.generator_flag = is_generator
        return partial

    return decorate


def enter(misplaced: Any = None, *, snap: bool = False) -> Callable[[F], F]:
    """Decorator: a method that each container runs once, before its first input. Of several, those
    of base classes come first, then in the order of the class body.

    Args:
        misplaced: nothing; catches `@enter` without parentheses.
        snap: for memory snapshots, which fanout does not have; runs like any other.
    """
    _forbid_bare(misplaced, "enter")

    def decorate(f: Any) -> Any:
        partial = as_partial(f, "enter()")
        partial.is_enter = True
        return partial

    return decorate


def exit(misplaced: Any = None) -> Callable[[F], F]:
    """Decorator: a method that each container runs once, after its last input."""
    _forbid_bare(misplaced, "exit")

    def decorate(f: Any) -> Any:
        partial = as_partial(f, "exit()")
        partial.is_exit = True
        return partial

    return decorate


def batched(*, max_batch_size: int, wait_ms: int) -> Callable[[Any], Any]:
    """Decorator: callers give single inputs, the function gets them in lists.

    It has one list for each parameter and returns one list of as many results. A batch begins with
    its first input and runs when it is full or `wait_ms` have passed. To type checkers the function
    is anything: its callers see other types than it does.

    Args:
        max_batch_size: from 1 to 1000.
        wait_ms: milliseconds, from 0 to 600,000.

    Raises:
        InvalidError: out of range, or on a generator, or a parameter has a default.
    """
    batching = make_batching(max_batch_size, wait_ms)

    def decorate(f: Any) -> Any:
        partial = as_partial(f, "batched(...)")
        check_batchable(partial)
        partial.batching = batching
        return partial

    return decorate


def concurrent(*, max_inputs: int, target_inputs: int | None = None) -> Callable[[F], F]:
    """Decorator: each container runs several inputs at a time: async functions as tasks of one
    event loop, others in threads. On a class, below `@app.cls()`, it holds for all its methods.

    Args:
        max_inputs: at most so many in one container, from 1 to 1000.
        target_inputs: another container is started when all have so many; `max_inputs` if None.

    Raises:
        InvalidError: out of range, or on a method.
    """
    concurrency = make_concurrency(max_inputs, target_inputs)

    def decorate(f: Any) -> Any:
        partial = as_partial(f, "concurrent(...)")
        if partial.is_method:
            raise InvalidError(
                f"@fanout.concurrent() stands on method {partial.__qualname__!r}; it belongs on "
                "the class, below @app.cls(), as its methods share their containers"
            )
        partial.concurrency = concurrency
        return partial

    return decorate


def make_batching(max_batch_size: Any, wait_ms: Any) -> Batching:
    """Checked options of `batched`.

    Raises:
        InvalidError: out of range.
    """
    _check_int("max_batch_size", max_batch_size, 1, BATCH_SIZE_MAX)
    _check_int("wait_ms", wait_ms, 0, BATCH_WAIT_MS_MAX)
    return Batching(max_batch_size, wait_ms)


def make_concurrency(max_inputs: Any, target_inputs: Any) -> Concurrency:
    """Checked options of `concurrent`.

    Raises:
        InvalidError: out of range, or the target is above the maximum.
    """
    _check_int("max_inputs", max_inputs, 1, CONCURRENT_INPUTS_MAX)
    if target_inputs is not None:
        _check_int("target_inputs", target_inputs, 1, CONCURRENT_INPUTS_MAX)
        if target_inputs > max_inputs:
            raise InvalidError(
                f"target_inputs={target_inputs} is above max_inputs={max_inputs}: a container "
                "never has more than that"
            )
    return Concurrency(max_inputs, target_inputs)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InvalidError(f"{name}={value!r}: must be an int from {low} to {high}")


def check_batchable(partial: PartialFunction[..., Any, Any], has_code: bool = True) -> None:
    """Whether a function can be batched.

    Args:
        partial: the function.
        has_code: whether it is here, and not only a handle of it, which has no parameters.

    Raises:
        InvalidError: it is a generator, or a parameter has a default or is variable.
    """
    if partial.is_generator:
        raise InvalidError(
            f"@fanout.batched() on generator {partial.__qualname__!r}: a batch gives one list"
        )
    if not has_code:
        return
    for parameter in inspect.signature(partial.raw).parameters.values():
        if parameter.default is not parameter.empty:
            raise InvalidError(
                f"@fanout.batched() on {partial.__qualname__!r}: parameter {parameter.name!r} has "
                "a default, which a list of inputs cannot leave out"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidError(
                f"@fanout.batched() on {partial.__qualname__!r}: {parameter} is variable; name "
                "the parameters, as each of them becomes a list"
            )


class Parameter:
    """What `parameter` leaves in the class body; an instance has the value under the same name."""

    def __init__(self, default: Any, is_argument: bool) -> None:
        self.default = default
        self.is_argument = is_argument
        self.name = ""

    @property
    def default_or_none(self) -> Any:
        return None if self.default is NOTHING else self.default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        if self.default is NOTHING:
            raise AttributeError(f"parameter {self.name!r} has no value yet")
        return self.default


def parameter(*, default: Any = NOTHING, init: bool = True) -> Any:
    """A parameter of a class under `app.cls`, with its type as annotation::

        size: str = fanout.parameter(default="small")

    Args:
        default: its value when none is given; without it a value must be given.
        init: whether it is an argument at all; if not it just has its default.
    """
    return Parameter(default, init)


@dataclass(slots=True)
class Lifecycle:
    """What the decorators in a class and its bases say."""

    methods: dict[str, PartialFunction[..., Any, Any]] = field(default_factory=dict)
    #: Names of the methods that run first and last, in order.
    enters: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)


def lifecycle_of(user_class: type) -> Lifecycle:
    """Read a class. What a subclass defines takes the place of what its bases do; hooks of bases
    come first."""
    found: dict[str, Any] = {}
    for base in reversed(user_class.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, PartialFunction) or name in found:
                found[name] = value
    lifecycle = Lifecycle()
    for name, value in found.items():
        if not isinstance(value, PartialFunction):
            continue
        if value.is_method or value.batching is not None:
            lifecycle.methods[name] = value
        if value.is_enter:
            lifecycle.enters.append(name)
        if value.is_exit:
            lifecycle.exits.append(name)
    return lifecycle
