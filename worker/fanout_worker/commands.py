"""What `worker_state.WorkerState` decides: messages to send, and orders to the daemon."""

from __future__ import annotations

from dataclasses import dataclass

from fanout.protocol import messages as m


@dataclass(slots=True)
class Send:
    """Send this message to the scheduler."""

    message: m.Message


@dataclass(slots=True)
class Start:
    """Start a container of this function; then `container_started` or `container_exited`."""

    container_id: int
    definition: m.DefineFunction


@dataclass(slots=True)
class GiveLease:
    """Hand the lease to its container; all its blobs are here."""

    lease: m.Lease


@dataclass(slots=True)
class LowerLimit:
    """Take back all but `keep` of the lease's inputs that have not begun, and stop the one that
    runs if `is_cancelled`; then `lease_reclaimed`."""

    container_id: int
    lease_id: int
    keep: int
    is_cancelled: bool


@dataclass(slots=True)
class GiveCredit:
    """Let the generator that runs under the lease give items below `upto`."""

    container_id: int
    lease_id: int
    upto: int


@dataclass(slots=True)
class Stop:
    """Have a container leave when its leases are done, or at once; then `container_exited`."""

    container_id: int
    kill: bool


@dataclass(slots=True)
class OfferBlob:
    """Offer this blob of an output to the scheduler."""

    blob_id: bytes


@dataclass(slots=True)
class RemoveBlob:
    """Nothing here and nothing there needs this blob: delete it."""

    blob_id: bytes


@dataclass(slots=True)
class RemoveSources:
    """No function and no container needs what was unpacked from this blob."""

    blob_id: bytes


Command = (
    Send
    | Start
    | GiveLease
    | LowerLimit
    | GiveCredit
    | Stop
    | OfferBlob
    | RemoveBlob
    | RemoveSources
)
