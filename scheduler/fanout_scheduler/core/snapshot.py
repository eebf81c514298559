"""The scheduler's state as plain data, for `fanout status` and crash reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fanout.protocol import messages as m
from fanout_scheduler.core import objects
from fanout_scheduler.core.state import Call, Container, State, Worker
from fanout_scheduler.core.waiting import reason_of

#: A person reads this; sums stand for the rest.
ROWS_MAX = 200


def snapshot(state: State) -> dict[str, Any]:
    """Plain msgpack-able data: what `fanout status` shows, and `--json` prints as it is."""
    return {
        "epoch": state.epoch,
        "uptime_s": state.now - state.started_at,
        "sessions": len(state.sessions),
        # Ids of tokens are public; how many connections each has.
        "tokens": dict(Counter(_token_ids(state))),
        "workers": [
            {
                "name": worker.name,
                "cpu": worker.cpu,
                "cpu_free": round(worker.cpu_free, 3),
                "memory": worker.memory_mib,
                "containers": len(worker.containers),
                "is_connected": True,
                "reserved_for": _reserved_for(state, worker),
            }
            for worker in list(state.workers.values())[:ROWS_MAX]
        ],
        "containers": [_container(state, c) for c in list(state.containers.values())[:ROWS_MAX]],
        "functions": [
            {
                "name": function.definition.name,
                "app": function.app.name,
                "containers": len(function.containers),
                "max_containers": function.max_containers,
            }
            for function in [f for f in state.functions.values() if not f.app.is_closing][:ROWS_MAX]
        ],
        "objects": [
            {
                "name": of.name,
                "type": m.ObjectType(of.object_type).name.lower(),
                "values": len(of.entries) + sum(len(p.items) for p in of.partitions.values()),
            }
            for of in list(state.objects.by_id.values())[:ROWS_MAX]
        ],
        "object_bytes": state.objects.size_bytes,
        "calls": [_call(call) for call in list(state.calls.values())[:ROWS_MAX]],
        "worker_count": len(state.workers),
        "container_count": len(state.containers),
        "call_count": len(state.calls),
        "open_call_count": sum(not call.is_over for call in state.calls.values()),
        "counts": dict(state.counts),
    }


def _reserved_for(state: State, worker: Worker) -> str:
    """The function that what becomes free there is kept for, if any; see reservation.py."""
    reservation = state.reservation
    if reservation is None or reservation.worker is not worker:
        return ""
    return reservation.function.definition.name


def _token_ids(state: State) -> Iterator[str]:
    for peer in state.peers.values():
        token_id = peer.info.get("token_id")
        if token_id is not None and peer.role != "nested":
            yield token_id


def _container(state: State, container: Container) -> dict[str, Any]:
    shown = container.state
    if shown == "ready":
        shown = "waiting" if container.is_waiting else "running" if container.leases else "idle"
    return {
        "id": f"ct-{container.container_id:x}",
        "function": container.function.definition.name,
        "worker": container.worker.name,
        "state": shown,
        "leases": len(container.leases),
        "waits": _wait_of(state, container),
    }


def _wait_of(state: State, container: Container) -> str:
    """What a container without a core waits for, by name."""
    if not container.is_waiting:
        return ""
    if container.deferred:
        return "its core"
    for peer in container.nested_peers.values():
        if waits := objects.waits_of(state, peer.session_id):
            return repr(waits[0].of)
    return "its consumer" if container.waiting_peer is None else "its own calls"


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": f"fc-{call.call_id.hex()}",
        "function": call.function.definition.name,
        "state": "over" if call.is_over else "open" if call.sealed_count is None else "sealed",
        "inputs": call.received.count,
        "queued": call.queued.count + call.parked.count + call.backing_off.count,
        "running": call.leased_count,
        "done": call.finished.count,
        "durable": call.is_durable,
        "waiting_for": reason_of(call),
    }


def describe_busy(state: State) -> str:
    """What is running or queued, as half a sentence; "" when nothing is."""
    open_calls = [call for call in state.calls.values() if not call.is_over]
    if not open_calls:
        return ""
    names = sorted({call.function.definition.name for call in open_calls})[:5]
    inputs = sum(c.received.count - c.finished.count for c in open_calls)
    return f"{len(open_calls)} calls of {', '.join(names)} with {inputs} unfinished inputs"
