"""Kills the containers of a daemon that was killed, and what they started.

The kernel kills a container when its daemon dies, but not the container's own children. So each
daemon has this process beside it, which does nothing but read a pipe: "+pid" when a container
starts, "-pid" before one is waited for. The pipe ends when the daemon does, however that happens.

It is run as a file, by a bare interpreter, and imports almost nothing: it lives as long as the
daemon and should cost little. What left its session with `setsid` escapes it.
"""

from __future__ import annotations

import os
import signal
import sys


def kill_session(pid: int) -> bool:
    """SIGKILL the members of a session. Returns whether there were any."""
    is_found = False
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.getsid(int(name)) == pid:
                os.kill(int(name), signal.SIGKILL)
                is_found = True
        except OSError:
            continue
    return is_found


def main(descriptor: int, folder: str) -> None:
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
    for pid in pids:
        # A dying parent may have forked once more; two rounds see to that.
        for _ in range(3):
            if not kill_session(pid):
                break
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
    main(int(sys.argv[1]), sys.argv[2])
