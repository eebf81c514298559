"""What outlives the scheduler: records of spawned calls in SQLite, written by one thread."""

from __future__ import annotations

from fanout_scheduler.store.database import Database
from fanout_scheduler.store.record import blob_ids_of, load_key
from fanout_scheduler.store.thread import StoreThread

__all__ = ["Database", "StoreThread", "blob_ids_of", "load_key"]
