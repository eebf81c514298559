"""Workers and their containers come, report and go."""

from __future__ import annotations

from typing import Any

from fanout.config import CLIENT_GRACE_S, WORKER_DEADLINE_S
from fanout.protocol import messages as m
from fanout_scheduler.core import blobs, calls, durable, objects, outputs, reservation, scaling
from fanout_scheduler.core.capacity import file_container
from fanout_scheduler.core.definitions import CORES_MAX
from fanout_scheduler.core.events import Disconnect, PeerId
from fanout_scheduler.core.leasing import (
    give_back_lease,
    release_core,
    stop_container,
    watch_idle,
)
from fanout_scheduler.core.state import Container, Function, Peer, State, Worker

#: Containers of a function that die in a row before they are ready, without an exception of the
#: user's to show for it; then the function's calls fail.
START_FAILURES_MAX = 3
#: Lost workers whose containers are remembered, at most: a few kilobytes each. One that is not
#: comes back without them.
LOST_WORKERS_MAX = 1000


def on_worker_ready(state: State, peer: Peer, message: m.WorkerReady) -> None:
    """A worker offers its resources; one that was here before replaces its former self."""
    if peer.worker is not None:
        text = "a connection is for one worker, and this one was ready before"
        state.commands.append(Disconnect(peer.peer_id, "protocol", text))
        return
    if not 0 <= message.cpu <= CORES_MAX:
        text = f"a worker cannot have {message.cpu:g} cores"
        state.commands.append(Disconnect(peer.peer_id, "protocol", text))
        return
    old = state.workers.get(message.worker_id)
    if old is not None:
        lose_worker(state, old)
        state.commands.append(Disconnect(old.peer_id, "replaced", "the worker is here anew"))
        state.peers.pop(old.peer_id, None)
    worker = Worker(
        worker_id=message.worker_id,
        peer_id=peer.peer_id,
        number=state.next_number(),
        name=message.name,
        cpu=float(message.cpu),
        cpu_free=float(message.cpu),
        memory_mib=message.memory,
        memory_free_mib=message.memory,
        is_embedded=message.is_embedded,
        heard_at=state.now,
    )
    state.workers[worker.worker_id] = worker
    state.free_cores.grew(worker)
    peer.worker = worker
    had = state.lost_containers.pop(worker.worker_id, frozenset())
    known = [c for c in message.containers if _is_container(state, c, had)]
    keep = [c for c in known if _adopt(state, worker, *c) or _hold(state, worker, *c)]
    state.send(peer.peer_id, m.WorkerAccepted([c[0] for c in keep]))
    if worker.unclaimed:
        state.at(state.now + CLIENT_GRACE_S, "unclaimed", worker)
    for lease_id in message.leases:
        if type(lease_id) is int and lease_id not in state.leases:
            state.send(peer.peer_id, m.CancelLease(lease_id))
    state.at(state.now + WORKER_DEADLINE_S, "worker", worker)


def _is_container(state: State, record: list[Any], had: frozenset[int]) -> bool:
    """Whether a worker may have such a container: one that it had when it was lost, or one from an
    earlier life of the scheduler, of which all that is known is that their ids were lower."""
    if len(record) != 2 or type(record[0]) is not int or type(record[1]) is not bytes:
        return False
    return record[0] in had or 0 <= record[0] < state.epoch << m.EPOCH_SHIFT


def _adopt(state: State, worker: Worker, container_id: int, function_id: bytes) -> bool:
    """Keep a warm container of a function that is known here, also after a restart, if there is
    room for it: others may have taken that meanwhile."""
    from fanout_scheduler.core.placement import CONTAINERS_MAX

    function = state.functions.get(function_id)
    if function is None or container_id in state.containers:
        return False
    if function.app.is_closing and not function.app.open_count:
        return False
    if worker.memory_free_mib < function.memory_mib or len(worker.containers) >= CONTAINERS_MAX:
        return False
    limit = function.max_containers
    if limit is not None and len(function.containers) >= limit:
        return False
    if function.is_single_use:
        return False
    worker.functions.add(function.function_id)
    watch_idle(state, add_container(state, worker, function, container_id, "ready"))
    return True


def _hold(state: State, worker: Worker, container_id: int, function_id: bytes) -> bool:
    """Keep a container from before a restart for a while: its client, which will define its
    function again, may just be later than its worker."""
    if function_id in state.functions or container_id >> m.EPOCH_SHIFT >= state.epoch:
        return False
    worker.unclaimed[container_id] = function_id
    return True


def on_define_function(state: State, peer: Peer, message: m.DefineFunction) -> None:
    """A function becomes known, and the containers that were held for it are its own again."""
    calls.on_define_function(state, peer, message)
    function_id = message.function_id
    if function_id not in state.functions:
        return
    for worker in state.workers.values():
        held = [c for c, wanted in worker.unclaimed.items() if wanted == function_id]
        for container_id in held:
            del worker.unclaimed[container_id]
            if not _adopt(state, worker, container_id, function_id):
                state.send(worker.peer_id, m.StopContainer(container_id, True))


def on_unclaimed_deadline(state: State, worker: Worker) -> None:
    """Whoever has not come back by now lost its calls too."""
    if state.workers.get(worker.worker_id) is worker:
        for container_id in worker.unclaimed:
            state.send(worker.peer_id, m.StopContainer(container_id, True))
        worker.unclaimed.clear()


def add_container(
    state: State, worker: Worker, function: Function, container_id: int, status: str
) -> Container:
    container = Container(
        container_id=container_id,
        function=function,
        worker=worker,
        number=state.next_number(),
        state=status,
        idle_since=state.now,
    )
    state.containers[container_id] = container
    worker.containers[container_id] = function.containers[container_id] = container
    worker.memory_free_mib -= function.memory_mib
    file_container(container)
    return container


def on_worker_deadline(state: State, worker: Worker) -> None:
    """Nothing was heard of a worker for too long: it is lost, whatever its socket says."""
    if state.workers.get(worker.worker_id) is not worker:
        return
    if worker.heard_at + WORKER_DEADLINE_S > state.now:
        state.at(worker.heard_at + WORKER_DEADLINE_S, "worker", worker)
        return
    state.note("silent worker")
    state.peers.pop(worker.peer_id, None)
    # Sessions that came through it end first: what is said to them goes through its connection.
    lose_worker(state, worker)
    text = f"nothing was heard of worker {worker.name} for {WORKER_DEADLINE_S:g} s"
    state.commands.append(Disconnect(worker.peer_id, "silent", text))


def lose_worker(state: State, worker: Worker) -> None:
    """All that it held runs elsewhere."""
    if state.workers.get(worker.worker_id) is not worker:
        return
    del state.workers[worker.worker_id]
    state.free_cores.lost(worker)
    _forget_reports(state, worker)
    blobs.end_claims(state, worker, worker.claims)
    reservation.worker_lost(state, worker)
    _remember_containers(state, worker)
    for container in list(worker.containers.values()):
        _lose_container(state, container)


def _remember_containers(state: State, worker: Worker) -> None:
    """When it is back it may keep them."""
    if worker.containers:
        state.lost_containers[worker.worker_id] = frozenset(worker.containers)
        if len(state.lost_containers) > LOST_WORKERS_MAX:
            del state.lost_containers[next(iter(state.lost_containers))]


def _lose_container(state: State, container: Container) -> None:
    for lease in list(container.leases.values()):
        give_back_lease(state, lease)
    remove_container(state, container)


def remove_container(state: State, container: Container) -> None:
    release_core(state, container)
    file_container(container, is_gone=True)
    state.containers.pop(container.container_id, None)
    state.stop_resuming(container)
    container.worker.containers.pop(container.container_id, None)
    container.function.containers.pop(container.container_id, None)
    container.worker.memory_free_mib += container.function.memory_mib
    for peer in list(container.nested_peers.values()):
        # What is still said in its name would hang on a session that nothing ends any more.
        calls.on_client_lost(state, peer)
        state.peers.pop(peer.peer_id, None)
        text = "the container of this session is gone"
        state.commands.append(Disconnect(peer.peer_id, "refused", text))
    objects.on_container_gone(state, container)


def container_of_nested(state: State, peer: Peer) -> Container | None:
    """The container that a nested client is in; None unless it is one of the worker's through
    which the client came."""
    container = state.containers.get(peer.info.get("container_id", -1))
    if container is None or container.worker.peer_id != peer.info.get("worker"):
        return None
    return container


def on_container_started(state: State, peer: Peer, message: m.ContainerStarted) -> None:
    container = state.containers.get(message.container_id)
    if container is None or container.worker is not peer.worker:
        state.note("start of an unknown container")
        return
    if container.state == "starting":
        container.state = "ready"
        file_container(container)
    container.function.start_failures = 0
    container.function.is_broken = False
    for lease in container.leases.values():
        lease.heard_at = state.now


def on_container_exited(state: State, peer: Peer, message: m.ContainerExited) -> None:
    container = state.containers.get(message.container_id)
    if peer.worker is not None:
        peer.worker.unclaimed.pop(message.container_id, None)
    if container is None or container.worker is not peer.worker:
        state.note("exit of an unknown container")
        return
    if message.reason == "crash":
        _blame(state, container, message)
    function = container.function
    was_starting = container.state == "starting"
    _lose_container(state, container)
    if message.reason == "start" and was_starting:
        _on_start_failure(state, function, message)


def _blame(state: State, container: Container, message: m.ContainerExited) -> None:
    """Charge the input that ran when a container died; of several, none yet."""
    ran = [
        (lease, index)
        for lease_id, index in message.running
        if (lease := container.leases.get(lease_id)) is not None and index in lease.open
    ]
    for lease, index in ran:
        if len(ran) == 1:
            outputs.charge_crash(state, lease, index, message)
        else:
            outputs.suspect(lease, index)


def _on_start_failure(state: State, function: Function, message: m.ContainerExited) -> None:
    """An exception while the user's code was loaded is final; it is told once, for every input.
    A container that just died gets two more chances."""
    function.is_broken = True
    if message.payload:
        calls.fail_function(state, function, m.Status.ERROR, bytes(message.payload))
        return
    function.start_failures += 1
    if function.start_failures >= START_FAILURES_MAX:
        function.start_failures = 0
        text = (
            f"{START_FAILURES_MAX} containers of {function.definition.name} in a row died before "
            f"they were ready: {message.details.get('text', message.details)}"
        )
        payload = m.failure_payload("start", text, message.details)
        calls.fail_function(state, function, m.Status.FAILURE, payload)


def on_idle_deadline(state: State, container: Container) -> None:
    """A container that has been idle for its scaledown window leaves, unless it is one of those
    that are kept in any case. One deadline counts at a time; others were moved since."""
    if container.idle_due_at is None or state.now < container.idle_due_at:
        return
    container.idle_due_at = None
    if state.containers.get(container.container_id) is not container or not container.is_idle:
        return
    function = container.function
    if container.idle_since + function.scaledown_window_s > state.now:
        watch_idle(state, container)
    elif scaling.is_spare(function):
        stop_container(state, container)
    else:
        watch_idle(state, container, state.now + max(1.0, function.scaledown_window_s))


def acknowledge(state: State) -> None:
    """Tell workers which reports are safe: when there are many, or after a moment. After each
    report it would cost a worker as much as the report did."""
    for worker in list(state.acknowledging_now.values()):
        _acknowledge(state, worker)
    due = []
    for worker in state.acknowledging.values():
        if worker.acknowledge_at > state.now:
            state.look(worker.acknowledge_at)
            break
        due.append(worker)
    for worker in due:
        _acknowledge(state, worker)


def _acknowledge(state: State, worker: Worker) -> None:
    unsafe = worker.unsafe
    sequence = worker.acknowledged
    while unsafe and durable.is_safe(state, unsafe[0][1]):
        sequence = unsafe.popleft()[0]
    _forget_reports(state, worker)
    if unsafe:
        state.storing_workers[worker.worker_id] = worker
    if sequence > worker.acknowledged:
        worker.acknowledged = sequence
        state.send(worker.peer_id, m.OutputsAck(sequence))


def _forget_reports(state: State, worker: Worker) -> None:
    state.acknowledging.pop(worker.worker_id, None)
    state.acknowledging_now.pop(worker.worker_id, None)
    state.storing_workers.pop(worker.worker_id, None)


def acknowledge_stored(state: State) -> None:
    """Something is on disk: reports that waited for it are acknowledged like new ones."""
    storing, state.storing_workers = state.storing_workers, {}
    for worker in storing.values():
        if durable.is_safe(state, worker.unsafe[0][1]):
            worker.acknowledge_at = state.now + outputs.ACKNOWLEDGE_DELAY_S
            state.acknowledging[worker.worker_id] = worker
            if len(worker.unsafe) >= outputs.ACKNOWLEDGE_COUNT:
                state.acknowledging_now[worker.worker_id] = worker
        else:
            state.storing_workers[worker.worker_id] = worker


def on_worker_lost(state: State, peer_id: PeerId, peer: Peer) -> None:
    if peer.worker is not None and peer.worker.peer_id == peer_id:
        lose_worker(state, peer.worker)
