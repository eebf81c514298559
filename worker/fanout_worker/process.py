"""What Linux offers beyond `os`: who dies with whom, who adopts orphans, who runs first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

#: User code gives way to the daemon on a busy host, and to everything when memory runs out.
CONTAINER_NICE = 5
CONTAINER_OOM_SCORE = 500

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}) failed: {os.strerror(error)}")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent, which is `parent_pid`, dies."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        # It died before the kernel knew.
        os._exit(1)


def adopt_orphans(is_adopting: bool) -> None:
    """Become, or cease to be, the parent of descendants whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(is_adopting))


def lower_priority() -> None:
    """Best effort: a host may forbid either."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + CONTAINER_NICE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        score = int(file.read()) + CONTAINER_OOM_SCORE
        file.seek(0)
        file.write(str(min(score, 1000)))


def children(pid: int | str = "self") -> list[int]:
    """The pids of a process's children, adopted ones included; [] where the kernel does not say."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{pid}/task/{thread}/children") as file,
            ):
                found += [int(number) for number in file.read().split()]
    return found


def cpu_time_ms(pid: int) -> int:
    """Milliseconds of processor time that a process and its descendants have used, those that
    have ended and were waited for included; 0 when it is gone."""
    return sum(map(_own_cpu_time_ms, [pid, *descendants(pid)]))


def _own_cpu_time_ms(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        # The name, in brackets, may hold anything. Behind it come state and 10 other fields, then
        # user and system time, and the same of children that were waited for: see proc(5).
        fields = file.read().rpartition(b")")[2].split()
        ticks = sum(map(int, fields[11:15]))
        return ticks * 1000 // _TICKS_PER_S
    return 0


def descendants(pid: int) -> list[int]:
    """The pids of all processes below one, parents first; [] where the kernel does not say."""
    found = [pid]
    for parent in found:
        # What is added while this goes on is looked at too.
        found += children(parent)
    return found[1:]


def put_into_group(pid: int, folder: Path) -> None:
    """Have a process, and all that it will start, be in a control group. The kernel may take its
    time."""
    with contextlib.suppress(ProcessLookupError):
        (folder / "cgroup.procs").write_text(str(pid))


def kill_group(pid: int) -> None:
    """SIGKILL a container and all that is in its process group. It must not have been waited for,
    else its number may be somebody else's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
