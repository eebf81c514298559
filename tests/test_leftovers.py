"""What dead containers leave running is found, also if it forks on and exits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanout_worker import guardian, leftovers
from tests.conftest import TIMEOUT_FACTOR, poll_until
from tests.worker_kit import containers, lease_of

#: A daemon of its own: whoever adopts and reaps orphans cannot be the process that runs tests.
PREFACE = """
import os, signal, subprocess, sys, time
from fanout_worker import guardian, leftovers, process

def start_dead(code, mark):
    variables = dict(os.environ, FANOUT_CONTAINER_MARK=mark)
    command = [sys.executable, "-c", "import os, time, sys\\n" + code]
    return subprocess.Popen(command, env=variables, start_new_session=True, stdout=subprocess.PIPE)

def is_alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

def until(predicate, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, "in time"
        os.sched_yield()

FORK_ON = '''
end = time.monotonic() + 20
while time.monotonic() < end:
    if os.fork(): os._exit(0)
    os.setsid()
'''
"""


def run_daemon(code: str, timeout_s: float = 30.0) -> None:
    """Execute code as a daemon would that has no other children."""
    script = textwrap.dedent(PREFACE) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout_s * TIMEOUT_FACTOR,
    )
    assert done.returncode == 0, done.stderr


def test_the_child_of_one_that_was_dead_already_when_it_was_looked_at_is_found() -> None:
    run_daemon("""
        process.adopt_orphans(True)
        left = leftovers.Leftovers(True)
        mark = left.mark_of(7)
        code = '''
        first = os.fork()
        if first == 0:
            os.setsid()
            second = os.fork()
            if second == 0:
                os.setsid()
                time.sleep(60)
            print(os.getpid(), second, flush=True)
            os._exit(0)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        '''
        import textwrap
        dead = start_dead(textwrap.dedent(code), mark)
        first, second = map(int, dead.stdout.readline().split())
        dead.wait()
        until(lambda: {first, second} <= set(process.children()), 5)
        # It was alive when the children were asked for, and is not when it is looked at.
        shown = [[first]]
        really = process.children
        process.children = lambda pid="self": shown.pop() if shown else really(pid)
        left.bury(dead.pid, 7)
        # A container lives, so not all orphans are of the dead one.
        left.sweep(set(), is_alone=False)
        until(lambda: left.sweep(set(), is_alone=False) or not is_alive(second), 5)
        until(lambda: not is_alive(second), 5)
    """)


def test_one_that_forks_on_and_on_and_leaves_its_sessions_is_caught() -> None:
    run_daemon("""
        process.adopt_orphans(True)
        left = leftovers.Leftovers(True)
        for number in range(3):
            dead = start_dead(FORK_ON, left.mark_of(number))
            dead.wait()
            left.bury(dead.pid, number)
            while left.sweep(set(), is_alone=False):
                time.sleep(0.01)
            assert process.children() == []
            time.sleep(0.2)
            assert process.children() == []
    """)


def test_without_control_groups_the_guardian_catches_one_that_forks_on() -> None:
    run_daemon("""
        process.adopt_orphans(True)
        left = leftovers.Leftovers(True)
        mark = left.mark_of(7)
        dead = start_dead(FORK_ON, mark)
        dead.wait()
        reader, writer = os.pipe()
        os.write(writer, b"+%d\\n" % dead.pid)
        os.close(writer)
        guardian.main(reader, "", left.mark, "")
        deadline = time.monotonic() + 2
        while process.children():
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            assert time.monotonic() < deadline, process.children()
    """)


def test_a_leader_that_has_the_number_of_a_dead_one_now_is_somebody_else() -> None:
    process = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
    try:
        left = leftovers.Leftovers(is_reaper=False)
        left.bury(process.pid, 1)
        left.sweep(set(), is_alone=False)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_killed_is_looked_at_ever_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", refuse)
    # A program of another user, say, that is in our group.
    (tmp_path / "cgroup.procs").write_text(f"{os.getppid()}\n")
    left = leftovers.Leftovers(is_reaper=False)
    left.group = tmp_path
    delays = [left.sweep(set(), is_alone=True) for _ in range(12)]
    assert delays[0] < 0.1 < 2 < delays[-1] < 10
    assert delays == sorted(delays)
    left.bury(os.getppid(), 1)
    assert left.sweep(set(), is_alone=False) == delays[0]


# --- control groups -------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Path]:
    try:
        made = leftovers.make_group("test")
    except OSError as error:
        pytest.skip(f"no control groups here: {error}")
    yield made
    guardian.end_group(str(made))


def start_in(folder: Path) -> subprocess.Popen[bytes]:
    """Have a group below, with one process in it that has left its session."""
    folder.mkdir(parents=True)
    process = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
    (folder / "cgroup.procs").write_text(str(process.pid))
    return process


def test_a_group_goes_with_those_that_user_code_made_in_it(group: Path) -> None:
    process = start_in(group / "of-user" / "code")
    start = time.monotonic()
    guardian.end_group(str(group))
    assert process.wait() < 0
    assert not group.exists()
    assert time.monotonic() - start < 2 * TIMEOUT_FACTOR


def test_after_the_last_container_nothing_is_left_in_a_group_that_user_code_made(
    group: Path,
) -> None:
    process = start_in(group / "of-user" / "code")
    left = leftovers.Leftovers(is_reaper=False)
    left.group = group
    left.sweep(set(), is_alone=False)
    assert process.poll() is None, "a container lives, which may have started it"
    left.sweep(set(), is_alone=True)
    assert process.wait() < 0
    poll_until(lambda: not left.sweep(set(), is_alone=True), "all is swept")
    assert [path for path in group.iterdir() if path.is_dir()] == []


def test_daemons_of_one_number_share_neither_group_nor_mark() -> None:
    first, second = leftovers.Leftovers(is_reaper=False), leftovers.Leftovers(is_reaper=False)
    try:
        first.open()
        second.open()
        assert first.mark_of(1) != second.mark_of(1)
        assert first.group is None or first.group != second.group
    finally:
        for made in filter(None, (first.group, second.group)):
            made.rmdir()


def test_members_that_cannot_be_seen_from_here_get_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: killed.append(pid))
    (tmp_path / "cgroup.procs").write_text("0\n0\n")
    left = leftovers.Leftovers(is_reaper=False)
    left.group = tmp_path
    left.sweep(set(), is_alone=True)
    assert killed == []


@pytest.mark.parametrize(
    ("group", "root", "found"),
    [
        ("/", "/", "/mnt"),
        ("/ab/c", "/", "/mnt/ab/c"),
        ("/ab/c", "/ab", "/mnt/c"),
        ("/ab", "/ab", "/mnt"),
        ("/ab/c", "/a", None),
        ("/../ab", "/", None),
    ],
)
def test_own_group_is_seen_where_it_is_below_what_is_mounted(
    group: str, root: str, found: str | None
) -> None:
    mounts = [
        "25 1 0:5 / /mnt/proc rw - proc proc rw",
        f"26 1 0:6 {root} /mnt rw,nosuid - cgroup2 cgroup2 rw",
    ]
    seen = leftovers._folder_of(Path(group), mounts)
    assert seen == (Path(found) if found else None)


def test_where_no_group_can_be_made_the_reason_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"cgroup": "0::/\n", "mountinfo": "25 1 0:5 / /mnt/proc rw - proc proc rw\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name])
    left = leftovers.Leftovers(is_reaper=False)
    left.open()
    assert left.group is None
    assert str(left.group_error) == "none of version 2 can be seen here"


async def test_a_group_that_nobody_can_be_put_into_is_said_once_and_done_without(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async with containers() as daemon:
        daemon.host.guard()
        daemon.host.launcher.group = tmp_path / "gone"
        for number in range(2):
            container = await daemon.start("def f(): return 1\n", container_id=number)
            container.give(lease_of([()], lease_id=number, start=number))
        await daemon.outputs(2)
        assert daemon.host.launcher.group is None
    (record,) = [r for r in caplog.records if "in no control group" in r.message]
    assert str(tmp_path / "gone") in record.message
