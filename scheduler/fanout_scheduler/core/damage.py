"""Blobs that the disk has lost or changed. What needs one fails and says why, and does not wait.

At a start of the scheduler the files that are gone are known. That the content of one has changed
shows when a worker or client gets it: its digest is not its id. Nobody else would bring a blob of a
spawned call again, and who brings one of an attached call is told that it is held here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from fanout.protocol import messages as m
from fanout_scheduler.core import blobs, spawned
from fanout_scheduler.core.calls import fail_for
from fanout_scheduler.core.events import Disconnect, PeerId, WithdrawBlob
from fanout_scheduler.core.leasing import stop_container
from fanout_scheduler.core.state import Call, Function, Session, State

#: Records that name blobs are written when those are on disk, so what is not here was lost there.
GONE = "its file is gone from the folder blobs of the scheduler's home; spawn the call again"
CHANGED = (
    "its file in the folder blobs of the scheduler's home had changed, and was removed; check the "
    "disk, and make the call again"
)


def on_blob_lost(state: State, blob_id: bytes, peer_id: PeerId) -> None:
    """The file of a blob has changed, as `peer_id` found out, and is gone now. It may be the second
    one to find out."""
    if state.present_blobs.pop(blob_id, None) is not None:
        _fail_what_needs(state, blob_id)
    peer = state.peers.get(peer_id)
    if peer is not None and peer.session is not None:
        # It waits for the blob. Coming again, it is sent what now stands in the place of it.
        _have_come_again(state, peer.session)


def _fail_what_needs(state: State, blob_id: bytes) -> None:
    for worker in state.workers.values():
        if blob_id in worker.blobs:
            # Whoever brings the blob again has it sent there again.
            worker.blobs.discard(blob_id)
            state.commands.append(WithdrawBlob(worker.peer_id, blob_id))
    for function in list(state.functions.values()):
        if blob_id in function.definition.blobs:
            _stop_starting(state, function)
            blobs.fail_definition(state, function, CHANGED)
            for session in function.app.openers.values():
                # Coming again, they bring the code again.
                _have_come_again(state, session)
    for call in list(state.calls.values()):
        if _is_needed_by(call, blob_id):
            fail_for(state, call, "store", blobs.not_kept(CHANGED))
        _replace_outputs(state, call, blob_id)


def _have_come_again(state: State, session: Session) -> None:
    if session.peer_id is not None:
        text = blobs.not_kept(CHANGED)
        state.commands.append(Disconnect(session.peer_id, "store", text))


def _stop_starting(state: State, function: Function) -> None:
    """Containers that wait for code that does not come."""
    for container in list(function.containers.values()):
        if container.state == "starting":
            stop_container(state, container)


def _is_needed_by(call: Call, blob_id: bytes) -> bool:
    """Whether an input has yet to run with it, or an item has yet to arrive with it."""
    return any(blob_id in blobs.ids(chunk.blobs) for chunk in call.chunks.values()) or any(
        blob_id in blobs.ids(items.blobs)
        for generator in call.generators.values()
        for items in generator.unconfirmed
    )


def _replace_outputs(state: State, call: Call, blob_id: bytes) -> None:
    for generator in call.generators.values():
        for items in [i for i in generator.unconfirmed if blob_id in blobs.ids(i.blobs)]:
            generator.unconfirmed.remove(items)
            blobs.release(state, blobs.ids(items.blobs))
    for old in [frame for frame in call.outputs if blob_id in blobs.ids(frame.blobs)]:
        new = without_lost(old, lambda lost_id: lost_id == blob_id, CHANGED)
        call.outputs.replace(old, new)
        spawned.shrank(state, call, old)
        spawned.grew(state, call, new)
        blobs.keep(state, blobs.ids(new.blobs))
        blobs.release(state, blobs.ids(old.blobs))


def without_lost(outputs: m.Outputs, is_lost: Callable[[bytes], bool], text: str) -> m.Outputs:
    """Outputs of which a large buffer is lost are failures."""
    lost = {at for at, ids in outputs.blobs if any(map(is_lost, ids))}
    if not lost:
        return outputs
    failure = m.failure_payload("store", blobs.not_kept(text))
    statuses = bytearray(outputs.statuses)
    values, start = [], 0
    for at, length in enumerate(memoryview(outputs.lengths).cast("I")):
        values.append(failure if at in lost else bytes(outputs.payload[start : start + length]))
        start += length
        if at in lost:
            statuses[at] = m.Status.FAILURE
    lengths = array("I", map(len, values)).tobytes()
    kept = [(at, ids) for at, ids in outputs.blobs if at not in lost]
    return m.Outputs(
        outputs.call_id, outputs.start, lengths, bytes(statuses), kept, b"".join(values)
    )
