"""Queues in the bare core: facts in, exact answers out, invariants after each step."""

from __future__ import annotations

import pytest

from fanout.config import (
    CLIENT_GRACE_S,
    OBJECTS_SIZE_BYTES_MAX,
    QUEUE_PARTITION_ITEMS_MAX,
)
from fanout.protocol import messages as m
from fanout_scheduler.core.durable import STORE_RETRY_S
from fanout_scheduler.core.events import (
    FrameReceived,
    PeerId,
    Send,
    Store,
)
from fanout_scheduler.core.object_requests import split
from fanout_scheduler.core.objects import RECEIPT_RETENTION_S
from tests.core_kit import table
from tests.object_kit import DAY_S, OBJECT, ObjectBench, bench_with_queue


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


def test_an_answer_that_is_asked_for_again_is_kept_until_it_is_acknowledged() -> None:
    bench, peer = bench_with_queue()
    session = peer.to_bytes(16, "big")
    bench.put_stored(peer, b"a")
    request = bench.get(peer)
    bench.write()
    for _ in range(3):
        assert bench.values(peer) == [b"a"]
        bench.lose(peer)
        peer = bench.connect(session=session)
        bench.frame(peer, request, m.RequestsRepeated(1))
    assert bench.values(peer) == [b"a"]
    bench.confirm(peer, request)
    bench.clean()


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
    bench.write()
    bench.answer(peer)
    assert bench.length(peer) == 1
    bench = bench.restarted()
    other = bench.connect(session=b"x" * 16)
    bench.later(2 * CLIENT_GRACE_S)
    assert bench.length(other) == 1


@pytest.mark.parametrize("is_stored", [False, True], ids=["storing", "answered"])
def test_an_abandonment_is_confirmed_only_when_a_restart_keeps_it(is_stored: bool) -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    get = bench.get(peer)
    cancel = m.CancelRequest(bench.next(), get.request_id, True)
    if is_stored:
        bench.write()
        bench.answer(peer)
        bench.frame(peer, cancel)
    else:
        bench.frame(peer, cancel)
        for record in [record for store in bench.store() for record in store.records]:
            bench.apply(record)
    assert not bench.take_all(m.ObjectAnswer, peer), "its receipt is on disk, and tells otherwise"
    bench = bench.restarted()
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(peer, cancel, m.RequestsRepeated(1))
    bench.write()
    assert bench.answer(peer).number == 1
    bench = bench.restarted()
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(peer, m.RequestsRepeated(0))
    assert bench.length(peer) == 1


def test_an_abandonment_that_a_full_disk_delays_is_confirmed_once_to_who_asks_again() -> None:
    bench, peer = bench_with_queue()
    session = peer.to_bytes(16, "big")
    bench.put_stored(peer, b"a")
    get = bench.get(peer)
    bench.write()
    bench.answer(peer)
    cancel = m.CancelRequest(bench.next(), get.request_id, True)
    bench.frame(peer, cancel)
    bench.refuse_writes()
    bench.lose(peer)
    peer = bench.connect(session=session)
    bench.frame(peer, cancel, m.RequestsRepeated(1))
    assert not bench.take_all(m.ObjectAnswer)
    bench.later(2 * STORE_RETRY_S)
    bench.write()
    assert bench.answer(peer).number == 1
    assert bench.length(peer) == 1
    assert not bench.core.state.objects.ending


def test_an_abandoned_get_that_cannot_be_written_is_confirmed() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    get = bench.get(peer)
    cancel = m.CancelRequest(bench.next(), get.request_id, True)
    bench.frame(peer, cancel)
    bench.refuse_writes()
    codes = {answer.request_id: answer.code for answer in bench.take_all(m.ObjectAnswer, peer)}
    assert codes == {get.request_id: "store", cancel.request_id: "ok"}
    assert bench.length(peer) == 1


def test_a_get_that_was_given_up_is_done_anew_when_its_receipt_is_gone() -> None:
    bench, peer = bench_with_queue()
    session = peer.to_bytes(16, "big")
    bench.put_stored(peer, b"a")
    get = bench.get(peer)
    bench.write()
    bench.answer(peer)
    bench.lose(peer)
    bench.later(2 * CLIENT_GRACE_S)
    bench.refuse_writes()  # the receipt stays
    peer = bench.connect(session=session)
    bench.frame(peer, get, m.RequestsRepeated(1))
    assert not bench.store(), "its new receipt would be taken for the old one, and removed"
    bench.later(2 * STORE_RETRY_S)
    bench.write()
    assert bench.values(peer) == [b"a"]
    bench = bench.restarted()
    peer = bench.connect(session=session)
    bench.frame(peer, get, m.RequestsRepeated(1))
    assert bench.values(peer) == [b"a"]
    bench.confirm(peer, get)
    bench.clean()


def test_a_repeat_that_waits_for_the_disk_is_forgotten_with_its_connection() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    get = bench.get(peer)
    bench.write()
    bench.answer(peer)
    bench.lose(peer)
    bench.later(2 * CLIENT_GRACE_S)
    again = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(again, get, m.RequestsRepeated(1))
    bench.lose(again)
    bench.write()
    other = bench.connect()
    assert bench.length(other) == 1
    assert not bench.core.state.objects.clients


def test_an_item_that_was_given_back_belongs_to_its_next_taker_after_a_restart() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    first = bench.get(peer)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.frame(peer, m.CancelRequest(bench.next(), first.request_id, True))
    other = bench.connect()
    second = bench.get(other)
    stores = [order for order in bench.orders if isinstance(order, Store)]
    bench.write()
    bench.answer(peer)
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
    # It is a new request, as soon as nothing on disk says that it was done.
    assert [request.request_id for request in bench.core.state.objects.ending.values()] == [
        first.request_id
    ]
    bench.put_stored(other, b"b")
    bench.write()
    assert bench.values(peer) == [b"b"]
    assert not bench.core.state.objects.ending


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
    bench.core.handle(FrameReceived(PeerId(peer), message), bench.now)
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
    exited = m.ContainerExited(lease.container_id, "crash", [(lease.lease_id, 0)], {}, b"")
    bench.frame(worker, exited)
    assert bench.length(client) == 1


def test_answers_go_only_to_who_asked() -> None:
    bench, peer = bench_with_queue()
    bench.connect()
    bench.put(peer, b"a")
    bench.write()
    sends = [order for order in bench.orders if isinstance(order, Send)]
    assert [send.peer_id for send in sends] == [peer]


def test_who_waits_for_room_is_let_in_however_room_is_made() -> None:
    for how in ("clear", "expiry", "cancel"):
        bench, peer = bench_with_queue(is_ephemeral=True)
        producer = bench.connect()
        bench.put(peer, *[b"x"] * (QUEUE_PARTITION_ITEMS_MAX - 1), ttl_s=100)
        bench.answer(peer)
        large = bench.put(producer, b"1", b"2", block=True)
        bench.put(producer, b"3", block=True)
        assert not bench.take_all(m.ObjectAnswer)
        if how == "clear":
            bench.act(peer, m.Action.CLEAR)
        elif how == "expiry":
            bench.later(101)
        else:
            bench.frame(producer, m.CancelRequest(bench.next(), large.request_id, False))
        answers = bench.take_all(m.ObjectAnswer)
        assert len(answers) == (2 if how == "expiry" else 3 - (how == "cancel"))
        bench.get(peer, count=QUEUE_PARTITION_ITEMS_MAX)
        assert bench.values(peer)[-1] == b"3"


def test_a_put_that_was_written_behind_a_deletion_leaves_nothing() -> None:
    bench, peer = bench_with_queue()
    bench.act(peer, m.Action.DELETE)
    bench.put(peer, b"abc")
    bench.write()
    assert sorted(answer.code for answer in bench.take_all(m.ObjectAnswer)) == ["missing", "ok"]
    assert bench.core.state.objects.size_bytes == 0
    assert not bench.disk
    bench.clean()


def test_an_ephemeral_queue_has_no_name_to_say() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    bench.get(peer, block=False)
    assert bench.answer(peer, "empty").info == ["ephemeral queue is empty"]


def test_an_item_that_is_given_back_after_a_restart_goes_to_its_own_partition() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", key=b"p")
    bench.get(peer, key=b"p")
    bench.write()
    bench = bench.restarted()
    other = bench.connect(session=b"x" * 16)
    bench.later(2 * CLIENT_GRACE_S)
    bench.get(other, key=b"p", block=False)
    bench.write()
    assert bench.values(other) == [b"a"]


def test_clearing_what_is_empty_is_done_at_once() -> None:
    bench, peer = bench_with_queue()
    for action in (m.Action.CLEAR, m.Action.CLEAR_ALL):
        bench.act(peer, action)
        assert bench.answer(peer).request_id == bench.request_id
    bench.clean()


def test_an_item_stays_with_a_client_that_was_back_in_time() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    request = bench.get(peer)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.lose(peer)
    bench.later(CLIENT_GRACE_S / 2)
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(peer, request, m.RequestsRepeated(1))
    assert bench.values(peer) == [b"a"]
    bench.later(2 * CLIENT_GRACE_S)
    assert bench.length(peer) == 0, "it is still its own"
    bench.confirm(peer, request)
    bench.clean()


def test_a_put_that_was_not_written_makes_room_for_the_next() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, *[b"x"] * (QUEUE_PARTITION_ITEMS_MAX - 1))
    bench.put(peer, b"a")
    other = bench.connect()
    bench.put(other, b"b", block=True)
    bench.refuse_writes()
    bench.answer(peer, "store")
    bench.write()
    bench.answer(other)
    assert bench.length(peer) == QUEUE_PARTITION_ITEMS_MAX
