"""Start a daemon that belongs to nobody: ``python -I -S launcher.py OUTPUT COMMAND...``

A daemon must not be a child of the client that happened to start it (the client would owe it a
wait, and would see a zombie when it leaves), must not share the client's terminal, and must not
hold one descriptor of it: ``$(python script.py)`` waits for the last holder of the pipe. So a
short-lived process of its own forks, lets the parent print the daemon's pid and exit, and makes
the child clean before it becomes the daemon. A fork in the client itself would be wrong, since
clients have threads.

The file runs as a script with nothing but the standard library, and without site, because it
stands in the way of every cold start.
"""

from __future__ import annotations

import os
import signal
import sys

#: Descriptors above this are closed by the one who runs this script; the rest is closed here, for
#: one that runs it by hand.
DESCRIPTOR_MAX = 1024


def main(arguments: list[str]) -> None:
    """Fork, print the child's pid, and become the command in the child."""
    output, *command = arguments
    pid = os.fork()
    if pid:
        os.write(1, b"%d\n" % pid)
        os._exit(0)
    # A session of its own: no terminal, and no signal that is meant for the client's group.
    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    _reset_signals()
    _redirect(output)
    os.execv(command[0], command)


def _reset_signals() -> None:
    """Ignored and blocked signals survive an exec: `nohup` would make a daemon deaf."""
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _redirect(output: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    # Truncated: the file tells why this start failed, not an earlier one.
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, DESCRIPTOR_MAX)


if __name__ == "__main__":
    main(sys.argv[1:])
