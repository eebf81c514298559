"""Queues and dicts: finding, making and deleting them, and who asks what.

::

    OpenObject, no such name --> not ready --Stored--> ready --ObjectAction(DELETE), Stored--> gone
    OpenObject, ephemeral -----------------------------> ready --its session ends-----------> gone

Named ones are on disk and live until they are deleted; ephemeral ones live in memory, as long as
the session of the client that made them, with the grace that calls have. All values are held in
memory, those of named ones too: whoever waits for a value would otherwise wait for the disk as
well, and the core would have to ask the shell for it. `OBJECTS_SIZE_BYTES_MAX` bounds them all
together. What a request does, and when it is safe, is in `object_requests.py`; what is in a queue
or dict, in `queues.py` and `dicts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fanout.config import CLIENT_GRACE_S
from fanout.protocol import messages as m
from fanout_scheduler.core import dicts, durable, queues
from fanout_scheduler.core.events import ForgetObject
from fanout_scheduler.core.object_requests import (
    REQUESTS_MAX,
    answer_of,
    charge,
    client_of,
    finish,
    forget,
    has_room,
    no_room_text,
    refuse,
    send,
    settle,
    wait_for_end,
)
from fanout_scheduler.core.object_state import (
    OVERHEAD_BYTES,
    ObjectClient,
    Request,
    StoredObject,
)
from fanout_scheduler.core.state import Container, Peer, Session, State

#: How long it is remembered, of a client that is lost, that its puts were done.
RECEIPT_RETENTION_S = 24 * 3600.0
#: Objects in one page of a list.
LIST_COUNT_MAX = 1000

_Handler = Callable[[State, Request], None]
_QUEUE_REQUESTS: dict[type[m.Message], _Handler] = {
    m.QueuePut: queues.on_put,
    m.QueueGet: queues.on_get,
    m.QueuePeek: queues.on_peek,
}
_DICT_REQUESTS: dict[type[m.Message], _Handler] = {
    m.DictPut: dicts.on_put,
    m.DictGet: dicts.on_get,
    m.DictScan: dicts.on_scan,
}


# --- requests ------------------------------------------------------------------------------------


def on_request(state: State, peer: Peer, message: Any) -> None:
    """A request about what is in a queue or dict."""
    assert peer.session is not None
    if wait_for_end(state, peer, message.request_id, on_request, message):
        return
    client = client_of(state, peer.session_id)
    known = client.requests.get(message.request_id)
    if known is not None:
        known.is_claimed = True
        if known.answer is not None:
            state.send(peer.peer_id, known.answer)
        return
    client.container = peer.session.container
    if len(client.requests) >= REQUESTS_MAX:
        text = (
            f"this client has {REQUESTS_MAX} requests under way about queues and dicts, the limit"
        )
        state.send(peer.peer_id, answer_of(message.request_id, "exhausted", text=text))
        return
    of = state.objects.by_id.get(message.object_id)
    handler = None if of is None else _handler_of(of, message)
    if of is None or handler is None:
        answer = _missing(message) if of is None else _wrong_type(of, message)
        _forget_client(state, client)
        state.send(peer.peer_id, answer)
        return
    request = client.requests[message.request_id] = Request(client, message, of)
    handler(state, request)


def _handler_of(of: StoredObject, message: Any) -> _Handler | None:
    """What does it; None if objects of this type cannot."""
    is_queue = of.object_type == m.ObjectType.QUEUE
    if isinstance(message, m.ObjectAction):
        if message.action == m.Action.DELETE:
            return on_delete
        if message.action in (m.Action.CLEAR, m.Action.CLEAR_ALL):
            return queues.on_clear if is_queue else dicts.on_clear
        return _on_len
    return (_QUEUE_REQUESTS if is_queue else _DICT_REQUESTS).get(type(message))


def _on_len(state: State, request: Request) -> None:
    of = request.of
    is_dict = of.object_type == m.ObjectType.DICT
    count = len(of.entries) if is_dict else queues.length(of, request.message)
    finish(state, request, answer_of(request.request_id, number=count))


def _missing(message: Any) -> m.ObjectAnswer:
    if isinstance(message, m.ObjectAction) and message.action == m.Action.DELETE:
        # It may have been this very request that deleted it.
        return answer_of(message.request_id)
    text = (
        f"there is no queue or dict of id {message.object_id.hex()}: it was deleted, or it was "
        "ephemeral and ended with its client or with the scheduler"
    )
    return answer_of(message.request_id, "missing", text=text)


def _wrong_type(of: StoredObject, message: Any) -> m.ObjectAnswer:
    text = f"a {type(message).__name__} means nothing to {of!r}"
    return answer_of(message.request_id, "invalid", text=text)


def on_cancel_request(state: State, peer: Peer, message: m.CancelRequest) -> None:
    """The time of a request is up, or nobody waits for it any more."""
    if wait_for_end(state, peer, message.target, on_cancel_request, message):
        return
    client = state.objects.clients.get(peer.session_id)
    request = client.requests.get(message.target) if client is not None else None
    is_undone = True
    if request is not None and request.state == "waiting":
        _stop_waiting(state, request)
    elif request is not None and message.is_abandoned:
        settle(state, request, "abandoned")
        if wait_for_end(state, peer, message.target, on_cancel_request, message):
            return
    elif request is not None:
        is_undone = False
    state.send(peer.peer_id, answer_of(message.request_id, number=int(is_undone)))


def on_requests_done(state: State, peer: Peer, message: m.RequestsDone) -> None:
    client = state.objects.clients.get(peer.session_id)
    if client is None:
        return
    for start, count in message.requests:
        if count > len(client.requests):
            numbers = [n for n in client.requests if start <= n < start + count]
        else:
            numbers = [n for n in range(start, start + count) if n in client.requests]
        for number in numbers:
            request = client.requests[number]
            if request.state != "waiting":
                settle(state, request, "taken")


def on_requests_repeated(state: State, peer: Peer, message: m.RequestsRepeated) -> None:
    client = state.objects.clients.get(peer.session_id)
    for request in list(client.requests.values()) if client is not None else []:
        if not request.is_claimed:
            settle(state, request, "taken")


def _stop_waiting(state: State, request: Request) -> None:
    is_queue = request.of.object_type == m.ObjectType.QUEUE
    # First, so that nobody serves it while its place is being cleared.
    forget(state, request)
    (queues if is_queue else dicts).stop_waiting(state, request)


# --- clients come and go -------------------------------------------------------------------------


def on_detached(state: State, session: Session) -> None:
    """A connection is gone: who waited over it does so no more, and asks again when it is back."""
    client = state.objects.clients.get(session.session_id)
    if client is None:
        return
    client.lost_at = state.now
    for request in list(client.requests.values()):
        if request.state == "waiting":
            _stop_waiting(state, request)
        else:
            request.is_claimed = False
    if client.requests:
        state.at(state.now + CLIENT_GRACE_S, "requests", client)


def on_client_deadline(state: State, client: ObjectClient) -> None:
    """A lost client may have been lost for too long."""
    session = state.sessions.get(client.session_id)
    if session is not None and session.peer_id is not None:
        return
    lost_s = state.now - client.lost_at
    if lost_s < CLIENT_GRACE_S:
        return
    for request in list(client.requests.values()):
        if isinstance(request.message, m.QueueGet) or lost_s >= RECEIPT_RETENTION_S:
            settle(state, request, "abandoned")
    if client.requests:
        state.at(client.lost_at + RECEIPT_RETENTION_S, "requests", client)


def on_container_gone(state: State, container: Container) -> None:
    """Its clients are gone for good, and what they took and did not acknowledge is free."""
    for client in list(state.objects.clients.values()):
        if client.container is container:
            for request in list(client.requests.values()):
                settle(state, request, "abandoned")


def on_session_ended(state: State, session_id: bytes) -> None:
    """Ephemeral objects end with the session that made them."""
    for object_id in list(state.objects.ephemeral.get(session_id, ())):
        delete(state, state.objects.by_id[object_id])


def waits_of(state: State, session_id: bytes) -> list[Request]:
    """What a client waits for."""
    client = state.objects.clients.get(session_id)
    requests = client.requests.values() if client is not None else ()
    return [request for request in requests if request.state == "waiting"]


def _forget_client(state: State, client: ObjectClient) -> None:
    if not client.requests:
        state.objects.clients.pop(client.session_id, None)


# --- finding and making --------------------------------------------------------------------------


def on_open_object(state: State, peer: Peer, message: m.OpenObject) -> None:
    objects = state.objects
    of: StoredObject | None
    if message.mode in (m.OpenMode.BY_ID, m.OpenMode.EPHEMERAL):
        of = objects.by_id.get(message.object_id)
        if of is not None and of.object_type != message.object_type:
            state.send(peer.peer_id, _wrong_type(of, message))
        elif of is not None:
            state.send(peer.peer_id, _opened(of, message))
        elif message.mode == m.OpenMode.BY_ID:
            state.send(peer.peer_id, _missing(message))
        else:
            _make(state, peer, message)
        return
    if not message.name:
        answer = answer_of(message.request_id, "invalid", text="a name is not empty")
        state.send(peer.peer_id, answer)
        return
    of = objects.by_name.get((message.object_type, message.name))
    if of is None and message.mode == m.OpenMode.FIND:
        kind = m.ObjectType(message.object_type).name.lower()
        text = f"there is no {kind} named {message.name!r}; make it with create_if_missing=True"
        state.send(peer.peer_id, answer_of(message.request_id, "missing", text=text))
    elif of is None:
        _make(state, peer, message)
    elif of.is_ready:
        state.send(peer.peer_id, _opened(of, message))
    else:
        of.openers.append((peer.session_id, message))


def _opened(of: StoredObject, message: m.OpenObject) -> m.ObjectAnswer:
    if message.mode == m.OpenMode.MAKE and of.object_id != message.object_id:
        return answer_of(message.request_id, "exists", text=f"there is a {of!r} already")
    answer = answer_of(message.request_id)
    answer.info = [of.object_id, of.name, of.made_at]
    return answer


def _make(state: State, peer: Peer, message: m.OpenObject) -> None:
    if not has_room(state, 0, 1):
        text = no_room_text(state)
        state.send(peer.peer_id, answer_of(message.request_id, "exhausted", text=text))
        return
    if _is_taken(state, message.object_id):
        # Ids are random, so this is somebody who wants to be taken for another object.
        text = "its id is that of another queue or dict"
        state.send(peer.peer_id, answer_of(message.request_id, "invalid", text=text))
        return
    is_ephemeral = message.mode == m.OpenMode.EPHEMERAL
    of = StoredObject(
        object_id=message.object_id,
        object_type=message.object_type,
        name="" if is_ephemeral else message.name,
        made_at=state.now + state.wall_offset_s,
        session_id=peer.session_id if is_ephemeral else None,
    )
    if is_ephemeral:
        add(state, of)
        state.send(peer.peer_id, _opened(of, message))
        return
    state.objects.by_name[of.object_type, of.name] = of
    of.openers.append((peer.session_id, message))

    def stored() -> None:
        add(state, of)
        openers, of.openers = of.openers, []
        for session_id, opener in openers:
            send(state, session_id, _opened(of, opener))

    def failed(text: str) -> None:
        del state.objects.by_name[of.object_type, of.name]
        for session_id, opener in of.openers:
            answer = answer_of(opener.request_id, "store", text=f"{of!r} was not made: {text}")
            send(state, session_id, answer)

    record = m.ObjectMade(of.object_id, of.object_type, of.name, of.made_at)
    durable.store_objects(state, [record], stored, failed)


def _is_taken(state: State, object_id: bytes) -> bool:
    """Whether there is an object of this id, or one on its way to disk."""
    objects = state.objects
    return object_id in objects.by_id or any(
        of.object_id == object_id for of in objects.by_name.values() if not of.is_ready
    )


def add(state: State, of: StoredObject) -> None:
    """From now on it can be used."""
    of.is_ready = True
    state.objects.by_id[of.object_id] = of
    if of.session_id is not None:
        state.objects.ephemeral.setdefault(of.session_id, set()).add(of.object_id)
    else:
        state.objects.by_name[of.object_type, of.name] = of
    charge(state, OVERHEAD_BYTES)


def on_list_objects(state: State, peer: Peer, message: m.ListObjects) -> None:
    found = sorted(
        (of.name, of)
        for (kind, name), of in state.objects.by_name.items()
        if kind == message.object_type and of.is_ready and name > message.after
    )
    answer = answer_of(message.request_id)
    answer.info = [[of.object_id, name, of.made_at] for name, of in found[:LIST_COUNT_MAX]]
    state.send(peer.peer_id, answer)


# --- deleting ------------------------------------------------------------------------------------


def on_delete(state: State, request: Request) -> None:
    of = request.of
    if of.is_ephemeral:
        finish(state, request, answer_of(request.request_id))
        delete(state, of)
        return
    request.state = "storing"

    def stored() -> None:
        finish(state, request, answer_of(request.request_id))
        delete(state, of)

    def failed(text: str) -> None:
        refuse(state, request, "store", f"{of!r} could not be deleted: {text}")

    durable.store_objects(state, [ForgetObject(of.object_id)], stored, failed)


def delete(state: State, of: StoredObject) -> None:
    """It is gone; whoever waits at it is told."""
    objects = state.objects
    if of.is_deleted:
        return
    of.is_deleted = True
    objects.by_id.pop(of.object_id, None)
    if of.session_id is None:
        objects.by_name.pop((of.object_type, of.name), None)
    else:
        made = objects.ephemeral[of.session_id]
        made.discard(of.object_id)
        if not made:
            del objects.ephemeral[of.session_id]
    charge(state, -OVERHEAD_BYTES)
    queues.delete(state, of)
    dicts.delete(state, of)
    for client in list(objects.clients.values()):
        for request in list(client.requests.values()):
            if request.of is of and request.state == "answered":
                charge(state, -sum(item.size_bytes for item in request.items))
                forget(state, request)
            assert request.of is not of or request.state != "waiting", "nobody was told"


#: Messages of clients about queues and dicts, and what handles them.
OBJECT_MESSAGES: dict[type[m.Message], Callable[[State, Peer, Any], None]] = {
    m.OpenObject: on_open_object,
    m.ListObjects: on_list_objects,
    m.QueuePut: on_request,
    m.QueueGet: on_request,
    m.QueuePeek: on_request,
    m.DictPut: on_request,
    m.DictGet: on_request,
    m.DictScan: on_request,
    m.ObjectAction: on_request,
    m.CancelRequest: on_cancel_request,
    m.RequestsDone: on_requests_done,
    m.RequestsRepeated: on_requests_repeated,
}

DEADLINES: dict[str, Callable[[State, Any], None]] = {
    "requests": on_client_deadline,
    "partition": lambda state, what: queues.on_expired(state, *what),
    "sweep": dicts.on_sweep,
}
