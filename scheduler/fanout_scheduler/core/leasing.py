"""Giving out inputs and taking them back: the life of a lease.

::

    queued --grant--> open in a lease --LeaseOutputs--> finished
       ^                   |  |
       |                   |  +--failed, attempts left--> backing off --due--> queued
       +---Reclaimed, container or worker lost-----------------------------+

A lease ends when none of its inputs is open. With its last lease a container gives its core back.
Every path by which an input leaves a lease goes through `close_inputs`, so counts cannot drift.
"""

from __future__ import annotations

from heapq import heappush

from fanout.config import ITEM_CREDIT_INITIAL, SCALEDOWN_WINDOW_S, WINDOW_BYTES
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core.events import PeerId, SendBlob
from fanout_scheduler.core.state import Call, Container, Lease, State, Worker

HELD_BY_CONSUMER = "its consumer: outputs wait to be taken"


def wake_call(state: State, call: Call) -> None:
    """Put a call among those that wait for a container, if it has something to lease."""
    if call.is_ready or call.is_over or not call.queued or call.failure is not None:
        return
    if is_held_by_consumer(call):
        call.waits_for = HELD_BY_CONSUMER
        return
    function = call.function
    call.is_ready = True
    call.service_s = max(call.service_s, state.service_clock_s)
    heappush(function.ready, (-call.depth, call.service_s, call.number, call))
    state.ready_functions[function.function_id] = function


def is_held_by_consumer(call: Call) -> bool:
    """Whether so many outputs are not consumed that no more may be made. The lowest unfinished
    input is exempt: an ordered consumer may be waiting for just that one."""
    if call.unconsumed_bytes < call_window_bytes(call):
        return False
    lowest = call.received.first
    gaps = call.finished.missing(lowest, call.received.end)
    return not (gaps and gaps[0][0] == call.queued.first)


def call_window_bytes(call: Call) -> int:
    # Outputs of a durable call go to disk, whoever reads them.
    return 1 << 62 if call.is_durable else WINDOW_BYTES


def grant(state: State, container: Container, call: Call, count: int) -> Lease:
    """Lease up to `count` of the call's lowest queued inputs to a container."""
    chunk = call.chunk_of(call.queued.first)
    start, stop = call.queued.pop_front(count, chunk.stop)
    lengths, blobs, payload = chunk.cut(start, stop)
    lease = Lease(
        lease_id=state.next_id(),
        call=call,
        container=container,
        start=start,
        stop=stop,
        open=IntervalSet([(start, stop)]),
        heard_at=state.now,
    )
    state.leases[lease.lease_id] = lease
    call.leases[lease.lease_id] = lease
    container.leases[lease.lease_id] = lease
    call.leased_count += stop - start
    call.waits_for = ""
    call.stranded_since = None
    hold_core(container)
    for _, blob_ids in blobs:
        for blob_id in blob_ids:
            send_blob_once(state, container.worker, blob_id)
    generator = call.generators.get(start)
    state.send(
        container.worker.peer_id,
        m.Lease(
            container_id=container.container_id,
            lease_id=lease.lease_id,
            call_id=call.call_id,
            start=start,
            lengths=lengths,
            blobs=blobs,
            skip=generator.next_number if generator else 0,
            credit=max(generator.credit if generator else 0, ITEM_CREDIT_INITIAL),
            payload=payload,
        ),
    )
    return lease


def send_blob_once(state: State, worker: Worker, blob_id: bytes) -> None:
    """However many inputs use a blob, a worker gets it once."""
    if blob_id not in worker.blobs:
        worker.blobs.add(blob_id)
        state.commands.append(SendBlob(worker.peer_id, blob_id))


def hold_core(container: Container) -> None:
    if not container.holds_core:
        container.holds_core = True
        container.worker.cpu_free -= container.function.cpu


def release_core(container: Container) -> None:
    if container.holds_core:
        container.holds_core = False
        container.worker.cpu_free += container.function.cpu


def close_inputs(state: State, lease: Lease, start: int, stop: int) -> None:
    """Inputs `start` to `stop` are no longer this lease's; the last one ends it."""
    lease.call.leased_count -= lease.open.remove(start, stop)
    if not lease.open:
        end_lease(state, lease)


def end_lease(state: State, lease: Lease) -> None:
    container = lease.container
    was_first = next(iter(container.leases), None) == lease.lease_id
    lease.call.leased_count -= lease.open.count
    lease.open = IntervalSet()
    state.leases.pop(lease.lease_id, None)
    lease.call.leases.pop(lease.lease_id, None)
    container.leases.pop(lease.lease_id, None)
    if container.leases:
        if not was_first:
            return
        # The second lease begins only now; it was not slow while it waited.
        next(iter(container.leases.values())).heard_at = state.now
        if container.is_waiting and lease.is_cancelled and not container.waits_again:
            # The input that waited was stopped before the tail could be taken back: the container
            # runs again, whether or not its core is free.
            state.note("core taken back early")
            hold_core(container)
            end_wait(state, container)
        # Otherwise it is the next input that waits: that came faster than the last one's output.
        container.waits_again = False
        return
    end_wait(state, container)
    release_core(container)
    container.idle_since = state.now
    if container.state != "stopping" and not container.has_idle_deadline:
        container.has_idle_deadline = True
        state.at(state.now + scaledown_s(container), "idle", container)


def scaledown_s(container: Container) -> float:
    return container.function.scaledown_window_s or SCALEDOWN_WINDOW_S


def requeue(state: State, call: Call, start: int, stop: int) -> None:
    """Inputs that nobody runs any more go back to where they were in the queue."""
    if call.is_over or call.failure is not None:
        return
    for low, high in call.finished.missing(start, stop):
        for free_low, free_high in call.storing.missing(low, high):
            call.queued.add(free_low, free_high)
    wake_call(state, call)


def give_back_lease(state: State, lease: Lease) -> None:
    """The container of a lease is gone: what it did not report runs elsewhere."""
    ranges = list(lease.open)
    call = lease.call
    end_lease(state, lease)
    for start, stop in ranges:
        requeue(state, call, start, stop)


# --- waiting: a container gives its core away while its inputs wait ------------------------------


def begin_wait(state: State, container: Container) -> None:
    """All that the container's inputs do is wait. What it has not begun can run elsewhere."""
    if container.is_waiting:
        container.waits_again = True
        return
    if not container.leases:
        return
    container.is_waiting = True
    release_core(container)
    for lease in list(container.leases.values()):
        reclaim(state, lease, keep=0)


def end_wait(state: State, container: Container) -> None:
    """Send what was kept back; the container runs again."""
    container.is_waiting = container.waits_again = False
    state.resuming.pop(container.container_id, None)
    deferred, container.deferred = container.deferred, []
    state.commands.extend(deferred)


def on_session_waits(state: State, peer_id: PeerId, message: m.SessionWaits) -> None:
    peer = state.peers[peer_id]
    container = peer.session.container if peer.session is not None else None
    if container is None:
        return
    if message.seen != peer.wait_frames:
        state.note("wait that a frame on the wire may have ended")
        return
    begin_wait(state, container)


def on_lease_waits(state: State, peer_id: PeerId, message: m.LeaseWaits) -> None:
    lease = state.leases.get(message.lease_id)
    if lease is None:
        state.note("wait of an unknown lease")
        return
    generator = lease.call.generators.get(lease.start)
    if generator is not None and generator.credit > message.upto:
        state.send(peer_id, m.LeaseCredit(lease.lease_id, generator.credit))
        return
    begin_wait(state, lease.container)


# --- taking back what has not begun --------------------------------------------------------------


def reclaim(state: State, lease: Lease, keep: int) -> None:
    """Ask for the tail of a lease. The answer is `Reclaimed`."""
    if lease.is_reclaiming or lease.is_cancelled or lease.call.function.is_generator:
        return
    is_first = next(iter(lease.container.leases)) == lease.lease_id
    if is_first and lease.open.count < 2:
        return
    lease.is_reclaiming = True
    state.send(lease.container.worker.peer_id, m.Reclaim(lease.lease_id, keep))


def cancel_lease(state: State, lease: Lease) -> None:
    if not lease.is_cancelled:
        lease.is_cancelled = True
        state.send(lease.container.worker.peer_id, m.CancelLease(lease.lease_id))


def on_reclaimed(state: State, peer_id: PeerId, message: m.Reclaimed) -> None:
    lease = state.leases.get(message.lease_id)
    if lease is None:
        state.note("reclaim of an unknown lease")
        return
    lease.is_reclaiming = False
    ranges = lease.open.common(message.stop, lease.stop)
    if not ranges:
        # Nothing was to be had: the container is at its last input.
        lease.reclaim_after = state.now + 0.05
        return
    call = lease.call
    lease.stop = message.stop
    for start, stop in ranges:
        close_inputs(state, lease, start, stop)
        requeue(state, call, start, stop)
