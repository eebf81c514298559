"""Queues: FIFOs of items in partitions, each with those who wait at it.

An item is in one of these places, and nowhere else::

    a put's `items`, on its way to disk --> partition.items --> a get's `items` --> gone
                                                 ^                    |
                                                 +----abandoned-------+

A partition has room for `QUEUE_PARTITION_ITEMS_MAX` items, those on their way to disk included.
Who waits is served in the order of coming: nobody waits for what is there. An item that comes back
goes to the place that its number gives it, which may put the partition over its limit.
"""

from __future__ import annotations

from fanout.config import (
    OBJECT_REQUEST_SIZE_BYTES_MAX,
    QUEUE_ITEM_SIZE_BYTES_MAX,
    QUEUE_PARTITION_ITEMS_MAX,
    QUEUE_PARTITIONS_MAX,
)
from fanout.protocol import messages as m
from fanout_scheduler.core import durable
from fanout_scheduler.core.events import ForgetRecord, Record
from fanout_scheduler.core.object_requests import (
    answer_of,
    charge,
    commit,
    done,
    finish,
    has_room,
    hold,
    no_room_text,
    receipt,
    refuse,
    refuse_missing,
    split,
)
from fanout_scheduler.core.object_state import Item, Partition, Request, StoredObject, item_key
from fanout_scheduler.core.state import State

#: Bytes of a page that is looked at and not taken: iterating holds up nobody else.
PEEK_SIZE_BYTES_MAX = 1 << 20


def partition_of(queue: StoredObject, key: bytes) -> Partition:
    partition = queue.partitions.get(key)
    if partition is None:
        partition = queue.partitions[key] = Partition(key)
    return partition


def prune(queue: StoredObject, partition: Partition) -> None:
    if partition.is_empty and queue.partitions.get(partition.key) is partition:
        del queue.partitions[partition.key]


# --- requests ------------------------------------------------------------------------------------


def on_put(state: State, request: Request) -> None:
    message: m.QueuePut = request.message
    queue = request.of
    sizes = memoryview(message.lengths).cast("I")
    count = len(sizes)
    is_new = message.partition not in queue.partitions
    if count > QUEUE_PARTITION_ITEMS_MAX or max(sizes, default=0) > QUEUE_ITEM_SIZE_BYTES_MAX:
        refuse(state, request, "size", "items of a put are over the limits of a partition")
    elif not count:
        finish(state, request, answer_of(request.request_id))
    elif not has_room(state, len(message.payload), count):
        refuse(state, request, "exhausted", no_room_text(state))
    elif is_new and len(queue.partitions) >= QUEUE_PARTITIONS_MAX:
        text = f"{queue!r} has {QUEUE_PARTITIONS_MAX} partitions, the limit"
        refuse(state, request, "exhausted", text)
    else:
        partition = partition_of(queue, message.partition)
        if message.block or (not partition.putters and fits(partition, request)):
            hold(state, request, len(message.payload))
            partition.putters[request] = None
            serve(state, queue, partition)
        else:
            refuse(state, request, "full", f"{queue!r} has no room for {count} items")
            prune(queue, partition)


def on_get(state: State, request: Request) -> None:
    message: m.QueueGet = request.message
    partition = partition_of(request.of, message.partition)
    if not message.count:
        finish(state, request, answer_of(request.request_id))
    elif message.block or partition.items:
        partition.getters[request] = None
        serve(state, request.of, partition)
    else:
        refuse(state, request, "empty", f"{request.of!r} is empty")
    prune(request.of, partition)


def on_peek(state: State, request: Request) -> None:
    message: m.QueuePeek = request.message
    partition = partition_of(request.of, message.partition)
    if not answer_peek(state, request, partition):
        if message.block:
            partition.peekers[request] = None
        else:
            refuse(state, request, "empty", f"{request.of!r} has nothing new")
    prune(request.of, partition)


def on_clear(state: State, request: Request) -> None:
    """What is there goes; what somebody has taken, or is just putting, is not there."""
    message: m.ObjectAction = request.message
    queue = request.of
    keys = [message.partition]
    if message.action == m.Action.CLEAR_ALL:
        keys = list(queue.partitions)
    cleared = {key: list(queue.partitions[key].items) for key in keys if key in queue.partitions}
    for key in cleared:
        queue.partitions[key].items.clear()
    items = [item for group in cleared.values() for item in group]
    if not items:
        finish(state, request, answer_of(request.request_id))
        return
    records: list[Record] = [ForgetRecord(queue.object_id, item_key(i.number)) for i in items]

    def then() -> None:
        request.items = []
        charge(state, -sum(item.size_bytes for item in items))
        done(state, request, answer_of(request.request_id))

    def undo() -> None:
        request.items = []
        for key, group in cleared.items():
            put_back(state, queue, key, group)

    records.append(receipt(request))
    request.items = items
    commit(state, request, records, then, undo)
    for key in cleared:
        serve(state, queue, partition_of(queue, key))


def length(queue: StoredObject, message: m.ObjectAction) -> int:
    if message.action == m.Action.LEN_TOTAL:
        return sum(len(partition.items) for partition in queue.partitions.values())
    partition = queue.partitions.get(message.partition)
    return 0 if partition is None else len(partition.items)


# --- serving -------------------------------------------------------------------------------------


def fits(partition: Partition, request: Request) -> bool:
    count = len(request.message.lengths) // 4
    return len(partition.items) + partition.storing_count + count <= QUEUE_PARTITION_ITEMS_MAX


def serve(state: State, queue: StoredObject, partition: Partition) -> None:
    """Give what is there to those who wait for it, and let in what waits for room."""
    if partition.is_serving or queue.is_deleted:
        return
    partition.is_serving = True
    while True:
        for request in list(partition.peekers):
            if answer_peek(state, request, partition):
                del partition.peekers[request]
        if partition.items and partition.getters:
            give(state, queue, partition, _first(partition.getters))
        elif partition.putters and fits(partition, _first(partition.putters)):
            accept(state, queue, partition, _first(partition.putters))
        else:
            break
    partition.is_serving = False
    expire_later(state, queue, partition)
    prune(queue, partition)


def _first(waiting: dict[Request, None]) -> Request:
    request = next(iter(waiting))
    return request


def accept(state: State, queue: StoredObject, partition: Partition, request: Request) -> None:
    """The items of a put get their numbers and go to disk."""
    message: m.QueuePut = request.message
    del partition.putters[request]
    hold(state, request, 0)
    expires_at = state.now + state.wall_offset_s + message.ttl_s
    items = [
        Item(state.next_id(), payload, expires_at)
        for payload in split(message.lengths, message.payload)
    ]
    # The frame is not needed any more; its values are.
    message.payload, message.lengths = b"", b""
    charge(state, sum(item.size_bytes for item in items))
    partition.storing_count += len(items)
    records: list[Record] = [receipt(request)]
    records += [
        m.QueueItem(queue.object_id, i.number, partition.key, i.expires_at, i.payload)
        for i in items
    ]
    request.items = items

    def then() -> None:
        request.items = []
        partition.storing_count -= len(items)
        if queue.is_deleted:
            charge(state, -sum(item.size_bytes for item in items))
        else:
            partition.items.extend(items)
        done(state, request, answer_of(request.request_id))
        serve(state, queue, partition)

    def undo() -> None:
        request.items = []
        partition.storing_count -= len(items)
        charge(state, -sum(item.size_bytes for item in items))
        serve(state, queue, partition)

    commit(state, request, records, then, undo)


def give(state: State, queue: StoredObject, partition: Partition, request: Request) -> None:
    """Set items aside for a get; it learns of them when that is on disk."""
    message: m.QueueGet = request.message
    del partition.getters[request]
    items: list[Item] = []
    size = 0
    while partition.items and len(items) < min(message.count, QUEUE_PARTITION_ITEMS_MAX):
        size += len(partition.items[0].payload)
        if items and size > OBJECT_REQUEST_SIZE_BYTES_MAX:
            break
        items.append(partition.items.popleft())
    request.items = items

    def then() -> None:
        if queue.is_deleted:
            charge(state, -sum(item.size_bytes for item in items))
        done(state, request, answer_of_get(request))

    def undo() -> None:
        request.items = []
        put_back(state, queue, partition.key, items)

    commit(state, request, [receipt(request, partition.key)], then, undo)


def answer_of_get(request: Request) -> m.ObjectAnswer:
    return answer_of(request.request_id, values=[item.payload for item in request.items])


def answer_peek(state: State, request: Request, partition: Partition) -> bool:
    """Show what is there beyond the number that was seen last; False if there is nothing."""
    message: m.QueuePeek = request.message
    values: list[bytes] = []
    number = size = 0
    for item in partition.items:
        if item.number <= message.after:
            continue
        size += len(item.payload)
        if len(values) >= message.count or (values and size > PEEK_SIZE_BYTES_MAX):
            break
        values.append(item.payload)
        number = item.number
    if not values:
        return False
    finish(state, request, answer_of(request.request_id, number=number, values=values))
    return True


def put_back(state: State, queue: StoredObject, key: bytes, items: list[Item]) -> None:
    """Items that nobody has after all stand where they stood."""
    if queue.is_deleted:
        charge(state, -sum(item.size_bytes for item in items))
        return
    partition = partition_of(queue, key)
    for item in reversed(items):
        before: list[Item] = []
        while partition.items and partition.items[0].number < item.number:
            before.append(partition.items.popleft())
        partition.items.appendleft(item)
        partition.items.extendleft(reversed(before))
    serve(state, queue, partition)


# --- ends ----------------------------------------------------------------------------------------


def stop_waiting(state: State, request: Request) -> None:
    """A request that waits is served no more; others may be thereby."""
    queue = request.of
    partition = queue.partitions.get(request.message.partition)
    assert partition is not None
    for waiting in (partition.getters, partition.putters, partition.peekers):
        waiting.pop(request, None)
    serve(state, queue, partition)
    prune(queue, partition)


def expire_later(state: State, queue: StoredObject, partition: Partition) -> None:
    if partition.items and not partition.has_deadline:
        partition.has_deadline = True
        when = partition.items[-1].expires_at - state.wall_offset_s
        state.at(max(when, state.now), "partition", (queue, partition))


def on_expired(state: State, queue: StoredObject, partition: Partition) -> None:
    """The time of a partition may be over: it has one deadline, which moves on with each put."""
    partition.has_deadline = False
    if queue.is_deleted or not partition.items:
        return
    if partition.items[-1].expires_at > state.now + state.wall_offset_s:
        expire_later(state, queue, partition)
        return
    items = list(partition.items)
    partition.items.clear()
    charge(state, -sum(item.size_bytes for item in items))
    if not queue.is_ephemeral:
        keys: list[Record] = [ForgetRecord(queue.object_id, item_key(i.number)) for i in items]
        durable.forget_records(state, keys)
    serve(state, queue, partition)


def delete(state: State, queue: StoredObject) -> None:
    """The queue is gone: nobody waits at it, and what is in it goes."""
    for partition in list(queue.partitions.values()):
        for waiting in (partition.getters, partition.putters, partition.peekers):
            for request in list(waiting):
                refuse_missing(state, request)
            waiting.clear()
        charge(state, -sum(item.size_bytes for item in partition.items))
        partition.items.clear()
    queue.partitions.clear()
