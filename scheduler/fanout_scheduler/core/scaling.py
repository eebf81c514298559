"""How many containers a function has when no input asks for one: its own settings.

`min_containers` live while the app runs, idle or not. `buffer_containers` are kept ready beside
those that work, while some do. `scaledown_window` and `max_containers` are looked at where
containers end and begin; all four can be changed while the app runs (`AskFunction`).
"""

from __future__ import annotations

from typing import Any

from fanout.protocol import messages as m
from fanout_scheduler.core.leasing import stop_container, watch_idle
from fanout_scheduler.core.state import Container, Function, Peer, State

SETTINGS = ("min_containers", "max_containers", "buffer_containers", "scaledown_window")


def wanted_count(function: Function) -> int:
    """How many containers the settings ask for; where they begin, `max_containers` is minded."""
    if not function.app.openers:
        return 0
    busy = function.busy_count
    buffer = function.buffer_containers if busy or function.ready else 0
    return max(function.min_containers, busy + buffer)


def living(function: Function) -> list[Container]:
    """Its containers, but those that are leaving."""
    return [c for c in function.containers.values() if c.state != "stopping"]


def is_spare(function: Function) -> bool:
    """Whether an idle container of it may leave."""
    return function.living_count > wanted_count(function)


def lacks_container(function: Function) -> bool:
    """Whether one should be started although no input needs it. Where the last one could not
    start, only an input makes another attempt worth it."""
    if function.is_broken or function.lacks_blobs:
        return False
    return function.living_count < wanted_count(function)


def on_ask_function(state: State, peer: Peer, message: m.AskFunction) -> None:
    function = state.functions.get(message.function_id)
    container = peer.session.container if peer.session is not None else None
    if function is None or (container is not None and container.function.app is not function.app):
        info: dict[str, Any] = {"error": "its function is not defined"}
    else:
        fault = _fault_of(function, message.changes)
        if fault:
            info = {"error": fault}
        else:
            _change(state, function, message.changes)
            info = _info(function)
    state.send(peer.peer_id, m.FunctionInfo(message.request_id, info))


def _fault_of(function: Function, changes: dict[str, Any]) -> str:
    """Why changes cannot be made; "" if they can. Clients check types and ranges for their users;
    what gets here otherwise is nonsense."""
    for name, value in changes.items():
        kinds = (int, float) if name == "scaledown_window" else (int,)
        if name not in SETTINGS or type(value) not in kinds or value < (name == "max_containers"):
            return f"{name}={value!r} is not valid"
    limit = changes.get("max_containers", function.max_containers)
    least = changes.get("min_containers", function.min_containers)
    if limit is not None and least > limit:
        return f"min_containers={least} would be above max_containers={limit}"
    return ""


def _change(state: State, function: Function, changes: dict[str, Any]) -> None:
    function.min_containers = changes.get("min_containers", function.min_containers)
    function.max_containers = changes.get("max_containers", function.max_containers)
    function.buffer_containers = changes.get("buffer_containers", function.buffer_containers)
    window_s = changes.get("scaledown_window", function.scaledown_window_s)
    function.scaledown_window_s = float(window_s)
    if function.min_containers or function.buffer_containers:
        state.scaled[function.function_id] = function
    else:
        state.scaled.pop(function.function_id, None)
    if not changes:
        return
    for container in living(function):
        if container.is_idle:
            watch_idle(state, container, state.now)
    limit = function.max_containers
    if limit is not None:
        # Those that are idle go first; the others end what they have.
        surplus = sorted(living(function), key=lambda c: (not c.is_idle, -c.number))
        for container in surplus[: len(surplus) - limit if len(surplus) > limit else 0]:
            stop_container(state, container, is_patient=True)


def _info(function: Function) -> dict[str, Any]:
    containers = living(function)
    running = sum(c.open_count for c in containers)
    return {
        "min_containers": function.min_containers,
        "max_containers": function.max_containers,
        "buffer_containers": function.buffer_containers,
        "scaledown_window": function.scaledown_window_s,
        "backlog": sum(
            call.queued.count + call.parked.count
            for call in function.app.calls.values()
            if call.function is function and not call.is_over
        ),
        "containers": len(containers),
        "running": running,
        "headroom": max(0, function.slots * len(containers) - running),
    }
