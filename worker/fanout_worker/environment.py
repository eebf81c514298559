"""Where a function's code runs on this host: interpreter, path, folder and variables."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanout.definition import Definition
from fanout.exceptions import ContainerStartError
from fanout.protocol import messages as m
from fanout_worker.host import Settings
from fanout_worker.launcher import Interpreter


@dataclass(slots=True)
class Launch:
    """All that a container of a function is started with."""

    interpreter: Interpreter
    path: list[str]
    cwd: str
    variables: dict[str, str]
    #: Folder of the unpacked sources; "" where the client's own files are used.
    sources: str


async def plan_launch(definition: Definition, settings: Settings) -> Launch:
    """What a container of this function is started with on this host.

    The embedded worker uses the client's own environment. Elsewhere, and for a client that took
    this host for another one (it came by `FANOUT_URL`), it is this daemon's interpreter and path,
    with the client's sources before it. The variables of the function's own come last.

    Raises:
        ContainerStartError: the sources cannot be unpacked.
    """
    environment = definition.environment
    own: dict[str, str] = definition.extra.get("env") or {}
    if settings.is_embedded and not environment.sources:
        variables = {**environment.variables, **own}
        interpreter = Interpreter(environment.python, environment.path, variables)
        return Launch(interpreter, environment.path, environment.cwd, variables, "")
    _check_version(definition)
    folder = settings.sources_folder
    archive = Path(settings.blob_folder) / environment.sources if environment.sources else None
    loop = asyncio.get_running_loop()
    sources = await loop.run_in_executor(None, unpack_sources, archive, Path(folder))
    path = [part for part in sys.path if part]
    variables = {**settings.variables, **own}
    interpreter = Interpreter(sys.executable, path, variables)
    return Launch(interpreter, [sources, *path], sources, variables, sources)


def start_info(launch: Launch, settings: Settings, message: m.DefineFunction) -> dict[str, Any]:
    """What a container is told at its start, beside its number and its secret."""
    return {
        "app_id": message.app_id,
        "function_id": message.function_id,
        "options": message.options,
        "daemon_pid": os.getpid(),
        "variables": launch.variables,
        "cwd": launch.cwd,
        "path": launch.path,
        "sources": launch.sources,
        "socket_path": settings.socket_path,
        "blob_folder": settings.blob_folder,
        "descriptors_max": settings.descriptors_max,
    }


def _check_version(definition: Definition) -> None:
    """Code that travels by value is bytecode, which only its own version of Python can run."""
    theirs = definition.environment.python_version
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if definition.target.pickled and theirs and theirs != ours:
        raise ContainerStartError(
            f"the function travels by value and was made by Python {theirs}; this worker runs "
            f"Python {ours}. Define it at the top level of a file, or use the same version on both"
        )


def unpack_sources(archive: Path | None, folder: Path) -> str:
    """Unpack a zip of sources, once, into a folder of its own. Returns that folder.

    Args:
        archive: named by its digest; None for a function that has no files.
        folder: where unpacked sources are kept.

    Raises:
        ContainerStartError: the archive is damaged or cannot be written.
    """
    target = folder / (archive.name if archive is not None else "empty")
    if target.is_dir():
        return str(target)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = tempfile.mkdtemp(dir=folder)
    try:
        if archive is not None:
            with zipfile.ZipFile(archive) as file:
                file.extractall(draft)
        os.rename(draft, target)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        if target.is_dir():
            # Another container of the same environment was quicker.
            return str(target)
        raise ContainerStartError(f"the sources cannot be unpacked: {error}") from error
    return str(target)


def discard_sources(digest: str, folder: Path) -> Path | None:
    """Set an unpacked folder aside, at once, so that it can be deleted while the same sources are
    unpacked anew. Returns where it is now; None if there was none."""
    target = folder / digest
    if not target.is_dir():
        return None
    aside = Path(tempfile.mkdtemp(dir=folder))
    os.rename(target, aside)
    return aside
