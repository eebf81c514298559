"""Finds the user's function, by name or by value.

A script is loaded under its canonical module name, with `__main__` as a second name for the same
module. So its classes are the same classes under either name, in both directions, and its
``if __name__ == "__main__"`` part does not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fanout.definition import Definition, Target
from fanout.exceptions import ContainerStartError


def load_function(definition: Definition, sources: str) -> Callable[..., Any]:
    """The raw function that a definition means.

    Args:
        definition: what the client sent.
        sources: folder of the unpacked sources, on another host than the client's; else "".

    Raises:
        BaseException: whatever the user's module raises while it is imported.
        ContainerStartError: the module is there and the function is not.
    """
    target = definition.target
    main = definition.extra.get("main")
    if main is not None:
        # The function is in another module than the script, whose classes its arguments may
        # refer to. It is loaded when the first of them is.
        file = _script_path(main["file"], main["relative_file"], sources)
        sys.modules["__main__"] = _LazyMain(main["module"], file)
    if target.pickled:
        return _raw(pickle.loads(target.pickled))
    if target.file:
        module = load_script(
            target.module, _script_path(target.file, target.relative_file, sources)
        )
    else:
        module = importlib.import_module(target.module)
    return _raw(_find(module, target))


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
