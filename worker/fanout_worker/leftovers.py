"""What dead containers have left running, found and killed.

A process can leave its group and its session, and by a double fork its parent. So what a container
leaves is searched for among the daemon's orphans: by session, and by the container's mark, which
its forks have in their memory and its programs in their variables. Once no container is left, all
that is found is a dead one's.

Where the worker may make a control group (version 2 of them, as root or in a folder that was given
to the user), templates are in one, and so is all that comes from them: nothing can leave that, and
the kernel kills all that is in it when the daemon was killed. There is one for all containers and
not one for each, as to enter one can take the kernel 20 ms, three times what a container takes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path

from fanout_worker import guardian, process

logger = logging.getLogger("fanout.worker")


def mark_of(container_id: int) -> str:
    """By which what a container of this daemon starts is known; see `guardian.is_marked`."""
    return f"{guardian.mark_of(os.getpid())}{container_id}-"


def make_group() -> Path | None:
    """A control group for the containers of this daemon, None where there can be none."""
    folder = _own_group()
    if folder is None:
        return None
    made = folder / f"fanout-worker-{os.getpid()}"
    try:
        made.mkdir(exist_ok=True)
    except OSError as error:
        logger.info("= no control groups for containers: %s", error)
        return None
    if not os.access(made / "cgroup.kill", os.W_OK):
        logger.info("= no control groups for containers: this kernel cannot kill one")
        with contextlib.suppress(OSError):
            made.rmdir()
        return None
    return made


def _own_group() -> Path | None:
    """The folder of this process's control group of version 2, None if there is none to be seen."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    own = [line[3:] for line in groups if line.startswith("0::")]
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        if own and rest.startswith("cgroup2 "):
            root, mount_point = fields.split(" ")[3:5]
            if not own[0].startswith(root):
                continue
            return Path(mount_point, os.path.relpath(own[0], root))
    return None


class Leftovers:
    """Of the containers of one daemon.

    Args:
        is_reaper: the process has no children but containers and what is known, so that every
            other child is an orphan, and to be waited for.
    """

    def __init__(self, is_reaper: bool) -> None:
        self.group: Path | None = None
        self._is_reaper = is_reaper
        # Orphans of others come to the first process of a system (of a Docker container, say), and
        # to one that a script has become by `exec` after it started something else.
        self._has_only_ours = is_reaper and os.getpid() != 1 and not process.children()
        self._sessions: set[int] = set()
        self._marks: list[bytes] = []
        # What has died shows no mark any more, and is to be waited for.
        self._killed: set[int] = set()

    def open(self) -> None:
        """Make what templates are put into."""
        self.group = make_group()

    def bury(self, pid: int, container_id: int) -> None:
        """This container is dead, so what it started has to go."""
        self._sessions.add(pid)
        self._marks.append(mark_of(container_id).encode())

    def sweep(self, known: set[int], is_alone: bool) -> bool:
        """Kill what is left of the dead, and reap what has died. Returns whether to come again.

        Args:
            known: children of this process that are not orphans.
            is_alone: no container lives or is about to, so every orphan is one of the dead.
        """
        is_left = False
        if is_alone:
            for pid in self._members() - known:
                is_left = True
                self._kill(pid)
        for pid in process.children():
            if pid in known:
                continue
            with contextlib.suppress(OSError):
                is_dead_ones = (
                    (is_alone and self._has_only_ours)
                    or pid in self._killed
                    or self._is_of_dead(pid)
                )
                if is_dead_ones:
                    for number in (*process.descendants(pid), pid):
                        self._kill(number)
                elif not self._is_reaper:
                    continue
                is_gone = os.waitpid(pid, os.WNOHANG)[0] == pid
                is_left = is_left or (is_dead_ones and not is_gone)
        if not is_left:
            self._sessions.clear()
            self._marks.clear()
            self._killed.clear()
        return is_left

    def _members(self) -> set[int]:
        """Who is in the control group: templates and all that comes from them."""
        if self.group is None:
            return set()
        try:
            return set(map(int, (self.group / "cgroup.procs").read_text().split()))
        except OSError:
            return set()

    def _kill(self, pid: int) -> None:
        self._killed.add(pid)
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)

    def _is_of_dead(self, pid: int) -> bool:
        if not self._marks:
            return False
        return os.getsid(pid) in self._sessions or guardian.is_marked(pid, self._marks)
