"""Connections between processes: dial with `connect`, listen with `serve`, or over a unix socket.

Either way a handler is made for each connection whose handshake is done, and gets a `Transport`
to send by. What a transport promises is in `wire.py`. These two are the only modules with sockets.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any, cast

from fanout.config import CONNECT_TIMEOUT_S
from fanout.exceptions import AuthError, ConnectionError, InvalidError
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
from fanout.protocol.join import JoinString, Token
from fanout.protocol.tls import TlsIdentity, client_context, peer_fingerprint
from fanout.protocol.wire import PeerHandler, Transport

__all__ = [
    "JoinString",
    "PeerHandler",
    "Server",
    "TlsIdentity",
    "Token",
    "Transport",
    "connect",
    "connect_unix",
    "serve",
    "serve_unix",
]

#: A listener gives a stranger this long to prove its role.
HANDSHAKE_TIMEOUT_S = 10.0
#: Connections that have proved nothing yet; the oldest goes when one more comes.
UNPROVED_COUNT_MAX = 256
#: `sun_path` of Linux has 108 bytes, one of them for the end.
UNIX_PATH_SIZE_BYTES_MAX = 107


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
        AuthError: the scheduler refuses the token, is not the one of the join string, or cannot
            prove that it knows the secret.
        VersionError: it speaks another protocol version.
        ConnectionError: it cannot be reached.
    """
    if role != join.role:
        raise InvalidError(
            f"this join string is for a {join.role}; a {role} needs the one that "
            f"`fanout scheduler` prints for a {role}"
        )
    hello = m.Hello(m.PROTOCOL_VERSION, role, join.token_id, session_id, os.urandom(32), info)
    pinned = join.fingerprint

    def make_connection(sink: asyncio.Transport) -> Connection:
        seen = b"" if pinned is None else peer_fingerprint(sink)
        connection = Connection(DiallerHandshake(hello, join.secret, seen))
        if pinned is not None and seen != pinned:
            # Nothing may be told to a stranger, not even the Hello.
            connection.data_to_send()
            connection.fail(
                AuthError(
                    f"the scheduler at {join.host}:{join.port} has another certificate than the "
                    f"one of the join string; get a new join string from `fanout scheduler`"
                )
            )
        return connection

    loop = asyncio.get_running_loop()
    transport = Transport(make_connection, handler)
    context = None if pinned is None else client_context()
    where = f"the scheduler at {join.host}:{join.port}"
    await _dial(
        lambda: loop.create_connection(lambda: transport, join.host, join.port, ssl=context),
        transport,
        timeout_s,
        where,
        "is it running? `fanout scheduler` starts one",
    )
    return transport


async def connect_unix(
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
    loop = asyncio.get_running_loop()
    transport = Transport(lambda _: Connection(ContainerDialler(hello, allowed)), handler)
    await _dial(
        lambda: loop.create_unix_connection(lambda: transport, path),
        transport,
        timeout_s,
        f"the worker daemon at {path}",
        "has it ended?",
    )
    return transport


async def _dial(
    create: Callable[[], Any], transport: Transport, timeout_s: float, where: str, advice: str
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
        self._listener: asyncio.AbstractServer | None = None
        #: Those that have proved nothing yet, oldest first, with their deadlines.
        self._unproved: dict[Transport, asyncio.TimerHandle] = {}
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
        for transport in list(self._transports):
            await transport.wait_closed()

    def make_transport(self) -> Transport:
        """For asyncio: the protocol of a connection that was just accepted."""
        return Transport(self._accept, self._open, self._forget)

    def attach(self, listener: asyncio.Server, path: str | None = None) -> None:
        """Take over the listening socket."""
        self._listener = listener
        self._path = path
        if path is None:
            self.port = listener.sockets[0].getsockname()[1]

    def _accept(self, sink: asyncio.Transport) -> Connection:
        transport = cast(Transport, sink.get_protocol())
        self._transports.add(transport)
        if len(self._unproved) >= UNPROVED_COUNT_MAX:
            oldest = next(iter(self._unproved))
            self._unproved.pop(oldest).cancel()
            oldest.abort()
        loop = asyncio.get_running_loop()
        self._unproved[transport] = loop.call_later(HANDSHAKE_TIMEOUT_S, self._expire, transport)
        return self._make_connection(sink)

    def _open(self, transport: Transport) -> PeerHandler:
        deadline = self._unproved.pop(transport, None)
        if deadline is not None:
            deadline.cancel()
        return self._make_handler(transport)

    def _expire(self, transport: Transport) -> None:
        # It counts as unproved until its socket is gone.
        transport.fail(AuthError(f"nothing was proved within {HANDSHAKE_TIMEOUT_S:g} s"))

    def _forget(self, transport: Transport) -> None:
        self._transports.discard(transport)
        deadline = self._unproved.pop(transport, None)
        if deadline is not None:
            deadline.cancel()


async def serve(
    host: str,
    port: int,
    *,
    tokens: Callable[[str], Token | None],
    welcome: Callable[[m.Hello, str], m.Welcome],
    handler: Callable[[Transport, m.Hello, str], PeerHandler],
    tls: TlsIdentity | None,
) -> Server:
    """Listen for clients and workers.

    Args:
        host: an address of this machine.
        port: 0 for any; see `Server.port`.
        tokens: the token of an id, None if there is none.
        welcome: the answer to a peer that has proved its role (second argument). May raise
            AuthError to refuse it.
        handler: makes the handler of an open connection from it, its Hello and its role.
        tls: this scheduler's certificate; None for plain connections, on loopback only.

    Raises:
        InvalidError: no TLS and `host` is not loopback.
        OSError: the address cannot be bound.
    """
    loop = asyncio.get_running_loop()
    if tls is None and not await _is_loopback(host):
        raise InvalidError(
            f"{host!r} can be reached from other machines, which needs TLS; "
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
    options: dict[str, Any] = {}
    if tls is not None:
        options = {"ssl": tls.server_context(), "ssl_handshake_timeout": HANDSHAKE_TIMEOUT_S}
    server.attach(
        await loop.create_server(server.make_transport, host, port, backlog=1024, **options)
    )
    return server


async def serve_unix(
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
        InvalidError: the path is too long for a unix socket.
        OSError: it cannot be bound.
    """
    size = len(os.fsencode(path))
    if size > UNIX_PATH_SIZE_BYTES_MAX:
        raise InvalidError(
            f"the socket path {path!r} has {size} bytes, Linux takes {UNIX_PATH_SIZE_BYTES_MAX}; "
            f"set FANOUT_HOME to a shorter path"
        )
    loop = asyncio.get_running_loop()
    server = Server(lambda _: Connection(ContainerListener(accept, allowed)), handler)
    listener = await loop.create_unix_server(server.make_transport, path, backlog=1024)
    os.chmod(path, 0o600)
    server.attach(listener, path)
    return server


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
