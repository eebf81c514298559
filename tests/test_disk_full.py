"""The disk of the scheduler is full: what cannot be kept is refused, what was accepted is not lost,
and service goes on when there is room again, all without a restart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fanout
from fanout.exceptions import StorageError
from tests import restart_kit as kit
from tests.conftest import poll_until

LARGE = bytes(300_000)
#: Travels as a blob, and is a file of its own at the scheduler.
HUGE = bytes(3 << 20)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[kit.SmallDisk]:
    cluster = kit.SmallDisk(tmp_path, size_mib=16)
    try:
        cluster.start_scheduler()
        cluster.start_worker("w1", cpu=2)
        monkeypatch.setenv("FANOUT_URL", cluster.client_join)
        yield cluster
    finally:
        cluster.stop()


def test_a_spawn_fails_says_why_and_what_was_accepted_is_kept(
    small_disk: kit.SmallDisk, tmp_path: Path
) -> None:
    gate = str(tmp_path / "gate")
    scheduler = small_disk.scheduler
    with kit.app.run():
        done = [kit.same.spawn(x) for x in range(20)]
        assert [call.get()[0] for call in done] == list(range(20))
        waiting = [kit.bytes_when_open.spawn(x, len(LARGE), gate) for x in range(4)]
        small_disk.fill()
        for _ in range(3):
            with pytest.raises(StorageError, match=r"could not store the call: .* is full"):
                kit.size_of.spawn(LARGE)
        Path(gate).touch()
        with pytest.raises(TimeoutError):
            waiting[0].get(timeout=0.5)  # not on disk, and so not shown
        small_disk.make_room()
        for x, call in enumerate(waiting):
            assert call.get(timeout=30) == bytes([x]) * len(LARGE)
        later = kit.size_of.spawn(LARGE)
        assert later.get(timeout=30) == len(LARGE)
        assert small_disk.scheduler is scheduler
        kit.kill_scheduler(small_disk)
        small_disk.start_scheduler()
        assert [call.get(timeout=30)[0] for call in done] == list(range(20))
        assert [call.get(timeout=30)[:1] for call in waiting] == [bytes([x]) for x in range(4)]
        assert later.get(timeout=30) == len(LARGE)


def test_changes_of_queues_and_dicts_fail_and_leave_nothing(small_disk: kit.SmallDisk) -> None:
    queue = fanout.Queue.from_name("q", create_if_missing=True)
    table = fanout.Dict.from_name("d", create_if_missing=True)
    queue.put_many(["first", "second"])
    table["key"] = "old"
    small_disk.fill()
    for _ in range(3):
        with pytest.raises(StorageError, match="is full"):
            queue.put(LARGE)
        with pytest.raises(StorageError, match="is full"):
            table["key"] = LARGE
    assert table["key"] == "old"
    assert queue.len() == 2
    small_disk.make_room()
    queue.put("third")
    table["other"] = LARGE
    kit.kill_scheduler(small_disk)
    small_disk.start_scheduler()
    assert queue.get_many(10) == ["first", "second", "third"]
    assert table["key"] == "old"
    assert table["other"] == LARGE


def test_attached_calls_go_on(small_disk: kit.SmallDisk) -> None:
    with kit.app.run():
        results = kit.same_after.map(range(400), kwargs={"seconds": 0.001})
        got = [x for x, _, _ in itertools.islice(results, 50)]
        small_disk.fill()
        assert kit.same.remote(7)[0] == 7
        got += [x for x, _, _ in results]
        assert got == list(range(400))


def test_large_arguments_of_attached_calls_fail_and_other_calls_go_on(
    small_disk: kit.SmallDisk,
) -> None:
    def size(number: int) -> int | StorageError:
        try:
            return kit.size_of.remote(HUGE + bytes(number))
        except StorageError as error:
            return error

    with kit.app.run(), ThreadPoolExecutor(10) as pool:
        assert size(0) == len(HUGE)
        small_disk.fill()
        refused = [pool.submit(size, number) for number in range(1, 9)]
        assert [x for x, _, _ in kit.same.map(range(300))] == list(range(300))
        for future in refused:
            assert "No space left" in str(future.result(timeout=30))
        small_disk.make_room()
        assert size(9) == len(HUGE) + 9
    # Its connection was not ended for it: the others on it would wait for its return.
    assert small_disk.log("scheduler").count("(client) lost") <= 1


def test_large_results_wait_until_there_is_room(small_disk: kit.SmallDisk, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with kit.app.run(), ThreadPoolExecutor(1) as pool:
        assert kit.same.remote(1)[0] == 1
        small_disk.fill()
        large = pool.submit(kit.random_bytes.remote, len(HUGE), str(runs))
        poll_until(lambda: "No space left" in small_disk.log("scheduler"), "the result is refused")
        assert kit.same.remote(7)[0] == 7
        small_disk.make_room()
        assert len(large.result(timeout=30)) == len(HUGE)
    assert runs.read_text() == "run\n"
    assert "(worker) lost" not in small_disk.log("scheduler")


def test_a_worker_with_a_full_disk_gets_large_arguments_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = kit.SmallDisk(tmp_path, size_mib=16, owner="w1")
    try:
        cluster.start_scheduler()
        cluster.start_worker("w1", cpu=2)
        monkeypatch.setenv("FANOUT_URL", cluster.client_join)
        with kit.app.run(), ThreadPoolExecutor(1) as pool:
            assert kit.size_of.remote(HUGE) == len(HUGE)
            cluster.fill()
            waiting = pool.submit(kit.size_of.remote, HUGE + b"other")
            poll_until(lambda: "No space left" in cluster.log("w1"), "the argument is refused")
            assert kit.same.remote(7)[0] == 7
            cluster.make_room()
            assert waiting.result(timeout=30) == len(HUGE) + 5
        assert "(worker) lost" not in cluster.log("scheduler")
    finally:
        cluster.stop()


@pytest.mark.parametrize("room", [0, 1 << 20], ids=["none", "some"])
def test_spawns_with_blobs_fail_and_say_why(small_disk: kit.SmallDisk, room: int) -> None:
    """With some room left the small records of the call fit, and only its blob does not."""
    with kit.app.run():
        assert kit.size_of.spawn(HUGE).get(timeout=30) == len(HUGE)
        small_disk.fill(room)
        with pytest.raises(StorageError, match=r"is full|No space left"):
            kit.size_of.spawn(HUGE + b"other")
        assert kit.same.remote(7)[0] == 7
        small_disk.make_room()
        assert kit.size_of.spawn(HUGE + b"third").get(timeout=30) == len(HUGE) + 5
        assert kit.size_of.remote(HUGE + b"fourth") == len(HUGE) + 6
    poll_until(lambda: small_disk.open_call_count() == 0, "nothing of the refused call")
