"""Keeps a worker free for a request that needs more than what becomes free at a time.

Whatever becomes free is offered to whoever was served least, so among requests of one size nobody
waits for ever. A request for two cores is different: where others want one, each core that becomes
free is gone before the second one is. The same holds for memory that warm containers of others
hold. And a container that runs several inputs at a time keeps its core as long as it gets more of
them, so that nothing becomes free at all. So a function that has asked for `RESERVE_AFTER_S` in
vain, and for more than others do or beside such a one, has a worker reserved: what becomes free
there is nobody else's, until it is enough, and containers that work there get nothing more.

One function has a reservation at a time. Calls of containers run all the same: a container that
waits for its own calls may hold the memory that the reservation is about.
"""

from __future__ import annotations

from fanout_scheduler.core.capacity import can_hold
from fanout_scheduler.core.state import Call, Function, Reservation, State, Worker

#: So long a function is passed over before a worker is kept free for it.
RESERVE_AFTER_S = 30.0


def is_for_another(state: State, worker: Worker, function: Function, call: Call | None) -> bool:
    """Whether what is free on a worker is kept for another function.

    Args:
        call: what is to run there; None for a container that no input needs.
    """
    reservation = state.reservation
    return (
        reservation is not None
        and reservation.worker is worker
        and reservation.function is not function
        and not (call is not None and call.ancestors)
    )


def was_passed_over(state: State, function: Function) -> None:
    """There was no room for its next input."""
    if function.held_since is None:
        function.held_since = state.now
    due_at = function.held_since + RESERVE_AFTER_S
    if state.now < due_at:
        state.look(due_at)
    elif state.reservation is None and _may_wait_for_ever(state, function):
        worker = _roomiest(state, function)
        if worker is not None:
            state.reservation = Reservation(function, worker)


def was_served(state: State, function: Function) -> None:
    """It got a lease, or wants none any more."""
    function.held_since = None
    if state.reservation is not None and state.reservation.function is function:
        state.reservation = None


def worker_lost(state: State, worker: Worker) -> None:
    """Nothing can be kept free there."""
    if state.reservation is not None and state.reservation.worker is worker:
        state.reservation = None


def _may_wait_for_ever(state: State, function: Function) -> bool:
    return any(
        other.cpu < function.cpu
        or other.memory_mib < function.memory_mib
        or (other.is_concurrent and other is not function)
        for other in state.ready_functions.values()
    )


def _roomiest(state: State, function: Function) -> Worker | None:
    """The worker where least has to become free."""
    fitting = [worker for worker in state.workers.values() if can_hold(worker, function)]
    return max(fitting, key=lambda w: (w.cpu_free, w.memory_free_mib), default=None)
