"""The folder a scheduler lives in: whose it is, who holds it, how others find the scheduler.

| file | what |
|---|---|
| `scheduler.lock` | locked by the running scheduler for its whole life; holds its pid |
| `scheduler.json` | where it listens and the join strings; there while it can be reached |
| `scheduler.sock` | what an embedded one listens at |
| `start.lock` | held by whoever starts a scheduler, and by an idle scheduler that leaves |
| `tokens.lock` | held while the tokens are changed |
| `scheduler.db`, `store.key`, `tokens.json`, `blobs/` | what outlives the process |
| `scheduler.log`, `crash-*.txt` | for people |

Locks are `flock`s: the kernel drops them with the process, however it ends, so no stale lock ever
needs a person.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from fanout.exceptions import ExecutionError, StorageError
from fanout.filesystem import MOUNT_TABLE, network_file_system_of, write_private


class Home:
    """The home folder, made with mode 0700 when it is not there.

    Args:
        path: the folder.
        mount_table: where the kernel tells what is mounted.

    Raises:
        StorageError: it cannot be made, is somebody else's, others may write to it, or it lies on
            a network file system.
    """

    def __init__(self, path: Path, mount_table: str | os.PathLike[str] = MOUNT_TABLE) -> None:
        self.path = path.absolute()
        self._lock: int | None = None
        self._start_lock: int | None = None
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError as error:
            raise StorageError(
                f"the home folder {self.path} cannot be made: {error}. Set FANOUT_HOME (or --home) "
                f"to a folder that you can write to."
            ) from error
        if found.st_uid != os.geteuid():
            raise StorageError(
                f"the home folder {self.path} belongs to user {found.st_uid}, this is user "
                f"{os.geteuid()}. Set FANOUT_HOME (or --home) to a folder of your own."
            )
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise StorageError(
                f"others may write to the home folder {self.path} (mode "
                f"{stat.S_IMODE(found.st_mode):04o}), and so replace its tokens. Run: "
                f"chmod 700 {self.path}"
            )
        kind = network_file_system_of(self.path, mount_table)
        if kind:
            raise StorageError(
                f"the home folder {self.path} is on a network file system ({kind}), where locks "
                f"and the database do not work. Set FANOUT_HOME to a folder on a local disk."
            )

    # --- files -----------------------------------------------------------------------------------

    @property
    def database(self) -> Path:
        return self.path / "scheduler.db"

    @property
    def key(self) -> Path:
        return self.path / "store.key"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens.json"

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def log(self) -> Path:
        return self.path / "scheduler.log"

    @property
    def address(self) -> Path:
        return self.path / "scheduler.json"

    @property
    def socket(self) -> Path:
        return self.path / "scheduler.sock"

    # --- locks -----------------------------------------------------------------------------------

    def lock(self, patience_s: float = 5.0) -> None:
        """Become the one scheduler of this folder, for as long as the process lives.

        A holder that has no address is starting or leaving; it gets `patience_s` to do so.

        Raises:
            ExecutionError: another process is; says which.
        """
        assert self._lock is None
        path = self.path / "scheduler.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience_s
        while not _try_flock(descriptor):
            if self.address.exists() or time.monotonic() >= deadline:
                pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(descriptor)
                raise ExecutionError(
                    f"a scheduler already serves the home folder {self.path}: its pid is {pid}. "
                    f"Stop it (fanout stop), or choose another folder with --home."
                )
            time.sleep(0.02)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._lock = descriptor

    def try_start_lock(self) -> bool:
        """Take the lock that clients hold while they look for a scheduler or start one.

        Returns False, at once, when somebody holds it. It is kept to the end of the process: who
        gets it then also finds `scheduler.lock` free. When the folder is gone nobody can look for
        a scheduler in it, and the answer is True.
        """
        path = self.path / "start.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return True
        if not _try_flock(descriptor):
            os.close(descriptor)
            return False
        self._start_lock = descriptor
        return True

    def unlock(self) -> None:
        """Give the folder's locks back. The end of the process does the same."""
        for descriptor in (self._lock, self._start_lock):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._start_lock = None

    # --- the address -----------------------------------------------------------------------------

    def publish(self, address: dict[str, Any]) -> None:
        """Write `scheduler.json`: whole or not at all, readable by the owner alone."""
        write_private(self.address, json.dumps(address, indent=1).encode() + b"\n")

    def withdraw(self) -> None:
        """Remove `scheduler.json`: nobody should try to reach this scheduler any more."""
        self.address.unlink(missing_ok=True)


def boot_id() -> str:
    """Changes at each start of the machine, so that a pid of an earlier one is not trusted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
