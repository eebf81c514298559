"""Queues and dicts from the records of the store, and the invariants that they keep."""

from __future__ import annotations

from fanout.config import CLIENT_GRACE_S, QUEUE_PARTITION_ITEMS_MAX
from fanout.protocol import messages as m
from fanout_scheduler.core import dicts, durable, objects, queues
from fanout_scheduler.core.events import ForgetObject
from fanout_scheduler.core.object_requests import answer_of, charge, client_of, hold, settle, split
from fanout_scheduler.core.object_state import (
    OVERHEAD_BYTES,
    Entry,
    Item,
    ObjectRecord,
    Request,
    StoredObject,
)
from fanout_scheduler.core.state import State


class Restorer:
    """Takes records in the order in which they were stored, then `finish`."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._orphans: dict[bytes, None] = {}
        self._items: dict[bytes, list[m.QueueItem]] = {}
        self._entries: dict[bytes, list[m.DictEntry]] = {}
        self._receipts: list[m.Receipt] = []

    def take(self, record: ObjectRecord) -> None:
        if isinstance(record, m.ObjectMade):
            kind = record.object_type
            of = StoredObject(record.object_id, kind, record.name, record.made_at, None)
            objects.add(self._state, of)
        elif isinstance(record, m.QueueItem):
            self._items.setdefault(record.object_id, []).append(record)
        elif isinstance(record, m.DictEntry):
            self._entries.setdefault(record.object_id, []).append(record)
        else:
            self._receipts.append(record)

    def finish(self) -> None:
        state = self._state
        by_id = state.objects.by_id
        given: dict[int, Request] = {}
        for receipt in self._receipts:
            of = by_id.get(receipt.object_id)
            if of is None:
                self._orphans[receipt.object_id] = None
            else:
                self._restore_receipt(of, receipt, given)
        for object_id in (self._items.keys() | self._entries.keys()) - by_id.keys():
            # Written while it was being deleted.
            self._orphans[object_id] = None
        for of in by_id.values():
            self._restore_items(of, given)
            self._restore_entries(of)
        durable.forget_records(state, [ForgetObject(key) for key in self._orphans])
        for client in list(state.objects.clients.values()):
            for request in list(client.requests.values()):
                self._finish_receipt(request)
            client.lost_at = state.now
            state.at(state.now + CLIENT_GRACE_S, "requests", client)

    def _restore_receipt(
        self, of: StoredObject, receipt: m.Receipt, given: dict[int, Request]
    ) -> None:
        """What was done and may not be known to its client."""
        state = self._state
        client = client_of(state, receipt.session_id)
        message: m.Message
        if receipt.items:
            message = m.QueueGet(receipt.request_id, of.object_id, receipt.partition, 1, False)
        else:
            message = m.ObjectAction(receipt.request_id, of.object_id, m.Action.LEN, b"")
        request = Request(client, message, of, "answered", is_claimed=False)
        values = split(receipt.lengths, receipt.payload)
        request.answer = answer_of(receipt.request_id, number=receipt.number, values=values)
        client.requests[receipt.request_id] = request
        hold(state, request, len(receipt.payload))
        for number in receipt.items:
            # Of two that name an item the later one has it: the earlier gave it back.
            given[number] = request

    def _restore_items(self, of: StoredObject, given: dict[int, Request]) -> None:
        state = self._state
        for record in sorted(self._items.get(of.object_id, []), key=lambda r: r.number):
            item = Item(record.number, bytes(record.payload), record.expires_at)
            charge(state, item.size_bytes)
            request = given.get(item.number)
            if request is not None:
                request.items.append(item)
            else:
                queues.partition_of(of, record.partition).items.append(item)
        for partition in of.partitions.values():
            queues.expire_later(state, of, partition)

    def _restore_entries(self, of: StoredObject) -> None:
        for record in sorted(self._entries.get(of.object_id, []), key=lambda r: r.number):
            entry = Entry(record.number, record.key, bytes(record.payload), self._state.now)
            dicts.add(self._state, of, entry)
        dicts.sweep_later(self._state, of)

    def _finish_receipt(self, request: Request) -> None:
        if not isinstance(request.message, m.QueueGet):
            return
        if request.items:
            request.answer = queues.answer_of_get(request)
        else:
            # Its items are gone, or somebody else's: a repeat of it is a new request.
            settle(self._state, request, "abandoned")


def check(state: State) -> None:
    """Raise AssertionError, with the number of the invariant, if one is broken."""
    held = 0
    waiting: set[int] = set()
    for of in {*state.objects.by_id.values(), *state.objects.by_name.values()}:
        if of.is_ready:
            held += OVERHEAD_BYTES
        for partition in of.partitions.values():
            numbers = [item.number for item in partition.items]
            assert numbers == sorted(set(numbers)), f"11: order of {of!r}"
            # 12. Nobody waits for what is there.
            assert not (partition.items and partition.getters), f"12: a get waits at {of!r}"
            if partition.putters:
                first = next(iter(partition.putters))
                assert not queues.fits(partition, first), f"12: a put waits at {of!r}"
            assert partition.storing_count <= QUEUE_PARTITION_ITEMS_MAX
            assert not partition.items or partition.has_deadline, "12: a partition never expires"
            held += sum(item.size_bytes for item in partition.items)
            for group in (partition.getters, partition.putters, partition.peekers):
                waiting |= {id(request) for request in group}
        waiting |= {id(request) for request in of.blocked}
        assert of.numbers == sorted(of.keys_by_number), f"11: numbers of {of!r}"
        assert len(of.numbers) == len(of.entries), f"11: numbers of {of!r}"
        held += sum(entry.size_bytes for entry in of.entries.values())
        assert of.busy or not of.blocked, f"12: a change waits at {of!r}"
    for client in state.objects.clients.values():
        assert client.requests, "13: a client without requests"
        for request in client.requests.values():
            held += request.size_bytes + sum(item.size_bytes for item in request.items)
            # 11. A request that waits is where it is served, and no other is.
            is_listed = id(request) in waiting
            assert is_listed == (request.state == "waiting"), (
                f"11: {request.state} at {request.of!r}"
            )
            waiting.discard(id(request))
    assert not waiting, "11: requests of nobody"
    # 13. Memory is what is held.
    assert held == state.objects.size_bytes, f"13: {held} bytes, counted {state.objects.size_bytes}"
