"""The folder of the embedded daemons: where it is, who is alive in it, who may start something.

::

    <FANOUT_HOME>/<machine>/v<protocol>-<schema>/
        start.lock                      held by whoever starts or stops a daemon
        scheduler.json  worker.json     where each is; written when it is ready
        scheduler.sock                  what the scheduler listens at
        scheduler.starting  ...         the pid of one that was started and is not ready yet
        scheduler.output  ...           what it wrote to stdout and stderr: why it did not start

The machine is part of the path because a home folder may be on several hosts, and the versions
are because two that cannot talk to each other must not meet. Files go stale: a daemon may be
killed, the machine may restart and give the pid to somebody else. So a file is believed only if it
carries the boot id of now and the process with its pid is one of ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanout.exceptions import ConnectionError, InvalidError
from fanout.filesystem import (
    MOUNT_TABLE,
    network_file_system_of,
    short_socket_path,
    write_private,
)

if TYPE_CHECKING:
    from types import TracebackType

#: Layout of the state folder and of the scheduler's database. Another number is another folder, so
#: that daemons of both can run side by side.
STATE_SCHEMA = 3

POLL_INTERVAL_S = 0.002
PROBE_TIMEOUT_S = 2.0
MODULES = {"scheduler": "fanout_scheduler", "worker": "fanout_worker"}


@dataclass(frozen=True, slots=True)
class Daemon:
    """One process of the embedded default, as its file describes it.

    The others are empty for a worker. `tokens` says which tokens are in force: the
    `digest` of `fanout.protocol.tokens.Content`.
    """

    kind: str
    pid: int
    client_join: str = ""
    worker_join: str = ""
    tokens: str = ""


# --- the folder -----------------------------------------------------------------------------------


def state_folder() -> str:
    """The folder of everything fanout keeps on this machine, as an absolute path. Not made.

    `FANOUT_HOME` names it; else it is `fanout` in `XDG_STATE_HOME`, else in `~/.local/state`.
    """
    named = os.environ.get("FANOUT_HOME")
    if named:
        base = os.path.abspath(os.path.expanduser(named))
    else:
        state = os.environ.get("XDG_STATE_HOME") or ""
        # A relative value is invalid by the XDG rules, and would depend on the cwd.
        if not os.path.isabs(state):
            state = os.path.join(os.path.expanduser("~"), ".local", "state")
        base = os.path.join(state, "fanout")
    return os.path.join(base, _machine_id())


def home_folder() -> str:
    """The folder of the embedded daemons that this version of fanout can talk to. Not made."""
    from fanout.protocol.messages import PROTOCOL_VERSION

    return os.path.join(state_folder(), f"v{PROTOCOL_VERSION}-{STATE_SCHEMA}")


def make_folder(path: str, mount_table: str = MOUNT_TABLE) -> str:
    """Make a state folder, with mode 0700, where it is not there. Returns the path.

    Args:
        path: the folder; its parents are made too.
        mount_table: where the kernel tells what is mounted.

    Raises:
        InvalidError: it cannot be made, belongs to somebody else, or is on a network file system.
    """
    kind = network_file_system_of(path, mount_table)
    if kind:
        raise InvalidError(
            f"the state folder {path} would be on a network file system ({kind}), where locks and "
            f"the database do not work. Set FANOUT_HOME to a folder on a local disk."
        )
    try:
        _make_private(path)
        owner = os.stat(path).st_uid
        if owner == os.geteuid():
            os.chmod(path, 0o700)
    except OSError as error:
        raise InvalidError(
            f"the state folder {path} cannot be made: {error.strerror or error}. "
            f"Set FANOUT_HOME to a folder on a local disk that you can write to."
        ) from error
    if owner != os.geteuid():
        raise InvalidError(
            f"the state folder {path} belongs to user {owner}, and this is user {os.geteuid()}. "
            f"Set FANOUT_HOME to a folder of your own."
        )
    return path


def _make_private(path: str) -> None:
    """Make a folder and those above it that are not there, each with mode 0700: `os.makedirs` has
    that for the last one only, and whoever may write to one above could put another in its place.
    """
    above = os.path.dirname(path)
    if above != path and not os.path.isdir(above):
        _make_private(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode=0o700)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def _machine_id() -> str:
    """Twelve hex digits that differ between the hosts that share a home folder."""
    import hashlib

    name = ""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                name = file.read().strip()
        except OSError:
            continue
        if name:
            break
    # Images of containers often come without an id, or with an empty one.
    name = name or os.uname().nodename
    return hashlib.sha256(b"fanout " + name.encode("utf-8", "replace")).hexdigest()[:12]


def boot_id() -> str:
    """Changes at each start of the machine; "" where the kernel does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


# --- who is there ---------------------------------------------------------------------------------


def find_daemon(home: str, kind: str) -> Daemon | None:
    """The daemon that is alive and ready in a home folder, or None.

    Args:
        home: the folder of its files.
        kind: ``"scheduler"`` or ``"worker"``.
    """
    return _read(home, kind, f"{kind}.json")


def find_starting(home: str, kind: str) -> Daemon | None:
    """The daemon that was started last and may not be ready yet, if it is alive."""
    return _read(home, kind, f"{kind}.starting")


def note_starting(home: str, kind: str, pid: int) -> None:
    """Write down that a daemon is on its way. A client that is killed at this point has started it
    all the same; the next one then waits for it and does not start a second."""
    data = json.dumps({"pid": pid, "boot_id": boot_id()}).encode()
    write_private(Path(home, f"{kind}.starting"), data, must_last=False)


def forget_starting(home: str, kind: str) -> None:
    """The daemon is ready, or has failed; from now on its own file speaks for it."""
    try:
        os.unlink(os.path.join(home, f"{kind}.starting"))
    except FileNotFoundError:
        pass


def _read(home: str, kind: str, name: str) -> Daemon | None:
    try:
        with open(os.path.join(home, name), "rb") as file:
            data = json.loads(file.read())
        if data["boot_id"] != boot_id() or not is_alive(data["pid"], kind):
            return None
        return Daemon(
            kind=kind,
            pid=data["pid"],
            client_join=str(data.get("client_join", "")),
            worker_join=str(data.get("worker_join", "")),
            tokens=str(data.get("tokens", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Files are replaced in one step, so a damaged one is not a file being written: whoever
        # left it is treated as gone, and a start writes a whole one.
        return None


def is_alive(pid: Any, kind: str) -> bool:
    """Whether the process is there and is a daemon of this kind, not one that got its pid later."""
    if type(pid) is not int or pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
        if command:
            return MODULES[kind].encode() in command
        # Empty: a zombie, or a process on its way through an exec, which is about to be ours.
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def answers(daemon: Daemon) -> bool:
    """Whether somebody accepts connections at the scheduler's socket."""
    from fanout.protocol.join import JoinString

    try:
        path = JoinString.parse(daemon.client_join).address.path
        with socket.socket(socket.AF_UNIX) as probe, short_socket_path(path) as short:
            probe.settimeout(PROBE_TIMEOUT_S)
            probe.connect(short)
    except (InvalidError, OSError):
        return False
    return True


# --- the lock -------------------------------------------------------------------------------------


class StartLock:
    """A lock file; `start.lock` is held while daemons are started or stopped.

    The kernel drops it with the process that holds it, however that ends. It is polled and not
    waited for, because a wait inside the kernel could not be given up at the deadline.
    """

    def __init__(self, home: str, deadline: float, name: str = "start.lock") -> None:
        self._path = os.path.join(home, name)
        self._deadline = deadline
        self._descriptor = -1

    def __enter__(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            wait_until(self._try, self._deadline)
        except TimeoutError:
            os.close(self._descriptor)
            raise ConnectionError(
                f"another process has been starting or stopping the fanout daemons for too long "
                f"and holds {self._path}. Find it with: fuser {self._path}"
            ) from None
        except BaseException:
            os.close(self._descriptor)
            raise

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)


def wait_until(is_true: Callable[[], bool], deadline: float) -> None:
    """Ask again and again, every two milliseconds.

    Raises:
        TimeoutError: the builtin one; the deadline (monotonic time) came first.
    """
    while not is_true():
        if time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(POLL_INTERVAL_S)
