"""Which blobs must be kept, and who waits for one.

The shell moves the bytes; the core counts the kept frames that refer to each blob and says when
the last one is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fanout.protocol import messages as m
from fanout_scheduler.core.chunk import BlobRef, Chunk
from fanout_scheduler.core.events import DropBlob, WithdrawBlob
from fanout_scheduler.core.leasing import wake_call
from fanout_scheduler.core.state import BlobWait, Call, Function, Peer, State, Worker

#: A blob of a client, or one that was let go of, waits so long to be named again.
NAMED_WITHIN_S = 60.0
#: The ids of frames that name no blob, as most do; nobody changes it.
_NONE: list[bytes] = []


def ids(blobs: list[BlobRef]) -> list[bytes]:
    if not blobs:
        return _NONE
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
        if state.present_blobs.pop(blob_id, None) is not None:
            state.commands.append(DropBlob(blob_id))
        for worker in state.workers.values():
            if blob_id in worker.blobs:
                worker.blobs.discard(blob_id)
                state.commands.append(WithdrawBlob(worker.peer_id, blob_id))


def when_present(
    state: State,
    blob_ids: list[bytes],
    then: Callable[[], object],
    failed: Callable[[str], None],
    call: Call | None = None,
) -> bool:
    """Do something once these blobs are all here, or the other thing when the disk refuses one, or
    when nobody is left who would bring it. Returns whether they are here now."""
    missing = set(blob_ids) - state.present_blobs.keys()
    if not missing:
        then()
        return True
    wait = BlobWait(missing, then, failed, call)
    if call is not None:
        call.blob_waits.add(wait)
    for blob_id in sorted(missing):
        state.blob_waiters.setdefault(blob_id, []).append(wait)
    return False


def size_bytes(state: State, blobs: list[BlobRef]) -> int:
    """Bytes of the blobs that these references name."""
    return sum(state.present_blobs.get(blob_id, 0) for blob_id in ids(blobs)) if blobs else 0


def on_completed(state: State, blob_id: bytes, size_bytes: int, peer: Peer | None) -> None:
    """A blob is whole: what waited for no other one goes on. A worker names in a report what it has
    brought, be it much later; a client has named it before, unless nobody wants it any more."""
    state.present_blobs[blob_id] = size_bytes
    if peer is not None and peer.worker is not None:
        _claim(state, peer.worker, blob_id)
    elif blob_id not in state.blob_references:
        state.at(state.now + NAMED_WITHIN_S, "unnamed", blob_id)
    for wait in state.blob_waiters.pop(blob_id, []):
        wait.missing.discard(blob_id)
        if not wait.missing:
            _end(wait)
            wait.then()


def _claim(state: State, worker: Worker, blob_id: bytes) -> None:
    if blob_id not in worker.claims:
        worker.claims.add(blob_id)
        keep(state, [blob_id])


def end_claims(state: State, worker: Worker, blob_ids: Iterable[bytes]) -> None:
    """A report of the worker has named these, and whoever uses it keeps them now; or it is gone."""
    for blob_id in list(blob_ids):
        if blob_id in worker.claims:
            worker.claims.discard(blob_id)
            release(state, [blob_id])


def on_unnamed_deadline(state: State, blob_id: bytes) -> None:
    """No frame that is kept has named it in time."""
    if blob_id not in state.blob_references and state.present_blobs.pop(blob_id, None) is not None:
        state.commands.append(DropBlob(blob_id))


def on_refused(state: State, blob_id: bytes, text: str) -> None:
    """The disk is full. Who waits for the blob learns it; the others wait for its next offer."""
    for wait in list(state.blob_waiters.get(blob_id, ())):
        _give_up(state, wait, text)


def on_call_left(state: State, call: Call) -> None:
    """Its client is gone, and nobody else brings the blobs that it still lacks."""
    for wait in list(call.blob_waits):
        _give_up(state, wait, "its client has gone")


def _give_up(state: State, wait: BlobWait, text: str) -> None:
    for blob_id in wait.missing:
        waiters = state.blob_waiters.get(blob_id)
        if waiters is None or wait not in waiters:
            # It was given up together with the one that is given up now.
            return
        waiters.remove(wait)
        if not waiters:
            del state.blob_waiters[blob_id]
    _end(wait)
    wait.failed(text)


def _end(wait: BlobWait) -> None:
    if wait.call is not None:
        wait.call.blob_waits.discard(wait)


def queue_chunk(state: State, call: Call, chunk: Chunk) -> None:
    """Inputs may be leased once the blobs of their chunk are here."""
    if not chunk.blobs:
        call.queued.add(chunk.start, chunk.stop)
        wake_call(state, call)
        return

    def queue() -> None:
        for start, stop in call.parked.common(chunk.start, chunk.stop):
            call.parked.remove(start, stop)
            call.queued.add(start, stop)
        wake_call(state, call)

    def fail(text: str) -> None:
        from fanout_scheduler.core.calls import fail_for

        fail_for(state, call, "store", not_kept(text))

    call.parked.add(chunk.start, chunk.stop)
    when_present(state, ids(chunk.blobs), queue, fail, call)


def await_definition(state: State, function: Function) -> None:
    """No container of a function starts before the blobs of its definition are here."""
    function.lacks_blobs = True

    def ready() -> None:
        function.lacks_blobs = False

    def fail(text: str) -> None:
        fail_definition(state, function, text)

    when_present(state, function.definition.blobs, ready, fail)


def fail_definition(state: State, function: Function, text: str) -> None:
    """The blobs of a definition cannot be had; calls that need a container end."""
    from fanout_scheduler.core.calls import fail_function

    name = function.definition.name
    shown = f"the scheduler could not keep the code of {name}: {text}"
    fail_function(state, function, m.Status.FAILURE, m.failure_payload("store", shown))
    # A client that defines it anew brings its blobs again.
    if function.function_id in state.functions:
        await_definition(state, function)


def not_kept(text: str) -> str:
    """What the user reads when a blob of inputs or outputs cannot be had."""
    return f"the scheduler could not keep a large value: {text}"
