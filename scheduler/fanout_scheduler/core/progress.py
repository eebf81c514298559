"""How calls get on, for clients that show it to a person.

Nothing is counted for this. While a client watches and has an open call, its calls are looked at a
few times a second, and what differs from what it was told last is sent. So a call that nobody looks
at costs nothing, and one that is over before the first look costs one deadline.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from fanout.protocol import messages as m
from fanout_scheduler.core.state import App, Call, Function, Peer, State, Watch
from fanout_scheduler.core.waiting import reason_of

#: Between two looks: a person sees no more than about five numbers a second.
INTERVAL_S = 0.2
#: What a look goes through at most, the newest first; a person reads a few lines.
CALLS_MAX = 64
FUNCTIONS_MAX = 64
WAITS_FOR_MAX = 200


def on_watch(state: State, peer: Peer, message: m.WatchProgress) -> None:
    """A client begins to watch, or has seen enough."""
    if not message.is_on:
        peer.watch = None
    elif peer.watch is None:
        peer.watch = Watch(peer)
        wake(state, peer.watch)


def wake(state: State, watch: Watch) -> None:
    """There may be something to see: look before long."""
    if not watch.is_armed:
        watch.is_armed = True
        state.at(state.now + INTERVAL_S, "progress", watch)


def on_due(state: State, watch: Watch) -> None:
    """Send what has changed; look again while a call is open."""
    watch.is_armed = False
    peer = watch.peer
    if peer.watch is not watch or state.peers.get(peer.peer_id) is not peer:
        return
    apps = _apps_of(peer)
    if peer.is_writable:
        for app in apps:
            _send_functions(state, watch, app)
            _send_calls(state, watch, app)
        _send_changes(state, watch)
    if watch.calls or watch.functions or any(app.open_count for app in apps):
        wake(state, watch)


def name_call(state: State, watch: Watch, call: Call) -> None:
    """Text of a nested call is about to be sent to a client that has never heard of the call."""
    if call.parent is not None and call.call_id not in watch.calls:
        _tell_call(state, watch, call)
        wake(state, watch)


def _apps_of(peer: Peer) -> list[App]:
    """The apps whose runs are this client's; another of its loops may have opened them."""
    session = peer.session
    assert session is not None
    apps = dict(session.apps)
    for call in islice(session.calls.values(), CALLS_MAX):
        apps[call.function.app.app_id] = call.function.app
    return list(apps.values())


def _send_functions(state: State, watch: Watch, app: App) -> None:
    for function in islice(reversed(app.functions.values()), FUNCTIONS_MAX):
        if function.containers and function.function_id not in watch.functions:
            seen = _function_seen(function)
            if seen.running or seen.starting:
                watch.functions[function.function_id] = seen
                state.send(watch.peer.peer_id, seen)


def _function_seen(function: Function) -> m.FunctionProgress:
    running = starting = 0
    for container in function.containers.values():
        if container.state == "starting":
            starting += 1
        elif container.leases and not container.is_waiting:
            running += container.open_count if function.is_concurrent else 1
    return m.FunctionProgress(function.function_id, function.definition.name, running, starting)


def _send_calls(state: State, watch: Watch, app: App) -> None:
    for call in islice(reversed(app.calls.values()), CALLS_MAX):
        if not call.is_over:
            _tell_call(state, watch, call)


def _tell_call(state: State, watch: Watch, call: Call) -> None:
    seen = _call_seen(call)
    if watch.calls.get(call.call_id) != seen:
        watch.calls[call.call_id] = seen
        state.send(watch.peer.peer_id, seen)


def _call_seen(call: Call) -> m.CallProgress:
    running = 0
    starting: set[int] = set()
    for lease in call.leases.values():
        container = lease.container
        if container.state == "starting":
            starting.add(container.container_id)
        elif container.is_waiting:
            continue
        elif call.function.is_concurrent:
            running += lease.open.count
        else:
            running += next(iter(container.leases)) == lease.lease_id
    return m.CallProgress(
        call_id=call.call_id,
        name=call.function.definition.name,
        is_durable=call.is_durable,
        is_nested=call.parent is not None,
        is_sealed=call.sealed_count is not None,
        is_over=False,
        input_count=call.received.count if call.sealed_count is None else call.sealed_count,
        finished_count=call.finished.count,
        running=running,
        starting=len(starting),
        waits_for=reason_of(call)[:WAITS_FOR_MAX],
    )


def _send_changes(state: State, watch: Watch) -> None:
    """What has become of what was told, whether or not its app still runs."""
    for function_id, told in list(watch.functions.items()):
        function = state.functions.get(function_id)
        seen = replace(told, running=0, starting=0)
        if function is not None:
            seen = _function_seen(function)
        if seen != told:
            watch.functions[function_id] = seen
            state.send(watch.peer.peer_id, seen)
        if not seen.running and not seen.starting:
            del watch.functions[function_id]
    for call_id, last in list(watch.calls.items()):
        call = state.calls.get(call_id)
        if call is not None and not call.is_over:
            continue
        del watch.calls[call_id]
        finished = last.finished_count if call is None else call.finished.count
        end = replace(
            last, is_over=True, finished_count=finished, running=0, starting=0, waits_for=""
        )
        state.send(watch.peer.peer_id, end)
