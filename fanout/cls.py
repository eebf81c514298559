"""Classes whose methods run in containers: a model is loaded once for each container.

::

    @app.cls(max_containers=2)
    class Model:
        size: str = fanout.parameter(default="small")

        @fanout.enter()
        def load(self):
            self.weights = load(self.size)

        @fanout.method()
        def predict(self, text: str) -> float: ...

    Model(size="large").predict.map(texts)

`app.cls` puts a `Cls` in the place of the class. Calling it with values for the parameters gives an
`Obj`; each set of values has containers of its own. In a container, and for `.local`, there is an
instance of the user's own class behind it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import TYPE_CHECKING, Any, NoReturn

from fanout import context
from fanout.autoscaler import Autoscaler
from fanout.exceptions import InvalidError
from fanout.function import Function
from fanout.handle import AbsentService, Handle
from fanout.options import Options, changes_of, check_retries, check_together
from fanout.partial import (
    HANDLE,
    NOTHING,
    Lifecycle,
    Parameter,
    PartialFunction,
    check_batchable,
    lifecycle_of,
    make_batching,
    make_concurrency,
)
from fanout.service import Service, is_being_defined
from fanout.twin import twin

if TYPE_CHECKING:
    from fanout.app import App
    from fanout.definition import Definition
    from fanout.local_object import LocalObject

#: What the values of parameters may be.
PARAMETER_TYPES: tuple[type, ...] = (str, int, bool, bytes)


class Cls:
    """A class of an app. Made by `@app.cls()`; call it for an object whose methods can be called::

    Model(size="large").predict.remote("text")
    """

    def __init__(self, app: App, user_class: type, name: str, options: Options) -> None:
        self._app = app
        self._user_class = user_class
        self._name = name
        self._options = options
        #: It came here within its own definition, and so with its code.
        self._came_whole = False
        self.__name__ = user_class.__name__
        self.__qualname__ = user_class.__qualname__
        self.__module__ = user_class.__module__
        self.__doc__ = user_class.__doc__
        self.__wrapped__ = user_class

    @functools.cached_property
    def _lifecycle(self) -> Lifecycle:
        return lifecycle_of(self._user_class)

    @functools.cached_property
    def _parameters(self) -> dict[str, tuple[type, Parameter]]:
        return parameters_of(self._user_class)

    def check(self) -> Cls:
        """See that a container could make the class. Not when this object is made: one that came
        within a class by value is there before the class is whole.

        Raises:
            InvalidError: it could not.
        """
        _check_class(self._user_class, self._lifecycle)
        check_retries(self._options, self._name, self._shape())
        assert self._parameters is not None
        return self

    def __repr__(self) -> str:
        return f"<fanout.Cls {self._name!r} of app {self._app.name!r}>"

    def get_user_cls(self) -> type:
        """The plain Python class."""
        return self._user_class

    def __call__(self, *args: Any, **values: Any) -> Obj:
        """An object with these values of the parameters; nothing runs yet.

        Raises:
            InvalidError: a positional argument, an unknown or a missing parameter.
            TypeError: a value is not of its parameter's type.
        """
        if args:
            raise InvalidError(
                f"{self._name}(...) takes its parameters by name: "
                + ", ".join(f"{name}=..." for name in self._parameters)
            )
        return self.of_parameters(self._checked(values))

    def of_parameters(self, values: dict[str, Any] | None) -> Obj:
        """An object with values that were checked before."""
        return Obj(self, values or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._lifecycle.methods:
            raise AttributeError(
                f"{self._name}.{name} is a method of an object of the class; did you forget to "
                f"instantiate the class first? Write `{self._name}().{name}`"
            )
        return getattr(self._user_class, name)

    def __reduce__(self) -> tuple[Any, ...]:
        if is_being_defined(self._user_class):
            # By value it refers to itself.
            run = self._app._current_run(f"pickling {self._name}")
            whole = (self._app.name, run.app_id, self._user_class, self._name, self._options)
            return _cls_within_itself, whole
        return _cls_out_of, (Handle.of(self.service_of({})),)

    def _like(self, handle: Handle) -> Cls | None:
        """This class with the options of a handle; None if the handle is of other code."""
        if handle.shape != self._shape():
            return None
        options = handle.full_options
        return self if options.means(self._options) else self._of_options(options)

    # --- other options ---------------------------------------------------------------------------

    def with_options(self, **options: Any) -> Cls:
        """The same class with other options, in containers of its own; this one is unchanged.

        Args:
            options: those of `app.cls`; None leaves one as it is.

        Raises:
            InvalidError: an option is wrong.
        """
        return self._of_options(self._options.with_changes(changes_of(self._name, options)))

    def with_concurrency(self, *, max_inputs: int, target_inputs: int | None = None) -> Cls:
        """The same class, several inputs at a time in each container; see `concurrent`."""
        concurrency = make_concurrency(max_inputs, target_inputs)
        return self._of_options(dataclasses.replace(self._options, concurrency=concurrency))

    def with_batching(self, *, max_batch_size: int, wait_ms: int) -> Cls:
        """The same class, its one method given lists of inputs; see `batched`."""
        batching = make_batching(max_batch_size, wait_ms)
        _check_one_method(self._name, self._lifecycle)
        for partial in self._lifecycle.methods.values():
            check_batchable(partial, self.service_of({}).has_code)
        return self._of_options(dataclasses.replace(self._options, batching=batching))

    def _of_options(self, options: Options) -> Cls:
        check_together(options)
        check_retries(options, self._name, self._shape())
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._options = options
        other._came_whole = False
        return other

    @staticmethod
    def from_name(
        app_name: str,
        name: str,
        *,
        version: int | None = None,
        environment_name: str | None = None,
        client: Any = None,
    ) -> Cls:
        """A class of a deployed app. fanout has no deployed apps yet, so every use of a method of
        its objects is an error that says what to do instead.

        Args:
            app_name, name: what to look for, later, when a method is called.
            version, environment_name, client: as in Modal.

        Raises:
            InvalidError: a name is not one.
            NotFoundError: on every use of a method.
        """
        from fanout.lookup import cls_from_name

        return cls_from_name(app_name, name)

    @staticmethod
    def lookup(app_name: str, name: str, **options: Any) -> NoReturn:
        """Older name of `from_name`, removed in Modal too.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(
            f"Cls.lookup({app_name!r}, {name!r}): this is now Cls.from_name, and fanout has no "
            "deployed apps yet; import the class from the module that defines it"
        )

    def __mro_entries__(self, bases: tuple[Any, ...]) -> NoReturn:
        raise InvalidError(
            f"a class cannot inherit from {self._name}, which is decorated with @app.cls(); let "
            f"both inherit from a plain class, or inherit from `{self._name}.get_user_cls()`"
        )

    # --- for objects and containers --------------------------------------------------------------

    def service_of(self, values: dict[str, Any]) -> Service:
        """What containers of these parameters are started for."""
        declared = {
            name: [kind.__name__, p.is_argument, p.default is not NOTHING, p.default_or_none]
            for name, (kind, p) in self._parameters.items()
        }
        extra = {"parameters": values, "declared": declared}
        service = Service(
            self._app, self._user_class, self._name, self._options, self._shape(), extra
        )
        service.came_whole = self._came_whole
        return service

    @property
    def default_service(self) -> Service | None:
        """What containers are started for when every parameter has its default; None if one has
        none."""
        declared = [p for _, p in self._parameters.values()]
        if any(p.default is NOTHING for p in declared):
            return None
        return self.service_of(self._checked({}))

    def _shape(self) -> dict[str, Any]:
        methods = {
            name: {"is_generator": partial.is_generator, "is_async": partial.is_async}
            for name, partial in self._lifecycle.methods.items()
        }
        shape: dict[str, Any] = {"methods": methods}
        life = self._lifecycle
        hooks = [inspect.getattr_static(self._user_class, n) for n in (*life.enters, *life.exits)]
        are_async = {partial.is_async for partial in life.methods.values()}
        if False in are_async and (True in are_async or any(hook.is_async for hook in hooks)):
            # Its sync methods must not hold up the event loop, so they run beside it.
            shape["is_mixed"] = True
        return shape

    def _checked(self, given: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in given:
            if name not in self._parameters or not self._parameters[name][1].is_argument:
                known = ", ".join(n for n, (_, p) in self._parameters.items() if p.is_argument)
                raise InvalidError(
                    f"{self._name}({name}=...): the class has no parameter of that name; it has "
                    f"{known or 'none'}. Declare one with `{name}: str = fanout.parameter()`"
                )
        for name, (kind, declared) in self._parameters.items():
            value = given.get(name, declared.default)
            if value is NOTHING:
                raise InvalidError(
                    f"{self._name}(): parameter {name!r} has no default; give it a value: "
                    f"`{self._name}({name}=...)`"
                )
            if type(value) is not kind:
                raise TypeError(
                    f"{self._name}({name}={value!r}): expected {kind.__name__}, got "
                    f"{type(value).__name__}"
                )
            values[name] = value
        return values


class Obj:
    """An object of a `Cls`: the values of its parameters, and its methods as `Function`s."""

    def __init__(self, cls: Cls, values: dict[str, Any]) -> None:
        self._cls = cls
        self._values = values
        self._service = cls.service_of(values)
        self._methods: dict[str, Function[..., Any, Any]] = {}
        self._local: LocalObject | None = None

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"<fanout.Obj {self._cls._name}({values})>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        partial = self._cls._lifecycle.methods.get(name)
        if partial is None:
            return getattr(self._locally().instance, name)
        made = self._methods.get(name)
        if made is None:
            made = self._methods[name] = self._method(name, partial)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _obj_out_of, (self._cls, self._values)

    def _method(
        self, name: str, partial: PartialFunction[..., Any, Any]
    ) -> Function[..., Any, Any]:
        return Function(self._service, partial.raw, partial.is_generator, self, name)

    def _run_local(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._locally().call(name, args, kwargs)

    def _locally(self, is_entered: bool = False) -> LocalObject:
        """The user's own object, made when it is first needed."""
        if self._local is None:
            from fanout.local_object import LocalObject

            instance = _make_instance(self._cls._user_class, self._values, self)
            self._local = LocalObject(instance, self._cls._lifecycle, is_entered)
        return self._local

    # --- scaling ---------------------------------------------------------------------------------

    @property
    def autoscaler(self) -> Autoscaler:
        """How the containers of these parameters are scaled: look, and change."""
        return Autoscaler(self._service)

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

    update_autoscaler = twin(_update_autoscaler)


def _make_instance(user_class: type, values: dict[str, Any], handle: Obj) -> Any:
    """An instance of a user's class with the values of its parameters; no hook has run."""
    make: Any = user_class.__new__
    instance = make(user_class)
    instance.__dict__.update(values)
    instance.__dict__[HANDLE] = handle
    return instance


def instance_in_container(found: Any, definition: Definition, options: dict[str, Any]) -> Any:
    """The one instance that a container of a class works with.

    Args:
        found: what the definition's target is: a `Cls`, or the plain class where it came by value.
        definition, options: those of the container.
    """
    own = context.container
    assert own is not None
    if not isinstance(found, Cls):
        own.function = found
        checked = Options.of_data(options, definition.extra.get("env") or {})
        found = _cls_within_itself(
            definition.app_name or None, own.app_id, found, definition.function_name, checked
        )
    obj = found.of_parameters(definition.extra.get("parameters"))
    # The runtime runs the hooks, so `self.other.local()` finds them done.
    return obj._locally(is_entered=True).instance


# --- checks ---------------------------------------------------------------------------------------


def parameters_of(user_class: type) -> dict[str, tuple[type, Parameter]]:
    """The parameters that a class and its bases declare, with their types.

    Raises:
        InvalidError: one has no annotation, or one of another type than parameters may have.
    """
    found: dict[str, Parameter] = {}
    for base in reversed(user_class.__mro__):
        found |= {name: v for name, v in vars(base).items() if isinstance(v, Parameter)}
    if not found:
        return {}
    try:
        hints = typing.get_type_hints(user_class)
    except NameError:
        hints = {}
        for base in reversed(user_class.__mro__):
            hints |= inspect.get_annotations(base)
    by_name: dict[Any, type] = {kind.__name__: kind for kind in PARAMETER_TYPES}
    parameters = {}
    for name, declared in found.items():
        hint = hints.get(name)
        kind = by_name.get(hint, hint) if isinstance(hint, str) else hint
        if kind not in PARAMETER_TYPES:
            shown = "no annotation" if hint is None else f"annotation {hint!r}"
            raise InvalidError(
                f"parameter {name!r} of class {user_class.__name__!r} has {shown}; it must be one "
                "of str, int, bool and bytes, as the value is part of what containers are kept for"
            )
        parameters[name] = (kind, declared)
    return parameters


def _check_class(user_class: type, lifecycle: Lifecycle) -> None:
    if user_class.__init__ is not object.__init__:  # type: ignore[misc]
        raise InvalidError(
            f"class {user_class.__name__!r} has an __init__ of its own; declare what it takes as "
            "`name: str = fanout.parameter()`, and do its work in a method under @fanout.enter()"
        )
    for name, partial in lifecycle.methods.items():
        if partial.concurrency is not None:
            raise InvalidError(
                f"@fanout.concurrent() stands on method {name!r}; it belongs on the class"
            )
        if partial.batching is not None:
            _check_one_method(user_class.__name__, lifecycle)


def _check_one_method(name: str, lifecycle: Lifecycle) -> None:
    if len(lifecycle.methods) != 1:
        raise InvalidError(
            f"class {name!r} has a batched method and others ({', '.join(lifecycle.methods)}); a "
            "class with a batched method has no other one, as they would wait for each other"
        )


# --- out of pickles -------------------------------------------------------------------------------


def _cls_within_itself(
    app_name: str | None, app_id: bytes, user_class: type, name: str, options: Options
) -> Cls:
    """A handle out of the definition of a class by value that refers to it."""
    from fanout.app import App

    cls = Cls(App._joined(app_name, app_id), user_class, name, options)
    cls._came_whole = True
    return cls


def _cls_out_of(handle: Handle) -> Any:
    found = handle.find_here(Cls)
    return found if found is not None else _AbsentCls(handle)


def _obj_out_of(cls: Any, values: dict[str, Any]) -> Any:
    return cls.of_parameters(values)


class _AbsentCls(Cls):
    """A class of which only a handle came here: everything but `.local` works."""

    def __init__(self, handle: Handle) -> None:
        service = handle.service()
        self._handle = handle
        self._app = service.app
        self._user_class = type(service.name, (), {})
        self._name = service.name
        self._options = service.options
        self._lifecycle = Lifecycle()
        self._parameters = {}
        by_name: dict[str, type] = {kind.__name__: kind for kind in PARAMETER_TYPES}
        for name, (kind, is_argument, has_default, value) in handle.extra["declared"].items():
            declared = Parameter(value if has_default else NOTHING, is_argument)
            self._parameters[name] = (by_name[kind], declared)
        for name, shape in service.shape["methods"].items():
            partial = PartialFunction[..., Any, Any](service.raw)
            partial.is_method = True
            partial.generator_flag = shape["is_generator"]
            self._lifecycle.methods[name] = partial

    def service_of(self, values: dict[str, Any]) -> Service:
        return AbsentService(self._handle, self._options, values)
