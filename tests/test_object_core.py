"""Queues and dicts in the bare core: facts in, exact answers out, invariants after each step."""

from __future__ import annotations

from typing import Any

from fanout.config import (
    CLIENT_GRACE_S,
    DICT_ENTRY_RETENTION_S,
    OBJECTS_SIZE_BYTES_MAX,
    QUEUE_PARTITION_ITEMS_MAX,
)
from fanout.protocol import messages as m
from fanout_scheduler.core.events import (
    ForgetObject,
    ForgetRecord,
    PeerId,
    Record,
    Send,
    Store,
    StoreFailed,
)
from fanout_scheduler.core.object_requests import split
from fanout_scheduler.core.object_state import record_key
from fanout_scheduler.core.objects import RECEIPT_RETENTION_S
from tests.core_kit import Bench, table

OBJECT = b"o" * 16
DAY_S = 24 * 3600.0


class ObjectBench(Bench):
    """A bench with a disk, and requests with numbers of their own."""

    def __init__(self, epoch: int = 1) -> None:
        super().__init__(epoch)
        self.request_id = 0
        self.disk: dict[tuple[bytes, bytes], Record] = {}

    def next(self) -> int:
        self.request_id += 1
        return self.request_id

    def write(self) -> None:
        """Write down everything that is to be stored, also what follows from that."""
        while stores := self.store():
            for record in [record for store in stores for record in store.records]:
                self.apply(record)

    def apply(self, record: Record) -> None:
        if isinstance(record, ForgetRecord):
            self.disk.pop((record.object_id, record.key), None)
        elif isinstance(record, ForgetObject):
            for key in [key for key in self.disk if key[0] == record.object_id]:
                del self.disk[key]
        else:
            assert isinstance(record, m.ObjectMade | m.QueueItem | m.DictEntry | m.Receipt)
            self.disk.pop((record.object_id, record_key(record)), None)
            self.disk[record.object_id, record_key(record)] = record

    def refuse_writes(self) -> None:
        """A full disk: what is to be stored is not."""
        stores = [order for order in self.orders if isinstance(order, Store)]
        self.orders = [order for order in self.orders if not isinstance(order, Store)]
        self.tell(*[StoreFailed(store.sequence, "disk full") for store in stores])

    def restarted(self) -> ObjectBench:
        """A new life with what is on the disk."""
        other = ObjectBench(self.core.state.epoch + 1)
        other.now = self.now
        wall_time_s = self.now + self.core.state.wall_offset_s
        other.core.restore(list(self.disk.values()), other.now, wall_time_s)
        other.core.check()
        other.disk = self.disk
        other.request_id = self.request_id
        other.tell()
        return other

    def make(self, peer: int, kind: int = 1, is_ephemeral: bool = False) -> None:
        mode = m.OpenMode.EPHEMERAL if is_ephemeral else m.OpenMode.MAKE_IF_MISSING
        self.frame(peer, m.OpenObject(self.next(), OBJECT, kind, "" if is_ephemeral else "q", mode))
        self.write()
        assert self.take(m.ObjectAnswer, peer).info[0] == OBJECT

    def put(
        self, peer: int, *values: bytes, block: bool = False, key: bytes = b"", ttl_s: float = DAY_S
    ) -> m.QueuePut:
        message = m.QueuePut(self.next(), OBJECT, key, ttl_s, block, *table(list(values)))
        copy = m.QueuePut(message.request_id, OBJECT, key, ttl_s, block, *table(list(values)))
        self.frame(peer, message)
        return copy

    def get(self, peer: int, count: int = 1, block: bool = True, key: bytes = b"") -> m.QueueGet:
        message = m.QueueGet(self.next(), OBJECT, key, count, block)
        self.frame(peer, message)
        return message

    def set(self, peer: int, key: bytes, value: bytes, if_missing: bool = False) -> m.DictPut:
        message = m.DictPut(self.next(), OBJECT, if_missing, *table([key, value]))
        copy = m.DictPut(message.request_id, OBJECT, if_missing, *table([key, value]))
        self.frame(peer, message)
        return copy

    def look(self, peer: int, key: bytes, look: int = m.Look.GET) -> m.DictGet:
        message = m.DictGet(self.next(), OBJECT, look, key)
        self.frame(peer, m.DictGet(message.request_id, OBJECT, look, key))
        return message

    def act(self, peer: int, action: int, key: bytes = b"") -> None:
        self.frame(peer, m.ObjectAction(self.next(), OBJECT, action, key))

    def answer(self, peer: int, code: str = "ok") -> m.ObjectAnswer:
        answer = self.take(m.ObjectAnswer, peer)
        assert answer.code == code, answer
        return answer

    def values(self, peer: int) -> list[bytes]:
        answer = self.answer(peer)
        return split(answer.lengths, answer.payload)

    def confirm(self, peer: int, request: Any) -> None:
        self.frame(peer, m.RequestsDone([(request.request_id, 1)]))

    def put_stored(self, peer: int, *values: bytes, **options: Any) -> None:
        request = self.put(peer, *values, **options)
        self.write()
        self.answer(peer)
        self.confirm(peer, request)
        self.write()

    def length(self, peer: int) -> int:
        self.act(peer, m.Action.LEN)
        return self.answer(peer).number

    def clean(self) -> None:
        """Everything was expected, and nothing is held but the object itself."""
        self.write()
        assert self.orders == []
        assert not self.core.state.objects.clients
        assert len(self.disk) <= 1, self.disk


def bench_with_queue(is_ephemeral: bool = False) -> tuple[ObjectBench, int]:
    bench = ObjectBench()
    peer = bench.connect()
    bench.make(peer, is_ephemeral=is_ephemeral)
    return bench, peer


def bench_with_dict() -> tuple[ObjectBench, int]:
    bench = ObjectBench()
    peer = bench.connect()
    bench.make(peer, kind=2)
    return bench, peer


# --- finding and making --------------------------------------------------------------------------


def test_an_object_is_made_once_and_told_only_when_it_is_on_disk() -> None:
    bench = ObjectBench()
    one, two = bench.connect(), bench.connect()
    bench.frame(one, m.OpenObject(1, b"1" * 16, 1, "q", m.OpenMode.MAKE_IF_MISSING))
    bench.frame(two, m.OpenObject(1, b"2" * 16, 1, "q", m.OpenMode.MAKE_IF_MISSING))
    assert not bench.take_all(m.ObjectAnswer)
    bench.write()
    assert bench.answer(one).info[:2] == [b"1" * 16, "q"]
    assert bench.answer(two).info[:2] == [b"1" * 16, "q"]
    bench.frame(two, m.OpenObject(2, b"3" * 16, 1, "q", m.OpenMode.MAKE))
    bench.answer(two, "exists")
    bench.frame(one, m.OpenObject(2, b"1" * 16, 1, "q", m.OpenMode.MAKE))
    assert bench.answer(one).info[0] == b"1" * 16
    bench.frame(one, m.OpenObject(3, b"4" * 16, 2, "q", m.OpenMode.FIND))
    bench.answer(one, "missing")
    bench.nothing_left()


def test_an_object_that_cannot_be_written_is_not_made() -> None:
    bench = ObjectBench()
    peer = bench.connect()
    bench.frame(peer, m.OpenObject(1, OBJECT, 1, "q", m.OpenMode.MAKE))
    bench.refuse_writes()
    bench.answer(peer, "store")
    bench.frame(peer, m.OpenObject(2, OBJECT, 1, "q", m.OpenMode.FIND))
    bench.answer(peer, "missing")
    bench.nothing_left()


def test_named_objects_are_listed_in_pages() -> None:
    bench = ObjectBench()
    peer = bench.connect()
    for number in range(3):
        name = f"q{number}"
        bench.frame(peer, m.OpenObject(number, bytes([number]) * 16, 1, name, m.OpenMode.MAKE))
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.frame(peer, m.ListObjects(9, 1, "q0"))
    assert [row[1] for row in bench.answer(peer).info] == ["q1", "q2"]


def test_an_ephemeral_object_ends_when_its_session_is_lost_for_the_grace() -> None:
    bench, owner = bench_with_queue(is_ephemeral=True)
    other = bench.connect()
    bench.put(other, b"x")
    bench.answer(other)
    waiting = bench.get(other, key=b"elsewhere")
    bench.lose(owner)
    bench.later(CLIENT_GRACE_S - 1)
    assert not bench.take_all(m.ObjectAnswer)
    bench.later(2)
    assert bench.answer(other, "missing").request_id == waiting.request_id
    assert bench.core.state.objects.size_bytes == 0
    bench.clean()


def test_an_ephemeral_object_goes_on_when_its_session_is_back_in_time() -> None:
    bench, owner = bench_with_queue(is_ephemeral=True)
    bench.put(owner, b"x")
    bench.answer(owner)
    bench.lose(owner)
    bench.later(CLIENT_GRACE_S - 1)
    owner = bench.connect(session=owner.to_bytes(16, "big"))
    bench.later(5)
    bench.get(owner)
    assert bench.values(owner) == [b"x"]


def test_a_deleted_object_tells_who_waits_at_it_and_leaves_nothing() -> None:
    bench, peer = bench_with_queue()
    other = bench.connect()
    bench.put_stored(peer, b"a", b"b")
    bench.get(other, key=b"p")
    bench.put(peer, b"c")  # on its way to disk, behind which the deletion comes
    bench.act(peer, m.Action.DELETE)
    bench.write()
    bench.answer(other, "missing")
    assert sorted(answer.code for answer in bench.take_all(m.ObjectAnswer, peer)) == ["ok", "ok"]
    bench.get(peer)
    bench.answer(peer, "missing")
    bench.clean()
    assert not bench.disk
    assert bench.core.state.objects.size_bytes == 0


# --- queues --------------------------------------------------------------------------------------


def test_items_come_out_in_the_order_in_which_they_went_in() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    bench.put_stored(peer, b"c")
    request = bench.get(peer, count=2)
    bench.write()
    assert bench.values(peer) == [b"a", b"b"]
    bench.confirm(peer, request)
    request = bench.get(peer, count=9)
    bench.write()
    assert bench.values(peer) == [b"c"]
    bench.confirm(peer, request)
    bench.clean()


def test_nothing_is_acknowledged_or_handed_out_before_it_is_on_disk() -> None:
    bench, peer = bench_with_queue()
    bench.put(peer, b"a")
    bench.get(peer)
    assert not bench.take_all(m.ObjectAnswer)
    (put,) = bench.store()
    assert len(bench.take_all(m.ObjectAnswer)) == 1, "the put is acknowledged, and it alone"
    assert [type(record) for record in put.records] == [m.Receipt, m.QueueItem]
    (get,) = bench.store()
    assert [type(record) for record in get.records] == [m.Receipt]
    assert bench.values(peer) == [b"a"]


def test_waiting_gets_are_served_in_the_order_in_which_they_came() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    first, second = bench.connect(), bench.connect()
    bench.get(first)
    bench.get(second, count=5)
    bench.put(peer, b"a", b"b", b"c")
    bench.answer(peer)
    assert bench.values(first) == [b"a"]
    assert bench.values(second) == [b"b", b"c"]


def test_a_get_that_does_not_block_says_that_there_is_nothing() -> None:
    bench, peer = bench_with_queue()
    bench.get(peer, block=False)
    bench.answer(peer, "empty")
    bench.clean()


def test_partitions_are_apart() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    bench.put(peer, b"a", key=b"one")
    bench.answer(peer)
    bench.get(peer, block=False)
    bench.answer(peer, "empty")
    bench.act(peer, m.Action.LEN, b"one")
    assert bench.answer(peer).number == 1
    bench.act(peer, m.Action.LEN_TOTAL)
    assert bench.answer(peer).number == 1


def test_a_put_waits_for_room_and_others_wait_behind_it() -> None:
    bench, peer = bench_with_queue()
    producer, consumer = bench.connect(), bench.connect()
    bench.put_stored(peer, *[b"x"] * QUEUE_PARTITION_ITEMS_MAX)
    bench.put(producer, b"last")
    bench.answer(producer, "full")
    bench.put(producer, b"1", b"2", block=True)
    bench.put(producer, b"3", block=True)
    bench.get(consumer)
    bench.write()
    bench.answer(consumer)
    assert not bench.take_all(m.ObjectAnswer), "two items do not fit, and the third waits its turn"
    bench.get(consumer, count=2)
    bench.write()
    assert len(bench.take_all(m.ObjectAnswer, producer)) == 2
    assert bench.length(peer) == QUEUE_PARTITION_ITEMS_MAX


def test_a_put_that_cannot_be_written_is_refused_and_leaves_nothing() -> None:
    bench, peer = bench_with_queue()
    bench.put(peer, b"a")
    bench.refuse_writes()
    bench.answer(peer, "store")
    bench.get(peer, block=False)
    bench.answer(peer, "empty")
    bench.clean()


def test_a_get_that_cannot_be_written_leaves_its_items_where_they_were() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    bench.get(peer)
    bench.refuse_writes()
    bench.answer(peer, "store")
    bench.get(peer, count=2)
    bench.write()
    assert bench.values(peer) == [b"a", b"b"]


def test_a_repeated_put_is_done_once_also_after_a_restart() -> None:
    bench, peer = bench_with_queue()
    session = peer.to_bytes(16, "big")
    request = bench.put(peer, b"a")
    bench.write()
    bench.forget(m.ObjectAnswer)  # lost with the connection
    bench.lose(peer)
    peer = bench.connect(session=session)
    bench.frame(peer, request)
    bench.answer(peer)
    bench = bench.restarted()
    peer = bench.connect(session=session)
    bench.frame(peer, request, m.RequestsRepeated(1))
    bench.answer(peer)
    assert bench.length(peer) == 1
    bench.confirm(peer, request)
    bench.write()
    assert bench.length(peer) == 1
    assert not bench.core.state.objects.clients


def test_a_put_is_known_for_a_day_after_its_client_was_lost() -> None:
    bench, peer = bench_with_queue()
    request = bench.put(peer, b"a", ttl_s=3 * DAY_S)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.lose(peer)
    bench.later(RECEIPT_RETENTION_S - 60)
    again = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(again, request)
    bench.answer(again)
    assert bench.length(again) == 1
    bench.lose(again)
    bench.later(RECEIPT_RETENTION_S + 60)
    assert not bench.core.state.objects.clients


def test_an_item_whose_answer_was_lost_comes_again_to_the_same_session() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    request = bench.get(peer)
    bench.write()
    assert bench.values(peer) == [b"a"]
    bench.lose(peer)
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    other = bench.connect()
    bench.frame(peer, request, m.RequestsRepeated(1))
    assert bench.values(peer) == [b"a"]
    bench.get(other)
    bench.write()
    assert bench.values(other) == [b"b"]


def test_an_item_comes_again_to_the_same_session_after_a_restart() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    request = bench.get(peer)
    bench.write()
    bench = bench.restarted()
    other = bench.connect(session=b"x" * 16)
    bench.get(other, count=5)
    bench.write()
    assert bench.values(other) == [b"b"]
    peer = bench.connect(session=(1).to_bytes(16, "big"))
    bench.frame(peer, request, m.RequestsRepeated(1))
    assert bench.values(peer) == [b"a"]


def test_an_item_goes_to_somebody_else_when_its_client_is_lost_for_good() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    other = bench.connect()
    bench.get(peer)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.lose(peer)
    bench.later(CLIENT_GRACE_S - 1)
    assert bench.length(other) == 1
    bench.later(2)
    bench.get(other, count=2)
    bench.write()
    assert bench.values(other) == [b"a", b"b"], "in its old place"


def test_an_answer_that_is_not_asked_for_again_was_received() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    bench.get(peer)
    bench.write()
    assert bench.values(peer) == [b"a"]
    bench.lose(peer)  # and with the connection the news that the answer had arrived
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(peer, m.RequestsRepeated(0))
    bench.later(2 * CLIENT_GRACE_S)
    assert bench.length(peer) == 0
    bench.clean()


def test_a_waiting_get_is_forgotten_with_its_connection() -> None:
    bench, peer = bench_with_queue()
    other = bench.connect()
    bench.get(other)
    bench.lose(other)
    bench.put_stored(peer, b"a")
    assert bench.length(peer) == 1


def test_a_cancelled_wait_ends_with_nothing() -> None:
    bench, peer = bench_with_queue()
    request = bench.get(peer)
    bench.frame(peer, m.CancelRequest(bench.next(), request.request_id, False))
    assert bench.answer(peer).number == 1
    bench.put_stored(peer, b"a")
    assert bench.length(peer) == 1


def test_a_cancel_that_comes_too_late_says_so_and_changes_nothing() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    request = bench.get(peer)
    bench.frame(peer, m.CancelRequest(bench.next(), request.request_id, False))
    assert bench.answer(peer).number == 0
    bench.write()
    assert bench.values(peer) == [b"a"]


def test_an_abandoned_get_gives_its_item_back_at_any_moment() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    request = bench.get(peer)
    bench.frame(peer, m.CancelRequest(bench.next(), request.request_id, True))
    bench.write()
    assert bench.answer(peer).number == 1, "and no item to somebody who does not want it"
    request = bench.get(peer)
    bench.write()
    assert bench.values(peer) == [b"a"]
    bench.frame(peer, m.CancelRequest(bench.next(), request.request_id, True))
    bench.answer(peer)
    assert bench.length(peer) == 1
    bench = bench.restarted()
    other = bench.connect(session=b"x" * 16)
    bench.later(2 * CLIENT_GRACE_S)
    assert bench.length(other) == 1


def test_an_item_that_was_given_back_belongs_to_its_next_taker_after_a_restart() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    first = bench.get(peer)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.frame(peer, m.CancelRequest(bench.next(), first.request_id, True))
    bench.answer(peer)
    other = bench.connect()
    second = bench.get(other)
    stores = [order for order in bench.orders if isinstance(order, Store)]
    bench.write()
    assert bench.values(other) == [b"a"]
    # The receipt of the first get is still there, as if a full disk had kept it.
    for record in [record for store in stores for record in store.records]:
        assert not isinstance(record, m.QueueItem)
    old = m.Receipt(OBJECT, (1).to_bytes(16, "big"), first.request_id, b"", [], 0, b"", b"")
    newer = next(r for r in bench.disk.values() if isinstance(r, m.Receipt))
    old.items = list(newer.items)
    bench.disk = {(OBJECT, b"o"): bench.disk[OBJECT, b"o"], (OBJECT, b"first"): old, **bench.disk}
    bench = bench.restarted()
    peer = bench.connect(session=(1).to_bytes(16, "big"))
    other = bench.connect(session=(2).to_bytes(16, "big"))
    bench.frame(peer, first)
    bench.frame(other, second)
    assert bench.values(other) == [b"a"]
    assert not bench.take_all(m.ObjectAnswer, peer)


def test_peeking_leaves_items_and_waits_for_new_ones() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    bench.put(peer, b"a", b"b")
    bench.answer(peer)
    reader = bench.connect()
    bench.frame(reader, m.QueuePeek(1, OBJECT, b"", 0, 10, True))
    answer = bench.answer(reader)
    assert split(answer.lengths, answer.payload) == [b"a", b"b"]
    bench.frame(reader, m.QueuePeek(2, OBJECT, b"", answer.number, 10, False))
    bench.answer(reader, "empty")
    bench.frame(reader, m.QueuePeek(3, OBJECT, b"", answer.number, 10, True))
    getter = bench.connect()
    bench.get(getter, count=2)
    bench.answer(getter)
    bench.get(getter)
    bench.put(peer, b"c")
    bench.answer(peer)
    assert bench.values(reader) == [b"c"], "also when somebody takes it at once"
    assert bench.values(getter) == [b"c"]


def test_clear_makes_room_and_survives_a_restart() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    bench.put_stored(peer, b"c", key=b"p")
    bench.act(peer, m.Action.CLEAR)
    bench.write()
    bench.answer(peer)
    bench = bench.restarted()
    peer = bench.connect(session=b"x" * 16)
    bench.act(peer, m.Action.LEN_TOTAL)
    assert bench.answer(peer).number == 1
    bench.act(peer, m.Action.CLEAR_ALL)
    bench.write()
    bench.answer(peer)
    assert not [r for r in bench.disk.values() if isinstance(r, m.QueueItem)]


def test_a_clear_that_cannot_be_written_clears_nothing() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    bench.act(peer, m.Action.CLEAR)
    bench.refuse_writes()
    bench.answer(peer, "store")
    assert bench.length(peer) == 2


def test_a_partition_expires_some_time_after_its_last_put_over_restarts() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", ttl_s=100)
    bench.later(90)
    bench.put_stored(peer, b"b", ttl_s=100)
    bench.later(90)
    assert bench.length(peer) == 2
    bench = bench.restarted()
    peer = bench.connect(session=b"x" * 16)
    bench.later(5)
    assert bench.length(peer) == 2
    bench.later(10)
    assert bench.length(peer) == 0
    bench.clean()


def test_values_beyond_the_memory_of_the_scheduler_are_refused() -> None:
    bench, peer = bench_with_queue()
    bench.core.state.objects.size_bytes += OBJECTS_SIZE_BYTES_MAX
    message = m.QueuePut(bench.next(), OBJECT, b"", DAY_S, True, *table([b"x"]))
    bench.core.handle(_from(peer, message), bench.now)
    bench.core.state.objects.size_bytes -= OBJECTS_SIZE_BYTES_MAX
    bench.tell()
    bench.answer(peer, "exhausted")
    bench.clean()


def test_a_container_that_waits_gets_its_item_with_its_core() -> None:
    bench = ObjectBench()
    worker, client = bench.worker(cpu=1.0), bench.client(f={}, g={})
    bench.make(client)
    bench.open(client, "f", count=1)
    lease = bench.started_lease(worker)
    nested = bench.connect("nested", container_id=lease.container_id, worker=worker)
    request = bench.get(nested)
    bench.frame(nested, m.SessionWaits(0))
    (container,) = bench.core.snapshot()["containers"]
    assert (container["state"], container["waits"]) == ("waiting", "queue 'q'")
    bench.open(client, "g", call=2, count=1)
    other = bench.started_lease(worker)
    bench.put(client, b"a")
    bench.write()
    bench.answer(client)
    assert not bench.take_all(m.ObjectAnswer, nested), "the core is somebody else's"
    bench.finish(worker, other)
    assert bench.values(nested) == [b"a"]
    bench.confirm(nested, request)
    bench.forget(m.Outputs, m.OutputsAck)


def test_an_item_comes_back_at_once_when_its_container_dies() -> None:
    bench = ObjectBench()
    worker, client = bench.worker(), bench.client(f={})
    bench.make(client)
    bench.open(client, "f", count=1)
    lease = bench.started_lease(worker)
    nested = bench.connect("nested", container_id=lease.container_id, worker=worker)
    bench.put_stored(client, b"a")
    bench.get(nested)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.lose(nested)
    assert bench.length(client) == 0
    exited = m.ContainerExited(lease.container_id, "crash", (lease.lease_id, 0), {}, b"")
    bench.frame(worker, exited)
    assert bench.length(client) == 1


# --- dicts ---------------------------------------------------------------------------------------


def test_an_entry_is_read_as_it_was_written_also_after_a_restart() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"k", b"1")
    bench.look(peer, b"k")
    assert bench.answer(peer).number == 0, "it is not on disk yet"
    bench.write()
    assert bench.answer(peer).number == 1
    bench.set(peer, b"k", b"2")
    bench.write()
    bench.answer(peer)
    bench = bench.restarted()
    peer = bench.connect(session=b"x" * 16)
    bench.look(peer, b"k")
    assert bench.values(peer) == [b"2"]


def test_of_two_who_put_a_missing_key_at_once_one_wins() -> None:
    bench, peer = bench_with_dict()
    other = bench.connect()
    bench.set(peer, b"lock", b"mine", if_missing=True)
    bench.set(other, b"lock", b"his", if_missing=True)
    bench.write()
    assert bench.answer(peer).number == 1
    assert bench.answer(other).number == 0
    bench.look(peer, b"lock")
    assert bench.values(peer) == [b"mine"]


def test_a_lock_that_could_not_be_written_goes_to_the_next() -> None:
    bench, peer = bench_with_dict()
    other = bench.connect()
    bench.set(peer, b"lock", b"mine", if_missing=True)
    bench.set(other, b"lock", b"his", if_missing=True)
    bench.refuse_writes()
    bench.answer(peer, "store")
    bench.write()
    assert bench.answer(other).number == 1


def test_a_repeated_lock_is_still_held_by_who_has_it() -> None:
    bench, peer = bench_with_dict()
    request = bench.set(peer, b"lock", b"mine", if_missing=True)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench = bench.restarted()
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(peer, request)
    assert bench.answer(peer).number == 1


def test_a_repeated_pop_gives_the_same_value_after_a_restart() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"k", b"1")
    bench.write()
    bench.answer(peer)
    request = bench.look(peer, b"k", m.Look.POP)
    bench.write()
    assert bench.values(peer) == [b"1"]
    bench = bench.restarted()
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(peer, request)
    assert bench.values(peer) == [b"1"]
    bench.look(peer, b"k", m.Look.CONTAINS)
    assert bench.answer(peer).number == 0


def test_a_clear_waits_for_changes_and_changes_wait_for_it() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"a", b"1")
    bench.act(peer, m.Action.CLEAR)
    bench.set(peer, b"b", b"2")
    bench.write()
    assert len(bench.take_all(m.ObjectAnswer, peer)) == 3
    bench.frame(peer, m.DictScan(bench.next(), OBJECT, 0, True, True))
    assert bench.values(peer) == [b"b", b"2"]


def test_changes_of_different_keys_go_to_disk_together() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"a", b"1")
    bench.set(peer, b"b", b"2")
    assert len(bench.store()) == 2
    assert len(bench.take_all(m.ObjectAnswer, peer)) == 2


def test_a_scan_goes_through_all_entries_in_pages() -> None:
    bench, peer = bench_with_dict()
    for number in range(5):
        bench.set(peer, b"k%d" % number, bytes([number]) * 600_000)
    bench.write()
    bench.forget(m.ObjectAnswer)
    seen, after, pages = [], 0, 0
    while True:
        bench.frame(peer, m.DictScan(bench.next(), OBJECT, after, True, True))
        answer = bench.answer(peer)
        if not answer.lengths:
            break
        pages += 1
        after = answer.number
        seen += split(answer.lengths, answer.payload)[::2]
    assert seen == [b"k0", b"k1", b"k2", b"k3", b"k4"]
    assert pages == 5


def test_an_entry_that_nobody_uses_expires() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"used", b"1")
    bench.set(peer, b"unused", b"2")
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.frame(peer, m.RequestsDone([(0, 100)]))
    bench.later(DICT_ENTRY_RETENTION_S / 2)
    bench.look(peer, b"used")
    bench.answer(peer)
    bench.later(DICT_ENTRY_RETENTION_S / 2 + 3600)
    assert bench.length(peer) == 1
    bench.look(peer, b"used")
    assert bench.answer(peer).number == 1
    bench.write()
    assert len(bench.disk) == 2


def test_a_request_of_the_other_type_is_refused() -> None:
    bench, peer = bench_with_dict()
    bench.get(peer)
    bench.answer(peer, "invalid")
    bench.clean()


def _from(peer: int, message: m.Message) -> Any:
    from fanout_scheduler.core.events import FrameReceived

    return FrameReceived(PeerId(peer), message)


def test_answers_go_only_to_who_asked() -> None:
    bench, peer = bench_with_queue()
    bench.connect()
    bench.put(peer, b"a")
    bench.write()
    sends = [order for order in bench.orders if isinstance(order, Send)]
    assert [send.peer_id for send in sends] == [peer]
