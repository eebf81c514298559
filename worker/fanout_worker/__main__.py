"""`python -m fanout_worker JOIN`: run a worker daemon. `fanout worker` is the friendly front."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import socket
import sys
from pathlib import Path

import uvloop

from fanout import config
from fanout.exceptions import InvalidError
from fanout.protocol.join import JoinString
from fanout_worker import resources
from fanout_worker.daemon import Daemon, Options

#: The join string holds a secret, which everybody on the host could read in the arguments.
JOIN_VARIABLE = "FANOUT_WORKER_JOIN"


def main() -> int:
    """Returns the exit status."""
    os.umask(0o077)
    logging.basicConfig(
        level=os.environ.get("FANOUT_LOG", "warning").upper(),
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    try:
        options = _parse(sys.argv[1:])
        if not options.is_embedded:
            _take_home(options.home)
    except InvalidError as error:
        sys.stderr.write(f"fanout worker: {error}\n")
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(options))


def _take_home(home: Path) -> None:
    """Become the one worker of a folder, for as long as the process lives: a worker begins by
    deleting what an earlier one has left there.

    Raises:
        InvalidError: another process is; says which.
    """
    descriptor = os.open(home / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise InvalidError(
            f"another worker (pid {pid}) uses the folder {home}. One worker gives out all of a "
            f"host; for a second one choose another --name or --home, and divide the cores by --cpu"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)


async def _run(options: Options) -> int:
    return await Daemon(options).run()


def _parse(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="fanout_worker", description=__doc__)
    parser.add_argument("join", nargs="?", help=f"join string; else from {JOIN_VARIABLE}")
    parser.add_argument("--home", required=True, type=Path, help="folder for blobs and sources")
    parser.add_argument("--name", default=socket.gethostname(), help="default: the host's name")
    parser.add_argument("--cpu", type=float, help="cores to give out")
    parser.add_argument("--memory", type=int, help="MiB of memory to give out")
    parser.add_argument("--embedded", action="store_true", help="belong to a local scheduler")
    given = parser.parse_args(arguments)
    # Containers inherit the environment, and must not be able to pose as a worker.
    text = given.join or os.environ.get(JOIN_VARIABLE)
    os.environ.pop(JOIN_VARIABLE, None)
    if not text:
        raise InvalidError(
            f"no join string: give the one that `fanout scheduler` prints for workers as the "
            f"first argument, or set {JOIN_VARIABLE}"
        )
    cpu = given.cpu if given.cpu is not None else config.number_from_env("FANOUT_CPU", 0)
    memory = given.memory if given.memory is not None else resources.memory_mib()
    if cpu < 0 or memory < 0:
        raise InvalidError(f"--cpu {cpu:g} and --memory {memory} must not be negative")
    home: Path = given.home.absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Options(
        join=JoinString.parse(text),
        home=home,
        name=given.name,
        cpu=cpu or resources.cpu_count(),
        memory_mib=memory,
        is_embedded=given.embedded,
        descriptors_max=resources.raise_descriptor_limit(),
    )


if __name__ == "__main__":
    sys.exit(main())
