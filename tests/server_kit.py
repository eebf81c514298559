"""A scheduler as a process, and peers of it made of bare connections."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fanout.protocol import messages as m
from fanout.protocol.blob_store import MemoryBlobStore
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import JoinString
from fanout.protocol.transport import Transport, connect
from tests.conftest import TIMEOUT_FACTOR, environment, poll_until, read_state

T = TypeVar("T", bound=m.Message)

APP = b"a" * 16
FUNCTION = b"f" * 16
CALL = b"c" * 16


# --- peers ----------------------------------------------------------------------------------------


class Wire:
    """One end of a connection to the scheduler, and all that came over it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.received: list[m.Message] = []
        self.blobs = MemoryBlobStore()
        self.exchange = BlobExchange(
            self.blobs,
            transport.send,
            transport.send_bulk,
            lambda blob_id: None,
            asyncio.get_running_loop().call_later,
        )
        self.lost: list[Exception | None] = []
        #: False for a peer that leaves what it gets of blobs among what it received.
        self.takes_blobs = True
        self._arrived = asyncio.Event()

    def messages_received(self, messages: list[m.Message]) -> None:
        for message in messages:
            if not (self.takes_blobs and self.exchange.handle(message)):
                self.received.append(message)
        self._arrived.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.exchange.close()
        self.lost.append(error)
        self._arrived.set()

    def writable_changed(self, is_writable: bool) -> None:
        pass

    def send(self, *messages: m.Message) -> None:
        for message in messages:
            self.transport.send(message)

    async def until(self, predicate: Callable[[], Any], what: str) -> Any:
        try:
            async with asyncio.timeout(10 * TIMEOUT_FACTOR):
                while not (value := predicate()):
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise AssertionError(f"no {what}; received {self.received}, lost {self.lost}") from None
        return value

    async def take(self, kind: type[T]) -> T:
        """The first message of this kind, which is removed."""
        found = await self.until(
            lambda: [x for x in self.received if type(x) is kind], f"{kind.__name__} arrived"
        )
        self.received.remove(found[0])
        message: T = found[0]
        return message

    async def ask_status(self, request_id: int = 1) -> dict[str, Any]:
        self.send(m.AskStatus(request_id))
        return (await self.take(m.StatusInfo)).status

    async def until_status(self, predicate: Callable[[dict[str, Any]], bool]) -> None:
        """Ask until the answer is as it should be; a loss takes its time to be noticed."""
        async with asyncio.timeout(10 * TIMEOUT_FACTOR):
            while not predicate(await self.ask_status()):
                pass

    async def until_lost(self) -> Exception | None:
        await self.until(lambda: self.lost, "loss of the connection")
        return self.lost[0]

    async def close(self) -> None:
        self.transport.close()
        await self.transport.wait_closed()


async def dial(address: dict[str, Any], role: str = "client", session: bytes = b"") -> Wire:
    wires: list[Wire] = []

    def handler(transport: Transport) -> Wire:
        wires.append(Wire(transport))
        return wires[0]

    await connect(
        JoinString.parse(address[f"{role}_join"]),
        role=role,
        session_id=session or os.urandom(16),
        info={"pid": os.getpid()},
        handler=handler,
    )
    return wires[0]


async def dial_worker(address: dict[str, Any], number: int = 1, cpu: float = 2.0) -> Wire:
    worker = await dial(address, "worker")
    name, worker_id = f"w{number}", bytes([number]) * 16
    worker.send(m.WorkerReady(worker_id, name, cpu, 1000, True, [], []))
    await worker.take(m.WorkerAccepted)
    return worker


def define(*blobs: bytes) -> list[m.Message]:
    return [
        m.OpenApp(APP, "app"),
        m.DefineFunction(FUNCTION, APP, "f", {"timeout": 300.0}, list(blobs), b"code"),
    ]


def submit(is_durable: bool = False) -> list[m.Message]:
    lengths = (3).to_bytes(4, "little")
    return [
        m.OpenCall(CALL, FUNCTION, is_durable, True, None),
        m.Inputs(CALL, 0, lengths, [], b"abc"),
        m.SealCall(CALL, 1),
    ]


# --- the process ----------------------------------------------------------------------------------


class Daemon:
    """A scheduler process; `start` again after it has ended, in the same home."""

    def __init__(
        self, home: Path, descriptors: tuple[int, int] | None = None, **variables: str
    ) -> None:
        self.home = home
        #: The soft and the hard limit of open files that it begins with.
        self.descriptors = descriptors
        self.variables = variables
        self.process: subprocess.Popen[str] | None = None
        self.address: dict[str, Any] = {}

    def spawn(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fanout_scheduler", "--home", str(self.home), *arguments],
            env=environment(**self.variables, **variables),
            preexec_fn=self._limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _limit(self) -> None:
        if self.descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, self.descriptors)

    def start(self, *arguments: str) -> Daemon:
        process = self.process = self.spawn(*arguments)

        def address() -> dict[str, Any] | None:
            if process.poll() is not None:
                raise AssertionError(f"it ended with {process.returncode}: {process.communicate()}")
            found = read_state(self.home / "scheduler.json")
            return found if found is not None and found["pid"] == process.pid else None

        self.address = poll_until(address, "scheduler.json is there")
        return self

    def kill(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Have a signal end it. Peers of this test do not answer meanwhile; see `kill`."""
        self.kill(number)
        return self.wait()

    def wait(self) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        try:
            process.communicate(timeout=20 * TIMEOUT_FACTOR)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return process.returncode

    def ends_within(self, timeout_s: float) -> bool:
        assert self.process is not None
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True
