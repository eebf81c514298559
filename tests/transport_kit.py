"""What tests of connections need: a listener that echoes, peers that dial, one made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import uvloop

from fanout.exceptions import Error
from fanout.protocol import messages as m
from fanout.protocol import transport
from fanout.protocol.connection import Connection, State
from fanout.protocol.handshake import DiallerHandshake
from fanout.protocol.join import Address, JoinString, Token
from fanout.protocol.tls import TlsIdentity
from fanout.protocol.wire import Transport
from tests.conftest import TIMEOUT_FACTOR

TIMEOUT_S = 10.0
SESSION_ID = b"s" * 16


class Recorder:
    """A handler that keeps what it was told and lets tests wait for it."""

    def __init__(self, own: Transport, react: Callable[[Transport, m.Message], None]) -> None:
        self.transport = own
        self.react = react
        self.messages: list[m.Message] = []
        self.read_count = 0
        self.writable: list[bool] = []
        self.lost: list[Exception | None] = []
        self._changed = asyncio.Event()

    def messages_received(self, messages: list[m.Message]) -> None:
        assert messages
        self.read_count += 1
        self.messages += messages
        self._changed.set()
        for message in messages:
            self.react(self.transport, message)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.append(error)
        self._changed.set()

    def writable_changed(self, is_writable: bool) -> None:
        self.writable.append(is_writable)
        self._changed.set()

    async def until(self, predicate: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not predicate():
                self._changed.clear()
                await self._changed.wait()

    async def until_lost(self) -> Exception | None:
        await self.until(lambda: bool(self.lost))
        assert len(self.lost) == 1
        return self.lost[0]

    async def echo(self, number: int = 1) -> None:
        """One round trip to a listener that echoes heartbeats."""
        count = len(self.messages)
        self.transport.send(m.Heartbeat(number))
        await self.until(lambda: len(self.messages) > count)


def echo_heartbeats(own: Transport, message: m.Message) -> None:
    if isinstance(message, m.Heartbeat):
        own.send(message)


def ignore(own: Transport, message: m.Message) -> None:
    pass


class Site:
    """A listener with its tokens, and all that dials it."""

    def __init__(self) -> None:
        self.tokens = {role: Token.new(role) for role in ("client", "worker")}
        self.react: Callable[[Transport, m.Message], None] = echo_heartbeats
        self.accepted: list[Recorder] = []
        self.roles: list[str] = []
        self.dialled: list[Recorder] = []
        self.server: transport.Server
        self.fingerprint: bytes | None = None
        #: With this all are refused who come from now on.
        self.refusal: Error | None = None
        self.refused_count = 0
        self._came = asyncio.Event()

    async def listen(self, identity: TlsIdentity | None = None, path: str = "") -> None:
        self.fingerprint = None if identity is None else identity.fingerprint
        by_id = {token.token_id: token for token in self.tokens.values()}
        self.server = await transport.serve(
            Address(path=path) if path else Address("127.0.0.1"),
            tokens=by_id.get,
            welcome=self._welcome,
            handler=self._accept,
            tls=identity,
        )

    def _welcome(self, hello: m.Hello, role: str) -> m.Welcome:
        if self.refusal is not None:
            self.refused_count += 1
            self._came.set()
            raise self.refusal
        return m.Welcome(3, {"role": role})

    def _accept(self, own: Transport, hello: m.Hello, role: str) -> Recorder:
        self.accepted.append(Recorder(own, self.react))
        self.roles.append(role)
        self._came.set()
        return self.accepted[-1]

    async def until_accepted(self, count: int) -> Recorder:
        """The last connection when so many have come."""
        await self.until(lambda: len(self.accepted) >= count)
        return self.accepted[-1]

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Return when enough have come, or were refused."""
        async with asyncio.timeout(TIMEOUT_S * TIMEOUT_FACTOR):
            while not predicate():
                self._came.clear()
                await self._came.wait()

    def join_of(self, role: str) -> JoinString:
        return JoinString.of(
            self.tokens[role], Address("127.0.0.1", self.server.port), self.fingerprint
        )

    async def dial(self, role: str = "worker", join: JoinString | None = None) -> Recorder:
        made: list[Recorder] = []

        def handler(own: Transport) -> Recorder:
            made.append(Recorder(own, ignore))
            return made[0]

        await transport.connect(
            join or self.join_of(role),
            role=role,
            session_id=SESSION_ID,
            info={"pid": os.getpid()},
            handler=handler,
            timeout_s=TIMEOUT_S,
        )
        self.dialled += made
        return made[0]

    async def close(self) -> None:
        for recorder in self.dialled:
            recorder.transport.abort()
            await recorder.transport.wait_closed()
        self.server.close()
        async with asyncio.timeout(TIMEOUT_S):
            await self.server.wait_closed()


class RawPeer:
    """A peer that does only what it is told: a socket, and a connection state for the handshake."""

    def __init__(self, port: int) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.port = port

    async def dial(self) -> RawPeer:
        await asyncio.get_running_loop().sock_connect(self.sock, ("127.0.0.1", self.port))
        return self

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def read(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)

    async def read_to_end(self) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while part := await self.read():
                data += part
        return data

    async def prove(self, token: Token) -> Connection:
        hello = m.Hello(
            m.PROTOCOL_VERSION, token.role, token.token_id, SESSION_ID, os.urandom(32), {}
        )
        connection = Connection(DiallerHandshake(hello, token.secret))
        while connection.state is State.OPENING:
            await self.send(b"".join(connection.data_to_send()))
            connection.receive_data(await self.read())
        return connection


def parts_of(size_bytes: int, blob_id: bytes = bytes(32)) -> Iterator[m.Message]:
    part = memoryview(bytes(m.BLOB_PART_SIZE_BYTES))
    for offset in range(0, size_bytes, len(part)):
        yield m.BlobPart(blob_id, offset, part)


# --- fixtures -------------------------------------------------------------------------------------


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    is_stock = request.param == "asyncio"
    return asyncio.DefaultEventLoopPolicy() if is_stock else uvloop.EventLoopPolicy()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    await made.listen()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def raw(site: Site) -> AsyncIterator[RawPeer]:
    peer = await RawPeer(site.server.port).dial()
    try:
        yield peer
    finally:
        peer.sock.close()
