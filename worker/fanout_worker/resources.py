"""What this host has to give: cores and memory, as far as this process may use them."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

#: cgroup v1 writes "no limit" as a number near the largest one.
_UNLIMITED_BYTES = 1 << 60


def cpu_count(cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores: the affinity mask, or the cgroup's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    quotas = [_quota(folder) for folder in _folders(cgroups, "cpu")]
    return min([cores, *(quota for quota in quotas if quota is not None)])


def memory_mib(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory in MiB: the host's, or the cgroup's limit if that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [_limit(folder) for folder in _folders(cgroups, "memory")]
    return min([total, *(limit for limit in limits if limit is not None)]) >> 20


def oom_kill_count(
    cgroups: Path = Path("/sys/fs/cgroup"), vmstat: Path = Path("/proc/vmstat")
) -> int | None:
    """How many processes the kernel has killed for want of memory: in this cgroup, or on the host
    where the cgroup does not count them. None if neither is known."""
    folder = next(_folders(cgroups, "memory"), cgroups)
    for path in (folder / "memory.events", folder / "memory.oom_control", vmstat):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return None


def _folders(cgroups: Path, controller: str) -> Iterator[Path]:
    """The cgroup folders of this process for a controller, its own first: each of them limits."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroups
        elif controller in controllers.split(","):
            root = cgroups / controller
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            yield folder
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent


def _quota(folder: Path) -> float | None:
    quota, period = "max", "100000"
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        elif (folder / "cpu.cfs_quota_us").exists():
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    if quota in ("max", "-1") or int(period) <= 0:
        return None
    return int(quota) / int(period)


def _limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        if text != "max" and int(text) < _UNLIMITED_BYTES:
            return int(text)
    return None


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may at most: a container takes six. Returns what
    the limit was before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft
