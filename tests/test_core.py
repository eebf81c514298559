"""The scheduler's core, one behaviour a test: facts in, exact orders out."""

from __future__ import annotations

from fanout.protocol import messages as m
from fanout_scheduler.core.events import BlobCompleted, Disconnect, Exit, Store, StoreFailed
from tests.core_kit import APP, Bench, ack, inputs


def test_a_single_call_is_leased_delivered_and_forgotten() -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(f={})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    assert (lease.start, bytes(lease.payload)) == (0, b"\0")
    bench.finish(worker, lease)
    outputs = bench.take(m.Outputs, client)
    assert (outputs.start, bytes(outputs.payload)) == (0, b"v")
    bench.later(0.03)
    assert bench.take(m.OutputsAck).sequence == 1
    bench.frame(client, ack(call_id, 0, 1, 1))
    bench.nothing_left()
    assert bench.core.state.calls == {}
    assert bench.core.state.leases == {}


def test_a_lease_is_a_slice_of_its_chunk() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=100)
    bench.forget(m.CallOpened)
    first = bench.started_lease(worker)
    assert bytes(first.payload) == b"\0"
    bench.finish(worker, first, input_s=0.001)
    second = bench.take_all(m.Lease)[0]
    assert second.start == 1
    assert bytes(second.payload) == bytes(range(1, 1 + len(second.payload)))
    assert 10 <= len(second.payload) <= 30


def test_inputs_are_spread_over_all_cores() -> None:
    bench = Bench()
    worker = bench.worker(cpu=3)
    client = bench.client(f={})
    bench.open(client, count=10)
    leases = bench.take_all(m.Lease)
    assert [lease.start for lease in leases] == [0, 1, 2]
    assert len(bench.take_all(m.StartContainer, worker)) == 3


def test_max_containers_is_never_exceeded() -> None:
    bench = Bench()
    bench.worker(cpu=4)
    client = bench.client(f={"max_containers": 2})
    bench.open(client, count=10)
    assert len(bench.take_all(m.StartContainer)) == 2


def test_output_of_a_lost_worker_that_returns_is_used_once() -> None:
    bench = Bench()
    first = bench.worker(cpu=1, number=1)
    client = bench.client(f={})
    bench.open(client, count=1)
    bench.forget(m.CallOpened)
    lease = bench.started_lease(first)
    bench.lose(first)
    second = bench.worker(cpu=1, number=2)
    again = bench.started_lease(second)
    assert again.start == lease.start
    back = bench.worker(cpu=1, number=1)
    bench.finish(back, lease)
    bench.take(m.Outputs)
    bench.finish(second, again)
    assert bench.take_all(m.Outputs) == []
    assert bench.core.state.counts["duplicate output"] == 1


def test_lost_worker_gives_back_only_what_it_did_not_report() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1, number=1)
    client = bench.client(f={})
    bench.open(client, count=9)
    bench.forget(m.CallOpened)
    bench.finish(worker, bench.started_lease(worker))
    lease = bench.take_all(m.Lease)[0]
    bench.finish(worker, lease, count=1)
    bench.forget(m.Outputs, m.OutputsAck, m.Lease)
    bench.lose(worker)
    other = bench.worker(cpu=1, number=2)
    assert bench.started_lease(other).start == 2


def test_an_error_is_retried_after_its_delay_and_then_delivered() -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(f={"retries": [1, 5.0, 2.0, 60.0]})
    bench.open(client, count=1)
    bench.forget(m.CallOpened)
    bench.finish(worker, bench.started_lease(worker), status=m.Status.ERROR)
    bench.nothing_left()
    bench.later(4.9)
    bench.nothing_left()
    bench.later(0.2)
    bench.finish(worker, bench.take(m.Lease), status=m.Status.ERROR)
    assert bench.take(m.Outputs).statuses == bytes([m.Status.ERROR])


def test_only_the_failed_input_of_a_report_is_retried() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"retries": [1, 0.0, 1.0, 60.0]})
    bench.open(client, count=7)
    bench.forget(m.CallOpened)
    bench.finish(worker, bench.started_lease(worker))
    bench.forget(m.Outputs)
    lease = bench.take_all(m.Lease)[0]
    assert len(lease.lengths) == 12
    sequence = 2
    lengths = (1).to_bytes(4, "little") * 3
    bench.frame(
        worker,
        m.LeaseOutputs(
            sequence, lease.lease_id, lease.call_id, lease.start, 30, lengths,
            bytes([0, 1, 0]), [], b"xyz",
        ),
    )  # fmt: skip
    sent = [(o.start, bytes(o.payload)) for o in bench.take_all(m.Outputs)]
    assert sent == [(1, b"x"), (3, b"z")]
    bench.later(0.01)
    assert 2 in [lease.start for lease in bench.take_all(m.Lease)]


def test_an_input_that_crashes_three_containers_ends_with_an_error() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1)
    bench.forget(m.CallOpened)
    for _ in range(3):
        lease = bench.started_lease(worker)
        details = {"text": "killed by SIGSEGV", "signal": "SIGSEGV"}
        bench.frame(
            worker,
            m.ContainerExited(lease.container_id, "crash", [(lease.lease_id, 0)], details, b""),
        )
    outputs = bench.take(m.Outputs)
    assert outputs.statuses == bytes([m.Status.FAILURE])
    assert b"SIGSEGV" in bytes(outputs.payload)
    bench.nothing_left()


def test_neighbours_of_a_crashed_input_are_not_charged() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=9)
    bench.forget(m.CallOpened)
    bench.finish(worker, bench.started_lease(worker))
    lease = bench.take_all(m.Lease)[0]
    bench.frame(
        worker,
        m.ContainerExited(lease.container_id, "crash", [(lease.lease_id, lease.start)], {}, b""),
    )
    assert bench.core.state.calls[call_id].crashes == {lease.start: 1}
    assert bench.started_lease(worker).start == lease.start


def test_a_start_error_is_told_once_for_every_input() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, count=5)
    bench.forget(m.CallOpened)
    container_id = bench.take_all(m.StartContainer)[0].container_id
    bench.forget(m.Lease, m.DefineFunction)
    bench.frame(worker, m.ContainerExited(container_id, "start", [], {}, b"pickled error"))
    failed = bench.take(m.CallFailed)
    assert (failed.status, bytes(failed.payload)) == (m.Status.ERROR, b"pickled error")
    assert bench.take_all(m.StartContainer) == []


def test_the_tail_of_a_stuck_lease_is_taken_back_and_runs_elsewhere() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, count=64)
    first, second = bench.take_all(m.Lease)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    bench.finish(worker, second, input_s=0.0001)
    tail = bench.take_all(m.Lease)
    behind = [lease for lease in tail if lease.container_id == first.container_id]
    assert behind, "the stuck container got a second lease while it was still thought quick"
    bench.later(0.06)
    seen: list[int] = []
    while True:
        mine = [lease for lease in tail if lease.container_id == second.container_id]
        tail = []
        for lease in mine:
            seen.append(len(lease.lengths) // 4)
            bench.finish(worker, lease, input_s=0.0001)
            tail += bench.take_all(m.Lease)
        bench.later(0.05)
        for reclaim in bench.take_all(m.Reclaim):
            assert reclaim.keep == 0
            bench.frame(worker, m.Reclaimed(reclaim.lease_id, behind[0].start))
            tail += bench.take_all(m.Lease)
        if not tail:
            break
    outputs = bench.take_all(m.Outputs)
    assert sum(len(o.statuses) for o in outputs) == 63


def test_a_slow_consumer_stops_leasing_but_never_the_input_it_waits_for() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=50)
    bench.forget(m.CallOpened)
    lease = bench.started_lease(worker)
    big = b"x" * (20 << 20)
    total = 0
    while True:
        bench.finish(worker, lease, values=[big], input_s=1.0)
        total += 1
        leases = bench.take_all(m.Lease)
        if not leases:
            break
        lease = leases[0]
    # 32 MiB are held back: the next is the lowest unfinished one, which may always run; with one
    # container everything is finished in order, so the exemption always applies to the head.
    assert total == 50
    bench.frame(client, ack(call_id, 0, 50, 50, 50 * len(big)))
    assert bench.core.state.calls == {}


def test_outputs_beyond_the_window_wait_for_the_consumer() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    call_id = bench.open(client, count=50)
    stuck, lease = bench.take_all(m.Lease)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    big = b"x" * (20 << 20)
    finished = 0
    while lease is not None:
        bench.finish(worker, lease, values=[big], input_s=1.0)
        finished += 1
        lease = next(iter(bench.take_all(m.Lease)), None)  # type: ignore[assignment]
    assert finished == 2
    assert "consumer" in bench.core.state.calls[call_id].waits_for
    bench.frame(client, ack(call_id, 1, 2, 2, 2 * len(big)))
    assert bench.take(m.Lease).start == 3
    assert stuck.start == 0


def test_a_waiting_container_gives_its_core_to_the_call_it_waits_for() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", count=1)
    bench.forget(m.CallOpened)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "g", call=2, count=1, parent=(outer.lease_id, 0))
    assert bench.take_all(m.Lease) == [], "one core, and f runs on it"
    bench.frame(nested, m.SessionWaits(0))
    inner = bench.started_lease(worker)
    bench.finish(worker, inner)
    outputs = bench.take(m.Outputs, nested)
    assert outputs.call_id == bytes([2]) * 16
    bench.frame(nested, ack(outputs.call_id, 0, 1, 1))
    bench.finish(worker, outer)
    assert bench.take(m.Outputs, client).call_id == bytes([1]) * 16


def test_an_output_reaches_a_waiting_container_only_with_its_core() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "g", call=2, count=2, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    first = bench.started_lease(worker)
    # The core is taken by the next nested input in the same turn as the first ends.
    bench.finish(worker, first, input_s=1.0)
    assert len(bench.take_all(m.Outputs, nested)) == 1
    assert bench.take_all(m.Lease) == [], "the caller has its core back first"
    bench.frame(nested, m.SessionWaits(0))
    assert bench.take_all(m.Lease) == [], "the wait was ended by the output on the wire"
    bench.frame(nested, m.SessionWaits(1))
    assert bench.take(m.Lease).start == 1


def test_recursion_under_one_permit_names_the_chain() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_containers": 1})
    bench.open(client, "f", count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "f", call=2, count=1, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    failed = bench.take(m.CallFailed, nested)
    assert b"deadlock" in bytes(failed.payload)
    assert b"f -> f" in bytes(failed.payload)


def test_attached_calls_of_a_lost_client_end_after_its_grace() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=3)
    lease = bench.started_lease(worker)
    bench.forget(m.CallOpened)
    bench.lose(client)
    bench.frame(worker, m.Heartbeat(1))
    bench.later(14)
    bench.frame(worker, m.Heartbeat(2))
    bench.later(14)
    bench.nothing_left()
    bench.frame(worker, m.Heartbeat(3))
    bench.later(4)
    assert bench.take(m.CancelLease).lease_id == lease.lease_id
    assert bench.core.state.calls == {}


def test_a_client_that_comes_back_gets_what_it_missed() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    session = bench.core.state.peers[client].session.session_id  # type: ignore[index,union-attr]
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.lose(client)
    bench.finish(worker, lease)
    assert bench.take_all(m.Outputs) == []
    again = bench.connect("client", session)
    bench.frame(again, m.OpenCall(call_id, b"f" * 16, False, True, None, True))
    bench.frame(again, inputs(call_id, 0, 1))
    assert bench.take(m.Outputs, again).start == 0
    assert bench.core.state.counts["duplicate inputs"] == 1
    assert bench.take(m.CallOpened).present == [(0, 1)]
    bench.frame(again, ack(call_id, 0, 1, 1))
    assert bench.core.state.calls == {}


def test_a_silent_worker_is_lost_after_its_deadline_and_not_before() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    bench.later(10)
    bench.frame(worker, m.Heartbeat(1))
    bench.later(14.9)
    bench.nothing_left()
    bench.later(0.2)
    assert [type(order) for order in bench.orders] == [Disconnect]
    assert bench.core.state.workers == {}


def test_nothing_of_a_spawned_call_is_acknowledged_before_it_is_stored() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1, is_durable=True)
    assert all(isinstance(order, Store) for order in bench.orders)
    bench.store()
    bench.take(m.CallOpened)
    assert [s.stored for s in bench.take_all(m.InputsStored)] == [[(0, 1)], []]
    lease = bench.started_lease(worker)
    bench.finish(worker, lease)
    bench.later(0.03)
    assert bench.take_all(m.OutputsAck) == []
    bench.store()
    bench.later(0.03)
    assert bench.take(m.OutputsAck).sequence == 1


def test_a_spawned_call_outlives_its_client_and_is_fetched_by_another() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=1, is_durable=True)
    bench.store()
    bench.frame(client, m.CloseApp(APP))
    bench.lose(client)
    bench.finish(worker, bench.started_lease(worker))
    bench.store()
    reader = bench.connect()
    bench.frame(reader, m.AskCall(7, call_id), m.FetchOutputs(8, call_id, 0, 1))
    info = bench.take(m.CallInfo)
    assert (info.request_id, info.state, info.input_count) == (7, "finished", 1)
    assert bytes(bench.take(m.Outputs, reader).payload) == b"v"


def test_a_fetch_is_served_as_outputs_come() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    bench.frame(client, m.FetchOutputs(1, call_id, 0, 2))
    lease = bench.started_lease(worker)
    bench.finish(worker, lease)
    assert bench.take_all(m.Outputs) == []
    bench.store()
    assert bench.take(m.Outputs).start == 0


def test_a_spawn_that_cannot_be_stored_fails_with_that_error() -> None:
    bench = Bench()
    bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1, is_durable=True)
    first = next(order for order in bench.orders if isinstance(order, Store))
    bench.orders.clear()
    bench.tell(StoreFailed(first.sequence, "database or disk is full"))
    failed = bench.take(m.CallFailed)
    assert b"disk is full" in bytes(failed.payload)


def test_an_output_that_cannot_be_stored_is_offered_again() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    store = next(order for order in bench.orders if isinstance(order, Store))
    bench.orders.clear()
    bench.tell(StoreFailed(store.sequence, "disk is full"))
    bench.later(0.03)
    assert bench.take_all(m.OutputsAck) == []
    # Something else gets written meanwhile: that does not make the output safe.
    bench.open(client, call=2, count=1, is_durable=True)
    bench.store()
    bench.later(0.03)
    assert bench.take_all(m.OutputsAck) == []
    bench.later(1.1)
    assert [type(record) for record in bench.store()[0].records] == [m.Outputs]
    bench.later(0.03)
    assert bench.take(m.OutputsAck).sequence == 1


def test_spawned_inputs_are_stored_only_when_their_blobs_are_here() -> None:
    bench = Bench()
    bench.worker(cpu=1)
    client = bench.client(f={})
    blob_id = b"B" * 32
    call_id = bench.open(client, is_durable=True, is_sealed=False)
    bench.store()
    lengths = (1).to_bytes(4, "little")
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [blob_id])], b"x"))
    assert bench.store() == []
    bench.tell(BlobCompleted(blob_id))
    assert [type(record) for record in bench.store()[0].records] == [m.Inputs]
    assert bench.take(m.InputsStored).stored == [(0, 1)]


def test_spawned_calls_come_back_from_their_records() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=3, is_durable=True)
    records = [record for store in bench.store() for record in store.records]
    bench.finish(worker, bench.started_lease(worker))
    records += [record for store in bench.store() for record in store.records]
    reborn = Bench(epoch=2)
    reborn.core = type(bench.core)(2)
    reborn.core.restore(records, reborn.now)
    reborn.core.check()
    other = reborn.worker(cpu=1)
    assert reborn.started_lease(other).start == 1
    reader = reborn.connect()
    reborn.frame(reader, m.FetchOutputs(1, call_id, 0, 3))
    assert reborn.take(m.Outputs, reader).start == 0


def test_a_cancelled_call_stops_its_leases_and_leaves_nothing() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=3)
    lease = bench.started_lease(worker)
    bench.frame(client, m.CancelCall(call_id))
    assert bench.take(m.CancelLease).lease_id == lease.lease_id
    assert bench.core.state.calls == {}
    bench.finish(worker, lease, status=m.Status.FAILURE)
    assert bench.take_all(m.Outputs) == []
    assert bench.core.state.leases == {}


def test_generator_items_are_sent_once_and_in_order_whatever_is_repeated() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1, number=1)
    client = bench.client(f={"is_generator": True})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    four = (1).to_bytes(4, "little") * 4
    bench.frame(worker, m.LeaseItems(1, lease.lease_id, call_id, 0, 0, four, [], b"abcd"))
    assert bytes(bench.take(m.Items).payload) == b"abcd"
    bench.frame(client, m.ItemCredit(call_id, 0, 8, 3))
    assert bench.take(m.LeaseCredit).upto == 8
    bench.lose(worker)
    other = bench.worker(cpu=1, number=2)
    again = bench.started_lease(other)
    assert (again.skip, again.credit) == (4, 8)
    bench.frame(other, m.LeaseItems(1, again.lease_id, call_id, 0, 3, four, [], b"defg"))
    items = bench.take(m.Items)
    assert (items.number, bytes(items.payload)) == (4, b"efg")


def test_a_generator_without_credit_gives_its_core_away() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"is_generator": True}, g={})
    call_id = bench.open(client, "f", count=1)
    lease = bench.started_lease(worker)
    bench.open(client, "g", call=2, count=1)
    assert bench.take_all(m.Lease) == []
    bench.frame(worker, m.LeaseWaits(lease.lease_id, 4))
    other = bench.started_lease(worker)
    bench.frame(client, m.ItemCredit(call_id, 0, 8, 4))
    assert bench.take_all(m.LeaseCredit) == [], "the core is taken"
    bench.finish(worker, other)
    assert bench.take(m.LeaseCredit).upto == 8


def test_a_request_that_nobody_can_satisfy_fails_at_once_on_the_embedded_default() -> None:
    bench = Bench()
    bench.worker(cpu=2)
    client = bench.client(f={"cpu": 3.0})
    bench.open(client, count=1)
    assert b"cpu=3" in bytes(bench.take(m.CallFailed).payload)


def test_a_request_that_nobody_can_satisfy_waits_with_a_name_on_a_cluster() -> None:
    bench = Bench()
    bench.worker(cpu=2, is_embedded=False)
    client = bench.client(f={"cpu": 3.0})
    call_id = bench.open(client, count=1)
    assert bench.take_all(m.CallFailed) == []
    assert "as much cpu" in bench.core.state.calls[call_id].waits_for
    bench.worker(cpu=4, number=2, is_embedded=False)
    bench.take(m.Lease)


def test_two_calls_share_a_core_by_time_and_not_by_count() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", call=1, count=400)
    bench.open(client, "g", call=2, count=400)
    served = {b"f": 0.0, b"g": 0.0}
    names = {bytes([1]) * 16: b"f", bytes([2]) * 16: b"g"}
    cost = {b"f": 0.001, b"g": 0.004}
    while min(served.values()) < 0.3:
        for start in bench.take_all(m.StartContainer):
            bench.start(worker, start.container_id)
        leases = bench.take_all(m.Lease)
        assert leases
        for lease in leases:
            name = names[lease.call_id]
            bench.later(cost[name] * len(lease.lengths) / 4)
            bench.finish(worker, lease, input_s=cost[name])
            served[name] += cost[name] * len(lease.lengths) / 4
    assert 0.5 < served[b"f"] / served[b"g"] < 2.0


def test_shutdown_is_refused_while_work_is_left_and_done_when_forced() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.open(client, count=2)
    bench.forget(m.CallOpened)
    bench.frame(client, m.AskShutdown(1, False))
    refused = bench.take(m.ShutdownInfo)
    assert not refused.is_leaving
    assert "1 calls of f with 2 unfinished inputs" in refused.text
    bench.frame(client, m.AskShutdown(2, True))
    assert bench.take(m.ShutdownInfo).is_leaving
    assert any(isinstance(order, Exit) for order in bench.orders)


def test_idle_containers_leave_after_their_window() -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(f={"scaledown_window": 5})
    call_id = bench.open(client, count=1)
    bench.finish(worker, bench.started_lease(worker))
    bench.frame(client, ack(call_id, 0, 1, 1))
    bench.later(4.9)
    assert bench.take_all(m.StopContainer) == []
    bench.later(0.2)
    assert bench.take(m.StopContainer).kill is False


def restarted_with_container(bench: Bench, container_id: int) -> int:
    """A worker that comes back to a scheduler in its second life, with a container from the first
    one whose function nobody has defined yet."""
    worker = bench.connect("worker")
    containers = [[container_id, b"f" * 16]]
    ready = m.WorkerReady(b"\1" * 16, "w1", 1.0, 1000, False, containers, [])
    bench.frame(worker, ready)
    return worker


OLD_CONTAINER = 1 << m.EPOCH_SHIFT | 7


def test_container_from_before_a_restart_serves_its_client_when_it_is_back() -> None:
    bench = Bench(epoch=2)
    worker = restarted_with_container(bench, OLD_CONTAINER)
    assert bench.take(m.WorkerAccepted).keep == [OLD_CONTAINER]
    client = bench.client(f={})
    bench.open(client, count=1)
    assert bench.take(m.Lease, worker).container_id == OLD_CONTAINER
    bench.later(31)
    assert bench.take_all(m.StopContainer) == []


def test_container_from_before_a_restart_leaves_when_nobody_claims_it() -> None:
    bench = Bench(epoch=2)
    worker = restarted_with_container(bench, OLD_CONTAINER)
    bench.take(m.WorkerAccepted)
    bench.later(14)
    bench.frame(worker, m.Heartbeat(1))
    bench.later(14)
    bench.frame(worker, m.Heartbeat(2))
    assert bench.take_all(m.StopContainer) == []
    bench.later(3)
    assert bench.take(m.StopContainer).container_id == OLD_CONTAINER


def test_container_of_a_function_that_was_dropped_in_this_life_is_not_kept() -> None:
    bench = Bench(epoch=1)
    restarted_with_container(bench, OLD_CONTAINER)
    assert bench.take(m.WorkerAccepted).keep == []
