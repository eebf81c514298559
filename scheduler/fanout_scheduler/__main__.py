"""``python -m fanout_scheduler``: one scheduler process.

Only what every start needs is imported at the top; the time from here to a ready scheduler is part
of the first call of whoever runs a script.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from fanout.config import (
    IDLE_TIMEOUT_S,
    SPAWNED_MEMORY_SHARE,
    SPAWNED_SIZE_BYTES_MAX,
    number_from_env,
)
from fanout.exceptions import Error, InvalidError, StorageError
from fanout.protocol.join import Address
from fanout.protocol.transport import UNPROVED_COUNT_MAX
from fanout_scheduler.home import Home
from fanout_scheduler.server import Options, SchedulerServer

if TYPE_CHECKING:
    from fanout.protocol.tls import TlsIdentity

log = logging.getLogger("fanout.scheduler")

LOG_SIZE_BYTES_MAX = 5 << 20
LOOPBACK = "127.0.0.1"
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
#: Open files that are no connection of a peer: the store's, blobs that are being received or sent,
#: and strangers in their handshake.
DESCRIPTORS_RESERVED = 64 + UNPROVED_COUNT_MAX

EXIT_REFUSED = 1


def main(arguments: list[str] | None = None) -> int:
    """Run a scheduler; gives the exit code: 0 after an orderly end, 1 when it could not start, 70
    after a bug that it could not survive."""
    options = _parser().parse_args(arguments)
    if options.host == "localhost":
        # The name stands for two addresses, which would get two different free ports.
        options.host = LOOPBACK
    os.umask(0o077)
    try:
        if options.embedded and (options.host is not None or options.port is not None):
            raise InvalidError(
                "--embedded serves this machine alone, at a socket in its home. "
                "Leave out --host and --port, or leave out --embedded."
            )
        home = Home(options.home)
        _set_up_log(home, options.embedded)
        home.lock()
        # One that was killed has left its address behind.
        home.withdraw()
    except Error as error:
        return _refuse(error, options.embedded)
    try:
        return _serve(home, options)
    except (Error, OSError) as error:
        return _refuse(error, options.embedded)
    finally:
        home.unlock()


def _serve(home: Home, options: argparse.Namespace) -> int:
    idle_timeout_s: float | None = options.idle_timeout
    if idle_timeout_s is None and options.embedded:
        idle_timeout_s = number_from_env("FANOUT_IDLE_TIMEOUT", IDLE_TIMEOUT_S)
    address = Address(options.host or LOOPBACK, options.port or 0)
    if options.embedded:
        address = Address(path=str(home.socket))
    server = SchedulerServer(
        home,
        Options(
            address=address,
            public_host=_public_host(address.host),
            idle_timeout_s=idle_timeout_s,
            tls=None if address.path or is_loopback(address.host) else _identity(home),
            spawned_bytes_max=_spawned_bytes_max(),
            connection_count_max=_connection_count_max(),
        ),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(server, is_quiet=options.embedded))


async def _run(server: SchedulerServer, is_quiet: bool) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.leave, f"signal {number.name}")

    def ready(record: dict[str, Any]) -> None:
        # What lives now lives for ever; the collector need never look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        if not is_quiet:
            _tell_how_to_join(record)

    return await server.run(ready)


def _spawned_bytes_max() -> int:
    """How much memory spawned calls may take."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        # In a Docker container or the like this is its own limit; "max" where there is none.
        memory = min(memory, int(CGROUP_LIMIT.read_text()))
    default = min(SPAWNED_SIZE_BYTES_MAX, int(memory * SPAWNED_MEMORY_SHARE))
    return int(number_from_env("FANOUT_SPAWNED_MEMORY", default >> 20)) << 20


def _connection_count_max() -> int:
    """How many peers the limit of open files leaves room for; it is raised as far as it may be,
    since a soft limit is often too low for a thousand workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(1, soft - DESCRIPTORS_RESERVED) if soft != resource.RLIM_INFINITY else 1 << 20


def _identity(home: Home) -> TlsIdentity:
    from fanout.protocol.tls import TlsIdentity

    return TlsIdentity.load_or_create(home.path)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name is taken for reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _public_host(host: str) -> str:
    """The address for join strings. Listening on all addresses, it is the one from which this
    machine would talk to others; its route is looked up and nothing is sent."""
    if host not in ("0.0.0.0", "::"):
        return host
    family = socket.AF_INET if host == "0.0.0.0" else socket.AF_INET6
    documentation_address = "192.0.2.1" if host == "0.0.0.0" else "2001:db8::1"
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((documentation_address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fanout_scheduler", description="fanout's scheduler")
    parser.add_argument("--home", type=Path, required=True, help="folder of its state")
    parser.add_argument("--host", help=f"address to listen on; {LOOPBACK} by default")
    parser.add_argument("--port", type=int, help="port to listen on; 0, the default, is a free one")
    parser.add_argument(
        "--embedded", action="store_true", help="serve this machine alone, and leave when idle"
    )
    parser.add_argument(
        "--idle-timeout",
        type=float,
        metavar="S",
        help=f"seconds without work after which it leaves ({IDLE_TIMEOUT_S:g} when --embedded, "
        f"else never)",
    )
    return parser


class LimitedFileHandler(logging.FileHandler):
    """A file that becomes `<name>.1` when it is full. The one of the standard library imports
    pickle, and nothing that can unpickle is loaded in a scheduler."""

    def __init__(self, path: Path, size_bytes_max: int = LOG_SIZE_BYTES_MAX) -> None:
        super().__init__(path, delay=True)
        self._size_bytes_max = size_bytes_max

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.stream is not None and self.stream.tell() > self._size_bytes_max:
                self.stream.close()
                # The next line opens it.
                self.stream = None
                os.replace(self.baseFilename, f"{self.baseFilename}.1")
        except OSError:
            self.handleError(record)
        super().emit(record)


def _set_up_log(home: Home, is_embedded: bool) -> None:
    level = os.environ.get("FANOUT_LOG", "warning").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise InvalidError(
            f"FANOUT_LOG={level.lower()!r} is not one of debug, info, warning, error, critical"
        )
    handler: logging.Handler
    if is_embedded:
        try:
            handler = LimitedFileHandler(home.log)
        except OSError as error:
            raise StorageError(f"the log {home.log} cannot be opened: {error}") from error
    else:
        handler = logging.StreamHandler(sys.stderr)
    # A log that cannot be written (disk full) must not fill standard error in its place.
    logging.raiseExceptions = False
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("fanout")
    root.addHandler(handler)
    root.setLevel(level)


def _tell_how_to_join(record: dict[str, Any]) -> None:
    sys.stdout.write(
        f"fanout scheduler {record['version']} listens on {record['address']}\n"
        f"\nOn each machine that shall run functions:\n"
        f"  fanout worker '{record['worker_join']}'\n"
        f"\nWhere programs start:\n"
        f"  export FANOUT_URL='{record['client_join']}'\n"
        f"\nBoth lines hold a secret. Anybody who has the second one can run code on the workers.\n"
    )
    sys.stdout.flush()


def _refuse(error: Exception, is_embedded: bool) -> int:
    """Say why it does not start: to whoever started it, and where people look for it later."""
    if is_embedded:
        log.error("%s", error)
    sys.stderr.write(f"fanout scheduler: {error}\n")
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
