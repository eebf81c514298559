"""What would be faster, told once to those who wait for it.

A container has a core of its own while it runs an input, whether it computes or waits for an
answer. A function that calls a service holds cores that it does not use, and all its other inputs
wait for them: the person who wrote it can say so, and nobody else. Workers report the processor
time of their containers, leases how long their inputs ran; where the two are far apart and inputs
wait for a core, their clients are told what to write.
"""

from __future__ import annotations

from math import ceil

from fanout.protocol import messages as m
from fanout_scheduler.core.placement import NO_CORE
from fanout_scheduler.core.state import Call, Function, Peer, State

#: Less than this says nothing about a function.
BUSY_MIN_S = 20.0
#: What may be advised as `cpu=`; more would gain too little.
CPU_CHOICES = (0.05, 0.1, 0.25)
#: A function is looked at so often at most: looking takes time for each of its containers, and
#: each of its workers reports.
INTERVAL_S = 3.0
#: How much of its `cpu=` a function may need by what was measured, so that there is some reserve.
LOAD_MAX = 0.8


def on_cpu_times(state: State, peer: Peer, message: m.CpuTimes) -> None:
    """A worker says how much its containers have computed so far."""
    if peer.worker is None:
        return
    functions: dict[bytes, Function] = {}
    for container_id, cpu_ms in message.times:
        container = peer.worker.containers.get(container_id)
        if container is not None:
            container.cpu_s = cpu_ms / 1000
            functions[container.function.function_id] = container.function
    for function in functions.values():
        if not function.is_advised and state.now >= function.advise_at:
            function.advise_at = state.now + INTERVAL_S
            if _is_one_at_a_time(function):
                _advise(state, function)


def _is_one_at_a_time(function: Function) -> bool:
    """Whether a core is all that an input of it may wait for: not for items that somebody has to
    take, nor for calls of its own, during which its core is somebody else's anyway."""
    return not (
        function.is_concurrent
        or any(method.is_generator for method in function.methods.values())
        or any(container.nested_peers for container in function.containers.values())
    )


def _advise(state: State, function: Function) -> None:
    measured = [
        (container.cpu_s, container.busy_s)
        for container in function.containers.values()
        if container.cpu_s is not None
    ]
    busy_s = sum(busy for _, busy in measured)
    if busy_s < BUSY_MIN_S:
        return
    share = sum(cpu for cpu, _ in measured) / busy_s
    cpu = next((choice for choice in CPU_CHOICES if share <= choice * LOAD_MAX), None)
    if cpu is None or cpu > function.cpu / 2:
        return
    for *_, call in function.ready:
        if _waits_for_core(call):
            assert call.session is not None
            assert call.session.peer_id is not None
            function.is_advised = True
            text = _sentence(function, call, share, cpu)
            state.send(call.session.peer_id, m.Notice("mostly_waits", text))


def _waits_for_core(call: Call) -> bool:
    """Inputs of it wait for a core, and somebody is there to be told."""
    session = call.session
    return (
        bool(call.queued)
        and call.waits_for == NO_CORE
        and session is not None
        and session.peer_id is not None
        and session.container is None
    )


def _sentence(function: Function, call: Call, share: float, cpu: float) -> str:
    name = function.definition.name
    at_a_time = int(function.cpu / cpu)
    return (
        f"{name} computes for at most {ceil(share * 100)} % of the time that it runs and waits for "
        f"the rest, while {call.queued.count:,} inputs wait for a core: with cpu={cpu:g} "
        f"{at_a_time} of them run where one does now, and with "
        f"@fanout.concurrent(max_inputs=...) many in one container"
    )
