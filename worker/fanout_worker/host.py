"""What the containers of one daemon share: launcher, guardian, clock tick, and their orphans."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fanout.protocol import messages as m
from fanout_worker import guardian, process
from fanout_worker.launcher import Launcher
from fanout_worker.leftovers import Leftovers

#: While leases are active, rings are looked at and time limits are checked this often. The ring
#: has a doorbell; this is for the one time in millions when both sides miss each other.
TICK_INTERVAL_S = 0.02
#: Hooks write back what a model has learnt, or close connections; 30 s is what Modal gives them.
EXIT_GRACE_S = 30.0


class ContainerEvents(Protocol):
    """What containers tell; `worker_state.WorkerState` takes it as it is."""

    def container_started(self, container_id: int, pid: int, start_time_s: float) -> None: ...

    def container_exited(
        self,
        container_id: int,
        reason: str,
        running: list[tuple[int, int]],
        details: dict[str, Any],
        payload: bytes = b"",
    ) -> None: ...

    def lease_outputs(
        self,
        lease_id: int,
        start: int,
        busy_us: int,
        lengths: bytes,
        statuses: bytes,
        blobs: list[tuple[int, list[bytes]]],
        payload: bytes,
    ) -> None: ...

    def lease_items(
        self,
        lease_id: int,
        index: int,
        number: int,
        lengths: bytes,
        blobs: list[tuple[int, list[bytes]]],
        payload: bytes,
    ) -> None: ...

    def lease_waits(self, lease_id: int, upto: int) -> None: ...

    def lease_reclaimed(self, lease_id: int, stop: int) -> None: ...

    def log(self, message: m.ContainerLog) -> None: ...


class Ticking(Protocol):
    """A container, as the tick sees it."""

    pid: int

    @property
    def is_active(self) -> bool: ...

    def tick(self) -> None: ...


@dataclass(slots=True)
class Settings:
    """What a daemon's containers are started with."""

    #: Where blobs are files, and where sources are unpacked.
    blob_folder: str
    sources_folder: str
    #: The unix socket for nested calls; "" where there is none.
    socket_path: str
    #: Containers use the client's interpreter, path, variables and cwd.
    is_embedded: bool
    kill_grace_s: float
    #: Variables of containers on another host than the client's.
    variables: dict[str, str]
    #: The soft limit of open files that containers get; 0: the daemon's own.
    descriptors_max: int = 0
    #: How long a container of a class may take to leave, as its exit hooks run then.
    exit_grace_s: float = EXIT_GRACE_S


class Host:
    """The containers of one daemon.

    Args:
        events: told what containers do.
        changed: called after one or more of these, so that the daemon acts on them.
        is_reaper: the process has no children but these, so that every orphan is one of theirs.
    """

    def __init__(
        self,
        settings: Settings,
        events: ContainerEvents,
        changed: Callable[[], None],
        is_reaper: bool = False,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.events = events
        self.changed = changed
        self.launcher = Launcher()
        self.containers: dict[int, Ticking] = {}
        self.leftovers = Leftovers(is_reaper)
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._guardian_pipe = -1
        process.adopt_orphans(True)

    def watch(self, pid: int) -> None:
        """Have a container's session killed should this daemon die."""
        self.guard()
        with contextlib.suppress(BrokenPipeError):
            os.write(self._guardian_pipe, b"+%d\n" % pid)

    def unwatch(self, pid: int) -> None:
        """The container has died and is about to be waited for: its number will be reused."""
        with contextlib.suppress(OSError):
            os.write(self._guardian_pipe, b"-%d\n" % pid)

    def activate(self) -> None:
        """A container has a lease: begin to tick."""
        if self._timer is None:
            self._timer = self.loop.call_later(TICK_INTERVAL_S, self._tick)

    def bury(self, pid: int, container_id: int) -> None:
        """End what a dead container has left running."""
        self.leftovers.bury(pid, container_id)
        self.sweep()

    def sweep(self) -> None:
        """Kill and reap orphans. They are our children, as this process adopts them."""
        known = {container.pid for container in self.containers.values()}
        known |= self.launcher.pids
        if self._guardian is not None:
            known.add(self._guardian.pid)
        is_alone = not self.containers
        delay_s = self.leftovers.sweep(known, is_alone)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._sweep_timer = self.loop.call_later(delay_s, self.sweep) if delay_s else None

    def close(self) -> None:
        """After the last container has ended."""
        if self._timer is not None:
            self._timer.cancel()
        self.launcher.close()
        if self._guardian is not None:
            os.close(self._guardian_pipe)
            # It ends what is still there.
            self._guardian.wait()
        self.sweep()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        process.adopt_orphans(False)

    def _tick(self) -> None:
        self._timer = None
        for container in list(self.containers.values()):
            container.tick()
        if any(container.is_active for container in self.containers.values()):
            self.activate()

    def guard(self) -> None:
        """Start the guardian, if there is none: before the first template, as it makes what that
        is put into. The guardian also removes the socket's folder."""
        if self._guardian is not None:
            return
        self.leftovers.open()
        self.launcher.group = self.leftovers.group
        reader, self._guardian_pipe = os.pipe()
        folder = os.path.dirname(self.settings.socket_path)
        self._guardian = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                guardian.__file__,
                str(reader),
                folder,
                self.leftovers.mark,
                str(self.leftovers.group or ""),
            ],  # fmt: skip
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[reader],
            start_new_session=True,
            cwd="/",
        )
        os.close(reader)
