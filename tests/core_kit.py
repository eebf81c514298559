"""Drive a bare scheduler core by hand: say facts, look at the exact orders.

Every order that a step causes must be taken by the test (`Bench.take`), so unexpected traffic
fails it. Invariants are checked after each step.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

import msgpack

from fanout.protocol import messages as m
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import (
    BlobCompleted,
    Command,
    Disconnect,
    DropBlob,
    Exit,
    FrameReceived,
    PeerConnected,
    PeerId,
    PeerLost,
    Send,
    SendBlob,
    Store,
    Stored,
    TimePassed,
    WithdrawBlob,
)

T = TypeVar("T", bound=m.Message)
C = TypeVar("C")
APP = b"a" * 16
ZERO = b"\0" * 16


def table(values: list[bytes]) -> tuple[bytes, bytes]:
    """Length table and payload of some values."""
    lengths = b"".join(len(value).to_bytes(4, "little") for value in values)
    return lengths, b"".join(values)


def assert_well_formed(order: Command) -> None:
    """What is ordered can be sent, or written down: the other side would take each message."""
    if isinstance(order, Send):
        assert_decodes(order.message)
    elif isinstance(order, Store):
        assert order.records, "nothing to write"
        for record in order.records:
            if isinstance(record, m.Message):
                assert_decodes(record)
            else:
                fields = [getattr(record, name) for name in type(record).__slots__]
                assert all(type(value) is bytes for value in fields), record
    elif isinstance(order, Disconnect):
        assert_decodes(m.Goodbye(order.code, order.text))
    elif isinstance(order, Exit):
        assert order.reason
    else:
        assert type(order.blob_id) is bytes, order


def assert_decodes(message: m.Message) -> None:
    """Also, whoever is refused something is told why."""
    m.decode(m.encode_header(message), bytes(getattr(message, "payload", b"")))
    if isinstance(message, m.ObjectAnswer):
        assert message.code in m.ANSWER_CODES, message
        assert message.info != [""], message
        assert message.code == "ok" or " " in message.info[0], message
    elif isinstance(message, m.CallFailed) and message.status == m.Status.FAILURE:
        code, text, _ = msgpack.unpackb(message.payload)
        assert code in m.FAILURE_CODES, message
        assert " " in text, message


#: What is unusual is counted by a name in plain words.
NOTE = re.compile(r"[a-z][a-z' ]+")


class Bench:
    """A core, a clock, and the orders that nobody has taken yet."""

    def __init__(self, epoch: int = 1) -> None:
        self.core = Scheduler(epoch)
        self.now = 100.0
        self.orders: list[Command] = []
        self.peer_count = 0
        self.core.restore([], self.now)
        self.sequences: dict[int, int] = {}
        self.is_turn_held = False

    # --- facts -----------------------------------------------------------------------------------

    def tell(self, *events: Any) -> None:
        for event in events:
            self.core.handle(event, self.now)
            self.core.check()
        if not self.is_turn_held:
            orders = self.core.decide(self.now)
            self.core.check()
            assert all(NOTE.fullmatch(name) for name in self.core.state.counts)
            for order in orders:
                assert_well_formed(order)
            self.orders += orders

    @contextmanager
    def one_turn(self) -> Iterator[None]:
        """What is said in this block arrives in one turn: nothing is decided in between."""
        self.is_turn_held = True
        yield
        self.is_turn_held = False
        self.tell()

    def later(self, seconds: float) -> None:
        """Let time pass, stopping at each deadline on the way."""
        end = self.now + seconds
        while (deadline := self.core.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.tell(TimePassed())
        self.now = end
        self.tell(TimePassed())

    def frame(self, peer: int, *messages: m.Message) -> None:
        self.tell(*[FrameReceived(PeerId(peer), message) for message in messages])

    def connect(self, role: str = "client", session: bytes | None = None, **info: Any) -> int:
        self.peer_count += 1
        session_id = session or self.peer_count.to_bytes(16, "big")
        self.tell(PeerConnected(PeerId(self.peer_count), role, session_id, info))
        return self.peer_count

    def lose(self, peer: int) -> None:
        self.tell(PeerLost(PeerId(peer), "gone"))

    def worker(self, cpu: float = 2.0, number: int = 1, is_embedded: bool = True) -> int:
        peer = self.connect("worker")
        self.frame(
            peer,
            m.WorkerReady(bytes([number]) * 16, f"w{number}", cpu, 1000, is_embedded, [], []),
        )
        self.take(m.WorkerAccepted)
        return peer

    def client(self, **functions: dict[str, Any]) -> int:
        """A client with an app whose functions have these options, named by their letter."""
        peer = self.connect()
        self.frame(peer, m.OpenApp(APP, "app"))
        for name, options in functions.items():
            self.define(peer, name, options)
        return peer

    def define(self, peer: int, name: str, options: dict[str, Any]) -> None:
        definition = m.DefineFunction(name.encode() * 16, APP, name, options, [], b"code")
        self.frame(peer, definition)

    def open(
        self,
        client: int,
        function: str = "f",
        call: int = 1,
        count: int = 0,
        is_durable: bool = False,
        parent: tuple[int, int] | None = None,
        is_sealed: bool = True,
        method: str = "",
    ) -> bytes:
        """Open a call and submit `count` one byte inputs."""
        call_id = bytes([call]) * 16
        messages: list[m.Message] = [
            m.OpenCall(call_id, function.encode() * 16, is_durable, True, parent, method=method)
        ]
        if count:
            messages.append(inputs(call_id, 0, count))
        if is_sealed:
            messages.append(m.SealCall(call_id, count))
        self.frame(client, *messages)
        return call_id

    def blob(self, blob_id: bytes, size_bytes: int = 8) -> None:
        """A blob has arrived whole."""
        self.tell(BlobCompleted(blob_id, size_bytes))

    def store(self) -> list[Store]:
        """Write down what is to be stored, and say so."""
        stores = [order for order in self.orders if isinstance(order, Store)]
        self.orders = [order for order in self.orders if not isinstance(order, Store)]
        if stores:
            self.tell(Stored(stores[-1].sequence))
        return stores

    def start(self, worker: int, container_id: int) -> None:
        self.frame(worker, m.ContainerStarted(container_id, 1000, 0.05))

    def start_all(self, worker: int) -> list[m.Lease]:
        """Whatever was ordered to start has started. Returns the leases that were given."""
        for start in self.take_all(m.StartContainer, worker):
            self.start(worker, start.container_id)
        return self.take_all(m.Lease, worker)

    def finish(
        self,
        worker: int,
        lease: m.Lease,
        count: int | None = None,
        skip: int = 0,
        status: int = 0,
        input_s: float = 0.001,
        values: list[bytes] | None = None,
        blobs: Sequence[tuple[int, list[bytes]]] = (),
    ) -> None:
        """The container reports outputs of `count` inputs of a lease after the first `skip`. A test
        says itself what time it is: if they cannot have run that long, the lease gets older."""
        if count is None:
            count = len(lease.lengths) // 4 - skip
        if (known := self.core.state.leases.get(lease.lease_id)) is not None:
            ran_s = (known.busy_s + input_s * count) / known.call.function.slots
            known.granted_at = min(known.granted_at, self.now - ran_s)
        lengths, payload = table(values or [b"v"] * count)
        sequence = self.sequences[worker] = self.sequences.get(worker, 0) + 1
        self.frame(
            worker,
            m.LeaseOutputs(
                sequence,
                lease.lease_id,
                lease.call_id,
                lease.start + skip,
                int(input_s * 1e6 * count),
                lengths,
                bytes([status]) * count,
                list(blobs),
                payload,
            ),
        )

    # --- orders ----------------------------------------------------------------------------------

    def take_all(self, kind: type[T], peer: int | None = None) -> list[T]:
        """Remove and return the messages of a kind that were ordered."""
        found: list[T] = []
        rest: list[Command] = []
        for order in self.orders:
            is_wanted = isinstance(order, Send) and isinstance(order.message, kind)
            if is_wanted and peer in (None, order.peer_id):  # type: ignore[union-attr]
                found.append(order.message)  # type: ignore[union-attr,arg-type]
            else:
                rest.append(order)
        self.orders = rest
        return found

    def take(self, kind: type[T], peer: int | None = None) -> T:
        """The one message of a kind that was ordered."""
        found = self.take_all(kind, peer)
        assert len(found) == 1, f"expected one {kind.__name__}, got {found}; left: {self.orders}"
        return found[0]

    def take_commands(self, kind: type[C]) -> list[C]:
        """Remove and return the orders of a kind that are no frames."""
        found: list[C] = [order for order in self.orders if isinstance(order, kind)]
        self.orders = [order for order in self.orders if not isinstance(order, kind)]
        return found

    def blobs_sent(self) -> list[tuple[int, bytes]]:
        """Which blobs were ordered to be streamed, and to whom."""
        return [(order.peer_id, order.blob_id) for order in self.take_commands(SendBlob)]

    def blobs_withdrawn(self, peer: int) -> list[bytes]:
        """Which blobs a worker was ordered to forget."""
        orders = self.take_commands(WithdrawBlob)
        return [order.blob_id for order in orders if order.peer_id == peer]

    def blobs_dropped(self) -> list[bytes]:
        return [order.blob_id for order in self.take_commands(DropBlob)]

    def forget(self, *kinds: type[m.Message]) -> None:
        """Take orders that the test does not care about."""
        for kind in kinds:
            self.take_all(kind)

    def nothing_left(self) -> None:
        """Every order was expected."""
        self.forget(m.OutputsAck, m.Window)
        assert self.orders == []

    def started_lease(self, worker: int) -> m.Lease:
        """Take the orders that start a container and give it its first lease; it starts."""
        self.take_all(m.DefineFunction, worker)
        container_id = self.take(m.StartContainer, worker).container_id
        lease = self.take(m.Lease, worker)
        assert lease.container_id == container_id
        self.start(worker, container_id)
        return lease


def inputs(call_id: bytes, start: int, count: int, size: int = 1) -> m.Inputs:
    lengths, payload = table([bytes([i % 256]) * size for i in range(start, start + count)])
    return m.Inputs(call_id, start, lengths, [], payload)


def exited(
    container_id: int, reason: str = "stopped", payload: bytes = b"", **details: Any
) -> m.ContainerExited:
    return m.ContainerExited(container_id, reason, [], details, payload)


def ack(call_id: bytes, start: int, count: int, consumed: int, size: int = 0) -> m.Ack:
    return m.Ack(call_id, [(start, count)], consumed, size)


def steps(action: Callable[[], Any]) -> int:
    """How many lines of Python run in this: what something costs, the same at each run."""
    count = 0

    def count_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return count_line

    _forget_exceptions_of_dead_threads()
    before = sys.gettrace()
    sys.settrace(count_line)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


class _Unheard(Exception):
    """Raised and caught by `_forget_exceptions_of_dead_threads`."""


def _forget_exceptions_of_dead_threads() -> None:
    """An exception that was set in a thread which ended before it was raised, as tests of threads
    do, leaves CPython 3.11 in a state in which tracing never ends. One that is raised clears it."""
    ident = ctypes.c_ulong(threading.get_ident())
    with suppress(_Unheard):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Unheard))
        while True:
            pass
