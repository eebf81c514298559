"""Strangers at the port of a real scheduler, and at the socket of a real worker: whoever is let in
gets right answers as before meanwhile, and nothing of them stays in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m
from fanout.protocol import transport, wire
from fanout.protocol.frames import PREFIX
from fanout.protocol.join import Address, JoinString
from tests import behaviour_kit as kit
from tests.conftest import TIMEOUT_FACTOR, HandStarted
from tests.hostile_kit import (
    CLIENT,
    WORKER,
    Mutator,
    decoded,
    encoded,
    handshake_of,
    listening,
    memory_kib,
    sample,
)
from tests.server_kit import APP, FUNCTION, Daemon, Wire, dial, dial_worker

HALF_OPEN_COUNT = 1000
#: What a round trip may take while somebody attacks from the same two cores: far more than it does,
#: far less than anybody would notice.
ROUND_TRIP_S_MAX = 0.25
#: What may stay in memory after an attack, beyond what the same attack left the first time. What a
#: stranger leaves refers to itself and waits for the garbage collector, which runs after so many
#: allocations: it is never more than that many hold, and those of TLS are larger.
GROWTH_KIB_MAX = 24 << 10
GROWTH_TLS_KIB_MAX = 80 << 10
#: A whole first frame of the size that a stranger may send, but for its last byte.
LONG_HELLO = PREFIX.pack(16 << 10, 0) + b"x" * ((16 << 10) - 1)
CLIENT_HELLO = bytes.fromhex("16030100f8010000f40303") + bytes(range(240))


class Bystander:
    """A client and a worker that go on working. Calls go through the whole scheduler."""

    def __init__(self, client: Wire, worker: Wire) -> None:
        self.client = client
        self.worker = worker
        self.count = 0

    @classmethod
    async def make(cls, address: dict[str, Any]) -> Bystander:
        client, worker = await dial(address), await dial_worker(address)
        client.send(
            m.OpenApp(APP, "app"),
            m.DefineFunction(FUNCTION, APP, "f", {"max_containers": 1}, [], b"code"),
        )
        return cls(client, worker)

    async def round_trip(self) -> float:
        """Have one input run, check its output, and say how long that took."""
        self.count += 1
        call_id, value = os.urandom(16), self.count.to_bytes(4, "little")
        lengths = (4).to_bytes(4, "little")
        started = time.perf_counter()
        self.client.send(m.SubmitCall(call_id, FUNCTION, False, True, None, "", lengths, [], value))
        lease = await self.worker.take(m.Lease)
        assert (lease.call_id, bytes(lease.payload)) == (call_id, value)
        self.worker.send(
            m.ContainerStarted(lease.container_id, 1, 0.1),
            m.LeaseOutputs(
                self.count, lease.lease_id, call_id, 0, 5, lengths, b"\0", [], value[::-1]
            ),
        )
        outputs = await self.client.take(m.Outputs)
        assert (outputs.call_id, bytes(outputs.payload)) == (call_id, value[::-1])
        self.client.send(m.CallsFinished([call_id]))
        return time.perf_counter() - started

    async def close(self) -> None:
        assert not self.client.lost
        assert not self.worker.lost
        await self.client.close()
        await self.worker.close()


@pytest.fixture(params=["plain", "tls"])
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "home").start(
        *(["--host", "0.0.0.0"] if request.param == "tls" else [])
    )
    yield made
    made.end(signal.SIGKILL)


# --- attacks --------------------------------------------------------------------------------------

Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@contextlib.asynccontextmanager
async def held_open(dial_raw: Dial, count: int, greeting: bytes) -> AsyncIterator[None]:
    """So many connections that say no more than this."""
    writers = []
    try:
        for _ in range(count):
            _, writer = await dial_raw()
            writers.append(writer)
            writer.write(greeting)
        yield
    finally:
        for writer in writers:
            writer.transport.abort()


async def answer_to(dial_raw: Dial, data: bytes) -> bytes:
    """What a peer is told that sends this: one frame, as whoever sends it then gives the peer time
    to read it and closes. Nothing where the connection just ends."""
    reader, writer = await dial_raw()
    try:
        writer.write(data)
        async with asyncio.timeout(10 * TIMEOUT_FACTOR):
            answer = await reader.readexactly(PREFIX.size)
            return answer + await reader.readexactly(sum(PREFIX.unpack(answer)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    finally:
        writer.transport.abort()


def _dialler(address: dict[str, Any]) -> Dial:
    where = JoinString.parse(address["client_join"]).address
    return lambda: asyncio.open_connection(where.host, where.port)


def _is_refusal(answer: bytes, is_tls: bool) -> bool:
    """Whether the peer read why. Without TLS there is nothing that one who expects it understands:
    it is just closed."""
    if is_tls:
        return answer == b""
    (goodbye,) = decoded(answer)
    return isinstance(goodbye, m.Goodbye) and goodbye.code == "protocol" and bool(goodbye.text)


async def _attack(name: str, address: dict[str, Any], bystander: Bystander) -> list[float]:
    """Carry out an attack, and measure the bystander's round trips while it lasts."""
    dial_raw = _dialler(address)
    is_tls = "?fp=" in address["client_join"]
    trips: list[float] = []
    if name in ("silence", "half a hello", "slow bytes"):
        greeting = {"silence": b"", "half a hello": LONG_HELLO, "slow bytes": b"\x01"}[name]
        async with held_open(dial_raw, HALF_OPEN_COUNT, greeting):
            trips += [await bystander.round_trip() for _ in range(30)]
            # Whoever has a token gets in past them, too.
            late = await dial(address)
            assert "workers" in await late.ask_status()
            await late.close()
    else:
        mutator = Mutator(1)
        for _ in range(HALF_OPEN_COUNT // 10):
            garbage = mutator.random.randbytes(2000)
            data = CLIENT_HELLO + garbage if name == "broken TLS" else garbage
            answers = await asyncio.gather(*(answer_to(dial_raw, data) for _ in range(10)))
            assert all(_is_refusal(answer, is_tls) for answer in answers)
            trips.append(await bystander.round_trip())
    return trips


@pytest.mark.parametrize(
    "attack", ["silence", "half a hello", "slow bytes", "random bytes", "broken TLS"]
)
async def test_strangers_disturb_nobody_and_leave_nothing(daemon: Daemon, attack: str) -> None:
    assert daemon.process is not None
    pid = daemon.process.pid
    bystander = await Bystander.make(daemon.address)
    await bystander.round_trip()
    await _attack(attack, daemon.address, bystander)
    before = memory_kib(pid)
    trips = await _attack(attack, daemon.address, bystander)
    assert statistics.median(trips) < ROUND_TRIP_S_MAX * TIMEOUT_FACTOR
    growth = memory_kib(pid) - before
    is_tls = (daemon.home / "tls.pem").exists()
    limit = GROWTH_TLS_KIB_MAX if is_tls else GROWTH_KIB_MAX
    assert growth < limit, f"{growth} KiB beside {before} stay"
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    assert descriptors < 2 * transport.UNPROVED_COUNT_MAX + 50
    await bystander.close()


def _is_refused(role: str, data: bytes) -> bool:
    """Whether these bytes break a rule for one who has proved this role."""
    connection = listening()
    for sent in handshake_of(CLIENT if role == "client" else WORKER):
        connection.receive_data(sent)
    try:
        connection.receive_data(data)
    except ProtocolError:
        return True
    return False


@pytest.mark.parametrize("role", ["client", "worker"])
async def test_one_who_is_let_in_and_then_breaks_the_rules_is_told_and_thrown_out(
    tmp_path: Path, role: str
) -> None:
    daemon = Daemon(tmp_path / "home").start()
    try:
        assert daemon.process is not None
        bystander = await Bystander.make(daemon.address)
        kinds = sorted(m.KINDS.values(), key=lambda cls: cls.KIND)
        thrown_out = 0
        before = 0
        for seed in range(150):
            mutator = Mutator(seed)
            peer = await dial(daemon.address, role)
            socket_of = peer.transport._socket
            assert socket_of is not None
            data = mutator.spoil(encoded(sample(mutator.random.choice(kinds)))) + b"\xff" * 64
            socket_of.write(data)
            if _is_refused(role, data):
                assert isinstance(await peer.until_lost(), ProtocolError)
                thrown_out += 1
            else:
                # It waits for the rest of a long frame, or took what is valid.
                peer.transport.abort()
            await bystander.round_trip()
            if seed == 50:
                before = memory_kib(daemon.process.pid)
        assert thrown_out > 100
        assert memory_kib(daemon.process.pid) - before < GROWTH_KIB_MAX
        assert list(daemon.home.glob("crash-*")) == []
        await bystander.close()
    finally:
        daemon.end(signal.SIGKILL)


def test_strangers_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    log = wire._StrangerLog()
    for second in range(50):
        log.warn(100.0 + second, f"fault {second}")
    assert len(caplog.records) == wire.STRANGER_WARNINGS_MAX
    caplog.clear()
    log.warn(100.0 + wire.STRANGER_INTERVAL_S, "another fault")
    texts = [record.getMessage() for record in caplog.records]
    assert texts == ["40 more strangers were turned away", "turning a stranger away, another fault"]


async def test_a_byte_now_and_then_does_not_prolong_the_handshake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transport, "HANDSHAKE_TIMEOUT_S", 0.5)
    server = await transport.serve(
        Address("127.0.0.1"),
        tokens=lambda token_id: None,
        welcome=lambda hello, role: m.Welcome(1, {}),
        handler=lambda own, hello, role: pytest.fail("a stranger was let in"),
        tls=None,
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    answer = b""
    for byte in PREFIX.pack(1000, 0) + bytes(1000):
        writer.write(bytes([byte]))
        try:
            async with asyncio.timeout(0.05):
                answer = await reader.read(1000)
            break
        except TimeoutError:
            continue
    (goodbye,) = decoded(answer)
    assert isinstance(goodbye, m.Goodbye)
    assert (goodbye.code, "nothing was proved within 0.5 s" in goodbye.text) == ("refused", True)
    writer.transport.abort()
    server.close()
    await server.wait_closed()


# --- the worker's socket for its containers -------------------------------------------------------


def _socket_of(pid: int) -> str:
    """Where the worker listens for its containers."""
    inodes = {
        os.readlink(path).partition("[")[2][:-1]
        for path in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(path).startswith("socket:")
    }
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes and fields[7].endswith("/daemon"):
            return fields[7]
    raise AssertionError("the worker has no such socket")


def test_strangers_at_a_workers_socket_disturb_no_container(
    scheduler_and_workers: Callable[..., HandStarted],
) -> None:
    cluster = scheduler_and_workers(1, cpu=2)
    worker = cluster.workers["w1"]
    path = _socket_of(worker.pid)
    garbage = Mutator(1).random.randbytes(2000)

    async def attack() -> None:
        dial_raw: Dial = lambda: asyncio.open_unix_connection(path)  # noqa: E731
        for greeting in (b"", LONG_HELLO):
            async with held_open(dial_raw, HALF_OPEN_COUNT // 2, greeting):
                assert await kit.trunk_async.remote.aio(3) == expected
        hello = m.Hello(m.PROTOCOL_VERSION, "container", "1", bytes(16), bytes(32), {})
        for data, code in ((garbage, "protocol"), (encoded(hello), "auth")):
            for _ in range(50):
                (goodbye,) = decoded(await answer_to(dial_raw, data))
                assert isinstance(goodbye, m.Goodbye)
                assert goodbye.code == code
            assert await kit.trunk_async.remote.aio(3) == expected

    expected = sum(3 + i for i in range(5)) + sum(range(5))
    with kit.app.run():
        assert kit.trunk_async.remote(3) == expected
        asyncio.run(attack())
        before = memory_kib(worker.pid)
        asyncio.run(attack())
        assert memory_kib(worker.pid) - before < GROWTH_KIB_MAX
    assert worker.poll() is None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(path)
