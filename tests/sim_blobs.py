"""Large values of a simulated fanout; see `sim_world.py`.

The exchanges, and the books of what the scheduler keeps, are the real ones. A call of the plan
"bulky" has a blob in some of its inputs, which others of them name too, and one in each result.
What a blob holds says whose it is; that of a result also tells one run of an input from another.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from fanout.client.call_state import CallState
from fanout.client.chunk import BlobRef
from fanout.exceptions import StorageError
from fanout.protocol import messages as m
from fanout.protocol.blob_store import BlobWriter, Buffer, MemoryBlobStore, blob_id_of
from fanout.protocol.blobs import BlobExchange
from tests.sim_story import Broken

if TYPE_CHECKING:
    from tests.sim_world import World

#: Most are one part; of the others the largest is more than a sender may have under way.
SIZES = [40, 40, 40, 40, 150_000, 400_000]
#: So many inputs that follow each other name the same blob.
SHARED_COUNT = 3

Send = Callable[[m.Message], None]


class HasDisk(Protocol):
    """Whose disk may be full."""

    is_full: bool


class DiskStore(MemoryBlobStore):
    """Blob files. Those of the scheduler outlive its lives; what is written in part does not."""

    def __init__(self, disk: HasDisk) -> None:
        super().__init__()
        self._disk = disk

    def ids(self) -> list[bytes]:
        return list(self._buffers)

    def remove_drafts(self) -> None:
        """There are none: writers keep them to themselves."""

    def open_writer(self, blob_id: bytes, size_bytes: int = 0) -> BlobWriter:
        return _DiskWriter(super().open_writer(blob_id, size_bytes), self._disk)


class _DiskWriter:
    def __init__(self, writer: BlobWriter, disk: HasDisk) -> None:
        self._writer = writer
        self._disk = disk
        self.abort = writer.abort

    def write(self, data: Buffer) -> None:
        self._check()
        self._writer.write(data)

    def finish(self) -> None:
        self._check()
        self._writer.finish()

    def _check(self) -> None:
        if self._disk.is_full:
            raise StorageError("no space left on the disk")


def bulk_sender(world: World, send: Send) -> Callable[[Iterator[m.Message]], None]:
    """Sends what an iterator gives, one after another and with other frames in between."""

    def send_bulk(parts: Iterator[m.Message]) -> None:
        def pump() -> None:
            part = next(parts, None)
            if part is not None:
                send(part)
                world.after(world.random.random() * 0.001, pump)

        pump()

    return send_bulk


# --- what they hold -------------------------------------------------------------------------------


def argument_of(call_id: bytes, index: int) -> bytes:
    """What the blob of an input holds; in every other call the same as in all of those."""
    group = index // SHARED_COUNT
    name = (call_id if call_id[0] % 2 else b"common") + b" argument %d." % group
    return name * (1 + SIZES[group % len(SIZES)] // len(name))


def result_of(world: World, call_id: bytes, index: int) -> bytes:
    """What the blob of a result holds; another thing each time."""
    name = call_id + b" result %d." % index + world.random.randbytes(8)
    return name * (1 + SIZES[world.random.randrange(len(SIZES))] // len(name))


def require_result(call: CallState, index: int, content: Buffer) -> None:
    """What came is all of one result, and of this input."""
    found = bytes(content)
    size = len(call.call_id + b" result %d." % index) + 8
    name = found[:size]
    is_right = name.startswith(call.call_id + b" result %d." % index)
    if not is_right or found != name * (len(found) // size):
        raise Broken(f"the result of input {index} is not its own", call.call_id, index)


def references_of(call_id: bytes, start: int, count: int) -> list[BlobRef]:
    """Which inputs from `start` on name which blobs."""
    return [
        (at, [blob_id_of(argument_of(call_id, start + at))])
        for at in range(count)
        if (start + at) % 4 != 3
    ]


# --- at a client ----------------------------------------------------------------------------------


class ClientBlobs:
    """The blobs of a client over its connections, and the frames that wait for theirs."""

    is_full = False

    def __init__(self, world: World) -> None:
        self.world = world
        #: For results; there is room in a client's memory.
        self.store = DiskStore(self)
        self.pins: Counter[bytes] = Counter()
        self.exchange: BlobExchange | None = None
        #: By call: frames that wait for blobs, and those behind them.
        self.parked: dict[bytes, deque[m.Message]] = {}

    def connected(self, send: Send, changed: Callable[[], None]) -> None:
        def completed(blob_id: bytes) -> None:
            if not self.pins[blob_id]:
                self.store.drop(blob_id)
            changed()

        self.exchange = BlobExchange(
            self.store,
            send,
            bulk_sender(self.world, send),
            completed,
            self.world.after,
            trusts_peer=True,
        )

    def disconnected(self) -> None:
        """What waited comes again."""
        if self.exchange is not None:
            self.exchange.close()
            self.exchange = None
        for call_id in list(self.parked):
            self.forget(call_id)

    def forget(self, call_id: bytes) -> None:
        """Frames of this call are waited for no longer."""
        for frame in self.parked.pop(call_id, ()):
            self.unpin(ids_of(frame))

    def pin(self, blob_ids: list[bytes]) -> None:
        self.pins.update(blob_ids)

    def unpin(self, blob_ids: list[bytes]) -> None:
        for blob_id in blob_ids:
            self.pins[blob_id] -= 1
            if self.pins[blob_id] <= 0:
                del self.pins[blob_id]
                self.store.drop(blob_id)

    def offer(self, message: m.Message) -> None:
        """Let the scheduler have what a frame names."""
        if self.exchange is not None and isinstance(message, m.Inputs | m.SubmitCall):
            for blob_id in ids_of(message):
                self.exchange.offer(blob_id)

    def add(self, message: m.Message, call_id: bytes) -> None:
        """A frame about a call, which may have to wait for its blobs."""
        self.pin(ids_of(message))
        self.parked.setdefault(call_id, deque()).append(message)

    def take(self, call_id: bytes) -> Iterator[m.Message]:
        """The frames of a call that have what they name, in order."""
        parked = self.parked.get(call_id)
        while parked and all(map(self.store.has, ids_of(parked[0]))):
            frame = parked.popleft()
            yield frame
            self.unpin(ids_of(frame))
        if parked is not None and not parked:
            self.parked.pop(call_id, None)


def ids_of(message: m.Message) -> list[bytes]:
    """The blobs that a frame names."""
    return [blob_id for _, ids in getattr(message, "blobs", ()) for blob_id in ids]
