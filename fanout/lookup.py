"""A function by the names of its app and itself, without its code.

Only deployed apps can be found so, and fanout has none yet. The handle exists, since scripts make
it at their top and may not use it; every use of it comes to `_find`, where the answer will be.
"""

from __future__ import annotations

from typing import Any, NoReturn

from fanout.app import App
from fanout.exceptions import ExecutionError, InvalidError, NotFoundError
from fanout.function import Function


def function_from_name(app_name: str, name: str) -> Function[Any, Any, Any]:
    """See `Function.from_name`."""
    for what, text in (("app_name", app_name), ("name", name)):
        if not isinstance(text, str) or not text:
            raise InvalidError(f"{what}={text!r}: must be a text that is not empty")
    if "." in name:
        raise InvalidError(
            f"name={name!r}: a method belongs to its class; write "
            f"`Cls.from_name({app_name!r}, {name.partition('.')[0]!r})`"
        )
    return _NamedFunction(app_name, name)


class _NamedFunction(Function[Any, Any, Any]):
    """A handle that knows only names."""

    def __init__(self, app_name: str, name: str) -> None:
        def no_code(*args: Any, **kwargs: Any) -> NoReturn:
            raise ExecutionError(
                f"{name} was looked up by its name and has no code here, so it cannot run locally"
            )

        no_code.__name__ = no_code.__qualname__ = name
        made: Any = App(app_name).function(name=name, serialized=True)(no_code)
        super().__init__(made.service, no_code, False)

    def _find(self, use: str) -> NoReturn:
        raise NotFoundError(
            f"{use}: there is no deployed app {self.app.name!r} with a function {self.name!r}; "
            "fanout has no deployed apps yet. Import the function from the module that defines it, "
            "and call it inside `with app.run():`"
        )

    def get_raw_f(self) -> NoReturn:
        self._find(f"{self.name}.get_raw_f")

    def _forbid_generator(self, method: str, instead: str) -> NoReturn:
        self._find(f"{self.name}.{method}")

    def _forbid_plain(self) -> NoReturn:
        self._find(f"{self.name}.remote_gen")

    def _prepare(self, method: str, *args: Any, **kwargs: Any) -> NoReturn:
        self._find(f"{self.name}.{method}")

    def __reduce__(self) -> tuple[Any, ...]:
        return function_from_name, (self.app.name, self.name)
