"""Transports on loopback, on the stock event loop and on uvloop: real sockets, nothing replaced."""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fanout.exceptions import (
    AuthError,
    ConnectionError,
    InternalError,
    InvalidError,
    ProtocolError,
    VersionError,
)
from fanout.protocol import messages as m
from fanout.protocol import tls, transport, wire
from fanout.protocol.join import Address, JoinString, Token
from fanout.protocol.tls import CertificateError, TlsIdentity
from fanout.protocol.wire import Transport
from tests.conftest import poll_until
from tests.strategies import frame_of
from tests.transport_kit import (
    SESSION_ID,
    TIMEOUT_S,
    RawPeer,
    Recorder,
    Site,
    echo_heartbeats,
    ignore,
    parts_of,
)
from tests.transport_kit import event_loop_policy as event_loop_policy
from tests.transport_kit import raw as raw
from tests.transport_kit import site as site

# The hook that replaces this fixture exists only in later versions than the oldest one we allow.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")


# --- carrying messages ----------------------------------------------------------------------------


async def test_both_sides_know_who_is_there(site: Site) -> None:
    client, worker = await site.dial("client"), await site.dial("worker")
    await client.echo()
    await worker.echo()
    assert site.roles == ["client", "worker"]
    assert client.transport.peer == m.Welcome(3, {"role": "client"})
    hello = site.accepted[1].transport.peer
    assert isinstance(hello, m.Hello)
    assert (hello.role, hello.session_id, hello.info) == (
        "worker",
        SESSION_ID,
        {"pid": os.getpid()},
    )


async def test_ten_thousand_messages_arrive_in_order_and_come_back(site: Site) -> None:
    peer = await site.dial()
    for number in range(10_000):
        peer.transport.send(m.Heartbeat(number))
    await peer.until(lambda: len(peer.messages) == 10_000)
    assert peer.messages == [m.Heartbeat(number) for number in range(10_000)]


async def test_what_is_sent_in_one_turn_arrives_in_few_reads(site: Site) -> None:
    peer = await site.dial()
    await peer.echo()
    before = site.accepted[0].read_count
    for number in range(2000):
        peer.transport.send(m.Heartbeat(number))
    await peer.until(lambda: len(peer.messages) == 2001)
    assert site.accepted[0].read_count - before <= 5


async def test_large_payloads_and_small_messages_keep_their_order(site: Site) -> None:
    peer = await site.dial("client")
    payload = os.urandom(8 << 20)
    for number in range(3):
        peer.transport.send(m.AskStatus(number))
        peer.transport.send(
            m.DefineFunction(bytes(16), bytes(16), "f", {}, [], memoryview(payload))
        )
    await peer.until(lambda: bool(site.accepted))
    await site.accepted[0].until(lambda: len(site.accepted[0].messages) == 6)
    for number, message in enumerate(site.accepted[0].messages):
        if number % 2:
            assert isinstance(message, m.DefineFunction)
            assert message.payload == payload
        else:
            assert message == m.AskStatus(number // 2)


async def test_a_streaming_blob_does_not_delay_small_messages(site: Site) -> None:
    peer = await site.dial()
    await peer.echo()
    listener = site.accepted[0]
    size = 64 << 20
    part_count = size // m.BLOB_PART_SIZE_BYTES

    def is_streaming() -> bool:
        return len(listener.messages) - len(peer.messages) < part_count

    began = time.perf_counter()
    peer.transport.send_bulk(parts_of(size))
    round_trips = []
    while is_streaming():
        start = time.perf_counter()
        await peer.echo()
        round_trips.append(time.perf_counter() - start)
    took = time.perf_counter() - began
    # In one queue with the blob, the first round trip would take as long as all of it.
    assert len(round_trips) >= 40
    assert statistics.median(round_trips) < took / 40


async def test_bulk_sources_take_turns(site: Site) -> None:
    peer = await site.dial()
    ids = [bytes([number]) * 32 for number in range(3)]
    for blob_id in ids:
        peer.transport.send_bulk(parts_of(4 << 20, blob_id))
    await peer.until(lambda: bool(site.accepted))
    listener = site.accepted[0]
    await listener.until(lambda: len(listener.messages) == 3 * 64)
    order = [message.blob_id for message in listener.messages if isinstance(message, m.BlobPart)]
    assert order == ids * 64


async def test_bulk_is_not_pulled_while_the_peer_does_not_read(site: Site, raw: RawPeer) -> None:
    connection = await raw.prove(site.tokens["client"])
    own = site.accepted[0].transport
    pulled = 0
    has_pulled = asyncio.Event()

    def count() -> Iterator[m.Message]:
        nonlocal pulled
        for part in parts_of(64 << 20):
            pulled += 1
            has_pulled.set()
            yield part

    own.send_bulk(count())
    own.send(m.Notice("first", ""))
    # It stalls when the kernel's buffers and our own small one are full.
    async with asyncio.timeout(TIMEOUT_S):
        while not own._is_bulk_held:
            has_pulled.clear()
            await has_pulled.wait()
    assert 0 < pulled * m.BLOB_PART_SIZE_BYTES < 32 << 20
    stalled_at = pulled
    other = await site.dial()
    for _ in range(200):
        await other.echo()
    assert pulled - stalled_at < 32
    assert site.accepted[0].writable == []
    received: list[m.Message] = []
    while len(received) < 1025:
        received += connection.receive_data(await raw.read())
    assert pulled == 1024


async def test_on_both_sides_the_kernel_keeps_little_that_is_unsent(site: Site) -> None:
    """Only then a blob leaves no more in the way of other messages than this."""
    peer = await site.dial()
    for own in (peer.transport, (await site.until_accepted(1)).transport):
        sock = own._socket.get_extra_info("socket")  # type: ignore[union-attr]
        unsent_max = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
        assert unsent_max == wire.NOTSENT_SIZE_BYTES_MAX


async def test_a_slow_reader_is_told_of_and_so_is_its_recovery(site: Site, raw: RawPeer) -> None:
    connection = await raw.prove(site.tokens["client"])
    listener = site.accepted[0]
    own = listener.transport
    sent = 0
    while own.is_writable:
        own.send(m.StatusInfo(sent, {"x": bytes(200_000)}))
        sent += 1
        assert sent < 1000
    assert listener.writable == [], "told from inside send"
    await listener.until(lambda: listener.writable == [False])
    received: list[m.Message] = []
    while len(received) < sent:
        received += connection.receive_data(await raw.read())
    await listener.until(lambda: listener.writable == [False, True])
    assert own.is_writable
    numbers = [message.request_id for message in received if isinstance(message, m.StatusInfo)]
    assert numbers == list(range(sent))


# --- ending ---------------------------------------------------------------------------------------


async def test_close_flushes_what_was_sent_and_both_sides_end_in_order(site: Site) -> None:
    peer = await site.dial("client")
    payload = bytes(5 << 20)
    peer.transport.send(m.DefineFunction(bytes(16), bytes(16), "f", {}, [], payload))
    peer.transport.send(m.AskStatus(1))
    peer.transport.close(m.Goodbye("done", "that was all"))
    peer.transport.send(m.AskStatus(2))
    assert peer.transport.is_closed
    assert await peer.until_lost() is None
    listener = site.accepted[0]
    assert await listener.until_lost() is None
    assert listener.messages[1:] == [m.AskStatus(1), m.Goodbye("done", "that was all")]


async def test_two_sides_that_close_at_once_both_end_in_order(site: Site) -> None:
    peer = await site.dial()
    await peer.echo()
    began = time.monotonic()
    site.accepted[0].transport.close()
    peer.transport.close()
    assert await peer.until_lost() is None
    assert await site.accepted[0].until_lost() is None
    assert time.monotonic() - began < wire.CLOSE_TIMEOUT_S


async def test_a_peer_that_vanishes_is_an_error(site: Site, raw: RawPeer) -> None:
    await raw.prove(site.tokens["worker"])
    raw.sock.close()
    error = await site.accepted[0].until_lost()
    assert isinstance(error, ConnectionError)
    assert str(error).endswith("went away without a goodbye")


async def test_of_a_peer_that_vanishes_within_a_frame_the_error_says_so(
    site: Site, raw: RawPeer
) -> None:
    await raw.prove(site.tokens["client"])
    await raw.send(frame_of(m.AskStatus(1)) + frame_of(m.AskStatus(2))[:-1])
    await site.accepted[0].until(lambda: site.accepted[0].messages == [m.AskStatus(1)])
    raw.sock.close()
    error = await site.accepted[0].until_lost()
    assert isinstance(error, ConnectionError)
    assert str(error).endswith("went away without a goodbye, in the middle of a frame")


@pytest.mark.slow
async def test_a_peer_that_lives_and_does_not_read_is_not_lost(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SILENCE_S", 0.4)
    monkeypatch.setattr(wire, "SILENCE_LOOK_INTERVAL_S", 0.01)
    raw = await RawPeer(site.server.port).dial()
    await raw.prove(site.tokens["client"])
    listener = site.accepted[0]
    own = listener.transport
    while own.is_writable:
        own.send(m.StatusInfo(1, {"x": bytes(200_000)}))
    sock = own._socket.get_extra_info("socket")  # type: ignore[union-attr]

    def unheard_ms() -> int:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, wire.TCP_INFO.size)
        return int(wire.TCP_INFO.unpack(info)[-1])

    # The kernel asks less and less often whether there is room again.
    for is_over in (
        lambda: unheard_ms() > 2000 * wire.SILENCE_S,
        lambda: unheard_ms() < 1000 * wire.SILENCE_S,
    ):
        await asyncio.to_thread(poll_until, is_over, "the kernel asks again")
    await asyncio.get_running_loop().shutdown_default_executor()
    assert listener.lost == []
    raw.sock.close()


async def test_closing_does_not_wait_for_ever_for_a_peer_that_does_not_read(
    site: Site, raw: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "CLOSE_TIMEOUT_S", 0.05)
    await raw.prove(site.tokens["client"])
    own = site.accepted[0].transport
    while own.is_writable:
        own.send(m.StatusInfo(1, {"x": bytes(200_000)}))
    own.close()
    async with asyncio.timeout(TIMEOUT_S):
        await own.wait_closed()
    assert site.accepted[0].lost == [None]


async def test_a_closing_server_says_goodbye_to_all(site: Site) -> None:
    peers = [await site.dial(), await site.dial("client")]
    site.server.close()
    for peer in peers:
        assert await peer.until_lost() is None
        assert isinstance(peer.messages[-1], m.Goodbye)
        assert peer.messages[-1].code == "closing"
    with pytest.raises(ConnectionError, match="cannot reach"):
        await site.dial()


# --- one bad connection and the others ------------------------------------------------------------


async def test_garbage_is_answered_with_the_reason_and_harms_nobody_else(
    site: Site, raw: RawPeer, caplog: pytest.LogCaptureFixture
) -> None:
    good = await site.dial()
    await good.echo()
    await raw.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"Is the peer fanout?" in await raw.read()
    await good.echo()
    raw.sock.close()
    again = await RawPeer(site.server.port).dial()
    connection = await again.prove(site.tokens["client"])
    await again.send(b"\xff" * 100_000)
    (goodbye,) = connection.receive_data(await again.read())
    assert isinstance(goodbye, m.Goodbye)
    assert goodbye.code == "protocol"
    again.sock.close()
    await good.echo()
    assert isinstance(await site.accepted[1].until_lost(), ProtocolError)
    assert good.lost == []
    assert "Is the peer fanout?" in caplog.text


async def test_a_worker_cannot_submit_calls(site: Site) -> None:
    other, worker = await site.dial("worker"), await site.dial("worker")
    worker.transport.send(m.OpenCall(bytes(16), bytes(16), False, True, None))
    error = await worker.until_lost()
    assert isinstance(error, ProtocolError)
    assert "OpenCall is not allowed" in str(error)
    assert [recorder.messages for recorder in site.accepted] == [[], []]
    await other.echo()


async def test_an_exception_of_a_handler_closes_its_own_connection_only(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def react(own: Transport, message: m.Message) -> None:
        if message == m.Heartbeat(13):
            raise RuntimeError("a bug in the handler")
        echo_heartbeats(own, message)

    site.react = react
    good, bad = await site.dial(), await site.dial()
    bad.transport.send(m.Heartbeat(13))
    assert isinstance(await bad.until_lost(), InternalError)
    assert isinstance(bad.messages[-1], m.Goodbye)
    assert isinstance(await site.accepted[1].until_lost(), InternalError)
    await good.echo()
    assert "a bug in the handler" in caplog.text


async def test_a_bulk_source_that_fails_closes_its_connection(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Iterator[m.Message]:
        yield from parts_of(1 << 20)
        raise OSError("the disk is gone")

    peer = await site.dial()
    peer.transport.send_bulk(broken())
    assert isinstance(await peer.until_lost(), InternalError)
    assert "the disk is gone" in caplog.text


# --- strangers ------------------------------------------------------------------------------------


async def test_an_unknown_token_is_refused(site: Site) -> None:
    join = JoinString.of(Token.new("client"), Address("127.0.0.1", site.server.port))
    with pytest.raises(AuthError, match="fanout scheduler"):
        await site.dial("client", join)
    assert site.accepted == []


async def test_who_is_refused_does_not_say_that_it_turns_a_stranger_away(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "_strangers", wire._StrangerLog())
    site.refusal = ConnectionError("no room")
    with pytest.raises(ConnectionError, match="no room"):
        await site.dial("client")
    site.tokens["client"] = Token.new("client")
    with pytest.raises(AuthError, match="cannot prove"):
        await site.dial("client")
    # The first is the listener's, and the second would be the dialler's own.
    (record,) = caplog.records
    assert record.getMessage().startswith("turning a stranger away")
    assert "no room" in record.getMessage()


async def test_a_join_string_of_another_role_is_refused_at_once(site: Site) -> None:
    with pytest.raises(InvalidError, match="for a worker; a client needs"):
        await site.dial("client", site.join_of("worker"))


async def test_another_protocol_version_is_named(site: Site, raw: RawPeer) -> None:
    await raw.send(frame_of(m.Hello(99, "client", "id", SESSION_ID, bytes(32), {})))
    assert b"the other 99" in await raw.read()


async def test_a_dialler_raises_the_version_error_of_the_listener() -> None:
    is_over = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame_of(m.Goodbye("version", "I speak 99")))
        await reader.read()
        writer.close()
        await writer.wait_closed()
        is_over.set()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    site = Site()
    with pytest.raises(VersionError, match="I speak 99"):
        await site.dial("client", JoinString.of(site.tokens["client"], Address("127.0.0.1", port)))
    await is_over.wait()
    server.close()
    await server.wait_closed()


async def test_nobody_listening_is_an_error_that_says_where_and_what_to_start() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        join = JoinString.of(Token.new("client"), Address("127.0.0.1", port))
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}.*`fanout scheduler` starts"):
            await Site().dial("client", join)


async def test_a_listener_that_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        join = JoinString.of(Token.new("client"), Address("127.0.0.1", silent.getsockname()[1]))
        with pytest.raises(ConnectionError, match=r"did not answer within 0\.05 s"):
            await transport.connect(
                join,
                role="client",
                session_id=SESSION_ID,
                info={},
                handler=lambda own: Recorder(own, ignore),
                timeout_s=0.05,
            )


async def test_strangers_are_few_and_the_oldest_goes_first(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "UNPROVED_COUNT_MAX", 3)
    strangers = [await RawPeer(site.server.port).dial() for _ in range(5)]
    good = await site.dial()
    await good.echo()
    assert [await peer.read_to_end() for peer in strangers[:3]] == [b"", b"", b""]
    await strangers[3].prove(site.tokens["client"])
    for peer in strangers:
        peer.sock.close()


async def test_a_stranger_who_says_nothing_is_cut_with_the_reason(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "HANDSHAKE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(wire, "CLOSE_TIMEOUT_S", 0.05)
    silent = await RawPeer(site.server.port).dial()
    assert b"nothing was proved within 0.05 s" in await silent.read_to_end()
    silent.sock.close()


async def test_plain_connections_are_for_loopback_only() -> None:
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(InvalidError, match="needs TLS"):
            await transport.serve(
                Address(host),
                tokens=lambda _: None,
                welcome=lambda hello, role: m.Welcome(1, {}),
                handler=lambda own, hello, role: Recorder(own, ignore),
                tls=None,
            )


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture
async def tls_site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site()
    await made.listen(TlsIdentity.load_or_create(tmp_path))
    try:
        yield made
    finally:
        await made.close()


async def test_tls_carries_messages_and_bulk(tls_site: Site) -> None:
    peer = await tls_site.dial()
    peer.transport.send_bulk(parts_of(8 << 20))
    for number in range(50):
        await peer.echo(number)
    await tls_site.accepted[0].until(lambda: len(tls_site.accepted[0].messages) == 50 + 128)
    peer.transport.close()
    assert await peer.until_lost() is None
    assert await tls_site.accepted[0].until_lost() is None


async def test_a_tls_handshake_that_is_done_does_not_evict_itself(
    tls_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted, admit = asyncio.Semaphore(0), tls_site.server.admit

    def note(stranger: Transport) -> None:
        admit(stranger)
        admitted.release()

    monkeypatch.setattr(transport, "UNPROVED_COUNT_MAX", 3)
    monkeypatch.setattr(tls_site.server, "admit", note)
    # It is the first of three that take all places, and goes on when they are taken.
    reader, writer = await asyncio.open_connection("127.0.0.1", tls_site.server.port)
    await admitted.acquire()
    strangers = [await RawPeer(tls_site.server.port).dial() for _ in range(2)]
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for _ in strangers:
                await admitted.acquire()
            await writer.start_tls(tls.client_context())
            hello = m.Hello(m.PROTOCOL_VERSION, "client", "t", SESSION_ID, bytes(32), {})
            writer.write(frame_of(hello))
            assert await reader.read(1), "it was thrown out"
    finally:
        writer.transport.abort()
        for peer in strangers:
            peer.sock.close()


async def test_another_certificate_than_the_pinned_one_is_refused(tls_site: Site) -> None:
    tls_site.fingerprint = b"x" * 32
    with pytest.raises(CertificateError, match="another certificate"):
        await tls_site.dial()
    assert tls_site.accepted == []


async def test_a_plain_dialler_at_a_tls_listener_is_told_what_is_missing(tls_site: Site) -> None:
    tls_site.fingerprint = None
    with pytest.raises(ConnectionError, match="does it need TLS"):
        await tls_site.dial()


async def test_a_tls_dialler_at_a_plain_listener_fails(site: Site) -> None:
    site.fingerprint = b"x" * 32
    with pytest.raises(ConnectionError, match="cannot reach the scheduler"):
        await site.dial()


async def test_a_connection_that_is_dropped_here_is_named_by_its_address(tls_site: Site) -> None:
    peer = await tls_site.dial()
    peer.transport.abort()
    assert f"127.0.0.1:{tls_site.server.port}" in str(await peer.until_lost())


def test_an_identity_is_made_once_and_is_private(tmp_path: Path) -> None:
    first = TlsIdentity.load_or_create(tmp_path)
    assert TlsIdentity.load_or_create(tmp_path) == first
    assert len(first.fingerprint) == 32
    assert first.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [tls.FILE_NAME]


def test_a_broken_identity_is_refused_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / tls.FILE_NAME
    path.write_text("nonsense")
    with pytest.raises(InvalidError, match="delete it"):
        TlsIdentity.load_or_create(tmp_path)
    assert path.read_text() == "nonsense"


# --- containers -----------------------------------------------------------------------------------


async def test_a_container_reaches_its_daemon_with_its_secret_only(tmp_path: Path) -> None:
    path = str(tmp_path / "daemon.sock")
    accepted: list[Recorder] = []

    def accept(hello: m.Hello) -> m.Welcome | None:
        is_known = hello.token_id == "5" and hmac.compare_digest(hello.nonce, b"s" * 32)
        return m.Welcome(9, {}) if is_known else None

    def handler(own: Transport) -> Recorder:
        accepted.append(Recorder(own, echo_heartbeats))
        return accepted[-1]

    async def dial(secret: bytes) -> Recorder:
        hello = m.Hello(m.PROTOCOL_VERSION, "container", "5", SESSION_ID, secret, {})
        made: list[Recorder] = []

        def keep(own: Transport) -> Recorder:
            made.append(Recorder(own, ignore))
            return made[0]

        both = m.TO_CLIENT | {m.Heartbeat}
        await transport.connect_container(path, hello=hello, allowed=both, handler=keep)
        return made[0]

    server = await transport.serve_containers(
        path, accept=accept, allowed=m.FROM_NESTED_CLIENT, handler=handler
    )
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(AuthError, match="does not know this container"):
        await dial(b"x" * 32)
    container = await dial(b"s" * 32)
    await container.echo()
    assert len(accepted) == 1
    container.transport.send(m.OpenApp(bytes(16), "not for containers"))
    assert isinstance(await container.until_lost(), ProtocolError)
    server.close()
    await server.wait_closed()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConnectionError, match="worker daemon"):
        await dial(b"s" * 32)


async def test_a_socket_that_cannot_be_made_is_named_and_so_is_what_to_set(tmp_path: Path) -> None:
    path = str(tmp_path / ("long " * 30) / "missing" / "socket")
    with pytest.raises(InvalidError, match="missing/socket cannot be made.*FANOUT_HOME"):
        await Site().listen(path=path)


async def test_of_strangers_that_were_turned_away_nothing_is_kept(site: Site) -> None:
    for number in range(20):
        raw = await RawPeer(site.server.port).dial()
        try:
            if number % 2:
                await raw.send(b"GET / HTTP/1.1\r\n\r\n")
                await raw.read()
        finally:
            raw.sock.close()
    own = site.server
    with ThreadPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(
            pool, poll_until, lambda: not (own._transports or own._unproved), "all are gone"
        )
