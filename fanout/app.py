"""An app: a named set of functions, and the running of it."""

from __future__ import annotations

import inspect
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
)
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    dataclass_transform,
    overload,
)

from fanout import config, context
from fanout.app_surface import AppSurface
from fanout.exceptions import ExecutionError, InvalidError
from fanout.function import Function
from fanout.options import Options, check_options, check_retries, named
from fanout.partial import PartialFunction, lifecycle_of, parameter
from fanout.retries import Retries
from fanout.service import Service

if TYPE_CHECKING:
    from fanout.client.app_run import AppRun
    from fanout.client.session import Session
    from fanout.cls import Cls

P = ParamSpec("P")
R = TypeVar("R")
O = TypeVar("O")  # noqa: E741
#: What a generator is sent, and what it returns.
S = TypeVar("S")
T = TypeVar("T")
C = TypeVar("C", bound=type)


class _FunctionDecorator(Protocol):
    """What `app.function(...)` returns. The overloads tell a type checker what `.remote` gives."""

    @overload
    def __call__(
        self, f: Callable[P, Coroutine[Any, Any, R]]
    ) -> Function[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self, f: Callable[P, AsyncGenerator[R, S]]
    ) -> Function[P, R, AsyncGenerator[R, S]]: ...
    @overload
    def __call__(self, f: Callable[P, AsyncIterator[R]]) -> Function[P, R, AsyncIterator[R]]: ...
    @overload
    def __call__(
        self, f: Callable[P, Generator[R, S, T]]
    ) -> Function[P, R, Generator[R, S, T]]: ...
    @overload
    def __call__(self, f: Callable[P, Iterator[R]]) -> Function[P, R, Iterator[R]]: ...
    @overload
    def __call__(self, f: Callable[P, R]) -> Function[P, R, R]: ...


class LocalEntrypoint(Generic[P, R]):
    """A function of the script that `fanout run` starts, in the client and inside `app.run()`."""

    def __init__(self, raw_f: Callable[P, R], name: str) -> None:
        self.raw_f = raw_f
        self.name = name
        self.__name__ = raw_f.__name__
        self.__module__ = raw_f.__module__
        self.__doc__ = raw_f.__doc__
        self.__wrapped__ = raw_f

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.raw_f(*args, **kwargs)

    def get_raw_f(self) -> Callable[P, R]:
        """The plain Python function."""
        return self.raw_f

    def __repr__(self) -> str:
        return f"<fanout.LocalEntrypoint {self.name!r}>"


class App(AppSurface):
    """A named set of functions::

        app = fanout.App("reviews")

        @app.function()
        def classify(text: str) -> str: ...

        with app.run():
            print(classify.remote("fine"))

    Args:
        name: for people, in status and logs.
        tags: texts by name, for `get_tags`.
        image, secrets, volumes, include_source: as in Modal, for its scripts; an error where they
            ask for something, since fanout has none of these yet.

    Raises:
        InvalidError: one of these is wrong.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        image: Any = None,
        secrets: Any = (),
        volumes: Any = None,
        include_source: bool | None = None,
    ) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidError(
                f"App(name={name!r}): must be a text that is not empty, or None; decorate with "
                '`@app.function()` of an instance `app = fanout.App("name")`'
            )
        super().__init__(tags)
        cloud = (image, secrets, volumes, include_source)
        if cloud != (None, (), None, None):
            from fanout.compat import reject_cloud_options

            names = ("image", "secrets", "volumes", "include_source")
            reject_cloud_options("App", dict(zip(names, cloud, strict=True)))
        self._name = name
        self._run: AppRun | None = None
        self.registered_functions: dict[str, Function[..., Any, Any]] = {}
        self.registered_classes: dict[str, Cls] = {}
        self.registered_entrypoints: dict[str, LocalEntrypoint[..., Any]] = {}

    @property
    def name(self) -> str | None:
        """The name it was made with."""
        return self._name

    @property
    def app_id(self) -> str | None:
        """Hexadecimal id of the run under way; None while it does not run."""
        return None if self._run is None else self._run.app_id.hex()

    def __repr__(self) -> str:
        return f"<fanout.App {self._name!r}{'' if self._run is None else ', running'}>"

    def function(
        self,
        misplaced: Any = None,
        *,
        name: str | None = None,
        is_generator: bool | None = None,
        timeout: float = config.TIMEOUT_S,
        startup_timeout: float | None = None,
        retries: int | Retries | None = None,
        max_containers: int | None = None,
        min_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
        single_use_containers: bool = False,
        cpu: float | tuple[float, float] | None = None,
        memory: int | tuple[int, int] | None = None,
        env: Mapping[str, str | None] | None = None,
        serialized: bool = False,
        **others: Any,
    ) -> _FunctionDecorator:
        """Decorator: the function becomes a `Function`, which runs in containers.

        Args:
            misplaced: nothing; catches `@app.function` without parentheses.
            name: instead of the function's own.
            is_generator: whether calling it gives a generator; found out if None.
            timeout: seconds an attempt may run; at most a day.
            startup_timeout: seconds in which its module must be loaded; as `timeout` if None.
            retries: attempts after the first one failed, with a delay of 1 s, or a `Retries`.
            max_containers: how many containers of it may live at a time, over all workers.
            min_containers: how many are kept also when idle, while the app runs.
            buffer_containers: how many idle ones are kept ready beside those that work.
            scaledown_window: seconds an idle container is kept.
            single_use_containers: each input gets a container of its own.
            cpu: cores that a container of it holds while it works; None means 1. Of a pair
                (request, limit) the first counts.
            memory: MiB that a container of it holds; a pair as for `cpu`.
            env: environment variables that its containers have beside the others.
            serialized: send the function by value: closures, lambdas, dynamically made ones.
            others: older names (`concurrency_limit`, `keep_warm`, `container_idle_timeout`), and
                options of Modal that need its cloud, which are refused with what to do instead.

        Raises:
            InvalidError: an option is wrong, or the function cannot be found by name.
        """
        if misplaced is not None:
            raise InvalidError("write `@app.function()`, with parentheses")
        options = check_options(
            named(
                "@app.function()",
                timeout=timeout,
                startup_timeout=startup_timeout,
                retries=retries,
                max_containers=max_containers,
                min_containers=min_containers,
                buffer_containers=buffer_containers,
                scaledown_window=scaledown_window,
                single_use_containers=single_use_containers,
                cpu=cpu,
                memory=memory,
                env=env,
                serialized=serialized,
                **others,
            )
        )

        def decorate(f: Any) -> Any:
            return self._add(f, name, options, is_generator)

        return decorate

    @dataclass_transform(kw_only_default=True, field_specifiers=(parameter,))
    def cls(
        self,
        misplaced: Any = None,
        *,
        timeout: float = config.TIMEOUT_S,
        startup_timeout: float | None = None,
        retries: int | Retries | None = None,
        max_containers: int | None = None,
        min_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
        single_use_containers: bool = False,
        cpu: float | tuple[float, float] | None = None,
        memory: int | tuple[int, int] | None = None,
        env: Mapping[str, str | None] | None = None,
        serialized: bool = False,
        **others: Any,
    ) -> Callable[[C | PartialFunction[..., Any, Any]], C]:
        """Decorator: the methods of the class run in containers, which keep an instance of it; see
        `fanout.cls`. To type checkers it is still the class, its methods have `.remote` and so on.

        Args: as of `function`.

        Raises:
            InvalidError: an option is wrong, or the class is not one that a container could make.
        """
        if misplaced is not None:
            raise InvalidError("write `@app.cls()`, with parentheses")
        options = check_options(
            named(
                "@app.cls()",
                timeout=timeout,
                startup_timeout=startup_timeout,
                retries=retries,
                max_containers=max_containers,
                min_containers=min_containers,
                buffer_containers=buffer_containers,
                scaledown_window=scaledown_window,
                single_use_containers=single_use_containers,
                cpu=cpu,
                memory=memory,
                env=env,
                serialized=serialized,
                **others,
            )
        )

        def decorate(user_class: Any) -> Any:
            return self._add_class(user_class, options)

        return decorate

    def generator(self, misplaced: Any = None, **options: Any) -> _FunctionDecorator:
        """As `function`, for generator functions; older spelling of `is_generator=True`."""
        if misplaced is not None:
            raise InvalidError("write `@app.generator()`, with parentheses")
        return self.function(is_generator=True, **options)

    def local_entrypoint(
        self, misplaced: Any = None, *, name: str | None = None
    ) -> Callable[[Callable[P, R]], LocalEntrypoint[P, R]]:
        """Decorator: what `fanout run script.py` starts, with flags from its parameters.

        Args:
            misplaced: nothing; catches `@app.local_entrypoint` without parentheses.
            name: instead of the function's own.

        Raises:
            InvalidError: there is one of that name already.
        """
        if misplaced is not None:
            raise InvalidError("write `@app.local_entrypoint()`, with parentheses")

        def decorate(f: Callable[P, R]) -> LocalEntrypoint[P, R]:
            _check_decorated("local_entrypoint", f)
            entrypoint = LocalEntrypoint(f, name or f.__name__)
            if entrypoint.name in self.registered_entrypoints:
                raise InvalidError(
                    f"app {self._name!r} has a local entrypoint {entrypoint.name!r} already; give "
                    "one of them another name"
                )
            self.registered_entrypoints[entrypoint.name] = entrypoint
            return entrypoint

        return decorate

    def run(
        self,
        *,
        name: str | None = None,
        client: Any = None,
        detach: bool = False,
        interactive: bool = False,
        environment_name: str | None = None,
    ) -> RunningApp:
        """A context manager, for ``with`` and ``async with``: the app runs while the block lasts.
        At its end calls that are still open are cancelled; spawned calls go on.

        Args:
            name: of this run, in status and logs, instead of the app's own.
            client, environment_name: as in Modal; ignored with a warning.
            detach, interactive: as in Modal; True is an error that says what to do instead.

        Raises:
            InvalidError: in a container; or on entering, when it runs already.
            ConnectionError: on entering, when no scheduler can be reached.
        """
        if context.container is not None:
            raise InvalidError(
                "app.run() was reached inside a container, while your script was imported there; "
                'put it under `if __name__ == "__main__":`, or into a local entrypoint'
            )
        if detach or interactive or client is not None or environment_name is not None:
            from fanout.compat import reject_cloud_options

            names = ("client", "detach", "interactive", "environment_name")
            values = (client, detach, interactive, environment_name)
            reject_cloud_options("app.run", dict(zip(names, values, strict=True)))
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidError(f"app.run(name={name!r}): must be a text that is not empty, or None")
        return RunningApp(self, name)

    def _add(
        self, f: Any, name: str | None, options: Options, is_generator: bool | None
    ) -> Function[..., Any, Any]:
        from fanout import source

        raw = f
        if isinstance(f, PartialFunction):
            raw = f.raw
            is_generator = f.generator_flag if is_generator is None else is_generator
            options = options.with_partial(f)
        _check_decorated("function", raw)
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidError(f"name={name!r}: must be a text that is not empty")
        if is_generator is None:
            is_generator = inspect.isgeneratorfunction(raw) or inspect.isasyncgenfunction(raw)
        is_async = inspect.iscoroutinefunction(raw) or inspect.isasyncgenfunction(raw)
        shape = {"is_generator": bool(is_generator), "is_async": is_async}
        check_retries(options, raw.__qualname__, shape)
        source.is_by_value(raw, options.is_serialized)
        service = Service(self, raw, name or raw.__name__, options, shape)
        function: Function[..., Any, Any] = Function(service, raw, bool(is_generator))
        self.registered_functions[function.name] = function
        return function

    def _add_class(self, decorated: Any, options: Options) -> Cls:
        from fanout import source
        from fanout.cls import Cls

        user_class = decorated
        if isinstance(decorated, PartialFunction):
            user_class = decorated.raw
            options = options.with_partial(decorated)
        if not inspect.isclass(user_class):
            raise InvalidError(
                f"@app.cls() is for classes, and this is a {type(user_class).__name__}; for a "
                "function write `@app.function()`"
            )
        for partial in lifecycle_of(user_class).methods.values():
            if partial.batching is not None:
                options = options.with_partial(partial)
        source.is_by_value(user_class, options.is_serialized)
        made = Cls(self, user_class, user_class.__name__, options).check()
        self.registered_classes[made.__name__] = made
        return made

    def _current_run(self, what: str) -> AppRun:
        """The run that calls belong to.

        Raises:
            ExecutionError: the app does not run.
        """
        if self._run is not None:
            return self._run
        if (run := self._including_run()) is not None:
            return run
        if context.container is not None:
            from fanout.client.app_run import AppRun

            self._run = AppRun(context.container.app_name, context.container.app_id)
            return self._run
        raise ExecutionError(
            f"{what}: app {self._name!r} is not running; put the call inside `with app.run():` "
            "(or `async with`), or start the script with `fanout run`"
        )

    def _define_kept(self, run: AppRun, session: Session) -> None:
        """Tell the scheduler at once of what keeps containers although nobody calls it yet."""
        services: list[Service | None] = []
        for app in self._running_with():
            services += [function.service for function in app.registered_functions.values()]
            services += [c.default_service for c in app.registered_classes.values()]
        for service in dict.fromkeys(services):
            if service is not None and service.options.min_containers:
                session.define(*service.defined(run))

    @staticmethod
    def _joined(name: str | None, app_id: bytes) -> App:
        """An app of which only a handle came here, as running as it is over there."""
        from fanout.client.app_run import AppRun

        app = App(name)
        app._run = AppRun(name or "", app_id)
        return app


#: Older name of `App`.
Stub = App


class RunningApp:
    """What `app.run()` gives; see there."""

    def __init__(self, app: App, name: str | None) -> None:
        self._app = app
        self._name = name

    def __enter__(self) -> App:
        from fanout.client import loop
        from fanout.client.sessions import session_here

        loop.forbid_in_loop("with app.run()", "async with app.run():")
        run = self._begin()

        async def enter() -> None:
            session = session_here()
            await session.open_app(run)
            self._app._define_kept(run, session)

        try:
            loop.run(enter)
        except BaseException:
            self._app._run = None
            raise
        return self._app

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from fanout.client import loop

        loop.run(self._leave)

    async def __aenter__(self) -> App:
        from fanout.client.sessions import session_here

        run = self._begin()
        try:
            session = session_here()
            await session.open_app(run)
            self._app._define_kept(run, session)
        except BaseException:
            self._app._run = None
            raise
        return self._app

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._leave()

    def _begin(self) -> AppRun:
        from fanout import source
        from fanout.client.app_run import AppRun

        if self._app._run is not None:
            raise InvalidError(
                f"app {self._app.name!r} is running already; leave its `with app.run():` first"
            )
        source.alias_main()
        run = self._app._run = AppRun(
            self._name or self._app.name or source.main_name() or "", os.urandom(16)
        )
        return run

    async def _leave(self) -> None:
        run, self._app._run = self._app._run, None
        if run is not None and run.owner is not None:
            await run.owner.close_app(run)


# --- checks ---------------------------------------------------------------------------------------


def _check_decorated(decorator: str, f: Any) -> None:
    if isinstance(f, Function | LocalEntrypoint):
        raise InvalidError(
            f"@app.{decorator}() stands on top of another fanout decorator; use one of them"
        )
    if inspect.isclass(f):
        raise InvalidError(
            f"@app.{decorator}() is for functions, and {f.__name__!r} is a class; write "
            "`@app.cls()` above it"
        )
    if not inspect.isfunction(f):
        raise InvalidError(
            f"@app.{decorator}() is for functions, and this is a {type(f).__name__}; write "
            f"`@app.{decorator}()` on a line above `def`"
        )
