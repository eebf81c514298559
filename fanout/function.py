"""A function of an app: the handle that calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar

from fanout import context
from fanout.call import FunctionCall
from fanout.exceptions import InvalidError
from fanout.function_surface import FunctionSurface
from fanout.handle import Handle
from fanout.options import Options, changes_of, check_retries, check_together
from fanout.partial import PartialFunction, check_batchable, make_batching, make_concurrency
from fanout.results import BlockingResults, Results, warn_wrapping
from fanout.service import Service, is_being_defined
from fanout.twin import Twin, twin

if TYPE_CHECKING:
    from fanout.autoscaler import Autoscaler, FunctionCurrentStats
    from fanout.client.stream import Plan
    from fanout.cls import Obj

P = ParamSpec("P")
#: What the function gives: its value, or the items of a generator.
R = TypeVar("R")
#: What calling the plain Python function returns: the value, a coroutine, a generator.
O = TypeVar("O")  # noqa: E741
#: What may be mapped over, and what `starmap` unpacks.
Inputs = Iterable[Any] | AsyncIterable[Any]
ArgumentTuples = Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]]


class Function(FunctionSurface, Generic[P, R, O]):
    """A function that runs in containers. Made by `@app.function()`; never called directly::

        f.remote(3)                 one call, its value
        f.map(range(1000))          one call, many inputs, their values as an iterator
        f.spawn(3)                  goes on without this process; a FunctionCall
        f.local(3)                  here, in this process

    Each has an asyncio twin: ``await f.remote.aio(3)``, ``async for x in f.map.aio(xs)``.
    """

    def __init__(
        self,
        service: Service,
        raw_f: Callable[P, O],
        is_generator: bool,
        owner: Obj | None = None,
        method: str = "",
    ) -> None:
        self.service = service
        self.app = service.app
        self.name = f"{service.name}.{method}" if method else service.name
        self.is_generator = is_generator
        #: Of a method: the object it is called on, and its name.
        self._owner = owner
        self._method = method
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
        generator function its generator. A method runs on an object of this process, behind its
        enter hooks.

        Raises:
            InvalidError: a sync method would have to wait for an async hook.
        """
        if self._owner is not None:
            value: O = self._owner._run_local(self._method, args, kwargs)
            return value
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
        if self._owner is not None:
            return getattr, (self._owner, self._method)
        service = self.service
        if is_being_defined(service.raw):
            # By value it refers to itself, directly or by way of another such function.
            run = self.app._current_run(f"pickling {self.name}")
            whole = (self.app.name, run.app_id, self._raw_f, service.name, service.options)
            return _function_within_itself, (*whole, service.shape)
        return _function_out_of, (Handle.of(service), self.is_generator)

    def _like(self, handle: Handle) -> Function[P, R, O] | None:
        """This function with the options of a handle; None if the handle is of other code."""
        if handle.shape != self.service.shape:
            return None
        options = handle.full_options
        return self if options.means(self.service.options) else self._of_options(options)

    # --- other options ---------------------------------------------------------------------------

    def with_options(self, **options: Any) -> Function[P, R, O]:
        """The same function with other options, in containers of its own; this one is unchanged.

        Args:
            options: those of `app.function`; None leaves one as it is.

        Raises:
            InvalidError: an option is wrong, or it is a method: use the class's `with_options`.
        """
        self._forbid_method("with_options")
        return self._of_options(self.service.options.with_changes(changes_of(self.name, options)))

    def with_concurrency(
        self, *, max_inputs: int, target_inputs: int | None = None
    ) -> Function[P, R, O]:
        """The same function, several inputs at a time in each container; see `concurrent`."""
        self._forbid_method("with_concurrency")
        concurrency = make_concurrency(max_inputs, target_inputs)
        return self._of_options(dataclasses.replace(self.service.options, concurrency=concurrency))

    def with_batching(self, *, max_batch_size: int, wait_ms: int) -> Function[P, R, O]:
        """The same function, given lists of inputs; see `batched`."""
        self._forbid_method("with_batching")
        partial = PartialFunction[..., Any, Any](self._raw_f)
        partial.generator_flag = self.is_generator
        check_batchable(partial, self.service.has_code)
        batching = make_batching(max_batch_size, wait_ms)
        return self._of_options(dataclasses.replace(self.service.options, batching=batching))

    def _of_options(self, options: Options) -> Function[P, R, O]:
        check_together(options)
        check_retries(options, self.name, self.service.shape)
        return type(self)(self.service.with_options(options), self._raw_f, self.is_generator)

    @property
    def autoscaler(self) -> Autoscaler:
        """How its containers are scaled: look, and change."""
        from fanout.autoscaler import Autoscaler

        self._forbid_method("autoscaler")
        return Autoscaler(self.service)

    async def _update_autoscaler(
        self,
        *,
        min_containers: int | None = None,
        max_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
    ) -> None:
        """Older form of ``autoscaler.update(...)``, with its arguments and errors."""
        await self.autoscaler.update.aio(
            min_containers=min_containers,
            max_containers=max_containers,
            buffer_containers=buffer_containers,
            scaledown_window=scaledown_window,
        )

    async def _get_current_stats(self) -> FunctionCurrentStats:
        """How many inputs wait and run, and how many containers there are.

        Raises:
            ExecutionError: no app is running.
        """
        from fanout.autoscaler import current_stats

        return await current_stats(self.service)

    update_autoscaler = twin(_update_autoscaler)
    get_current_stats = twin(_get_current_stats)

    def _forbid_method(self, what: str) -> None:
        if self._method:
            name = self.service.name
            instead = f"{name}.{what}(...)" if "with" in what else f"{name}(...).{what}"
            raise InvalidError(
                f"{self.name} is a method, and the containers are those of its class; use "
                f"`{instead}`"
            )

    # --- one input -------------------------------------------------------------------------------

    def _remote(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one input in a container and wait for its value.

        Raises:
            InvalidError: a generator function, or called inside a running event loop.
            ExecutionError: no app is running.
            SerializationError: an argument cannot be pickled.
            BaseException: what the function raised, as its own type.
        """
        from fanout.client.loop import forbid_in_loop
        from fanout.client.stream import call_blocking

        self._forbid_generator("remote", "remote_gen")
        forbid_in_loop(f"{self.name}.remote", f"await {self.name}.remote.aio(...)")
        value: R = call_blocking(self._plan("remote"), args, kwargs)
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
        from fanout.client.loop import forbid_in_loop
        from fanout.client.stream import call_blocking

        self._forbid_generator("spawn", "remote_gen")
        forbid_in_loop(f"{self.name}.spawn", f"await {self.name}.spawn.aio(...)")
        plan = self._plan("spawn", is_durable=True)
        call_blocking(plan, args, kwargs)
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
        from fanout.client.stream import Plan

        run = self.app._current_run(f"{self.name}.{method}")
        definition, sources = self.service.defined(run)
        running = context.current_input.get() if context.container is not None else None
        return Plan(
            run,
            definition,
            sources,
            is_generator=self.is_generator,
            is_ordered=is_ordered,
            is_durable=is_durable,
            method=self._method,
            parent=None if running is None else (running.lease_id, running.index),
        )

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


def _function_within_itself(
    app_name: str | None,
    app_id: bytes,
    raw_f: Callable[..., Any],
    name: str,
    options: Options,
    shape: dict[str, Any],
) -> Function[..., Any, Any]:
    """A handle out of the definition of a function by value that refers to it."""
    from fanout.app import App

    service = Service(App._joined(app_name, app_id), raw_f, name, options, shape)
    service.came_whole = True
    return Function(service, raw_f, bool(shape["is_generator"]))


def _function_out_of(handle: Handle, is_generator: bool) -> Function[..., Any, Any]:
    """A handle out of a pickle: the one of this process if its module is loaded here, else one
    that can do everything but run locally."""
    found = handle.find_here(Function)
    if found is not None:
        return found
    service = handle.service()
    return Function(service, service.raw, is_generator)
