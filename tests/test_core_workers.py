"""Workers and containers that come, fail and go, and what the store gives back: the bare core."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fanout.config import CLIENT_GRACE_S, RESULT_RETENTION_S, WORKER_DEADLINE_S
from fanout.protocol import messages as m
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.durable import STORE_RETRY_S
from fanout_scheduler.core.events import (
    Disconnect,
    ForgetApp,
    ForgetCall,
    PeerId,
    Store,
    Stored,
    StoreFailed,
)
from tests.core_kit import APP, Bench, exited, inputs, table

BLOB = b"B" * 32
CALL = b"\1" * 16
OLD_CONTAINER = 1 << m.EPOCH_SHIFT | 7


def ready(
    bench: Bench, peer: int, containers: Any = (), leases: Any = (), number: int = 1
) -> list[int]:
    """A worker says what it has. Returns which containers it may keep."""
    name = f"w{number}"
    bench.frame(
        peer,
        m.WorkerReady(
            bytes([number]) * 16,
            name,
            2.0,
            1000,
            False,
            [list(c) for c in containers],
            list(leases),
        ),
    )
    return bench.take(m.WorkerAccepted, peer).keep


def records_of(bench: Bench) -> list[Any]:
    return [record for store in bench.store() for record in store.records]


def reborn(bench: Bench, records: list[Any], wall_time_s: float = 0.0) -> Bench:
    again = Bench(epoch=bench.core.state.epoch + 1)
    again.now = bench.now
    again.core = Scheduler(again.core.state.epoch)
    again.core.restore(records, again.now, wall_time_s)
    again.core.check()
    again.tell()
    return again


# --- workers --------------------------------------------------------------------------------------


def test_memory_comes_back_with_the_containers_that_held_it() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"memory": 300})
    bench.open(client, count=2)
    (state,) = bench.core.state.workers.values()
    assert (state.memory_free_mib, state.cpu_free) == (400, 0)
    leases = bench.take_all(m.Lease)
    bench.frame(worker, exited(leases[0].container_id, "crash"))
    assert len(bench.take_all(m.StartContainer)) == 3, "two, and another one in place of the dead"
    bench.frame(client, m.CloseApp(APP))
    for container in list(bench.core.state.containers):
        bench.frame(worker, exited(container, "stopped"))
    assert (state.memory_free_mib, state.cpu_free) == (1000, 2)


def test_what_is_asked_for_beyond_the_memory_waits_for_it_by_name() -> None:
    bench = Bench()
    worker = bench.worker(cpu=3)
    client = bench.client(f={"memory": 600}, g={"memory": 600})
    bench.open(client, "f", call=1, count=1)
    lease = bench.started_lease(worker)
    call_id = bench.open(client, "g", call=2, count=1)
    assert bench.core.state.calls[call_id].waits_for == "free memory"
    assert bench.take_all(m.StartContainer) == []
    bench.finish(worker, lease)
    stop = bench.take(m.StopContainer)
    assert (stop.container_id, stop.kill) == (lease.container_id, False), (
        "it is idle, and in the way"
    )
    bench.frame(worker, exited(lease.container_id, "stopped"))
    assert bench.take(m.StartContainer).function_id == b"g" * 16


def test_a_worker_that_comes_anew_takes_the_place_of_its_former_self() -> None:
    bench = Bench()
    first = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1)
    lease = bench.started_lease(first)
    second = bench.connect("worker")
    keep = ready(bench, second, [(lease.container_id, b"f" * 16)], [lease.lease_id, "odd", 12])
    assert keep == [lease.container_id], "it is warm, and its function is known"
    (order,) = bench.take_commands(Disconnect)
    assert order == Disconnect(PeerId(first), "replaced", "the worker is here anew")
    void = [cancel.lease_id for cancel in bench.take_all(m.CancelLease, second)]
    assert void == [lease.lease_id, 12]
    again = bench.take(m.Lease, second)
    assert (again.container_id, again.start) == (lease.container_id, 0)
    bench.lose(first)
    assert len(bench.core.state.workers) == 1
    bench.frame(second, m.WorkerReady(b"\1" * 16, "w1", 2.0, 1000, False, [], []))
    (order,) = bench.take_commands(Disconnect)
    assert order.text == "a connection is for one worker, and this one was ready before"


@pytest.mark.parametrize(
    ("options", "count", "kept"),
    [({}, 3, 3), ({"max_containers": 2}, 3, 2), ({"single_use": True}, 1, 0)],
)
def test_warm_containers_are_kept_within_the_limits_of_their_function(
    options: dict[str, Any], count: int, kept: int
) -> None:
    bench = Bench(epoch=2)
    bench.client(f=options)
    worker = bench.connect("worker")
    containers = [(OLD_CONTAINER + number, b"f" * 16) for number in range(count)]
    assert ready(bench, worker, containers) == [number for number, _ in containers[:kept]]
    assert len(bench.core.state.containers) == kept


def test_containers_that_cannot_be_what_they_say_are_not_kept() -> None:
    bench = Bench(epoch=2)
    client = bench.client(f={})
    one, two = bench.connect("worker"), bench.connect("worker")
    odd = [(1,), ("1", b"f" * 16), (1, "f"), (1, b"f" * 16, 2)]
    assert ready(bench, one, [*odd, (OLD_CONTAINER, b"f" * 16)]) == [OLD_CONTAINER]
    assert ready(bench, two, [(OLD_CONTAINER, b"f" * 16)], number=2) == [], "another has it"
    bench.frame(client, m.CloseApp(APP))
    three = bench.connect("worker")
    this_life = 2 << m.EPOCH_SHIFT | 7
    containers = [(OLD_CONTAINER + 1, b"f" * 16), (this_life, b"f" * 16)]
    assert ready(bench, three, containers, number=3) == [OLD_CONTAINER + 1]


def test_kept_containers_leave_when_nobody_needs_them() -> None:
    bench = Bench(epoch=2)
    bench.client(f={"scaledown_window": 5})
    worker = bench.connect("worker")
    ready(bench, worker, [(OLD_CONTAINER, b"f" * 16)])
    bench.later(4.9)
    assert bench.take_all(m.StopContainer) == []
    bench.later(0.2)
    assert bench.take(m.StopContainer, worker).container_id == OLD_CONTAINER


def test_containers_that_were_held_are_stopped_where_their_function_has_no_room() -> None:
    bench = Bench(epoch=2)
    worker = bench.connect("worker")
    containers = [
        (OLD_CONTAINER + number, bytes([name]) * 16) for number, name in enumerate(b"ffg")
    ]
    assert len(ready(bench, worker, containers)) == 3
    bench.frame(worker, exited(OLD_CONTAINER + 2, "stopped"))
    bench.client(f={"max_containers": 1}, g={})
    stop = bench.take(m.StopContainer, worker)
    assert (stop.container_id, stop.kill) == (OLD_CONTAINER + 1, True)
    assert list(bench.core.state.containers) == [OLD_CONTAINER]
    bench.later(14)
    bench.frame(worker, m.Heartbeat(1))
    bench.later(14)
    bench.frame(worker, m.Heartbeat(2))
    bench.later(4)
    assert bench.take_all(m.StopContainer) == []


def test_what_nobody_has_claimed_is_killed_after_the_grace() -> None:
    bench = Bench(epoch=2)
    worker = bench.connect("worker")
    ready(bench, worker, [(OLD_CONTAINER, b"f" * 16)])
    for _ in range(int(CLIENT_GRACE_S / 10)):
        bench.later(9.9)
        bench.frame(worker, m.Heartbeat(1))
    assert bench.take_all(m.StopContainer) == []
    bench.later(1)
    stop = bench.take(m.StopContainer, worker)
    assert (stop.container_id, stop.kill) == (OLD_CONTAINER, True)
    assert [worker.unclaimed for worker in bench.core.state.workers.values()] == [{}]


def test_any_frame_is_a_sign_of_life() -> None:
    bench = Bench()
    worker = bench.worker()
    for _ in range(4):
        bench.later(WORKER_DEADLINE_S - 1)
        bench.start(worker, 99)
    assert bench.core.state.counts == {"start of an unknown container": 4}
    bench.later(WORKER_DEADLINE_S)
    (order,) = bench.take_commands(Disconnect)
    assert order == Disconnect(PeerId(worker), "silent", "nothing was heard of worker w1 for 15 s")
    assert bench.core.state.counts["silent worker"] == 1
    assert not bench.core.state.peers


def test_who_has_not_said_that_it_is_ready_is_not_listened_to() -> None:
    bench = Bench()
    worker = bench.connect("worker")
    bench.start(worker, 99)
    bench.frame(99, m.Heartbeat(1))
    assert bench.core.state.counts == {}
    bench.lose(worker)
    bench.lose(99)
    assert not bench.core.state.peers


# --- containers -----------------------------------------------------------------------------------


def test_three_containers_in_a_row_that_die_at_their_start_end_the_calls_of_their_function() -> (
    None
):
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    for number in range(2):
        call_id = bench.open(client, call=1 + number, count=2)
        for left in (2, 1, 0):
            container_id = bench.take(m.StartContainer).container_id
            bench.forget(m.Lease, m.DefineFunction)
            bench.frame(worker, exited(container_id, "start", text="killed by SIGILL", code=4))
            if left:
                assert bench.take_all(m.CallFailed) == []
        failed = bench.take(m.CallFailed, client)
        assert failed.call_id == call_id
        code, text, details = msgpack.unpackb(failed.payload)
        assert code == "start"
        assert text == ("3 containers of f in a row died before they were ready: killed by SIGILL")
        assert details == {"text": "killed by SIGILL", "code": 4}
        assert bench.take_all(m.StartContainer) == []


def test_a_container_that_started_ends_the_row_of_those_that_did_not() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=2)
    for is_started in (False, False, True, False, False):
        container_id = bench.take(m.StartContainer).container_id
        bench.forget(m.Lease, m.DefineFunction)
        if is_started:
            bench.start(worker, container_id)
            bench.frame(worker, exited(container_id, "crash"))
        else:
            bench.frame(worker, exited(container_id, "start", signal=4))
    assert bench.take_all(m.CallFailed) == []
    bench.frame(worker, exited(bench.take(m.StartContainer).container_id, "start", signal=4))
    _, text, _ = msgpack.unpackb(bench.take(m.CallFailed).payload)
    assert text.endswith("{'signal': 4}"), "there is no text to show"


def test_the_exit_of_another_workers_container_is_not_believed() -> None:
    bench = Bench()
    worker, other = bench.worker(cpu=1), bench.worker(cpu=1, number=2)
    client = bench.client(f={})
    bench.open(client, count=1)
    lease = bench.take(m.Lease)
    holder = bench.core.state.containers[lease.container_id].worker.peer_id
    stranger = other if holder == worker else worker
    bench.frame(stranger, exited(lease.container_id, "crash"))
    bench.frame(stranger, exited(99, "crash"))
    assert bench.core.state.counts == {"exit of an unknown container": 2}
    assert lease.container_id in bench.core.state.containers


def test_idle_containers_look_again_when_they_worked_meanwhile() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"scaledown_window": 10})
    bench.open(client, call=1, count=1)
    lease = bench.started_lease(worker)
    bench.finish(worker, lease)
    bench.later(6)
    bench.frame(worker, m.Heartbeat(1))
    bench.open(client, call=2, count=1)
    second = bench.take(m.Lease)
    bench.later(6)
    bench.finish(worker, second)
    bench.later(9.9)
    bench.frame(worker, m.Heartbeat(1))
    assert bench.take_all(m.StopContainer) == []
    bench.later(0.2)
    assert bench.take(m.StopContainer).container_id == lease.container_id
    bench.frame(worker, exited(lease.container_id, "stopped"))
    bench.later(9)
    bench.forget(m.Outputs)
    bench.nothing_left()


def test_a_container_that_dies_gives_up_the_wait_of_its_client() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    inner = bench.open(nested, "g", call=2, count=1, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    bench.frame(worker, exited(outer.container_id, "crash"))
    assert inner not in bench.core.state.calls, "nobody would learn of it"
    assert len(bench.core.state.sessions) == 1


# --- the store ------------------------------------------------------------------------------------


def test_a_spawn_that_cannot_be_written_says_so_and_lets_its_blobs_go() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.blob(BLOB)
    call_id = bench.open(client, is_durable=True, is_sealed=False)
    bench.store()
    lengths, payload = table([b"a"])
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [BLOB])], payload))
    (store,) = bench.take_commands(Store)
    bench.tell(StoreFailed(store.sequence, "disk full"), StoreFailed(99, "what?"))
    code, text, _ = msgpack.unpackb(bench.take(m.CallFailed, client).payload)
    assert (code, text) == ("store", "the scheduler could not store the call: disk full")
    assert bench.blobs_dropped() == [BLOB]
    assert not bench.core.state.blob_references
    assert bench.core.state.counts == {"write that failed": 1}
    records = records_of(bench)
    assert [type(record) for record in records] == [m.CallFailed, m.CallEnded]
    assert not bench.core.state.unsafe_stores


def test_an_output_that_could_not_be_written_is_delivered_when_it_is() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    bench.frame(client, m.FetchOutputs(1, call_id, 0, 2))
    bench.finish(worker, bench.started_lease(worker), input_s=1.0)
    second = bench.take(m.Lease)
    (first,) = bench.take_commands(Store)
    bench.tell(StoreFailed(first.sequence, "disk full"))
    bench.finish(worker, second, input_s=1.0)
    (other,) = bench.take_commands(Store)
    bench.tell(Stored(other.sequence))
    assert bench.take(m.Outputs, client).start == 1
    bench.later(STORE_RETRY_S - 0.1)
    assert bench.take_commands(Store) == []
    assert bench.take_all(m.OutputsAck) == [], "the first of the two is not safe"
    bench.later(0.2)
    (again,) = bench.take_commands(Store)
    assert again.records == first.records
    bench.tell(Stored(again.sequence))
    assert bench.take(m.Outputs, client).start == 0
    assert bench.core.state.calls[call_id].is_over
    bench.later(0.03)
    assert bench.take(m.OutputsAck, worker).sequence == 2


def test_a_fetch_ends_when_all_of_it_was_sent() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=4, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker), input_s=1.0)
    bench.store()
    call = bench.core.state.calls[call_id]
    bench.frame(client, m.FetchOutputs(1, call_id, 0, 1), m.FetchOutputs(2, call_id, 1, 3))
    assert [o.start for o in bench.take_all(m.Outputs, client)] == [0]
    assert [number for _, number in call.fetches] == [2]
    bench.finish(worker, bench.take(m.Lease), input_s=1.0)
    bench.store()
    bench.frame(client, m.FetchOutputs(3, call_id, 2, 99))
    bench.frame(client, m.CancelCall(call_id))
    bench.store()
    failed = m.Status.FAILURE
    outputs = [
        (o.start + at, status)
        for o in bench.take_all(m.Outputs, client)
        for at, status in enumerate(o.statuses)
    ]
    assert sorted(outputs) == [(1, 0), (2, failed), (2, failed), (3, failed)]
    assert not call.fetches
    bench.frame(client, m.FetchOutputs(4, call_id, 0, 4))
    counts = [(o.start, len(o.statuses)) for o in bench.take_all(m.Outputs, client)]
    assert counts == [(0, 1), (1, 1), (2, 2)]
    assert not call.fetches


def test_failures_of_a_call_that_was_not_sealed_are_those_of_its_inputs() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True, is_sealed=False)
    bench.store()
    bench.frame(client, m.CancelCall(call_id), m.FetchOutputs(1, call_id, 0, 99))
    (outputs,) = bench.take_all(m.Outputs, client)
    assert (outputs.start, len(outputs.statuses)) == (0, 2)


def test_results_are_forgotten_after_their_time_and_so_is_that_they_were_there() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=1, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    bench.frame(client, m.CloseApp(APP))
    records = [*records_of(bench), *records_of(bench)]
    ended = next(record for record in records if isinstance(record, m.CallEnded))
    assert (ended.call_id, ended.ended_at) == (call_id, bench.now + bench.core.state.wall_offset_s)
    bench.lose(worker)
    bench.lose(client)
    bench.later(RESULT_RETENTION_S - 1)
    assert call_id in bench.core.state.calls
    bench.later(2)
    records = records_of(bench)
    assert [type(record) for record in records] == [ForgetCall, m.CallExpired, ForgetApp]
    assert records[0] == ForgetCall(call_id)
    assert records[2] == ForgetApp(APP)
    state = bench.core.state
    assert (state.calls, state.apps, state.functions) == ({}, {}, {})
    assert list(state.expired) == [call_id]


# --- a restart ------------------------------------------------------------------------------------


def spawned(bench: Bench, count: int = 3, blobs: Any = ()) -> tuple[int, list[Any]]:
    """A client that has spawned a call of so many inputs, and what was written."""
    client = bench.connect()
    bench.frame(client, m.OpenApp(APP, "app"))
    definition = m.DefineFunction(b"f" * 16, APP, "f", {}, list(blobs), b"code")
    bench.frame(client, definition)
    bench.open(client, count=count, is_durable=True)
    return client, records_of(bench)


def test_a_restart_gives_back_names_numbers_and_blobs() -> None:
    bench = Bench()
    bench.blob(BLOB)
    _, records = spawned(bench, blobs=[BLOB])
    again = reborn(bench, records)
    state = again.core.state
    assert [(app.name, app.is_stored, app.is_closing) for app in state.apps.values()] == [
        ("app", True, False)
    ]
    (function,) = state.functions.values()
    assert (function.definition.name, function.is_stored, function.lacks_blobs) == ("f", True, True)
    call = state.calls[CALL]
    assert (call.depth, call.is_durable, call.sealed_count) == (0, True, 3)
    assert list(call.queued) == [(0, 3)]
    assert state.blob_references == {BLOB: 1}
    assert state.apps[APP].open_count == 1
    worker = again.worker(cpu=1)
    assert again.take_all(m.StartContainer) == [], "the function's blob is not here"
    again.blob(BLOB)
    assert again.take(m.StartContainer, worker).function_id == b"f" * 16


def test_inputs_that_have_an_output_are_not_run_again_and_their_bytes_are_gone() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client, records = spawned(bench, count=0)
    call_id = bench.open(client, call=2, count=0, is_durable=True, is_sealed=False)
    bench.blob(BLOB)
    lengths, payload = table([b"a", b"b"])
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [BLOB])], payload))
    bench.frame(client, m.SealCall(call_id, 2))
    records += records_of(bench)
    bench.finish(worker, bench.started_lease(worker), input_s=1.0)
    records += records_of(bench)
    again = Bench(epoch=2)
    again.core = Scheduler(2)
    again.core.restore([*records, records[-1]], again.now)
    again.blob(BLOB)
    call = again.core.state.calls[call_id]
    assert (list(call.finished), list(call.queued), len(list(call.outputs))) == (
        [(0, 1)],
        [(1, 2)],
        1,
    )
    second = again.started_lease(again.worker(cpu=1))
    assert (second.start, bytes(second.payload), second.blobs) == (1, b"b", [])
    again.finish(1, second)
    again.store()
    assert again.blobs_dropped() == [BLOB], "with the last input of its chunk"


def test_a_call_that_failed_comes_back_as_failed_and_holds_nothing() -> None:
    bench = Bench()
    client, records = spawned(bench)
    bench.blob(BLOB)
    lengths, payload = table([b"a"])
    call_id = bench.open(client, call=2, is_durable=True, is_sealed=False)
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [BLOB])], payload))
    bench.frame(client, m.CancelCall(call_id))
    records += records_of(bench)
    again = reborn(bench, records)
    reader = again.connect()
    again.frame(reader, m.AskCall(1, call_id), m.FetchOutputs(2, call_id, 0, 9))
    assert again.take(m.CallInfo).state == "failed"
    assert [o.start for o in again.take_all(m.Outputs, reader)] == [0]
    assert not again.core.state.blob_references


def test_records_of_a_call_that_was_refused_are_removed_at_a_restart() -> None:
    bench = Bench()
    _, records = spawned(bench)
    app, definition, opened, *rest = records
    stray = m.OpenCall(b"\7" * 16, b"?" * 16, True, True, None)
    wrong = m.OpenCall(b"\6" * 16, b"f" * 16, True, True, None, method="lead")
    again = reborn(bench, [app, definition, *rest, stray, wrong])
    forgotten = [CALL, stray.call_id, wrong.call_id]
    assert records_of(again) == [ForgetCall(call_id) for call_id in forgotten]
    assert opened.call_id == CALL
    assert not again.core.state.calls


def test_a_spawn_that_was_not_sealed_waits_for_its_client_for_the_grace() -> None:
    for is_back in (False, True):
        bench = Bench()
        client, records = spawned(bench)
        call_id = bench.open(client, call=2, count=1, is_durable=True, is_sealed=False)
        records += records_of(bench)
        again = reborn(bench, records)
        if is_back:
            peer = again.connect(session=client.to_bytes(16, "big"))
            again.frame(peer, m.OpenCall(call_id, b"f" * 16, True, True, None, True))
        again.later(CLIENT_GRACE_S - 1)
        assert not again.core.state.calls[call_id].is_over
        again.later(2)
        assert again.core.state.calls[call_id].is_over is not is_back
        assert not again.core.state.calls[CALL].is_over


def test_results_keep_their_time_over_a_restart() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    _, records = spawned(bench, count=1)
    bench.finish(worker, bench.started_lease(worker))
    records += records_of(bench)
    records += records_of(bench)
    ended = [record for record in records if isinstance(record, m.CallEnded)]
    assert len(ended) == 1
    again = reborn(bench, records, wall_time_s=ended[0].ended_at + 100)
    assert again.take_commands(Store) == [], "when it ended is written already"
    again.later(RESULT_RETENTION_S - 101)
    assert CALL in again.core.state.calls
    again.later(2)
    assert not again.core.state.calls
    late = reborn(bench, records, wall_time_s=ended[0].ended_at + 2 * RESULT_RETENTION_S)
    late.later(0)
    assert not late.core.state.calls


def test_the_client_of_a_restored_app_may_go_on_with_it() -> None:
    bench = Bench()
    client, records = spawned(bench)
    again = reborn(bench, records)
    peer = again.connect(session=client.to_bytes(16, "big"))
    again.frame(peer, m.OpenApp(APP, "app"), inputs(CALL, 3, 1))
    assert not again.core.state.apps[APP].is_closing
    again.define(peer, "f", {})
    assert len(again.core.state.functions) == 1


def test_a_definition_that_is_on_disk_is_not_written_again() -> None:
    bench = Bench()
    bench.blob(BLOB)
    client, records = spawned(bench, blobs=[BLOB])
    bench.open(client, call=2, count=1, is_durable=True)
    assert [type(record) for record in records_of(bench)] == [m.OpenCall, m.Inputs, m.SealCall]
    assert bench.core.state.apps[APP].stored_blobs == [BLOB]
    assert m.DefineFunction in [type(record) for record in records]


def test_an_output_of_a_call_that_was_forgotten_meanwhile_lets_its_blobs_go() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client, _ = spawned(bench, count=1)
    bench.blob(BLOB)
    lease = bench.started_lease(worker)
    report = m.LeaseOutputs(1, lease.lease_id, CALL, 0, 1, b"\1\0\0\0", b"\0", [(0, [BLOB])], b"v")
    bench.frame(worker, report)
    (output,) = bench.take_commands(Store)
    bench.frame(client, m.CancelCall(CALL))
    bench.later(RESULT_RETENTION_S + 1)
    assert CALL not in bench.core.state.calls
    assert bench.core.state.blob_references == {BLOB: 1}
    bench.tell(Stored(output.sequence))
    assert not bench.core.state.blob_references
    assert bench.blobs_dropped() == [BLOB]


def test_inputs_of_a_restored_call_may_make_calls() -> None:
    bench = Bench()
    _, records = spawned(bench, count=1)
    again = reborn(bench, records)
    worker = again.worker(cpu=2)
    lease = again.started_lease(worker)
    nested = again.connect("nested", worker=worker, container_id=lease.container_id)
    inner = again.open(nested, call=2, count=1, parent=(lease.lease_id, 0))
    call = again.core.state.calls[inner]
    assert (call.depth, [c.container_id for c in call.ancestors]) == (1, [lease.container_id])
    text = m.ContainerLog(lease.container_id, CALL, 0, m.Source.STDOUT, b"hello")
    again.frame(worker, text)
    assert again.core.state.counts == {"log text that nobody read": 1}


def test_reports_of_a_workers_former_self_are_not_acknowledged_to_it() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1)
    bench.finish(worker, bench.started_lease(worker))
    ready(bench, bench.connect("worker"))
    bench.later(1)
    assert bench.take_all(m.OutputsAck) == [], "it counts anew"
    assert not bench.core.state.acknowledging
