"""Queues and dicts at their limits: sizes, pages, counts, and what is said when one is passed."""

from __future__ import annotations

import pytest

from fanout.config import CLIENT_GRACE_S
from fanout.protocol import messages as m
from fanout_scheduler.core import dicts, object_requests, objects, queues
from fanout_scheduler.core.events import ForgetObject, ForgetRecord, Store, Stored, StoreFailed
from fanout_scheduler.core.object_requests import split
from fanout_scheduler.core.object_state import OVERHEAD_BYTES, item_key
from tests.core_kit import table
from tests.object_kit import DAY_S, OBJECT, ObjectBench, bench_with_dict, bench_with_queue

KEY_MAX = b"k" * m.DICT_KEY_SIZE_MAX


def refused(bench: ObjectBench, peer: int, code: str, words: str) -> None:
    """The request was refused with this, and has left nothing."""
    answer = bench.answer(peer, code)
    assert answer.request_id == bench.request_id
    assert words in answer.info[0]
    bench.clean()


def leave_room(monkeypatch: pytest.MonkeyPatch, bench: ObjectBench, size_bytes: int) -> None:
    """Have the scheduler's memory hold so many more bytes of queues and dicts."""
    limit = bench.core.state.objects.size_bytes + size_bytes
    monkeypatch.setattr(object_requests, "OBJECTS_SIZE_BYTES_MAX", limit)


# --- dicts: keys and sizes ------------------------------------------------------------------------


def test_a_key_has_a_largest_size_and_a_smallest() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, KEY_MAX, b"1")
    bench.set(peer, b"k", b"2")
    bench.write()
    assert [answer.code for answer in bench.take_all(m.ObjectAnswer)] == ["ok", "ok"]
    for key in (KEY_MAX, b"k"):
        bench.look(peer, key)
        assert bench.answer(peer).number == 1
    bench.frame(peer, m.RequestsDone([(0, 9)]))
    bench.act(peer, m.Action.CLEAR)
    bench.write()
    bench.answer(peer)
    bench.frame(peer, m.RequestsDone([(0, 9)]))
    for key in (KEY_MAX + b"k", b""):
        words = f"a key is at most {m.DICT_KEY_SIZE_MAX} bytes"
        bench.look(peer, key)
        refused(bench, peer, "size", words)
        bench.set(peer, key, b"1")
        refused(bench, peer, "size", words)
    message = m.DictPut(bench.next(), OBJECT, False, *table([b"k", b"v", b"without value"]))
    bench.frame(peer, message)
    refused(bench, peer, "size", "a key is at most")


def test_a_put_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicts, "OBJECT_REQUEST_SIZE_BYTES_MAX", 10)
    bench, peer = bench_with_dict()
    bench.set(peer, b"k", b"123456789")
    bench.write()
    bench.answer(peer)
    bench.act(peer, m.Action.CLEAR)
    bench.write()
    bench.answer(peer)
    bench.frame(peer, m.RequestsDone([(0, 9)]))
    bench.set(peer, b"k", b"1234567890")
    refused(bench, peer, "size", "the entries are over the limit of a request")


def test_entries_for_which_there_is_no_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, peer = bench_with_dict()
    lengths, payload = table([b"a", b"1", b"b", b"2"])
    leave_room(monkeypatch, bench, 2 * OVERHEAD_BYTES + 3)
    bench.frame(peer, m.DictPut(bench.next(), OBJECT, False, lengths, payload))
    refused(bench, peer, "exhausted", "hold 0 MiB in the scheduler's memory, of 0 MiB")
    leave_room(monkeypatch, bench, 2 * OVERHEAD_BYTES + 4)
    bench.frame(peer, m.DictPut(bench.next(), OBJECT, False, lengths, payload))
    bench.write()
    assert bench.answer(peer).number == 2


def test_a_put_of_nothing_and_changes_of_what_is_not_there_are_done_at_once() -> None:
    bench, peer = bench_with_dict()
    bench.frame(peer, m.DictPut(bench.next(), OBJECT, False, b"", b""))
    assert (bench.answer(peer).number, bench.request_id) == (0, 2)
    bench.look(peer, b"k", m.Look.POP)
    assert bench.answer(peer).number == 0
    bench.act(peer, m.Action.CLEAR)
    assert bench.answer(peer).number == 0
    bench.clean()


def test_asking_whether_a_key_is_there_does_not_fetch_its_value() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"k", b"value")
    bench.write()
    bench.answer(peer)
    bench.look(peer, b"k", m.Look.CONTAINS)
    answer = bench.answer(peer)
    assert (answer.number, answer.lengths, bytes(answer.payload)) == (1, b"", b"")


def test_of_a_put_of_several_those_that_are_missing_are_made_and_counted() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"b", b"old")
    bench.write()
    bench.answer(peer)
    entries = [b"a", b"1", b"b", b"2", b"c", b"3", b"a", b"4"]
    bench.frame(peer, m.DictPut(bench.next(), OBJECT, True, *table(entries)))
    bench.write()
    assert bench.answer(peer).number == 2
    bench.frame(peer, m.DictScan(bench.next(), OBJECT, 0, True, True))
    assert bench.values(peer) == [b"b", b"old", b"a", b"4", b"c", b"3"]


def test_a_change_of_several_keys_waits_for_each_of_them() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"b", b"1")
    bench.frame(peer, m.DictPut(bench.next(), OBJECT, False, *table([b"a", b"2", b"b", b"2"])))
    bench.set(peer, b"a", b"3")
    (first,) = bench.store()
    assert isinstance(first.records[1], m.DictEntry)
    assert (first.records[1].key, bytes(first.records[1].payload)) == (b"b", b"1")
    bench.write()
    assert len(bench.take_all(m.ObjectAnswer)) == 3
    bench.frame(peer, m.DictScan(bench.next(), OBJECT, 0, True, True))
    assert bench.values(peer) == [b"b", b"2", b"a", b"3"]


def test_an_entry_keeps_its_place_when_it_is_written_again_also_over_a_restart() -> None:
    bench, peer = bench_with_dict()
    for key, value in ((b"a", b"1"), (b"b", b"2"), (b"c", b"3"), (b"b", b"4"), (b"a", b"5")):
        bench.set(peer, key, value)
        bench.write()
    bench.forget(m.ObjectAnswer)
    seen = []
    for _ in range(2):
        bench.frame(peer, m.DictScan(bench.next(), OBJECT, 0, True, True))
        seen.append(bench.values(peer))
        bench = bench.restarted()
        peer = bench.connect(session=b"x" * 16)
    assert seen == [[b"a", b"5", b"b", b"4", b"c", b"3"]] * 2


def test_pages_of_a_scan_end_at_a_size_and_at_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicts, "PAGE_SIZE_BYTES_MAX", 20)
    monkeypatch.setattr(dicts, "PAGE_ENTRIES_MAX", 3)
    bench, peer = bench_with_dict()
    sizes = [1, 7, 9, 1, 1, 1, 1, 50, 1]
    for number, size in enumerate(sizes):
        bench.set(peer, b"%d" % number, b"v" * size)
    bench.write()
    bench.forget(m.ObjectAnswer)

    def pages(has_keys: bool, has_values: bool) -> list[list[bytes]]:
        found: list[list[bytes]] = []
        after = 0
        while True:
            bench.frame(peer, m.DictScan(bench.next(), OBJECT, after, has_keys, has_values))
            answer = bench.answer(peer)
            if not answer.number:
                return found
            found.append(split(answer.lengths, answer.payload))
            after = answer.number

    keys = [b"%d" % number for number in range(9)]
    assert pages(True, False) == [keys[:3], keys[3:6], keys[6:]]
    shown = [[len(value) for value in page] for page in pages(False, True)]
    assert shown == [[1, 7, 9], [1, 1, 1], [1], [50], [1]]
    # 2 + 8 + 10 bytes are a page's limit, and one that is larger by itself stands alone.
    assert [page[::2] for page in pages(True, True)] == [
        keys[:3], keys[3:6], keys[6:7], keys[7:8], keys[8:],
    ]  # fmt: skip


def test_a_change_that_waits_can_be_cancelled() -> None:
    bench, peer = bench_with_dict()
    other = bench.connect()
    bench.set(peer, b"k", b"1")
    waits = bench.set(other, b"k", b"2")
    bench.frame(other, m.CancelRequest(bench.next(), waits.request_id, False))
    assert bench.answer(other).number == 1
    bench.set(other, b"k", b"3", if_missing=True)
    bench.lose(other)
    bench.write()
    bench.answer(peer)
    bench.look(peer, b"k")
    assert bench.values(peer) == [b"1"]


def test_changes_that_wait_at_a_deleted_dict_are_told_so() -> None:
    bench, peer = bench_with_dict()
    bench.set(peer, b"k", b"1")
    first = bench.request_id
    bench.act(peer, m.Action.DELETE)
    waiting = bench.connect()
    bench.set(waiting, b"k", b"2")
    (one, two) = bench.store()
    for record in [*one.records, *two.records]:
        bench.apply(record)
    answers = {answer.request_id: answer for answer in bench.take_all(m.ObjectAnswer, peer)}
    assert {number: answer.code for number, answer in answers.items()} == {
        first: "ok", first + 1: "ok",
    }  # fmt: skip
    bench.write()
    assert "dict 'q' has been deleted" in bench.answer(waiting, "missing").info[0]
    bench.write()
    assert not bench.disk
    assert bench.core.state.objects.size_bytes == 0


def test_a_popped_value_is_held_until_its_client_has_it() -> None:
    bench, peer = bench_with_dict()
    size_bytes = bench.core.state.objects.size_bytes
    bench.set(peer, b"k", b"v" * 100)
    bench.write()
    bench.answer(peer)
    bench.frame(peer, m.RequestsDone([(0, 9)]))
    request = bench.look(peer, b"k", m.Look.POP)
    bench.write()
    bench.answer(peer)
    assert bench.core.state.objects.size_bytes == size_bytes + 100
    bench.confirm(peer, request)
    assert bench.core.state.objects.size_bytes == size_bytes
    bench.clean()


# --- queues: sizes and pages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "value", "code", "words"),
    [
        ("QUEUE_PARTITION_ITEMS_MAX", 1, "size", "items of a put are over the limits"),
        ("QUEUE_ITEM_SIZE_BYTES_MAX", 2, "size", "items of a put are over the limits"),
        ("QUEUE_PARTITIONS_MAX", 0, "exhausted", "queue 'q' has 0 partitions, the limit"),
    ],
)
def test_a_put_beyond_a_limit_is_refused(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, code: str, words: str
) -> None:
    bench, peer = bench_with_queue()
    monkeypatch.setattr(queues, limit, value)
    bench.put(peer, b"abc", b"d")
    refused(bench, peer, code, words)


def test_a_put_at_its_limits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, peer = bench_with_queue()
    monkeypatch.setattr(queues, "QUEUE_PARTITION_ITEMS_MAX", 2)
    monkeypatch.setattr(queues, "QUEUE_ITEM_SIZE_BYTES_MAX", 3)
    monkeypatch.setattr(queues, "QUEUE_PARTITIONS_MAX", 1)
    bench.put_stored(peer, b"abc", b"d")
    bench.put(peer, b"x", key=b"other")
    bench.answer(peer, "exhausted")
    bench.put(peer, b"x")
    assert bench.answer(peer, "full").info == ["queue 'q' has no room for 1 items"]
    get = bench.get(peer, count=9)
    bench.write()
    assert bench.values(peer) == [b"abc", b"d"]
    bench.confirm(peer, get)
    bench.put(peer, b"x", key=b"other")
    bench.write()
    bench.answer(peer)


def test_nothing_may_be_put_and_got() -> None:
    bench, peer = bench_with_queue()
    bench.put(peer)
    assert bench.answer(peer).request_id == bench.request_id
    bench.get(peer, count=0)
    assert bench.answer(peer).request_id == bench.request_id
    assert not bench.core.state.objects.by_id[OBJECT].partitions
    bench.clean()


def test_items_for_which_there_is_no_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, *[b"x" * (1 << 20)] * 3)
    leave_room(monkeypatch, bench, 2 * OVERHEAD_BYTES + 1)
    bench.put(peer, b"a", b"b")
    assert (
        "hold 3 MiB in the scheduler's memory, of 3 MiB" in bench.answer(peer, "exhausted").info[0]
    )
    leave_room(monkeypatch, bench, 2 * OVERHEAD_BYTES + 2)
    bench.put_stored(peer, b"a", b"b")


def test_a_get_ends_at_the_size_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "OBJECT_REQUEST_SIZE_BYTES_MAX", 10)
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a" * 4, b"b" * 6, b"c", b"d" * 11, b"e", b"f" * 9, b"g")
    taken = []
    while bench.length(peer):
        request = bench.get(peer, count=100)
        bench.write()
        taken.append(bench.values(peer))
        bench.confirm(peer, request)
    lengths = [[len(value) for value in values] for values in taken]
    assert lengths == [[4, 6], [1], [11], [1, 9], [1]]
    bench.clean()


def test_a_peek_ends_at_a_size_and_at_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "PEEK_SIZE_BYTES_MAX", 10)
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a" * 4, b"b" * 6, b"c", b"d" * 11, b"e", b"f", b"g", b"h")
    seen, after = [], 0
    while True:
        bench.frame(peer, m.QueuePeek(bench.next(), OBJECT, b"", after, 3, False))
        (answer,) = bench.take_all(m.ObjectAnswer, peer)
        if answer.code == "empty":
            assert answer.info == ["queue 'q' has nothing new"]
            break
        seen.append([len(value) for value in split(answer.lengths, answer.payload)])
        after = answer.number
    assert seen == [[4, 6], [1], [11], [1, 1, 1], [1]]
    assert bench.length(peer) == 8
    assert not bench.core.state.objects.clients


def test_a_queue_says_that_it_is_empty() -> None:
    bench, peer = bench_with_queue()
    bench.get(peer, block=False)
    assert bench.answer(peer, "empty").info == ["queue 'q' is empty"]
    assert not bench.core.state.objects.by_id[OBJECT].partitions


def test_two_puts_on_their_way_to_disk_have_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "QUEUE_PARTITION_ITEMS_MAX", 3)
    bench, peer = bench_with_queue()
    bench.put(peer, b"a", b"b")
    bench.put(peer, b"c")
    bench.put(peer, b"d")
    bench.answer(peer, "full")
    bench.refuse_writes()
    assert [answer.code for answer in bench.take_all(m.ObjectAnswer)] == ["store", "store"]
    bench.put_stored(peer, b"d", b"e", b"f")
    assert bench.length(peer) == 3


def test_items_that_somebody_gives_back_to_a_deleted_queue_are_gone() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b")
    other = bench.connect()
    bench.get(other)
    bench.act(peer, m.Action.DELETE)
    get, delete = bench.store()
    for record in [*get.records, *delete.records]:
        bench.apply(record)
    bench.forget(m.ObjectAnswer)
    bench.lose(other)
    bench.later(2 * CLIENT_GRACE_S)
    bench.write()
    assert not bench.disk
    assert bench.core.state.objects.size_bytes == 0
    bench.put(peer, b"c")
    bench.answer(peer, "missing")
    bench.clean()


@pytest.mark.parametrize("is_written", [True, False])
def test_a_get_behind_a_deletion_leaves_no_memory_behind(is_written: bool) -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    bench.act(peer, m.Action.DELETE)
    bench.get(bench.connect())
    delete, get = bench.take_commands(Store)
    number = get.sequence
    end = Stored(number) if is_written else StoreFailed(number, "disk full")
    bench.tell(Stored(delete.sequence), end)
    codes = sorted(answer.code for answer in bench.take_all(m.ObjectAnswer))
    assert codes == (["missing", "ok"] if is_written else ["ok", "store"])
    assert bench.core.state.objects.size_bytes == 0
    assert not bench.core.state.objects.clients


def test_an_expired_partition_frees_memory_and_disk_and_lets_in_who_waits() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    size_bytes = bench.core.state.objects.size_bytes
    bench.put(peer, b"a", b"b", ttl_s=10)
    bench.answer(peer)
    bench.put(peer, b"c", ttl_s=5, key=b"p")
    bench.answer(peer)
    bench.later(6)
    assert (bench.length(peer), len(bench.core.state.objects.by_id[OBJECT].partitions)) == (2, 1)
    bench.later(5)
    assert bench.length(peer) == 0
    assert bench.core.state.objects.size_bytes == size_bytes
    assert not bench.core.state.objects.by_id[OBJECT].partitions
    assert bench.store() == [], "nothing of it was on disk"


def test_items_of_a_stored_queue_expire_on_disk_too() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", ttl_s=10)
    (partition,) = bench.core.state.objects.by_id[OBJECT].partitions.values()
    number = partition.items[0].number
    bench.later(11)
    (store,) = bench.store()
    assert store.records == [ForgetRecord(OBJECT, item_key(number))]


def test_the_deadline_of_a_deleted_queue_means_nothing() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    bench.put(peer, b"a", ttl_s=10)
    bench.answer(peer)
    bench.act(peer, m.Action.DELETE)
    bench.answer(peer)
    bench.later(11)
    bench.clean()
    assert bench.core.state.objects.size_bytes == 0


# --- finding and making ---------------------------------------------------------------------------


def open_as(bench: ObjectBench, peer: int, kind: int, name: str, mode: int, number: int) -> None:
    bench.frame(peer, m.OpenObject(bench.next(), bytes([number]) * 16, kind, name, mode))


def test_an_object_is_found_by_its_name_and_by_its_id() -> None:
    bench, peer = bench_with_queue()
    made_at = bench.core.state.objects.by_id[OBJECT].made_at
    for mode, name in ((m.OpenMode.FIND, "q"), (m.OpenMode.BY_ID, ""), (m.OpenMode.MAKE, "q")):
        bench.frame(peer, m.OpenObject(bench.next(), OBJECT, 1, name, mode))
        answer = bench.answer(peer)
        assert (answer.request_id, answer.info) == (bench.request_id, [OBJECT, "q", made_at])
    bench.clean()


def test_an_object_that_is_not_there_is_said_to_be_missing() -> None:
    bench, peer = bench_with_queue()
    open_as(bench, peer, 2, "q", m.OpenMode.FIND, 7)
    words = "there is no dict named 'q'; make it with create_if_missing=True"
    assert bench.answer(peer, "missing").info == [words]
    open_as(bench, peer, 1, "", m.OpenMode.BY_ID, 7)
    refused(bench, peer, "missing", "there is no queue or dict of id " + "07" * 16)
    open_as(bench, peer, 1, "q", m.OpenMode.MAKE, 7)
    assert bench.answer(peer, "exists").info == ["there is a queue 'q' already"]
    open_as(bench, peer, 1, "", m.OpenMode.MAKE, 7)
    assert bench.answer(peer, "invalid").info == ["a name is not empty"]
    bench.frame(peer, m.OpenObject(bench.next(), OBJECT, 2, "", m.OpenMode.BY_ID))
    words = "a OpenObject means nothing to queue 'q'"
    assert bench.answer(peer, "invalid").info == [words]
    bench.frame(peer, m.DictGet(bench.next(), OBJECT, m.Look.GET, b"k"))
    assert bench.answer(peer, "invalid").info == ["a DictGet means nothing to queue 'q'"]


def test_a_deletion_that_was_done_already_is_done() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    for _ in range(2):
        bench.act(peer, m.Action.DELETE)
        answer = bench.answer(peer)
        assert (answer.request_id, answer.number) == (bench.request_id, 0)
    bench.act(peer, m.Action.LEN)
    refused(bench, peer, "missing", "it was deleted, or it was ephemeral and ended with its client")


def test_a_deletion_that_cannot_be_written_deletes_nothing() -> None:
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a")
    bench.act(peer, m.Action.DELETE)
    bench.refuse_writes()
    answer = bench.answer(peer, "store")
    assert answer.info == ["queue 'q' could not be deleted: disk full"]
    assert bench.length(peer) == 1


def test_an_object_for_which_there_is_no_memory_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = ObjectBench()
    peer = bench.connect()
    leave_room(monkeypatch, bench, OVERHEAD_BYTES - 1)
    open_as(bench, peer, 1, "q", m.OpenMode.MAKE, 7)
    refused(bench, peer, "exhausted", "MiB in the scheduler's memory")
    leave_room(monkeypatch, bench, OVERHEAD_BYTES)
    open_as(bench, peer, 1, "q", m.OpenMode.MAKE, 7)
    bench.write()
    bench.answer(peer)


def test_an_object_that_was_not_written_says_so_to_all_who_wait_for_it() -> None:
    bench = ObjectBench()
    one, two = bench.connect(), bench.connect()
    open_as(bench, one, 1, "q", m.OpenMode.MAKE_IF_MISSING, 7)
    open_as(bench, two, 1, "q", m.OpenMode.FIND, 8)
    bench.refuse_writes()
    for peer, number in ((one, 1), (two, 2)):
        answer = bench.answer(peer, "store")
        assert answer.request_id == number
        assert answer.info == ["queue 'q' was not made: disk full"]
    bench.clean()


def test_a_name_is_in_no_list_before_it_is_on_disk() -> None:
    bench, peer = bench_with_queue()
    open_as(bench, peer, 1, "r", m.OpenMode.MAKE, 7)
    bench.frame(peer, m.ListObjects(bench.next(), 1, ""))
    answer = bench.answer(peer)
    assert answer.request_id == bench.request_id
    assert [row[:2] for row in answer.info] == [[OBJECT, "q"]]
    assert answer.info[0][2] == bench.core.state.objects.by_id[OBJECT].made_at
    bench.frame(peer, m.ListObjects(bench.next(), 2, ""))
    assert bench.answer(peer).info == []


def test_a_list_of_objects_has_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "LIST_COUNT_MAX", 2)
    bench = ObjectBench()
    peer = bench.connect()
    for number, name in enumerate("cab"):
        open_as(bench, peer, 1, name, m.OpenMode.MAKE, number)
    bench.write()
    bench.forget(m.ObjectAnswer)
    pages = []
    for after in ("", "b", "c"):
        bench.frame(peer, m.ListObjects(bench.next(), 1, after))
        pages.append([row[1] for row in bench.answer(peer).info])
    assert pages == [["a", "b"], ["c"], []]


def test_a_deleted_name_can_be_given_again() -> None:
    bench, peer = bench_with_queue()
    bench.act(peer, m.Action.DELETE)
    bench.write()
    bench.answer(peer)
    open_as(bench, peer, 1, "q", m.OpenMode.MAKE, 7)
    bench.write()
    assert bench.answer(peer).info[0] == b"\7" * 16


def test_an_ephemeral_object_is_nobodys_by_name() -> None:
    bench, peer = bench_with_queue(is_ephemeral=True)
    assert not bench.core.state.objects.by_name
    bench.frame(peer, m.OpenObject(bench.next(), OBJECT, 1, "", m.OpenMode.EPHEMERAL))
    assert bench.answer(peer).info[:2] == [OBJECT, ""]
    bench.act(peer, m.Action.DELETE)
    bench.answer(peer)
    assert not bench.core.state.objects.ephemeral
    bench.lose(peer)
    assert not bench.core.state.sessions, "nothing is left that could be waited for"


# --- who has asked --------------------------------------------------------------------------------


def test_confirmations_concern_the_requests_that_they_name() -> None:
    bench, peer = bench_with_queue()
    requests = [bench.put(peer, b"x") for _ in range(6)]
    bench.write()
    bench.forget(m.ObjectAnswer)
    first = requests[0].request_id
    client = next(iter(bench.core.state.objects.clients.values()))
    bench.frame(peer, m.RequestsDone([(first + 1, 2)]))
    assert sorted(client.requests) == [first, first + 3, first + 4, first + 5]
    bench.frame(peer, m.RequestsDone([(first - 100, 100)]))
    assert sorted(client.requests) == [first, first + 3, first + 4, first + 5]
    bench.frame(peer, m.RequestsDone([(first - 99, 100), (first + 5, 1000)]))
    assert sorted(client.requests) == [first + 3, first + 4]
    stranger = bench.connect()
    bench.frame(stranger, m.RequestsDone([(0, 1000)]), m.RequestsRepeated(0))
    assert sorted(client.requests) == [first + 3, first + 4]


def test_a_wait_cannot_be_confirmed() -> None:
    bench, peer = bench_with_queue()
    request = bench.get(peer)
    bench.confirm(peer, request)
    other = bench.connect()
    bench.put_stored(other, b"a")
    bench.write()
    assert bench.values(peer) == [b"a"]


def test_a_client_is_told_its_limit_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "REQUESTS_MAX", 1)
    bench, peer = bench_with_queue()
    bench.get(peer)
    bench.get(peer)
    answer = bench.answer(peer, "exhausted")
    assert answer.request_id == bench.request_id
    words = "this client has 1 requests under way about queues and dicts, the limit"
    assert answer.info == [words]


def test_a_repeat_of_a_request_that_waits_is_that_request() -> None:
    bench, peer = bench_with_queue()
    request = bench.get(peer)
    bench.frame(peer, m.QueueGet(request.request_id, OBJECT, b"", 1, True))
    bench.put_stored(bench.connect(), b"a", b"b")
    bench.write()
    assert bench.values(peer) == [b"a"]


def test_cancelling_what_is_unknown_changes_nothing() -> None:
    bench, peer = bench_with_queue()
    for is_abandoned in (False, True):
        bench.frame(peer, m.CancelRequest(bench.next(), 999, is_abandoned))
        answer = bench.answer(peer)
        assert (answer.request_id, answer.number) == (bench.request_id, 1)
    bench.clean()


def test_a_change_that_cannot_be_written_says_what_could_not() -> None:
    bench, peer = bench_with_queue()
    bench.put(peer, b"a")
    bench.refuse_writes()
    assert bench.answer(peer, "store").info == ["queue 'q' could not be changed: disk full"]


def test_a_put_of_a_lost_client_is_remembered_for_a_day_and_a_get_for_the_grace() -> None:
    bench, peer = bench_with_queue()
    bench.put(peer, b"a", b"b", ttl_s=3 * DAY_S)
    bench.write()
    bench.get(peer)
    bench.write()
    bench.forget(m.ObjectAnswer)
    bench.lose(peer)
    (client,) = bench.core.state.objects.clients.values()
    bench.later(CLIENT_GRACE_S + 1)
    assert [type(request.message) for request in client.requests.values()] == [m.QueuePut]
    bench.later(DAY_S)
    assert not bench.core.state.objects.clients
    bench.write()
    assert len(bench.disk) == 3, "the queue and its two items"


def test_receipts_of_an_object_that_is_not_there_go_at_a_restart() -> None:
    bench, peer = bench_with_queue()
    bench.put(peer, b"a")
    bench.write()
    bench.forget(m.ObjectAnswer)
    del bench.disk[OBJECT, b"o"]
    bench = bench.restarted()
    (store,) = bench.store()
    assert store.records == [ForgetObject(OBJECT)]
    assert bench.core.state.objects.size_bytes == 0
    bench.later(2 * DAY_S)
