"""From the records of the store back to state, at a start of the scheduler."""

from __future__ import annotations

from collections.abc import Iterable

from fanout.config import CLIENT_GRACE_S
from fanout.protocol import messages as m
from fanout_scheduler.core import blobs, durable, spawned
from fanout_scheduler.core.calls import add_call
from fanout_scheduler.core.damage import GONE, without_lost
from fanout_scheduler.core.events import DropBlob, Record
from fanout_scheduler.core.object_restore import Restorer
from fanout_scheduler.core.object_state import OBJECT_RECORDS
from fanout_scheduler.core.state import App, Call, State, make_function


def restore(state: State, records: Iterable[Record], present: dict[bytes, int] | None) -> None:
    """Rebuild apps, functions and spawned calls. Leases of the former life are void, so what has
    no output is queued. See `Scheduler.restore`."""
    state.present_blobs.update(present or {})
    orphans: dict[bytes, None] = {}
    restorer = Restorer(state)
    for record in records:
        if isinstance(record, OBJECT_RECORDS):
            restorer.take(record)
        elif not _restore_record(state, record, present):
            # Left by a write that failed in part: its call was refused.
            orphans[record.call_id] = None  # type: ignore[union-attr]
    for call_id in orphans:
        durable.forget_call(state, call_id)
    restorer.finish()
    for app in state.apps.values():
        # Its client may open it again; otherwise it goes, when its calls have ended.
        state.at(state.now + CLIENT_GRACE_S, "unopened", app)
    for call in list(state.calls.values()):
        if not call.has_all_inputs and call.failure is None:
            # The spawn was never acknowledged as a whole, unless its client comes back for it.
            state.at(state.now + CLIENT_GRACE_S, "unsealed", call)
        if call.is_done or call.failure is not None:
            durable.end_call(state, call)

    if present is not None:
        _give_up_what_lacks_blobs(state)


def _give_up_what_lacks_blobs(state: State) -> None:
    """Nobody will bring a blob that was on disk and is gone."""
    state.present_blobs = {
        blob_id: size
        for blob_id, size in state.present_blobs.items()
        if blob_id in state.blob_references
    }
    # Whatever else there is, the shell removes at once.
    state.commands = [order for order in state.commands if not isinstance(order, DropBlob)]
    for blob_id in list(state.blob_waiters):
        blobs.on_refused(state, blob_id, GONE)


def _restore_record(state: State, record: Record, present: dict[bytes, int] | None) -> bool:
    """Returns False for a record whose call is not there."""
    if isinstance(record, m.OpenApp):
        # Calls that were spawned at once each brought their app and function along.
        if record.app_id not in state.apps:
            state.apps[record.app_id] = App(record.app_id, record.name, is_stored=True)
    elif isinstance(record, m.DefineFunction):
        owner = state.apps.get(record.app_id)
        if owner is not None and record.function_id not in state.functions:
            function = make_function(record, owner, state.next_number())
            function.is_stored = True
            state.functions[record.function_id] = owner.functions[record.function_id] = function
            owner.stored_blobs += record.blobs
            blobs.keep(state, record.blobs)
            blobs.await_definition(state, function)
    elif isinstance(record, m.OpenCall):
        return _restore_call(state, record)
    elif isinstance(record, m.CallExpired):
        state.expired[record.call_id] = record.expired_at
    elif isinstance(record, m.Inputs | m.SealCall | m.Outputs | m.CallFailed | m.CallEnded):
        call = state.calls.get(record.call_id)
        if call is None:
            return False
        if present is not None and isinstance(record, m.Outputs):
            record = without_lost(record, lambda blob_id: blob_id not in present, GONE)
        _restore_call_record(state, call, record)
    return True


def _restore_call(state: State, record: m.OpenCall) -> bool:
    function = state.functions.get(record.function_id)
    if function is None:
        return False
    method = function.methods.get(record.method)
    if method is None:
        return False
    call = Call(
        call_id=record.call_id,
        function=function,
        number=state.next_number(),
        session=None,
        is_durable=True,
        parent=None,
        depth=0,
        ancestors=(),
        method=method,
        is_from_before=True,
    )
    if record.call_id not in state.calls:
        add_call(state, call)
    return True


def _restore_call_record(state: State, call: Call, record: Record) -> None:
    from fanout_scheduler.core.outputs import cut_outputs, release_all_inputs, release_inputs

    if isinstance(record, m.Inputs):
        blobs.keep(state, blobs.ids(record.blobs))
        durable.queue_inputs(state, call, record)
    elif isinstance(record, m.SealCall):
        call.sealed_count = record.count
    elif isinstance(record, m.CallEnded):
        call.ended_at = record.ended_at
    elif isinstance(record, m.CallFailed):
        call.failure = record
        call.is_failure_kept = True
        release_all_inputs(state, call)
    elif isinstance(record, m.Outputs):
        start, stop = record.start, record.start + len(record.statuses)
        fresh = call.finished.missing(start, stop)
        if not fresh:
            return
        for low, high in fresh:
            call.queued.remove(low, high)
            call.parked.remove(low, high)
            if call.failure is None:
                release_inputs(state, call, low, high)
            part = cut_outputs(record, low, high)
            blobs.keep(state, blobs.ids(part.blobs))
            call.outputs.add(part)
            spawned.grew(state, call, part)
        call.finished.add(start, stop)
