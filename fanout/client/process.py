"""Starting and ending the embedded daemons as processes.

A daemon sees little of the client that starts it: other clients will use it, so nothing of one
may reach another through it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time

from fanout import config
from fanout.client.home import Daemon, is_alive, wait_until
from fanout.exceptions import ConnectionError

#: The launcher has to start an interpreter and to fork, no more.
LAUNCH_TIMEOUT_S = 15.0
#: Signals to a daemon that has no work any more, and how long each may take to have its effect. One
#: whose scheduler has gone leaves by itself.
_STEPS_TO_END = ((0, 2.0), (signal.SIGTERM, config.KILL_GRACE_S + 2.0), (signal.SIGKILL, 5.0))

#: What a daemon sees of the starting client's environment: enough to find programs and to write
#: text. `LD_LIBRARY_PATH` is here because some interpreters cannot load themselves without it.
_VARIABLES = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH"}
)
_VARIABLE_PREFIXES = ("LC_", "FANOUT_")
#: A daemon gets these from nobody's environment: they say whom to connect to.
_VARIABLES_DROPPED = frozenset({"FANOUT_URL", "FANOUT_WORKER_JOIN"})
#: Packages that the daemons import. Where the interpreter would not find one by itself, the folder
#: from which the client has it goes on the daemon's path.
_PACKAGES = (
    "fanout", "fanout_scheduler", "fanout_worker",
    "msgpack", "cloudpickle", "uvloop", "cryptography",
)  # fmt: skip


def launch(command: list[str], output: str, variables: dict[str, str]) -> int:
    """Start a daemon that is no child of this process and shares nothing with it.

    Args:
        command: program, by absolute path, and arguments.
        output: file for its stdout and stderr; emptied.
        variables: environment variables on top of the few that daemons get.

    Returns:
        Its pid.

    Raises:
        ConnectionError: no process could be started.
    """
    import subprocess

    launcher = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launcher.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", launcher, output, *command],
            env=daemon_environment() | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            check=True,
            timeout=LAUNCH_TIMEOUT_S,
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or b""
        raise ConnectionError(
            f"{sys.executable or 'this interpreter'} could not start a fanout daemon: {error} "
            f"{detail.decode('utf-8', 'replace').strip()}"
        ) from error


def daemon_environment() -> dict[str, str]:
    """The environment variables of a daemon: scrubbed, so that nothing of one client reaches the
    containers of another through it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES))
        and name not in _VARIABLES_DROPPED
    }
    path = daemon_path()
    if path:
        kept["PYTHONPATH"] = os.pathsep.join(path)
    return kept


def daemon_path() -> list[str]:
    """Folders that the daemons need on `PYTHONPATH`; none where everything is installed."""
    import importlib.util
    import site
    import sysconfig

    known = {os.path.realpath(path) for path in site.getsitepackages()}
    known |= {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    if site.ENABLE_USER_SITE:
        known.add(os.path.realpath(site.getusersitepackages()))
    folders: list[str] = []
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            folder = os.path.dirname(os.path.dirname(os.path.abspath(spec.origin)))
        else:
            folder = _checkout_folder(package)
        if folder and folder not in folders and os.path.realpath(folder) not in known:
            folders.append(folder)
    return folders


def _checkout_folder(package: str) -> str:
    """Where a daemon's package is in a source tree of which only the root is on the path."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    folder = os.path.join(root, package.removeprefix("fanout_"))
    return folder if os.path.isdir(os.path.join(folder, package)) else ""


def end_daemon(daemon: Daemon) -> None:
    """Have a daemon leave: by its own decision, else asked, else by force. Waits for its end."""
    for number, patience_s in _STEPS_TO_END:
        if number:
            signal_daemon(daemon, number)
        try:
            wait_gone(daemon, time.monotonic() + patience_s)
        except TimeoutError:
            continue
        return


def wait_gone(daemon: Daemon, deadline: float) -> None:
    """Wait for the end of a daemon.

    Raises:
        TimeoutError: the builtin one; the deadline (monotonic time) came first.
    """
    wait_until(lambda: not is_alive(daemon.pid, daemon.kind), deadline)


def signal_daemon(daemon: Daemon, number: int) -> None:
    """Send a signal to a daemon, if it is there."""
    if not is_alive(daemon.pid, daemon.kind):
        return
    try:
        os.kill(daemon.pid, number)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
