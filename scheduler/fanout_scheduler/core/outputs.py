"""Reports of workers and what becomes of them: outputs, items, retries, crashes.

An output is used if its input has none yet, whichever lease it came from; otherwise it is a
duplicate and dropped. Errors and timeouts with attempts left are not outputs: the input backs off
and is queued again. What a call's client has not acknowledged stays in `call.outputs` and is sent
again when the client comes back; outputs of durable calls stay for whoever fetches them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate

from fanout.config import CRASH_LIMIT, ITEM_CREDIT_INITIAL
from fanout.protocol import messages as m
from fanout_scheduler.core import blobs, durable, graph, spawned
from fanout_scheduler.core.events import PeerId, Send, SendBlob
from fanout_scheduler.core.leasing import (
    close_inputs,
    wake_call,
)
from fanout_scheduler.core.state import Call, GeneratorState, Lease, State, Worker

#: Weight of the newest report in the moving averages, at most and when it makes them grow.
WEIGHT_MAX = 0.5
WEIGHT_GROW_MIN = 0.05
#: Beyond this a back-off that grows has long reached its maximum.
EXPONENT_MAX = 60

#: Outputs of inputs that failed together are sent in frames of about this size.
FAILED_BYTES_MAX = 64 << 10

#: Reports of a worker that wait to be acknowledged, at most, and for how long.
ACKNOWLEDGE_COUNT = 32
ACKNOWLEDGE_DELAY_S = 0.02


def on_lease_outputs(state: State, peer_id: PeerId, message: m.LeaseOutputs) -> None:
    worker = state.peers[peer_id].worker
    if worker is None:
        return
    *waits, last = _accept(state, worker, message) or (0,)
    # Of several records any may come last. Until all are there, only what was before is safe.
    worker.unsafe += [(message.sequence - 1, store_sequence) for store_sequence in waits]
    note_report(state, worker, message.sequence, last)


def note_report(state: State, worker: Worker, sequence: int, store_sequence: int) -> None:
    """A report is to be acknowledged, once the store has this sequence."""
    worker.unsafe.append((sequence, store_sequence))
    if worker.worker_id in state.storing_workers:
        # The one before it waits for the disk, and so does it.
        return
    if worker.worker_id not in state.acknowledging:
        worker.acknowledge_at = state.now + ACKNOWLEDGE_DELAY_S
        state.acknowledging[worker.worker_id] = worker
    if len(worker.unsafe) >= ACKNOWLEDGE_COUNT:
        state.acknowledging_now[worker.worker_id] = worker


def _accept(state: State, worker: Worker, message: m.LeaseOutputs) -> list[int]:
    """Use a report. Returns the store sequences that make it safe, none when it is safe now."""
    start = message.start
    stop = start + len(message.statuses)
    lease = state.leases.get(message.lease_id)
    call = state.calls.get(message.call_id)
    if start == stop or (
        lease is not None
        and (lease.call.call_id != message.call_id or start < lease.start or stop > lease.end)
    ):
        state.note("report that does not fit its lease")
        return []
    if lease is not None and lease.container.worker is not worker:
        state.note("report under somebody else's lease")
        return []
    if lease is not None:
        lease.heard_at = state.now
        _measure(state, lease, message)
    if call is None or call.is_over or call.failure is not None:
        state.note("output of an ended call")
        if lease is not None:
            close_inputs(state, lease, start, stop)
        return []
    waits: list[int] = []
    outputs = _as_outputs(message)
    fresh = _fresh(call, start, stop)
    if fresh and lease is None and not _was_given(state, worker, call, message.lease_id):
        state.note("report under a lease that its worker never had")
        return []
    for low, high in fresh:
        part = cut_outputs(outputs, low, high)
        waits += _take(state, call, lease, part)
    if fresh != [(start, stop)]:
        state.note("duplicate output")
        # What came before may still be on its way to disk.
        waits += durable.stores_of(call, start, stop)
    if lease is not None:
        close_inputs(state, lease, start, stop)
    return waits


def _was_given(state: State, worker: Worker, call: Call, lease_id: int) -> bool:
    """Whether a lease that is not current may have been this worker's. Of leases of an earlier
    life of the scheduler all that is known is which calls there may have been then."""
    if lease_id >> m.EPOCH_SHIFT < state.epoch:
        return call.is_from_before
    return call.void.get(lease_id) == worker.worker_id


def _fresh(call: Call, start: int, stop: int) -> list[tuple[int, int]]:
    """The ranges of these inputs that have no output yet."""
    if not call.finished and not call.storing and call.received.covers(start, stop):
        return [(start, stop)]
    fresh = call.received.common(start, stop)
    for taken in (call.finished, call.storing):
        if taken:
            fresh = [gap for low, high in fresh for gap in taken.missing(low, high)]
    return fresh


def _measure(state: State, lease: Lease, message: m.LeaseOutputs) -> None:
    """How long inputs ran, and how large their outputs are. Others are served by these numbers, so
    a worker cannot have been busy for longer than it had the lease."""
    possible_s = (state.now - lease.granted_at) * lease.call.function.slots - lease.busy_s
    busy_s = min(message.busy_us / 1e6, max(0.0, possible_s))
    lease.busy_s += busy_s
    lease.call.service_s += busy_s
    lease.container.busy_s += busy_s
    method = lease.call.method
    count = len(message.statuses)
    seconds = busy_s / count
    size = (len(message.payload) + blobs.size_bytes(state, message.blobs)) / count
    if method.input_s is None:
        method.input_s, method.output_bytes = seconds, size
        return
    weight = WEIGHT_MAX
    if seconds > method.input_s:
        # One slow input among thousands must not make the next leases tiny.
        weight = min(WEIGHT_MAX, max(WEIGHT_GROW_MIN, count / 64))
    method.input_s += weight * (seconds - method.input_s)
    method.output_bytes += WEIGHT_MAX * (size - method.output_bytes)


def _as_outputs(message: m.LeaseOutputs) -> m.Outputs:
    """A report as the frame that a client gets."""
    return m.Outputs(
        message.call_id,
        message.start,
        message.lengths,
        message.statuses,
        message.blobs,
        message.payload,
    )


def cut_outputs(outputs: m.Outputs, start: int, stop: int) -> m.Outputs:
    """The outputs of inputs `start` to `stop` out of a frame, without copying their bytes."""
    low, high = start - outputs.start, stop - outputs.start
    if low == 0 and high == len(outputs.statuses):
        return outputs
    lengths = memoryview(outputs.lengths).cast("I")
    offsets = array("L", accumulate(lengths, initial=0))
    return m.Outputs(
        outputs.call_id,
        start,
        lengths[low:high].tobytes(),
        outputs.statuses[low:high],
        [(at - low, ids) for at, ids in outputs.blobs if low <= at < high],
        memoryview(outputs.payload)[offsets[low] : offsets[high]],
    )


def _take(state: State, call: Call, lease: Lease | None, outputs: m.Outputs) -> list[int]:
    """New outputs of a call: deliver them, but not those that are no last word. Returns the store
    sequences that make them safe."""
    if not any(outputs.statuses):
        return deliver(state, call, outputs)
    waits: list[int] = []
    start = outputs.start
    for position, status in enumerate(outputs.statuses):
        index = outputs.start + position
        if status == m.Status.VALUE or _is_last_word(state, call, lease, index, status):
            continue
        if start < index:
            waits += deliver(state, call, cut_outputs(outputs, start, index))
        start = index + 1
    stop = outputs.start + len(outputs.statuses)
    if start < stop:
        waits += deliver(state, call, cut_outputs(outputs, start, stop))
    return waits


def _is_last_word(state: State, call: Call, lease: Lease | None, index: int, status: int) -> bool:
    """Whether an output that is no plain value stands. A void lease was told to stop, so its
    failures mean nothing, and the items before its DONE were not taken: the input runs anew.
    An input with attempts left backs off."""
    if lease is None or index not in lease.open:
        state.note("failure under a void lease")
        return False
    return status == m.Status.DONE or not _retry(state, call, index)


def _retry(state: State, call: Call, index: int) -> bool:
    """Have a failed input back off, if it has an attempt left."""
    if call.function.retries is None:
        return False
    max_retries, initial_s, coefficient, delay_max_s = call.function.retries
    failed = call.attempts.get(index, 0) + 1
    if failed > max_retries:
        return False
    call.attempts[index] = failed
    # No delay is longer than its maximum, and a power of more than that may be no number.
    delay_s = min(delay_max_s, initial_s * coefficient ** min(failed - 1, EXPONENT_MAX))
    call.queued.remove(index, index + 1)
    call.backing_off.add(index, index + 1)
    state.at(state.now + delay_s, "retry", (call, index))
    return True


def on_retry_due(state: State, call: Call, index: int) -> None:
    """The delay of an input is over; neighbours that are due merge into ranges in the queue."""
    if index in call.backing_off:
        call.backing_off.remove(index, index + 1)
        call.queued.add(index, index + 1)
        wake_call(state, call)


# --- delivery -------------------------------------------------------------------------------------


def deliver(state: State, call: Call, outputs: m.Outputs) -> list[int]:
    """These are the outputs of these inputs, for ever. Returns the store sequence that makes them
    safe, if one does."""
    start, stop = outputs.start, outputs.start + len(outputs.statuses)
    call.queued.remove(start, stop)
    call.parked.remove(start, stop)
    call.backing_off.remove(start, stop)
    blobs.keep(state, blobs.ids(outputs.blobs))
    if call.is_durable:
        call.storing.add(start, stop)
        return [durable.store_outputs(state, call, outputs)]
    finish(state, call, outputs)
    return []


def finish(state: State, call: Call, outputs: m.Outputs) -> None:
    """Outputs are safe (on disk, where durable): hand them on."""
    start, stop = outputs.start, outputs.start + len(outputs.statuses)
    call.finished.add(start, stop)
    if call.failure is None:
        release_inputs(state, call, start, stop)
    call.count_outputs(start, len(outputs.payload) + blobs.size_bytes(state, outputs.blobs))
    call.outputs.add(outputs)
    spawned.grew(state, call, outputs)
    if call.node is not None:
        graph.note(call, outputs)
    call.suspects.remove(start, stop)
    if call.attempts or call.crashes:
        for index in range(start, stop):
            call.attempts.pop(index, None)
            call.crashes.pop(index, None)
    if call.is_durable:
        durable.serve_fetches(state, call, outputs)
        if call.is_done and not call.is_over:
            durable.end_call(state, call)
    elif call.session is not None and call.session.peer_id is not None:
        send_outputs(state, call.session.peer_id, outputs)
    # The lowest unfinished input is another one now, and that one no consumer holds back.
    wake_call(state, call)


def release_inputs(state: State, call: Call, start: int, stop: int) -> None:
    """Inputs with an output need not be kept; nor do their chunks and blobs, once all are so."""
    for chunk in call.settle(start, stop):
        spawned.shrank(state, call, chunk)
        if chunk.blobs:
            blobs.release(state, blobs.ids(chunk.blobs))


def release_all_inputs(state: State, call: Call) -> None:
    """No input of the call will run any more."""
    call.queued.clear()
    call.parked.clear()
    call.backing_off.clear()
    for chunk in call.chunks.values():
        spawned.shrank(state, call, chunk)
        blobs.release(state, blobs.ids(chunk.blobs))
    call.chunks.clear()
    call.chunk_starts.clear()


def send_outputs(state: State, peer_id: PeerId, outputs: m.Outputs) -> None:
    for blob_id in blobs.ids(outputs.blobs):
        state.commands.append(SendBlob(peer_id, blob_id))
    state.send(peer_id, outputs)


def on_ack(state: State, call: Call, message: m.Ack) -> None:
    """The client has these outputs, and its user has taken so many."""
    if call.is_durable:
        # Its outputs are for whoever fetches them, and no client of ours sends this.
        state.note("acknowledgement for a spawned call")
        return
    for start, count in message.received:
        call.acknowledged.add(start, start + count)
    for kept in call.outputs.take(call.acknowledged):
        spawned.shrank(state, call, kept)
        blobs.release(state, blobs.ids(kept.blobs))
    call.consumed_count = max(call.consumed_count, message.consumed_count)
    call.consumed_bytes = max(call.consumed_bytes, message.consumed_bytes)
    # After a restart the client's counts begin before ours.
    call.output_bytes = max(call.output_bytes, call.consumed_bytes)
    call.head_bytes = max(call.head_bytes, call.consumed_bytes)
    wake_call(state, call)


# --- generators -----------------------------------------------------------------------------------


def on_lease_items(state: State, peer_id: PeerId, message: m.LeaseItems) -> None:
    worker = state.peers[peer_id].worker
    if worker is None:
        return
    note_report(state, worker, message.sequence, 0)
    lease = state.leases.get(message.lease_id)
    if (
        lease is None
        or lease.container.worker is not worker
        or lease.call.call_id != message.call_id
        or message.index not in lease.open
        or lease.call.is_over
    ):
        state.note("items of an unknown lease")
        return
    lease.heard_at = state.now
    call = lease.call
    generator = call.generators.setdefault(message.index, GeneratorState())
    count = len(message.lengths) // 4
    seen = generator.next_number - message.number
    if seen < 0 or seen >= count:
        state.note("duplicate items" if seen >= count else "items out of order")
        return
    if message.number + count > max(generator.credit, ITEM_CREDIT_INITIAL):
        # They would be kept until somebody wants them. Perhaps only the container lies, so its
        # worker stays; what it says next is out of order.
        state.note("items beyond the credit")
        return
    items = _cut_items(message, seen)
    generator.next_number += count - seen
    generator.unconfirmed.append(items)
    blobs.keep(state, blobs.ids(items.blobs))
    if call.session is not None and call.session.peer_id is not None:
        send_items(state, call.session.peer_id, items)


def _cut_items(message: m.LeaseItems, seen: int) -> m.Items:
    lengths = memoryview(message.lengths).cast("I")
    return m.Items(
        message.call_id,
        message.index,
        message.number + seen,
        lengths[seen:].tobytes(),
        [(at - seen, ids) for at, ids in message.blobs if at >= seen],
        memoryview(message.payload)[sum(lengths[:seen]) :],
    )


def send_items(state: State, peer_id: PeerId, items: m.Items) -> None:
    for blob_id in blobs.ids(items.blobs):
        state.commands.append(SendBlob(peer_id, blob_id))
    state.send(peer_id, items)


def on_item_credit(state: State, call: Call, message: m.ItemCredit) -> None:
    generator = call.generators.setdefault(message.index, GeneratorState())
    generator.next_number = max(generator.next_number, message.received)
    while generator.unconfirmed:
        head = generator.unconfirmed[0]
        if head.number + len(head.lengths) // 4 > message.received:
            break
        generator.unconfirmed.popleft()
        blobs.release(state, blobs.ids(head.blobs))
    if message.upto <= generator.credit:
        return
    generator.credit = message.upto
    for lease in call.leases.values():
        if lease.start == message.index:
            _pass_credit_on(state, lease, message.upto)


def _pass_credit_on(state: State, lease: Lease, upto: int) -> None:
    credit = m.LeaseCredit(lease.lease_id, upto)
    container = lease.container
    if container.is_waiting:
        state.defer(container, Send(container.worker.peer_id, credit))
    else:
        state.send(container.worker.peer_id, credit)


# --- crashes --------------------------------------------------------------------------------------


def charge_crash(state: State, lease: Lease, index: int, message: m.ContainerExited) -> None:
    """The input that ran when its container died: run it again, or end it after the third time,
    so that no input takes containers down for ever."""
    call = lease.call
    if not _may_crash(lease, index):
        return
    crashes = call.crashes[index] = call.crashes.get(index, 0) + 1
    if crashes < CRASH_LIMIT:
        return
    known = {"call_id": call.call_id, "input_index": index, "crash_count": crashes}
    details = message.details | known
    text = (
        f"the container died {crashes} times while it ran input {index} of "
        f"{call.function.definition.name}: {details.get('text', '')}"
    )
    close_inputs(state, lease, index, index + 1)
    payload = m.failure_payload("crash", text, details)
    deliver(state, call, single_output(call, index, m.Status.FAILURE, payload))


def suspect(lease: Lease, index: int) -> None:
    """One of several inputs that ran when their container died: it runs alone the next time, and
    is charged if it dies alone too."""
    if _may_crash(lease, index):
        lease.call.suspects.add(index, index + 1)


def _may_crash(lease: Lease, index: int) -> bool:
    call = lease.call
    if call.is_over or call.failure is not None or index not in lease.open:
        return False
    return index not in call.finished and index not in call.storing


def failed_outputs(call: Call, start: int, stop: int, failure: m.CallFailed) -> Iterator[m.Outputs]:
    """Inputs `start` to `stop` ended as the call did: frames of a handy size."""
    payload = bytes(failure.payload)
    length = len(payload).to_bytes(4, "little")
    room = max(1, min(m.CHUNK_INPUTS_MAX, FAILED_BYTES_MAX // max(1, len(payload))))
    for low in range(start, stop, room):
        count = min(room, stop - low)
        yield m.Outputs(
            call.call_id, low, length * count, bytes([failure.status]) * count, [], payload * count
        )


def single_output(call: Call, index: int, status: int, payload: bytes | memoryview) -> m.Outputs:
    lengths = len(payload).to_bytes(4, "little")
    return m.Outputs(call.call_id, index, lengths, bytes([status]), [], payload)
