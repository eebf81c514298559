"""Kills the containers of a daemon that was killed, and what they started.

The kernel kills a container when its daemon dies, but not the container's own children. So each
daemon has this process beside it, which does nothing but read a pipe: "+pid" when a container
starts, "-pid" before one is waited for. The pipe ends when the daemon does, however that happens.
Where containers are in a control group (see `leftovers.py`) none escapes; elsewhere who left its
session is looked for by its mark, and one that has no mark any more escapes.

It is run as a file, by a bare interpreter, and imports almost nothing: it lives as long as the
daemon and should cost little.
"""

from __future__ import annotations

import os
import signal
import sys
import time

#: How long who forks on and leaves its sessions is looked for.
_ROUNDS_TIMEOUT_S = 1.0
#: Those that were killed die at once, but for one that the kernel keeps waiting for a disk.
_EMPTY_TIMEOUT_S = 5.0
_EMPTY_INTERVAL_S = 0.005


def is_marked(pid: int, marks: list[bytes]) -> bool:
    """Whether a process shows one of these marks. The memory that a container shares with its
    daemon is named by its mark, and a fork has that too; a program has the mark in its
    variables."""
    for name in ("environ", "maps"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                text = file.read()
        except OSError:
            continue
        if any(mark in text for mark in marks):
            return True
    return False


def kill_all(sessions: set[int], marks: list[bytes]) -> None:
    """SIGKILL the members of sessions, and the marked.

    One that forks on is dead when it is looked at, and only its successor is left. So there are
    rounds while there are processes that the one before has not seen.
    """
    deadline = time.monotonic() + _ROUNDS_TIMEOUT_S
    seen: set[int] = set()
    while True:
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}
        if pids <= seen or time.monotonic() > deadline:
            return
        # Those first that were not there before, as who forks on lives for a moment only.
        for pid in [*(pids - seen), *(pids & seen)]:
            try:
                if os.getsid(pid) in sessions or is_marked(pid, marks):
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        seen = pids


def end_group(folder: str) -> None:
    """Kill all that is in a control group, and remove it with the groups that user code has made
    in it."""
    try:
        with open(os.path.join(folder, "cgroup.kill"), "w") as file:
            file.write("1")
    except OSError:
        return
    deadline = time.monotonic() + _EMPTY_TIMEOUT_S
    while not remove_group(folder) and time.monotonic() < deadline:
        # Not all have died yet.
        time.sleep(_EMPTY_INTERVAL_S)


def remove_group(folder: str) -> bool:
    """Remove a control group and those below it. Returns whether it is gone; a group that somebody
    is in stays."""
    for path, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(path)
        except OSError:
            continue
    return not os.path.exists(folder)


def main(descriptor: int, folder: str, mark: str, group: str) -> None:
    """Wait for the end of the daemon.

    Args:
        descriptor: of the pipe.
        folder: of the daemon's unix socket; "" if it has none.
        mark: what the marks of its containers begin with.
        group: the control group that its containers are in; "" if they are in none.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pids: set[int] = set()
    rest = b""
    while True:
        data = os.read(descriptor, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            pid = int(line[1:])
            if line[:1] == b"+":
                pids.add(pid)
            else:
                pids.discard(pid)
    if group:
        end_group(group)
    if pids:
        kill_all(pids, [mark.encode()])
    remove_folder(folder)


def remove_folder(folder: str) -> None:
    """Remove the folder of the daemon's unix socket, if the daemon could not."""
    if folder:
        try:
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)
        except OSError:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5])
