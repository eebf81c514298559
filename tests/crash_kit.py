"""What the tests of crashes run in containers: everything that code can do to its own process.

A *deed* is what goes wrong; a *stage* is when. Each deed is a function of this module, and each
stage a function, a class or a value that does a deed at its time.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fanout
from tests.behaviour_kit import FOREVER_S, wait_for_file

app = fanout.App("crash")
#: For what happens when its run ends.
last = fanout.App("crash at the end")

#: What never ends is stopped after so long. What ends has no limit, as machines may be slow.
TIMEOUT_S = 0.3
#: More than a worker lets through in one second, of text in lines and without.
FLOOD_SIZE_BYTES = 3 << 20
EXIT_CODE = 7


class Oops(Exception):
    """An error of the user's own."""


# --- deeds ----------------------------------------------------------------------------------------


def note_pid(folder: str, name: str, pid: int) -> None:
    """Tell the test of a process that must be gone at the end."""
    with open(os.path.join(folder, "pids"), "a") as file:
        file.write(f"{pid} {name}\n")


def noted(folder: str | Path) -> dict[int, str]:
    """The names of all processes that were noted in the folder."""
    path = Path(folder, "pids")
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(pid): name for pid, name in map(str.split, lines)}


def fork_away(folder: str, name: str, command: list[str]) -> None:
    """Fork twice and leave the session in between; the grandchild runs for ever.

    Args:
        command: what it executes, with no variable at all and no descriptor; [] for nothing, and
            then it goes on as a copy of this process.
    """
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    note_pid(folder, name, os.getpid())
    if command:
        os.closerange(0, 256)
        os.execve(command[0], command, {})
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    threading.Event().wait(FOREVER_S)
    os._exit(0)


#: A program that has left its parent and its session, and shows nothing of where it comes from.
STRANGER = "stranger"
CHILDREN = {"child", "of-a-group", "of-a-session", "fork", STRANGER}


def start_children(folder: str) -> None:
    """Start processes that leave process group, session and parent, each more than the last."""
    sleep = ["/bin/sleep", str(int(FOREVER_S))]
    note_pid(folder, "child", subprocess.Popen(sleep).pid)
    note_pid(folder, "of-a-group", subprocess.Popen(sleep, process_group=0).pid)
    note_pid(folder, "of-a-session", subprocess.Popen(sleep, start_new_session=True).pid)
    fork_away(folder, "fork", [])
    fork_away(folder, STRANGER, sleep)
    # Grandchildren note themselves; only then is it known that they run.
    deadline = time.monotonic() + FOREVER_S
    while len(noted(folder)) % len(CHILDREN):
        assert time.monotonic() < deadline
        os.sched_yield()


def raise_error(folder: str) -> None:
    raise Oops("as planned")


def leave_by_sys_exit(folder: str) -> None:
    sys.exit(EXIT_CODE)


def leave_by_os_exit(folder: str) -> None:
    os._exit(EXIT_CODE)


def fault(folder: str) -> None:
    ctypes.string_at(0)


def exceed_own_memory_limit(folder: str) -> None:
    """The limit stays, so what runs next in this process has no more than there was."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    bytearray(1 << 30)


def be_killed(folder: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def loop_in_c(folder: str) -> None:
    """No instruction of Python's comes between, so no exception can be raised in it."""
    all(itertools.repeat(1))


def match_for_ever(folder: str) -> None:
    """Endless too; but `re` looks for signals."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def die_with_children(folder: str) -> None:
    start_children(folder)
    os._exit(EXIT_CODE)


def flood(folder: str) -> None:
    for _ in range(FLOOD_SIZE_BYTES >> 10):
        sys.stdout.write("x" * 1023 + "\n")
    for _ in range(FLOOD_SIZE_BYTES >> 16):
        os.write(2, b"y" * (1 << 16))


def close_stdio(folder: str) -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def replace_stdio(folder: str) -> None:
    file = open(os.path.join(folder, "stdout"), "w")  # noqa: SIM115 - stays as standard output
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = file
    del sys.stderr
    sys.stdin = None


def close_all_descriptors(folder: str) -> None:
    """As daemons do it at their start."""
    os.closerange(0, 1024)


def change_folder(folder: str) -> None:
    """To one that is gone, in which not even `os.getcwd` works."""
    gone = Path(folder, f"gone-{os.getpid()}")
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    os.umask(0o777)


def change_signals(folder: str) -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def hang_without_signals(folder: str) -> None:
    """What would interrupt it does not reach it any more."""
    change_signals(folder)
    threading.Event().wait(FOREVER_S)


def leave_threads(folder: str) -> None:
    """One of each kind, which end never, and one that keeps printing."""
    for is_daemon in (True, False):
        threading.Thread(target=threading.Event().wait, daemon=is_daemon).start()
    threading.Thread(target=_chatter, daemon=True).start()


def _chatter() -> None:
    while True:
        sys.stdout.write("and another thing\n")
        threading.Event().wait(0.001)


DEEDS: dict[str, Callable[[str], None]] = {
    "exception": raise_error,
    "sys.exit": leave_by_sys_exit,
    "os._exit": leave_by_os_exit,
    "SIGSEGV": fault,
    "memory-limit": exceed_own_memory_limit,
    "SIGKILL": be_killed,
    "c-loop": loop_in_c,
    "re-match": match_for_ever,
    "children": start_children,
    "children-and-death": die_with_children,
    "flood": flood,
    "stdio-closed": close_stdio,
    "stdio-replaced": replace_stdio,
    "all-closed": close_all_descriptors,
    "cwd-gone": change_folder,
    "signals-changed": change_signals,
    "signals-changed-and-hang": hang_without_signals,
    "threads-left": leave_threads,
}


def do(deed: str, folder: str) -> str:
    """Do it. Returns its name, where it returns."""
    DEEDS[deed](folder)
    return deed


@dataclass
class Bomb:
    """A value that does a deed when it is pickled, or when it is unpickled."""

    deed: str
    folder: str
    when: str

    def __reduce__(self) -> tuple[Any, ...]:
        if self.when == "pickle":
            return str, (do(self.deed, self.folder),)
        return do, (self.deed, self.folder)


# --- stages ---------------------------------------------------------------------------------------


@app.function(max_containers=2)
def run(x: Any, deed: str = "", folder: str = "") -> Any:
    """The input that is the name of the deed does it."""
    return do(deed, folder) if x == deed else x


@app.function(max_containers=2)
def give(x: Any, deed: str = "", folder: str = "") -> Any:
    return Bomb(deed, folder, "pickle") if x == deed else x


@app.function(max_containers=2)
def stream(x: Any, deed: str = "", folder: str = "") -> Iterator[Any]:
    """Three items; a bad one goes wrong between its first and its second."""
    yield x, 0
    if x == deed:
        do(deed, folder)
    yield x, 1
    yield x, 2


@last.cls(max_containers=2)
class Hooked:
    """Its hooks do a deed; its method nothing."""

    at_enter: str = fanout.parameter(default="")
    at_exit: str = fanout.parameter(default="")
    folder: str = fanout.parameter(default="")

    @fanout.enter()
    def enter(self) -> None:
        if self.at_enter:
            do(self.at_enter, self.folder)

    @fanout.exit()
    def exit(self) -> None:
        if self.at_exit:
            Path(self.folder, f"exit-{os.getpid()}").touch()
            do(self.at_exit, self.folder)

    @fanout.method()
    def run(self, x: int) -> int:
        return x


# --- what must go on ------------------------------------------------------------------------------


@app.function()
def neighbour(x: int) -> int:
    return x


@app.function()
def meet(x: int, folder: str, count: int) -> int:
    """Ends when `count` inputs run at the same time, so there must be a core for each."""
    Path(folder, f"met-{x}").touch()
    for other in range(count):
        wait_for_file(os.path.join(folder, f"met-{other}"))
    return x


# --- losses ---------------------------------------------------------------------------------------


def note_run(folder: str, x: int) -> int:
    """Note that an input runs, in one write as others do so too. Returns how often it has."""
    path = os.path.join(folder, "runs")
    with open(path, "ab", buffering=0) as file:
        file.write(b"%d\n" % x)
    return runs(folder).count(x)


def runs(folder: str | Path) -> list[int]:
    """The inputs that have run, in this order."""
    path = Path(folder, "runs")
    return list(map(int, path.read_bytes().split())) if path.exists() else []


@app.function(max_containers=1)
def fault_at(x: int, bad: int, folder: str, times: int = 99) -> int:
    """The bad input ends its process, as often as is said."""
    with open(os.path.join(folder, "runs"), "ab", buffering=0) as file:
        file.write(b"%d\n" % x)
    if x == bad and runs(folder).count(x) <= times:
        fault(folder)
    return x


@app.function()
def nap(x: int, seconds: float) -> tuple[int, int]:
    time.sleep(seconds)
    return x, os.getpid()


@app.function()
def hang_at_first(x: int, bad: int, folder: str) -> int:
    """The first run of the bad input never ends; it notes that it has begun and was stopped."""
    if note_run(folder, x) == 1 and x == bad:
        path = Path(folder, "begun")
        path.with_suffix(".part").write_text(str(os.getpid()))
        path.with_suffix(".part").rename(path)
        try:
            time.sleep(FOREVER_S)
        finally:
            Path(folder, "stopped").touch()
    return x


@app.function(max_containers=1)
def clean_up(seconds: float, folder: str) -> int:
    """Takes so long to stop that it says it has; with no time to take, it says where it runs."""
    if seconds:
        try:
            time.sleep(FOREVER_S)
        finally:
            # Not in one sleep, as work is not.
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                time.sleep(0.01)
            Path(folder, "saved").touch()
    return os.getpid()


@app.function()
def start_children_and_wait(folder: str) -> None:
    start_children(folder)
    Path(folder, "begun").write_text(str(os.getpid()))
    time.sleep(FOREVER_S)
