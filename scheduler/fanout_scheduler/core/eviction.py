"""Takes its place from a generator that waits for its consumer, when the consumer waits for that.

A generator that has used up its credit keeps its container, and with it a permit and memory, until
somebody takes items. Where the same program waits for another call that needs the permit, neither
gets on:

    for a, b in zip(f.map(xs), f.map(ys)): ...        # max_containers=1

So when the input that a program waits for has found no place for `EVICT_AFTER_S`, and everybody
who holds one waits, then a generator of the same program, or of one that waits for it, is stopped.
Nobody is charged: its input goes back into the queue, and when it runs again the items that are
here already are skipped. Of several the one with the highest index goes, as its items are needed
last.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from fanout.protocol import messages as m
from fanout_scheduler.core.capacity import can_hold
from fanout_scheduler.core.leasing import cancel_lease, give_back_lease, stop_container
from fanout_scheduler.core.state import (
    Call,
    Container,
    Function,
    Lease,
    Reservation,
    Session,
    State,
)

#: A consumer that is only slow takes its next items within this time.
EVICT_AFTER_S = 1.0
#: The function for which one was stopped has its worker for this long after it: where several have
#: to go, the first does not come back before the last has gone.
EMPTY_S = 10.0


def evict_for(state: State, function: Function, lacks_permit: bool) -> bool:
    """See whether a call of this function, which has no place for another container, waits for a
    place that a generator holds which waits for it in turn. If so the generator is stopped, and
    the call is the next of the function to be served; returns whether that is so.

    Args:
        lacks_permit: `max_containers` are in use; else it is memory, or room on the workers.
    """
    generators: dict[bytes, list[Lease]] = {}
    for container in _holders(state, function, lacks_permit):
        if not container.is_waiting or container.container_id in state.resuming:
            # It gets on, so its place may become free.
            function.moved_at = state.now
            return False
        _add_generators(generators, container)
    if not generators:
        return False
    by_session: dict[bytes, list[Lease]] = {}
    for _, _, _, call in function.ready:
        session_id = call.session.session_id if call.session is not None else b""
        candidates = by_session.get(session_id)
        if candidates is None:
            candidates = by_session[session_id] = _candidates(call, generators)
        if not candidates or not _is_waited_for(call):
            continue
        if call.blocked_since is None:
            call.blocked_since = state.now
        victim = max(candidates, key=lambda lease: (lease.start, lease.lease_id))
        # A consumer that takes items, however slowly, waits for nothing else.
        last_moved_at = max(function.moved_at, *(lease.heard_at for lease in candidates))
        due_at = EVICT_AFTER_S + max(call.blocked_since, last_moved_at)
        if state.now < due_at:
            state.look(due_at)
        else:
            _evict(state, victim, call, lacks_permit)
            return True
    return False


def _holders(state: State, function: Function, lacks_permit: bool) -> Iterator[Container]:
    """The containers of which one has to go, so that another of the function can start."""
    if lacks_permit:
        yield from function.containers.values()
        return
    reservation = state.reservation
    if reservation is not None and state.now < reservation.evicted_at + EMPTY_S:
        # One worker is emptied at a time, else none would ever have enough. A worker that is kept
        # for another reason, or in vain, is not spared: its function may never get it, as long as
        # what it waits for is held by a generator that waits for this one.
        if reservation.function is function:
            yield from reservation.worker.containers.values()
        else:
            state.look(reservation.evicted_at + EMPTY_S)
        return
    for worker in state.workers.values():
        if can_hold(worker, function):
            yield from worker.containers.values()


def _is_waited_for(call: Call) -> bool:
    """Whether its consumer can have nothing before an input of it that has no place."""
    if call.is_over or not call.queued:
        return False
    lowest = call.finished.missing(call.received.first, call.received.end)
    is_head = bool(lowest) and lowest[0][0] == call.queued.first
    return is_head and (call.is_ordered or not call.leases)


def _add_generators(generators: dict[bytes, list[Lease]], container: Container) -> None:
    """Add, by the session of its consumer, each generator that waits in a container."""
    if container.waiting_peer is not None:
        return
    for lease in container.leases.values():
        if lease.call.method.is_generator and lease.call.session is not None:
            generators.setdefault(lease.call.session.session_id, []).append(lease)


def _candidates(call: Call, generators: dict[bytes, list[Lease]]) -> list[Lease]:
    """The generators whose consumers may wait for this call."""
    programs = _programs_that_wait_for(call)
    return [lease for session_id in programs for lease in generators.get(session_id, ())]


def _programs_that_wait_for(call: Call) -> set[bytes]:
    """The session of the call, and of the inputs that made it: they all wait for it, as it is."""
    found: set[bytes] = set()
    open_sessions: list[Session | None] = [call.session]
    while open_sessions:
        session = open_sessions.pop()
        if session is None or session.session_id in found:
            continue
        found.add(session.session_id)
        if session.container is not None:
            open_sessions += [lease.call.session for lease in session.container.leases.values()]
    return found


def _evict(state: State, victim: Lease, call: Call, lacks_permit: bool) -> None:
    state.note("generator evicted")
    container = victim.container
    _tell(state, victim.call.function, call)
    # What it still reports is that of a void lease: failures mean nothing, items come too late.
    cancel_lease(state, victim)
    give_back_lease(state, victim)
    if not lacks_permit and not container.leases:
        stop_container(state, container)
        # Whoever had one before has waited for long, and gets the next.
        state.reservation = Reservation(call.function, container.worker, evicted_at=state.now)
    call.blocked_since = None
    _put_first(call)


def _put_first(call: Call) -> None:
    """Of calls at its depth it is the next to be served, whatever it has had."""
    ready = call.function.ready
    at = next(i for i, entry in enumerate(ready) if entry[3] is call)
    ready[at] = (-call.depth, -1.0, call.number, call)
    heapq.heapify(ready)


def _tell(state: State, function: Function, call: Call) -> None:
    """Once a function: what is run twice, and how to avoid it."""
    if function.is_eviction_told or call.session is None or call.session.peer_id is None:
        return
    function.is_eviction_told = True
    name = function.definition.name
    text = (
        f"{name} was stopped while it waited for its items to be taken, as this program waits for "
        f"{call.function.definition.name}, which needs its place. It runs again from its start and "
        f"leaves out what it has given already; with more max_containers, or memory, it need not"
    )
    state.send(call.session.peer_id, m.Notice("evicted", text))
