"""A function or class by the names of its app and itself, without its code.

Only deployed apps can be found so, and fanout has none yet. The handles exist, since scripts make
them at their top and may not use them; every use comes to `_NamedApp`, where the answer will be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from fanout.app import App
from fanout.cls import Cls, Obj
from fanout.exceptions import ExecutionError, InvalidError, NotFoundError
from fanout.function import Function
from fanout.options import Options
from fanout.service import Service


def function_from_name(app_name: str, name: str) -> Function[Any, Any, Any]:
    """See `Function.from_name`."""
    _check_names(app_name, name)
    if "." in name:
        raise InvalidError(
            f"name={name!r}: a method belongs to its class; write "
            f"`Cls.from_name({app_name!r}, {name.partition('.')[0]!r})`"
        )
    return _function(_NamedApp(app_name, "function", name), name)


def cls_from_name(app_name: str, name: str) -> Cls:
    """See `Cls.from_name`."""
    _check_names(app_name, name)
    return _NamedCls(app_name, name)


def _check_names(app_name: str, name: str) -> None:
    for what, text in (("app_name", app_name), ("name", name)):
        if not isinstance(text, str) or not text:
            raise InvalidError(f"{what}={text!r}: must be a text that is not empty")


class _NamedApp(App):
    """An app of which only the name is known, and that of what is looked for in it."""

    def __init__(self, app_name: str, kind: str, looked_for: str) -> None:
        super().__init__(app_name)
        self._kind = kind
        self._looked_for = looked_for

    def _current_run(self, what: str) -> NoReturn:
        raise NotFoundError(
            f"{what}: there is no deployed app {self.name!r} with a {self._kind} "
            f"{self._looked_for!r}; fanout has no deployed apps yet. Import the {self._kind} from "
            "the module that defines it, and call it inside `with app.run():`"
        )


class _NamedService(Service):
    """What containers would be started for."""

    has_code = False


class _NamedFunction(Function[Any, Any, Any]):
    """A handle that knows only names."""

    def get_raw_f(self) -> NoReturn:
        self.app._current_run(f"{self.name}.get_raw_f")
        raise AssertionError("a named app never runs")

    def _forbid_generator(self, method: str, instead: str) -> None:
        """Nobody knows whether it is one."""

    def _forbid_plain(self) -> None:
        """Nobody knows whether it is one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return function_from_name, (self.app.name, self.name)


class _NamedCls(Cls):
    """A handle that knows only names: it takes any parameters."""

    def __init__(self, app_name: str, name: str) -> None:
        super().__init__(_NamedApp(app_name, "class", name), type(name, (), {}), name, Options())

    def __call__(self, *args: Any, **values: Any) -> Obj:
        return _NamedObj(self, values)

    def of_parameters(self, values: dict[str, Any] | None) -> Obj:
        return _NamedObj(self, values or {})

    def get_user_cls(self) -> NoReturn:
        self._app._current_run(f"{self._name}.get_user_cls")
        raise AssertionError("a named app never runs")

    def with_batching(self, *, max_batch_size: int, wait_ms: int) -> Cls:
        return self

    def service_of(self, values: dict[str, Any]) -> Service:
        body = _no_code(self._name)
        return _NamedService(self._app, body, self._name, self._options, {"methods": {}})

    def __reduce__(self) -> tuple[Any, ...]:
        return cls_from_name, (self._app.name, self._name)


class _NamedObj(Obj):
    """Any name may be one of its methods."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _function(self._cls._app, f"{self._cls._name}.{name}")


def _function(app: App, name: str) -> Function[Any, Any, Any]:
    body = _no_code(name)
    shape = {"is_generator": False, "is_async": False}
    return _NamedFunction(_NamedService(app, body, name, Options(), shape), body, False)


def _no_code(name: str) -> Callable[..., NoReturn]:
    def no_code(*args: Any, **kwargs: Any) -> NoReturn:
        raise ExecutionError(
            f"{name} was looked up by its name and has no code here, so it cannot run locally"
        )

    no_code.__name__ = no_code.__qualname__ = name
    return no_code
