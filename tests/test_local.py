"""The embedded default: one scheduler and one worker for each user, found or started."""

from __future__ import annotations

import functools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fanout.client import home as home_module
from fanout.client.home import (
    StartLock,
    answers,
    find_daemon,
    find_starting,
    home_folder,
    make_folder,
    note_starting,
    state_folder,
    wait_until,
)
from fanout.client.local import cluster_status, ensure_cluster, stop_cluster
from fanout.client.process import launch, signal_daemon
from fanout.exceptions import ConnectionError, InvalidError
from fanout.filesystem import file_system_of, network_file_system_of
from fanout.protocol.messages import PROTOCOL_VERSION

PATIENCE_S = 30.0 * float(os.environ.get("FANOUT_TEST_TIMEOUT_FACTOR", "1"))


@pytest.fixture
def fanout_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder of the test's own, with no daemon left in it at the end."""
    monkeypatch.setenv("FANOUT_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("FANOUT_URL", raising=False)
    monkeypatch.setenv("FANOUT_CPU", "1")
    yield tmp_path / "state"
    monkeypatch.delenv("FANOUT_LOG", raising=False)
    leave_nothing()


def leave_nothing() -> None:
    """End whatever daemon the test's home has, also one that was never ready."""
    home = home_folder()
    try:
        stop_cluster(force=True)
    finally:
        for kind in ("scheduler", "worker"):
            for daemon in (find_daemon(home, kind), find_starting(home, kind)):
                if daemon is not None:
                    signal_daemon(daemon, signal.SIGKILL)


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A client in a process of its own."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pid_of(kind: str) -> int:
    daemon = find_daemon(home_folder(), kind)
    assert daemon is not None, f"no {kind} is alive"
    return daemon.pid


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- the folder ----------------------------------------------------------------------------------


def test_fanout_home_names_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FANOUT_HOME", "/some/where")
    assert os.path.dirname(state_folder()) == "/some/where"


def test_state_folder_follows_xdg_and_ignores_a_relative_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FANOUT_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert os.path.dirname(state_folder()) == "/var/state/fanout"
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert os.path.dirname(state_folder()) == "/home/somebody/.local/state/fanout"


def test_versions_that_cannot_talk_have_separate_homes() -> None:
    assert os.path.basename(home_folder()) == f"v{PROTOCOL_VERSION}-{home_module.STATE_SCHEMA}"


def test_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = make_folder(str(tmp_path / "a" / "b"))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


def test_folder_that_others_could_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    make_folder(str(tmp_path / "open"))
    assert stat.S_IMODE(os.stat(tmp_path / "open").st_mode) == 0o700


def test_folder_that_cannot_be_made_names_the_variable_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidError, match="FANOUT_HOME"):
        make_folder(str(tmp_path / "file" / "state"))


def test_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    try:
        os.chown(foreign, 12345, 12345)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    with pytest.raises(InvalidError, match="belongs to user 12345"):
        make_folder(str(foreign))


@pytest.fixture
def mount_table(tmp_path: Path) -> Path:
    table = tmp_path / "mountinfo"
    table.write_text(
        "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "21 20 0:40 / /home rw - nfs4 server:/home rw\n"
        "22 21 8:2 / /home/me/local rw - xfs /dev/sdb rw\n"
        "23 20 0:41 / /with\\040space rw - fuse.sshfs host:/ rw\n"
        "24 20 0:42 / /data rw - nfs server:/data rw\n"
        "25 20 8:3 / /data rw - ext4 /dev/sdc rw\n"
        "a line that the kernel never wrote\n"
    )
    return table


def test_file_system_is_that_of_the_innermost_mount(mount_table: Path) -> None:
    assert file_system_of("/etc", mount_table) == "ext4"
    assert file_system_of("/home/me/state", mount_table) == "nfs4"
    assert file_system_of("/home/me/local/state", mount_table) == "xfs"
    assert file_system_of("/homestead", mount_table) == "ext4"
    assert file_system_of("/with space/x", mount_table) == "fuse.sshfs"


def test_later_mount_hides_the_earlier_one_at_the_same_point(mount_table: Path) -> None:
    assert file_system_of("/data/x", mount_table) == "ext4"


def test_unreadable_mount_table_is_taken_for_local(tmp_path: Path) -> None:
    assert network_file_system_of("/home", tmp_path / "missing") == ""


def test_folder_on_a_network_file_system_is_refused_before_it_is_made(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"20 1 0:40 / {tmp_path} rw - nfs4 server:/x rw\n")
    with pytest.raises(InvalidError, match=r"nfs4.*FANOUT_HOME"):
        make_folder(str(tmp_path / "state"), str(table))
    assert not (tmp_path / "state").exists()


# --- who is alive --------------------------------------------------------------------------------


def write_record(home: Path, **changes: Any) -> None:
    record = {
        "pid": os.getpid(),
        "boot_id": home_module.boot_id(),
        "client_join": "",
        "worker_join": "",
    }
    (home / "scheduler.json").write_text(json.dumps(record | changes))


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a scheduler by its command line and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", "fanout_scheduler"],
        stdin=subprocess.PIPE,
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def test_record_of_a_live_daemon_is_believed(
    tmp_path: Path, stand_in: subprocess.Popen[bytes]
) -> None:
    write_record(tmp_path, pid=stand_in.pid, tokens="abc")
    found = find_daemon(str(tmp_path), "scheduler")
    assert found is not None
    assert (found.pid, found.tokens) == (stand_in.pid, "abc")


def test_record_of_an_earlier_boot_is_ignored(
    tmp_path: Path, stand_in: subprocess.Popen[bytes]
) -> None:
    write_record(tmp_path, pid=stand_in.pid, boot_id="00000000-0000-0000-0000-000000000000")
    assert find_daemon(str(tmp_path), "scheduler") is None


def test_record_whose_pid_another_program_has_now_is_ignored(tmp_path: Path) -> None:
    write_record(tmp_path, pid=os.getppid())
    assert find_daemon(str(tmp_path), "scheduler") is None


def test_record_of_a_zombie_is_ignored(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass", "fanout_scheduler"])
    wait_until(lambda: is_gone(process.pid), soon())
    write_record(tmp_path, pid=process.pid)
    assert find_daemon(str(tmp_path), "scheduler") is None
    process.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x"}', '{"pid": 1}', "\x00"])
def test_damaged_record_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "scheduler.json").write_text(text)
    assert find_daemon(str(tmp_path), "scheduler") is None


def test_start_lock_that_somebody_keeps_is_named_at_the_deadline(tmp_path: Path) -> None:
    second = StartLock(str(tmp_path), time.monotonic())
    with StartLock(str(tmp_path), soon()), pytest.raises(ConnectionError, match=r"start\.lock"):
        second.__enter__()
    with StartLock(str(tmp_path), time.monotonic()):
        pass


# --- starting a process --------------------------------------------------------------------------

REPORT = """
import json, os, signal, sys
report = {
    "pid": os.getpid(), "sid": os.getsid(0), "ppid": os.getppid(), "cwd": os.getcwd(),
    "umask": os.umask(0), "environment": dict(os.environ),
    "descriptors": [os.readlink(f"/proc/self/fd/{n}") for n in (0, 1, 2)],
    "others": [n for n in range(3, 256) if os.path.exists(f"/proc/self/fd/{n}")],
    "is_int_default": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "is_hup_default": signal.getsignal(signal.SIGHUP) is signal.SIG_DFL,
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
}
with open(sys.argv[1] + ".part", "w") as file:
    json.dump(report, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""

LAUNCH = """
import os, signal, sys
from fanout.client.process import launch
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
held = os.open("/dev/zero", os.O_RDONLY)
os.set_inheritable(held, True)
print(launch([sys.executable, "-c", *sys.argv[3:]], sys.argv[1], {"EXTRA": "1"}))
"""


def test_daemon_shares_nothing_with_the_client_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    monkeypatch.setenv("FANOUT_KILL_GRACE", "3")
    monkeypatch.setenv("FANOUT_URL", "fanout://nobody")
    report_path = tmp_path / "report"
    output = str(tmp_path / "output")
    client = run_python(LAUNCH, output, "-", REPORT, str(report_path))
    text, _ = client.communicate(timeout=PATIENCE_S)
    wait_until(report_path.exists, soon())
    report = json.loads(report_path.read_text())
    assert report["pid"] == int(text)
    assert report["sid"] == report["pid"], "it leads a session of its own"
    assert report["ppid"] != client.pid
    assert report["cwd"] == "/"
    assert report["umask"] == 0o077
    assert report["descriptors"] == ["/dev/null", output, output]
    assert not report["others"], "a descriptor of the client is open in the daemon"
    assert report["is_int_default"]
    assert report["is_hup_default"]
    assert report["blocked"] == []
    environment = report["environment"]
    assert "MY_SECRET" not in environment
    assert "FANOUT_URL" not in environment
    assert environment["FANOUT_KILL_GRACE"] == "3"
    assert environment["EXTRA"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


def test_capturing_a_client_ends_with_the_client_and_not_with_its_daemons(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    client = run_python(LAUNCH, str(tmp_path / "output"), "-", f"open({str(fifo)!r}).read()")
    text, _ = client.communicate(timeout=PATIENCE_S)
    pid = int(text)
    assert not is_gone(pid), "the daemon was to be there when the pipe was closed"
    fifo.open("w").close()
    wait_until(lambda: is_gone(pid), soon())


def test_program_that_is_not_there_is_told_in_the_output(tmp_path: Path) -> None:
    output = tmp_path / "output"
    pid = launch(["/no/such/program"], str(output), {})
    wait_until(lambda: is_gone(pid), soon())
    assert "No such file" in output.read_text()


# --- find or start -------------------------------------------------------------------------------

CLIENT = """
import sys
from fanout.client.local import ensure_cluster
sys.stdin.read()
print(ensure_cluster())
"""


def test_nothing_runs_before_anybody_asks(fanout_home: Path) -> None:
    assert cluster_status() is None
    stopped = stop_cluster()
    assert not stopped.was_running
    assert not fanout_home.exists(), "looking must not make anything"


def test_program_in_a_container_uses_daemons_that_run_and_starts_none(
    fanout_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANOUT_CONTAINER_MARK", "fanout-container-1-2-")
    with pytest.raises(InvalidError, match="killed with the container. Set FANOUT_URL to "):
        ensure_cluster()
    assert not fanout_home.exists()
    monkeypatch.delenv("FANOUT_CONTAINER_MARK")
    join = ensure_cluster()
    monkeypatch.setenv("FANOUT_CONTAINER_MARK", "fanout-container-1-2-")
    assert ensure_cluster() == join


def test_second_client_finds_what_the_first_one_started(fanout_home: Path) -> None:
    first = ensure_cluster()
    pids = pid_of("scheduler"), pid_of("worker")
    assert ensure_cluster() == first
    assert (pid_of("scheduler"), pid_of("worker")) == pids
    status = cluster_status()
    assert status is not None
    assert (status["scheduler_pid"], status["worker_pid"]) == pids
    wait_until(lambda: len((cluster_status() or {})["workers"]) == 1, soon())


def test_clients_that_start_at_once_end_with_one_scheduler(fanout_home: Path) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for client in clients:
        assert client.stdin is not None
        client.stdin.close()
        client.stdin = None
    joins = {client.communicate(timeout=PATIENCE_S)[0] for client in clients}
    assert all(client.returncode == 0 for client in clients)
    assert len(joins) == 1
    status = cluster_status()
    assert status is not None
    assert status["epoch"] == 1, "a scheduler was started more than once"
    assert len(status["workers"]) == 1


def test_dead_worker_is_replaced_under_the_same_scheduler(fanout_home: Path) -> None:
    join = ensure_cluster()
    worker_pid = pid_of("worker")
    os.kill(worker_pid, signal.SIGKILL)
    wait_until(lambda: is_gone(worker_pid), soon())
    assert ensure_cluster() == join
    assert pid_of("worker") != worker_pid


def test_successor_of_a_killed_scheduler_has_its_address_and_its_worker(fanout_home: Path) -> None:
    join = ensure_cluster()
    scheduler_pid, worker_pid = pid_of("scheduler"), pid_of("worker")
    os.kill(scheduler_pid, signal.SIGKILL)
    wait_until(lambda: is_gone(scheduler_pid), soon())
    assert ensure_cluster() == join, "clients that outlived it must find it again"
    assert pid_of("scheduler") != scheduler_pid
    assert pid_of("worker") == worker_pid
    wait_until(lambda: len((cluster_status() or {})["workers"]) == 1, soon())


def test_scheduler_that_dies_while_its_worker_starts_has_a_successor(fanout_home: Path) -> None:
    ensure_cluster()
    scheduler_pid, worker_pid = pid_of("scheduler"), pid_of("worker")
    # Connections to it are accepted and nobody serves them, as while it is being killed.
    os.kill(scheduler_pid, signal.SIGSTOP)
    os.kill(worker_pid, signal.SIGKILL)
    wait_until(lambda: is_gone(worker_pid), soon())
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(ensure_cluster)
        try:
            wait_until(lambda: find_starting(home_folder(), "worker") is not None, soon())
        finally:
            os.kill(scheduler_pid, signal.SIGKILL)
        found.result()
    assert pid_of("scheduler") != scheduler_pid
    wait_until(lambda: len((cluster_status() or {})["workers"]) == 1, soon())


def test_client_that_meets_a_leaving_scheduler_gets_its_successor(fanout_home: Path) -> None:
    for _ in range(5):
        ensure_cluster()
        before = pid_of("scheduler")
        os.kill(before, signal.SIGTERM)
        ensure_cluster()
        # It may have been found before the signal reached it, and then it is found no more.
        wait_until(functools.partial(is_gone, before), soon())
        ensure_cluster()
        found = find_daemon(home_folder(), "scheduler")
        assert found is not None
        assert found.pid != before
        assert answers(found)


def test_idle_daemons_leave_by_themselves(
    fanout_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANOUT_IDLE_TIMEOUT", "0.2")
    ensure_cluster()
    pids = pid_of("scheduler"), pid_of("worker")
    wait_until(lambda: all(is_gone(pid) for pid in pids), soon())
    assert find_daemon(home_folder(), "scheduler") is None


def test_idle_scheduler_stays_while_somebody_is_starting(
    fanout_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANOUT_IDLE_TIMEOUT", "0.2")
    ensure_cluster()
    scheduler_pid = pid_of("scheduler")
    with StartLock(home_folder(), soon()), pytest.raises(TimeoutError):
        wait_until(lambda: is_gone(scheduler_pid), time.monotonic() + 1.5)
    wait_until(lambda: is_gone(scheduler_pid), soon())


def test_daemon_that_cannot_start_is_reported_with_what_it_wrote(
    fanout_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANOUT_LOG", "shouting")
    with pytest.raises(ConnectionError, match="FANOUT_LOG='shouting'"):
        ensure_cluster()
    assert find_starting(home_folder(), "scheduler") is None


def test_daemon_that_a_killed_client_started_is_waited_for(
    fanout_home: Path, stand_in: subprocess.Popen[bytes]
) -> None:
    home = make_folder(home_folder())
    note_starting(home, "scheduler", stand_in.pid)
    client = run_python("from fanout.client.local import ensure_cluster; print(ensure_cluster())")
    lock = Path(home) / "start.lock"
    wait_until(lock.exists, soon())
    assert client.poll() is None
    # It never becomes ready, so the client goes on to start one itself.
    assert stand_in.stdin is not None
    stand_in.kill()
    stand_in.wait()
    text, _ = client.communicate(timeout=PATIENCE_S)
    assert text.startswith("fanout://client.")


# --- stopping ------------------------------------------------------------------------------------


def test_stop_ends_both_daemons(fanout_home: Path) -> None:
    ensure_cluster()
    pids = pid_of("scheduler"), pid_of("worker")
    stopped = stop_cluster()
    assert stopped.was_running
    assert stopped.is_stopped
    assert all(is_gone(pid) for pid in pids)
    assert cluster_status() is None


def test_stopped_scheduler_process_is_ended_by_force_only(
    fanout_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fanout.client import local

    monkeypatch.setattr(local, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(local, "LEAVE_TIMEOUT_S", 0.5)
    ensure_cluster()
    pid = pid_of("scheduler")
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ConnectionError, match="fanout stop --force"):
        stop_cluster()
    assert stop_cluster(force=True).is_stopped
    assert is_gone(pid)
