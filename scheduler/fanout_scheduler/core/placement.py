"""Who runs what next. Called once a turn, after all facts of the turn are in.

Order of business:

1. Containers that have been told something while they waited get their cores back: they hold
   memory and a permit, and what they are part of is older than anything that is queued.
2. Ready calls get containers. Nested calls go before their callers' siblings (deeper first), so
   that waiting containers do not pile up; calls of equal depth share by container-seconds; the
   oldest wins a tie. A container is, in this order: an idle one, a new one, and last one that is
   about to finish quick inputs anyway and can have the next lease waiting.
   A worker may be kept free for a request that is larger than others: see reservation.py.
3. Where somebody is idle and nothing is queued, the tail of a long lease is taken back.

A container holds its function's cores only while it has a lease and does not wait, so warm
containers of many functions share a core, and a quick call waits for one lease at most.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

from fanout.protocol import messages as m
from fanout_scheduler.core import eviction, objects, reservation
from fanout_scheduler.core.calls import fail_for, update_window
from fanout_scheduler.core.capacity import EPSILON, can_hold
from fanout_scheduler.core.leasing import (
    HELD_BY_CONSUMER,
    end_wait,
    grant,
    hold_core,
    is_held_by_consumer,
    reclaim,
    send_blob_once,
    stop_container,
    wake_call,
    watch_idle,
)
from fanout_scheduler.core.scaling import is_spare, lacks_container, wanted_count
from fanout_scheduler.core.state import Call, Container, Function, Lease, State, Worker
from fanout_scheduler.core.waiting import BLOBS
from fanout_scheduler.core.workers import add_container

#: Seconds of work in one lease: long enough to make its cost small, short enough to share a core.
LEASE_S = 0.03
#: Inputs quicker than this may have a second lease waiting in their container: the way there and
#: back takes up to 2 ms where processors sleep in between, 4 % of such an input.
QUICK_S = 0.06
#: A lease that has been silent for this long is stuck, as far as its tail is concerned.
STUCK_S = 0.05
#: A tail that would be run in less than this is left where it is.
TAIL_MIN_S = 0.005
LEASE_BYTES_MAX = 4 << 20
LEASE_INPUTS_MAX = m.CHUNK_INPUTS_MAX
#: Work that is worth starting another container for, when one runs already.
START_WORTH_S = 0.005
#: Waiting containers hold memory; at this many on one worker, deeper nesting is refused.
CONTAINERS_MAX = 256
#: The first ready call of a function: its place in the order (as in `Function.ready`), and whose.
Offer = tuple[float, float, int, Function]
#: A wait for a worker that is not there is told to the client after this time.
NOTICE_S = 5.0
#: Between two looks at the tails, at least and for each of them: looking takes about a microsecond.
RECLAIM_INTERVAL_S = 0.002
RECLAIM_INTERVAL_EACH_S = 10e-6

NO_WORKER = "a worker: none is connected"
NO_CORE = "a free core"
NO_MEMORY = "free memory"
NO_PERMIT = "a permit: max_containers are in use"
NO_ROOM = "a worker with room for another container"
KEPT = "a worker: what is free is kept for another request"
NO_FIT = "a worker that has as much cpu and memory as it asks for"


def place(state: State) -> None:
    """Decide everything that can be decided now."""
    if state.resuming:
        _resume(state)
    if state.ready_functions:
        _place_ready(state)
        # A call that failed just now may be what a container waited for.
        if state.resuming:
            _resume(state)
    if state.tailed and state.now >= state.reclaim_after:
        _reclaim_tails(state)
    elif state.tailed:
        # What happened now may be what a tail waited for.
        state.look(state.reclaim_after)


def _has_core(worker: Worker, function: Function) -> bool:
    return worker.cpu_free + EPSILON >= function.cpu


# --- 1. containers that waited -------------------------------------------------------------------


def _resume(state: State) -> None:
    for container in list(state.resuming.values()):
        if _has_core(container.worker, container.function):
            hold_core(container)
            end_wait(state, container)


def _is_reserved(state: State, worker: Worker, function: Function, call: Call | None) -> bool:
    """Whether a core that is free on this worker is somebody else's: a container of it waits for
    its core to come back, or it is kept for another function."""
    if worker.resuming_count:
        return True
    return reservation.is_for_another(state, worker, function, call)


def _may_run(state: State, container: Container, call: Call) -> bool:
    """Whether it has a core for an input of the call, or its worker has one to give. One that runs
    several inputs at a time would never give its core back as long as it gets more, so it gets none
    where somebody else is to have a core; but what its own inputs may wait for."""
    worker, function = container.worker, call.function
    if container.holds_core and call.ancestors:
        return True
    has_core = container.holds_core or _has_core(worker, function)
    return has_core and not _is_reserved(state, worker, function, call)


# --- 2. ready calls ------------------------------------------------------------------------------


def _place_ready(state: State) -> None:
    held: dict[bytes, str] = {}
    offers: list[Offer] = []
    while (function := _next_function(state, held, offers)) is not None:
        call = function.ready[0][3]
        reason = function.waits_for = _place_call(state, call)
        if not reason:
            _offer(function, offers)
        else:
            call.waits_for = reason
            if reason in (NO_PERMIT, NO_ROOM, NO_MEMORY, KEPT) and eviction.evict_for(
                state, function, reason == NO_PERMIT
            ):
                _offer(function, offers)
                continue
            held[function.function_id] = reason
            if reason in (NO_CORE, NO_MEMORY, KEPT):
                reservation.was_passed_over(state, function)
            if reason in (NO_WORKER, NO_FIT):
                _tell_of_wait(state, call, reason)
            if reason in (NO_PERMIT, NO_ROOM, NO_MEMORY):
                _fail_if_deadlocked(state, call, reason)
    waiting_count = sum(reason in (NO_CORE, KEPT) for reason in held.values())
    for function_id, reason in held.items():
        others_wait = waiting_count > (reason in (NO_CORE, KEPT))
        if reason in (NO_CORE, NO_PERMIT, NO_ROOM, NO_MEMORY, KEPT, "") and not others_wait:
            prefetched = state.functions.get(function_id)
            if prefetched is not None:
                _prefetch(state, prefetched)


def _tell_of_wait(state: State, call: Call, reason: str) -> None:
    """Tell the client, once a call, of a wait that only a person can end."""
    if call.stranded_since is None:
        call.stranded_since = state.now
        state.look(state.now + NOTICE_S)
    elif state.now - call.stranded_since >= NOTICE_S and not call.is_told:
        call.is_told = True
        if call.session is not None and call.session.peer_id is not None:
            text = f"{call.function.definition.name} waits for {reason}"
            state.send(call.session.peer_id, m.Notice("waiting", text))
    elif not call.is_told:
        state.look(call.stranded_since + NOTICE_S)


def _next_function(state: State, held: dict[bytes, str], offers: list[Offer]) -> Function | None:
    """The function whose first ready call is to be served next; held ones are passed over.

    A function that was served is offered anew, with what is its first call then. All are looked at
    only when `offers` is empty: at first, and in the end, to see that none was passed over.
    """
    if not offers:
        if len(state.ready_functions) == 1:
            # The usual thing, and no question of order.
            (function,) = state.ready_functions.values()
            if function.function_id in held:
                return None
            _drop_stale(state, function)
            return function if function.ready else None
        for function in list(state.ready_functions.values()):
            if function.function_id not in held:
                _drop_stale(state, function)
                _offer(function, offers)
    while offers:
        *first, function = heappop(offers)
        _drop_stale(state, function)
        if function.ready and first == list(function.ready[0][:3]):
            return function
        _offer(function, offers)
    return None


def _offer(function: Function, offers: list[Offer]) -> None:
    if function.ready:
        heappush(offers, (*function.ready[0][:3], function))


def _drop_stale(state: State, function: Function) -> None:
    """Calls at the front that ended, or lost their queue to late reports, are ready no more."""
    while function.ready:
        call = function.ready[0][3]
        if call.queued and not call.is_over and call.failure is None:
            if not is_held_by_consumer(call):
                return
            call.waits_for = HELD_BY_CONSUMER
        call.is_ready = False
        heappop(function.ready)
    state.ready_functions.pop(function.function_id, None)
    reservation.was_served(state, function)


def _place_call(state: State, call: Call) -> str:
    """Lease inputs of the call to a container. Returns what it must wait for, "" if leased."""
    function = call.function
    if function.lacks_blobs:
        return BLOBS
    if not state.workers:
        return NO_WORKER
    # A suspect gets a container for itself.
    is_alone = bool(call.suspects) and call.queued.first in call.suspects
    container = _with_room(state, call, 1 if is_alone else function.target)
    if container is None and not _is_worth_a_container(state, call):
        container = None if is_alone else _with_room(state, call, function.slots)
        if container is None:
            return NO_CORE
    reason = ""
    if container is None:
        worker, reason = _choose_worker(state, function, call)
        if worker is not None:
            container = start_container(state, worker, function)
        elif not is_alone and function.slots > function.target:
            container = _with_room(state, call, function.slots)
    if container is None:
        limit = 1 if is_alone else function.slots
        if reason != NO_FIT and any(count < limit for count in function.rooms):
            # One of its own has room, and runs it as soon as it has its core.
            reason = NO_CORE
        return _final_reason(state, call, reason)
    _lease(state, container, call)
    return ""


def _with_room(state: State, call: Call, limit: int) -> Container | None:
    """A container that may have another input and has a core for it: for batches the fullest one,
    else the emptiest; of equal ones the one that worked last, so that others can be spared."""
    function = call.function
    may_any_run = function.is_concurrent
    for count in sorted(function.rooms, reverse=function.is_batched):
        if count < limit:
            for container in reversed(function.rooms[count].values()):
                if _may_run(state, container, call):
                    return container
                if not may_any_run and not state.free_cores.has(function.cpu):
                    return None
                may_any_run = True
    return None


def _is_worth_a_container(state: State, call: Call) -> bool:
    """Where a container is about to finish quick inputs anyway, a few more are done before another
    container could start."""
    function, input_s = call.function, call.method.input_s
    if input_s is None or function.is_single_use:
        return True
    waiting_count = call.queued.count + len(function.ready) - 1
    if waiting_count * input_s > START_WORTH_S:
        return True
    if not any(_can_prefetch(state, c) for c in function.singles.values()):
        return True
    # Should that container get stuck, the question is asked again.
    state.look(state.now + STUCK_S)
    return False


def _choose_worker(
    state: State, function: Function, call: Call | None
) -> tuple[Worker | None, str]:
    """The worker with the most free cores that can hold another container of the function, and has
    a core for the call's next input, if there is a call."""
    needs_core = call is not None
    limit = function.max_containers
    if limit is not None and len(function.containers) >= limit:
        return None, NO_PERMIT
    reason = NO_CORE
    full: list[Worker] = []

    def is_fit(worker: Worker) -> bool:
        nonlocal reason
        if not can_hold(worker, function):
            return False
        if reservation.is_for_another(state, worker, function, call):
            reason = KEPT if reason == NO_CORE else reason
            return False
        if needs_core and worker.resuming_count:
            return False
        has_memory = function.memory_mib <= worker.memory_free_mib
        if has_memory and len(worker.containers) < CONTAINERS_MAX:
            return True
        reason = NO_ROOM if has_memory else NO_MEMORY
        full.append(worker)
        return False

    found = state.free_cores.find(function.cpu if needs_core else -math.inf, is_fit)
    if found is None and full:
        _make_room(state, full, function, is_needed=needs_core)
    if found is None and not any(can_hold(w, function) for w in state.workers.values()):
        reason = NO_FIT
    return found, reason


def _make_room(state: State, full: list[Worker], function: Function, is_needed: bool) -> None:
    """Have idle containers of other functions leave the worker where the fewest have to. For a
    container that no input needs, only those that are not kept. Where that is enough nowhere, they
    leave all the same: while they are there, it looks as if somebody got on."""
    least: list[Container] | None = None
    others: list[Container] = []
    for worker in full:
        idle = [c for c in worker.idle.values() if c.function is not function]
        idle.sort(key=lambda c: (c.idle_since, c.number))
        is_enough, leaving = _who_leaves(worker, function, idle, is_needed)
        if is_enough and (least is None or len(leaving) < len(least)):
            least = leaving
        others += leaving[:1]
    for container in others if least is None else least:
        # Of each function no more than it can spare, also when it has some on several workers.
        if is_needed or is_spare(container.function):
            stop_container(state, container)


def _who_leaves(
    worker: Worker, function: Function, idle: list[Container], is_needed: bool
) -> tuple[bool, list[Container]]:
    """Whether there is room for another container of the function when these of the idle ones have
    left as well as those that are leaving now; and which ones."""
    gone = [c for c in worker.leaving.values() if c.is_killed or not c.leases]
    memory_mib = worker.memory_free_mib + sum(c.function.memory_mib for c in gone)
    count = len(worker.containers) - len(gone)
    spared: dict[int, int] = {}
    leaving = []
    for container in idle:
        if memory_mib >= function.memory_mib and count < CONTAINERS_MAX:
            break
        own = container.function
        spared[own.number] = spared.get(own.number, 0) + 1
        if is_needed or own.living_count - spared[own.number] >= wanted_count(own):
            leaving.append(container)
            memory_mib += own.memory_mib
            count -= 1
    return memory_mib >= function.memory_mib and count < CONTAINERS_MAX, leaving


def _final_reason(state: State, call: Call, reason: str) -> str:
    """What no worker can ever give is an error on the embedded default, where nobody will add one;
    on a cluster it is a wait with a name."""
    if reason == NO_FIT and all(worker.is_embedded for worker in state.workers.values()):
        function = call.function
        has = max(worker.cpu for worker in state.workers.values())
        memory = max(worker.memory_mib for worker in state.workers.values())
        text = (
            f"{function.definition.name} asks for cpu={function.cpu:g} and memory="
            f"{function.memory_mib} MiB; this machine gives {has:g} cores and {memory} MiB. "
            f"Ask for less, or connect to a scheduler with a larger worker (FANOUT_URL)"
        )
        fail_for(state, call, "unplaceable", text)
    return reason


def start_container(state: State, worker: Worker, function: Function) -> Container:
    # A worker that kept containers over a restart knows the function, and has dropped its blobs.
    for blob_id in function.definition.blobs:
        send_blob_once(state, worker, blob_id)
    if function.function_id not in worker.functions:
        worker.functions.add(function.function_id)
        state.send(worker.peer_id, function.definition)
    container = add_container(state, worker, function, state.next_id(), "starting")
    state.send(worker.peer_id, m.StartContainer(container.container_id, function.function_id))
    return container


def _lease(state: State, container: Container, call: Call) -> None:
    """Give the first ready call of a function its next lease."""
    function = call.function
    taken = heappop(function.ready)
    assert taken[3] is call
    call.is_ready = False
    reservation.was_served(state, function)
    state.service_clock_s = max(state.service_clock_s, taken[1])
    grant(state, container, call, _lease_size(call, container))
    update_window(state, call)
    wake_call(state, call)
    if not function.ready:
        state.ready_functions.pop(function.function_id, None)


def _lease_size(call: Call, container: Container) -> int:
    """As many inputs as take LEASE_S; one while nothing is known; never more than a fair part of
    the queue, so that a short queue is spread over all containers. Of a concurrent function as
    many as the container has room for, since all of them begin."""
    function, method = call.function, call.method
    if method.is_generator or function.is_single_use:
        return 1
    if function.is_concurrent:
        limit = function.target if container.open_count < function.target else function.slots
        part = -(-call.queued.count // max(1, len(function.containers)))
        room = limit - container.open_count
        return room if function.is_batched else max(1, min(room, part))
    if method.input_s is None:
        return 1
    count = int(LEASE_S / max(method.input_s, 1e-7))
    if method.output_bytes > 0:
        count = min(count, int(LEASE_BYTES_MAX / method.output_bytes))
    part = -(-call.queued.count // (2 * max(1, len(function.containers))))
    return max(1, min(count, part, LEASE_INPUTS_MAX))


def _prefetch(state: State, function: Function) -> None:
    """Second leases for containers whose inputs are quick, so that none waits for a round trip."""
    if function.is_concurrent or function.is_single_use:
        return
    for container in list(function.singles.values()):
        _drop_stale(state, function)
        if not function.ready or not _is_quick(function.ready[0][3]):
            return
        call = function.ready[0][3]
        if _can_prefetch(state, container) and not _is_reserved(
            state, container.worker, function, call
        ):
            _lease(state, container, call)


def _is_quick(call: Call) -> bool:
    method = call.method
    if method.input_s is None or method.input_s > QUICK_S or method.is_generator:
        return False
    return not call.suspects


def _can_prefetch(state: State, container: Container) -> bool:
    """Whether a second lease of one in `Function.singles` would not have to wait long."""
    lease = next(iter(container.leases.values()))
    return state.now - lease.heard_at < STUCK_S and not lease.is_cancelled


# --- containers that no input asks for -----------------------------------------------------------


def scale(state: State) -> None:
    """Start the containers that functions are to have in any case; see scaling.py."""
    for function in list(state.scaled.values()):
        while lacks_container(function):
            worker, _ = _choose_worker(state, function, None)
            if worker is None:
                break
            watch_idle(state, start_container(state, worker, function))


# --- deadlocks -----------------------------------------------------------------------------------


def _fail_if_deadlocked(state: State, call: Call, reason: str) -> None:
    """A nested call that can run only when somebody gives back a permit, a place or memory, while
    all who hold one wait, directly or not, for calls like it: it can never run. Say so, with the
    chain."""
    function = call.function
    # Nobody need wait for a spawned call: its caller ends and gives the permit back.
    if call.is_durable or not call.ancestors:
        return
    if reason == NO_PERMIT:
        holders = list(function.containers.values())
    else:
        holders = list(state.containers.values())
    if any(not container.is_waiting for container in holders):
        return
    moving = _moving_containers(state)
    if any(container.container_id in moving for container in holders):
        return
    names = [c.function.definition.name for c in reversed(call.ancestors)]
    chain = " -> ".join([*names, function.definition.name])
    hint = "Nest less deeply"
    if reason == NO_PERMIT:
        why = f"all {len(holders)} permits of {function.definition.name} (max_containers) are held"
        hint = "Raise max_containers"
    elif reason == NO_ROOM:
        why = f"all {len(holders)} containers that the workers can hold are taken"
    else:
        why = f"the memory that it needs is held in {len(holders)} containers"
    text = (
        f"{chain}: {why} by inputs that wait for calls like this one. {hint}, or call the function "
        f"with .local()"
    )
    fail_for(state, call, "deadlock", text)


def _moving_containers(state: State) -> set[int]:
    """The containers that will get on: those that do not wait, and those that wait for something
    which is going to happen. Found by adding, until nothing more can be added."""
    moving = {
        container.container_id
        for container in state.containers.values()
        if not container.is_waiting or container.container_id in state.resuming
    }
    waiting = [c for c in state.containers.values() if c.container_id not in moving]
    while True:
        found = [container for container in waiting if _gets_on(state, container, moving)]
        if not found:
            return moving
        moving.update(container.container_id for container in found)
        waiting = [c for c in waiting if c.container_id not in moving]


def _gets_on(state: State, container: Container, moving: set[int]) -> bool:
    """Whether a waiting container waits for something that can happen, given who gets on."""
    if any(objects.waits_of(state, peer.session_id) for peer in container.nested_peers.values()):
        # Anybody may put what it waits for into the queue.
        return True
    nested = [
        call
        for peer in container.nested_peers.values()
        if peer.session is not None
        for call in peer.session.calls.values()
        if not call.is_over
    ]
    # Without a nested call it waits for its consumer, or for the result of a spawned call.
    return not nested or any(_gets_further(state, call, moving) for call in nested)


def _gets_further(state: State, call: Call, moving: set[int]) -> bool:
    function = call.function
    if call.failure is not None or any(
        lease.container.container_id in moving for lease in call.leases.values()
    ):
        return True
    if not call.queued:
        # It waits for time, blobs, the store or its caller; or for leases that do not get on.
        return not call.leases
    limit = function.max_containers
    has_permit = limit is None or len(function.containers) < limit
    if has_permit and any(_gets_room(w, function, moving) for w in state.workers.values()):
        return True
    if function.rooms:
        return True
    return any(container_id in moving for container_id in function.containers)


def _gets_room(worker: Worker, function: Function, moving: set[int]) -> bool:
    """Whether a worker can have another container of a function, now or when one of those that it
    has, and that get on, makes room."""
    if not can_hold(worker, function):
        return False
    if worker.memory_free_mib >= function.memory_mib and len(worker.containers) < CONTAINERS_MAX:
        return True
    return not moving.isdisjoint(worker.containers)


# --- 3. tails ------------------------------------------------------------------------------------


def _reclaim_tails(state: State) -> None:
    """Where a function has idle capacity and nothing queued, halve its longest lease; take all of
    one that is stuck."""
    look_at = math.inf
    looked_count = 0
    for function in list(state.tailed.values()):
        if function.function_id in state.ready_functions or not _has_capacity(state, function):
            continue
        best: tuple[float, Lease] | None = None
        looked_count += len(function.tails)
        for lease in function.tails.values():
            if lease.is_reclaiming or lease.is_cancelled or lease.container.is_waiting:
                continue
            look_at = min(look_at, max(state.now + STUCK_S / 2, lease.reclaim_after))
            if state.now < lease.reclaim_after:
                continue
            is_first = next(iter(lease.container.leases)) == lease.lease_id
            score = _tail_seconds(state, lease, is_first)
            if score > TAIL_MIN_S and (best is None or score > best[0]):
                best = score, lease
        if best is not None:
            lease = best[1]
            reclaim(state, lease, 0 if _is_stuck(state, lease) else lease.open.count // 2)
    interval_s = max(RECLAIM_INTERVAL_S, looked_count * RECLAIM_INTERVAL_EACH_S)
    state.reclaim_after = state.now + interval_s
    if look_at < math.inf:
        state.look(look_at)


def _is_stuck(state: State, lease: Lease) -> bool:
    """Its container has reported nothing for a while: what it has not begun is better elsewhere."""
    head = next(iter(lease.container.leases.values()))
    return state.now - head.heard_at >= STUCK_S


def _tail_seconds(state: State, lease: Lease, is_first: bool) -> float:
    input_s = lease.call.method.input_s or 0.0
    if _is_stuck(state, lease):
        head = next(iter(lease.container.leases.values()))
        return max(state.now - head.heard_at, lease.open.count * input_s)
    return (lease.open.count - is_first) * input_s


def _has_capacity(state: State, function: Function) -> bool:
    """Whether an idle or a new container could take more inputs of the function right now."""
    if not state.free_cores.has(function.cpu):
        return False
    idle = function.rooms.get(0, {})
    if any(_has_core(container.worker, function) for container in reversed(idle.values())):
        return True
    limit = function.max_containers
    if limit is not None and len(function.containers) >= limit:
        return False
    has_memory = state.free_cores.find(
        function.cpu,
        lambda worker: (
            worker.memory_free_mib >= function.memory_mib
            and not reservation.is_for_another(state, worker, function, None)
        ),
    )
    return has_memory is not None
