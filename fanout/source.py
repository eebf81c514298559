"""Where code lives: which module a function belongs to, and which files travel with it.

A script is `__main__` here and something else in a container. So a `__main__` that has a file gets
one canonical name, its stem or the name given to ``python -m``; `sys.modules` knows the module
under both, here and there, and classes keep their identity on the way out and back.

Code that has no file (a REPL, a notebook, ``-c``, stdin), a closure and a function marked
`serialized=True` travel by value.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fanout import context
from fanout.definition import Environment, Target
from fanout.exceptions import InvalidError, RequestSizeError, SerializationError
from fanout.serialization import is_main_importable, pickle_by_value

#: What may travel to other hosts. Larger projects are installed on the workers instead.
SOURCES_SIZE_BYTES_MAX = 16 << 20
SOURCES_COUNT_MAX = 2000
#: Files and folders that are looked at for Python files. Where nothing travels, looking only tells
#: an edited program from an old one, and must not cost more than starting (a script in a home
#: folder); what is imported already is looked at in any case.
ENTRIES_COUNT_MAX = 20_000
ENTRIES_COUNT_MAX_REMOTE = 1_000_000
#: A function by value larger than this has most likely caught data that belongs in an argument.
PICKLED_SIZE_BYTES_MAX = 16 << 20

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "env", "build"}
)


# --- names ----------------------------------------------------------------------------------------


def main_name() -> str | None:
    """The canonical name of `__main__`; None when it has no file."""
    if not is_main_importable():
        return None
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name and spec.name != "__main__":
        name: str = spec.name
        return name
    return script_name(str(main.__file__))


def script_name(file: str) -> str:
    """The module name of a file that is run by its path: its stem, or that of its folder for the
    `__main__.py` of a folder that was run. A dot would make it a module of some package."""
    folder, name = os.path.split(os.path.abspath(file))
    stem = os.path.splitext(name)[0]
    if stem == "__main__":
        stem = os.path.basename(folder) or "main"
    return stem.replace(".", "_")


def alias_main() -> None:
    """Make `__main__` known under its canonical name too, unless something else has that name."""
    name = main_name()
    if name is not None and name not in sys.modules:
        sys.modules[name] = sys.modules["__main__"]


def is_by_value(function: Callable[..., Any], is_serialized: bool) -> bool:
    """Whether a function travels by value.

    Raises:
        InvalidError: it is not at module scope, and not marked `serialized=True`.
    """
    if is_serialized:
        return True
    if function.__module__ == "__main__" and not is_main_importable():
        return True
    if "<" in function.__qualname__:
        raise InvalidError(
            f"function {function.__qualname__!r} is not at module scope, so a container could not "
            "find it by name; move it there, or mark it @app.function(serialized=True)"
        )
    return False


def make_target(function: Callable[..., Any], is_serialized: bool) -> Target:
    """How a container finds the function.

    Raises:
        InvalidError: not at module scope.
        RequestSizeError: the pickled function is far too large.
        SerializationError: a function by value that cannot be pickled.
    """
    module_name = function.__module__
    if is_by_value(function, is_serialized):
        return Target(module_name, function.__qualname__, pickled=_pickled(function))
    module = sys.modules.get(module_name)
    main = sys.modules.get("__main__")
    if module_name == "__main__":
        module, module_name = main, main_name() or module_name
    file = getattr(module, "__file__", None)
    is_script = module is main or not _is_importable(module_name, file)
    if file is None or not is_script:
        return Target(module_name, function.__qualname__)
    file = os.path.abspath(file)
    return Target(module_name, function.__qualname__, file=file, relative_file=_relative_file(file))


def describe_main(target: Target) -> dict[str, Any]:
    """For `Definition.extra`: the script, when the function is not in it. Values of the script's
    classes may still be among its arguments, pickled as ``__main__.Class``."""
    name = main_name()
    if name is None or target.file or context.container is not None:
        return {}
    file = os.path.abspath(str(sys.modules["__main__"].__file__))
    if _is_tool(file):
        return {}
    main = {"module": name, "file": file, "relative_file": _relative_file(file)}
    return {"main": main}


def _relative_file(file: str) -> str:
    relative = os.path.relpath(file, source_root())
    return os.path.basename(file) if relative.startswith(os.pardir) else relative


def _pickled(function: Callable[..., Any]) -> bytes:
    try:
        pickled = pickle_by_value(function)
    except Exception as error:
        raise SerializationError(
            f"function {function.__qualname__!r} travels by value and cannot be pickled: "
            f"{type(error).__name__}: {error}. Make what it refers to inside the function, or put "
            "it at the module scope of a file"
        ) from error
    if len(pickled) > PICKLED_SIZE_BYTES_MAX:
        raise RequestSizeError(
            f"function {function.__qualname__!r} is {len(pickled) >> 20} MiB when pickled by "
            f"value, over the limit of {PICKLED_SIZE_BYTES_MAX >> 20} MiB: it has caught data "
            "that should be an argument"
        )
    return pickled


def _is_importable(name: str, file: str | None) -> bool:
    """Whether `import name` finds this file; a script loaded under its stem is not found so when
    its folder is not on the path."""
    if file is None:
        return True
    parts = name.split(".")
    stem = os.path.splitext(os.path.abspath(file))[0]
    if os.path.basename(stem) == "__init__":
        stem = os.path.dirname(stem)
    for folder in sys.path:
        if os.path.join(os.path.abspath(folder or os.curdir), *parts) == stem:
            return True
    # Zip files, namespace packages and editable installs have finders of their own.
    return "." in name or not file.endswith(".py") or _is_installed(file)


# --- environments ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Code:
    """The environment of this process's functions, and the sources that travel."""

    environment: Environment
    #: The zip, or None when the code runs in place.
    archive: bytes | None


def capture(is_remote: bool) -> Code:
    """The environment as it is now.

    Args:
        is_remote: containers may run on other hosts, so sources must travel.

    Raises:
        RequestSizeError: the sources are too many or too large to travel.
    """
    if context.container is not None:
        return Code(context.container.environment, None)
    files, is_whole = _source_files(is_remote)
    if is_remote and not is_whole:
        raise RequestSizeError(
            f"{source_root()} holds more than {SOURCES_COUNT_MAX} Python files (or more than "
            f"{ENTRIES_COUNT_MAX_REMOTE} files of any kind), and its Python files would have to "
            "travel to the workers; put the script in a folder of its own, or install the project "
            "on the workers"
        )
    archive = _zip(files) if is_remote else None
    environment = Environment(
        python=sys.executable,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        path=[os.path.abspath(folder or os.curdir) for folder in sys.path],
        cwd=os.getcwd(),
        # Not used on another host, and full of secrets.
        variables={} if is_remote else dict(os.environ),
        sources="" if archive is None else hashlib.sha256(archive).hexdigest(),
        code_digest=_digest(files),
    )
    return Code(environment, archive)


def is_remote_scheduler() -> bool:
    """Whether the calls of this process may run on another host than this one."""
    return bool(os.environ.get("FANOUT_URL"))


def source_root() -> str:
    """The folder that the names of travelling files are relative to."""
    if context.container is not None and context.container.is_remote_host:
        return os.path.abspath(sys.path[0])
    name = main_name()
    if name is None:
        return os.getcwd()
    file = os.path.abspath(str(sys.modules["__main__"].__file__))
    if _is_tool(file):
        # `fanout run script.py`: the entry file is the script, whose folder it puts first.
        return os.path.abspath(sys.path[0] or os.curdir)
    # A script's own folder comes first on its path, also when that is inside a package. A module
    # run with -m is found below the folder of its outermost package.
    folder = os.path.dirname(file)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    for _ in range(spec.name.count(".") if spec is not None else 0):
        folder = os.path.dirname(folder)
    return folder


def _is_tool(file: str) -> bool:
    return _is_installed(file) or os.path.dirname(file) == sysconfig.get_path("scripts")


@lru_cache(maxsize=1)
def _installed_folders() -> tuple[str, ...]:
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    folders.add(os.path.dirname(os.path.abspath(__file__)))
    return tuple(
        os.path.join(os.path.realpath(folder), "") for folder in sorted(folders) if folder
    ) + tuple(os.path.join(os.path.abspath(folder), "") for folder in sorted(folders) if folder)


def _is_installed(file: str) -> bool:
    """Part of the interpreter or of an installed distribution, so every worker has its own."""
    return file.startswith(_installed_folders())


def _source_files(is_remote: bool) -> tuple[dict[str, str], bool]:
    """The path of each source file of the program by its name in the archive, and whether these
    are all of them."""
    root = source_root()
    is_whole = True
    files: dict[str, str] = {}
    if main_name() is not None:
        paths, is_whole = _python_files(
            root, ENTRIES_COUNT_MAX_REMOTE if is_remote else ENTRIES_COUNT_MAX
        )
        files = {os.path.relpath(path, root): path for path in paths}
    main = sys.modules.get("__main__")
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if module is main or not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = os.path.abspath(file)
        if _is_installed(path) or not _is_text(path):
            continue
        # What is below the root may have been imported from a folder of its own on the path.
        parts = name.split(".")
        if os.path.basename(path) == "__init__.py":
            files[os.path.join(*parts, "__init__.py")] = path
        else:
            files[os.path.join(*parts) + ".py"] = path
    return files, is_whole


def _python_files(root: str, entries_count_max: int) -> tuple[list[str], bool]:
    """Python files at and below a folder, in a stable order, and whether these are all of them;
    not those of environments, hidden folders, or folders that somebody else's project lives in."""
    paths: list[str] = []
    entries_count = 0
    for folder, subfolders, names in os.walk(root):
        entries_count += len(subfolders) + len(names)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and name not in _SKIPPED_FOLDERS
            and _is_text(name)
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
        )
        paths += [
            os.path.join(folder, name)
            for name in sorted(names)
            if name.endswith(".py") and _is_text(name)
        ]
        if len(paths) > SOURCES_COUNT_MAX or entries_count > entries_count_max:
            return paths[:SOURCES_COUNT_MAX], False
    return paths, True


def _is_text(name: str) -> bool:
    """Whether a file name is text at all; no module can be imported from one that is not."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(files: dict[str, str]) -> str:
    """Changes when a source is edited. By size and time, since reading all of it at every start
    would cost more than starting."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        try:
            status = os.stat(path)
        except OSError:
            continue
        line = f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _zip(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    size = 0
    if len(files) > SOURCES_COUNT_MAX:
        raise RequestSizeError(
            f"{len(files)} source files would have to travel to the workers, over the limit of "
            f"{SOURCES_COUNT_MAX}; put the script in a folder of its own, or install the project "
            "on the workers"
        )
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            try:
                with open(path, "rb") as file:
                    content = file.read()
            except OSError:
                continue
            size += len(content)
            if size > SOURCES_SIZE_BYTES_MAX:
                raise RequestSizeError(
                    f"the source files that would have to travel to the workers are over "
                    f"{SOURCES_SIZE_BYTES_MAX >> 20} MiB; put the script in a folder of its own, "
                    "or install the project on the workers"
                )
            # A fixed date, so that the same content is the same blob.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
