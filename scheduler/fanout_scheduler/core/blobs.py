"""Which blobs must be kept, and who waits for one.

The shell moves the bytes; the core counts the kept frames that refer to each blob and says when
the last one is gone.
"""

from __future__ import annotations

from fanout.protocol import messages as m
from fanout_scheduler.core.events import DropBlob
from fanout_scheduler.core.leasing import wake_call
from fanout_scheduler.core.state import BlobRef, Call, Chunk, Function, State


def ids(blobs: list[BlobRef]) -> list[bytes]:
    return [blob_id for _, blob_ids in blobs for blob_id in blob_ids]


def keep(state: State, blob_ids: list[bytes]) -> None:
    for blob_id in blob_ids:
        state.blob_references[blob_id] = state.blob_references.get(blob_id, 0) + 1


def release(state: State, blob_ids: list[bytes]) -> None:
    """A frame that was kept is gone; blobs that nothing refers to any more go too."""
    for blob_id in blob_ids:
        count = state.blob_references.get(blob_id, 0) - 1
        if count > 0:
            state.blob_references[blob_id] = count
            continue
        state.blob_references.pop(blob_id, None)
        if blob_id in state.present_blobs:
            state.present_blobs.discard(blob_id)
            state.commands.append(DropBlob(blob_id))
        for worker in state.workers.values():
            if blob_id in worker.blobs:
                worker.blobs.discard(blob_id)
                state.send(worker.peer_id, m.BlobDrop(blob_id))


def await_for_chunk(state: State, call: Call, chunk: Chunk) -> bool:
    """Have a chunk wait for its blobs. Returns whether it must."""
    chunk.missing_blobs = set(ids(chunk.blobs)) - state.present_blobs
    for blob_id in chunk.missing_blobs:
        state.blob_waiters.setdefault(blob_id, []).append((call, chunk))
    return bool(chunk.missing_blobs)


def await_for_function(state: State, function: Function) -> None:
    function.missing_blobs = set(function.definition.blobs) - state.present_blobs
    for blob_id in function.missing_blobs:
        state.blob_waiters.setdefault(blob_id, []).append(function)


def on_completed(state: State, blob_id: bytes) -> None:
    """A blob is whole: inputs and functions that wait for no other one may run."""
    state.present_blobs.add(blob_id)
    for waiter in state.blob_waiters.pop(blob_id, []):
        if isinstance(waiter, Function):
            waiter.missing_blobs.discard(blob_id)
            continue
        call, chunk = waiter
        chunk.missing_blobs.discard(blob_id)
        if not chunk.missing_blobs and not call.is_over:
            for start, stop in call.parked.common(chunk.start, chunk.stop):
                call.parked.remove(start, stop)
                call.queued.add(start, stop)
            wake_call(state, call)
