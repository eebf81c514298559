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

from fanout.config import ITEM_CREDIT_INITIAL, WINDOW_BYTES
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core.capacity import file_container, file_lease
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
    input is exempt when an ordered consumer may be waiting for just that one: when it has consumed
    all that comes before, as far as it has told. It tells before a quarter of the window is
    untold."""
    if call.unconsumed_bytes < call_window_bytes(call):
        return False
    if call.head_bytes - call.consumed_bytes >= WINDOW_BYTES // 4:
        return True
    return call.lowest_unfinished != call.queued.first


def call_window_bytes(call: Call) -> int:
    # Outputs of a durable call go to disk, whoever reads them.
    return 1 << 62 if call.is_durable else WINDOW_BYTES


def grant(state: State, container: Container, call: Call, count: int) -> Lease:
    """Lease up to `count` of the call's lowest queued inputs to a container."""
    first = call.queued.first
    chunk = call.chunk_of(first)
    stop_max = chunk.stop
    if call.suspects:
        count, stop_max = _among_suspects(call, first, count, stop_max)
        container.is_exclusive = first in call.suspects
    start, stop = call.queued.pop_front(count, stop_max)
    lengths, blobs, payload = chunk.cut(start, stop)
    lease = Lease(
        lease_id=state.next_id(),
        call=call,
        container=container,
        start=start,
        stop=stop,
        open=IntervalSet.of(start, stop),
        heard_at=state.now,
    )
    state.leases[lease.lease_id] = lease
    call.leases[lease.lease_id] = lease
    container.leases[lease.lease_id] = lease
    call.leased_count += stop - start
    container.open_count += stop - start
    container.is_used = True
    if container.is_waiting:
        end_wait(state, container)
    call.waits_for = ""
    call.stranded_since = None
    call.blocked_since = None
    hold_core(container)
    file_container(container)
    file_lease(state, lease)
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
            method=call.method.name,
            payload=payload,
        ),
    )
    return lease


def _among_suspects(call: Call, first: int, count: int, stop_max: int) -> tuple[int, int]:
    """How many inputs a lease may have, and where it ends at the latest: a suspect goes alone."""
    if first in call.suspects:
        return 1, stop_max
    behind = call.suspects.common(first + 1, stop_max)
    return count, behind[0][0] if behind else stop_max


def send_blob_once(state: State, worker: Worker, blob_id: bytes) -> None:
    """However many inputs use a blob, a worker gets it once."""
    if blob_id not in worker.blobs:
        worker.blobs.add(blob_id)
        state.commands.append(SendBlob(worker.peer_id, blob_id))


def hold_core(container: Container) -> None:
    if not container.holds_core:
        container.holds_core = True
        container.worker.cpu_free -= container.function.cpu


def release_core(state: State, container: Container) -> None:
    if container.holds_core:
        container.holds_core = False
        container.worker.cpu_free += container.function.cpu
        state.free_cores.grew(container.worker)


def close_inputs(state: State, lease: Lease, start: int, stop: int) -> None:
    """Inputs `start` to `stop` are no longer this lease's; the last one ends it."""
    removed = lease.open.remove(start, stop)
    lease.call.leased_count -= removed
    lease.container.open_count -= removed
    if not lease.open:
        end_lease(state, lease)
    elif lease.call.function.is_concurrent:
        file_container(lease.container)
    elif lease.open.count == 1:
        file_lease(state, lease)


def end_lease(state: State, lease: Lease) -> None:
    container = lease.container
    was_first = next(iter(container.leases), None) == lease.lease_id
    lease.call.leased_count -= lease.open.count
    container.open_count -= lease.open.count
    lease.open = IntervalSet()
    file_lease(state, lease)
    state.leases.pop(lease.lease_id, None)
    lease.call.leases.pop(lease.lease_id, None)
    container.leases.pop(lease.lease_id, None)
    if container.leases:
        if was_first:
            # The second lease begins only now; it was not slow while it waited. If the container
            # waits, then it does in that one: what its client says may overtake its outputs.
            second = next(iter(container.leases.values()))
            second.heard_at = state.now
            file_lease(state, second)
        file_container(container)
        return
    container.is_exclusive = False
    if container.is_waiting or container.deferred:
        end_wait(state, container)
    else:
        file_container(container)
    release_core(state, container)
    container.idle_since = state.now
    if container.function.is_single_use:
        stop_container(state, container)
    elif container.state != "stopping":
        watch_idle(state, container)


def watch_idle(state: State, container: Container, due_at: float | None = None) -> None:
    """Look whether it may leave when it is idle for its scaledown window, or at another time. A
    look that comes earlier stays; it plans the next one."""
    if due_at is None:
        due_at = container.idle_since + container.function.scaledown_window_s
    due_at = max(state.now, due_at)
    if container.idle_due_at is None or due_at < container.idle_due_at:
        container.idle_due_at = due_at
        state.at(due_at, "idle", container)


def stop_container(state: State, container: Container, is_patient: bool = False) -> None:
    """Have it leave: at once, or if `is_patient` when what it runs has ended."""
    kill = bool(container.leases) and not is_patient
    if container.state != "stopping" or (kill and not container.is_killed):
        container.state = "stopping"
        container.is_killed = kill
        file_container(container)
        state.send(container.worker.peer_id, m.StopContainer(container.container_id, kill))


def requeue(state: State, call: Call, start: int, stop: int) -> None:
    """Inputs that nobody runs any more go back to where they were in the queue."""
    if call.is_over or call.failure is not None:
        return
    for low, high in call.finished.missing(start, stop):
        for free_low, free_high in call.storing.missing(low, high):
            call.queued.add(free_low, free_high)
    wake_call(state, call)


def give_back_lease(state: State, lease: Lease) -> None:
    """The container of a lease is gone, or has to end it: what it did not report runs elsewhere.
    What its worker still reports is known to be late, and not made up."""
    ranges = list(lease.open)
    call = lease.call
    call.void[lease.lease_id] = lease.container.worker.worker_id
    end_lease(state, lease)
    for start, stop in ranges:
        requeue(state, call, start, stop)


# --- waiting: a container gives its core away while its inputs wait ------------------------------


def begin_wait(state: State, container: Container) -> None:
    """All that the container's inputs do is wait. What it has not begun can run elsewhere."""
    if container.is_waiting or not container.leases:
        return
    container.is_waiting = True
    release_core(state, container)
    file_container(container)
    for lease in list(container.leases.values()):
        reclaim(state, lease, keep=0)


def end_wait(state: State, container: Container) -> None:
    """Send what was kept back; the container runs again."""
    container.is_waiting = False
    container.waiting_peer = None
    state.stop_resuming(container)
    file_container(container)
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
    if container.is_waiting:
        container.waiting_peer = peer_id


def on_session_runs(state: State, peer_id: PeerId, message: m.SessionRuns) -> None:
    peer = state.peers[peer_id]
    if peer.session is not None and peer.session.container is not None:
        run_again(state, peer.session.container, peer_id)


def run_again(state: State, container: Container, peer_id: PeerId) -> None:
    """The wait that this client told of is over, and nothing from here ended it: the container
    runs, whether or not its core is free."""
    if container.is_waiting and container.waiting_peer == peer_id:
        state.note("core taken back early")
        hold_core(container)
        end_wait(state, container)


def lease_of(state: State, peer_id: PeerId, lease_id: int) -> Lease | None:
    """The lease that a worker speaks of, if it is one of its own."""
    lease = state.leases.get(lease_id)
    if lease is None or lease.container.worker is not state.peers[peer_id].worker:
        return None
    return lease


def on_lease_waits(state: State, peer_id: PeerId, message: m.LeaseWaits) -> None:
    lease = lease_of(state, peer_id, message.lease_id)
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
    call = lease.call
    if lease.is_reclaiming or lease.is_cancelled or call.method.is_generator:
        return
    if call.function.is_concurrent:
        # All of it has begun.
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
    lease = lease_of(state, peer_id, message.lease_id)
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
