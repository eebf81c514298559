"""``script.py::name``: what a person names on the command line, and finding it.

A script is imported under its canonical module name, its stem, and never as `__main__`: that is how
containers import it, so classes are the same class on both sides, and a guarded
``if __name__ == "__main__":`` stays shut.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fanout.cli.flag import UsageError
from fanout.source import script_name

if TYPE_CHECKING:
    from fanout.app import App, LocalEntrypoint
    from fanout.function import Function


@dataclass(frozen=True, slots=True)
class Reference:
    """`source` is a file's path, or a module's name when `is_module`; `name` may be empty."""

    source: str
    name: str
    is_module: bool


@dataclass(frozen=True, slots=True)
class Runnable:
    """Something that `fanout run` can run: a local entrypoint or a function, and its app."""

    app: App
    name: str
    target: LocalEntrypoint[..., Any] | Function[..., Any, Any]
    is_entrypoint: bool
    #: Defined in the named module itself, not imported by it.
    is_own: bool


def parse_reference(text: str, is_module: bool) -> Reference:
    """The parts of ``FILE[::NAME]`` or, with `is_module`, of ``MODULE[::NAME]``.

    Raises:
        UsageError: the text is neither.
    """
    source, separator, name = text.partition("::")
    if not source or (separator and not name):
        raise UsageError(f"{text!r} is not of the form FILE, FILE::NAME or -m MODULE::NAME")
    if is_module:
        if source.endswith(".py") or os.sep in source:
            raise UsageError(f"{source!r} is a file; leave out -m, or name a module as in pkg.mod")
        return Reference(source, name, is_module=True)
    if not os.path.isfile(source):
        hint = ""
        if os.path.isdir(source):
            hint = " (it is a folder)"
        elif not source.endswith(".py") and all(part.isidentifier() for part in source.split(".")):
            hint = f". For a module, use: fanout run -m {text}"
        raise UsageError(f"there is no file {source!r}{hint}")
    return Reference(source, name, is_module=False)


def import_reference(reference: Reference, arguments: list[str]) -> ModuleType:
    """Import the module or the script, with `sys.path` and `sys.argv` as its own process would
    have them.

    Raises:
        UsageError: no module of this name can be found, or the script's name is taken.
        Exception: whatever the user's code raises.
    """
    if reference.is_module:
        sys.path.insert(0, os.getcwd())
        sys.argv = [reference.source, *arguments]
        return _import_module(reference.source)
    path = os.path.abspath(reference.source)
    sys.path.insert(0, os.path.dirname(path))
    sys.argv = [path, *arguments]
    return _import_script(path)


def _import_module(name: str) -> ModuleType:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # The parent package is not there, or it imports something that is not: the latter is the
        # user's error and wants its traceback.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        found = None
    if found is None:
        raise UsageError(f"there is no module {name!r} in {os.getcwd()} or on the path")
    return importlib.import_module(name)


def _import_script(path: str) -> ModuleType:
    name = script_name(path)
    taken = sys.modules.get(name)
    if taken is not None or name in sys.stdlib_module_names:
        where = getattr(taken, "__file__", None) or "the standard library"
        raise UsageError(
            f"the script {path} is imported as {name!r}, which is the name of another module "
            f"({where}). Rename the script."
        )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Alias as well as name: what asks for the main module (multiprocessing, pickles that were made
    # by `python script.py`) means the script, not this command.
    sys.modules[name] = module
    sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module


def runnables_of(module: ModuleType) -> list[Runnable]:
    """All that can be run in a module: entrypoints first, then functions, each in the order in
    which the apps know them."""
    from fanout.app import App

    apps = list({id(v): v for v in vars(module).values() if isinstance(v, App)}.values())
    found: list[Runnable] = []
    for app in apps:
        for name, entrypoint in app.registered_entrypoints.items():
            is_own = entrypoint.raw_f.__module__ == module.__name__
            found.append(Runnable(app, name, entrypoint, is_entrypoint=True, is_own=is_own))
    for app in apps:
        for name, function in app.registered_functions.items():
            is_own = function.get_raw_f().__module__ == module.__name__
            found.append(Runnable(app, name, function, is_entrypoint=False, is_own=is_own))
    return found


def find_runnable(module: ModuleType, reference: Reference) -> Runnable:
    """What the reference means.

    With a name: the entrypoint or function that is registered under it, or is bound to it in the
    module (``app_variable.name`` works too). Without: the module's only local entrypoint; else its
    only function; else the same among what it imports.

    Raises:
        UsageError: nothing fits or several do; lists what can be run.
    """
    runnables = runnables_of(module)
    if not runnables:
        raise UsageError(
            f"{reference.source} has nothing to run: no fanout.App with an @app.local_entrypoint() "
            f"or @app.function() at its top level"
        )
    if reference.name:
        return _find_named(module, reference, runnables)
    for is_own in (True, False):
        for is_entrypoint in (True, False):
            fitting = [
                r for r in runnables if r.is_own == is_own and r.is_entrypoint == is_entrypoint
            ]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                raise UsageError(
                    f"{reference.source} has several things to run; name one:\n"
                    + _listing(reference, runnables)
                )
    raise AssertionError("every runnable is in one of the four groups")


def _find_named(module: ModuleType, reference: Reference, runnables: list[Runnable]) -> Runnable:
    variable, _, name = reference.name.rpartition(".")
    app = getattr(module, variable, None) if variable else None
    bound = getattr(module, reference.name, None)
    fitting = [
        runnable
        for runnable in runnables
        if runnable.target is bound
        or (runnable.name == name and (not variable or runnable.app is app))
    ]
    if len(fitting) > 1:
        # An entrypoint and a function of one name: the person who runs means the entrypoint, as
        # without a name.
        entrypoints = [runnable for runnable in fitting if runnable.is_entrypoint]
        fitting = entrypoints or fitting
    if len(fitting) == 1:
        return fitting[0]
    problem = "several apps have" if fitting else "there is no"
    raise UsageError(
        f"{problem} {reference.name!r} in {reference.source}; it has:\n"
        + _listing(reference, runnables)
    )


def _listing(reference: Reference, runnables: list[Runnable]) -> str:
    """One line for each, as it can be typed."""
    option = "-m " if reference.is_module else ""
    return "\n".join(f"  fanout run {option}{reference.source}::{r.name}" for r in runnables)
