"""Finding, making and deleting queues and dicts, and dicts themselves, in the bare core."""

from __future__ import annotations

import pytest

from fanout.config import (
    CLIENT_GRACE_S,
    DICT_ENTRY_RETENTION_S,
)
from fanout.protocol import messages as m
from fanout_scheduler.core import objects
from fanout_scheduler.core.events import ForgetRecord, Store, Stored, StoreFailed
from fanout_scheduler.core.object_requests import split
from fanout_scheduler.core.object_state import OVERHEAD_BYTES, entry_key, item_key, receipt_key
from tests.object_kit import OBJECT, ObjectBench, bench_with_dict, bench_with_queue

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
    bench.write()
    assert bench.length(peer) == 1
    bench.look(peer, b"used")
    assert bench.answer(peer).number == 1
    bench.write()
    assert len(bench.disk) == 2


def test_an_entry_that_expires_on_a_full_disk_takes_no_later_one_with_it() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"key", b"old")
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.frame(peer, m.RequestsDone([(0, 100)]))
    bench.write()
    bench.later(DICT_ENTRY_RETENTION_S + 3600)
    (removal,) = [order for order in bench.orders if isinstance(order, Store)]
    bench.orders.remove(removal)
    bench.set(peer, b"key", b"new")
    bench.tell(StoreFailed(removal.sequence, "disk full"))
    bench.later(10)
    records = [r for order in bench.orders if isinstance(order, Store) for r in order.records]
    assert any(isinstance(record, m.DictEntry) for record in records)
    assert not any(isinstance(record, ForgetRecord) for record in records)


def test_a_request_of_the_other_type_is_refused() -> None:
    bench, peer = bench_with_dict()
    bench.get(peer)
    bench.answer(peer, "invalid")
    bench.clean()


def test_a_client_has_a_limit_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "REQUESTS_MAX", 2)
    bench, peer = bench_with_queue()
    bench.get(peer)
    bench.get(peer)
    bench.get(peer)
    bench.answer(peer, "exhausted")
    bench.frame(peer, m.CancelRequest(bench.next(), bench.request_id - 3, False))
    bench.answer(peer)
    bench.get(peer)
    assert not bench.take_all(m.ObjectAnswer)


def test_an_object_without_a_name_is_not_made() -> None:
    bench = ObjectBench()
    peer = bench.connect()
    bench.frame(peer, m.OpenObject(1, OBJECT, 1, "", m.OpenMode.MAKE))
    bench.answer(peer, "invalid")
    bench.clean()


def test_what_expires_is_kept_apart_from_what_is_changed_meanwhile() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"old", b"1")
    bench.write()
    bench.later(DICT_ENTRY_RETENTION_S / 2)
    bench.set(peer, b"new", b"2")
    bench.forget(m.ObjectAnswer)
    bench.later(DICT_ENTRY_RETENTION_S / 2 + 3600)
    change, removal = bench.take_commands(Store)
    assert [type(record) for record in removal.records] == [ForgetRecord]
    other = bench.connect()
    bench.set(other, b"new", b"3", if_missing=True)
    assert bench.take_commands(Store) == [], "it waits for the change before it"
    bench.tell(Stored(change.sequence), Stored(removal.sequence))
    bench.write()
    assert bench.answer(other).number == 0
    bench.forget(m.ObjectAnswer)
    assert bench.length(peer) == 1


def test_changes_that_wait_behind_a_deletion_are_refused() -> None:
    bench, peer = bench_with_dict()
    bench.act(peer, m.Action.DELETE)
    (delete,) = bench.take_commands(Store)
    bench.set(peer, b"k", b"1")
    waiting = bench.connect()
    bench.set(waiting, b"k", b"2")
    bench.tell(Stored(delete.sequence))
    bench.answer(peer)
    assert bench.answer(waiting, "missing").info == ["dict 'q' has been deleted"]
    bench.write()
    bench.answer(peer, "missing")
    assert bench.core.state.objects.size_bytes == 0
    assert not bench.core.state.objects.clients


def test_a_repeated_pop_says_again_that_there_was_a_value() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"k", b"1")
    bench.write()
    bench.answer(peer)
    request = bench.look(peer, b"k", m.Look.POP)
    bench.write()
    bench = bench.restarted()
    peer = bench.connect(session=peer.to_bytes(16, "big"))
    bench.frame(peer, request)
    answer = bench.answer(peer)
    assert (answer.number, split(answer.lengths, answer.payload)) == (1, [b"1"])


def test_records_have_the_names_that_databases_know() -> None:
    assert item_key(258) == b"i\0\0\0\0\0\0\1\2"
    assert receipt_key(b"s" * 16, 3) == b"r" + b"s" * 16 + b"\0\0\0\0\0\0\0\3"
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
    assert entry_key(b"key").hex() == "65" + digest


def test_a_restart_counts_as_use_of_an_entry() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"k", b"value")
    bench.write()
    bench.later(DICT_ENTRY_RETENTION_S - 10)
    bench = bench.restarted()
    peer = bench.connect(session=b"x" * 16)
    bench.later(DICT_ENTRY_RETENTION_S - 10)
    assert bench.length(peer) == 1
    bench.later(3700)
    bench.write()
    assert bench.length(peer) == 0


def test_an_entry_costs_its_bytes_and_a_fixed_overhead() -> None:
    bench, peer = bench_with_dict()
    assert bench.core.state.objects.size_bytes == OVERHEAD_BYTES
    bench.set(peer, b"key", b"value")
    assert bench.core.state.objects.size_bytes == OVERHEAD_BYTES + 8
    bench.write()
    assert bench.core.state.objects.size_bytes == 2 * OVERHEAD_BYTES + 8


def test_entries_of_an_ephemeral_dict_expire_too() -> None:
    bench = ObjectBench()
    peer = bench.connect()
    bench.make(peer, kind=2, is_ephemeral=True)
    bench.set(peer, b"k", b"1")
    bench.answer(peer)
    bench.later(DICT_ENTRY_RETENTION_S + 3700)
    assert bench.length(peer) == 0
    assert bench.core.state.objects.size_bytes == OVERHEAD_BYTES
