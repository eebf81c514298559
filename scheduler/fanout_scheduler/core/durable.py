"""Spawned calls: written down before anything is acknowledged, read by whoever knows the id.

Everything here is a pair: order a `Store`, and when it is `Stored` do what was promised. Records
are the messages themselves, so what comes back at a restart is what came over the wire.

::

    OpenCall -> stored -> CallOpened          Inputs -> stored -> queued, InputsStored
    SealCall -> stored -> InputsStored(sealed)    output -> stored -> finished, OutputsAck, fetches
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from fanout.config import RESULT_RETENTION_S
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core import blobs, spawned
from fanout_scheduler.core.chunk import Chunk
from fanout_scheduler.core.events import ForgetApp, ForgetCall, Record, Store
from fanout_scheduler.core.state import Call, Fetch, Peer, State

if TYPE_CHECKING:
    from fanout_scheduler.core.state import App

#: Time between attempts to write outputs that could not be written (disk full).
STORE_RETRY_S = 1.0
#: Calls whose results have expired that are remembered, at most: a hundred bytes each.
EXPIRED_COUNT_MAX = 100_000


@dataclass(slots=True)
class PendingStore:
    """What a store command was for. `call` is None where nothing has to happen afterwards."""

    records: list[Record]
    call: Call | None
    #: The sequence under which this was first ordered; what waits for it names that one.
    first_sequence: int
    #: Of a queue or dict: what to do when it is on disk, and when it could not be written.
    stored: Callable[[], None] | None = None
    failed: Callable[[str], None] | None = None


def _store(
    state: State,
    call: Call | None,
    records: list[Record],
    first_sequence: int | None = None,
    stored: Callable[[], None] | None = None,
) -> int:
    state.store_sequence += 1
    first = state.store_sequence if first_sequence is None else first_sequence
    state.pending_stores[state.store_sequence] = PendingStore(records, call, first, stored)
    state.unsafe_stores.add(first)
    if call is not None:
        call.pending_count += 1
    state.commands.append(Store(state.store_sequence, records))
    return first


def store_objects(
    state: State,
    records: list[Record],
    stored: Callable[[], None],
    failed: Callable[[str], None],
) -> None:
    """Write down a change of a queue or dict, and do one or the other afterwards."""
    sequence = _store(state, None, records, stored=stored)
    state.pending_stores[sequence].failed = failed


def forget_records(
    state: State, records: list[Record], stored: Callable[[], None] | None = None
) -> None:
    """Remove records that nobody needs, and say when they are gone; a full disk only delays it."""
    if records:
        _store(state, None, records, stored=stored)


def store_open(state: State, call: Call, message: m.OpenCall) -> None:
    """A durable call begins; what it needs to run again is written first."""
    records: list[Record] = []
    function, app = call.function, call.function.app
    # Until they are known to be on disk they go with each call: a call must not be acknowledged
    # on the strength of a write that may still fail.
    if not app.is_stored:
        records.append(m.OpenApp(app.app_id, app.name))
    if not function.is_stored:
        records.append(function.definition)
    records.append(message)
    _when_storable(state, call, [], lambda: _store(state, call, records))


def _when_storable(
    state: State,
    call: Call,
    blob_ids: list[bytes],
    then: Callable[[], object],
    failed: Callable[[], None] = lambda: None,
) -> None:
    """Write something of a call down once these blobs are here and those of the call's code: a
    promise to run it is worth nothing without them. What comes first is written first."""
    function = call.function
    needed = blob_ids if function.is_stored else [*function.definition.blobs, *blob_ids]

    def fail(text: str) -> None:
        failed()
        _fail(state, call, text)

    blobs.when_present(state, needed, then, fail, call)


def store_inputs(state: State, call: Call, message: m.Inputs) -> None:
    """Write inputs down, once the blobs that they name are here."""
    blob_ids = blobs.ids(message.blobs)
    blobs.keep(state, blob_ids)
    _when_storable(
        state,
        call,
        blob_ids,
        lambda: _store_whole_inputs(state, call, message),
        lambda: blobs.release(state, blob_ids),
    )


def _fail(state: State, call: Call, text: str) -> None:
    from fanout_scheduler.core.calls import fail_for

    fail_for(state, call, "store", f"the scheduler could not store the call: {text}")


def _store_whole_inputs(state: State, call: Call, message: m.Inputs) -> None:
    if call.is_over or call.failure is not None:
        blobs.release(state, blobs.ids(message.blobs))
    else:
        state.arriving_bytes += spawned.size_of(message)
        _store(state, call, [message])


def store_seal(state: State, call: Call, message: m.SealCall) -> None:
    _when_storable(state, call, [], lambda: _store(state, call, [message]))


def store_outputs(state: State, call: Call, outputs: m.Outputs) -> int:
    sequence = _store(state, call, [outputs])
    stop = outputs.start + len(outputs.statuses)
    insort(call.output_stores, (outputs.start, stop, sequence))
    return sequence


def stores_of(call: Call, start: int, stop: int) -> list[int]:
    """The sequences of outputs of these inputs that are not on disk yet."""
    stores = call.output_stores
    low, high = bisect_left(stores, (start, 0, 0)), bisect_left(stores, (stop, 0, 0))
    if low and stores[low - 1][1] > start:
        low -= 1
    return [sequence for _, _, sequence in stores[low:high]]


def store_failure(state: State, call: Call, failure: m.CallFailed) -> None:
    """A call ends as a whole. Where its client knows it to be on disk, this is told when it is on
    disk too: else a scheduler that is killed before would run it after all."""
    if not call.has_all_inputs:
        _tell_failure(state, call)
    _store(state, call, [failure])


def _tell_failure(state: State, call: Call) -> None:
    from fanout_scheduler.core.calls import tell_failure

    if not call.is_failure_kept:
        call.is_failure_kept = True
        tell_failure(state, call)
        serve_failure(state, call)


def forget_call(state: State, call_id: bytes) -> None:
    """Nobody ever learned of it."""
    _store(state, None, [ForgetCall(call_id)])


def expire_call(state: State, call_id: bytes) -> None:
    """Its results were kept their time; that they were there is remembered for as long again."""
    now = state.now + state.wall_offset_s
    state.expired[call_id] = now
    records: list[Record] = [ForgetCall(call_id), m.CallExpired(call_id, now)]
    oldest = next(iter(state.expired))
    while len(state.expired) > EXPIRED_COUNT_MAX or (
        state.expired[oldest] + RESULT_RETENTION_S < now
    ):
        del state.expired[oldest]
        records.append(ForgetCall(oldest))
        oldest = next(iter(state.expired))
    _store(state, None, records)


def forget_app(state: State, app: App) -> None:
    if app.is_stored:
        blobs.release(state, app.stored_blobs)
        _store(state, None, [ForgetApp(app.app_id)])


# --- what the disk says ---------------------------------------------------------------------------


def on_stored(state: State, sequence: int) -> None:
    """Everything up to `sequence` is on disk: keep the promises that waited for it."""
    # They were ordered with growing numbers, so those that are done stand first. All of these are
    # looked up at once: to ask a dictionary for its first key passes over what was removed there.
    for first in list(takewhile(lambda number: number <= sequence, state.pending_stores)):
        pending = _end_write(state, first)
        assert pending is not None
        state.unsafe_stores.discard(pending.first_sequence)
        if pending.stored is not None:
            pending.stored()
        if pending.call is None:
            continue
        for record in pending.records:
            _promise_kept(state, pending.call, record)


def _promise_kept(state: State, call: Call, record: Record) -> None:
    from fanout_scheduler.core.calls import send_opened
    from fanout_scheduler.core.outputs import finish

    app, function = call.function.app, call.function
    if isinstance(record, m.OpenApp):
        app.is_stored = True
    elif isinstance(record, m.DefineFunction):
        if not function.is_stored:
            function.is_stored = True
            app.stored_blobs += record.blobs
    elif isinstance(record, m.OpenCall):
        send_opened(state, call)
    elif isinstance(record, m.Inputs):
        state.arriving_bytes -= spawned.size_of(record)
        queue_inputs(state, call, record)
        count = len(record.lengths) // 4
        tell_stored(state, call, [(record.start, count)])
    elif isinstance(record, m.SealCall):
        call.sealed_count = record.count
        tell_stored(state, call, [])
        if call.is_done:
            end_call(state, call)
    elif isinstance(record, m.Outputs):
        del call.output_stores[bisect_left(call.output_stores, (record.start, 0, 0))]
        call.storing.remove(record.start, record.start + len(record.statuses))
        # It is on disk, so it is the output of these inputs, also if the call failed meanwhile.
        if state.calls.get(call.call_id) is call:
            finish(state, call, record)
        else:
            blobs.release(state, blobs.ids(record.blobs))
    elif isinstance(record, m.CallFailed):
        _tell_failure(state, call)


def _end_write(state: State, sequence: int) -> PendingStore | None:
    """A write is under way no longer; None if it was none."""
    pending: PendingStore | None = state.pending_stores.pop(sequence, None)
    if pending is not None and pending.call is not None:
        pending.call.pending_count -= 1
    return pending


def on_store_failed(state: State, sequence: int, text: str) -> None:
    """The disk would not take it. What a client waits for fails and says so; outputs, which
    were made already, are offered again until there is room."""
    pending = _end_write(state, sequence)
    if pending is None:
        return
    state.note("write that failed")
    if pending.failed is not None:
        state.unsafe_stores.discard(pending.first_sequence)
        pending.failed(text)
        return
    call = pending.call
    if call is None or any(isinstance(r, m.Outputs | m.CallFailed) for r in pending.records):
        state.at(state.now + STORE_RETRY_S, "store", pending)
        return
    state.unsafe_stores.discard(pending.first_sequence)
    for record in pending.records:
        if isinstance(record, m.Inputs):
            state.arriving_bytes -= spawned.size_of(record)
            blobs.release(state, blobs.ids(record.blobs))
    _fail(state, call, text)


def on_store_retry(state: State, pending: PendingStore) -> None:
    _store(state, pending.call, pending.records, pending.first_sequence, pending.stored)


def is_safe(state: State, store_sequence: int) -> bool:
    """Whether a report that waits for this store sequence may be acknowledged."""
    return store_sequence not in state.unsafe_stores


# --- inputs ---------------------------------------------------------------------------------------


def queue_inputs(state: State, call: Call, message: m.Inputs) -> None:
    """Inputs that are here (and stored, where durable) may run, once their blobs are here too."""
    start, stop = message.start, message.start + len(message.lengths) // 4
    whole = Chunk(message)
    for low, high in call.received.missing(start, stop):
        chunk = whole
        if (low, high) != (start, stop):
            lengths, refs, payload = whole.cut(low, high)
            chunk = Chunk(m.Inputs(call.call_id, low, lengths, refs, payload))
        call.received.add(low, high)
        if call.is_over or call.failure is not None:
            continue
        call.add_chunk(chunk)
        spawned.grew(state, call, chunk)
        if chunk.blobs:
            blobs.keep(state, blobs.ids(chunk.blobs))
        blobs.queue_chunk(state, call, chunk)
    if message.blobs:
        # The frame's own hold on its blobs ends; its chunks have theirs.
        blobs.release(state, blobs.ids(message.blobs))


# --- telling clients ------------------------------------------------------------------------------


def tell_stored(state: State, call: Call, stored: list[tuple[int, int]]) -> None:
    session = call.session
    if call.failure is not None:
        # A part of it could not be written, so nothing of it is there for anybody.
        return
    if session is not None and session.peer_id is not None:
        # The seal may be on disk before an input whose blobs are still on their way.
        state.send(session.peer_id, m.InputsStored(call.call_id, stored, call.has_all_inputs))


def end_call(state: State, call: Call) -> None:
    """All outputs are on disk: the call needs no container any more, and is kept for a while."""
    from fanout_scheduler.core.calls import close_app_if_done, mark_over

    mark_over(call)
    call.waits_for = ""
    if call.ended_at is None:
        call.ended_at = state.now + state.wall_offset_s
        _store(state, None, [m.CallEnded(call.call_id, call.ended_at)])
    if call.session is not None:
        call.session.calls.pop(call.call_id, None)
    expires_at = call.ended_at + RESULT_RETENTION_S - state.wall_offset_s
    state.at(max(expires_at, state.now), "forget", call)
    close_app_if_done(state, call.function.app)


# --- fetching -------------------------------------------------------------------------------------


def on_fetch(state: State, peer: Peer, call: Call, message: m.FetchOutputs) -> None:
    """Send what is there, and remember what is owed."""
    session = peer.session
    assert session is not None
    known = session.fetches.get(message.request_id)
    if known is not None:
        end_fetch(known)
    owed = IntervalSet([(message.start, message.stop)])
    fetch = Fetch(call, session, peer.peer_id, message.request_id, owed)
    session.fetches[message.request_id] = fetch
    call.fetches[(peer.peer_id, message.request_id)] = fetch
    for outputs in call.outputs.among(message.start, message.stop):
        _serve(state, fetch, outputs)
    serve_failure(state, call)
    if not fetch.owed:
        end_fetch(fetch)


def end_fetch(fetch: Fetch) -> None:
    """Nothing more is owed; harmless to repeat."""
    fetch.call.fetches.pop((fetch.peer_id, fetch.request_id), None)
    if fetch.session.fetches.get(fetch.request_id) is fetch:
        del fetch.session.fetches[fetch.request_id]


def serve_fetches(state: State, call: Call, outputs: m.Outputs) -> None:
    for fetch in list(call.fetches.values()):
        _serve(state, fetch, outputs)
        if not fetch.owed:
            end_fetch(fetch)


def _serve(state: State, fetch: Fetch, outputs: m.Outputs) -> None:
    from fanout_scheduler.core.outputs import cut_outputs, send_outputs

    for start, stop in fetch.owed.common(outputs.start, outputs.start + len(outputs.statuses)):
        fetch.owed.remove(start, stop)
        send_outputs(state, fetch.peer_id, cut_outputs(outputs, start, stop))


def serve_failure(state: State, call: Call) -> None:
    """A call that failed as a whole: every input without an output ended like that."""
    from fanout_scheduler.core.outputs import failed_outputs

    failure = call.told_failure
    if failure is None:
        return
    # However many a client has announced: of a call that was promised these are all.
    count = call.received.end
    for fetch in list(call.fetches.values()):
        for start, stop in fetch.owed:
            # What is on its way to disk is an output, and comes when it is there.
            for low, high in call.storing.missing(start, min(stop, count)):
                fetch.owed.remove(low, high)
                for part in failed_outputs(call, low, high, failure):
                    state.send(fetch.peer_id, part)
        if not fetch.owed.common(0, count):
            end_fetch(fetch)
