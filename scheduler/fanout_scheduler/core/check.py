"""The invariants of the scheduler's state, numbered as in scheduler/README.md.

Run after each step in tests and in the simulation; a broken one is a bug in the core.
"""

from __future__ import annotations

from fanout_scheduler.core import capacity, object_restore, spawned
from fanout_scheduler.core.state import Call, State, Worker


def check(state: State) -> None:
    """Raise AssertionError, with the number of the invariant, if one is broken."""
    for call in state.calls.values():
        _check_call(call)
    for worker in state.workers.values():
        _check_worker(worker)
        is_overdrawn = worker.cpu_free < -1e-6
        assert not is_overdrawn or state.counts.get("core taken back early"), "5: cores overdrawn"
    open_count = sum(not call.is_over for call in state.calls.values())
    assert sum(app.open_count for app in state.apps.values()) == open_count, "3: open calls"
    _check_leases(state)
    _check_references(state)
    object_restore.check(state)
    capacity.check(state)
    spawned.check(state)


def _check_call(call: Call) -> None:
    name = call.call_id.hex()[:8]
    # 1. A received input is in one place; finished inputs are in no queue.
    if not call.is_over and call.failure is None:
        places = [
            list(call.queued),
            list(call.parked),
            list(call.backing_off),
            list(call.finished),
            list(call.storing),
        ]
        held = call.received.__class__()
        total = 0
        for ranges in places:
            for start, stop in ranges:
                total += stop - start
                held.add(start, stop)
        assert total == held.count, f"1: an input of {name} is in two places: {places}"
        for lease in call.leases.values():
            for start, stop in lease.open:
                held.add(start, stop)
                for low, high in [*call.queued, *call.parked]:
                    assert high <= start or stop <= low, f"1: {name} queued and leased"
        assert held == call.received, f"1: {name} holds {held}, received {call.received}"
        # 2. Every input without an output has its bytes.
        for start, stop in call.received:
            for low, high in call.finished.missing(start, stop):
                while low < high:
                    chunk = call.chunk_of(low)
                    assert chunk.start <= low < chunk.stop, f"2: {name} lacks input {low}"
                    low = chunk.stop
    # 3. Counts are what they count.
    open_count = sum(lease.open.count for lease in call.leases.values())
    assert call.leased_count == open_count, f"3: {name} {call.leased_count} != {open_count}"
    assert call.finished.count <= call.received.count, f"3: {name}"
    stores = call.storing.__class__((start, stop) for start, stop, _ in call.output_stores)
    assert stores == call.storing, f"3: outputs of {name} on their way to disk"
    # 4. Work that can be leased is on offer, unless its consumer holds it.
    if call.queued and not call.is_over and call.failure is None and not call.is_ready:
        assert call.waits_for, f"4: {name} has queued inputs and is not ready"


def _check_worker(worker: Worker) -> None:
    # 5. Cores and memory given out and free add up.
    held = sum(c.function.cpu for c in worker.containers.values() if c.holds_core)
    assert abs(worker.cpu_free + held - worker.cpu) < 1e-6, f"5: cores of {worker.name}"
    memory = sum(c.function.memory_mib for c in worker.containers.values())
    assert worker.memory_free_mib + memory == worker.memory_mib, f"5: memory of {worker.name}"
    for container in worker.containers.values():
        # 6. A core is held by containers that have a lease and do not wait, and by no other.
        runs = bool(container.leases) and not container.is_waiting
        assert container.holds_core == runs, f"6: container {container.container_id}"
        slots, is_concurrent = container.function.slots, container.function.is_concurrent
        limit = slots if is_concurrent else 2
        assert len(container.leases) <= limit, f"6: container {container.container_id}"
        count = sum(lease.open.count for lease in container.leases.values())
        assert container.open_count == count, f"6: inputs of {container.container_id}"
        assert not is_concurrent or count <= slots, (
            f"6: {container.container_id} has too many inputs"
        )
        assert not container.deferred or container.is_waiting, "6: frames kept for nobody"


def _check_leases(state: State) -> None:
    for lease in state.leases.values():
        # 7. A lease is open, and listed by its call and its container, which is alive.
        assert lease.open, f"7: lease {lease.lease_id} is empty"
        assert lease.call.leases.get(lease.lease_id) is lease, "7: call does not list its lease"
        assert lease.container.leases.get(lease.lease_id) is lease, "7: container does not"
        assert lease.container.container_id in state.containers, "7: lease of a dead container"


def _check_references(state: State) -> None:
    for function in state.functions.values():
        # 8. Permits are never exceeded.
        limit = function.max_containers
        count = sum(c.state != "stopping" for c in function.containers.values())
        assert limit is None or count <= limit, "8: more than max_containers"
        calls = sum(call.function is function for call in function.app.calls.values())
        assert function.call_count == calls, "3: calls of a function"
        # 9. Who is on offer is known to be.
        for _, _, _, call in function.ready:
            assert call.is_ready, "9: a call on offer does not know it"
        if function.ready:
            assert function.function_id in state.ready_functions, "9: function not on offer"
    for container in state.containers.values():
        # 10. Everything that refers to a container or worker refers to a live one.
        assert container.worker.worker_id in state.workers, "10: container of a lost worker"
        assert container.container_id in container.function.containers, "10: lost container"
    # 15. What is kept free is kept for somebody who wants it, on a worker that is there.
    if (reservation := state.reservation) is not None:
        assert reservation.worker.worker_id in state.workers, "15: kept free on a lost worker"
        function_id = reservation.function.function_id
        assert function_id in state.ready_functions, "15: kept free for nobody"
    for session in state.sessions.values():
        for call in session.calls.values():
            assert call.session is session, "10: a call of two sessions"
    # 14. A call graph knows the calls that live, and holds on to no other.
    for call in state.calls.values():
        assert call.node is None or call.node.call is call, "14: a call that is not in its node"
    assert all(node.call is None for node in state.ended_nodes), "14: a node keeps an ended call"
