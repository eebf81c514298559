"""The scheduler's core where several things happen at once: partial writes, deadlocks of many, and
work that would starve somebody."""

from __future__ import annotations

import math

from fanout.config import CLIENT_GRACE_S, WORKER_DEADLINE_S
from fanout.protocol import messages as m
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import (
    BlobCompleted,
    BlobRefused,
    Disconnect,
    ForgetCall,
    PeerHeard,
    PeerId,
    Store,
    Stored,
    StoreFailed,
    TimePassed,
)
from fanout_scheduler.core.placement import STUCK_S
from tests.core_kit import APP, Bench, inputs, table


def stores(bench: Bench) -> list[Store]:
    found = [order for order in bench.orders if isinstance(order, Store)]
    bench.orders = [order for order in bench.orders if not isinstance(order, Store)]
    return found


def reborn(records: list[object]) -> Bench:
    bench = Bench(epoch=2)
    bench.core = Scheduler(2)
    bench.core.restore(records, bench.now)  # type: ignore[arg-type]
    bench.core.check()
    return bench


def test_a_spawn_is_promised_only_on_a_definition_that_is_on_disk() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.open(client, call=1, is_durable=True, is_sealed=False)
    bench.open(client, call=2, is_durable=True, is_sealed=False)
    first, second = stores(bench)
    bench.tell(StoreFailed(first.sequence, "disk is full"), Stored(second.sequence))
    assert bench.take(m.CallFailed).call_id == bytes([1]) * 16
    assert bench.take(m.CallOpened).call_id == bytes([2]) * 16
    after = reborn(list(second.records))
    assert bytes([2]) * 16 in after.core.state.calls


BLOB = b"b" * 32


def spawn_with_blob(bench: Bench, client: int, is_durable: bool = True) -> bytes:
    """A client spawns a call of one input whose blob is still on its way."""
    call_id = bytes([1]) * 16
    lengths, payload = table([b"v"])
    submit = m.SubmitCall(
        call_id, b"f" * 16, is_durable, True, None, "", lengths, [(0, [BLOB])], payload
    )
    bench.frame(client, submit)
    return call_id


def test_a_spawn_is_not_promised_before_its_blobs_are_here() -> None:
    bench = Bench()
    client = bench.client(f={})
    spawn_with_blob(bench, client)
    bench.store()
    assert not any(stored.is_sealed for stored in bench.take_all(m.InputsStored, client))
    bench.tell(BlobCompleted(BLOB, 100))
    assert not any(stored.is_sealed for stored in bench.take_all(m.InputsStored, client))
    bench.store()
    assert bench.take(m.InputsStored, client).is_sealed


def test_a_call_whose_blob_the_disk_refuses_fails_and_says_why() -> None:
    for is_durable in (True, False):
        bench = Bench()
        client = bench.client(f={})
        spawn_with_blob(bench, client, is_durable)
        bench.store()
        bench.tell(BlobRefused(BLOB, "no room"))
        assert b"no room" in bytes(bench.take(m.CallFailed, client).payload)
        assert bench.core.state.blob_waiters == {}
        assert bench.core.state.blob_references == {}


def test_a_spawn_whose_blobs_never_came_ends_when_its_client_does_not_come_back() -> None:
    for is_restarted in (False, True):
        bench = Bench()
        client = bench.client(f={})
        spawn_with_blob(bench, client)
        records = [record for store in bench.store() for record in store.records]
        if is_restarted:
            bench = reborn(list(records))
        else:
            bench.lose(client)
        assert bench.core.snapshot()["open_call_count"] == 1
        bench.later(CLIENT_GRACE_S + 1)
        assert bench.core.snapshot()["open_call_count"] == 0


def test_definitions_that_were_stored_twice_are_one_after_a_restart() -> None:
    bench = Bench()
    client = bench.client(f={})
    for call in (1, 2):
        bench.open(client, call=call, count=1, is_durable=True)
    records = [record for store in stores(bench) for record in store.records]
    after = reborn(list(records))
    functions = {id(call.function) for call in after.core.state.calls.values()}
    assert len(functions) == 1
    worker = after.worker(cpu=2)
    assert len(after.take_all(m.Lease, worker)) == 2


def test_a_spawned_call_of_the_spawner_is_no_deadlock() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_containers": 1}, g={})
    bench.open(client, "f", count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "f", call=2, count=1, is_durable=True, parent=(outer.lease_id, 0))
    bench.store()
    bench.open(nested, "g", call=3, count=1, parent=(outer.lease_id, 0))
    bench.forget(m.CallOpened, m.InputsStored)
    bench.frame(nested, m.SessionWaits(bench.core.state.peers[nested].wait_frames))  # type: ignore[index]
    bench.finish(worker, bench.started_lease(worker))
    assert bench.take_all(m.CallFailed) == []
    bench.finish(worker, outer)
    bench.store()
    lease = bench.take_all(m.Lease)[-1]
    assert lease.call_id == bytes([2]) * 16


def test_callers_that_wait_for_each_others_permits_are_told_so() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(h={"max_containers": 2})
    bench.open(client, "h", count=2)
    leases = bench.take_all(m.Lease)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    for number, lease in enumerate(leases):
        nested = bench.connect("nested", worker=worker, container_id=lease.container_id)
        parent = (lease.lease_id, lease.start)
        bench.open(nested, "h", call=10 + number, count=1, parent=parent)
        assert bench.take_all(m.CallFailed) == []
        bench.frame(nested, m.SessionWaits(0))
    failed = bench.take_all(m.CallFailed)
    assert failed, "both callers wait for ever"
    assert b"h -> h" in bytes(failed[0].payload)


def test_a_container_that_gets_its_core_back_is_not_starved_by_a_quick_map() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(s={"is_generator": True}, q={})
    stream = bench.open(client, "s", count=1)
    lease = bench.started_lease(worker)
    bench.frame(worker, m.LeaseWaits(lease.lease_id, 4))
    bench.open(client, "q", call=2, count=3000)
    busy = [bench.started_lease(worker)]
    bench.frame(client, m.ItemCredit(stream, 0, 8, 4))
    for _ in range(20):
        done = busy.pop(0)
        bench.later(0.0005 * len(done.lengths) / 4)
        bench.finish(worker, done, input_s=0.0005)
        busy += bench.take_all(m.Lease)
        if bench.take_all(m.LeaseCredit):
            return
    raise AssertionError("the stream waited behind twenty leases")


def test_stored_inputs_are_told_as_counts_after_a_reconnect() -> None:
    bench = Bench()
    client = bench.client(f={})
    session = bench.core.state.peers[client].session.session_id  # type: ignore[index,union-attr]
    call_id = bench.open(client, is_durable=True, is_sealed=False)
    bench.frame(client, inputs(call_id, 0, 4), inputs(call_id, 8, 4))
    bench.store()
    bench.forget(m.CallOpened, m.InputsStored)
    again = bench.connect("client", session)
    bench.frame(again, m.OpenCall(call_id, b"f" * 16, True, True, None, True))
    assert bench.take(m.InputsStored).stored == [(0, 4), (8, 4)]


def test_results_that_travel_as_blobs_are_held_back_by_their_consumer_too() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    call_id = bench.open(client, count=50)
    _, lease = bench.take_all(m.Lease)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    finished = 0
    while lease is not None and finished < 20:
        finished += 1
        blob_id = bytes([finished]) * 32
        bench.tell(BlobCompleted(blob_id, 20 << 20))
        lengths, payload = table([b"v"])
        bench.frame(
            worker,
            m.LeaseOutputs(
                finished, lease.lease_id, call_id, lease.start, 1_000_000, lengths, b"\0",
                [(0, [blob_id])], payload,
            ),
        )  # fmt: skip
        lease = next(iter(bench.take_all(m.Lease)), None)  # type: ignore[assignment]
    assert finished == 2
    assert "consumer" in bench.core.state.calls[call_id].waits_for


def test_an_output_on_its_way_to_disk_stands_when_the_call_is_cancelled() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    pending = stores(bench)
    bench.frame(client, m.CancelCall(call_id))
    pending += stores(bench)
    bench.frame(client, m.FetchOutputs(1, call_id, 0, 2))
    assert bench.take_all(m.Outputs) == []
    bench.tell(Stored(pending[-1].sequence))
    told = [(o.start, o.statuses[0]) for o in bench.take_all(m.Outputs)]
    assert sorted(told) == [(0, m.Status.VALUE), (1, m.Status.FAILURE)]


def test_a_report_that_does_not_fit_its_lease_is_dropped() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    empty = m.LeaseOutputs(1, lease.lease_id, lease.call_id, 0, 0, b"", b"", [], b"")
    bench.frame(worker, empty)
    lengths, payload = table([b"v"] * 3)
    bench.frame(
        worker,
        m.LeaseOutputs(2, lease.lease_id, lease.call_id, 0, 1, lengths, bytes(3), [], payload),
    )
    assert bench.take_all(m.Outputs) == []
    assert bench.core.state.counts["report that does not fit its lease"] == 2


def spawned(finished: bool) -> tuple[list[object], int]:
    """The records of a spawned call of two inputs, and the container that runs or ran them."""
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=2, is_durable=True)
    records = [record for store in bench.store() for record in store.records]
    lease = bench.started_lease(worker)
    if finished:
        bench.finish(worker, lease, count=1)
        records += [record for store in bench.store() for record in store.records]
        bench.finish(worker, bench.take(m.Lease, worker))
        for _ in range(2):
            records += [record for store in bench.store() for record in store.records]
    return list(records), lease.container_id


def back_with(bench: Bench, container_id: int) -> int:
    """A worker that comes back with a container of `f`."""
    worker = bench.connect("worker")
    containers = [[container_id, b"f" * 16]]
    bench.frame(worker, m.WorkerReady(b"\1" * 16, "w1", 1.0, 1000, False, containers, []))
    return worker


def test_a_spawned_call_whose_client_is_gone_goes_on_in_the_containers_of_before() -> None:
    records, container_id = spawned(finished=False)
    for seconds in (0, CLIENT_GRACE_S + 1):
        after = reborn(records)
        after.later(seconds)
        worker = back_with(after, container_id)
        assert after.take(m.WorkerAccepted).keep == [container_id]
        assert after.take(m.Lease, worker).container_id == container_id
        assert after.take_all(m.StopContainer) == []


def test_containers_of_calls_that_ended_before_a_restart_wait_for_their_client() -> None:
    records, container_id = spawned(finished=True)
    after = reborn(records)
    worker = back_with(after, container_id)
    assert after.take(m.WorkerAccepted).keep == [container_id]
    client = after.client(f={})
    after.later(WORKER_DEADLINE_S - 1)
    after.frame(worker, m.Heartbeat(1))
    after.later(WORKER_DEADLINE_S - 1)
    after.frame(worker, m.Heartbeat(2))
    after.later(CLIENT_GRACE_S - 2 * WORKER_DEADLINE_S + 3)
    assert after.take_all(m.StopContainer) == []
    after.open(client, call=2, count=1)
    assert after.take(m.Lease, worker).container_id == container_id


def test_containers_of_calls_that_ended_before_a_restart_leave_when_nobody_comes() -> None:
    records, container_id = spawned(finished=True)
    after = reborn(records)
    worker = back_with(after, container_id)
    for count in (1, 2):
        after.later(WORKER_DEADLINE_S - 1)
        after.frame(worker, m.Heartbeat(count))
    assert after.take_all(m.StopContainer) == []
    after.later(CLIENT_GRACE_S - 2 * WORKER_DEADLINE_S + 3)
    assert after.take(m.StopContainer).container_id == container_id


def test_a_nested_client_is_sent_away_until_its_container_is_claimed() -> None:
    bench = Bench(epoch=2)
    container_id = 1 << m.EPOCH_SHIFT | 7
    worker = back_with(bench, container_id)
    info = {"worker": worker, "container_id": container_id}
    early = bench.connect("nested", session=b"n" * 16, **info)
    (order,) = [order for order in bench.orders if isinstance(order, Disconnect)]
    assert order.peer_id == early
    bench.lose(early)
    bench.client(f={}, g={})
    again = bench.connect("nested", session=b"n" * 16, **info)
    bench.open(again, "g", call=5, count=1)
    assert bench.started_lease(worker).call_id == bytes([5]) * 16


def test_results_of_a_spawned_call_expire_over_restarts() -> None:
    week_s = 7 * 24 * 3600.0
    bench = Bench()
    bench.core = Scheduler(1)
    bench.core.restore([], bench.now, wall_time_s=1e9)
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=1, is_durable=True)
    records = [record for store in bench.store() for record in store.records]
    bench.finish(worker, bench.started_lease(worker))
    records += [record for store in bench.store() for record in store.records]
    records += [record for store in bench.store() for record in store.records]
    later = Bench(epoch=2)
    later.core = Scheduler(2)
    later.core.restore(records, later.now, wall_time_s=1e9 + week_s - 100)
    assert call_id in later.core.state.calls
    later.later(99)
    assert call_id in later.core.state.calls
    later.later(2)
    assert later.core.state.calls == {}
    forgotten = [record for store in later.store() for record in store.records]
    kinds = [type(record).__name__ for record in forgotten]
    assert kinds == ["ForgetCall", "CallExpired", "ForgetApp"]


def test_a_call_whose_results_expired_is_told_from_one_that_never_was() -> None:
    ended, other = b"e" * 16, b"o" * 16
    bench = Bench()
    bench.core = Scheduler(1)
    bench.core.restore([m.CallExpired(ended, 1e9)], bench.now, wall_time_s=1e9 + 100)
    client = bench.connect()
    bench.frame(client, m.AskCall(1, ended), m.AskCall(2, other))
    assert [info.state for info in bench.take_all(m.CallInfo)] == ["expired", "unknown"]
    bench.frame(client, m.FetchOutputs(3, ended, 0, 1))
    assert bench.take(m.CallInfo, client).state == "expired"


def test_calls_that_expired_long_ago_are_forgotten_when_another_one_expires() -> None:
    week_s = 7 * 24 * 3600.0
    bench = Bench()
    bench.core = Scheduler(1)
    old = [m.CallExpired(bytes([n]) * 16, 1e9 - 3 * week_s + n) for n in range(3)]
    bench.core.restore(old, bench.now, wall_time_s=1e9)
    worker = bench.worker(cpu=1)
    call_id = bench.open(bench.client(f={}), call=9, count=1, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    while bench.store():
        pass
    bench.later(week_s + 1)
    assert list(bench.core.state.expired) == [call_id]
    written = [record for store in bench.store() for record in store.records]
    forgotten = [record.call_id for record in written if isinstance(record, ForgetCall)]
    assert sorted(forgotten) == sorted([call_id, *(record.call_id for record in old)])


def test_a_call_that_no_worker_can_run_is_told_once_after_a_while() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.open(client, count=2)
    bench.later(4.9)
    assert bench.take_all(m.Notice) == []
    bench.later(0.2)
    assert "none is connected" in bench.take(m.Notice, client).text
    bench.later(60)
    assert bench.take_all(m.Notice) == []
    bench.take(m.Lease, bench.worker(cpu=1))


def test_a_wait_that_overtakes_the_report_before_it_is_still_a_wait() -> None:
    """A container's client speaks on a socket of its own, its outputs lie in shared memory."""
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", count=1)
    bench.finish(worker, bench.started_lease(worker), input_s=0.001)
    bench.open(client, "f", call=2, count=2)
    first, second = bench.take_all(m.Lease)
    assert first.container_id == second.container_id, "the second lease waits behind the first"
    nested = bench.connect("nested", worker=worker, container_id=first.container_id)
    with bench.one_turn():
        bench.open(nested, "g", call=3, count=1, parent=(second.lease_id, second.start))
        bench.frame(nested, m.SessionWaits(0))
        bench.finish(worker, first, input_s=0.001)
    assert bench.take(m.Lease).call_id == bytes([3]) * 16


def test_a_wait_that_was_given_up_takes_the_core_back() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.frame(nested, m.SessionWaits(0))
    bench.frame(nested, m.SessionRuns())
    bench.open(client, "g", call=2, count=1)
    assert bench.take_all(m.Lease) == [], "the core is in use again"
    bench.finish(worker, outer)
    assert bench.take(m.Lease).call_id == bytes([2]) * 16


def test_a_wait_ends_with_the_client_that_told_of_it() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.frame(nested, m.SessionWaits(0))
    bench.lose(nested)
    bench.open(client, "g", call=2, count=1)
    assert bench.take_all(m.Lease) == [], "the core is in use again"
    bench.finish(worker, outer)
    assert bench.take(m.Lease).call_id == bytes([2]) * 16


def test_a_wait_that_comes_before_the_output_of_the_input_before_it_is_a_wait() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, "f", count=2000)
    bench.finish(worker, bench.started_lease(worker), input_s=0.0005)
    first, second = bench.take_all(m.Lease)
    bench.forget(m.Outputs, m.OutputsAck, m.Window)
    # The container has done the first lease; before its outputs arrived, which come on another
    # way, an input of the second one has made a call and waits for it.
    nested = bench.connect("nested", worker=worker, container_id=second.container_id)
    bench.open(nested, "g", call=2, count=1, parent=(second.lease_id, second.start))
    bench.frame(nested, m.SessionWaits(0))
    bench.finish(worker, first, input_s=0.0005)
    called = bench.take_all(m.Lease)[-1]
    assert called.call_id == bytes([2]) * 16, "the core is free for what it waits for"


def test_an_app_ends_with_the_last_of_those_who_opened_it() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    first = bench.client(f={})
    second = bench.client()
    bench.open(first, count=1)
    lease = bench.started_lease(worker)
    bench.frame(second, m.CloseApp(APP))
    assert bench.take_all(m.CancelLease) == [], "it is the first one's run as well"
    bench.finish(worker, lease)
    bench.take(m.Outputs, first)
    bench.frame(first, m.CloseApp(APP))
    assert bench.take(m.StopContainer).container_id == lease.container_id


def test_a_spawn_of_which_a_part_was_not_written_is_never_acknowledged() -> None:
    bench = Bench()
    bench.worker()
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True)
    stores = [order for order in bench.orders if isinstance(order, Store)]
    bench.orders = [order for order in bench.orders if not isinstance(order, Store)]
    bench.tell(StoreFailed(stores[0].sequence, "disk full"))
    assert bench.take(m.CallFailed).call_id == call_id
    for store in stores[1:]:
        bench.tell(Stored(store.sequence))
    assert bench.take_all(m.InputsStored) == []


def test_a_tail_is_looked_at_again_also_when_something_happened_just_before() -> None:
    """Tails are not looked at twice within two milliseconds. The look that was planned may fall
    into these; it must not have been the last."""
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, call=1, count=2)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    for lease in bench.take_all(m.Lease):
        bench.finish(worker, lease, input_s=0.0001)
    bench.open(client, call=2, count=64)
    leases = bench.take_all(m.Lease)
    slow = leases[0]
    while mine := [lease for lease in leases if lease.container_id != slow.container_id]:
        for lease in mine:
            bench.finish(worker, lease, input_s=0.0001)
        leases = bench.take_all(m.Lease)
    look_at = bench.core.next_deadline()
    assert look_at is not None
    bench.later(look_at - bench.now - 0.0005)
    bench.finish(worker, slow, count=1, input_s=0.0001)
    stuck_at = bench.now + STUCK_S
    assert bench.take_all(m.Reclaim) == []
    while not (reclaims := bench.take_all(m.Reclaim)):
        deadline = bench.core.next_deadline() or math.inf
        assert deadline < stuck_at + STUCK_S, "nobody looked again"
        bench.now = deadline
        bench.tell(TimePassed())
    assert [reclaim.keep for reclaim in reclaims] == [0]


def test_a_worker_whose_frame_takes_long_is_not_silent() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    for _ in range(4):
        bench.later(14.9)
        bench.tell(PeerHeard(PeerId(worker)))
        bench.nothing_left()
    bench.later(15.1)
    assert [type(order) for order in bench.orders] == [Disconnect]


def test_the_grace_of_a_client_begins_anew_each_time_it_is_lost() -> None:
    bench = Bench()
    bench.worker(cpu=1)
    client = bench.client(f={})
    session = client.to_bytes(16, "big")
    call_id = bench.open(client, count=1)
    bench.lose(client)
    bench.later(1)
    back = bench.connect(session=session)
    bench.later(CLIENT_GRACE_S - 5)
    bench.lose(back)
    # The grace of the first loss would be over by now.
    bench.later(10)
    assert call_id in bench.core.state.calls
    bench.later(CLIENT_GRACE_S)
    assert call_id not in bench.core.state.calls
