"""The one thread that writes: group commit.

The loop hands over `Store` commands and goes on. While a transaction waits for the disk, commands
gather; the next transaction takes all of them. So one command alone waits for one fsync, and ten
thousand commands wait for a few.

When a transaction fails (disk full), each of its commands is tried alone, so that only what does
not fit fails. The thread itself never ends before `close`: a disk that is full now may have room
again in a minute.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fanout.exceptions import Error
from fanout_scheduler.core.events import Record, Store, Stored, StoreFailed
from fanout_scheduler.store.database import Database
from fanout_scheduler.store.record import Insert, Write, write_of

log = logging.getLogger("fanout.scheduler.store")

#: Bounds of one transaction, so that its part of the write-ahead log and the time until its first
#: command is acknowledged stay small.
_BATCH_COMMANDS_MAX = 4096
_BATCH_SIZE_BYTES_MAX = 32 << 20

#: What a write may raise for reasons that lie in the world and not in this program.
_WRITE_ERRORS = (sqlite3.Error, OSError, Error)


@dataclass(slots=True)
class _Job:
    sequence: int
    writes: list[Write]
    size_bytes: int


class StoreThread:
    """Writes `Store` commands in order and reports `Stored` and `StoreFailed` on the loop.

    `Stored(n)` says that every command up to `n` is on disk, except those for which `StoreFailed`
    was reported before. Reports come in the order of the commands.

    Args:
        path: the database file.
        key: see `record.load_key`.
        on_done: called on the loop that `start` was given.
        sync_blobs: called on the store's thread with the blobs that the records of a transaction
            name, before it is committed; those that are here must be on disk when it returns.
        size_bytes_max: see `Database`.

    Raises:
        StorageError: see `Database`.
    """

    def __init__(
        self,
        path: Path,
        key: bytes,
        on_done: Callable[[Stored | StoreFailed], None],
        *,
        sync_blobs: Callable[[Iterable[bytes]], None] | None = None,
        size_bytes_max: int | None = None,
    ) -> None:
        self._database = Database(path, key, size_bytes_max)
        self._on_done = on_done
        self._sync_blobs = sync_blobs
        self._jobs: queue.SimpleQueue[_Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        #: How many transactions were committed; the ratio to commands shows the grouping.
        self.commit_count = 0

    def epoch(self) -> int:
        """See `Database.next_epoch`. Before `start` only."""
        assert self._thread is None
        return self._database.next_epoch()

    def load(self) -> Iterator[Record]:
        """See `Database.load`. Before `start` only."""
        assert self._thread is None
        return self._database.load()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on commands are written, and reported on `loop`."""
        assert self._thread is None
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="fanout-store", daemon=True)
        self._thread.start()

    def submit(self, command: Store) -> None:
        """Queue a command, on the loop's thread. Sequence numbers grow, except that of a command
        that failed and is given once more."""
        writes = [write_of(record) for record in command.records]
        size = sum(
            len(write.header) + len(write.payload) for write in writes if type(write) is Insert
        )
        self._jobs.put(_Job(command.sequence, writes, size))

    def warm(self) -> None:
        """Load the cipher on the store's thread, so that the first definition need not wait."""
        self._jobs.put(self._database.codec.warm)

    def close(self) -> None:
        """Write all that was submitted and close the file. Blocks until that is done."""
        if self._thread is None:
            self._database.close()
            return
        self._jobs.put(None)
        self._thread.join()

    # --- on the store's thread -------------------------------------------------------------------

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch, is_open = self._gather()
            if batch:
                try:
                    self._commit(batch)
                except Exception:
                    log.exception("the store's thread met a bug")
                    for job in batch:
                        self._report(StoreFailed(job.sequence, "internal error of the store"))
        self._database.close()

    def _gather(self) -> tuple[list[_Job], bool]:
        """All jobs that wait, at least one, up to the bounds; False when it is time to leave."""
        batch: list[_Job] = []
        size = 0
        job = self._jobs.get()
        while True:
            if job is None:
                return batch, False
            if isinstance(job, _Job):
                batch.append(job)
                size += job.size_bytes
                if len(batch) >= _BATCH_COMMANDS_MAX or size >= _BATCH_SIZE_BYTES_MAX:
                    return batch, True
            else:
                job()
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return batch, True

    def _commit(self, batch: list[_Job]) -> None:
        try:
            self._write(batch)
        except _WRITE_ERRORS as error:
            log.warning("a transaction of %d commands failed: %s", len(batch), error)
            self._database.make_room()
            for job in batch:
                self._commit_alone(job)
            return
        self._report(Stored(max(job.sequence for job in batch)))

    def _commit_alone(self, job: _Job) -> None:
        try:
            self._write([job])
        except _WRITE_ERRORS as error:
            text = f"{self._database.path} could not be written: {error}"
            log.error("Store(%d) failed: %s", job.sequence, text)
            self._report(StoreFailed(job.sequence, text))
        else:
            self._report(Stored(job.sequence))

    def _write(self, batch: list[_Job]) -> None:
        writes = [write for job in batch for write in job.writes]
        if self._sync_blobs is not None:
            blob_ids = {b for write in writes if type(write) is Insert for b in write.blob_ids}
            if blob_ids:
                self._sync_blobs(blob_ids)
        self._database.write(writes)
        self.commit_count += 1

    def _report(self, event: Stored | StoreFailed) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._on_done, event)
        except RuntimeError:
            # The loop is closed: the process leaves and nobody waits for this any more.
            log.debug("nobody waits for %r", event)
