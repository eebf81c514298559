"""What the scheduler holds of queues and dicts, and how records of it are named in the store.

Plain data, as `state.py`; the rules are in `objects.py`, `queues.py` and `dicts.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fanout.protocol import messages as m

if TYPE_CHECKING:
    from fanout_scheduler.core.state import Container, Peer, State

#: What an item, an entry, or an object costs beyond its bytes; measured, and rounded up.
OVERHEAD_BYTES = 512

#: Records of the store that belong to queues and dicts.
OBJECT_RECORDS = (m.ObjectMade, m.QueueItem, m.DictEntry, m.Receipt)
ObjectRecord = m.ObjectMade | m.QueueItem | m.DictEntry | m.Receipt


def item_key(number: int) -> bytes:
    return b"i" + number.to_bytes(8, "big")


def entry_key(key: bytes) -> bytes:
    return b"e" + sha256(key).digest()


def receipt_key(session_id: bytes, request_id: int) -> bytes:
    return b"r" + session_id + request_id.to_bytes(8, "big")


def record_key(record: ObjectRecord) -> bytes:
    """Which record of its object this is: a later one with the same key takes its place."""
    if isinstance(record, m.QueueItem):
        return item_key(record.number)
    if isinstance(record, m.DictEntry):
        return entry_key(record.key)
    if isinstance(record, m.Receipt):
        return receipt_key(record.session_id, record.request_id)
    return b"o"


@dataclass(slots=True)
class Item:
    #: Grows in the order of the puts, over restarts too.
    number: int
    payload: bytes
    #: When its partition expires if this is the last item in it, in seconds since 1970.
    expires_at: float

    @property
    def size_bytes(self) -> int:
        return len(self.payload) + OVERHEAD_BYTES


@dataclass(slots=True)
class Partition:
    """One FIFO of a queue. Who waits is served in the order of coming."""

    key: bytes
    #: What can be taken, by number.
    items: deque[Item] = field(default_factory=deque)
    #: Items whose put is on its way to disk; they have their room already.
    storing_count: int = 0
    getters: dict[Request, None] = field(default_factory=dict)
    putters: dict[Request, None] = field(default_factory=dict)
    peekers: dict[Request, None] = field(default_factory=dict)
    has_deadline: bool = False
    #: It is being served; what happens meanwhile is seen by who serves it.
    is_serving: bool = False

    @property
    def is_empty(self) -> bool:
        waiting = self.getters or self.putters or self.peekers
        return not (self.items or self.storing_count or waiting)


@dataclass(slots=True)
class Entry:
    """A key of a dict with its value."""

    #: Grows in the order in which keys came; a page of a scan ends at one.
    number: int
    key: bytes
    value: bytes
    #: When it was last read or written: it expires some time after that.
    used_at: float

    @property
    def size_bytes(self) -> int:
        return len(self.key) + len(self.value) + OVERHEAD_BYTES


@dataclass(slots=True, eq=False)
class StoredObject:
    """A queue or a dict."""

    object_id: bytes
    object_type: int
    #: "" for an ephemeral one.
    name: str
    made_at: float
    #: Of an ephemeral one: the session whose end is its own.
    session_id: bytes | None
    #: On disk, where it has to be; nobody hears of it before.
    is_ready: bool = False
    is_deleted: bool = False
    #: Requests to open it that wait until it is on disk, with their sessions.
    openers: list[tuple[bytes, m.OpenObject]] = field(default_factory=list)
    # A queue:
    partitions: dict[bytes, Partition] = field(default_factory=dict)
    # A dict:
    entries: dict[bytes, Entry] = field(default_factory=dict)
    #: Numbers of the entries, in order, and whose they are.
    numbers: list[int] = field(default_factory=list)
    keys_by_number: dict[int, bytes] = field(default_factory=dict)
    #: Keys that a change on its way to disk concerns; None among them stands for all.
    busy: set[bytes | None] = field(default_factory=set)
    #: Changes that wait for such keys, in the order in which they came.
    blocked: list[Request] = field(default_factory=list)
    has_sweep: bool = False

    @property
    def is_ephemeral(self) -> bool:
        return self.session_id is not None

    def __repr__(self) -> str:
        kind = m.ObjectType(self.object_type).name.lower()
        return f"{kind} {self.name!r}" if self.name else f"ephemeral {kind}"


@dataclass(slots=True, eq=False)
class Request:
    """A request that waits, is on its way to disk, or was done and whose client may not know."""

    client: ObjectClient
    message: Any
    of: StoredObject
    #: waiting, storing, answered; see objects.py.
    state: str = "waiting"
    answer: m.ObjectAnswer | None = None
    #: What it puts, or has taken.
    items: list[Item] = field(default_factory=list)
    #: Bytes held for its sake besides items.
    size_bytes: int = 0
    #: The client has said, over its present connection, that it still waits for the answer.
    is_claimed: bool = True
    #: Said while it was on its way to disk: "taken" or "abandoned".
    verdict: str = ""
    #: What is asked about it after that, by request number: who, how it is handled, the message.
    behind: dict[int, tuple[Peer, Callable[[State, Peer, Any], None], Any]] = field(
        default_factory=dict
    )

    @property
    def request_id(self) -> int:
        number: int = self.message.request_id
        return number


@dataclass(slots=True, eq=False)
class ObjectClient:
    """Requests of one session. It outlives the session's connection, and the session."""

    session_id: bytes
    container: Container | None = None
    requests: dict[int, Request] = field(default_factory=dict)
    lost_at: float = 0.0


@dataclass(slots=True)
class Objects:
    """All queues and dicts."""

    by_id: dict[bytes, StoredObject] = field(default_factory=dict)
    #: By type and name; also those that are not on disk yet.
    by_name: dict[tuple[int, str], StoredObject] = field(default_factory=dict)
    #: Ids of ephemeral ones by session.
    ephemeral: dict[bytes, set[bytes]] = field(default_factory=dict)
    clients: dict[bytes, ObjectClient] = field(default_factory=dict)
    #: Abandoned requests whose receipt may still be on disk, by the key of it.
    ending: dict[bytes, Request] = field(default_factory=dict)
    #: Bytes held: items, entries, requests, with their overhead.
    size_bytes: int = 0
