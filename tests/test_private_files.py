"""What fanout writes is for its user alone, and secrets are written down nowhere in the clear.

The shell that starts everything has umask 000, so whatever is private is so because fanout sees to
it. While calls of every kind run and after them, every file, folder and socket of the daemons is
looked at.
"""

from __future__ import annotations

import os
import secrets
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fanout.protocol.join import JoinString
from fanout_scheduler.crash import describe
from tests import behaviour_kit as kit
from tests.conftest import Cluster, HandStarted, poll_until, read_state
from tests.core_kit import inputs
from tests.server_kit import Daemon

CODE = """
import pathlib, sys
from tests import behaviour_kit as kit
from tests import varied_kit
folder = pathlib.Path(sys.argv[1])
varied_kit.run_everything(folder, "walk")
with kit.app.run():
    stays = kit.note_and_wait.spawn(1, str(folder))
    (folder / "ready").touch()
    kit.wait_for_file(folder / "go")
    stays.cancel(terminate_containers=True)
"""


def _paths(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield folder
        for where, names, files in os.walk(folder):
            yield from (Path(where, name) for name in (*names, *files))


def _opened_by(pids: set[int]) -> Iterator[Path]:
    """Files and sockets with a name that these processes hold open."""
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
                yield Path(target)


def _sockets() -> set[Path]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {
        Path(path) for line in lines if (path := line.partition("/")[2]) and (path := "/" + path)
    }


def _open_to_others(paths: Iterator[Path]) -> list[str]:
    """Those that somebody else could read, write or enter; a private folder closes all below it."""
    found = []
    for path in paths:
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISLNK(mode) and mode & 0o077:
            found.append(f"{stat.filemode(mode)} {path}")
    return found


def _holding(secret: bytes, *folders: Path) -> set[str]:
    """The names of the files that hold these bytes."""
    return {
        path.name
        for path in _paths(*folders)
        if path.is_file() and not path.is_symlink() and secret in path.read_bytes()
    }


def test_nothing_of_ours_is_open_to_others_and_no_secret_lies_about(
    cluster: Cluster, tmp_path: Path
) -> None:
    temporary, work = tmp_path / "tmp", tmp_path / "work"
    temporary.mkdir(mode=0o700)
    work.mkdir()
    secret = secrets.token_hex(20)
    variables = cluster.variables | {
        "TMPDIR": str(temporary), "API_KEY": secret, "FANOUT_LOG": "debug",
    }  # fmt: skip
    client = subprocess.Popen(
        [sys.executable, "-c", CODE, str(work)],
        env=variables,
        umask=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        poll_until(lambda: (work / "ready").exists() or client.poll() is not None, "calls ran", 60)
        pids = set(cluster.daemon_pids().values())
        assert len(pids) == 2, client.communicate()
        kit.wait_for_file(work / "begun-1", 20)
        processes = pids.union(*(kit.descendants_of(pid) for pid in pids))
        opened = [path for path in _opened_by(processes) if path.is_relative_to(tmp_path)]
        assert opened
        sockets = [path for path in _sockets() if "fanout-" in str(path)]
        assert sockets, "the socket for containers is somewhere else now"
        folders = [cluster.home, temporary, *{path.parent for path in sockets}]
        shared = [p for p in Path("/dev/shm").iterdir() if "fanout" in p.name]
        everything = [*_paths(*folders), *opened, *shared, *sockets]
        ours = [path for path in everything if not path.is_relative_to(work)]
        assert _open_to_others(iter(ours)) == []
        state = read_state(next(cluster.home.rglob("scheduler.json")))
        assert state is not None
        (work / "go").touch()
        stdout, stderr = client.communicate(timeout=30)
        assert client.returncode == 0, stderr
    finally:
        client.kill()
        client.communicate()

    status = cluster.fanout("status")
    assert "same" in status.stdout
    for text in (status.stdout, status.stderr, stdout, stderr):
        assert secret not in text
    assert _holding(secret.encode(), *folders) == set()
    for role in ("client", "worker"):
        shown = state[f"{role}_join"].partition(":")[2].partition(":")[2].partition("@")[0]
        assert len(shown) > 20
        assert shown not in status.stdout
        known = _holding(shown.encode(), *folders)
        assert known == {"tokens.json", "scheduler.json"}
        assert _holding(JoinString.parse(state[f"{role}_join"]).secret, *folders) == set()
    cluster.stop()
    assert _open_to_others(_paths(cluster.home, temporary)) == []
    assert _holding(secret.encode(), cluster.home, temporary) == set()
    # Nothing is left in the folder for temporary files.
    assert list(temporary.iterdir()) == []


def test_a_scheduler_and_a_worker_that_are_started_by_hand_keep_to_themselves(
    scheduler_and_workers: Callable[..., HandStarted], tmp_path: Path
) -> None:
    old = os.umask(0)
    try:
        cluster = scheduler_and_workers(1)
        daemon = Daemon(tmp_path / "with-tls").start("--host", "0.0.0.0")
        try:
            assert (daemon.home / "tls.pem").exists()
            assert _open_to_others(_paths(daemon.home)) == []
        finally:
            daemon.end(signal.SIGKILL)
    finally:
        os.umask(old)
    with kit.app.run():
        assert kit.same.remote(1) == 1
        assert kit.same.spawn(2).get() == 2
        homes = [cluster.scheduler_home, cluster.folder / "w1"]
        assert _open_to_others(_paths(*homes)) == []


@pytest.mark.parametrize("payload", [b"my secret", b"x" * 5000])
def test_a_crash_report_tells_nothing_of_payloads(payload: bytes) -> None:
    message = inputs(b"c" * 16, 0, 1)
    message.payload = payload
    shown = describe(message)
    assert f"<{len(payload)} bytes>" in shown
    assert payload.hex() not in shown
