"""A function of an app: the handle that calls it."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar

from fanout.call import FunctionCall
from fanout.exceptions import ExecutionError, InvalidError
from fanout.function_surface import FunctionSurface
from fanout.results import BlockingResults, Results, warn_wrapping
from fanout.retries import Retries
from fanout.twin import Twin

if TYPE_CHECKING:
    from fanout.app import App
    from fanout.client.stream import Plan
    from fanout.protocol import messages as m

P = ParamSpec("P")
#: What the function gives: its value, or the items of a generator.
R = TypeVar("R")
#: What calling the plain Python function returns: the value, a coroutine, a generator.
O = TypeVar("O")  # noqa: E741
#: What may be mapped over, and what `starmap` unpacks.
Inputs = Iterable[Any] | AsyncIterable[Any]
ArgumentTuples = Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a function; times in seconds, memory in MiB, cpu in cores."""

    timeout: float
    retries: Retries | None
    max_containers: int | None
    cpu: float | None
    memory: int
    scaledown_window: float
    is_serialized: bool

    def as_data(self, is_generator: bool, is_async: bool) -> dict[str, Any]:
        """As `DefineFunction.options` has them."""
        return {
            "timeout": self.timeout,
            "retries": None if self.retries is None else self.retries.as_data(),
            "max_containers": self.max_containers,
            "cpu": self.cpu,
            "memory": self.memory,
            "scaledown_window": self.scaledown_window,
            "is_generator": is_generator,
            "is_async": is_async,
        }


#: Functions whose definitions are being made, the outermost first.
_being_defined: ContextVar[tuple[Any, ...]] = ContextVar("being_defined", default=())


class Function(FunctionSurface, Generic[P, R, O]):
    """A function that runs in containers. Made by `@app.function()`; never called directly::

        f.remote(3)                 one call, its value
        f.map(range(1000))          one call, many inputs, their values as an iterator
        f.spawn(3)                  goes on without this process; a FunctionCall
        f.local(3)                  here, in this process

    Each has an asyncio twin: ``await f.remote.aio(3)``, ``async for x in f.map.aio(xs)``.
    """

    #: Its options, if it came here within the definition of a function by value; see
    #: `_rebuild_whole`.
    _own_options: Options | None = None

    def __init__(
        self,
        app: App,
        raw_f: Callable[P, O],
        name: str,
        options: Options,
        is_generator: bool,
    ) -> None:
        self.app = app
        self.name = name
        self.options = options
        self.is_generator = is_generator
        self.is_async = inspect.iscoroutinefunction(raw_f) or inspect.isasyncgenfunction(raw_f)
        self._raw_f = raw_f
        self.__name__ = raw_f.__name__
        self.__qualname__ = raw_f.__qualname__
        self.__module__ = raw_f.__module__
        self.__doc__ = raw_f.__doc__
        self.__wrapped__ = raw_f

    def __repr__(self) -> str:
        return f"<fanout.Function {self.name!r} of app {self.app.name!r}>"

    def get_raw_f(self) -> Callable[P, O]:
        """The plain Python function."""
        return self._raw_f

    def local(self, *args: P.args, **kwargs: P.kwargs) -> O:
        """Run the plain function here, in this process: an async function gives its coroutine, a
        generator function its generator."""
        return self._raw_f(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InvalidError(
            f"{self.name} is a fanout function and does not run by being called; write "
            f"`{self.name}.remote(...)` to run it in a container, `{self.name}.map(...)` for many "
            f"inputs, or `{self.name}.local(...)` to run it here"
        )

    def __iter__(self) -> NoReturn:
        raise InvalidError(
            f"{self.name} is a function and cannot be iterated over; write "
            f"`for x in {self.name}.map(...)`"
            + (f" or `{self.name}.remote_gen(...)`" if self.is_generator else "")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        run = self.app._current_run(f"pickling {self.name}")
        if self in _being_defined.get():
            # By value it refers to itself, directly or by way of another such function.
            whole = (self.app.name, run.app_id, self._raw_f, self.name, self.options)
            return _rebuild_whole, (*whole, self.is_generator)
        definition, _ = self._defined(run)
        fields = (definition.name, definition.options, bytes(definition.payload))
        return _rebuild, (self.app.name, run.app_id, definition.function_id, *fields)

    # --- one input -------------------------------------------------------------------------------

    def _remote(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one input in a container and wait for its value.

        Raises:
            InvalidError: a generator function, or called inside a running event loop.
            ExecutionError: no app is running.
            SerializationError: an argument cannot be pickled.
            BaseException: what the function raised, as its own type.
        """
        from fanout.client.inputs import encode_one
        from fanout.client.loop import forbid_in_loop
        from fanout.client.stream import BlockingCall

        self._forbid_generator("remote", "remote_gen")
        forbid_in_loop(f"{self.name}.remote", f"await {self.name}.remote.aio(...)")
        plan = self._plan("remote")
        value: R = BlockingCall(plan, encode_one(args, kwargs)).result()
        return value

    async def _remote_aio(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        from fanout.client.async_stream import call_async
        from fanout.client.inputs import encode_one

        self._forbid_generator("remote", "remote_gen")
        plan = self._plan("remote")
        value: R = await call_async(plan, encode_one(args, kwargs))
        return value

    def _remote_gen(self, /, *args: P.args, **kwargs: P.kwargs) -> BlockingResults[R]:
        """Run a generator function in a container; its items come as they are made.

        Raises:
            InvalidError: not a generator function; on iterating, inside a running event loop.
            ExecutionError: no app is running.
            SerializationError: an argument cannot be pickled.
        """
        from fanout.client.async_stream import AsyncResults
        from fanout.client.inputs import encode_one
        from fanout.client.stream import iterate_one

        self._forbid_plain()
        plan, encoded, name = self._plan("remote_gen"), encode_one(args, kwargs), self.name
        return BlockingResults(
            f"{name}.remote_gen",
            lambda: iterate_one(plan, encoded),
            lambda: AsyncResults(f"{name}.remote_gen", lambda: plan, None, {}, False, encoded),
        )

    def _remote_gen_aio(self, /, *args: P.args, **kwargs: P.kwargs) -> Results[R]:
        from fanout.client.async_stream import AsyncResults
        from fanout.client.inputs import encode_one

        self._forbid_plain()
        plan = self._plan("remote_gen")
        name = f"{self.name}.remote_gen.aio"
        return AsyncResults(name, lambda: plan, None, {}, False, encode_one(args, kwargs))

    def _spawn(self, /, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]:
        """Start one input and return as soon as the scheduler has stored it. It runs whether or
        not this process goes on; the handle gives its result.

        Raises:
            InvalidError: a generator function, or called inside a running event loop.
            ExecutionError: no app is running.
            StorageError: the scheduler's disk is full.
        """
        from fanout.client.inputs import encode_one
        from fanout.client.loop import forbid_in_loop
        from fanout.client.stream import BlockingCall

        self._forbid_generator("spawn", "remote_gen")
        forbid_in_loop(f"{self.name}.spawn", f"await {self.name}.spawn.aio(...)")
        plan = self._plan("spawn", is_durable=True)
        BlockingCall(plan, encode_one(args, kwargs)).result()
        return FunctionCall(plan.call_id)

    async def _spawn_aio(self, /, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]:
        from fanout.client.async_stream import call_async
        from fanout.client.inputs import encode_one

        self._forbid_generator("spawn", "remote_gen")
        plan = self._plan("spawn", is_durable=True)
        await call_async(plan, encode_one(args, kwargs))
        return FunctionCall(plan.call_id)

    # --- many inputs -----------------------------------------------------------------------------

    def _map(
        self,
        *input_iterators: Inputs,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool | None = None,
    ) -> BlockingResults[R]:
        """Run the function on many inputs; an iterator over their values, which begins when it is
        asked for the first one. Inside a running event loop, iterate with ``async for``.

        The iterators are zipped (the shortest ends it) and pulled lazily, as results are taken.
        Of a generator function the items of all inputs come, one generator after the other.

        Args:
            input_iterators: one for each argument; iterables or async iterables.
            kwargs: keyword arguments that every input gets.
            order_outputs: in the order of the inputs; else as they come.
            return_exceptions: errors take the place of values; else the first one is raised, in
                the order of outputs, after the values before it.
            wrap_returned_exceptions: accepted for scripts of Modal; does nothing.

        Raises:
            InvalidError: no iterator, something not iterable; on iterating, inside a running event
                loop.
            ExecutionError: no app is running.
        """
        warn_wrapping(wrap_returned_exceptions)
        return self._iterate(
            "map", input_iterators, kwargs, order_outputs, return_exceptions, False
        )

    def _map_aio(
        self,
        *input_iterators: Inputs,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool | None = None,
    ) -> Results[R]:
        warn_wrapping(wrap_returned_exceptions)
        return self._iterate_aio(
            "map", input_iterators, kwargs, order_outputs, return_exceptions, False
        )

    def _starmap(
        self,
        input_iterator: ArgumentTuples,
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool | None = None,
    ) -> BlockingResults[R]:
        """As `map`, over an iterator of argument tuples."""
        warn_wrapping(wrap_returned_exceptions)
        return self._iterate(
            "starmap", (input_iterator,), kwargs, order_outputs, return_exceptions, True
        )

    def _starmap_aio(
        self,
        input_iterator: ArgumentTuples,
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool | None = None,
    ) -> Results[R]:
        warn_wrapping(wrap_returned_exceptions)
        return self._iterate_aio(
            "starmap", (input_iterator,), kwargs, order_outputs, return_exceptions, True
        )

    def _for_each(
        self,
        *input_iterators: Inputs,
        kwargs: dict[str, Any] | None = None,
        ignore_exceptions: bool = False,
    ) -> None:
        """Run the function on many inputs for its effects alone.

        Raises:
            BaseException: the first error that arrives, unless `ignore_exceptions`.
        """
        from fanout.client.stream import run_to_end

        make, rows = self._prepare("for_each", input_iterators, False, is_ordered=False)
        run_to_end(make, rows, kwargs or {}, ignore_exceptions)

    async def _for_each_aio(
        self,
        *input_iterators: Inputs,
        kwargs: dict[str, Any] | None = None,
        ignore_exceptions: bool = False,
    ) -> None:
        from fanout.client.async_stream import run_to_end_async

        make, rows = self._prepare(
            "for_each", input_iterators, False, is_ordered=False, is_blocking=False
        )
        await run_to_end_async(make, rows, kwargs or {}, ignore_exceptions)

    def _spawn_map(
        self, *input_iterators: Inputs, kwargs: dict[str, Any] | None = None
    ) -> FunctionCall[R]:
        """Start many inputs as one call that goes on without this process; returns when the
        scheduler has stored them all.

        Raises:
            InvalidError: a generator function, no iterator, or inside a running event loop.
            ExecutionError: no app is running.
            StorageError: the scheduler's disk is full.
        """
        from fanout.client.stream import run_to_end

        self._forbid_generator("spawn_map", "map")
        make, rows = self._prepare("spawn_map", input_iterators, False, is_durable=True)
        return FunctionCall(run_to_end(make, rows, kwargs or {}, False))

    async def _spawn_map_aio(
        self, *input_iterators: Inputs, kwargs: dict[str, Any] | None = None
    ) -> FunctionCall[R]:
        from fanout.client.async_stream import run_to_end_async

        self._forbid_generator("spawn_map", "map")
        make, rows = self._prepare(
            "spawn_map", input_iterators, False, is_durable=True, is_blocking=False
        )
        return FunctionCall(await run_to_end_async(make, rows, kwargs or {}, False))

    remote = Twin(_remote, _remote_aio)
    remote_gen = Twin(_remote_gen, _remote_gen_aio)
    spawn = Twin(_spawn, _spawn_aio)
    map = Twin(_map, _map_aio)
    starmap = Twin(_starmap, _starmap_aio)
    for_each = Twin(_for_each, _for_each_aio)
    spawn_map = Twin(_spawn_map, _spawn_map_aio)
    #: Modal's name of what `spawn_map` does here.
    experimental_spawn_map = spawn_map

    # --- behind them -----------------------------------------------------------------------------

    def _iterate(
        self,
        method: str,
        iterables: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        is_ordered: bool,
        return_exceptions: bool,
        is_star: bool,
    ) -> BlockingResults[R]:
        from fanout.client.stream import iterate

        make, rows = self._prepare(
            method, iterables, is_star, is_ordered=is_ordered, is_blocking=False
        )
        common = kwargs or {}

        def begin_async() -> Results[R]:
            from fanout.client.async_stream import AsyncResults

            return AsyncResults(rows.method, make, rows, common, return_exceptions)

        return BlockingResults(
            rows.method, lambda: iterate(make, rows, common, return_exceptions), begin_async
        )

    def _iterate_aio(
        self,
        method: str,
        iterables: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        is_ordered: bool,
        return_exceptions: bool,
        is_star: bool,
    ) -> Results[R]:
        from fanout.client.async_stream import AsyncResults

        make, rows = self._prepare(
            method, iterables, is_star, is_ordered=is_ordered, is_blocking=False
        )
        return AsyncResults(f"{rows.method}.aio", make, rows, kwargs or {}, return_exceptions)

    def _prepare(
        self,
        method: str,
        iterables: tuple[Any, ...],
        is_star: bool,
        *,
        is_ordered: bool = True,
        is_durable: bool = False,
        is_blocking: bool = True,
    ) -> tuple[Callable[[], Plan], Any]:
        """Check what can be checked now; the plan itself is made when the call begins."""
        from fanout.client.inputs import Rows
        from fanout.client.loop import forbid_in_loop

        name = f"{self.name}.{method}"
        if is_blocking:
            forbid_in_loop(name, f"await {name}.aio(...)")
        rows = Rows(name, iterables, is_star)
        self.app._current_run(name)
        return lambda: self._plan(method, is_ordered=is_ordered, is_durable=is_durable), rows

    def _plan(self, method: str, *, is_ordered: bool = True, is_durable: bool = False) -> Plan:
        from fanout import context
        from fanout.client.stream import Plan

        run = self.app._current_run(f"{self.name}.{method}")
        definition, sources = self._defined(run)
        running = context.current_input.get() if context.container is not None else None
        return Plan(
            run,
            definition,
            sources,
            is_generator=self.is_generator,
            is_ordered=is_ordered,
            is_durable=is_durable,
            parent=None if running is None else (running.lease_id, running.index),
        )

    def _defined(self, run: Any) -> tuple[m.DefineFunction, bytes | None]:
        """The definition for this run of the app, made when the function is first used in it."""
        made: tuple[m.DefineFunction, bytes | None] | None = run.definitions.get(self)
        if made is None:
            token = _being_defined.set((*_being_defined.get(), self))
            try:
                made = run.definitions[self] = self._define(run)
            finally:
                _being_defined.reset(token)
        return made

    def _define(self, run: Any) -> tuple[m.DefineFunction, bytes | None]:
        from fanout import context, source
        from fanout.definition import Definition, pack_definition, unpack_definition
        from fanout.protocol import messages as m

        code = run.definitions.get("code")
        if code is None:
            code = run.definitions["code"] = source.capture(source.is_remote_scheduler())
        own = context.container if self._own_options is self.options else None
        if own is not None and own.function is not self._raw_f:
            own = None
        if own is not None:
            # The function that this container runs. The scheduler knows it by this definition.
            payload = own.definition
            target = unpack_definition(payload).target
        else:
            target = source.make_target(self._raw_f, self.options.is_serialized)
            extra = source.describe_main(target)
            payload = pack_definition(
                Definition(code.environment, target, self.app.name or "", self.name, extra)
            )
        options = self.options.as_data(self.is_generator, self.is_async)
        options["module"] = target.module
        options["environment"] = code.environment.fingerprint()
        options["python"] = f"{sys.executable} ({code.environment.python_version})"
        digest = hashlib.sha256()
        for part in (run.app_id, self.name.encode(), repr(sorted(options.items())).encode()):
            digest.update(len(part).to_bytes(4, "little") + part)
        digest.update(payload)
        sources = code.environment.sources
        blobs = [bytes.fromhex(sources)] if sources else []
        function_id = digest.digest()[:16] if own is None else own.function_id
        define = m.DefineFunction(function_id, run.app_id, self.name, options, blobs, payload)
        return define, code.archive

    def _forbid_generator(self, method: str, instead: str) -> None:
        if self.is_generator:
            raise InvalidError(
                f"{self.name} is a generator function; write `{self.name}.{instead}(...)` instead "
                f"of `.{method}(...)`"
            )

    def _forbid_plain(self) -> None:
        if not self.is_generator:
            raise InvalidError(
                f"{self.name} is not a generator function; write `{self.name}.remote(...)` instead "
                "of `.remote_gen(...)`"
            )


def _rebuild_whole(
    app_name: str | None,
    app_id: bytes,
    raw_f: Callable[..., Any],
    name: str,
    options: Options,
    is_generator: bool,
) -> Function[..., Any, Any]:
    """A handle out of the definition of a function by value that refers to it."""
    from fanout.app import App

    function: Function[..., Any, Any] = Function(
        App._joined(app_name, app_id), raw_f, name, options, is_generator
    )
    function._own_options = options
    return function


def _rebuild(
    app_name: str | None,
    app_id: bytes,
    function_id: bytes,
    name: str,
    options: dict[str, Any],
    payload: bytes,
) -> Function[..., Any, Any]:
    """A handle out of a pickle: the one of this process if its module is loaded here, else one
    that can do everything but run locally."""
    from fanout.app import App
    from fanout.definition import unpack_definition
    from fanout.protocol import messages as m

    definition = unpack_definition(payload)
    target = definition.target
    found: Any = sys.modules.get(target.module)
    for part in target.qualname.split("."):
        found = getattr(found, part, None)
    if isinstance(found, Function) and not target.pickled:
        return found

    def run_locally(*args: Any, **kwargs: Any) -> NoReturn:
        raise ExecutionError(
            f"{name} came here as a handle and cannot run locally: module {target.module!r}, "
            "which defines it, is not loaded"
        )

    run_locally.__name__ = run_locally.__qualname__ = target.qualname.rpartition(".")[2]
    run_locally.__module__ = target.module
    retries = options["retries"]
    function: Function[..., Any, Any] = Function(
        App._joined(app_name, app_id),
        run_locally,
        name,
        Options(
            options["timeout"],
            None if retries is None else Retries(retries[0], retries[2], retries[1], retries[3]),
            options["max_containers"],
            options["cpu"],
            options["memory"],
            options["scaledown_window"],
            bool(target.pickled),
        ),
        options["is_generator"],
    )
    function.is_async = options["is_async"]
    sources = definition.environment.sources
    blobs = [bytes.fromhex(sources)] if sources else []
    define = m.DefineFunction(function_id, app_id, name, options, blobs, payload)
    run = function.app._current_run(name)
    run.definitions[function] = (define, None)
    return function


AnyFunction = Function[..., Any, Any]
AsyncBody = Callable[P, Coroutine[Any, Any, R]]
