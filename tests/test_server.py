"""The scheduler as a process, with real clients and workers made of bare connections."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgpack
import pytest

from fanout.exceptions import AuthError, ProtocolError
from fanout.protocol import messages as m
from fanout.protocol.blob_store import FileBlobStore
from fanout.protocol.join import Address, JoinString
from fanout_scheduler.blobs import DROP_GRACE_S, BlobKeeper
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import Command, Event, FrameReceived
from fanout_scheduler.home import Home
from fanout_scheduler.relay import wrap
from fanout_scheduler.server import (
    EXIT_BROKEN,
    Options,
    SchedulerServer,
)
from fanout_scheduler.store import load_key
from tests.server_kit import APP, CALL, FUNCTION, Daemon, Wire, define, dial, dial_worker, submit

SESSION = b"n" * 16
BLOB = b"b" * 32


# --- the process ----------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "home")
    yield made
    if made.process is not None:
        made.end(signal.SIGKILL)


def test_it_says_where_it_is_to_its_owner_alone(daemon: Daemon) -> None:
    daemon.start()
    file = daemon.home / "scheduler.json"
    assert file.stat().st_mode & 0o777 == 0o600
    expected = "pid boot_id started address epoch client_join worker_join tokens version python"
    assert set(daemon.address) == set(expected.split())
    assert daemon.address["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert abs(daemon.address["started"] - time.time()) < 60
    for role in ("client", "worker"):
        join = JoinString.parse(daemon.address[f"{role}_join"])
        assert (join.address.host, join.role) == ("127.0.0.1", role)
        assert str(join.address) == daemon.address["address"]
    assert tcp_sockets_of(daemon.address["pid"])
    modes = {path.stat().st_mode & 0o077 for path in daemon.home.rglob("*")}
    assert modes == {0}, "something in the home is open to others"


def test_it_tells_a_person_how_to_join(daemon: Daemon) -> None:
    daemon.start()
    process = daemon.process
    assert process is not None
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert f"fanout worker '{daemon.address['worker_join']}'" in output
    assert f"export FANOUT_URL='{daemon.address['client_join']}'" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(daemon: Daemon, number: signal.Signals) -> None:
    daemon.start()
    assert daemon.end(number) == 0
    assert not (daemon.home / "scheduler.json").exists()


def test_after_a_kill_it_comes_back_with_the_same_tokens_and_a_higher_epoch(
    daemon: Daemon,
) -> None:
    first = daemon.start().address
    assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    port = JoinString.parse(first["client_join"]).address.port
    second = daemon.start("--port", str(port)).address
    assert second["epoch"] == first["epoch"] + 1
    assert second["client_join"] == first["client_join"]


def test_a_second_scheduler_in_one_home_is_refused_and_told_the_pid(daemon: Daemon) -> None:
    daemon.start()
    second = daemon.spawn()
    _, text = second.communicate(timeout=20)
    assert second.returncode == 1
    assert f"its pid is {daemon.address['pid']}" in text
    assert str(daemon.home) in text
    assert "Traceback" not in text
    assert not daemon.ends_within(0)
    assert (daemon.home / "scheduler.json").exists()


def test_a_damaged_database_ends_the_start_and_is_left_alone(daemon: Daemon) -> None:
    daemon.home.mkdir(mode=0o700)
    load_key(daemon.home / "store.key")
    database = daemon.home / "scheduler.db"
    database.write_bytes(b"not a database" * 1000)
    process = daemon.spawn()
    _, text = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "scheduler.db is damaged" in text
    assert "Traceback" not in text
    assert database.read_bytes() == b"not a database" * 1000


def test_embedded_serves_this_machine_alone(daemon: Daemon) -> None:
    process = daemon.spawn("--embedded", "--host", "0.0.0.0")
    _, text = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Leave out --host and --port" in text


def tcp_sockets_of(pid: int) -> set[str]:
    """The inodes of the TCP sockets that a process has."""
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    own = {link.removeprefix("socket:[").rstrip("]") for link in links}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    return own & {line.split()[9] for table in tables for line in table.splitlines()[1:]}


async def test_embedded_listens_at_a_socket_of_its_owner(daemon: Daemon) -> None:
    """In a home whose path is longer than that of a socket may be."""
    daemon.home = daemon.home / ("deep " * 25).strip() / "home?"
    address = daemon.start("--embedded", "--idle-timeout", "60").address
    socket_file = daemon.home / "scheduler.sock"
    assert JoinString.parse(address["client_join"]).address == Address(path=str(socket_file))
    assert address["address"] == str(socket_file)
    assert socket_file.stat().st_mode & 0o777 == 0o600
    assert tcp_sockets_of(address["pid"]) == set(), "it can be reached from elsewhere"
    client = await dial(address)
    assert f"process {address['pid']}" in repr(client.transport)
    daemon.end(signal.SIGTERM)
    await client.until_lost()
    assert not socket_file.exists()


async def test_a_socket_that_a_killed_scheduler_left_behind_is_replaced(daemon: Daemon) -> None:
    daemon.start("--embedded", "--idle-timeout", "60")
    daemon.end(signal.SIGKILL)
    assert (daemon.home / "scheduler.sock").exists()
    client = await dial(daemon.start("--embedded", "--idle-timeout", "60").address)
    assert (await client.ask_status())["epoch"] == 2
    await client.close()


async def test_a_peer_is_told_why_the_scheduler_leaves(daemon: Daemon) -> None:
    client = await dial(daemon.start().address)
    worker = await dial_worker(daemon.address)
    daemon.kill(signal.SIGTERM)
    for wire in (client, worker):
        goodbye = await wire.take(m.Goodbye)
        assert goodbye.code == "shutdown"
        assert "SIGTERM" in goodbye.text
        assert await wire.until_lost() is None
    assert daemon.wait() == 0


@pytest.mark.slow
async def test_a_peer_that_reads_nothing_does_not_hold_it_up(daemon: Daemon) -> None:
    address = daemon.start().address
    join = JoinString.parse(address["client_join"])
    _, writer = await asyncio.open_connection(join.address.host, join.address.port)
    try:
        assert daemon.end() == 0
    finally:
        writer.transport.abort()


async def test_ask_shutdown_ends_an_idle_scheduler_after_its_answer(daemon: Daemon) -> None:
    client = await dial(daemon.start().address)
    client.send(m.AskShutdown(7, False))
    answer = await client.take(m.ShutdownInfo)
    assert (answer.request_id, answer.is_leaving) == (7, True)
    assert await client.until_lost() is None
    assert daemon.wait() == 0


async def test_a_worker_token_cannot_submit_calls(daemon: Daemon) -> None:
    client = await dial(daemon.start().address)
    worker = await dial_worker(daemon.address)
    worker.send(m.OpenApp(APP, "app"))
    assert isinstance(await worker.until_lost(), ProtocolError)
    await client.until_status(lambda status: status["workers"] == [])
    await client.close()


async def test_an_unknown_token_is_refused(daemon: Daemon) -> None:
    address = daemon.start().address
    join = JoinString.parse(address["client_join"])
    wrong = JoinString(join.address, join.role, join.token_id, b"\1" * 32)
    with pytest.raises(AuthError):
        await dial({"client_join": str(wrong)})


async def test_off_loopback_it_speaks_tls_only(daemon: Daemon) -> None:
    address = daemon.start("--host", "0.0.0.0").address
    join = JoinString.parse(address["client_join"])
    assert join.fingerprint is not None
    loopback = Address("127.0.0.1", join.address.port)
    local = JoinString(loopback, "client", join.token_id, join.secret)
    with pytest.raises(ConnectionError):
        await dial({"client_join": str(local)})
    pinned = JoinString(loopback, "client", join.token_id, join.secret, join.fingerprint)
    client = await dial({"client_join": str(pinned)})
    assert (await client.ask_status())["epoch"] == 1
    await client.close()


# --- idle -----------------------------------------------------------------------------------------


def test_an_idle_embedded_scheduler_leaves(daemon: Daemon) -> None:
    daemon.start("--embedded", "--idle-timeout", "0.1")
    assert daemon.wait() == 0
    assert not (daemon.home / "scheduler.json").exists()


@pytest.mark.slow
def test_it_stays_while_somebody_holds_the_start_lock(daemon: Daemon) -> None:
    daemon.home.mkdir(mode=0o700)
    with (daemon.home / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        daemon.start("--embedded", "--idle-timeout", "0.1")
        assert not daemon.ends_within(1.5)
    assert daemon.wait() == 0


@pytest.mark.slow
async def test_it_stays_while_a_client_is_connected_but_not_for_a_worker(daemon: Daemon) -> None:
    client = await dial(daemon.start("--embedded", "--idle-timeout", "0.1").address)
    worker = await dial_worker(daemon.address)
    assert not daemon.ends_within(1.5)
    await client.close()
    assert (await worker.take(m.Goodbye)).code == "shutdown"
    await worker.until_lost()
    assert daemon.wait() == 0


@pytest.mark.slow
async def test_it_stays_while_a_spawned_call_is_open(daemon: Daemon) -> None:
    client = await dial(daemon.start("--embedded", "--idle-timeout", "0.1").address)
    client.send(*define(), *submit(is_durable=True))
    await client.until(
        lambda: [x for x in client.received if isinstance(x, m.InputsStored) and x.is_sealed],
        "durable call",
    )
    await client.close()
    assert not daemon.ends_within(1.5)


# --- work -----------------------------------------------------------------------------------------


async def run_one(client: Wire, worker: Wire, *messages: m.Message) -> m.Lease:
    """Submit, and be the worker up to the point where the container has its lease."""
    client.send(*messages)
    start = await worker.take(m.StartContainer)
    worker.send(m.ContainerStarted(start.container_id, 4242, 0.01))
    return await worker.take(m.Lease)


def report(lease: m.Lease, value: bytes) -> m.LeaseOutputs:
    lengths = len(value).to_bytes(4, "little")
    return m.LeaseOutputs(
        1, lease.lease_id, lease.call_id, lease.start, 100, lengths, b"\0", [], value
    )


async def test_a_call_goes_through(daemon: Daemon) -> None:
    client = await dial(daemon.start().address)
    worker = await dial_worker(daemon.address)
    lease = await run_one(client, worker, *define(), *submit())
    assert lease.payload == b"abc"
    worker.send(report(lease, b"result"))
    outputs = await client.take(m.Outputs)
    assert (outputs.start, outputs.statuses, outputs.payload) == (0, b"\0", b"result")
    assert (await worker.take(m.OutputsAck)).sequence == 1
    await client.close()
    await worker.close()


async def test_a_spawned_call_survives_kill_9_with_its_output(daemon: Daemon) -> None:
    client = await dial(daemon.start().address)
    client.send(*define(), *submit(is_durable=True))
    await client.until(
        lambda: [x for x in client.received if isinstance(x, m.InputsStored) and x.is_sealed],
        "durable call",
    )
    daemon.end(signal.SIGKILL)
    await client.until_lost()

    worker = await dial_worker(daemon.start().address)
    start = await worker.take(m.StartContainer)
    worker.send(m.ContainerStarted(start.container_id, 4242, 0.01))
    lease = await worker.take(m.Lease)
    assert (lease.call_id, lease.payload) == (CALL, b"abc")
    assert lease.lease_id >> m.EPOCH_SHIFT == 2
    worker.send(report(lease, b"result"))
    await worker.take(m.OutputsAck)
    daemon.end(signal.SIGKILL)

    reader = await dial(daemon.start().address)
    reader.send(m.FetchOutputs(1, CALL, 0, 1))
    assert (await reader.take(m.Outputs)).payload == b"result"
    await reader.close()


async def test_a_full_disk_fails_the_call_that_does_not_fit_and_nothing_else(
    daemon: Daemon,
) -> None:
    client = await dial(daemon.start().address)
    client.send(*define(), *submit(is_durable=True)[:1])
    await client.take(m.CallOpened)
    pid = daemon.address["pid"]
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    # From now on the kernel lets no file of the scheduler grow beyond this.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (256 << 10, hard))
    size = 1 << 20
    client.send(m.Inputs(CALL, 0, size.to_bytes(4, "little"), [], b"x" * size))
    failed = await client.take(m.CallFailed)
    code, text, _ = msgpack.unpackb(bytes(failed.payload))
    assert code == "store"
    assert "scheduler.db" in text
    assert (await client.ask_status())["epoch"] == 1
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    other = b"d" * 16
    client.send(m.OpenCall(other, FUNCTION, True, True, None))
    client.send(m.Inputs(other, 0, size.to_bytes(4, "little"), [], b"x" * size))
    stored = await client.take(m.InputsStored)
    assert stored.call_id == other
    assert [tuple(pair) for pair in stored.stored] == [(0, 1)]
    await client.close()


async def test_blobs_of_a_function_reach_the_worker_once(daemon: Daemon) -> None:
    content = os.urandom(300_000)
    blob_id = hashlib.sha256(content).digest()
    client = await dial(daemon.start().address)
    worker = await dial_worker(daemon.address)
    client.blobs.put(blob_id, content)
    client.exchange.offer(blob_id)
    lease = await run_one(client, worker, *define(blob_id), *submit())
    await worker.until(lambda: worker.blobs.has(blob_id), "blob")
    assert worker.blobs.buffer(blob_id) == content
    worker.send(report(lease, b"result"))
    await client.take(m.Outputs)
    await client.close()
    await worker.close()


def test_blobs_that_no_stored_record_names_are_deleted_at_the_start(daemon: Daemon) -> None:
    daemon.start()
    daemon.end(signal.SIGKILL)
    orphan, draft = daemon.home / "blobs" / ("ab" * 32), daemon.home / "blobs" / "x.1-1.part"
    orphan.write_bytes(b"orphan")
    draft.write_bytes(b"draft")
    daemon.start()
    assert list((daemon.home / "blobs").iterdir()) == []


# --- nested clients -------------------------------------------------------------------------------


async def open_nested(daemon: Daemon) -> tuple[Wire, Wire, m.Lease]:
    client = await dial(daemon.start().address)
    worker = await dial_worker(daemon.address)
    lease = await run_one(client, worker, *define(), *submit())
    worker.send(m.SessionOpened(SESSION, lease.container_id))
    return client, worker, lease


async def take_relayed(worker: Wire) -> m.Message:
    relay = await worker.take(m.Relay)
    assert relay.session_id == SESSION
    return m.decode(relay.header, bytes(relay.payload))


async def test_a_nested_client_is_served_through_its_worker(daemon: Daemon) -> None:
    client, worker, _ = await open_nested(daemon)
    worker.send(wrap(SESSION, m.AskFunction(5, FUNCTION, {})))
    answer = await take_relayed(worker)
    assert isinstance(answer, m.FunctionInfo)
    assert (answer.request_id, answer.info["running"]) == (5, 1)
    await client.close()
    await worker.close()


async def test_blobs_of_a_nested_client_travel_inside_its_session(daemon: Daemon) -> None:
    client, worker, _ = await open_nested(daemon)
    content = b"x" * 100_000
    blob_id = hashlib.sha256(content).digest()
    worker.send(wrap(SESSION, m.BlobOffer(blob_id, len(content))))
    assert await take_relayed(worker) == m.BlobWanted(blob_id)
    for offset in range(0, len(content), m.BLOB_PART_SIZE_BYTES):
        part = content[offset : offset + m.BLOB_PART_SIZE_BYTES]
        worker.send(wrap(SESSION, m.BlobPart(blob_id, offset, part)))
    worker.send(wrap(SESSION, m.BlobOffer(blob_id, len(content))))
    assert await take_relayed(worker) == m.BlobHeld(blob_id)
    assert (daemon.home / "blobs" / blob_id.hex()).read_bytes() == content
    await client.close()
    await worker.close()


@pytest.mark.parametrize(
    "bad",
    [
        m.Relay(SESSION, b"\xc1 not msgpack", b""),
        m.Relay(SESSION, m.encode_header(m.AskShutdown(1, True)), b""),
        m.Relay(SESSION, m.encode_header(m.AskStatus(1)), b""),
    ],
    ids=["malformed", "not allowed", "would tell the ids of all calls"],
)
async def test_a_fault_of_a_nested_client_ends_its_session_alone(
    daemon: Daemon, bad: m.Relay
) -> None:
    client, worker, lease = await open_nested(daemon)
    worker.send(bad)
    goodbye = await take_relayed(worker)
    assert isinstance(goodbye, m.Goodbye)
    assert goodbye.code == "protocol"
    assert (await worker.take(m.SessionClosed)).session_id == SESSION
    worker.send(wrap(SESSION, m.AskCall(1, CALL)))  # too late, and nobody's fault
    worker.send(report(lease, b"result"))
    assert (await client.take(m.Outputs)).payload == b"result"
    assert not worker.lost
    await client.close()
    await worker.close()


async def test_a_session_ends_with_its_worker(daemon: Daemon) -> None:
    client, worker, _ = await open_nested(daemon)
    worker.send(wrap(SESSION, m.AskCall(1, CALL)))
    await take_relayed(worker)
    assert (await client.ask_status())["sessions"] == 2
    await worker.close()
    await client.until_status(lambda status: status["sessions"] == 1)
    await client.close()


# --- bugs of the core -----------------------------------------------------------------------------


class FaultyCore(Scheduler):
    """A core with a bug: it cannot bear `AskCall`, or a decision when told so."""

    is_undecided = False
    is_broken = False

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.failed = asyncio.Event()

    def handle(self, event: Event, now: float) -> None:
        if isinstance(event, FrameReceived) and isinstance(event.message, m.AskCall):
            raise KeyError("a bug")
        super().handle(event, now)

    def decide(self, now: float) -> list[Command]:
        if self.is_undecided:
            self.failed.set()
            raise ZeroDivisionError("another bug")
        return super().decide(now)

    def check(self) -> None:
        assert not self.is_broken, "invariant 3 is broken"
        super().check()


@pytest.fixture
async def faulty(tmp_path: Path) -> AsyncIterator[tuple[SchedulerServer, asyncio.Task[int]]]:
    home = Home(tmp_path / "home")
    server = SchedulerServer(home, Options(Address("127.0.0.1"), None, "127.0.0.1"))
    server.core = FaultyCore(server.epoch)
    server.core.restore([], server.clock.now())
    ready = asyncio.Event()
    task = asyncio.create_task(server.run(lambda address: ready.set()))
    await ready.wait()
    yield server, task
    server.leave("the test is over")
    await task
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_bug_costs_one_connection_and_is_written_down(
    faulty: tuple[SchedulerServer, asyncio.Task[int]], tmp_path: Path
) -> None:
    address = json.loads((tmp_path / "home" / "scheduler.json").read_text())
    unlucky, other = await dial(address), await dial(address)
    unlucky.send(m.AskCall(1, CALL))
    assert (await unlucky.take(m.Goodbye)).code == "internal"
    assert (await other.ask_status())["epoch"] == 1
    (file,) = (tmp_path / "home").glob("crash-*.txt")
    text = file.read_text()
    assert "KeyError: 'a bug'" in text
    assert "AskCall(request_id=1" in text
    assert "'epoch': 1" in text
    assert file.stat().st_mode & 0o777 == 0o600
    await other.close()


async def test_a_broken_core_ends_the_process(
    faulty: tuple[SchedulerServer, asyncio.Task[int]], tmp_path: Path
) -> None:
    server, task = faulty
    assert isinstance(server.core, FaultyCore)
    server.core.is_broken = True
    client = await dial(json.loads((tmp_path / "home" / "scheduler.json").read_text()))
    client.send(m.AskCall(1, CALL))
    assert await task == EXIT_BROKEN
    assert (await client.take(m.Goodbye)).code == "shutdown"


async def test_a_core_that_cannot_decide_ends_the_process(
    faulty: tuple[SchedulerServer, asyncio.Task[int]],
) -> None:
    server, task = faulty
    assert isinstance(server.core, FaultyCore)
    server.core.is_undecided = True
    server.schedule_turn()
    async with asyncio.timeout(10):
        assert await task == EXIT_BROKEN


async def test_a_decision_that_fails_once_is_made_again(
    faulty: tuple[SchedulerServer, asyncio.Task[int]], tmp_path: Path
) -> None:
    server, _ = faulty
    assert isinstance(server.core, FaultyCore)
    client = await dial(json.loads((tmp_path / "home" / "scheduler.json").read_text()))
    server.core.is_undecided = True
    client.send(m.AskStatus(1))

    async with asyncio.timeout(10):
        await server.core.failed.wait()
    server.core.is_undecided = False
    assert (await client.take(m.StatusInfo)).request_id == 1
    assert len(list((tmp_path / "home").glob("crash-*.txt"))) == 1
    await client.close()


# --- blobs that the core lets go of ---------------------------------------------------------------


@pytest.fixture
def keeper(tmp_path: Path) -> BlobKeeper:
    made = BlobKeeper(FileBlobStore(tmp_path / "blobs"))
    made.store.put(BLOB, b"content")
    return made


def test_a_dropped_blob_is_deleted_after_its_grace(keeper: BlobKeeper) -> None:
    keeper.drop(BLOB, 100.0)
    keeper.expire(100.0 + DROP_GRACE_S - 1)
    assert keeper.store.has(BLOB)
    keeper.expire(100.0 + DROP_GRACE_S)
    assert not keeper.store.has(BLOB)
    assert not keeper.has_dropped


def test_a_frame_that_names_a_dropped_blob_keeps_it(keeper: BlobKeeper) -> None:
    keeper.drop(BLOB, 100.0)
    lengths = (1).to_bytes(4, "little")
    named = m.Inputs(CALL, 0, lengths, [[0, [BLOB, b"o" * 32]]], b"x")  # type: ignore[list-item]
    assert keeper.revive(named) == [BLOB]
    assert keeper.revive(named) == []
    keeper.expire(100.0 + 2 * DROP_GRACE_S)
    assert keeper.store.has(BLOB)


def test_an_offer_of_a_dropped_blob_begins_its_grace_again(keeper: BlobKeeper) -> None:
    keeper.drop(BLOB, 100.0)
    keeper.keep_offered(BLOB, 150.0)
    keeper.expire(100.0 + DROP_GRACE_S)
    assert keeper.store.has(BLOB)
    keeper.expire(150.0 + DROP_GRACE_S)
    assert not keeper.store.has(BLOB)


def test_only_wanted_blobs_are_found_at_the_start(keeper: BlobKeeper, tmp_path: Path) -> None:
    keeper.store.put(b"o" * 32, b"other")
    (tmp_path / "blobs" / ("x" * 64)).touch()
    (tmp_path / "blobs" / (BLOB.hex() + ".1-2.part")).touch()
    again = BlobKeeper(FileBlobStore(tmp_path / "blobs"))
    assert again.sizes() == {BLOB: len(b"content"), b"o" * 32: len(b"other")}
    again.clean({BLOB, b"l" * 32})
    assert again.sizes() == {BLOB: len(b"content")}
    assert not list((tmp_path / "blobs").glob("*.part"))
