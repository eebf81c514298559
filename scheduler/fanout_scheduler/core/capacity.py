"""Where there is room, kept up to date with each change.

A fleet has thousands of containers and leases, of which a turn changes a few. Placement finds what
it needs here, so that a turn costs what it does and not what there is. `check` compares all of it
with what a search finds (invariant 16).

- `file_container` follows each change of a container's state, leases, inputs or wait;
- `file_lease` follows each change of a lease's open inputs, or of its place in its container;
- `FreeCores` is told of each worker that comes, and of each core that is given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fanout_scheduler.core.state import Container, Function, Lease, State, Worker

#: Rounding of cores that come and go in fractions.
EPSILON = 1e-9
#: The heap of free cores is made anew when it holds so many entries for each worker.
ENTRIES_MAX = 4

#: What of a container is filed: the number of its inputs if it has room for another, whether it may
#: have a second lease, whether it lives, whether it works.
Filed = tuple[int | None, bool, bool, bool]
NOT_FILED: Filed = (None, False, False, False)


def can_hold(worker: Worker, function: Function) -> bool:
    """Whether the worker could have a container of the function, were it empty."""
    return worker.cpu + EPSILON >= function.cpu and worker.memory_mib >= function.memory_mib


# --- containers -----------------------------------------------------------------------------------


def file_container(container: Container, is_gone: bool = False) -> None:
    """Have its function know what it may be given, and its worker whether it could leave."""
    new = NOT_FILED if is_gone else _filed_of(container)
    old = container.filed
    number = container.container_id
    if is_gone:
        container.worker.leaving.pop(number, None)
    if new == old:
        return
    container.filed = new
    function, worker = container.function, container.worker
    room, is_single, is_living, is_busy = new
    old_room, was_single, was_living, was_busy = old
    if is_living and not is_busy:
        worker.idle[number] = container
    else:
        worker.idle.pop(number, None)
    if old_room != room:
        _move_room(function, container, old_room, room)
    if was_single != is_single:
        if is_single:
            function.singles[number] = container
        else:
            del function.singles[number]
    if was_busy != is_busy:
        function.busy_count += is_busy - was_busy
    if was_living != is_living:
        function.living_count += is_living - was_living
        if was_living and not is_gone:
            worker.leaving[number] = container


def _move_room(function: Function, container: Container, old: int | None, new: int | None) -> None:
    rooms = function.rooms
    if old is not None:
        bucket = rooms[old]
        del bucket[container.container_id]
        if not bucket:
            del rooms[old]
    if new is not None:
        rooms.setdefault(new, {})[container.container_id] = container


def _filed_of(container: Container) -> Filed:
    if container.state == "stopping":
        return NOT_FILED
    function, leases = container.function, container.leases
    room = container.open_count if container.has_room(function.slots) else None
    is_single = (
        len(leases) == 1
        and container.state == "ready"
        and not container.is_waiting
        and not container.is_exclusive
        and not function.is_concurrent
        and not function.is_single_use
    )
    return room, is_single, True, bool(leases)


# --- leases ---------------------------------------------------------------------------------------


def file_lease(state: State, lease: Lease) -> None:
    """Have its function know whether a part of it could be taken back."""
    function = lease.call.function
    if _has_tail(lease):
        function.tails[lease.lease_id] = lease
        state.tailed[function.function_id] = function
    elif function.tails.pop(lease.lease_id, None) is not None and not function.tails:
        state.tailed.pop(function.function_id, None)


def _has_tail(lease: Lease) -> bool:
    """Of the first lease of a container one input runs; nothing of a second one does. Of a
    concurrent container everything has begun."""
    count = lease.open.count
    if not count or lease.call.function.is_concurrent or lease.call.method.is_generator:
        return False
    return count > 1 or next(iter(lease.container.leases), None) != lease.lease_id


# --- cores ----------------------------------------------------------------------------------------


class FreeCores:
    """The workers by how many cores they have free, the most first; of equal ones the oldest.

    A heap with entries that may be out of date: cores that are taken are noticed when an entry
    comes to the top, cores that are given back make a new entry. So each worker has an entry that
    says at least what it has: the last one that was made of it, and the only one that counts.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Worker]] = []
        self._worker_count = 0

    def grew(self, worker: Worker) -> None:
        """The worker is new, or has got cores back."""
        if worker.is_lost or worker.cpu_free <= worker.cpu_filed:
            return
        if worker.cpu_filed == -math.inf:
            self._worker_count += 1
        self._push(worker)
        if len(self._heap) > ENTRIES_MAX * self._worker_count + 64:
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapify(self._heap)

    def lost(self, worker: Worker) -> None:
        """The worker is gone; its entries go when they come to the top."""
        worker.is_lost = True
        self._worker_count -= 1

    def has(self, cpu: float) -> bool:
        """Whether some worker has so many cores free."""
        top = self._top()
        return top is not None and top.cpu_free + EPSILON >= cpu

    def find(self, cpu: float, is_fit: Callable[[Worker], bool]) -> Worker | None:
        """Of the workers that have so many cores free and are fit, the one with the most."""
        aside = []
        found = None
        while (worker := self._top()) is not None and worker.cpu_free + EPSILON >= cpu:
            if is_fit(worker):
                found = worker
                break
            aside.append(heappop(self._heap))
        for entry in aside:
            heappush(self._heap, entry)
        return found

    def _top(self) -> Worker | None:
        heap = self._heap
        while heap:
            entry = heap[0]
            worker = entry[3]
            if not self._counts(entry):
                heappop(heap)
            elif worker.cpu_free == worker.cpu_filed:
                return worker
            else:
                heappop(heap)
                self._push(worker)
        return None

    def _push(self, worker: Worker) -> None:
        worker.cpu_filed = worker.cpu_free
        worker.cpu_entry += 1
        heappush(self._heap, (-worker.cpu_free, worker.number, worker.cpu_entry, worker))

    @staticmethod
    def _counts(entry: tuple[float, int, int, Worker]) -> bool:
        """Whether this is the worker's own entry, and not one that another has replaced."""
        return not entry[3].is_lost and entry[2] == entry[3].cpu_entry


# --- what must hold -------------------------------------------------------------------------------


def check(state: State) -> None:
    """16. What is filed is what a search would find."""
    for function in state.functions.values():
        _check_function(state, function)
    for container in state.containers.values():
        assert container.filed == _filed_of(container), f"16: container {container.container_id}"
    for worker in state.workers.values():
        idle = {c.container_id for c in worker.containers.values() if c.is_idle}
        assert worker.idle.keys() == idle, f"16: idle containers of {worker.name}"
        leaving = {c.container_id for c in worker.containers.values() if c.state == "stopping"}
        assert worker.leaving.keys() == leaving, f"16: who leaves {worker.name}"
        assert worker.cpu_free <= worker.cpu_filed, f"16: free cores of {worker.name}"
        resuming = sum(c.worker is worker for c in state.resuming.values())
        assert worker.resuming_count == resuming, f"16: who waits for a core of {worker.name}"
    tailed = {f.function_id for f in state.functions.values() if f.tails}
    assert state.tailed.keys() >= tailed, "16: a function with tails is not known"


def _check_function(state: State, function: Function) -> None:
    name = function.definition.name
    filed = [container.filed for container in function.containers.values()]
    assert function.living_count == sum(f[2] for f in filed), f"16: living containers of {name}"
    assert function.busy_count == sum(f[3] for f in filed), f"16: busy containers of {name}"
    assert len(function.singles) == sum(f[1] for f in filed), f"16: single leases of {name}"
    roomy = {c: n for n, bucket in function.rooms.items() for c in bucket}
    found = {c.container_id: c.filed[0] for c in function.containers.values()}
    assert roomy == {c: n for c, n in found.items() if n is not None}, f"16: rooms of {name}"
    leases = [x for c in function.containers.values() for x in c.leases.values()]
    assert function.tails.keys() == {x.lease_id for x in leases if _has_tail(x)}, f"16: {name}"
