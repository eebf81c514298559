"""The SQLite file: opened with suspicion, written in transactions.

WAL with ``synchronous=FULL``: a transaction that has been committed survives the loss of the
process and of the machine's power. Nothing here repairs or replaces a file that looks wrong. What
lies in it was promised to somebody, so a person decides.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from fanout.exceptions import StorageError
from fanout.filesystem import sync_folder
from fanout_scheduler.core.events import (
    ForgetApp,
    ForgetCall,
    ForgetObject,
    ForgetRecord,
    Record,
)
from fanout_scheduler.store.record import RowCodec, Write

#: Grows whenever the tables or the stored messages change.
SCHEMA_VERSION = 2

#: A lease id is ``epoch << 40 | counter`` and has 63 bits.
EPOCH_MAX = (1 << 23) - 1

#: The WAL is cut back to this after a checkpoint, so that one busy hour does not keep the space.
_JOURNAL_SIZE_BYTES_MAX = 16 << 20
_PAGE_SIZE_BYTES = 4096

_SCHEMA = """
CREATE TABLE life (epoch INTEGER NOT NULL);
INSERT INTO life VALUES (0);
CREATE TABLE records (
    seq INTEGER PRIMARY KEY,
    call_id BLOB,
    app_id BLOB,
    kind INTEGER NOT NULL,
    header BLOB NOT NULL,
    payload BLOB NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX records_by_call ON records (call_id) WHERE call_id IS NOT NULL;
CREATE INDEX records_by_app ON records (app_id) WHERE app_id IS NOT NULL;
CREATE TABLE object_records (
    seq INTEGER PRIMARY KEY,
    object_id BLOB NOT NULL,
    key BLOB NOT NULL,
    kind INTEGER NOT NULL,
    header BLOB NOT NULL,
    payload BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    UNIQUE (object_id, key)
);
"""
_INSERT = (
    "INSERT INTO records (call_id, app_id, kind, header, payload, checksum)"
    " VALUES (?, ?, ?, ?, ?, ?)"
)
_INSERT_OBJECT = (
    "INSERT OR REPLACE INTO object_records (object_id, key, kind, header, payload, checksum)"
    " VALUES (?, ?, ?, ?, ?, ?)"
)


class Database:
    """One connection to the file. It may move between threads, but is used by one at a time.

    Args:
        path: the file; made when it is not there.
        key: what function definitions are encrypted with (`record.load_key`).
        size_bytes_max: writes that would make the file larger than this fail as on a full disk.

    Raises:
        StorageError: the file is damaged, of another version, or cannot be opened.
    """

    def __init__(self, path: Path, key: bytes, size_bytes_max: int | None = None) -> None:
        self.path = path
        self.codec = RowCodec(key)
        self._make_if_missing()
        try:
            # The lock on the home folder keeps other schedulers out; a short wait is for a person
            # who looks into the file with another program.
            self._connection = sqlite3.connect(
                path, timeout=5.0, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise StorageError(f"the database {path} cannot be opened: {error}") from error
        try:
            self._prepare(size_bytes_max)
        except StorageError:
            self._connection.close()
            raise
        except sqlite3.Error as error:
            self._connection.close()
            raise self._damage(error) from error

    def _make_if_missing(self) -> None:
        """Make an empty database and give it its name only when it is whole and on disk. So a file
        that has the name was a database once, and an empty one is damage and not a beginning."""
        if self.path.exists():
            return
        for suffix in ("-wal", "-shm"):
            rest = self.path.with_name(self.path.name + suffix)
            if rest.exists():
                raise StorageError(
                    f"{rest} is there and its database {self.path.name} is not. Put the database "
                    f"back, or move {rest.name} away as well to begin without its calls."
                )
        part = self.path.with_name(self.path.name + ".new")
        part.unlink(missing_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as connection:
                # Nothing is written before the end of the transaction, and then all is synced.
                connection.execute("PRAGMA synchronous = FULL")
                connection.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                )
            part.rename(self.path)
            sync_folder(self.path.parent)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the database {self.path} cannot be made: {error}. Make room on the disk, or set "
                f"FANOUT_HOME to another one."
            ) from error

    def _prepare(self, size_bytes_max: int | None) -> None:
        execute = self._connection.execute
        version = self._pragma("user_version")
        if version == 0 and not execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise self._damage("it is empty")
        if version != SCHEMA_VERSION:
            raise StorageError(
                f"the database {self.path} has schema version {version}, this fanout reads "
                f"version {SCHEMA_VERSION}. Use the fanout that wrote it, or move the file away to "
                f"begin without its calls."
            )
        found = execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damage(found)
        mode = self._pragma("journal_mode = WAL")
        if mode != "wal":
            raise StorageError(
                f"the database {self.path} cannot use a write-ahead log (mode is {mode}). It "
                f"needs a local file system: set FANOUT_HOME to a folder on one."
            )
        execute("PRAGMA synchronous = FULL")
        execute(f"PRAGMA journal_size_limit = {_JOURNAL_SIZE_BYTES_MAX}")
        if size_bytes_max is not None:
            execute(f"PRAGMA max_page_count = {max(size_bytes_max // _PAGE_SIZE_BYTES, 1)}")

    def _pragma(self, text: str) -> int | str:
        value: int | str = self._connection.execute(f"PRAGMA {text}").fetchone()[0]
        return value

    def _damage(self, detail: object) -> StorageError:
        return StorageError(
            f"the database {self.path} is damaged: {detail}. Nothing was changed. Put a copy back, "
            f"or move it away together with its -wal and -shm files to begin without its calls."
        )

    def next_epoch(self) -> int:
        """Begin a life: the number of the last one, plus one, and it is on disk.

        Raises:
            StorageError: it could not be written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            row = self._connection.execute("SELECT epoch FROM life").fetchone()
            if row is None or type(row[0]) is not int or not 0 <= row[0] < EPOCH_MAX:
                raise self._damage(f"its life number is {row!r}")
            epoch: int = row[0] + 1
            self._connection.execute("UPDATE life SET epoch = ?", (epoch,))
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self.rollback()
            raise StorageError(
                f"the life number could not be written to {self.path}: {error}. Make room on the "
                f"disk, or set FANOUT_HOME to another one."
            ) from error
        return epoch

    def load(self) -> Iterator[Record]:
        """All records, in the order in which they were stored.

        Raises:
            StorageError: a record cannot be read back; says which.
        """
        try:
            for table, name in (("records", "record"), ("object_records", "object record")):
                rows = self._connection.execute(
                    f"SELECT seq, kind, header, payload, checksum FROM {table} ORDER BY seq"
                )
                for sequence, kind, header, payload, checksum in rows:
                    try:
                        yield self.codec.record(kind, header, payload, checksum)
                    except StorageError as error:
                        raise self._damage(f"{name} {sequence}: {error}") from error
        except sqlite3.Error as error:
            raise self._damage(error) from error

    def write(self, writes: Iterable[Write]) -> None:
        """Apply all of these in one transaction, or none.

        Raises:
            sqlite3.Error: it could not be written, and was not.
        """
        execute = self._connection.execute
        try:
            execute("BEGIN IMMEDIATE")
            for write in writes:
                if isinstance(write, ForgetCall):
                    execute("DELETE FROM records WHERE call_id = ?", (write.call_id,))
                elif isinstance(write, ForgetApp):
                    execute("DELETE FROM records WHERE app_id = ?", (write.app_id,))
                elif isinstance(write, ForgetRecord):
                    execute(
                        "DELETE FROM object_records WHERE object_id = ? AND key = ?",
                        (write.object_id, write.key),
                    )
                elif isinstance(write, ForgetObject):
                    execute("DELETE FROM object_records WHERE object_id = ?", (write.object_id,))
                elif write.object_key is not None:
                    execute(_INSERT_OBJECT, (*write.object_key, *self.codec.row(write)[2:]))
                else:
                    execute(_INSERT, self.codec.row(write))
            execute("COMMIT")
        except BaseException:
            self.rollback()
            raise

    def rollback(self) -> None:
        """End a failed transaction; SQLite may have ended it by itself already."""
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                # What made the write fail may make this fail too. The next BEGIN says so.
                pass

    def make_room(self) -> None:
        """Move the write-ahead log into the file, which may free what a full disk lacks."""
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            pass

    def close(self) -> None:
        self._connection.close()
