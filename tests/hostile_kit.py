"""Bytes that an attacker may send: real conversations, and what becomes of them in its hands."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from fanout.protocol import frames
from fanout.protocol import messages as m
from fanout.protocol.connection import Connection, State
from fanout.protocol.handshake import DiallerHandshake, ListenerHandshake
from fanout.protocol.join import Token

CLIENT = Token("c1", "client", b"c" * 32)
WORKER = Token("w1", "worker", b"w" * 32)
TOKENS = {token.token_id: token for token in (CLIENT, WORKER)}
ID, LENGTHS = b"i" * 16, (3).to_bytes(4, "little")

_PLAIN = {"a": [1, "two", b"3", None, 4.5, {"b": True}]}


def listening() -> Connection:
    return Connection(
        ListenerHandshake(b"l" * 32, b"?" * 32, TOKENS.get, lambda hello, role: m.Welcome(7, {}))
    )


def dialling(token: Token) -> Connection:
    hello = m.Hello(m.PROTOCOL_VERSION, token.role, token.token_id, bytes(16), b"d" * 32, _PLAIN)
    return Connection(DiallerHandshake(hello, token.secret))


def outgoing(connection: Connection) -> bytes:
    return b"".join(connection.data_to_send())


def handshake_of(token: Token) -> list[bytes]:
    """What one who holds the token sends until it is in. The nonces are fixed, so it fits each
    listener of this module."""
    ours, theirs = dialling(token), listening()
    sent = [outgoing(ours)]
    theirs.receive_data(sent[0])
    ours.receive_data(outgoing(theirs))
    sent.append(outgoing(ours))
    return sent


def open_listening(hello: list[bytes]) -> Connection:
    """A listener that has let in one who sent this; see `handshake_of`."""
    connection = listening()
    for data in hello:
        connection.receive_data(data)
    assert connection.state is State.OPEN
    outgoing(connection)
    return connection


def sample(cls: type[m.Message]) -> m.Message:
    """A message of the kind that the checks accept."""
    values: list[object] = [_value(check) for _, check in cls.CHECKS]
    names = [name for name, _ in cls.CHECKS]
    if cls.HAS_LENGTHS:
        values[names.index("lengths")] = LENGTHS
        if cls.HAS_STATUSES:
            values[names.index("statuses")] = b"\0"
    if cls.HAS_PAYLOAD:
        values.append(b"abc")
    return cls(*values)


def _value(check: m.Check) -> object:
    if isinstance(check, m.Between):
        return min(check.high, max(check.low, 1))
    if isinstance(check, m.Plain):
        return dict(_PLAIN) if check.kind is dict else [[1, ID], 2]
    if isinstance(check, m.Sized):
        size = min(check.high, max(check.low, 1))
        return "x" * size if check.kind is str else b"i" * size
    for value in (True, 1.5, [[0, [b"b" * 32]]], [[1, 2]], [b"b" * 32], [ID], LENGTHS, None):
        if check(value):
            return value
    raise AssertionError(f"no value for {check}")


def encoded(message: m.Message) -> bytes:
    return b"".join(m.encode(message))


class Mutator:
    """Spoils byte strings, the same way for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._ways: list[Callable[[bytearray], None]] = [
            self._flip, self._set, self._cut, self._drop, self._double, self._insert, self._number,
        ]  # fmt: skip

    def spoil(self, data: bytes) -> bytes:
        spoilt = bytearray(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            if spoilt:
                self.random.choice(self._ways)(spoilt)
        return bytes(spoilt)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """The bytes as reads of a socket might give them."""
        if self.random.random() < 0.7:
            yield data
            return
        start = 0
        while start < len(data):
            stop = start + self.random.choice((1, 2, 7, 50, 1000))
            yield data[start:stop]
            start = stop

    def _place(self, data: bytearray) -> int:
        # Lengths and kinds stand at the front.
        limit = len(data) if self.random.random() < 0.5 else min(len(data), 24)
        return self.random.randrange(limit)

    def _flip(self, data: bytearray) -> None:
        data[self._place(data)] ^= 1 << self.random.randrange(8)

    def _set(self, data: bytearray) -> None:
        data[self._place(data)] = self.random.choice((0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xDD, 0xFF))

    def _cut(self, data: bytearray) -> None:
        del data[self._place(data) :]

    def _drop(self, data: bytearray) -> None:
        start = self._place(data)
        del data[start : start + self.random.choice((1, 2, 4, 8, 30))]

    def _double(self, data: bytearray) -> None:
        start = self._place(data)
        size = self.random.choice((1, 4, 8, 16))
        data[start:start] = data[start : start + size]

    def _insert(self, data: bytearray) -> None:
        start = self._place(data)
        data[start:start] = self.random.randbytes(self.random.choice((1, 2, 4, 20)))

    def _number(self, data: bytearray) -> None:
        """Another length in the prefix."""
        start = self.random.choice((0, 4))
        value = self.random.choice((0, 1, 7, 255, 1 << 14, (1 << 20) + 1, (1 << 32) - 1))
        if len(data) >= start + 4:
            data[start : start + 4] = value.to_bytes(4, "little")


def decoded(data: bytes) -> list[m.Message]:
    """The messages of whole frames."""
    return [m.decode(*frame) for frame in frames.FrameReader().feed(data)]


def memory_kib(pid: int) -> int:
    """What a process holds of its own."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")
