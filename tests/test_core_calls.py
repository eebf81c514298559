"""What clients ask the core for, one message after the other: calls, apps, logs, questions."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fanout.config import CLIENT_GRACE_S, WINDOW_BYTES, WINDOW_COUNT_MAX, WINDOW_COUNT_MIN
from fanout.protocol import messages as m
from fanout_scheduler.core.events import Disconnect, PeerId, PeerWritable, Store
from tests.core_kit import APP, Bench, ack, inputs, table

CALL = b"\1" * 16
OTHER = b"\2" * 16


def submit(count: int, is_durable: bool = False, blobs: Any = None, **changes: Any) -> m.SubmitCall:
    fields: dict[str, Any] = {"function_id": b"f" * 16, "parent": None, "method": ""} | changes
    lengths, payload = table([bytes([i]) for i in range(count)])
    return m.SubmitCall(
        CALL, fields["function_id"], is_durable, True, fields["parent"], fields["method"],
        lengths, blobs or [], payload,
    )  # fmt: skip


def failure_of(message: m.CallFailed) -> tuple[str, str, dict[str, Any]]:
    code, text, details = msgpack.unpackb(message.payload)
    return code, text, details


def stores(bench: Bench) -> list[Any]:
    """The records that are to be written, in their order; they are written."""
    return [record for store in bench.store() for record in store.records]


# --- a call in one frame --------------------------------------------------------------------------


def test_a_call_that_is_submitted_whole_runs_and_ends() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.frame(client, submit(2))
    lease = bench.started_lease(worker)
    assert (lease.call_id, lease.start, bytes(lease.payload)) == (CALL, 0, b"\0")
    bench.finish(worker, lease)
    second = bench.take(m.Lease)
    assert (second.start, bytes(second.payload)) == (1, b"\1")
    bench.finish(worker, second)
    assert [outputs.start for outputs in bench.take_all(m.Outputs, client)] == [0, 1]
    bench.frame(client, ack(CALL, 0, 2, 2))
    assert not bench.core.state.calls
    bench.nothing_left()


def test_a_call_that_is_submitted_twice_is_one_call() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.frame(client, submit(2), submit(2))
    assert bench.core.state.calls[CALL].received.count == 2
    assert bench.core.state.counts == {"duplicate call": 1}


def test_a_spawned_call_that_is_submitted_whole_is_told_when_all_of_it_is_stored() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.frame(client, submit(3, is_durable=True))
    records = stores(bench)
    kinds = [m.OpenApp, m.DefineFunction, m.OpenCall, m.Inputs, m.SealCall]
    assert [type(record) for record in records] == kinds
    assert (records[2].is_durable, records[2].is_ordered, records[2].parent) == (True, True, None)
    assert (records[3].start, bytes(records[3].payload), records[4].count) == (0, b"\0\1\2", 3)
    assert bench.take(m.CallOpened).present == []
    told = [(answer.stored, answer.is_sealed) for answer in bench.take_all(m.InputsStored)]
    assert told == [([(0, 3)], False), ([], True)]


def test_a_submitted_call_keeps_its_blobs_as_long_as_it_needs_them() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    blob_id = b"B" * 32
    bench.blob(blob_id)
    bench.frame(client, submit(1, blobs=[(0, [blob_id])]))
    assert bench.core.state.blob_references == {blob_id: 1}
    assert bench.blobs_sent() == [(worker, blob_id)]
    bench.finish(worker, bench.started_lease(worker))
    assert bench.blobs_dropped() == [blob_id]
    assert bench.blobs_withdrawn(worker) == [blob_id]
    assert not bench.core.state.blob_references


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"function_id": b"?" * 16}, "internal", "its function is not defined"),
        ({"method": "lead"}, "internal", "there is no method 'lead'"),
        ({"parent": (77, 0)}, "cancelled", "the input that made it has ended"),
    ],
)
def test_a_call_that_cannot_be_taken_is_refused_with_the_reason(
    changes: dict[str, Any], code: str, words: str
) -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.frame(client, submit(1, **changes))
    failed = bench.take(m.CallFailed, client)
    assert failed.call_id == CALL
    assert failure_of(failed)[:2] == (code, f"the scheduler did not take the call: {words}")
    assert not bench.core.state.calls
    bench.nothing_left()


def test_an_input_of_another_container_is_no_parent() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={}, g={})
    bench.open(client, call=2, count=2)
    leases = bench.take_all(m.Lease)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    nested = bench.connect("nested", worker=worker, container_id=leases[0].container_id)
    bench.frame(nested, submit(1, function_id=b"g" * 16, parent=(leases[1].lease_id, 1)))
    assert failure_of(bench.take(m.CallFailed, nested))[0] == "cancelled"
    bench.frame(nested, submit(1, function_id=b"g" * 16, parent=(leases[0].lease_id, 0)))
    call = bench.core.state.calls[CALL]
    assert call.depth == 1
    assert [c.container_id for c in call.ancestors] == [leases[0].container_id]


def test_a_container_may_call_only_functions_of_its_app() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, call=2, count=1)
    lease = bench.started_lease(worker)
    stranger = bench.connect()
    bench.frame(stranger, m.OpenApp(b"s" * 16, "strange"))
    bench.frame(stranger, m.DefineFunction(b"g" * 16, b"s" * 16, "g", {}, [], b"code"))
    nested = bench.connect("nested", worker=worker, container_id=lease.container_id)
    bench.frame(nested, submit(1, function_id=b"g" * 16))
    assert failure_of(bench.take(m.CallFailed))[1].endswith("its function is not defined")
    bench.frame(nested, m.AskFunction(1, b"g" * 16, {}))
    assert bench.take(m.FunctionInfo).info == {"error": "its function is not defined"}
    bench.frame(nested, m.AskFunction(1, b"f" * 16, {}))
    assert bench.take(m.FunctionInfo).info["containers"] == 1
    bench.frame(nested, m.DefineFunction(b"h" * 16, b"s" * 16, "h", {}, [], b"code"))
    bench.frame(nested, m.DefineFunction(b"i" * 16, b"?" * 16, "i", {}, [], b"code"))
    assert bench.core.state.counts == {"definition for an unknown app": 2}
    assert bench.core.state.functions.keys() == {b"f" * 16, b"g" * 16}


def test_a_container_that_is_gone_has_no_clients() -> None:
    bench = Bench()
    bench.connect("nested", container_id=12)
    bench.connect("nested")
    assert bench.core.state.counts == {"nested client of an unknown container": 2}
    assert not bench.core.state.peers
    assert not bench.core.state.sessions


# --- ends -----------------------------------------------------------------------------------------


def test_a_client_lets_go_of_its_own_attached_calls_alone() -> None:
    bench = Bench()
    client, other = bench.client(f={}), bench.connect()
    mine = bench.open(client, call=1, count=1)
    spawned = bench.open(client, call=2, count=1, is_durable=True)
    bench.store()
    bench.frame(other, m.CallsFinished([mine, spawned]))
    bench.frame(client, m.CallsFinished([spawned, b"?" * 16]))
    assert bench.core.state.calls.keys() == {mine, spawned}
    assert bench.core.state.counts == {
        "message for another session's call": 3,
        "message for an unknown call": 1,
    }
    bench.frame(client, m.CallsFinished([mine]))
    assert bench.core.state.calls.keys() == {spawned}


def test_only_the_session_of_an_attached_call_may_speak_of_it() -> None:
    bench = Bench()
    client, other = bench.client(f={}), bench.connect()
    call_id = bench.open(client, count=1, is_sealed=False)
    bench.frame(other, inputs(call_id, 1, 1), m.SealCall(call_id, 1), m.CancelCall(call_id))
    bench.frame(other, m.TerminateCall(call_id), m.SealCall(b"?" * 16, 1))
    call = bench.core.state.calls[call_id]
    assert (call.received.count, call.sealed_count) == (1, None)
    assert bench.core.state.counts == {
        "message for another session's call": 2,
        "message for an unknown call": 1,
    }


def test_a_spawned_call_may_be_cancelled_by_whoever_knows_its_id() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    bench.forget(m.CallOpened, m.InputsStored)
    other = bench.connect()
    bench.frame(other, m.CancelCall(call_id), m.AskCall(1, call_id))
    assert bench.take(m.CallInfo, other).state == "sealed", "it is not on disk yet"
    ended = [type(record) for store in bench.store() for record in store.records]
    assert ended == [m.CallFailed, m.CallEnded]
    failed = bench.take(m.CallFailed, client)
    assert failure_of(failed) == ("cancelled", "the call was cancelled", {"call_id": call_id})
    bench.frame(other, m.AskCall(2, call_id))
    assert bench.take(m.CallInfo, other).state == "cancelled"
    bench.frame(other, m.CancelCall(call_id))
    bench.nothing_left()
    assert not bench.core.state.calls[call_id].waits_for


def test_the_end_of_an_app_cancels_what_is_attached_and_no_more() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, call=1, count=1)
    spawned = bench.open(client, "g", call=2, count=1, is_durable=True)
    bench.store()
    lease = bench.started_lease(worker)
    bench.frame(client, m.CloseApp(APP), m.CloseApp(b"?" * 16))
    assert bench.take(m.CancelLease).lease_id == lease.lease_id
    state = bench.core.state
    assert state.calls.keys() == {spawned}
    assert state.apps.keys() == {APP}
    bench.finish(worker, lease, status=m.Status.FAILURE)
    bench.finish(worker, bench.started_lease(worker))
    bench.store()
    # The results are kept, and with them the function that they name; f is gone.
    assert state.functions.keys() == {b"g" * 16}
    assert state.apps[APP].functions.keys() == {b"g" * 16}
    assert bench.take(m.DropFunction, worker).function_id == b"f" * 16
    assert {c.state for c in state.containers.values()} == {"stopping"}
    assert not state.ready_functions


def test_an_app_is_forgotten_with_its_last_call() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    blob_id = b"B" * 32
    bench.blob(blob_id)
    client = bench.connect()
    bench.frame(client, m.OpenApp(APP, "app"))
    definition = m.DefineFunction(b"f" * 16, APP, "f", {"min_containers": 1}, [blob_id], b"code")
    bench.frame(client, definition)
    assert bench.blobs_sent() == [(worker, blob_id)]
    call_id = bench.open(client, count=1)
    bench.frame(client, m.CloseApp(APP))
    state = bench.core.state
    assert (state.apps, state.functions, state.scaled, state.calls) == ({}, {}, {}, {})
    assert not state.blob_references
    assert bench.blobs_dropped() == [blob_id]
    assert bench.take(m.DropFunction, worker).function_id == b"f" * 16
    assert not [order for order in bench.orders if isinstance(order, Store)], "it never was there"
    bench.frame(client, m.CancelCall(call_id))


def test_a_spawn_that_its_client_did_not_complete_ends_with_it() -> None:
    bench = Bench()
    client = bench.client(f={})
    whole = bench.open(client, call=1, count=1, is_durable=True)
    part = bench.open(client, call=2, count=1, is_durable=True, is_sealed=False)
    bench.store()
    bench.lose(client)
    bench.later(CLIENT_GRACE_S + 1)
    states = {}
    reader = bench.connect()
    for call_id in (whole, part):
        bench.frame(reader, m.AskCall(1, call_id))
        states[call_id] = bench.take(m.CallInfo).state
    assert states == {whole: "sealed", part: "cancelled"}


# --- a client that comes back ---------------------------------------------------------------------


def test_a_second_connection_of_a_session_takes_the_place_of_the_first() -> None:
    bench = Bench()
    session = b"S" * 16
    first = bench.connect(session=session)
    bench.frame(first, m.OpenApp(APP, "app"))
    bench.define(first, "f", {})
    call_id = bench.open(first, count=1)
    second = bench.connect(session=session)
    (order,) = bench.take_commands(Disconnect)
    assert order == Disconnect(PeerId(first), "replaced", "the session has a newer connection")
    bench.lose(first)
    bench.frame(second, m.OpenCall(call_id, b"f" * 16, False, True, None, True))
    opened = bench.take(m.CallOpened, second)
    assert opened.present == [(0, 1)]
    assert (opened.window_count, opened.window_bytes) == (WINDOW_COUNT_MIN, WINDOW_BYTES)
    bench.later(2 * CLIENT_GRACE_S)
    assert call_id in bench.core.state.calls


def test_a_call_goes_over_to_the_session_that_submits_it_again() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, count=1)
    other = bench.connect()
    bench.frame(other, m.OpenCall(call_id, b"f" * 16, False, True, None, True))
    sessions = bench.core.state.sessions
    mine, others = (sessions[peer.to_bytes(16, "big")] for peer in (client, other))
    assert (list(mine.calls), list(others.calls)) == ([], [call_id])
    bench.lose(client)
    bench.later(CLIENT_GRACE_S - 1)
    assert list(bench.core.state.calls) == [call_id]


def test_items_and_the_failure_of_a_call_are_told_again() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"is_generator": True}, g={})
    call_id = bench.open(client, count=2)
    bench.open(client, "g", call=2, count=1)
    lease, second = bench.take_all(m.Lease)
    bench.start(worker, lease.container_id)
    blob_id = b"B" * 32
    bench.blob(blob_id)
    lengths = (1).to_bytes(4, "little") * 2
    items = m.LeaseItems(1, lease.lease_id, call_id, 0, 0, lengths, [(1, [blob_id])], b"ab")
    bench.frame(worker, items)
    assert bytes(bench.take(m.Items, client).payload) == b"ab"
    assert bench.blobs_sent() == [(client, blob_id)]
    failed = m.ContainerExited(second.container_id, "start", [], {}, b"pickled")
    bench.frame(worker, failed)
    bench.take(m.CallFailed, client)
    bench.lose(client)
    again = bench.connect(session=client.to_bytes(16, "big"))
    bench.frame(again, m.OpenCall(call_id, b"f" * 16, False, True, None, True))
    assert bytes(bench.take(m.Items, again).payload) == b"ab"
    assert bench.blobs_sent() == [(again, blob_id)]
    assert bytes(bench.take(m.CallFailed, again).payload) == b"pickled"
    assert bench.core.state.calls[OTHER].failure is None, "another function's call goes on"
    bench.frame(again, m.CancelCall(call_id))
    assert bench.blobs_dropped() == [blob_id]


def test_the_outputs_of_a_spawned_call_are_not_pushed_to_who_submits_it_again() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    bench.store()
    bench.forget(m.InputsStored, m.CallOpened)
    bench.frame(client, m.OpenCall(call_id, b"f" * 16, True, True, None, True))
    stored = bench.take(m.InputsStored)
    assert (stored.stored, stored.is_sealed) == ([(0, 2)], True)
    assert bench.take_all(m.Outputs) == []
    bench.frame(client, inputs(call_id, 0, 2), m.SealCall(call_id, 2))
    told = [(answer.stored, answer.is_sealed) for answer in bench.take_all(m.InputsStored)]
    assert told == [([(0, 2)], True), ([], True)]
    assert bench.store() == [], "all of it is there already"


def test_a_client_may_send_twice_its_credit_and_no_more() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, is_sealed=False)
    limit = 2 * WINDOW_COUNT_MAX + m.CHUNK_INPUTS_MAX
    for start in range(0, limit, m.CHUNK_INPUTS_MAX):
        count = min(m.CHUNK_INPUTS_MAX, limit - start)
        bench.frame(client, inputs(call_id, start, count))
    assert bench.take_commands(Disconnect) == []
    bench.frame(client, inputs(call_id, limit, 1))
    (order,) = bench.take_commands(Disconnect)
    assert (order.peer_id, order.code) == (client, "credit")
    text = f"call {call_id.hex()} has more inputs in flight than its credit allows"
    assert order.text == text


def test_what_the_user_has_consumed_is_credit_again() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, is_sealed=False)
    limit = 2 * WINDOW_COUNT_MAX + m.CHUNK_INPUTS_MAX
    for start in range(0, limit, m.CHUNK_INPUTS_MAX):
        bench.frame(client, inputs(call_id, start, min(m.CHUNK_INPUTS_MAX, limit - start)))
    bench.frame(client, m.Ack(call_id, [], 5, 0), inputs(call_id, limit, 5))
    assert bench.take_commands(Disconnect) == []


def test_quick_functions_get_a_wider_window() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=5000, is_sealed=False)
    bench.finish(worker, bench.started_lease(worker), input_s=1e-6)
    leased = bench.core.state.calls[call_id].leased_count
    assert leased > WINDOW_COUNT_MIN / 8
    window = bench.take_all(m.Window, client)[-1]
    assert window.window_count == min(WINDOW_COUNT_MAX, WINDOW_COUNT_MIN + 8 * leased)
    assert (window.call_id, window.window_bytes) == (call_id, WINDOW_BYTES)


# --- text of containers ---------------------------------------------------------------------------


def log(container_id: int, call_id: bytes = b"", text: bytes = b"hello") -> m.ContainerLog:
    return m.ContainerLog(container_id, call_id, 3, m.Source.STDOUT, text)


def test_text_goes_to_the_client_of_its_call() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client, _ = bench.client(f={}), bench.connect()
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.frame(worker, log(lease.container_id, call_id), log(lease.container_id))
    for told in bench.take_all(m.Log, client):
        assert (told.call_id, told.index, told.container_id) == (call_id, 3, lease.container_id)
        assert (told.source, bytes(told.payload)) == (m.Source.STDOUT, b"hello")
    bench.finish(worker, lease)
    bench.frame(client, ack(call_id, 0, 1, 1))
    bench.forget(m.Outputs)
    # What a hook says behind the last call goes to who has opened the app.
    bench.frame(worker, log(lease.container_id))
    assert bench.take(m.Log, client).call_id == b"\0" * 16
    bench.nothing_left()


def test_text_of_a_nested_call_goes_to_the_client_at_its_root() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={}, g={})
    bench.open(client, call=1, count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    inner_id = bench.open(nested, "g", call=2, count=1, parent=(outer.lease_id, 0))
    inner = bench.started_lease(worker)
    bench.frame(worker, log(inner.container_id, inner_id))
    assert bench.take(m.Log, client).call_id == inner_id
    bench.finish(worker, outer)
    bench.frame(worker, log(inner.container_id, inner_id))
    assert bench.take_all(m.Log) == [], "the root's container has gone on to something else"
    assert bench.core.state.counts == {"log text that nobody read": 1}


def test_text_that_nobody_can_read_is_dropped_and_counted() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=1, is_durable=True)
    bench.store()
    lease = bench.started_lease(worker)
    bench.tell(PeerWritable(PeerId(client), False), PeerWritable(PeerId(99), False))
    bench.frame(worker, log(lease.container_id, call_id), log(999))
    assert bench.take_all(m.Log) == []
    bench.tell(PeerWritable(PeerId(client), True))
    bench.frame(worker, log(lease.container_id, call_id))
    sources = [told.source for told in bench.take_all(m.Log)]
    assert sources == [m.Source.SYSTEM, m.Source.STDOUT], "how much is missing is said first"
    bench.frame(client, m.WatchProgress(True))
    bench.frame(worker, log(lease.container_id, call_id))
    bench.take(m.Log)
    bench.lose(client)
    bench.frame(worker, log(lease.container_id, call_id))
    assert bench.take_all(m.Log) == []
    assert bench.core.state.counts == {
        "log text that nobody read": 2,
        "log text of an unknown container": 1,
    }


# --- questions ------------------------------------------------------------------------------------


def info_of(bench: Bench, peer: int, call_id: bytes) -> tuple[Any, ...]:
    bench.frame(peer, m.AskCall(9, call_id))
    info = bench.take(m.CallInfo, peer)
    assert (info.request_id, info.call_id) == (9, call_id)
    return (
        info.state, info.input_count, info.output_count, info.function_name, info.is_generator
    )  # fmt: skip


def test_a_call_tells_how_far_it_is() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={"is_generator": True})
    reader = bench.connect()
    assert info_of(bench, reader, b"?" * 16) == ("unknown", 0, 0, "", False)
    attached = bench.open(client, call=3, count=1)
    assert info_of(bench, reader, attached) == ("unknown", 0, 0, "", False)
    call_id = bench.open(client, call=1, count=2, is_durable=True, is_sealed=False)
    bench.store()
    assert info_of(bench, reader, call_id) == ("open", 2, 0, "f", False)
    bench.frame(client, m.SealCall(call_id, 5))
    bench.store()
    assert info_of(bench, reader, call_id) == ("sealed", 5, 0, "f", False)
    bench.frame(client, m.CancelCall(attached))
    bench.finish(worker, bench.started_lease(worker), status=m.Status.FAILURE, input_s=1.0)
    bench.finish(worker, bench.take(m.Lease))
    bench.store()
    assert info_of(bench, reader, call_id) == ("sealed", 5, 1, "f", False)
    other = bench.open(client, "g", call=2, count=1, is_durable=True)
    bench.store()
    assert info_of(bench, reader, other) == ("sealed", 1, 0, "g", True)


def test_a_call_that_failed_by_itself_was_not_cancelled() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    reader = bench.connect()
    call_id = bench.open(client, count=1, is_durable=True)
    bench.store()
    container_id = bench.take(m.StartContainer).container_id
    bench.frame(worker, m.ContainerExited(container_id, "start", [], {}, b"pickled"))
    bench.store()
    assert info_of(bench, reader, call_id)[0] == "failed"


def test_the_status_is_the_snapshot() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.frame(client, m.AskStatus(4))
    status = bench.take(m.StatusInfo, client)
    assert status.request_id == 4
    assert status.status == bench.core.snapshot()


def test_who_stops_fetching_is_sent_nothing_more() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=3, is_durable=True)
    bench.store()
    one, two = bench.connect(), bench.connect()
    for reader in (one, two):
        bench.frame(reader, m.FetchOutputs(5, call_id, 0, 3), m.FetchOutputs(6, call_id, 0, 1))
    bench.finish(worker, bench.started_lease(worker), input_s=1.0)
    bench.store()
    assert len(bench.take_all(m.Outputs, one)) == len(bench.take_all(m.Outputs, two)) == 2
    bench.frame(one, m.StopFetch(5))
    bench.finish(worker, bench.take(m.Lease), input_s=1.0)
    bench.store()
    assert bench.take_all(m.Outputs, one) == []
    assert [outputs.start for outputs in bench.take_all(m.Outputs, two)] == [1]
    bench.lose(two)
    assert not bench.core.state.calls[call_id].fetches
    bench.frame(one, m.FetchOutputs(7, b"?" * 16, 0, 3))
    info = bench.take(m.CallInfo, one)
    assert (info.request_id, info.state) == (7, "unknown")


def test_a_shutdown_that_is_not_asked_for_by_force_waits_for_nobody_when_idle() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.frame(client, m.AskShutdown(3, False))
    info = bench.take(m.ShutdownInfo, client)
    assert (info.request_id, info.is_leaving, info.text) == (3, True, "")
    (order,) = bench.orders
    assert order.reason == "a client asked for it"  # type: ignore[union-attr]


# --- what comes twice, in part, or from somebody else ---------------------------------------------


def test_of_inputs_that_are_here_in_part_the_rest_is_taken() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 9})
    call_id = bench.open(client, is_sealed=False)
    bench.blob(b"B" * 32)
    lengths, payload = table([b"cc", b"dd", b"ee", b"ff"])
    bench.frame(client, inputs(call_id, 3, 1))
    bench.frame(client, m.Inputs(call_id, 2, lengths, [(2, [b"B" * 32])], payload))
    assert list(bench.core.state.calls[call_id].received) == [(2, 6)]
    told = [(o.start, bytes(o.payload), o.blobs) for o in bench.take_all(m.Lease, worker)]
    assert told == [(3, b"\3", []), (2, b"cc", []), (4, b"eeff", [(0, [b"B" * 32])])]
    assert bench.core.state.blob_references == {b"B" * 32: 1}


def test_inputs_whose_blobs_are_here_wait_for_none() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.blob(b"B" * 32)
    call_id = bench.open(client, is_sealed=False)
    with bench.one_turn():
        bench.frame(client, m.Inputs(call_id, 0, b"\1\0\0\0", [(0, [b"B" * 32])], b"x"))
        assert bench.core.state.calls[call_id].waits_for == ""


def test_who_has_not_opened_an_app_cannot_close_it() -> None:
    bench = Bench()
    client, other = bench.client(f={}), bench.connect()
    call_id = bench.open(client, count=1)
    bench.frame(other, m.CloseApp(APP))
    assert call_id in bench.core.state.calls
    assert not bench.core.state.apps[APP].is_closing


def test_a_window_grows_while_its_client_is_away() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=5000, is_sealed=False)
    lease = bench.started_lease(worker)
    bench.lose(client)
    bench.finish(worker, lease, input_s=1e-6)
    window_count = bench.core.state.calls[call_id].window_count
    assert window_count > WINDOW_COUNT_MIN
    again = bench.connect(session=client.to_bytes(16, "big"))
    bench.frame(again, m.OpenCall(call_id, b"f" * 16, False, True, None, True))
    assert bench.take(m.CallOpened, again).window_count == window_count


@pytest.mark.parametrize(("left", "is_held"), [(1, False), (0, True)])
def test_outputs_are_held_back_from_a_full_window_on(left: int, is_held: bool) -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, call=1, count=9)
    leases = bench.start_all(worker)
    bench.finish(worker, leases[1], values=[bytes(WINDOW_BYTES - left)], input_s=1.0)
    assert bool(bench.take_all(m.Lease)) is not is_held
    held = bench.core.state.calls[CALL].waits_for
    assert held.startswith("its consumer") is is_held


def test_outputs_that_go_to_disk_wait_for_no_consumer() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, call=1, count=9, is_durable=True)
    bench.store()
    leases = bench.start_all(worker)
    bench.finish(worker, leases[1], values=[bytes(2 * WINDOW_BYTES)], input_s=1.0)
    bench.store()
    assert len(bench.take_all(m.Lease)) == 1


def test_a_call_that_has_failed_waits_for_nothing() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_containers": 1})
    call_id = bench.open(client, count=3)
    container_id = bench.take(m.StartContainer).container_id
    assert bench.core.state.calls[call_id].waits_for
    bench.frame(worker, m.ContainerExited(container_id, "start", [], {}, b"pickled"))
    assert bench.core.state.calls[call_id].waits_for == ""
