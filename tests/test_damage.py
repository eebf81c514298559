"""Damage to what the scheduler keeps is said to a person, with what to do; nothing is replaced."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fanout.exceptions import StorageError
from tests import restart_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster, HandStarted, environment, poll_until

#: Travels as a blob.
HUGE = bytes(3 << 20)

SPAWN = """
import sys
import fanout
from tests import restart_kit as kit
with kit.app.run():
    calls = [kit.same.spawn(number, bytes(2000)) for number in range(20)]
    assert [call.get()[0] for call in calls] == list(range(20))
queue = fanout.Queue.from_name("kept", create_if_missing=True)
queue.put("item")
"""


@dataclass
class Damage:
    """What happens to the home folder, and what a person reads of it."""

    name: str
    do: Callable[[Path], object]
    says: str
    advises: str


def overwrite_page(home: Path) -> None:
    with (home / "scheduler.db").open("r+b") as file:
        file.seek(2 * 4096)
        file.write(os.urandom(4096))


def cut_in_half(home: Path) -> None:
    os.truncate(home / "scheduler.db", (home / "scheduler.db").stat().st_size // 2)


def raise_version(home: Path) -> None:
    connection = sqlite3.connect(home / "scheduler.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def leave_only_the_log(home: Path) -> None:
    (home / "scheduler.db").rename(home / "scheduler.db-wal")


MOVE_AWAY = "move it away together with its -wal and -shm files to begin without its calls"
DAMAGES = [
    Damage("cut in half", cut_in_half, "scheduler.db is damaged", MOVE_AWAY),
    Damage("page overwritten", overwrite_page, "scheduler.db is damaged", MOVE_AWAY),
    Damage(
        "emptied",
        lambda home: os.truncate(home / "scheduler.db", 0),
        "scheduler.db is damaged: it is empty",
        MOVE_AWAY,
    ),
    Damage(
        "another program's file",
        lambda home: (home / "scheduler.db").write_bytes(b"something precious" * 500),
        "scheduler.db is damaged",
        MOVE_AWAY,
    ),
    Damage(
        "newer schema",
        raise_version,
        "has schema version 99",
        "Use the fanout that wrote it, or move the file away",
    ),
    Damage(
        "only its log is left",
        leave_only_the_log,
        "scheduler.db-wal is there and its database scheduler.db is not",
        "Put the database back, or move scheduler.db-wal away",
    ),
    Damage(
        "no key",
        lambda home: (home / "store.key").unlink(),
        "store.key is missing",
        "Put the file back, or move the database away",
    ),
    Damage(
        "key emptied",
        lambda home: os.truncate(home / "store.key", 0),
        "store.key does not hold a key",
        "Put the right file back",
    ),
    Damage(
        "tokens emptied",
        lambda home: os.truncate(home / "tokens.json", 0),
        "tokens.json is damaged",
        "Put a copy back, or delete it to have new tokens made",
    ),
]


def content_of(home: Path) -> dict[str, bytes]:
    """The files that outlive a scheduler."""
    names = ("scheduler.db", "scheduler.db-wal", "store.key", "tokens.json")
    return {name: (home / name).read_bytes() for name in names if (home / name).exists()}


@pytest.fixture(scope="module")
def used_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of a scheduler that has left, with calls and a queue."""
    cluster = HandStarted(tmp_path_factory.mktemp("used"))
    try:
        cluster.start_scheduler()
        cluster.start_worker("w1", cpu=1)
        done = cluster.python("-c", SPAWN)
        assert done.returncode == 0, done.stderr
    finally:
        cluster.stop()
    return cluster.scheduler_home


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_scheduler_refuses_damaged_files_says_what_to_do_and_changes_nothing(
    used_home: Path, tmp_path: Path, damage: Damage
) -> None:
    home = tmp_path / "home"
    shutil.copytree(used_home, home)
    damage.do(home)
    before = content_of(home)
    done = subprocess.run(
        [sys.executable, "-m", "fanout.cli.main", "scheduler", "--home", str(home)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30 * TIMEOUT_FACTOR,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert damage.says in done.stderr
    assert damage.advises in done.stderr
    assert "Traceback" not in done.stderr
    assert str(home) in done.stderr
    assert content_of(home) == before


@pytest.mark.parametrize("damage", [DAMAGES[1], DAMAGES[2], DAMAGES[6]], ids=lambda d: d.name)
def test_a_script_on_the_embedded_default_says_what_is_damaged(
    cluster: Cluster, tmp_path: Path, damage: Damage
) -> None:
    script = tmp_path / "script" / "tiny.py"
    script.parent.mkdir()
    script.write_text(
        "import fanout\napp = fanout.App('tiny')\n"
        "@app.function()\ndef same(x): return x\n"
        "@app.local_entrypoint()\ndef main(): print(same.spawn(1).get())\n"
    )
    first = cluster.fanout("run", script)
    assert (first.returncode, first.stdout) == (0, "1\n"), first.stderr
    cluster.stop()
    (database,) = cluster.home.rglob("scheduler.db")
    poll_until(
        lambda: not database.with_name("scheduler.db-wal").exists(), "the store has been closed"
    )
    damage.do(database.parent)
    before = content_of(database.parent)
    again = cluster.fanout("run", script)
    assert again.returncode == 1
    assert again.stdout == ""
    assert damage.says in again.stderr
    assert damage.advises in again.stderr
    assert "Traceback" not in again.stderr
    assert content_of(database.parent) == before


def flip_a_byte(blob: Path) -> None:
    with blob.open("r+b") as file:
        file.seek(2_000_000)
        byte = file.read(1)
        file.seek(2_000_000)
        file.write(bytes([byte[0] ^ 1]))


def blob_of(cluster: HandStarted, content: bytes) -> Path:
    """The file of the one blob that has this in it."""
    paths = (cluster.scheduler_home / "blobs").iterdir()
    (found,) = [path for path in paths if content in path.read_bytes()]
    return found


def test_a_large_argument_that_changed_on_disk_fails_its_call_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = HandStarted(tmp_path)
    try:
        cluster.start_scheduler()
        monkeypatch.setenv("FANOUT_URL", cluster.client_join)
        with kit.app.run():
            sound = kit.size_of.spawn(b"sound" + HUGE)
            broken = kit.size_of.spawn(b"broken" + HUGE)
            flip_a_byte(blob_of(cluster, b"broken"))
            cluster.start_worker("w1", cpu=2)
            with pytest.raises(StorageError, match=r"a large value: its file .* had changed"):
                broken.get(timeout=30)
            assert sound.get(timeout=30) == 5 + len(HUGE)
            # It is brought anew, and kept.
            assert kit.size_of.remote(b"broken" + HUGE) == 6 + len(HUGE)
        assert "(worker) lost" not in cluster.log("scheduler")
    finally:
        cluster.stop()


def test_a_large_result_that_changed_on_disk_is_an_error_in_its_place(
    scheduler_and_workers: Callable[..., HandStarted], tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(1)
    gate = tmp_path / "gate"
    gate.touch()
    with kit.app.run():
        call = kit.bytes_when_open.spawn_map(
            [65, 66, 67], kwargs={"size": len(HUGE), "gate": str(gate)}
        )
        assert [value[:1] for value in call.iter()] == [b"A", b"B", b"C"]
        flip_a_byte(blob_of(cluster, b"BBBB"))
        for _ in range(2):
            with pytest.raises(StorageError, match=r"a large value: its file .* had changed"):
                call.get(index=1)
            assert [call.get(index=x)[:1] for x in (0, 2)] == [b"A", b"C"]
        kit.kill_scheduler(cluster)
        cluster.start_scheduler()
        with pytest.raises(StorageError, match=r"a large value: its file is gone"):
            call.get(index=1)
        assert [call.get(index=x)[:1] for x in (0, 2)] == [b"A", b"C"]


def test_what_was_put_back_is_there_again(
    used_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice holds: the scheduler that refused a damaged file serves the copy."""
    import fanout

    cluster = HandStarted(tmp_path)
    shutil.copytree(used_home, cluster.scheduler_home)
    overwrite_page(cluster.scheduler_home)
    try:
        with pytest.raises(AssertionError, match="scheduler ended with code 1"):
            cluster.start_scheduler()
        shutil.copy(used_home / "scheduler.db", cluster.scheduler_home)
        cluster.start_scheduler()
        monkeypatch.setenv("FANOUT_URL", cluster.client_join)
        assert fanout.Queue.from_name("kept").get() == "item"
    finally:
        cluster.stop()
