"""When a worker may forget a report: not before all that it brought is on disk."""

from fanout.protocol import messages as m
from fanout_scheduler.core.events import Store, Stored, StoreFailed
from tests.core_kit import Bench


def take_stores(bench: Bench) -> list[Store]:
    stores = [order for order in bench.orders if isinstance(order, Store)]
    bench.orders = [order for order in bench.orders if not isinstance(order, Store)]
    return stores


def test_an_output_that_comes_again_is_no_safer_than_the_first() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1, is_durable=True)
    bench.store()
    lease = bench.started_lease(worker)
    bench.finish(worker, lease)
    (store,) = take_stores(bench)
    # Its connection is lost before that is on disk; it says what is not acknowledged again.
    bench.lose(worker)
    back = bench.worker(cpu=1)
    bench.finish(back, lease)
    bench.later(0.03)
    assert bench.take_all(m.OutputsAck) == []
    bench.tell(Stored(store.sequence))
    bench.later(0.03)
    assert bench.take(m.OutputsAck, back).sequence == 1


def test_a_report_is_safe_when_all_its_parts_are() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"retries": [1, 0.1, 1.0, 0.1]})
    call_id = bench.open(client, count=1, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    bench.store()
    bench.later(0.03)
    bench.forget(m.OutputsAck)
    # Quick inputs have a lease of several. The middle one of three is an error with an attempt
    # left, so that two records are written.
    call_id = bench.open(client, call=2, count=40, is_durable=True)
    bench.store()
    lease = bench.take_all(m.Lease)[0]
    assert len(lease.lengths) // 4 >= 3
    lengths = (1).to_bytes(4, "little") * 3
    statuses = bytes([m.Status.VALUE, m.Status.ERROR, m.Status.VALUE])
    start = lease.start
    report = m.LeaseOutputs(2, lease.lease_id, call_id, start, 3000, lengths, statuses, [], b"vev")
    bench.frame(worker, report)
    first, second = take_stores(bench)
    bench.tell(StoreFailed(first.sequence, "disk is full"), Stored(second.sequence))
    bench.later(0.03)
    assert bench.take_all(m.OutputsAck) == []
    bench.later(1.0)
    bench.store()
    bench.later(0.03)
    assert bench.take(m.OutputsAck).sequence == 2
