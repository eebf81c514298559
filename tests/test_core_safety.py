"""Nothing is promised, acknowledged or told before it is on disk."""

from fanout.config import CLIENT_GRACE_S
from fanout.protocol import messages as m
from fanout_scheduler.core.events import BlobRefused, Store, Stored, StoreFailed
from tests.core_kit import APP, Bench

BLOB = b"b" * 32


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


# --- what is promised, and what is told -----------------------------------------------------------


def spawner(blobs: list[bytes] | None = None) -> tuple[Bench, int]:
    """A client that has defined f, whose code may be in blobs."""
    bench = Bench()
    client = bench.connect()
    bench.frame(client, m.OpenApp(APP, "app"))
    bench.frame(client, m.DefineFunction(b"f" * 16, APP, "f", {}, blobs or [], b"code"))
    return bench, client


def test_a_spawn_is_promised_only_when_the_code_that_it_needs_is_on_disk() -> None:
    bench, client = spawner([BLOB])
    call_id = bench.open(client, count=2, is_durable=True)
    assert bench.store() == [], "it would be nothing without the code"
    assert bench.take_all(m.InputsStored) == []
    bench.blob(BLOB)
    stored = [type(record) for store in bench.store() for record in store.records]
    assert stored == [m.OpenApp, m.DefineFunction, m.OpenCall, m.Inputs, m.SealCall]
    assert bench.take_all(m.InputsStored, client)[-1].is_sealed
    bench.worker(cpu=1)
    assert bench.take(m.Lease).call_id == call_id


def test_a_spawn_whose_code_the_disk_refuses_fails_and_may_be_made_again() -> None:
    bench, client = spawner([BLOB])
    bench.open(client, count=1, is_durable=True)
    attached = bench.open(client, call=2, count=1)
    bench.tell(BlobRefused(BLOB, "No space left on device"))
    failed = {told.call_id: bytes(told.payload) for told in bench.take_all(m.CallFailed, client)}
    assert failed.keys() == {b"\1" * 16, attached}
    assert all(b"No space left on device" in text for text in failed.values())
    bench.store()
    again = bench.open(client, call=3, count=1, is_durable=True)
    bench.blob(BLOB)
    bench.store()
    bench.worker(cpu=1)
    assert bench.take(m.Lease).call_id == again


def test_that_a_promised_call_was_cancelled_is_told_when_it_is_on_disk() -> None:
    """Else a scheduler that is killed before would run it, and give another answer."""
    bench, client = spawner()
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    bench.forget(m.InputsStored, m.CallOpened)
    reader = bench.connect()
    bench.frame(reader, m.FetchOutputs(1, call_id, 0, 2))
    bench.frame(client, m.CancelCall(call_id))
    late = bench.connect()
    bench.frame(late, m.FetchOutputs(1, call_id, 0, 2))
    assert bench.take_all(m.Outputs) == bench.take_all(m.CallFailed) == []
    bench.store()
    assert bench.take(m.CallFailed, client).call_id == call_id
    for peer in (reader, late):
        assert sum(len(told.statuses) for told in bench.take_all(m.Outputs, peer)) == 2


def test_a_failed_call_is_told_in_few_frames_and_for_the_inputs_that_there_are() -> None:
    bench, client = spawner()
    call_id = bench.open(client, count=10_000 // 4, is_durable=True, is_sealed=False)
    bench.frame(client, m.SealCall(call_id, 1 << 40))
    bench.store()
    reader = bench.connect()
    bench.frame(reader, m.FetchOutputs(1, call_id, 0, 1 << 40))
    bench.frame(client, m.CancelCall(call_id))
    bench.store()
    told = bench.take_all(m.Outputs, reader)
    assert sum(len(outputs.statuses) for outputs in told) == 10_000 // 4
    assert len(told) < 20


def test_a_spawn_whose_client_goes_before_its_blobs_have_come_leaves_nothing() -> None:
    bench, client = spawner()
    call_id = bench.open(client, is_durable=True, is_sealed=False)
    bench.store()
    lengths = (1).to_bytes(4, "little")
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [BLOB])], b"x"))
    bench.lose(client)
    bench.later(CLIENT_GRACE_S + 1)
    bench.store()
    assert not bench.core.state.blob_waiters
    assert not bench.core.state.blob_references
