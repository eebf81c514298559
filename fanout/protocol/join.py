"""Join strings and tokens: all that a client or a worker must be told to join a scheduler.

A join string is one line that a person can copy::

    fanout://<role>.<token id>:<secret>@<host>:<port>[?fp=<certificate fingerprint>]
    fanout://<role>.<token id>:<secret>@/<path of a unix socket>

The token id is public and travels in the open; the secret never travels, it only keys the proofs
of the handshake. With a fingerprint the connection is TLS to exactly that certificate; without
one it is plain, which a scheduler accepts on loopback and on its socket only. The path is percent
encoded.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
from dataclasses import dataclass, field
from urllib.parse import quote_from_bytes, unquote_to_bytes

from fanout.exceptions import InvalidError

SCHEME = "fanout://"
ROLES = ("client", "worker")
SECRET_SIZE_BYTES = 32
FINGERPRINT_SIZE_BYTES = 32

_TOKEN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}")


@dataclass(frozen=True, slots=True)
class Token:
    """The right to be a client or a worker of one scheduler. The secret is not in its repr."""

    token_id: str
    role: str
    secret: bytes = field(repr=False)

    @classmethod
    def new(cls, role: str) -> Token:
        """A fresh random token for `role` ("client" or "worker")."""
        assert role in ROLES, role
        return cls(secrets.token_hex(8), role, secrets.token_bytes(SECRET_SIZE_BYTES))


@dataclass(frozen=True, slots=True)
class Address:
    """Where a scheduler listens: at a port of a host, or at a unix socket, which has a path and is
    for its own machine. `str()` is for people."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class JoinString:
    """A join string in parts. `str()` gives the line, secret and all; `repr()` hides the secret."""

    address: Address
    role: str
    token_id: str
    secret: bytes = field(repr=False)
    fingerprint: bytes | None = None

    @classmethod
    def of(cls, token: Token, address: Address, fingerprint: bytes | None = None) -> JoinString:
        """What to tell somebody who shall join with `token` the scheduler at `address`."""
        return cls(address, token.role, token.token_id, token.secret, fingerprint)

    def __str__(self) -> str:
        secret = base64.urlsafe_b64encode(self.secret).decode().rstrip("=")
        path = self.address.path
        address = quote_from_bytes(os.fsencode(path)) if path else str(self.address)
        query = f"?fp={self.fingerprint.hex()}" if self.fingerprint else ""
        return f"{SCHEME}{self.role}.{self.token_id}:{secret}@{address}{query}"

    @classmethod
    def parse(cls, text: str) -> JoinString:
        """The parts of a join string.

        Raises:
            InvalidError: naming the part that is wrong. The secret is never in the text.
        """
        text = text.strip()
        if not text.startswith(SCHEME):
            raise _wrong(f"it does not begin with {SCHEME}")
        rest, mark, query = text.removeprefix(SCHEME).partition("?")
        credentials, at, where = rest.rpartition("@")
        if not at:
            raise _wrong("there is no @ between the token and the address")
        name, colon, secret = credentials.partition(":")
        role, dot, token_id = name.partition(".")
        if not colon or not dot:
            raise _wrong("the token is not <role>.<token id>:<secret>")
        if role not in ROLES:
            raise _wrong(f"the role {role!r} is not one of {', '.join(ROLES)}")
        if not _TOKEN_ID.fullmatch(token_id):
            raise _wrong(f"the token id {token_id!r} is not 1 to 64 letters, digits, - or _")
        is_path = where.startswith("/")
        address = _parse_path(where) if is_path else _parse_address(where.removesuffix("/"))
        if is_path and mark:
            raise _wrong("nothing can follow the path of a socket, as ?fp= does")
        fingerprint = _parse_query(query) if mark else None
        return cls(address, role, token_id, _parse_secret(secret), fingerprint)


def _wrong(what: str) -> InvalidError:
    return InvalidError(
        f"this is not a join string: {what}. Copy the whole line that `fanout scheduler` printed: "
        f"{SCHEME}<role>.<token id>:<secret>@<host>:<port>"
    )


def _parse_secret(text: str) -> bytes:
    try:
        secret = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise _wrong("the secret is not base64url") from None
    if len(secret) != SECRET_SIZE_BYTES:
        raise _wrong(f"the secret has {len(secret)} bytes instead of {SECRET_SIZE_BYTES}")
    return secret


def _parse_path(where: str) -> Address:
    path = unquote_to_bytes(where)
    if b"\0" in path:
        raise _wrong("the path of the socket holds a NUL")
    return Address(path=os.fsdecode(path))


def _parse_address(address: str) -> Address:
    host, colon, port_text = address.rpartition(":")
    if not colon:
        raise _wrong(f"the address {address!r} has no port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise _wrong(f"the IPv6 address {host!r} is not in brackets")
    if not _HOST.fullmatch(host):
        raise _wrong(f"the host {host!r} is not a name or an address")
    # isdigit() would let digits of other scripts through, and a thousand of them.
    if not re.fullmatch(r"[0-9]{1,5}", port_text) or not 1 <= int(port_text) <= 65535:
        raise _wrong(f"the port {port_text!r} is not a number from 1 to 65535")
    return Address(host, int(port_text))


def _parse_query(query: str) -> bytes:
    key, _, value = query.partition("=")
    if key != "fp":
        raise _wrong(f"the part {key!r} after the ? is not known; only fp=<hex> is")
    if len(value) != 2 * FINGERPRINT_SIZE_BYTES or not re.fullmatch("[0-9a-fA-F]*", value):
        raise _wrong(f"the fingerprint is not {2 * FINGERPRINT_SIZE_BYTES} hex digits")
    return bytes.fromhex(value)
