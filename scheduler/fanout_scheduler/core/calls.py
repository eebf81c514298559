"""What clients ask for: apps, functions, calls; and what becomes of them when a client is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fanout.config import CLIENT_GRACE_S, WINDOW_BYTES, WINDOW_COUNT_MAX, WINDOW_COUNT_MIN
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core import (
    blobs,
    durable,
    graph,
    objects,
    outputs,
    progress,
    reservation,
    spawned,
)
from fanout_scheduler.core.definitions import fault_of
from fanout_scheduler.core.events import Disconnect, Exit, PeerId
from fanout_scheduler.core.leasing import cancel_lease, run_again, stop_container
from fanout_scheduler.core.snapshot import describe_busy, snapshot
from fanout_scheduler.core.state import (
    App,
    Call,
    Container,
    Function,
    Peer,
    Session,
    State,
    make_function,
)

#: Inputs in flight for each one that containers hold, so that quick functions never run dry.
WINDOW_PER_LEASED = 8
REFUSED = "the scheduler did not take the call: "


# --- sessions -------------------------------------------------------------------------------------


def on_client_connected(state: State, peer: Peer, container: Container | None) -> None:
    """A client is here, or is here again: its calls go on."""
    session = state.sessions.get(peer.session_id)
    if session is None:
        session = Session(peer.session_id, peer.peer_id, container=container)
        state.sessions[peer.session_id] = session
    elif session.peer_id is not None:
        old = session.peer_id
        state.commands.append(Disconnect(old, "replaced", "the session has a newer connection"))
        state.peers.pop(old, None)
        _detach(state, session, old)
    session.peer_id = peer.peer_id
    peer.session = session
    tell_lost_text(state, session)
    if container is not None:
        container.nested_peers[peer.peer_id] = peer


def on_client_lost(state: State, peer: Peer, is_final: bool = False) -> None:
    """A client is gone: its session may come back for a while, unless that `is_final`."""
    session = peer.session
    if session is None or session.peer_id != peer.peer_id:
        return
    session.lost_at = state.now
    _detach(state, session, peer.peer_id)
    if session.container is not None:
        run_again(state, session.container, peer.peer_id)
        end_session(state, session)
    elif is_final:
        end_session(state, session)
    elif session.calls or session.apps or session.session_id in state.objects.ephemeral:
        state.at(state.now + CLIENT_GRACE_S, "session", session)
    else:
        end_session(state, session)


def _detach(state: State, session: Session, peer_id: PeerId) -> None:
    """Nothing is owed to a connection that is gone."""
    session.peer_id = None
    objects.on_detached(state, session)
    for fetch in list(session.fetches.values()):
        durable.end_fetch(fetch)
    if session.container is not None:
        session.container.nested_peers.pop(peer_id, None)


def on_session_deadline(state: State, session: Session) -> None:
    """The grace of a lost client is over, unless it came back meanwhile."""
    if session.peer_id is None and session.lost_at + CLIENT_GRACE_S <= state.now:
        end_session(state, session)


def end_session(state: State, session: Session) -> None:
    state.sessions.pop(session.session_id, None)
    for call in list(session.calls.values()):
        if not (call.is_durable and call.has_all_inputs):
            cancel_call(state, call)
            blobs.on_call_left(state, call)
    for app in list(session.apps.values()):
        _leave_app(state, app, session)
    objects.on_session_ended(state, session.session_id)


# --- apps and functions ---------------------------------------------------------------------------


def on_open_app(state: State, peer: Peer, message: m.OpenApp) -> None:
    assert peer.session is not None
    app = state.apps.get(message.app_id)
    if app is None:
        app = state.apps[message.app_id] = App(message.app_id, message.name)
    app.is_closing = False
    app.openers[peer.session.session_id] = peer.session
    peer.session.apps[app.app_id] = app


def on_close_app(state: State, peer: Peer, message: m.CloseApp) -> None:
    app = state.apps.get(message.app_id)
    if app is not None and peer.session is not None:
        _leave_app(state, app, peer.session)


def _leave_app(state: State, app: App, session: Session) -> None:
    """One who opened the app has closed it, or is gone. With the last one the run is over:
    attached calls end, spawned calls go on, then the app goes."""
    session.apps.pop(app.app_id, None)
    if app.openers.pop(session.session_id, None) is None or app.openers:
        return
    app.is_closing = True
    for call in list(app.calls.values()):
        if not call.is_durable:
            cancel_call(state, call)
    close_app_if_done(state, app)


def close_app_if_done(state: State, app: App) -> None:
    """Once nothing of a closed app runs, its containers and functions go. The results of its
    spawned calls are kept, and the functions that those name."""
    if not app.is_closing or app.open_count:
        return
    for function in list(app.functions.values()):
        for container in list(function.containers.values()):
            stop_container(state, container)
        if not function.call_count:
            _drop_function(state, function)
    if not app.calls:
        durable.forget_app(state, app)
        state.apps.pop(app.app_id, None)


def _drop_function(state: State, function: Function) -> None:
    function_id = function.function_id
    function.app.functions.pop(function_id, None)
    state.functions.pop(function_id, None)
    state.ready_functions.pop(function_id, None)
    reservation.was_served(state, function)
    state.scaled.pop(function_id, None)
    if not function.is_stored:
        blobs.release(state, function.definition.blobs)
    for worker in state.workers.values():
        if function_id in worker.functions:
            worker.functions.discard(function_id)
            state.send(worker.peer_id, m.DropFunction(function_id))


def on_define_function(state: State, peer: Peer, message: m.DefineFunction) -> None:
    if message.function_id in state.functions:
        return
    app = state.apps.get(message.app_id)
    if app is None or not may_use(peer, app):
        state.note("definition for an unknown app")
        return
    if fault := fault_of(message.options):
        state.commands.append(Disconnect(peer.peer_id, "protocol", fault))
        return
    function = make_function(message, app, state.next_number())
    state.functions[message.function_id] = app.functions[message.function_id] = function
    blobs.keep(state, message.blobs)
    blobs.await_definition(state, function)
    if function.min_containers or function.buffer_containers:
        state.scaled[function.function_id] = function


def may_use(peer: Peer, app: App) -> bool:
    """A nested client acts only for the app of its container."""
    container = peer.session.container if peer.session is not None else None
    return container is None or container.function.app is app


# --- calls ----------------------------------------------------------------------------------------


def on_open_call(state: State, peer: Peer, message: m.OpenCall) -> None:
    session = peer.session
    assert session is not None
    known = state.calls.get(message.call_id)
    if known is not None:
        if _may_resume(session, known):
            _resume_call(state, session, known)
        else:
            _refuse_call(state, peer, message, "internal", "it is the call of another session")
        return
    if message.is_durable and (why := spawned.refusal(state, None)):
        _refuse_call(state, peer, message, "store", why)
        return
    call = _new_call(state, peer, message)
    if call is None:
        return
    if message.is_durable:
        durable.store_open(state, call, message)
    elif message.is_resumed:
        send_opened(state, call)


def on_submit_call(state: State, peer: Peer, message: m.SubmitCall) -> None:
    """A call with all its inputs."""
    if message.call_id in state.calls:
        state.note("duplicate call")
        return
    if message.is_durable and (why := spawned.refusal(state, message)):
        _refuse_call(state, peer, message, "store", why)
        return
    call = _new_call(state, peer, message)
    if call is None:
        return
    inputs = m.Inputs(message.call_id, 0, message.lengths, message.blobs, message.payload)
    count = len(message.lengths) // 4
    if message.is_durable:
        opening = m.OpenCall(
            message.call_id,
            message.function_id,
            message.is_durable,
            message.is_ordered,
            message.parent,
            method=message.method,
        )
        durable.store_open(state, call, opening)
        durable.store_inputs(state, call, inputs)
        durable.store_seal(state, call, m.SealCall(message.call_id, count))
        return
    if message.blobs:
        blobs.keep(state, blobs.ids(message.blobs))
    durable.queue_inputs(state, call, inputs)
    call.sealed_count = count


def _new_call(state: State, peer: Peer, message: m.OpenCall | m.SubmitCall) -> Call | None:
    """The call that a client opens, or None if it is refused."""
    session = peer.session
    assert session is not None
    function = state.functions.get(message.function_id)
    ancestors: tuple[Container, ...] = ()
    depth = 0
    if function is None or not may_use(peer, function.app):
        _refuse_call(state, peer, message, "internal", "its function is not defined")
        return None
    method = function.methods.get(message.method)
    if method is None:
        _refuse_call(state, peer, message, "internal", f"there is no method {message.method!r}")
        return None
    if message.parent is not None:
        lease = state.leases.get(message.parent[0])
        if lease is None or lease.container is not session.container:
            _refuse_call(state, peer, message, "cancelled", "the input that made it has ended")
            return None
        ancestors = (lease.container, *lease.call.ancestors)
        depth = lease.call.depth + 1
    call = Call(
        call_id=message.call_id,
        function=function,
        number=state.next_number(),
        session=session,
        is_durable=message.is_durable,
        parent=message.parent,
        method=method,
        is_ordered=message.is_ordered,
        depth=depth,
        ancestors=ancestors,
        service_s=state.service_clock_s,
        is_from_before=isinstance(message, m.OpenCall) and message.is_resumed,
    )
    add_call(state, call)
    session.calls[call.call_id] = call
    if message.parent is not None:
        graph.join(call, state.leases[message.parent[0]], message.parent[1])
    if peer.watch is not None:
        progress.wake(state, peer.watch)
    return call


def add_call(state: State, call: Call) -> None:
    state.calls[call.call_id] = call.function.app.calls[call.call_id] = call
    call.function.app.open_count += 1
    call.function.call_count += 1
    if call.is_durable:
        state.spawned_bytes += spawned.CALL_SIZE_BYTES


def _refuse_call(
    state: State, peer: Peer, message: m.OpenCall | m.SubmitCall, code: str, why: str
) -> None:
    text = f"{REFUSED}{why}"
    payload = m.failure_payload(code, text)
    state.send(peer.peer_id, m.CallFailed(message.call_id, m.Status.FAILURE, payload))


def _may_resume(session: Session, call: Call) -> bool:
    """Whoever knows the id of a call may go on with it, but for clients in containers: their
    workers are told the ids of calls that are not theirs."""
    if session.container is None:
        return True
    if call.session is None:
        # Spawned before a restart of the scheduler.
        return session.container.function.app is call.function.app
    return call.session.session_id == session.session_id


def _resume_call(state: State, session: Session, call: Call) -> None:
    """The client submits a call again after a reconnect: what it may have missed is repeated."""
    if call.session is not None and call.session is not session:
        call.session.calls.pop(call.call_id, None)
    call.session = session
    if not call.is_over:
        session.calls[call.call_id] = call
    send_opened(state, call)
    if session.peer_id is None:
        return
    if call.is_durable:
        durable.tell_stored(state, call, pairs_of(call.received))
    else:
        for kept in call.outputs:
            outputs.send_outputs(state, session.peer_id, kept)
        for generator in call.generators.values():
            for items in generator.unconfirmed:
                outputs.send_items(state, session.peer_id, items)
    if call.told_failure is not None:
        state.send(session.peer_id, call.told_failure)


def send_opened(state: State, call: Call) -> None:
    session = call.session
    if session is not None and session.peer_id is not None:
        # Inputs whose blobs are not all here are sent once more, and their blobs offered with them:
        # of those that were on their way over a lost connection nothing is left.
        present = call.received
        if call.parked:
            present = IntervalSet(
                gap for low, high in present for gap in call.parked.missing(low, high)
            )
        opened = m.CallOpened(call.call_id, call.window_count, WINDOW_BYTES, pairs_of(present))
        state.send(session.peer_id, opened)


def pairs_of(inputs: IntervalSet) -> list[tuple[int, int]]:
    """(start, count) of each range, as messages have it, as far as a message has room."""
    return [(start, stop - start) for start, stop in inputs][: m.LIST_LENGTH_MAX]


def update_window(state: State, call: Call) -> None:
    """Quick functions hold many inputs at a time and need more behind them; slow ones do not."""
    wanted = min(WINDOW_COUNT_MAX, WINDOW_COUNT_MIN + WINDOW_PER_LEASED * call.leased_count)
    if wanted > call.window_count * 5 // 4:
        call.window_count = wanted
        if call.session is not None and call.session.peer_id is not None:
            state.send(
                call.session.peer_id, m.Window(call.call_id, call.window_count, WINDOW_BYTES)
            )


def on_inputs(state: State, peer: Peer, call: Call, message: m.Inputs) -> None:
    count = len(message.lengths) // 4
    stop = message.start + count
    in_flight = call.received.count - call.consumed_count + count
    if in_flight > 2 * WINDOW_COUNT_MAX + m.CHUNK_INPUTS_MAX and not call.is_durable:
        text = f"call {call.call_id.hex()} has more inputs in flight than its credit allows"
        state.commands.append(Disconnect(peer.peer_id, "credit", text))
        return
    if call.received.covers(message.start, stop):
        state.note("duplicate inputs")
        if call.is_durable:
            durable.tell_stored(state, call, [(message.start, count)])
        return
    if call.is_durable:
        if why := spawned.refusal(state, message):
            fail_for(state, call, "store", f"{REFUSED}{why}")
        else:
            durable.store_inputs(state, call, message)
        return
    blobs.keep(state, blobs.ids(message.blobs))
    durable.queue_inputs(state, call, message)


def on_seal_call(state: State, call: Call, message: m.SealCall) -> None:
    if call.is_durable:
        if call.sealed_count is None:
            durable.store_seal(state, call, message)
        else:
            durable.tell_stored(state, call, [])
        return
    call.sealed_count = message.count
    end_call_if_done(state, call)


def on_ack(state: State, call: Call, message: m.Ack) -> None:
    outputs.on_ack(state, call, message)
    end_call_if_done(state, call)


def on_calls_finished(state: State, peer: Peer, message: m.CallsFinished) -> None:
    """The client has all that it wanted of these calls."""
    for call_id in message.call_ids:
        call = state.calls.get(call_id)
        if call is None:
            state.note("message for an unknown call")
        elif call.session is not peer.session or call.is_durable:
            state.note("message for another session's call")
        else:
            drop_call(state, call)


def end_call_if_done(state: State, call: Call) -> None:
    """An attached call is over when its client has acknowledged every output."""
    if call.is_done and not call.outputs and not call.is_durable:
        drop_call(state, call)


def mark_over(call: Call) -> None:
    """Nothing of it runs or will run."""
    if not call.is_over:
        call.is_over = True
        call.function.app.open_count -= 1


def drop_call(state: State, call: Call) -> None:
    """Forget everything of a call. Leases that still run it report to nobody."""
    mark_over(call)
    for lease in list(call.leases.values()):
        cancel_lease(state, lease)
    outputs.release_all_inputs(state, call)
    for kept in call.outputs:
        spawned.shrank(state, call, kept)
        blobs.release(state, blobs.ids(kept.blobs))
    for generator in call.generators.values():
        for items in generator.unconfirmed:
            blobs.release(state, blobs.ids(items.blobs))
    if call.node is not None:
        graph.leave(state, call)
    call.outputs.clear()
    call.generators.clear()
    for fetch in list(call.fetches.values()):
        durable.end_fetch(fetch)
    if state.calls.pop(call.call_id, None) is not None:
        call.function.call_count -= 1
        if call.is_durable:
            state.spawned_bytes -= spawned.CALL_SIZE_BYTES
    if call.session is not None:
        call.session.calls.pop(call.call_id, None)
    app = call.function.app
    app.calls.pop(call.call_id, None)
    close_app_if_done(state, app)


def cancel_call(state: State, call: Call) -> None:
    """Somebody does not want it any more. A spawned call keeps what it has, and says so."""
    if not call.is_durable:
        drop_call(state, call)
    elif not call.is_over:
        call.is_cancelled = True
        fail_for(state, call, "cancelled", "the call was cancelled", {"call_id": call.call_id})


def terminate_call(state: State, call: Call) -> None:
    """Cancel a call and kill the containers that run it. Whatever else they had runs elsewhere."""
    containers = [lease.container for lease in call.leases.values()]
    cancel_call(state, call)
    for container in containers:
        stop_container(state, container)


def fail_call(state: State, call: Call, failure: m.CallFailed) -> None:
    """Every input without an output ends like this."""
    if call.failure is not None or call.is_over:
        return
    call.failure = failure
    call.waits_for = ""
    if not call.is_durable:
        tell_failure(state, call)
    for lease in list(call.leases.values()):
        cancel_lease(state, lease)
    outputs.release_all_inputs(state, call)
    if call.is_durable:
        durable.store_failure(state, call, failure)
        durable.end_call(state, call)


def fail_for(
    state: State, call: Call, code: str, text: str, details: dict[str, Any] | None = None
) -> None:
    """A call ends as a whole for a reason that is not its user's code."""
    payload = m.failure_payload(code, text, details)
    fail_call(state, call, m.CallFailed(call.call_id, m.Status.FAILURE, payload))


def tell_failure(state: State, call: Call) -> None:
    assert call.failure is not None
    if call.session is not None and call.session.peer_id is not None:
        state.send(call.session.peer_id, call.failure)


def fail_function(state: State, function: Function, status: int, payload: bytes) -> None:
    """No container of it can start: all that waits for one ends with the reason."""
    for call in list(function.app.calls.values()):
        if call.function is function and not call.is_over:
            fail_call(state, call, m.CallFailed(call.call_id, status, payload))


def on_unopened_deadline(state: State, app: App) -> None:
    """An app from before a restart, whose client had its time to come back."""
    if state.apps.get(app.app_id) is app and not app.openers:
        app.is_closing = True
        close_app_if_done(state, app)


def on_unsealed_deadline(state: State, call: Call) -> None:
    """A spawn that was cut off before its end, and whose client did not come back."""
    if not call.has_all_inputs and call.session is None:
        cancel_call(state, call)
        blobs.on_call_left(state, call)


def forget_call(state: State, call: Call) -> None:
    """The results of a spawned call were kept their time."""
    durable.expire_call(state, call.call_id)
    drop_call(state, call)


# --- questions ------------------------------------------------------------------------------------


def on_fetch_outputs(state: State, peer: Peer, message: m.FetchOutputs) -> None:
    call = state.calls.get(message.call_id)
    if call is None or not call.is_durable:
        on_ask_call(state, peer, m.AskCall(message.request_id, message.call_id))
        return
    durable.on_fetch(state, peer, call, message)


def on_stop_fetch(state: State, peer: Peer, message: m.StopFetch) -> None:
    assert peer.session is not None
    fetch = peer.session.fetches.get(message.request_id)
    if fetch is not None:
        durable.end_fetch(fetch)


def on_ask_call(state: State, peer: Peer, message: m.AskCall) -> None:
    call = state.calls.get(message.call_id)
    if call is None or not call.is_durable:
        what = "expired" if message.call_id in state.expired else "unknown"
        info = m.CallInfo(message.request_id, message.call_id, what, 0, 0, "", False)
    else:
        info = m.CallInfo(
            message.request_id,
            message.call_id,
            call_state(call),
            call.received.count if call.sealed_count is None else call.sealed_count,
            call.finished.count,
            call.function.definition.name,
            call.method.is_generator,
        )
    state.send(peer.peer_id, info)


def call_state(call: Call) -> str:
    """open, sealed, finished, cancelled or failed: as `CallInfo.state` says it."""
    if call.told_failure is not None:
        return "cancelled" if call.is_cancelled else "failed"
    if call.is_over and call.failure is None:
        return "finished"
    return "open" if call.sealed_count is None else "sealed"


def on_ask_status(state: State, peer: Peer, message: m.AskStatus) -> None:
    state.send(peer.peer_id, m.StatusInfo(message.request_id, snapshot(state)))


def on_ask_shutdown(state: State, peer: Peer, message: m.AskShutdown) -> None:
    busy = describe_busy(state)
    is_leaving = message.force or not busy
    state.send(peer.peer_id, m.ShutdownInfo(message.request_id, is_leaving, busy))
    if is_leaving:
        state.commands.append(Exit("a client asked for it"))


def container_log(state: State, peer: Peer, message: m.ContainerLog) -> None:
    """Pass text on to the client at the root of the call; one that does not read loses it. What
    belongs to no call, as of a hook that runs behind the last one, goes to whose run it is."""
    container = state.containers.get(message.container_id)
    if container is None or container.worker is not peer.worker:
        state.note("log text of an unknown container")
        return
    call = state.calls.get(message.call_id)
    if call is not None and call.function is not container.function:
        # Nothing of this call can ever have run there.
        state.note("log text of an unknown container")
        return
    if call is None and container.leases:
        call = next(iter(container.leases.values())).call
    session: Session | None = None
    if call is not None:
        session = call.session
        if call.ancestors:
            root = call.ancestors[-1]
            session = next(iter(root.leases.values())).call.session if root.leases else None
    else:
        session = next(iter(container.function.app.openers.values()), None)
    if session is None:
        state.note("log text that nobody read")
        return
    call_id = message.call_id if call is None else call.call_id
    log = m.Log(
        call_id.rjust(16, b"\0"), message.index, message.container_id, message.source,
        message.payload,
    )  # fmt: skip
    reader = state.peers.get(session.peer_id) if session.peer_id else None
    if reader is None or not reader.is_writable:
        state.note("log text that nobody read")
        session.lost_text_bytes += len(message.payload)
        session.lost_text = replace(log, source=m.Source.SYSTEM, payload=b"")
        return
    if reader.watch is not None and call is not None:
        progress.name_call(state, reader.watch, call)
    state.send(reader.peer_id, log)


def tell_lost_text(state: State, session: Session) -> None:
    """A client takes text again: say how much it has missed, in the name of who wrote last."""
    lost_bytes, session.lost_text_bytes = session.lost_text_bytes, 0
    if lost_bytes and session.lost_text is not None and session.peer_id is not None:
        text = f"[fanout: {lost_bytes} bytes of output were dropped here; the client was too slow]"
        state.send(session.peer_id, replace(session.lost_text, payload=text.encode() + b"\n"))
    session.lost_text = None
