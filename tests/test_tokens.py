"""Secrets and the home folder: private, kept over restarts, never shared by two schedulers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fanout.client.home import note_starting
from fanout.exceptions import ExecutionError, StorageError
from fanout.filesystem import write_private
from fanout_scheduler.home import Home
from fanout_scheduler.tokens import Tokens
from tests.conftest import environment


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


# --- tokens ---------------------------------------------------------------------------------------


def test_a_client_and_a_worker_token_are_made_and_kept(file: Path) -> None:
    made = Tokens(file)
    again = Tokens(file)
    for role in ("client", "worker"):
        token = made.of_role(role)
        assert token.role == role
        assert len(token.secret) == 32
        assert again.lookup(token.token_id) == token
    assert made.of_role("client").secret != made.of_role("worker").secret


def test_an_unknown_token_id_is_nobody(file: Path) -> None:
    assert Tokens(file).lookup("nobody") is None


def test_the_token_file_is_readable_by_its_owner_alone(file: Path) -> None:
    old = os.umask(0)
    try:
        Tokens(file)
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_token_file_that_others_could_read_is_made_private(file: Path) -> None:
    Tokens(file)
    file.chmod(0o644)
    Tokens(file)
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"tokens": 3}',
        b'{"tokens": [{"token_id": "a", "role": "client", "secret": "AAAA"}]}',
    ],
)
def test_a_damaged_token_file_is_refused_and_kept(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"tokens\.json is damaged.*delete it"):
        Tokens(file)
    assert file.read_bytes() == content


def test_a_token_file_without_the_worker_token_is_refused(file: Path) -> None:
    Tokens(file)
    entries = json.loads(file.read_text())["tokens"]
    file.write_text(json.dumps({"tokens": entries[:1]}))
    with pytest.raises(StorageError, match="lacks a token"):
        Tokens(file)


# --- the home folder ------------------------------------------------------------------------------


def test_the_home_is_made_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Home(tmp_path / "a" / "home")
    finally:
        os.umask(old)
    assert (tmp_path / "a" / "home").stat().st_mode & 0o777 == 0o700


def test_a_home_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    with pytest.raises(StorageError, match=r"others may write.*0777.*chmod 700"):
        Home(tmp_path / "home")


def test_a_home_under_a_file_is_refused_with_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="FANOUT_HOME"):
        Home(tmp_path / "file" / "home")


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_home_on_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        f"20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 20 0:50 / {tmp_path} rw shared:1 - {kind} host:/export rw\n"
    )
    with pytest.raises(StorageError, match=rf"network file system \({kind}\).*FANOUT_HOME"):
        Home(tmp_path / "home", table)


def test_a_local_disk_inside_a_network_file_system_is_taken(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        f"30 20 0:50 / / rw - nfs4 host:/export rw\n"
        f"31 30 8:1 / {tmp_path} rw shared:1 - ext4 /dev/sda1 rw\n"
    )
    assert Home(tmp_path / "home", table).path.is_dir()


def test_a_home_is_held_by_one_and_the_other_is_told_by_whom(tmp_path: Path) -> None:
    first, second = Home(tmp_path / "home"), Home(tmp_path / "home")
    first.lock()
    first.publish({})
    try:
        with pytest.raises(ExecutionError, match=rf"its pid is {os.getpid()}\b"):
            second.lock()
    finally:
        first.unlock()
    second.lock()
    second.unlock()


def test_a_holder_without_an_address_gets_time_to_leave(tmp_path: Path) -> None:
    first, second = Home(tmp_path / "home"), Home(tmp_path / "home")
    first.lock()
    try:
        with pytest.raises(ExecutionError, match="already serves"):
            second.lock(patience_s=0.05)
    finally:
        first.unlock()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from fanout_scheduler.home import Home\n"
        "home = Home(Path(sys.argv[1])); home.lock(); home.publish({})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "home")], env=environment())
    home = Home(tmp_path / "home")
    assert home.address.exists(), "it did not get as far as that"
    home.lock()
    home.unlock()


def test_the_start_lock_is_not_waited_for(tmp_path: Path) -> None:
    first, second = Home(tmp_path / "home"), Home(tmp_path / "home")
    assert first.try_start_lock()
    assert not second.try_start_lock()
    first.unlock()
    assert second.try_start_lock()
    second.unlock()


def test_a_private_file_is_replaced_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_private(file, b"old")
    write_private(file, b"new")
    assert file.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def _note_starting(path: Path, _: bytes) -> None:
    note_starting(str(path.parent), "scheduler", os.getpid())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("write", [write_private, _note_starting])
def test_a_private_file_that_cannot_be_written_leaves_no_draft(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, bytes], None],
    error: BaseException,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []
