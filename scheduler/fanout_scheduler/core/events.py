"""What the core is told and what it orders.

Frames are the vocabulary on both sides: an event is a frame with its sender or one of a few facts
about peers, time and disk; a command is a frame with its addressee or one of a few orders. So the
simulator joins cores by a pipe of frames, and there is no second set of message classes. Records
for the store are messages too (`RECORDS`), written as they travelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NewType

from fanout.protocol import messages as m

#: A connection, numbered by the shell from 1; never used again in the scheduler's life.
PeerId = NewType("PeerId", int)


@dataclass(slots=True)
class PeerConnected:
    """A peer has proved its role ("client" or "worker") and got its `Welcome`."""

    peer_id: PeerId
    role: str
    session_id: bytes
    info: dict[str, Any]


@dataclass(slots=True)
class FrameReceived:
    peer_id: PeerId
    message: m.Message


@dataclass(slots=True)
class PeerHeard:
    """Bytes came of a frame that is not complete yet: the peer lives, on a slow connection."""

    peer_id: PeerId


@dataclass(slots=True)
class PeerLost:
    peer_id: PeerId
    reason: str
    #: It will not be let in again, so nobody waits for it to come back.
    is_final: bool = False


@dataclass(slots=True)
class PeerWritable:
    """The send buffer to a peer went over its high mark (False) or below its low one (True)."""

    peer_id: PeerId
    is_writable: bool


@dataclass(slots=True)
class Stored:
    """All records of `Store` commands up to this sequence number are on disk."""

    sequence: int


@dataclass(slots=True)
class StoreFailed:
    """The records of `Store` command `sequence` could not be written, and were not."""

    sequence: int
    text: str


@dataclass(slots=True)
class BlobCompleted:
    """A blob is whole and verified; frames may refer to it. `peer_id` has brought it, or offered it
    and found it here; None if it was let go of, and a frame that comes next names it again."""

    blob_id: bytes
    size_bytes: int = 0
    peer_id: PeerId | None = None


@dataclass(slots=True)
class BlobRefused:
    """The disk would not take a blob: calls that wait for it fail."""

    blob_id: bytes
    text: str


@dataclass(slots=True)
class BlobLost:
    """The file of a blob has changed on disk, and is gone now. `peer_id` found it out."""

    blob_id: bytes
    peer_id: PeerId


@dataclass(slots=True)
class TimePassed:
    """A deadline may have come."""


Event = (
    PeerConnected
    | FrameReceived
    | PeerHeard
    | PeerLost
    | PeerWritable
    | Stored
    | StoreFailed
    | BlobCompleted
    | BlobRefused
    | BlobLost
    | TimePassed
)


@dataclass(slots=True)
class Send:
    peer_id: PeerId
    message: m.Message


@dataclass(slots=True)
class SendBlob:
    """Stream a blob that the shell holds to a peer, behind all other frames."""

    peer_id: PeerId
    blob_id: bytes


@dataclass(slots=True)
class WithdrawBlob:
    """Tell a worker that it needs a blob no longer; if it is on its way, when it has arrived."""

    peer_id: PeerId
    blob_id: bytes


@dataclass(slots=True)
class DropBlob:
    """Nothing refers to this blob any more."""

    blob_id: bytes


@dataclass(slots=True)
class Disconnect:
    """Say `Goodbye(code, text)` and close."""

    peer_id: PeerId
    code: str
    text: str


@dataclass(slots=True)
class Store:
    """Write these records in one transaction, in order, and report `Stored(sequence)`."""

    sequence: int
    records: list[Record]


@dataclass(slots=True)
class Exit:
    """Leave: nothing runs and nobody asks."""

    reason: str


Command = Send | SendBlob | WithdrawBlob | DropBlob | Disconnect | Store | Exit


@dataclass(slots=True)
class ForgetCall:
    """A record that removes all records of a call."""

    call_id: bytes


@dataclass(slots=True)
class ForgetApp:
    """A record that removes an app and its functions."""

    app_id: bytes


@dataclass(slots=True)
class ForgetRecord:
    """A record that removes one record of a queue or dict; see `object_state.record_key`."""

    object_id: bytes
    key: bytes


@dataclass(slots=True)
class ForgetObject:
    """A record that removes a queue or dict with everything in it."""

    object_id: bytes


#: What the store keeps. At start the shell hands them back, in the order in which they were
#: stored, to `Scheduler.restore`.
Record = (
    m.OpenApp
    | m.DefineFunction
    | m.OpenCall
    | m.Inputs
    | m.SealCall
    | m.Outputs
    | m.CallFailed
    | m.CallEnded
    | m.CallExpired
    | m.ObjectMade
    | m.QueueItem
    | m.DictEntry
    | m.Receipt
    | ForgetCall
    | ForgetApp
    | ForgetRecord
    | ForgetObject
)
