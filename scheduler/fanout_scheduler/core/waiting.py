"""What a call waits for, in words: no call stands still without a reason that a person can read.

Placement says of each call whose inputs wait for a place which place that is (`Call.waits_for`).
All other reasons follow from where its inputs are.
"""

from __future__ import annotations

from fanout_scheduler.core.state import Call

TURN = "its turn, after other calls of the function"
BLOBS = "blobs that are still on their way"
RETRY = "the delay before inputs that failed run again"
DISK = "the disk"
INPUTS = "more inputs from its client"
CLIENT = "its client, which has yet to say that it has all results"


def reason_of(call: Call) -> str:
    """Why the call does not get on; "" when it is over or a container has inputs of it."""
    if call.is_over:
        return ""
    if call.queued and call.failure is None:
        # Only the first call of a function is looked at; the others wait for the same, and for it.
        return call.waits_for or ("" if call.leases else call.function.waits_for or TURN)
    if call.leases:
        return ""
    if call.failure is not None:
        return CLIENT
    if call.parked or call.blob_waits:
        return BLOBS
    if call.backing_off:
        return RETRY
    if call.storing or call.pending_count:
        return DISK
    return INPUTS if call.sealed_count != call.received.count else CLIENT
