"""Spawned calls may take so much memory, and no more of them are accepted then."""

from __future__ import annotations

import msgpack

from fanout.protocol import messages as m
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import StoreFailed
from fanout_scheduler.core.spawned import CALL_SIZE_BYTES
from tests.core_kit import Bench, inputs

LIMIT = 100_000


def limited() -> Bench:
    bench = Bench()
    bench.core = Scheduler(1, spawned_bytes_max=LIMIT)
    bench.core.restore([], bench.now)
    return bench


def failure_of(bench: Bench) -> str:
    failed = bench.take(m.CallFailed)
    code, text, _ = msgpack.unpackb(bytes(failed.payload))
    assert code == "store"
    return str(text)


def test_more_inputs_than_memory_is_allowed_for_fail_their_call_and_no_other() -> None:
    bench = limited()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    first = bench.open(client, call=1, count=2, is_durable=True)
    second = bench.open(client, call=2, is_durable=True, is_sealed=False)
    bench.store()
    bench.forget(m.CallOpened, m.InputsStored)
    bench.frame(client, inputs(second, 0, 100, 900))
    assert bench.store()
    bench.take(m.InputsStored)
    bench.frame(client, inputs(second, 100, 100, 900))
    text = failure_of(bench)
    assert "FANOUT_SPAWNED_MEMORY" in text
    assert "0 MiB are allowed" in text
    bench.finish(worker, bench.started_lease(worker))
    while leases := bench.take_all(m.Lease):
        for lease in leases:
            bench.finish(worker, lease)
    bench.store()
    assert bench.core.state.calls[first].finished.count == 2


def test_a_call_that_finds_no_memory_is_refused_and_one_that_finds_some_again_is_not() -> None:
    bench = limited()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, call=1, count=1, is_durable=True)
    bench.store()
    full = bench.open(client, call=2, is_durable=True, is_sealed=False)
    bench.store()
    bench.frame(client, inputs(full, 0, 104, 880))
    bench.store()
    bench.forget(m.CallOpened, m.InputsStored)
    lengths = (2000).to_bytes(4, "little")
    one = m.SubmitCall(b"3" * 16, b"f" * 16, True, True, None, "", lengths, [], b"x" * 2000)
    bench.frame(client, one)
    failure_of(bench)
    bench.frame(client, m.OpenCall(b"4" * 16, b"f" * 16, True, True, None))
    failure_of(bench)
    # An attached call needs none of it.
    bench.open(client, call=5, count=1)
    bench.frame(client, m.CancelCall(full))
    bench.store()
    bench.forget(m.CallFailed)
    bench.frame(client, one)
    assert bench.store()
    assert bench.core.state.calls[b"3" * 16].received.count == 1
    assert bench.core.state.workers
    assert worker


def test_inputs_on_their_way_to_disk_count_and_those_that_did_not_get_there_do_not() -> None:
    bench = limited()
    client = bench.client(f={})
    call_id = bench.open(client, is_durable=True, is_sealed=False)
    bench.store()
    bench.orders.clear()
    bench.frame(client, inputs(call_id, 0, 100, 900))
    assert bench.core.state.arriving_bytes > 90_000
    bench.frame(client, m.OpenCall(b"4" * 16, b"f" * 16, True, True, None))
    bench.frame(client, inputs(b"4" * 16, 0, 100, 900))
    failure_of(bench)
    bench.orders.clear()
    bench.tell(StoreFailed(2, "disk is full"))
    assert bench.core.state.arriving_bytes == 0


def test_memory_is_given_back_when_calls_are_forgotten_and_counted_again_after_a_restart() -> None:
    bench = limited()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=1, is_durable=True)
    records = [record for store in bench.store() for record in store.records]
    bench.finish(worker, bench.started_lease(worker))
    records += [record for store in bench.store() for record in store.records]
    used = bench.core.state.spawned_bytes
    assert used > CALL_SIZE_BYTES
    again = Scheduler(2)
    again.restore(records, 0.0)
    again.check()
    assert again.state.spawned_bytes == used
    bench.later(8 * 24 * 3600.0)
    assert call_id not in bench.core.state.calls
    assert bench.core.state.spawned_bytes == 0
