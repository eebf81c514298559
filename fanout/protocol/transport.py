"""Connections between processes: dial with `connect`, listen with `serve`. Containers and their
daemon have `connect_container` and `serve_containers`.

Either way a handler is made for each connection whose handshake is done, and gets a `Transport`
to send by. What a transport promises is in `wire.py`. These two are the only modules with sockets.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, cast

from fanout.config import CONNECT_TIMEOUT_S
from fanout.exceptions import ConnectionError, InvalidError
from fanout.filesystem import short_socket_path
from fanout.protocol import messages as m
from fanout.protocol.connection import Connection
from fanout.protocol.handshake import (
    Allowed,
    ContainerDialler,
    ContainerListener,
    DiallerHandshake,
    Handshake,
    ListenerHandshake,
)
from fanout.protocol.join import Address, JoinString, Token
from fanout.protocol.tls import CertificateError, TlsIdentity, client_context, peer_fingerprint
from fanout.protocol.wire import PeerHandler, Transport

__all__ = [
    "JoinString",
    "PeerHandler",
    "Server",
    "TlsIdentity",
    "Token",
    "Transport",
    "connect",
    "connect_container",
    "serve",
    "serve_containers",
]

logger = logging.getLogger("fanout.protocol")

#: A listener gives a stranger this long to prove its role, and as long before for TLS.
HANDSHAKE_TIMEOUT_S = 10.0
#: Connections that have proved nothing yet; the oldest goes when one more comes. Each holds a
#: descriptor, and a scheduler without descriptors can do nothing.
UNPROVED_COUNT_MAX = 256
BACKLOG = 1024
#: Without descriptors, a listener tries again after this long.
ACCEPT_RETRY_S = 0.2

# --- dialling -------------------------------------------------------------------------------------


async def connect(
    join: JoinString,
    *,
    role: str,
    session_id: bytes,
    info: dict[str, Any],
    handler: Callable[[Transport], PeerHandler],
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> Transport:
    """Connect to a scheduler and prove the role.

    Args:
        join: where and with what token.
        role: "client" or "worker", the one that `join` is for.
        session_id: 16 random bytes that tell this process from others.
        info: plain data about this process, for `Hello.info`.
        handler: makes the handler, before the first message is delivered to it.
        timeout_s: for all of it, handshake included.

    Raises:
        InvalidError: the join string is for another role.
        CertificateError: who answers is not the one of the join string.
        AuthError: the scheduler refuses the token, or cannot prove that it knows the secret.
        VersionError: it speaks another protocol version.
        ConnectionError: it cannot be reached.
    """
    if role != join.role:
        raise InvalidError(
            f"this join string is for a {join.role}; a {role} needs the one that "
            f"`fanout scheduler` prints for a {role}"
        )
    hello = m.Hello(m.PROTOCOL_VERSION, role, join.token_id, session_id, os.urandom(32), info)
    pinned, address = join.fingerprint, join.address

    def make_connection(sink: asyncio.Transport) -> Connection:
        seen = b"" if pinned is None else peer_fingerprint(sink)
        connection = Connection(DiallerHandshake(hello, join.secret, seen))
        if pinned is not None and seen != pinned:
            # Nothing may be told to a stranger, not even the Hello.
            connection.data_to_send()
            connection.fail(
                CertificateError(
                    f"the scheduler at {address} has another certificate than the "
                    f"one of the join string; get a new join string from `fanout scheduler`"
                )
            )
        return connection

    loop = asyncio.get_running_loop()
    transport = Transport(make_connection, handler)
    context = None if pinned is None else client_context()

    async def create() -> None:
        if address.path:
            await _create_unix(transport, address.path)
        else:
            await loop.create_connection(lambda: transport, address.host, address.port, ssl=context)

    where, advice = f"the scheduler at {address}", "is it running? `fanout scheduler` starts one"
    await _dial(create, transport, timeout_s, where, advice)
    return transport


async def connect_container(
    path: str,
    *,
    hello: m.Hello,
    allowed: Allowed,
    handler: Callable[[Transport], PeerHandler],
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> Transport:
    """Connect a container to its daemon's unix socket.

    Args:
        path: of the socket.
        hello: role "container", the container id as token id, its secret as nonce.
        allowed: what the daemon may send.
        handler: as for `connect`.

    Raises:
        AuthError: the daemon does not know the container.
        ConnectionError: the daemon is not there.
    """
    transport = Transport(lambda _: Connection(ContainerDialler(hello, allowed)), handler)
    await _dial(
        lambda: _create_unix(transport, path),
        transport,
        timeout_s,
        f"the worker daemon at {path}",
        "has it ended?",
    )
    return transport


async def _create_unix(transport: Transport, path: str) -> None:
    with short_socket_path(path) as short:
        await asyncio.get_running_loop().create_unix_connection(lambda: transport, short)


async def _dial(
    create: Callable[[], Awaitable[None]],
    transport: Transport,
    timeout_s: float,
    where: str,
    advice: str,
) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            try:
                await create()
            except OSError as error:
                reason = _reason(error)
                raise ConnectionError(f"cannot reach {where}: {reason}; {advice}") from error
            await transport.wait_open()
    except TimeoutError:
        transport.abort()
        raise ConnectionError(f"{where} did not answer within {timeout_s:g} s; {advice}") from None
    except BaseException:
        transport.abort()
        raise


def _reason(error: OSError) -> str:
    """In the system's words; event loops replace them by the address, which is told already."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error)
    return os.strerror(error.errno)


# --- listening ------------------------------------------------------------------------------------


class Server:
    """A listening socket and the connections that came through it."""

    def __init__(
        self,
        make_connection: Callable[[asyncio.Transport], Connection],
        make_handler: Callable[[Transport], PeerHandler],
    ) -> None:
        self._make_connection = make_connection
        self._make_handler = make_handler
        self._listener: asyncio.Server | _TlsListener | None = None
        self._tls_listener: _TlsListener | None = None
        #: Those that have proved nothing yet, oldest first, with their deadlines.
        self._unproved: dict[Transport | _TlsGate, asyncio.TimerHandle] = {}
        self._transports: set[Transport] = set()
        self._path: str | None = None
        #: The TCP port; 0 for a unix socket.
        self.port = 0

    def close(self) -> None:
        """Stop listening, and close every connection with Goodbye "closing" (unless its user has
        closed it with words of its own before)."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self._path is not None and os.path.exists(self._path):
                os.unlink(self._path)
        for transport in list(self._transports):
            transport.close(m.Goodbye("closing", "the listener is closing"))

    async def wait_closed(self) -> None:
        """After `close`: until the sockets of all connections are gone."""
        if self._tls_listener is not None:
            await self._tls_listener.wait_closed()
        for transport in list(self._transports):
            await transport.wait_closed()

    def make_transport(self, gate: _TlsGate | None = None) -> Transport:
        """For asyncio: the protocol of a connection that was accepted, and is past TLS.

        Args:
            gate: what it came through; it gives up its place for the transport.
        """

        def accept(sink: asyncio.Transport) -> Connection:
            if gate is not None:
                # First, or it could be the oldest one, and go as the transport comes.
                self.forget(gate)
            return self._accept(sink)

        return Transport(accept, self._open, self.forget)

    def attach(self, listener: asyncio.Server | _TlsListener, path: str | None = None) -> None:
        """Take over the listening socket."""
        self._listener = listener
        if isinstance(listener, _TlsListener):
            self._tls_listener = listener
        self._path = path
        if path is None:
            self.port = listener.sockets[0].getsockname()[1]

    def _accept(self, sink: asyncio.Transport) -> Connection:
        transport = cast(Transport, sink.get_protocol())
        self._transports.add(transport)
        self.admit(transport)
        return self._make_connection(sink)

    def admit(self, stranger: Transport | _TlsGate) -> None:
        """Let somebody in who has proved nothing yet, for a while."""
        if len(self._unproved) >= UNPROVED_COUNT_MAX:
            oldest = next(iter(self._unproved))
            self._unproved.pop(oldest).cancel()
            oldest.abort()
        loop = asyncio.get_running_loop()
        self._unproved[stranger] = loop.call_later(HANDSHAKE_TIMEOUT_S, self._expire, stranger)

    def _open(self, transport: Transport) -> PeerHandler:
        deadline = self._unproved.pop(transport, None)
        if deadline is not None:
            deadline.cancel()
        return self._make_handler(transport)

    def _expire(self, stranger: Transport | _TlsGate) -> None:
        # It counts as unproved until its socket is gone.
        if isinstance(stranger, _TlsGate):
            stranger.abort()
        else:
            # One who holds a token was only slow, and is welcome the next time.
            text = f"nothing was proved within {HANDSHAKE_TIMEOUT_S:g} s"
            stranger.fail(ConnectionError(text))

    def forget(self, stranger: Transport | _TlsGate) -> None:
        """It is gone, or it is something else from here on."""
        if isinstance(stranger, Transport):
            self._transports.discard(stranger)
        deadline = self._unproved.pop(stranger, None)
        if deadline is not None:
            deadline.cancel()


class _TlsGate:
    """A connection that was accepted, until its TLS handshake is done.

    Event loops accept for TLS too, but tell nobody of a connection before its handshake is over:
    then strangers who begin one and stop could take all descriptors.
    """

    def __init__(self, server: Server, accepted: socket.socket, context: ssl.SSLContext) -> None:
        self._socket = accepted
        #: Ends when the handshake is done or given up.
        self.task = asyncio.get_running_loop().create_task(self._shake_hands(server, context))

    def abort(self) -> None:
        """End it now."""
        self.task.cancel()

    async def wait_closed(self) -> None:
        """After `abort`: until its socket is gone."""
        await asyncio.gather(self.task, return_exceptions=True)

    async def _shake_hands(self, server: Server, context: ssl.SSLContext) -> None:
        server.admit(self)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: server.make_transport(self),
                self._socket,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )
        except OSError as error:
            logger.info("a stranger did not get through the TLS handshake: %s", error)
            self._socket.close()
        except BaseException:
            self._socket.close()
            raise
        finally:
            server.forget(self)


class _TlsListener:
    """Listening sockets whose connections begin with a TLS handshake."""

    def __init__(self, server: Server, context: ssl.SSLContext) -> None:
        self._server = server
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._gates: set[_TlsGate] = set()
        self.sockets: list[socket.socket] = []

    def bind(self, host: str, port: int) -> None:
        """Raises OSError if one of the addresses cannot be bound."""
        # Once, at the start; in a thread it would leave that behind.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                listening = socket.socket(family, socket.SOCK_STREAM)
                self.sockets.append(listening)
                listening.setblocking(False)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind(address)
                listening.listen(BACKLOG)
        except OSError:
            for listening in self.sockets:
                listening.close()
            raise
        for listening in self.sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def close(self) -> None:
        for listening in self.sockets:
            self._loop.remove_reader(listening)
            listening.close()
        for gate in self._gates:
            gate.abort()

    async def wait_closed(self) -> None:
        for gate in list(self._gates):
            await gate.wait_closed()

    def _accept(self, listening: socket.socket) -> None:
        try:
            accepted, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptor is left. The connection waits in the kernel meanwhile.
            logger.error("cannot accept a connection: %s", error)
            self._loop.remove_reader(listening)
            self._loop.call_later(ACCEPT_RETRY_S, self._resume, listening)
            return
        accepted.setblocking(False)
        gate = _TlsGate(self._server, accepted, self._context)
        self._gates.add(gate)
        gate.task.add_done_callback(lambda _: self._gates.discard(gate))

    def _resume(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:
            self._loop.add_reader(listening, self._accept, listening)


async def serve(
    address: Address,
    *,
    tokens: Callable[[str], Token | None],
    welcome: Callable[[m.Hello, str], m.Welcome],
    handler: Callable[[Transport, m.Hello, str], PeerHandler],
    tls: TlsIdentity | None,
) -> Server:
    """Listen for clients and workers.

    Args:
        address: of this machine; port 0 is any, see `Server.port`. A socket is made in a folder
            that only this user may enter, in the place of one that is there: the caller knows that
            nobody listens at it.
        tokens: the token of an id, None if there is none.
        welcome: the answer to a peer that has proved its role (second argument). May raise
            AuthError to refuse it for good, or ConnectionError to have it try again.
        handler: makes the handler of an open connection from it, its Hello and its role.
        tls: this scheduler's certificate; None for plain connections, on loopback and at a socket
            only.

    Raises:
        InvalidError: no TLS, and other machines can reach the host; or the socket cannot be made.
        OSError: the port cannot be bound.
    """
    loop = asyncio.get_running_loop()
    if tls is None and not address.path and not await _is_loopback(address.host):
        raise InvalidError(
            f"{address.host!r} can be reached from other machines, which needs TLS; "
            f"bind 127.0.0.1, or give the scheduler a certificate"
        )
    decoy = os.urandom(32)
    fingerprint = b"" if tls is None else tls.fingerprint

    def make_connection(_: asyncio.Transport) -> Connection:
        handshake: Handshake = ListenerHandshake(
            os.urandom(32), decoy, tokens, welcome, fingerprint
        )
        return Connection(handshake)

    def make_handler(transport: Transport) -> PeerHandler:
        hello = cast(m.Hello, transport.peer)
        return handler(transport, hello, hello.role)

    server = Server(make_connection, make_handler)
    host, port = address.host, address.port
    if address.path:
        try:
            await _listen_unix(server, address.path)
        except OSError as error:
            raise InvalidError(
                f"the socket {address.path} cannot be made: {_reason(error)}. Set FANOUT_HOME (or "
                f"--home) to a folder on a local disk of your own"
            ) from error
    elif tls is None:
        server.attach(await loop.create_server(server.make_transport, host, port, backlog=BACKLOG))
    else:
        listener = _TlsListener(server, tls.server_context())
        listener.bind(host, port)
        server.attach(listener)
    return server


async def serve_containers(
    path: str,
    *,
    accept: Callable[[m.Hello], m.Welcome | None],
    allowed: Allowed,
    handler: Callable[[Transport], PeerHandler],
) -> Server:
    """Listen for the containers of this machine.

    Args:
        path: of the socket, in a folder that only this user may enter.
        accept: the answer to a container, None for one that is not known. Compare secrets with
            `hmac.compare_digest`.
        allowed: what containers may send.
        handler: makes the handler of an open connection; its Hello is `Transport.peer`.

    Raises:
        OSError: it cannot be bound.
    """
    server = Server(lambda _: Connection(ContainerListener(accept, allowed)), handler)
    await _listen_unix(server, path)
    return server


async def _listen_unix(server: Server, path: str) -> None:
    loop = asyncio.get_running_loop()
    with short_socket_path(path) as short:
        listener = await loop.create_unix_server(server.make_transport, short, backlog=BACKLOG)
    os.chmod(path, 0o600)
    server.attach(listener, path)


async def _is_loopback(host: str) -> bool:
    """Whether all that `host` stands for stays on this machine."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass  # It is a name.
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidError(f"cannot bind {host!r}: {error}") from error
    return all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)
