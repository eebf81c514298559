"""Drive queues and dicts of a bare core by hand, with a disk beside it; see `core_kit.py`."""

from __future__ import annotations

from typing import Any

from fanout.protocol import messages as m
from fanout_scheduler.core.events import (
    ForgetObject,
    ForgetRecord,
    Record,
    Store,
    StoreFailed,
)
from fanout_scheduler.core.object_requests import split
from fanout_scheduler.core.object_state import record_key
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
