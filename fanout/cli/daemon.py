"""`fanout scheduler` and `fanout worker`: become a daemon in the foreground.

Both replace this process by the daemon's own, so that signals, exit codes and `ps` are the
daemon's. The worker's join string holds a secret; it travels in the environment, because a command
line is visible to every user of the host.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Annotated

import typer

from fanout.client.home import make_folder, state_folder
from fanout.client.process import daemon_path
from fanout.exceptions import InvalidError
from fanout.protocol.join import JoinString

#: A port that stays the same keeps the join strings valid over a restart.
PORT_DEFAULT = 7337


def scheduler(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but loopback is served with TLS.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = PORT_DEFAULT,
    home: Annotated[
        str, typer.Option(help="Folder of its state; one of its own in FANOUT_HOME by default.")
    ] = "",
) -> None:
    """Run a scheduler for several hosts; prints the join strings for clients and workers."""
    folder = make_folder(os.path.abspath(home) if home else os.path.join(state_folder(), "serve"))
    _become("fanout_scheduler", ["--home", folder, "--host", host, "--port", str(port)], {})


def worker(
    join: Annotated[
        str,
        typer.Argument(
            envvar="FANOUT_WORKER_JOIN",
            help="Join string for workers, as `fanout scheduler` printed it.",
            show_envvar=True,
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of this worker; the host's by default.")] = "",
    cpu: Annotated[
        float | None,
        typer.Option(min=0.01, help="Cores to give out; all that this process may use by default."),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(min=1, help="Memory to give out, in MiB; all by default.")
    ] = None,
    home: Annotated[
        str, typer.Option(help="Folder of its state; one of its own in FANOUT_HOME by default.")
    ] = "",
) -> None:
    """Run a worker on this host for a scheduler elsewhere."""
    parsed = JoinString.parse(join)
    if parsed.role != "worker":
        raise InvalidError(
            f"this is the join string for a {parsed.role}; a worker needs the one that "
            f"`fanout scheduler` prints for workers"
        )
    if not home:
        # Two workers on one host, for two schedulers or under two names, must not share files.
        key = f"{parsed.address} {name}".encode()
        home = os.path.join(state_folder(), f"worker-{hashlib.sha256(key).hexdigest()[:8]}")
    arguments = ["--home", make_folder(os.path.abspath(home))]
    if name:
        arguments += ["--name", name]
    if cpu is not None:
        arguments += ["--cpu", str(cpu)]
    if memory is not None:
        arguments += ["--memory", str(memory)]
    _become("fanout_worker", arguments, {"FANOUT_WORKER_JOIN": join})


def _become(module: str, arguments: list[str], variables: dict[str, str]) -> None:
    environment = os.environ | variables
    path = daemon_path()
    if path:
        rest = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*path, rest] if rest else path)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *arguments], environment)
