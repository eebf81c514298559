"""The store: what was acknowledged survives, what cannot be written fails alone."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanout.exceptions import StorageError
from fanout.protocol import messages as m
from fanout_scheduler.core.events import (
    ForgetApp,
    ForgetCall,
    ForgetObject,
    ForgetRecord,
    Record,
    Store,
    Stored,
    StoreFailed,
)
from fanout_scheduler.core.object_state import entry_key, item_key
from fanout_scheduler.store import Database, StoreThread, blob_ids_of, load_key
from fanout_scheduler.store.record import write_of
from tests.conftest import environment, poll_until

APP = b"a" * 16
CALL = b"c" * 16
FUNCTION = b"f" * 16
BLOB = b"b" * 32

Report = Stored | StoreFailed


def inputs(call_id: bytes, start: int, size: int = 8) -> m.Inputs:
    return m.Inputs(call_id, start, size.to_bytes(4, "little"), [], bytes([start % 256]) * size)


def sample_records() -> list[Record]:
    lengths = (3).to_bytes(4, "little")
    return [
        m.OpenApp(APP, "nightly"),
        m.DefineFunction(FUNCTION, APP, "f", {"timeout": 3.0}, [BLOB], b"variables: TOKEN=hunter2"),
        m.OpenCall(CALL, FUNCTION, True, False, None),
        m.Inputs(CALL, 0, lengths, [[0, [BLOB]]], b"abc"),  # type: ignore[list-item]
        m.SealCall(CALL, 1),
        m.Outputs(CALL, 0, lengths, b"\0", [], b"xyz"),
        m.CallFailed(CALL, m.Status.FAILURE, b"why"),
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scheduler.db"


@pytest.fixture
def key(tmp_path: Path) -> bytes:
    return load_key(tmp_path / "store.key")


@pytest.fixture
def database(path: Path, key: bytes) -> Iterator[Database]:
    opened = Database(path, key)
    yield opened
    opened.close()


def write(database: Database, *records: Record) -> None:
    database.write([write_of(record) for record in records])


def reload(path: Path, key: bytes) -> list[Record]:
    again = Database(path, key)
    try:
        return list(again.load())
    finally:
        again.close()


# --- content --------------------------------------------------------------------------------------


def test_every_kind_of_record_comes_back_as_it_was_and_in_order(
    database: Database, path: Path, key: bytes
) -> None:
    records = sample_records()
    write(database, *records)
    assert reload(path, key) == records


def test_a_slice_of_a_larger_buffer_is_stored_as_its_bytes(
    database: Database, path: Path, key: bytes
) -> None:
    record = inputs(CALL, 0, 4)
    record.payload = memoryview(b"..abcd..")[2:6]
    write(database, record)
    (loaded,) = reload(path, key)
    assert isinstance(loaded, m.Inputs)
    assert loaded.payload == b"abcd"


def test_forgetting_a_call_removes_its_records_and_no_others(
    database: Database, path: Path, key: bytes
) -> None:
    other = b"d" * 16
    write(database, *sample_records(), m.OpenCall(other, FUNCTION, True, False, None))
    write(database, ForgetCall(CALL))
    kinds = [type(record) for record in reload(path, key)]
    assert kinds == [m.OpenApp, m.DefineFunction, m.OpenCall]


def test_forgetting_an_app_removes_its_functions(
    database: Database, path: Path, key: bytes
) -> None:
    write(database, *sample_records())
    write(database, ForgetCall(CALL), ForgetApp(APP))
    assert reload(path, key) == []


def test_records_of_forgotten_calls_leave_room_for_new_ones(
    database: Database, path: Path, key: bytes
) -> None:
    for _ in range(20):
        write(database, *(inputs(CALL, index, 50_000) for index in range(10)))
        write(database, ForgetCall(CALL))
    database.make_room()
    assert path.stat().st_size < 4 * 500_000


def test_the_blobs_of_a_record_are_those_it_names() -> None:
    named = [list(blob_ids_of(record)) for record in sample_records()]
    assert named == [[], [BLOB], [], [BLOB], [], [], []]


def test_environment_variables_of_a_definition_are_not_readable_on_disk(
    database: Database, path: Path, key: bytes
) -> None:
    write(database, *sample_records())
    database.close()
    content = b"".join(file.read_bytes() for file in path.parent.glob("scheduler.db*"))
    assert b"abc" in content  # inputs are stored as they are: the search does find what is there
    assert b"hunter2" not in content
    assert b"TOKEN" not in content
    definition = reload(path, key)[1]
    assert isinstance(definition, m.DefineFunction)
    assert definition.payload == b"variables: TOKEN=hunter2"


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    file = tmp_path / "key"
    first = load_key(file)
    assert load_key(file) == first
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"not a key")
    with pytest.raises(StorageError, match="does not hold a key"):
        load_key(file)


def test_another_key_is_an_error_that_says_so(database: Database, path: Path) -> None:
    write(database, *sample_records())
    other = load_key(path.parent / "other.key")
    with pytest.raises(StorageError, match="another key"):
        reload(path, other)


# --- damage ---------------------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, key: bytes) -> None:
    path.write_bytes(b"something precious" * 100)
    with pytest.raises(StorageError, match=r"scheduler\.db is damaged.*move it away"):
        Database(path, key)
    assert path.read_bytes() == b"something precious" * 100


def test_overwritten_pages_are_noticed_and_nothing_is_replaced(
    database: Database, path: Path, key: bytes
) -> None:
    write(database, *(inputs(CALL, index, 5000) for index in range(100)))
    database.close()
    damaged = bytearray(path.read_bytes())
    damaged[20_000:30_000] = bytes(10_000)
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match=r"scheduler\.db is damaged"):
        reload(path, key)
    assert path.read_bytes() == damaged


def test_one_flipped_bit_in_a_payload_is_noticed(
    database: Database, path: Path, key: bytes
) -> None:
    write(database, inputs(CALL, 7, 3000))
    database.close()
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(bytes([7]) * 100) + 50] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match="record 1: its checksum"):
        reload(path, key)


def test_another_schema_version_is_refused(database: Database, path: Path, key: bytes) -> None:
    database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match=r"schema version 99, this fanout reads version 2"):
        Database(path, key)


def test_the_life_number_grows_with_each_life(path: Path, key: bytes) -> None:
    epochs = []
    for _ in range(3):
        opened = Database(path, key)
        epochs.append(opened.next_epoch())
        opened.close()
    assert epochs == [1, 2, 3]


# --- the thread -----------------------------------------------------------------------------------


class Reports:
    """Collects what a store reports, on the loop that runs the test."""

    def __init__(self) -> None:
        self.events: list[Report] = []
        self._arrived = asyncio.Event()

    def __call__(self, event: Report) -> None:
        self.events.append(event)
        self._arrived.set()

    async def until(self, predicate: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not predicate():
                self._arrived.clear()
                await self._arrived.wait()

    @property
    def stored(self) -> int:
        return max((e.sequence for e in self.events if isinstance(e, Stored)), default=-1)

    @property
    def failed(self) -> list[int]:
        return [e.sequence for e in self.events if isinstance(e, StoreFailed)]


def started_thread(path: Path, key: bytes, reports: Reports, **options: Any) -> StoreThread:
    thread = StoreThread(path, key, reports, **options)
    thread.start(asyncio.get_running_loop())
    return thread


async def test_commands_that_wait_share_a_transaction(path: Path, key: bytes) -> None:
    reports = Reports()
    thread = StoreThread(path, key, reports)
    for sequence in range(1, 1001):
        thread.submit(Store(sequence, [inputs(CALL, sequence)]))
    thread.start(asyncio.get_running_loop())
    await reports.until(lambda: reports.stored == 1000)
    thread.close()
    assert thread.commit_count < 10
    assert len(reload(path, key)) == 1000


async def test_a_full_disk_fails_what_does_not_fit_and_service_goes_on(
    path: Path, key: bytes
) -> None:
    reports = Reports()
    thread = StoreThread(path, key, reports, size_bytes_max=256 << 10)
    sizes = [1000, 1 << 20, 1000, 1 << 20, 1000]
    for sequence, size in enumerate(sizes, 1):
        thread.submit(Store(sequence, [inputs(CALL, sequence, size)]))
    thread.start(asyncio.get_running_loop())
    await reports.until(lambda: reports.stored == 5)
    assert reports.failed == [2, 4]
    failure = next(e for e in reports.events if isinstance(e, StoreFailed))
    assert "full" in failure.text
    assert str(path) in failure.text
    thread.submit(Store(6, [inputs(CALL, 6)]))
    await reports.until(lambda: reports.stored == 6)
    thread.close()
    starts = [record.start for record in reload(path, key) if isinstance(record, m.Inputs)]
    assert starts == [1, 3, 5, 6]


async def test_a_command_is_written_whole_or_not_at_all(path: Path, key: bytes) -> None:
    reports = Reports()
    thread = started_thread(path, key, reports, size_bytes_max=256 << 10)
    thread.submit(Store(1, [inputs(CALL, 0), inputs(CALL, 1, 1 << 20)]))
    await reports.until(lambda: reports.failed == [1])
    thread.close()
    assert reload(path, key) == []


async def test_a_command_that_failed_can_be_given_again(path: Path, key: bytes) -> None:
    reports = Reports()
    thread = started_thread(path, key, reports, size_bytes_max=256 << 10)
    thread.submit(Store(1, [inputs(CALL, 0, 100_000)]))
    thread.submit(Store(2, [inputs(b"d" * 16, 0, 150_000)]))
    await reports.until(lambda: reports.failed == [2])
    thread.submit(Store(3, [ForgetCall(CALL)]))
    thread.submit(Store(2, [inputs(b"d" * 16, 0, 150_000)]))
    thread.close()
    (left,) = reload(path, key)
    assert isinstance(left, m.Inputs)
    assert left.call_id == b"d" * 16


async def test_an_error_of_the_disk_itself_is_reported_and_passes(path: Path, key: bytes) -> None:
    reports = Reports()
    thread = started_thread(path, key, reports)
    thread.submit(Store(1, [inputs(CALL, 1)]))
    await reports.until(lambda: reports.stored == 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file of this process may grow over this; the kernel says EFBIG to whoever tries.
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, old[1]))
    try:
        thread.submit(Store(2, [inputs(CALL, 2, 1 << 20)]))
        await reports.until(lambda: reports.failed == [2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    thread.submit(Store(3, [inputs(CALL, 3, 1 << 20)]))
    await reports.until(lambda: reports.stored == 3)
    thread.close()
    starts = [record.start for record in reload(path, key) if isinstance(record, m.Inputs)]
    assert starts == [1, 3]


async def test_blobs_are_on_disk_before_the_record_that_names_them(path: Path, key: bytes) -> None:
    reports = Reports()
    seen: list[tuple[list[bytes], int]] = []

    def sync(blob_ids: Iterable[bytes]) -> None:
        # Another connection sees what has been committed so far.
        connection = sqlite3.connect(path)
        (count,) = connection.execute("SELECT count(*) FROM records").fetchone()
        connection.close()
        seen.append((sorted(blob_ids), count))

    thread = started_thread(path, key, reports, sync_blobs=sync)
    thread.submit(Store(1, sample_records()))
    await reports.until(lambda: reports.stored == 1)
    thread.close()
    assert seen == [([BLOB], 0)]


async def test_a_blob_that_cannot_be_synced_fails_the_record(path: Path, key: bytes) -> None:
    reports = Reports()

    def refuse(_: object) -> None:
        raise OSError(28, "No space left on device")

    thread = started_thread(path, key, reports, sync_blobs=refuse)
    thread.submit(Store(1, sample_records()))
    thread.submit(Store(2, [inputs(CALL, 0)]))
    await reports.until(lambda: reports.stored == 2)
    thread.close()
    assert reports.failed == [1]


async def test_close_writes_what_was_submitted(path: Path, key: bytes) -> None:
    thread = started_thread(path, key, Reports())
    for sequence in range(500):
        thread.submit(Store(sequence, [inputs(CALL, sequence)]))
    thread.close()
    assert len(reload(path, key)) == 500


# --- the process dies -----------------------------------------------------------------------------

WRITER = """
import asyncio, os, sys
from pathlib import Path
from fanout.protocol import messages as m
from fanout_scheduler.core.events import Store
from fanout_scheduler.store import StoreThread, load_key

async def main(folder):
    def on_done(event):
        os.write(1, b"%d\\n" % event.sequence)
        for _ in range(2):
            submit()

    def submit():
        global sequence
        sequence += 1
        number = epoch << 32 | sequence
        message = m.Inputs(b"c" * 16, number, (8).to_bytes(4, "little"), [], number.to_bytes(8))
        thread.submit(Store(sequence, [message]))

    thread = StoreThread(folder / "scheduler.db", load_key(folder / "store.key"), on_done)
    epoch = thread.epoch()
    os.write(1, b"epoch %d\\n" % epoch)
    thread.start(asyncio.get_running_loop())
    for _ in range(5):
        submit()
    await asyncio.get_running_loop().create_future()

sequence = 0
asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_whatever_was_acknowledged_survives_kill_9(tmp_path: Path, key: bytes) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    acknowledged: list[tuple[int, int]] = []
    for life in range(1, 21):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            env=environment(),
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"epoch %d\n" % life, "the life number grows"
            lines = [process.stdout.readline() for _ in range(chance.randrange(1, 60))]
        finally:
            os.kill(process.pid, signal.SIGKILL)
        # What it wrote to the pipe before it died counts too, but for a line that was cut off.
        rest, _ = process.communicate(timeout=20)
        lines += [line for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
        highest = max(map(int, lines))
        acknowledged.append((life, highest))
    stored = {r.start for r in reload(tmp_path / "scheduler.db", key) if isinstance(r, m.Inputs)}
    for life, highest in acknowledged:
        expected = {life << 32 | sequence for sequence in range(1, highest + 1)}
        assert expected <= stored, f"life {life} lost records (seed {seed})"
    assert sum(highest for _, highest in acknowledged) > 500


def test_a_write_ahead_log_that_was_cut_off_loses_no_whole_transaction(
    tmp_path: Path, path: Path, key: bytes
) -> None:
    database = Database(path, key)
    write(database, inputs(CALL, 1))
    write(database, inputs(CALL, 2))
    # As after a power cut in the middle of the third transaction.
    size = path.with_name("scheduler.db-wal").stat().st_size
    write(database, inputs(CALL, 3, 20_000))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "scheduler.db").write_bytes(path.read_bytes())
    log = path.with_name("scheduler.db-wal").read_bytes()
    (copy / "scheduler.db-wal").write_bytes(log[: size + 5000])
    database.close()
    starts = [r.start for r in reload(copy / "scheduler.db", key) if isinstance(r, m.Inputs)]
    assert starts == [1, 2]


def test_the_database_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; os.umask(0o077)\n"
        "from fanout_scheduler.store import Database, load_key\n"
        "folder = Path(sys.argv[1]); d = Database(folder / 'x.db', load_key(folder / 'k'))\n"
        "d.next_epoch(); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), stdin=subprocess.PIPE
    )
    try:
        poll_until(lambda: (tmp_path / "x.db-wal").exists(), "the database is there")
        modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    finally:
        process.communicate(b"", timeout=20)
    assert modes == {0o600}


# --- queues and dicts ----------------------------------------------------------------------------

OBJECT = b"o" * 16


def object_records() -> list[Record]:
    return [
        m.ObjectMade(OBJECT, 1, "q", 12.5),
        m.QueueItem(OBJECT, 7, b"p", 99.0, b"value"),
        m.DictEntry(OBJECT, 8, b"key", b"first"),
        m.Receipt(OBJECT, b"s" * 16, 3, b"p", [7], 0, b"", b""),
    ]


def written(path: Path, key: bytes, *records: Record) -> list[Record]:
    """What is in the store after these records were written in one transaction."""
    database = Database(path, key)
    try:
        database.write([write_of(record) for record in records])
        return list(database.load())
    finally:
        database.close()


def test_records_of_queues_and_dicts_come_back_as_they_were(path: Path, key: bytes) -> None:
    call = m.OpenCall(CALL, FUNCTION, True, False, None)
    assert written(path, key, *object_records(), call) == [call, *object_records()]


def test_a_later_record_takes_the_place_of_the_one_with_its_key(path: Path, key: bytes) -> None:
    changed = m.DictEntry(OBJECT, 8, b"key", b"second")
    other = m.DictEntry(b"x" * 16, 8, b"key", b"another dict's")
    made, item, _, receipt = object_records()
    assert written(path, key, *object_records(), other, changed) == [
        *(made, item, receipt, other, changed)
    ]


def test_one_record_of_an_object_is_forgotten_or_all(path: Path, key: bytes) -> None:
    made, item, entry, receipt = object_records()
    other = m.ObjectMade(b"x" * 16, 2, "d", 1)
    forget = [ForgetRecord(OBJECT, item_key(7)), ForgetRecord(OBJECT, entry_key(b"key"))]
    assert written(path, key, *object_records(), other, *forget) == [made, receipt, other]
    assert written(path, key, ForgetObject(OBJECT)) == [other]
