"""The life of a request that changes a queue or a dict, or waits at one. It is done at most once.

::

    waiting --decided--> storing --Stored------> answered --settled--> forgotten
       |                    |
       |                    +------StoreFailed-> undone; "store" is the answer; forgotten
       +--cancelled, connection lost---------------------------------> forgotten

A request is known by its session and its number. What it changed and a *receipt* of it go to disk
in one transaction, and only then it is answered; for an ephemeral object all that happens at once
and in memory. While there is a receipt a repeat of the request, after a reconnect or a restart of
the scheduler, gets the same answer and changes nothing. The receipt is settled

- as *taken* when the client says that the answer has arrived (`RequestsDone`), or, after a
  reconnect, does not repeat the request (`RequestsRepeated`): what it took out of a queue is gone;
- as *abandoned* when the client says that nobody waits for the answer (`CancelRequest`), or it was
  lost for `CLIENT_GRACE_S`: what was taken goes back to its place in the queue. A put that was done
  stays done; its receipt is kept for `RECEIPT_RETENTION_S`, in case the client does come back.

An abandonment is promised to nobody before the receipt is gone from the disk: who was told forgets
the request, and after a restart its silence about a receipt would mean that it took what was given
back. Until then the answer to the `CancelRequest` waits, and so does a repeat of the request.

A request that found nothing to change (empty, full, missing) leaves no receipt: a repeat asks anew.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from fanout.config import OBJECTS_SIZE_BYTES_MAX
from fanout.protocol import messages as m
from fanout_scheduler.core import durable
from fanout_scheduler.core.events import ForgetObject, ForgetRecord, Record
from fanout_scheduler.core.object_state import (
    OVERHEAD_BYTES,
    ObjectClient,
    Request,
    item_key,
    receipt_key,
)
from fanout_scheduler.core.state import Peer, State

#: What a client may have under way; each costs the scheduler some memory.
REQUESTS_MAX = 100_000


def table(values: list[bytes]) -> tuple[bytes, bytes]:
    """Length table and payload of these values."""
    lengths = b"".join(len(value).to_bytes(4, "little") for value in values)
    return lengths, b"".join(values)


def split(lengths: bytes, payload: m.Payload) -> list[bytes]:
    """The values of a length table and its payload."""
    offsets = list(accumulate(memoryview(lengths).cast("I"), initial=0))
    return [bytes(payload[low:high]) for low, high in zip(offsets, offsets[1:], strict=False)]


def answer_of(
    request_id: int,
    code: str = "ok",
    *,
    number: int = 0,
    text: str = "",
    values: list[bytes] | None = None,
) -> m.ObjectAnswer:
    lengths, payload = table(values or [])
    return m.ObjectAnswer(request_id, code, number, [text] if text else [], lengths, payload)


def send(state: State, session_id: bytes, answer: m.ObjectAnswer) -> None:
    """Send an answer if its client is connected; if not, it asks again."""
    session = state.sessions.get(session_id)
    if session is not None and session.peer_id is not None:
        state.send(session.peer_id, answer)


# --- memory --------------------------------------------------------------------------------------


def charge(state: State, size_bytes: int) -> None:
    state.objects.size_bytes += size_bytes


def has_room(state: State, payload_size: int, count: int) -> bool:
    """Whether the scheduler may hold so many more values of so many bytes together."""
    wanted = payload_size + count * OVERHEAD_BYTES
    return state.objects.size_bytes + wanted <= OBJECTS_SIZE_BYTES_MAX


def no_room_text(state: State) -> str:
    held_mib = state.objects.size_bytes >> 20
    return (
        f"queues and dicts hold {held_mib} MiB in the scheduler's memory, of "
        f"{OBJECTS_SIZE_BYTES_MAX >> 20} MiB: take something out, or delete what nobody uses"
    )


def hold(state: State, request: Request, size_bytes: int) -> None:
    """The request itself keeps so many bytes, and no others."""
    charge(state, size_bytes - request.size_bytes)
    request.size_bytes = size_bytes


# --- ends ----------------------------------------------------------------------------------------


def forget(state: State, request: Request) -> None:
    """Nothing is known of the request any more."""
    hold(state, request, 0)
    client = request.client
    if client.requests.get(request.request_id) is request:
        del client.requests[request.request_id]
    if not client.requests:
        state.objects.clients.pop(client.session_id, None)


def finish(state: State, request: Request, answer: m.ObjectAnswer) -> None:
    """Answer a request that has changed nothing."""
    forget(state, request)
    send(state, request.client.session_id, answer)
    ended(state, request)


def refuse(state: State, request: Request, code: str, text: str) -> None:
    finish(state, request, answer_of(request.request_id, code, text=text))


def refuse_missing(state: State, request: Request) -> None:
    refuse(state, request, "missing", f"{request.of!r} has been deleted")


def wait_for_end(
    state: State,
    peer: Peer,
    number: int,
    handler: Callable[[State, Peer, Any], None],
    message: Any,
) -> bool:
    """Have a message about request `number` of this client handled when no receipt of that is on
    disk any more; False if it has not been abandoned, or there is none already."""
    client = state.objects.clients.get(peer.session_id)
    request = client.requests.get(number) if client is not None else None
    if request is None or not request.verdict:
        ending = state.objects.ending
        request = ending.get(receipt_key(peer.session_id, number)) if ending else None
    if request is None:
        return False
    request.behind[message.request_id] = peer, handler, message
    return True


def ended(state: State, request: Request) -> None:
    """Nothing on disk tells of the request any more: go on with what waited for that."""
    behind, request.behind = request.behind, {}
    for peer, handler, message in behind.values():
        # A client that has lost its connection asks again.
        if state.peers.get(peer.peer_id) is peer:
            handler(state, peer, message)


# --- changes -------------------------------------------------------------------------------------


def commit(
    state: State,
    request: Request,
    records: list[Record],
    then: Callable[[], None],
    undo: Callable[[], None],
) -> None:
    """Have a change made and its receipt written, and `then` make it visible. With a full disk,
    `undo` what was set aside for it."""
    request.state = "storing"
    if request.of.is_ephemeral:
        then()
        return

    def failed(text: str) -> None:
        undo()
        refuse(state, request, "store", f"{request.of!r} could not be changed: {text}")

    durable.store_objects(state, records, then, failed)


def receipt(
    request: Request, partition: bytes = b"", number: int = 0, values: list[bytes] | None = None
) -> m.Receipt:
    """What a repeat of the request is answered from, after a restart."""
    lengths, payload = table(values or [])
    return m.Receipt(
        object_id=request.of.object_id,
        session_id=request.client.session_id,
        request_id=request.request_id,
        partition=partition,
        items=[item.number for item in request.items],
        number=number,
        lengths=lengths,
        payload=payload,
    )


def done(state: State, request: Request, answer: m.ObjectAnswer) -> None:
    """The change has been made: answer, and keep the answer until the client has it."""
    of = request.of
    if of.is_deleted:
        if not of.is_ephemeral:
            # It was written behind the deletion, and belongs to nothing.
            durable.forget_records(state, [ForgetObject(of.object_id)])
        refuse_missing(state, request)
        return
    request.state = "answered"
    request.answer = answer
    if request.verdict:
        settle(state, request, request.verdict)
    else:
        send(state, request.client.session_id, answer)


def settle(state: State, request: Request, verdict: str) -> None:
    """The client has the answer ("taken"), or will never want it ("abandoned")."""
    if request.state == "storing":
        request.verdict = request.verdict or verdict
        return
    assert request.state == "answered"
    forget(state, request)
    records: list[Record] = []
    object_id = request.of.object_id
    if isinstance(request.message, m.QueueGet):
        items, request.items = request.items, []
        if verdict == "abandoned":
            from fanout_scheduler.core.queues import put_back

            put_back(state, request.of, request.message.partition, items)
        else:
            charge(state, -sum(item.size_bytes for item in items))
            records += [ForgetRecord(object_id, item_key(item.number)) for item in items]
    if request.of.is_ephemeral:
        return
    key = receipt_key(request.client.session_id, request.request_id)
    if verdict == "abandoned":
        state.objects.ending[key] = request

    def gone() -> None:
        state.objects.ending.pop(key, None)
        ended(state, request)

    # Before the items: whoever gets them next has them by a later receipt.
    durable.forget_records(state, [ForgetRecord(object_id, key), *records], gone)


def client_of(state: State, session_id: bytes) -> ObjectClient:
    client = state.objects.clients.get(session_id)
    if client is None:
        session = state.sessions.get(session_id)
        container = session.container if session is not None else None
        client = state.objects.clients[session_id] = ObjectClient(session_id, container)
    return client
