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
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from fanout_worker import guardian, process

#: A dead container is remembered so long, and on while there is something to reap: what it left may
#: come to this process late, when its own parent dies.
_GRAVE_S = 1.0
#: But no longer than that, if it is the orphans of others that are reaped all the time.
_GRAVE_S_MAX = 30.0
#: Between two sweeps: at first, and at most, where something cannot be killed.
_INTERVAL_S = 0.05
_INTERVAL_S_MAX = 4.0
#: Rounds of a sweep end after this, as the daemon's loop waits for them.
_ROUNDS_TIMEOUT_S = 0.01


def make_group(name: str) -> Path:
    """A control group for the containers of this daemon.

    Raises:
        OSError: there can be none; says why.
    """
    folder = _own_group()
    if folder is None:
        raise OSError("none of version 2 can be seen here")
    made = folder / f"fanout-worker-{name}"
    made.mkdir()
    if not os.access(made / "cgroup.kill", os.W_OK):
        with contextlib.suppress(OSError):
            made.rmdir()
        raise OSError("this kernel cannot kill one")
    return made


def _own_group() -> Path | None:
    """The folder of this process's control group of version 2, None if there is none to be seen."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    own = [Path(line[3:]) for line in groups if line.startswith("0::")]
    return _folder_of(own[0], mounts) if own else None


def _folder_of(group: Path, mounts: list[str]) -> Path | None:
    """Where a control group is seen, by the lines of `/proc/self/mountinfo`."""
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            root, mount_point = fields.split(" ")[3:5]
            if group.is_relative_to(root) and ".." not in group.parts:
                return Path(mount_point) / group.relative_to(root)
    return None


@dataclass(slots=True)
class _Grave:
    """A dead container, and by what that which it left is known."""

    session: int
    mark: bytes
    buried_at: float


class Leftovers:
    """Of the containers of one daemon.

    Args:
        is_reaper: the process has no children but containers and what is known, so that every
            other child is an orphan, and to be waited for.
    """

    def __init__(self, is_reaper: bool) -> None:
        # The number alone can be another daemon's: of another namespace that shares `/proc` or the
        # control group with this one.
        self._name = f"{os.getpid()}-{os.urandom(8).hex()}"
        self.group: Path | None = None
        #: Why there is none.
        self.group_error: OSError | None = None
        self._is_reaper = is_reaper
        # Orphans of others come to the first process of a system (of a Docker container, say), and
        # to one that a script has become by `exec` after it started something else.
        self._has_only_ours = is_reaper and os.getpid() != 1 and not process.children()
        self._graves: list[_Grave] = []
        # What has died shows no mark any more, and is to be waited for.
        self._killed: set[int] = set()
        self._interval_s = _INTERVAL_S

    def open(self) -> None:
        """Make what templates are put into, if that can be."""
        try:
            self.group = make_group(self._name)
        except OSError as error:
            self.group_error = error

    @property
    def mark(self) -> str:
        """What the marks of all containers of this daemon begin with."""
        return f"fanout-container-{self._name}-"

    def mark_of(self, container_id: int) -> str:
        """By which what a container of this daemon starts is known; see `guardian.is_marked`."""
        return f"{self.mark}{container_id}-"

    def bury(self, pid: int, container_id: int) -> None:
        """This container is dead, so what it started has to go."""
        mark = self.mark_of(container_id).encode()
        self._interval_s = _INTERVAL_S
        self._graves.append(_Grave(pid, mark, time.monotonic()))

    def sweep(self, known: set[int], is_alone: bool) -> float:
        """Kill what is left of the dead, and reap what has died. Returns in how many seconds to
        come again; 0.0 for not at all.

        Who forks and exits may be dead when it is looked at, and show nothing of where it came
        from; what it forked is there by then, and found by another round. So there are rounds
        while there is something to kill or to reap.

        Args:
            known: children of this process that are not orphans.
            is_alone: no container lives or is about to, so every orphan is one of the dead.
        """
        start = now = time.monotonic()
        is_changed = False
        while now < start + _ROUNDS_TIMEOUT_S:
            if not self._sweep_round(known, is_alone):
                break
            is_changed = True
            now = time.monotonic()
        self._forget(is_changed, start)
        if not (is_changed or self._graves or self._killed):
            return 0.0
        delay_s = _INTERVAL_S if is_changed else self._interval_s
        self._interval_s = min(2 * delay_s, _INTERVAL_S_MAX)
        return delay_s

    def _sweep_round(self, known: set[int], is_alone: bool) -> bool:
        """Returns whether anything was killed or reaped that another round may follow from."""
        is_changed = False
        if is_alone:
            self._end_subgroups()
            for pid in self._members() - known:
                is_changed |= self._kill(pid)
        # The newest first: it is the one that can be expected to live still.
        for pid in reversed(process.children()):
            if pid in known:
                continue
            with contextlib.suppress(OSError):
                if self._is_reaper and self._reap(pid):
                    is_changed = True
                elif (is_alone and self._has_only_ours) or self._is_of_dead(pid):
                    # Itself before those below it, lest it starts more of them.
                    for number in (pid, *process.descendants(pid)):
                        is_changed |= self._kill(number)
                    is_changed |= self._reap(pid)
        return is_changed

    def _forget(self, is_changed: bool, now: float) -> None:
        """Forget who is gone, and the dead whose leftovers can be expected to be."""
        self._killed = {pid for pid in self._killed if os.path.exists(f"/proc/{pid}")}
        age_s = _GRAVE_S_MAX if is_changed or self._killed else _GRAVE_S
        self._graves = [grave for grave in self._graves if now < grave.buried_at + age_s]

    def _end_subgroups(self) -> None:
        """End the groups that user code has made in ours: no template is in one."""
        if self.group is None:
            return
        with contextlib.suppress(OSError):
            for folder in [entry.path for entry in os.scandir(self.group) if entry.is_dir()]:
                Path(folder, "cgroup.kill").write_text("1")
                guardian.remove_group(folder)

    def _members(self) -> set[int]:
        """Who is in the control group: templates and all that comes from them."""
        if self.group is None:
            return set()
        try:
            pids = set(map(int, (self.group / "cgroup.procs").read_text().split()))
        except OSError:
            return set()
        # 0 is one whom this namespace does not see; to a signal it would mean our own group.
        return pids - {0}

    def _kill(self, pid: int) -> bool:
        """Returns whether it is the first time."""
        is_first = pid not in self._killed
        self._killed.add(pid)
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        return is_first

    def _reap(self, pid: int) -> bool:
        is_gone = os.waitpid(pid, os.WNOHANG)[0] == pid
        if is_gone:
            self._killed.discard(pid)
        return is_gone

    def _is_of_dead(self, pid: int) -> bool:
        if pid in self._killed:
            return True
        if not self._graves:
            return False
        session = os.getsid(pid)
        # The leader was waited for: a leader of that number now is somebody else.
        if session != pid and any(grave.session == session for grave in self._graves):
            return True
        return guardian.is_marked(pid, [grave.mark for grave in self._graves])
