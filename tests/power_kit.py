"""Cutting the power: what a scheduler wrote and did not sync is gone.

The kernel asks this process before the scheduler's `fsync` and `fdatasync` go ahead (seccomp's user
notification), SQLite's included. While the scheduler waits for the answer, what it syncs is copied:
of a file its content, of a folder its names. These copies are the disk after the power cut. So the
model is the strictest that POSIX allows: a write that was not followed by a sync is lost, and a
file whose folder was not synced since has no name. Torn writes are not modelled; the store's tests
cut the log off in the middle of a transaction.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import HandStarted

#: Numbers of system calls: fsync, fdatasync, seccomp.
_NUMBERS = {"x86_64": (74, 75, 317), "aarch64": (82, 83, 277)}
_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101
_QUESTION_SIZE_BYTES, _CONTINUE = 80, 1

#: Has the kernel ask before each sync, hands over where it asks, and becomes the scheduler.
_INSTALL = """
import ctypes, os, socket, sys
fsync, fdatasync, seccomp = map(int, sys.argv[2].split(","))
class Line(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("lines", ctypes.POINTER(Line))]
lines = (Line * 5)(Line(0x20, 0, 0, 0), Line(0x15, 2, 0, fsync), Line(0x15, 1, 0, fdatasync),
                   Line(0x06, 0, 0, 0x7FFF0000), Line(0x06, 0, 0, 0x7FC00000))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
asks = libc.syscall(seccomp, 1, 8, ctypes.byref(Program(5, lines)))
if asks < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    socket.send_fds(sock, [b"x"], [asks])
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


class Disk:
    """What of a folder is on disk. Fed with each sync of a process; `after_cut` writes it out."""

    def __init__(self, folder: Path) -> None:
        self._root = folder.stat().st_ino
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, tuple[int, bool]]] = {}
        self.sync_count = 0

    def take(self, path: str) -> None:
        """What this names is being synced."""
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            names = {}
            for entry in os.scandir(path):
                with contextlib.suppress(FileNotFoundError):
                    names[entry.name] = (entry.inode(), entry.is_dir(follow_symlinks=False))
            self._folders[found.st_ino] = names
        else:
            self._files[found.st_ino] = Path(path).read_bytes()
        self.sync_count += 1

    def after_cut(self, target: Path) -> None:
        """Make the folder as it is when the machine starts again."""
        self._place(self._root, target)

    def _place(self, number: int, target: Path) -> None:
        target.mkdir(mode=0o700)
        for name, (inner, is_folder) in self._folders.get(number, {}).items():
            if is_folder:
                self._place(inner, target / name)
            else:
                (target / name).write_bytes(self._files.get(inner, b""))
                (target / name).chmod(0o600)


class PowerCluster(HandStarted):
    """A cluster whose scheduler can lose its power."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._numbers = _NUMBERS.get(platform.machine())
        self._socket = folder / "asks"
        self._watcher: threading.Thread | None = None
        self.disk: Disk | None = None
        self._life = 0

    def _command(self, name: str, arguments: list[str]) -> list[str]:
        if name != "scheduler":
            return super()._command(name, arguments)
        assert self._numbers is not None
        numbers = ",".join(map(str, self._numbers))
        return [sys.executable, "-c", _INSTALL, str(self._socket), numbers, *arguments]

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        require_notification(self._numbers)
        self.scheduler_home.mkdir(mode=0o700, exist_ok=True)
        self.disk = Disk(self.scheduler_home)
        if self._life:
            # The machine has started again: all that is there is on the disk.
            for path in [self.scheduler_home, *self.scheduler_home.rglob("*")]:
                self.disk.take(str(path))
        self._life += 1
        self._socket.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._socket))
        listener.listen(1)
        self._watcher = threading.Thread(target=self._watch, args=(listener, self.disk))
        self._watcher.start()
        return super().start_scheduler()

    def cut_power(self) -> None:
        """The scheduler is gone, and with it what it had not synced."""
        assert self.scheduler is not None
        assert self.disk is not None
        self.scheduler.kill()
        self.scheduler.wait()
        self._end_watcher()
        assert self.disk.sync_count > 0
        shutil.move(self.scheduler_home, self.folder / f"before-cut-{self._life}")
        self.disk.after_cut(self.scheduler_home)

    def stop(self) -> None:
        super().stop()
        self._end_watcher()

    def _end_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def _watch(self, listener: socket.socket, disk: Disk) -> None:
        with listener:
            connection, _ = listener.accept()
        with connection:
            _, (asks, *_), _, _ = socket.recv_fds(connection, 1, 1)
        try:
            poll = select.poll()
            poll.register(asks, select.POLLIN)
            while poll.poll()[0][1] & select.POLLIN:
                _answer(asks, disk)
        finally:
            os.close(asks)


def _answer(asks: int, disk: Disk) -> None:
    """Copy what is synced, and let the sync go ahead."""
    question = bytearray(_QUESTION_SIZE_BYTES)
    try:
        fcntl.ioctl(asks, _RECEIVE, question, True)
        number, thread = struct.unpack_from("QI", question)
        (descriptor,) = struct.unpack_from("Q", question, 32)
        with contextlib.suppress(FileNotFoundError):
            disk.take(f"/proc/{thread}/fd/{descriptor}")
        answer = bytearray(struct.pack("QqiI", number, 0, 0, _CONTINUE))
        fcntl.ioctl(asks, _ANSWER, answer, True)
    except OSError as error:
        # The one who asked was killed meanwhile.
        if error.errno != errno.ENOENT:
            raise


def require_notification(numbers: tuple[int, int, int] | None) -> None:
    """Skip the test where the kernel does not ask; in CI that is a failure."""
    reason = f"no numbers of system calls are known for {platform.machine()}"
    if numbers is not None:
        # It gets as far as the socket that is not there.
        done = subprocess.run(
            [sys.executable, "-c", _INSTALL, "/nowhere", ",".join(map(str, numbers))],
            capture_output=True,
            text=True,
            check=False,
        )
        if "FileNotFoundError" in done.stderr:
            return
        reason = f"this test watches what is synced by seccomp: {done.stderr.strip()}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
