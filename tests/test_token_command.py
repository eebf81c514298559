"""`fanout token`: tokens are made, shown and revoked while the scheduler runs."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fanout.cli import token as command
from fanout.client.local import ask_status
from fanout.exceptions import AuthError, InvalidError, StorageError
from fanout.protocol.join import Address, JoinString
from fanout.protocol.tokens import NAME_SIZE_MAX, Entry, TokenFile
from fanout_scheduler.home import Home
from fanout_scheduler.server import Options, SchedulerServer
from fanout_scheduler.tokens import Tokens
from tests import behaviour_kit as kit
from tests.conftest import TIMEOUT_FACTOR, HandStarted, environment, poll_until
from tests.server_kit import Daemon, define, dial, submit

Start = Callable[..., HandStarted]

#: A client that waits for an output, and says how that ended.
CLIENT = """
import sys
import fanout
from tests import behaviour_kit as kit
with kit.app.run():
    try:
        kit.note_and_wait.remote(1, sys.argv[1])
    except fanout.exception.Error as error:
        print(type(error).__name__, error)
"""


def fanout_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fanout.cli.main", *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=30 * TIMEOUT_FACTOR,
    )


def token(cluster: HandStarted, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `fanout token` on the scheduler's host."""
    return fanout_command("token", *arguments, "--home", str(cluster.scheduler_home))


def create(cluster: HandStarted, *arguments: str) -> str:
    """Make a token; its join string."""
    done = token(cluster, "create", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def rows(cluster: HandStarted) -> dict[str, list[str]]:
    """What `fanout token list` shows, by id."""
    done = token(cluster, "list")
    assert (done.returncode, done.stderr) == (0, "")
    _, heads, *lines = done.stdout.splitlines()
    assert heads.split() == ["ID", "ROLE", "NAME", "MADE", "CONNECTIONS"]
    return {line.split()[0]: line.split()[1:] for line in lines}


def id_of(join: str) -> str:
    return JoinString.parse(join).token_id


def _running(cluster: HandStarted) -> list[str]:
    """The workers on which something runs."""
    containers = cluster.status()["containers"]
    return [container["worker"] for container in containers if container["state"] == "running"]


def test_a_workers_token_is_changed_without_a_restart(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    old = cluster.state["worker_join"]
    with kit.app.run():
        results: list[int] = []
        caller = threading.Thread(
            target=lambda: results.append(kit.second_waits.remote(1, str(tmp_path)))
        )
        caller.start()
        poll_until(lambda: _running(cluster) == ["w1"], "it runs on the first worker", 20)

        new = create(cluster, "worker", "--name", "gpu-hosts")
        cluster.start_worker("w2", cpu=1, join=new)
        shown = rows(cluster)
        assert shown[id_of(old)][0 :: len(shown[id_of(old)]) - 1] == ["worker", "1"]
        assert shown[id_of(new)][:2] == ["worker", "gpu-hosts"]
        assert shown[id_of(new)][-1] == "1"

        done = token(cluster, "revoke", id_of(old))
        assert done.returncode == 0, done.stderr
        assert f"revoked {id_of(old)}; no connection with it is left" in done.stdout
        assert cluster.workers["w1"].wait(20 * TIMEOUT_FACTOR) == 1
        assert f"the token {id_of(old)} was revoked" in cluster.log("w1")
        # What its container did is done by the other worker.
        poll_until(lambda: _running(cluster) == ["w2"], "it runs on the second worker", 20)
        (tmp_path / "seen").touch()
        caller.join(20 * TIMEOUT_FACTOR)
        assert results == [1]
    assert id_of(old) not in rows(cluster)
    # The scheduler gives out the new one from now on, and takes no other.
    assert cluster.state["worker_join"] == new
    home = tmp_path / "late"
    home.mkdir(mode=0o700)
    late = subprocess.run(
        [sys.executable, "-m", "fanout_worker", "--home", str(home)],
        env=environment(FANOUT_WORKER_JOIN=old),
        capture_output=True,
        text=True,
        timeout=20 * TIMEOUT_FACTOR,
    )
    assert late.returncode == 1
    assert "cannot prove that it knows the secret" in late.stderr
    assert cluster.scheduler is not None
    assert cluster.scheduler.poll() is None


def test_a_revoked_clients_calls_end_on_both_sides(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    old = cluster.client_join
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(tmp_path)],
        env=environment(FANOUT_URL=old, FANOUT_HOME=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        kit.wait_for_file(tmp_path / "begun-1")
        new = create(cluster, "client")
        assert token(cluster, "revoke", id_of(old)).returncode == 0
        stdout, stderr = client.communicate(timeout=20 * TIMEOUT_FACTOR)
    finally:
        client.kill()
        client.wait()
    assert stdout.startswith(f"AuthError the token {id_of(old)} was revoked"), stderr
    assert "fanout token create" in stdout

    # Nobody waits 30 seconds for it to come back: the call is cancelled.
    parsed = JoinString.parse(new)
    poll_until(lambda: ask_status(parsed)["calls"] == [], "the call is cancelled", 20)
    refused = fanout_command("status", FANOUT_URL=old, FANOUT_HOME=str(tmp_path))
    assert refused.returncode == 1
    assert "its token was withdrawn" in refused.stderr


def test_a_secret_is_shown_once_and_written_for_its_owner_alone(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(0)
    old = os.umask(0)
    try:
        join = create(cluster, "client", "--name", "anna")
    finally:
        os.umask(old)
    for name in ("tokens.json", "tokens.lock", "scheduler.json"):
        assert (cluster.scheduler_home / name).stat().st_mode & 0o777 == 0o600
    entries = json.loads((cluster.scheduler_home / "tokens.json").read_text())["tokens"]
    for content in (token(cluster, "list").stdout, token(cluster, "revoke", id_of(join)).stdout):
        assert not any(entry["secret"].rstrip("=") in content for entry in entries)
        assert JoinString.parse(join).secret.hex() not in content


def test_the_last_token_of_a_role_stays(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(0)
    before = (cluster.scheduler_home / "tokens.json").read_bytes()
    for role in ("client", "worker"):
        done = token(cluster, "revoke", id_of(cluster.state[f"{role}_join"]))
        assert done.returncode == 2
        assert f"is the only token for {role}s" in done.stderr
        assert f"fanout token create {role}" in done.stderr
    assert (cluster.scheduler_home / "tokens.json").read_bytes() == before


def test_a_mistake_is_named_with_what_to_do(scheduler_and_workers: Start, tmp_path: Path) -> None:
    cluster = scheduler_and_workers(0)
    unknown = token(cluster, "revoke", "nobody")
    assert unknown.returncode == 1
    assert "there is no token 'nobody'" in unknown.stderr
    named = token(cluster, "create", "client", "--name", "x" * (NAME_SIZE_MAX + 1))
    assert named.returncode == 2
    assert f"0 to {NAME_SIZE_MAX} printable characters" in named.stderr
    cluster.stop()
    stopped = token(cluster, "create", "client")
    assert stopped.returncode == 2
    assert "no scheduler runs" in stopped.stderr
    listed = token(cluster, "list")
    assert listed.returncode == 0
    assert "nobody knows which tokens are in use" in listed.stderr
    nowhere = fanout_command("token", "list", "--home", str(tmp_path))
    assert nowhere.returncode == 2
    assert "no scheduler has been started with the home" in nowhere.stderr


def test_another_user_than_the_schedulers_changes_nothing(
    scheduler_and_workers: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = scheduler_and_workers(0)
    home, user = str(cluster.scheduler_home), os.geteuid()
    before = {path.name: path.stat().st_ino for path in cluster.scheduler_home.iterdir()}
    # As with sudo: the file would be replaced by one that its scheduler may not read.
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    changes: list[Callable[[], None]] = [
        lambda: command.create(command.Role.client, home=home),
        lambda: command.revoke(id_of(cluster.client_join), home),
        lambda: command.list_tokens(home),
    ]
    for change in changes:
        with pytest.raises(InvalidError, match=f"belongs to user {user}.*run this as that user"):
            change()
    assert {p.name: p.stat().st_ino for p in cluster.scheduler_home.iterdir()} == before


def test_what_the_system_refuses_is_told_in_a_sentence(
    scheduler_and_workers: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = scheduler_and_workers(0)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenFile, "write", fail)
    with pytest.raises(StorageError, match="No space left on device.*fanout token list"):
        command.create(command.Role.client, home=str(cluster.scheduler_home))


def test_the_secret_is_shown_although_the_scheduler_does_not_follow(
    scheduler_and_workers: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster = scheduler_and_workers(0)
    monkeypatch.setattr(command, "FOLLOW_TIMEOUT_S", 0.05)
    assert cluster.scheduler is not None
    cluster.scheduler.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(typer.Exit) as caught:
            command.create(command.Role.client, home=str(cluster.scheduler_home))
    finally:
        cluster.scheduler.send_signal(signal.SIGCONT)
    shown = capsys.readouterr()
    assert caught.value.exit_code == 1
    assert "has not taken it within 0.05 s" in shown.err
    parsed = JoinString.parse(shown.out.strip())
    poll_until(lambda: _lets_in(parsed), "the scheduler has taken the token")


def _lets_in(join: JoinString) -> bool:
    try:
        ask_status(join)
    except AuthError:
        return False
    return True


def test_a_token_may_be_revoked_while_no_scheduler_runs(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(0)
    old = cluster.client_join
    create(cluster, "client")
    cluster.stop()
    assert "no scheduler runs" in token(cluster, "revoke", id_of(old)).stdout
    cluster.start_scheduler()
    assert id_of(cluster.client_join) != id_of(old)
    assert id_of(old) not in rows(cluster)


# --- the file and the running scheduler -----------------------------------------------------------


def _as_an_earlier_version_wrote_it(path: Path) -> None:
    entries = json.loads(path.read_text())["tokens"]
    kept = [{key: entry[key] for key in ("token_id", "role", "secret")} for entry in entries]
    path.write_text(json.dumps({"tokens": kept}))


def test_a_file_of_an_earlier_version_goes_on_working(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(0)
    joins = {cluster.client_join, cluster.state["worker_join"]}
    cluster.stop()
    _as_an_earlier_version_wrote_it(cluster.scheduler_home / "tokens.json")
    cluster.start_scheduler()
    assert joins == {cluster.client_join, cluster.state["worker_join"]}
    new = create(cluster, "worker")
    assert set(rows(cluster)) == {id_of(join) for join in (*joins, new)}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "home").start()
    yield made
    made.end(signal.SIGKILL)


async def test_whoever_is_not_revoked_stays(daemon: Daemon, tmp_path: Path) -> None:
    file = TokenFile(daemon.home / "tokens.json")
    stays = await dial(daemon.address)
    worker = await dial(daemon.address, "worker")
    (of_worker,) = [e for e in file.read().entries if e.token.role == "worker"]
    new = Tokens(tmp_path / "other").of_role("worker")
    others = [entry for entry in file.read().entries if entry is not of_worker]
    file.write((*(e for e in others if e.token.role == "client"), type(of_worker)(new)))
    assert isinstance(await worker.until_lost(), AuthError)
    assert (await stays.ask_status())["workers"] == []
    assert not stays.lost
    await stays.close()


async def test_a_revoked_client_leaves_no_call_behind(daemon: Daemon, tmp_path: Path) -> None:
    file = TokenFile(daemon.home / "tokens.json")
    client = await dial(daemon.address)
    client.send(*define(), *submit())
    assert (await client.ask_status())["open_call_count"] == 1
    new = Tokens(tmp_path / "other").of_role("client")
    entries = file.read().entries
    (of_client,) = [entry for entry in entries if entry.token.role == "client"]
    kept = [entry for entry in entries if entry is not of_client]
    content = file.write((*kept, type(of_client)(new)))
    assert isinstance(await client.until_lost(), AuthError)
    with pytest.raises(AuthError):
        await dial(daemon.address)
    poll_until(
        lambda: (
            json.loads((daemon.home / "scheduler.json").read_text())["tokens"] == content.digest
        ),
        "the scheduler says that it has followed",
    )
    other = await dial(json.loads((daemon.home / "scheduler.json").read_text()))
    assert (await other.ask_status())["open_call_count"] == 0
    await other.close()


def test_a_damaged_file_leaves_the_tokens_in_force(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    tokens = Tokens(file)
    client = tokens.of_role("client")
    good = file.read_bytes()
    for damage in (b"", b"{}", good[:-20]):
        file.write_bytes(damage)
        assert not tokens.reread()
        assert tokens.lookup(client.token_id) == client
    file.unlink()
    assert not tokens.reread()
    assert tokens.lookup(client.token_id) == client
    TokenFile(file).write(TokenFile._parse(TokenFile(file), good))
    assert not tokens.reread(), "it is what it was"


def test_a_revocation_that_cannot_be_read_at_once_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    old = tokens.of_role("client")
    file = TokenFile(tmp_path / "tokens.json")
    new = Tokens(tmp_path / "other").of_role("client")
    others = [entry for entry in file.read().entries if entry.token != old]
    file.write((*others, Entry(new)))

    def fail(_: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert not tokens.reread()
        assert not tokens.reread()
    assert tokens.lookup(old.token_id) == old
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert tokens.reread()
    assert tokens.lookup(old.token_id) is None
    assert tokens.lookup(new.token_id) == new


async def test_what_it_cannot_say_at_once_of_a_change_it_says_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path / "home")
    server = SchedulerServer(home, Options(Address("127.0.0.1"), None, "127.0.0.1"))
    ready = asyncio.Event()
    task = asyncio.create_task(server.run(lambda address: ready.set()))
    await ready.wait()
    failed = asyncio.Semaphore(0)

    def fail(_: object) -> None:
        failed.release()
        raise OSError(errno.ENOSPC, "No space left on device")

    file = TokenFile(home.tokens)
    with monkeypatch.context() as patch:
        patch.setattr(home, "publish", fail)
        entry = Entry(Tokens(tmp_path / "other").of_role("client"))
        content = file.write((*file.read().entries, entry))
        async with asyncio.timeout(10 * TIMEOUT_FACTOR):
            for _ in range(2):
                await failed.acquire()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    published, publish = asyncio.Event(), home.publish

    def note(address: dict[str, Any]) -> None:
        publish(address)
        published.set()

    monkeypatch.setattr(home, "publish", note)
    async with asyncio.timeout(10 * TIMEOUT_FACTOR):
        await published.wait()
    assert json.loads(home.address.read_text())["tokens"] == content.digest
    server.leave("the test is over")
    await task
    await asyncio.get_running_loop().shutdown_default_executor()


def test_two_who_change_the_tokens_do_not_undo_each_other(scheduler_and_workers: Start) -> None:
    cluster = scheduler_and_workers(0)
    home = str(cluster.scheduler_home)
    makers = [
        subprocess.Popen(
            [sys.executable, "-m", "fanout.cli.main", "token", "create", "client", "--home", home],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    joins = [maker.communicate(timeout=30 * TIMEOUT_FACTOR)[0].strip() for maker in makers]
    assert {id_of(join) for join in joins} < set(rows(cluster))
