"""Blobs that the disk has lost or changed: what needs one fails and says so, all else goes on."""

from __future__ import annotations

from typing import Any

from fanout.protocol import messages as m
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import BlobLost, Disconnect, DropBlob, PeerId
from tests.core_kit import APP, Bench, exited

BLOB = b"b" * 32


def stored_call(bench: Bench) -> tuple[bytes, list[Any]]:
    """A spawned call of two inputs, the second of which has a blob, and what is on disk of it."""
    bench.worker(cpu=1)
    bench.blob(BLOB)
    client = bench.connect()
    bench.frame(client, m.OpenApp(APP, "app"))
    bench.define(client, "f", {})
    call_id = bench.open(client, is_durable=True, is_sealed=False)
    lengths = (1).to_bytes(4, "little")
    bench.frame(client, m.Inputs(call_id, 0, lengths, [], b"a"))
    bench.frame(client, m.Inputs(call_id, 1, lengths, [(0, [BLOB])], b"b"), m.SealCall(call_id, 2))
    return call_id, [record for store in bench.store() for record in store.records]


def reborn_with(records: list[Any], present: dict[bytes, int]) -> Bench:
    bench = Bench(epoch=2)
    bench.core = Scheduler(2)
    bench.core.restore(records, bench.now, present=present)
    bench.tell()
    bench.store()
    return bench


def outputs_of(bench: Bench, call_id: bytes, count: int) -> list[m.Outputs]:
    reader = bench.connect()
    bench.frame(reader, m.FetchOutputs(1, call_id, 0, count))
    return bench.take_all(m.Outputs, reader)


def test_a_spawned_call_whose_blob_is_gone_from_the_disk_fails_and_says_so() -> None:
    call_id, records = stored_call(Bench())
    bench = reborn_with(records, {})
    assert bench.core.state.blob_references == {}
    told = outputs_of(bench, call_id, 2)
    assert [bytes(outputs.statuses) for outputs in told] == [bytes([m.Status.FAILURE] * 2)]
    assert all(b"its file is gone from the folder blobs" in o.payload for o in told)


def test_a_spawned_call_whose_blobs_are_there_runs_and_others_are_let_go() -> None:
    call_id, records = stored_call(Bench())
    bench = reborn_with(records, {BLOB: 7, b"o" * 32: 3})
    assert bench.core.state.present_blobs == {BLOB: 7}
    bench.worker(cpu=1)
    assert bench.core.state.calls[call_id].failure is None
    assert bench.take(m.Lease).call_id == call_id


def test_blobs_that_a_restart_finds_to_be_of_no_use_are_dropped_once() -> None:
    """The shell removes their files itself; an order to drop one again would meet a later one."""
    call_id, records = stored_call(Bench())
    lengths = (3).to_bytes(4, "little") * 2
    result = m.Outputs(call_id, 0, lengths, b"\0\0", [], b"onetwo")
    bench = reborn_with([*records, result], {BLOB: 7})
    assert not bench.core.state.present_blobs
    assert not [order for order in bench.orders if isinstance(order, DropBlob)]


def test_a_result_whose_blob_is_gone_from_the_disk_is_a_failure_and_its_neighbour_is_not() -> None:
    call_id, records = stored_call(Bench())
    lengths = (3).to_bytes(4, "little") * 2
    result = m.Outputs(call_id, 0, lengths, b"\0\0", [(1, [b"r" * 32])], b"onetwo")
    bench = reborn_with([*records, result], {BLOB: 7})
    (outputs,) = outputs_of(bench, call_id, 2)
    assert (bytes(outputs.statuses), outputs.blobs) == (bytes([0, m.Status.FAILURE]), [])
    assert bytes(outputs.payload).startswith(b"one")
    assert b"its file is gone from the folder blobs" in bytes(outputs.payload)


def test_calls_of_a_function_whose_code_is_gone_from_the_disk_fail() -> None:
    bench = Bench()
    bench.blob(BLOB)
    client = bench.connect()
    bench.frame(client, m.OpenApp(APP, "app"))
    bench.frame(client, m.DefineFunction(b"f" * 16, APP, "f", {}, [BLOB], b"code"))
    call_id = bench.open(client, count=1, is_durable=True)
    records = [record for store in bench.store() for record in store.records]
    again = reborn_with(records, {})
    (outputs,) = outputs_of(again, call_id, 1)
    assert b"could not keep the code of f" in bytes(outputs.payload)


def lose_blob(bench: Bench, blob_id: bytes, peer: int) -> list[int]:
    """A peer finds out that a blob has changed; gives who is disconnected for it."""
    bench.tell(BlobLost(blob_id, PeerId(peer)))
    bench.core.check()
    return [order.peer_id for order in bench.take_commands(Disconnect)]


def test_a_call_whose_argument_changed_on_disk_fails_and_its_worker_goes_on() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    bench.blob(BLOB)
    client = bench.client(f={})
    call_id = bench.open(client, is_sealed=False)
    lengths = (1).to_bytes(4, "little")
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [BLOB])], b"a"))
    lease = bench.started_lease(worker)
    assert lose_blob(bench, BLOB, worker) == []
    assert b"its file in the folder blobs" in bench.take(m.CallFailed, client).payload
    assert bench.take(m.CancelLease, worker).lease_id == lease.lease_id
    assert not bench.core.state.present_blobs


def test_a_result_that_changed_on_disk_becomes_a_failure_for_a_client_that_comes_again() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    bench.blob(BLOB)
    client = bench.client(f={})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.finish(worker, lease, blobs=[(0, [BLOB])])
    bench.forget(m.Outputs)
    assert lose_blob(bench, BLOB, client) == [client]
    (kept,) = bench.core.state.calls[call_id].outputs
    assert (bytes(kept.statuses), kept.blobs) == (bytes([m.Status.FAILURE]), [])
    assert b"its file in the folder blobs" in bytes(kept.payload)
    assert BLOB not in bench.core.state.blob_references


def test_a_call_whose_item_changed_on_disk_fails() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    bench.blob(BLOB)
    client = bench.client(g={"is_generator": True})
    bench.open(client, "g", count=1)
    lease = bench.started_lease(worker)
    lengths = (1).to_bytes(4, "little")
    items = m.LeaseItems(1, lease.lease_id, lease.call_id, 0, 0, lengths, [(0, [BLOB])], b"i")
    bench.frame(worker, items)
    assert lose_blob(bench, BLOB, client) == [client]
    assert b"its file in the folder blobs" in bench.take(m.CallFailed, client).payload
    assert BLOB not in bench.core.state.blob_references


def test_calls_of_a_function_whose_code_changed_on_disk_fail_until_it_is_brought_again() -> None:
    bench = Bench()
    bench.blob(BLOB)
    worker = bench.worker(cpu=1)
    client = bench.client()
    definition = m.DefineFunction(b"f" * 16, APP, "f", {}, [BLOB], b"code")
    bench.frame(client, definition)
    bench.open(client, count=1)
    lose_blob(bench, BLOB, worker)
    assert b"could not keep the code of f" in bench.take(m.CallFailed, client).payload
    start = bench.take(m.StartContainer, worker)
    assert bench.take(m.StopContainer, worker).container_id == start.container_id
    bench.frame(worker, exited(start.container_id, "stopped"))
    second = bench.open(client, call=2, count=1)
    assert not bench.take_all(m.StartContainer)
    bench.blobs_sent()
    bench.blob(BLOB)
    assert bench.core.state.calls[second].failure is None
    assert bench.take(m.StartContainer, worker)
    assert bench.blobs_sent() == [(worker, BLOB)]


def test_the_second_who_finds_out_is_told_too() -> None:
    """Both were sent the blob before the first one found that it has changed."""
    bench = Bench()
    bench.blob(BLOB)
    first, second = bench.client(f={}), bench.client()
    assert lose_blob(bench, BLOB, first) == [first]
    assert lose_blob(bench, BLOB, second) == [second]


def test_code_that_changed_is_sent_to_all_workers_again_and_its_clients_bring_it() -> None:
    bench = Bench()
    bench.blob(BLOB)
    workers = [bench.worker(cpu=1, number=number) for number in (1, 2)]
    client = bench.client()
    definition = m.DefineFunction(b"f" * 16, APP, "f", {}, [BLOB], b"code")
    bench.frame(client, definition)
    bench.open(client, count=200)
    assert {peer for peer, _ in bench.blobs_sent()} == set(workers)
    assert lose_blob(bench, BLOB, workers[0]) == [client]
    for worker in workers:
        assert bench.blobs_withdrawn(worker) == [BLOB] or worker != workers[0]
        for stop in bench.take_all(m.StopContainer, worker):
            bench.frame(worker, exited(stop.container_id, "stopped"))
    bench.forget(m.StartContainer)
    bench.open(client, call=2, count=200)
    bench.blob(BLOB)
    assert {peer for peer, _ in bench.blobs_sent()} == set(workers)
