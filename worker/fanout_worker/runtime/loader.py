"""Finds the user's function or class, by name or by value, and makes the instance of a class.

A script is loaded under its canonical module name, with `__main__` as a second name for the same
module. So its classes are the same classes under either name, in both directions, and its
``if __name__ == "__main__"`` part does not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fanout.definition import Definition, Target
from fanout.exceptions import ContainerStartError, InvalidError
from fanout.partial import lifecycle_of


@dataclass(slots=True)
class Entry:
    """Something that leases run: the function, or one method of the class."""

    function: Callable[..., Any]
    is_generator: bool
    #: Calling it gives something to await, or an async generator.
    is_async: bool


@dataclass(slots=True)
class UserCode:
    """What a container runs."""

    #: By name of the method; a function has none and stands under "".
    entries: dict[str, Entry]
    #: Hooks that run before the first input and after the last one.
    enters: list[Callable[[], Any]] = field(default_factory=list)
    exits: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def needs_loop(self) -> bool:
        """Whether any of it is async, so that all of it runs beside an event loop."""
        hooks = [*self.enters, *self.exits]
        return any(entry.is_async for entry in self.entries.values()) or any(map(_is_async, hooks))

    def find(self, method: str) -> Entry:
        """What a lease for this method runs; something that raises if there is no such method, as
        the caller may have another version of the class."""
        entry = self.entries.get(method)
        return entry if entry is not None else Entry(_missing(method, self.entries), False, False)


def _missing(method: str, entries: Iterable[str]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        known = ", ".join(map(repr, entries))
        raise InvalidError(f"the class has no method {method!r} in its containers; it has {known}")

    return fail


def load_code(definition: Definition, sources: str, options: dict[str, Any]) -> UserCode:
    """What a definition means, ready to be run.

    Args:
        definition: what the client sent.
        sources: folder of the unpacked sources, on another host than the client's; else "".
        options: those of the definition.

    Raises:
        BaseException: whatever the user's module raises while it is imported.
        ContainerStartError: the module is there and the function or class is not.
    """
    found = _load(definition, sources)
    if options.get("methods") is not None:
        return _code_of_class(found, definition, options)
    function = _raw(found)
    is_async = bool(options.get("is_async")) or _is_async(function)
    return UserCode({"": Entry(function, bool(options.get("is_generator")), is_async)})


def _code_of_class(found: Any, definition: Definition, options: dict[str, Any]) -> UserCode:
    # Not at the top: functions do without it.
    from fanout.cls import instance_in_container

    instance = instance_in_container(found, definition, options)
    kind = type(instance)
    lifecycle = lifecycle_of(kind)

    def bound(name: str) -> Callable[..., Any]:
        """The user's own method; the attribute of the instance may be what calls it remotely."""
        method: Callable[..., Any] = inspect.getattr_static(kind, name).raw.__get__(instance, kind)
        return method

    entries = {}
    for name, declared in options["methods"].items():
        if name not in lifecycle.methods:
            raise ContainerStartError(
                f"class {kind.__qualname__!r} has no method {name!r} decorated with "
                "@fanout.method() here, and the client says that it has"
            )
        function = bound(name)
        is_async = bool(declared.get("is_async")) or _is_async(function)
        entries[name] = Entry(function, bool(declared.get("is_generator")), is_async)
    return UserCode(entries, [*map(bound, lifecycle.enters)], [*map(bound, lifecycle.exits)])


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _load(definition: Definition, sources: str) -> Any:
    target = definition.target
    main = definition.extra.get("main")
    if main is not None:
        # The function is in another module than the script, whose classes its arguments may
        # refer to. It is loaded when the first of them is.
        file = _script_path(main["file"], main["relative_file"], sources)
        sys.modules["__main__"] = _LazyMain(main["module"], file)
    if target.pickled:
        return pickle.loads(target.pickled)
    if target.file:
        module = load_script(
            target.module, _script_path(target.file, target.relative_file, sources)
        )
    else:
        module = importlib.import_module(target.module)
    return _find(module, target)


def _script_path(file: str, relative_file: str, sources: str) -> str:
    return os.path.join(sources, relative_file) if sources else file


def load_script(name: str, file: str) -> ModuleType:
    """Load a script under its canonical name, once, with `__main__` as alias."""
    loaded = sys.modules.get(name)
    if loaded is not None and os.path.realpath(getattr(loaded, "__file__", None) or "") == (
        os.path.realpath(file)
    ):
        sys.modules["__main__"] = loaded
        return loaded
    if "." in name:
        # A module of a package that was run with -m; its relative imports need the package.
        module = importlib.import_module(name)
        sys.modules["__main__"] = module
        return module
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not os.path.isfile(file):
        raise ContainerStartError(
            f"the script {file} cannot be loaded here: it is no Python file on this host"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, target: Target) -> Any:
    found: Any = module
    for part in target.qualname.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ContainerStartError(
                f"module {target.module!r} ({getattr(module, '__file__', 'built in')}) has no "
                f"{target.qualname!r}; a function must be reachable by its name at the module's "
                f"top level, or be defined with serialized=True"
            ) from None
    return found


def _raw(found: Any) -> Callable[..., Any]:
    """The user's function itself, if it is wrapped in a `fanout.Function`."""
    get_raw_f = getattr(found, "get_raw_f", None)
    if get_raw_f is not None and type(found).__module__.partition(".")[0] == "fanout":
        found = get_raw_f()
    if not callable(found):
        raise ContainerStartError(f"{found!r} is no function")
    function: Callable[..., Any] = found
    return function


class _LazyMain(ModuleType):
    """Stands for `__main__` until something in it is asked for."""

    def __init__(self, module: str, file: str) -> None:
        super().__init__("__main__")
        self.__dict__["_script"] = (module, file)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(load_script(*self.__dict__["_script"]), name)
