"""Who is there: how two ends of a new connection prove themselves to each other.

::

    dialler                                   listener (the scheduler)
       | -- Hello(role, token id, nonce) -------> |
       | <------- Challenge(nonce, proof) ------- |   knows the secret, and this very Hello
       | -- Proof ------------------------------> |   so does the dialler
       | <------- Welcome ----------------------- |   open

A proof is an HMAC-SHA256 under the token's secret over everything that must not be changed or
used elsewhere: protocol version, role, token id, both nonces and the fingerprint of the listener's
certificate. Each direction has a label of its own, so a proof sent back to its maker proves
nothing; and one made for another certificate, as in a relay, does not fit.

An unknown token id gets a challenge too, made with a secret that nobody knows. To one who does
not hold the secret it looks like any other, so token ids cannot be found by asking.

A container and its daemon share a machine: `ContainerDialler` shows the container's secret on a
unix socket that only the user may open, and `ContainerListener` accepts it or not.

Sans-IO, and without randomness: nonces come from outside. The objects are driven by
`connection.Connection`, which turns what they raise into a `Goodbye`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgpack

from fanout.exceptions import AuthError, PermissionDeniedError, ProtocolError, VersionError
from fanout.protocol import messages as m

LISTENER_LABEL = "fanout: the listener holds the secret"
DIALLER_LABEL = "fanout: the dialler holds the secret"

#: What each role may send to a scheduler, and what a scheduler may send to it.
FROM_ROLE: Mapping[str, frozenset[type[m.Message]]] = {
    "client": m.FROM_CLIENT,
    "worker": m.FROM_WORKER,
}
TO_ROLE: Mapping[str, frozenset[type[m.Message]]] = {"client": m.TO_CLIENT, "worker": m.TO_WORKER}

CONTAINER_ROLE = "container"
_REFUSED = "the scheduler does not accept this token; get a join string from `fanout scheduler`"
_UNPROVED = (
    "the scheduler cannot prove that it knows the secret of this join string: the string is from "
    "another scheduler, or its token was withdrawn; get a new one from `fanout scheduler`"
)

Allowed = frozenset[type[m.Message]]


def make_proof(
    label: str, secret: bytes, hello: m.Hello, listener_nonce: bytes, fingerprint: bytes
) -> bytes:
    """The 32 bytes that prove knowledge of `secret` in this handshake and no other.

    The fields are packed with msgpack, which frames each one, so no two lists give equal bytes.
    """
    fields = (
        [label, hello.protocol, hello.role, hello.token_id]
        + [hello.session_id, hello.nonce, listener_nonce, fingerprint]
    )  # fmt: skip
    return hmac.digest(secret, msgpack.packb(fields), "sha256")


class TokenLike(Protocol):
    """What a handshake needs of a `join.Token`."""

    @property
    def role(self) -> str: ...

    @property
    def secret(self) -> bytes: ...


class Handshake(Protocol):
    """One side of a handshake. `peer` and `allowed` are there once `is_done`."""

    is_done: bool
    peer: m.Hello | m.Welcome | None
    allowed: Allowed

    def begin(self) -> list[m.Message]:
        """What this side says before it has heard anything."""
        ...

    def receive(self, message: m.Message) -> list[m.Message]:
        """Take the peer's next message and return the answers.

        Raises:
            AuthError: the peer is not who it must be.
            VersionError: it speaks another protocol version.
            ProtocolError: this message must not come now.
        """
        ...


class DiallerHandshake:
    """The side that dials: says Hello and checks the Challenge before it proves anything.

    Args:
        hello: its `nonce` must be fresh random bytes.
        secret: of the token that `hello` names.
        fingerprint: of the certificate seen on this connection, empty without TLS.
    """

    def __init__(self, hello: m.Hello, secret: bytes, fingerprint: bytes = b"") -> None:
        self._hello = hello
        self._secret = secret
        self._fingerprint = fingerprint
        self._expected: type[m.Message] = m.Challenge
        self.is_done = False
        self.peer: m.Hello | m.Welcome | None = None
        self.allowed: Allowed = TO_ROLE[hello.role]

    def begin(self) -> list[m.Message]:
        return [self._hello]

    def receive(self, message: m.Message) -> list[m.Message]:
        _check_expected(message, self._expected)
        if isinstance(message, m.Challenge):
            return [self._answer(message)]
        assert isinstance(message, m.Welcome)
        self.peer = message
        self.is_done = True
        return []

    def _answer(self, challenge: m.Challenge) -> m.Proof:
        check_version(challenge.protocol)
        context = (self._secret, self._hello, challenge.nonce, self._fingerprint)
        if not hmac.compare_digest(make_proof(LISTENER_LABEL, *context), challenge.proof):
            raise AuthError(_UNPROVED)
        self._expected = m.Welcome
        return m.Proof(make_proof(DIALLER_LABEL, *context))


class ListenerHandshake:
    """The scheduler's side.

    Args:
        nonce: fresh random bytes, 32.
        decoy: a random secret that nobody knows, 32 bytes; stands in for unknown tokens.
        tokens: the token of an id, None if there is none (any more).
        welcome: makes the answer to one who has proved its role. May raise
            AuthError to refuse it for good, ConnectionError to refuse it for now.
        fingerprint: of this side's certificate, empty without TLS.
    """

    def __init__(
        self,
        nonce: bytes,
        decoy: bytes,
        tokens: Callable[[str], TokenLike | None],
        welcome: Callable[[m.Hello, str], m.Welcome],
        fingerprint: bytes = b"",
    ) -> None:
        self._nonce = nonce
        self._decoy = decoy
        self._tokens = tokens
        self._welcome = welcome
        self._fingerprint = fingerprint
        self._token: TokenLike | None = None
        self._hello: m.Hello | None = None
        self.is_done = False
        self.peer: m.Hello | m.Welcome | None = None
        self.allowed: Allowed = frozenset()

    def begin(self) -> list[m.Message]:
        return []

    def receive(self, message: m.Message) -> list[m.Message]:
        _check_expected(message, m.Hello if self._hello is None else m.Proof)
        if isinstance(message, m.Hello):
            return [self._challenge(message)]
        assert isinstance(message, m.Proof)
        return [self._conclude(message)]

    def _challenge(self, hello: m.Hello) -> m.Challenge:
        check_version(hello.protocol)
        self._hello = hello
        self._token = self._tokens(hello.token_id)
        proof = make_proof(LISTENER_LABEL, self._secret, hello, self._nonce, self._fingerprint)
        return m.Challenge(m.PROTOCOL_VERSION, self._nonce, proof)

    @property
    def _secret(self) -> bytes:
        return self._decoy if self._token is None else self._token.secret

    def _conclude(self, proof: m.Proof) -> m.Welcome:
        hello, token = self._hello, self._token
        assert hello is not None
        expected = make_proof(DIALLER_LABEL, self._secret, hello, self._nonce, self._fingerprint)
        # The comparison comes first, so that an unknown token costs the same as a wrong secret. A
        # token may have been withdrawn since the Hello.
        if not hmac.compare_digest(expected, proof.proof) or token is None:
            raise AuthError(_REFUSED)
        if self._tokens(hello.token_id) != token:
            raise AuthError(_REFUSED)
        if token.role != hello.role or token.role not in FROM_ROLE:
            # Only one who holds the secret gets here, so this tells nothing to a stranger.
            raise PermissionDeniedError(
                f"this token is for the role {token.role!r}, not {hello.role!r}; use the join "
                f"string for that role, which `fanout scheduler` prints too"
            )
        welcome = self._welcome(hello, token.role)
        self.allowed = FROM_ROLE[token.role]
        self.peer = hello
        self.is_done = True
        return welcome


class ContainerDialler:
    """A container's side of the connection to its daemon: Hello, then Welcome.

    `hello.nonce` is the container's secret, which its daemon gave it.
    """

    def __init__(self, hello: m.Hello, allowed: Allowed) -> None:
        self._hello = hello
        self.is_done = False
        self.peer: m.Hello | m.Welcome | None = None
        self.allowed = allowed

    def begin(self) -> list[m.Message]:
        return [self._hello]

    def receive(self, message: m.Message) -> list[m.Message]:
        _check_expected(message, m.Welcome)
        assert isinstance(message, m.Welcome)
        self.peer = message
        self.is_done = True
        return []


class ContainerListener:
    """The daemon's side: `accept` knows its containers, and returns None for a stranger."""

    def __init__(self, accept: Callable[[m.Hello], m.Welcome | None], allowed: Allowed) -> None:
        self._accept = accept
        self.is_done = False
        self.peer: m.Hello | m.Welcome | None = None
        self.allowed = allowed

    def begin(self) -> list[m.Message]:
        return []

    def receive(self, message: m.Message) -> list[m.Message]:
        _check_expected(message, m.Hello)
        assert isinstance(message, m.Hello)
        check_version(message.protocol)
        welcome = self._accept(message) if message.role == CONTAINER_ROLE else None
        if welcome is None:
            raise AuthError("the daemon does not know this container")
        self.peer = message
        self.is_done = True
        return [welcome]


def check_version(theirs: int) -> None:
    """Refuse a peer of another protocol version, naming both."""
    if theirs != m.PROTOCOL_VERSION:
        raise VersionError(
            f"one side speaks fanout protocol {m.PROTOCOL_VERSION}, the other {theirs}; "
            f"install the same version of fanout on both"
        )


def check_version_of_header(header: bytes) -> None:
    """Find a foreign protocol version in a Hello that this version cannot even decode.

    `Hello` and `Challenge` have the version as their first field, for ever, whatever a later
    version adds behind it.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=m.TEXT_SIZE_MAX, strict_map_key=True)
    unpacker.feed(header)
    start: list[Any] = []
    try:
        length = unpacker.read_array_header()
        start = [unpacker.unpack() for _ in range(min(length, 2))]
    except Exception:
        # Not a message at all: the error that decoding it gave says so.
        return
    if len(start) == 2 and start[0] in (m.Hello.KIND, m.Challenge.KIND) and type(start[1]) is int:
        check_version(start[1])


def _check_expected(message: m.Message, expected: type[m.Message]) -> None:
    if type(message) is not expected:
        raise ProtocolError(
            f"{type(message).__name__} must not come during the handshake, where "
            f"{expected.__name__} is expected"
        )
