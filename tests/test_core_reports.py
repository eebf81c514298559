"""Reports of workers in the bare core: outputs, items, blobs, failures, crashes, one at a time."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fanout.protocol import messages as m
from fanout_scheduler.core import durable
from fanout_scheduler.core.events import BlobCompleted, Disconnect, PeerId
from fanout_scheduler.core.state import Call, Method
from tests.core_kit import Bench, ack, inputs, table

BLOB = b"B" * 32
OTHER_BLOB = b"C" * 32


def running(count: int = 1, cpu: float = 1, **options: Any) -> tuple[Bench, int, int, m.Lease]:
    """A call (1) of a function with these options, whose first input runs on the only worker."""
    bench = Bench()
    worker = bench.worker(cpu=cpu)
    client = bench.client(f=options)
    bench.open(client, count=count)
    return bench, worker, client, bench.started_lease(worker)


def call_of(bench: Bench, number: int = 1) -> Call:
    return bench.core.state.calls[bytes([number]) * 16]


def method_of(bench: Bench) -> Method:
    return bench.core.state.functions[b"f" * 16].methods[""]


def report(
    lease: m.Lease, statuses: list[int], blobs: Any = (), values: Any = None, **changes: Any
) -> m.LeaseOutputs:
    fields: dict[str, Any] = {"sequence": 1, "start": lease.start, "busy_us": 10} | changes
    lengths, payload = table(values or [b"v"] * len(statuses))
    return m.LeaseOutputs(
        fields["sequence"], lease.lease_id, lease.call_id, fields["start"], fields["busy_us"],
        lengths, bytes(statuses), list(blobs), payload,
    )  # fmt: skip


def shown(bench: Bench, client: int) -> list[tuple[int, bytes, bytes, Any]]:
    """(start, statuses, bytes, blobs) of the outputs that were sent."""
    return [
        (o.start, o.statuses, bytes(o.payload), o.blobs) for o in bench.take_all(m.Outputs, client)
    ]


# --- what is measured -----------------------------------------------------------------------------


def test_time_and_size_of_outputs_are_moving_averages() -> None:
    bench, worker, _, lease = running(count=200)
    bench.later(1)
    bench.frame(worker, report(lease, [0], values=[b"12345678"], busy_us=1000))
    method = method_of(bench)
    assert (method.input_s, method.output_bytes) == (0.001, 8)
    assert call_of(bench).service_s == 0.001
    (lease, second) = bench.take_all(m.Lease)
    count = len(lease.lengths) // 4
    assert count == 30, "30 ms of work"
    bench.later(2)
    # Quicker than thought: half of the difference.
    bench.frame(worker, report(lease, [0] * count, values=[b"1234"] * count, busy_us=500 * count))
    assert method.input_s == pytest.approx(0.00075)
    assert method.output_bytes == 6
    assert call_of(bench).service_s == pytest.approx(0.001 + 0.0005 * count)
    # Slower than thought: a report counts for as much as it has inputs, of 64.
    bench.frame(worker, report(second, [0] * 8, busy_us=8 * 10_750))
    assert method.input_s == pytest.approx(0.00075 + 8 / 64 * 0.01)
    before: float = method.input_s or 0.0
    bench.frame(worker, report(second, [0], start=second.start + 8, busy_us=1_000_000))
    assert method.input_s == pytest.approx(before + 0.05 * (1 - before)), "one among thousands"


def test_blobs_count_for_the_size_of_outputs() -> None:
    bench, worker, client, lease = running()
    bench.blob(BLOB, 1000)
    bench.frame(worker, report(lease, [0], [(0, [BLOB])]))
    assert method_of(bench).output_bytes == 1001
    assert call_of(bench).output_bytes == 1001
    bench.frame(client, ack(call_of(bench).call_id, 0, 1, 1, 1001))
    assert bench.blobs_dropped() == [BLOB]


def test_large_outputs_make_leases_small() -> None:
    bench, worker, _, lease = running(count=200)
    bench.frame(worker, report(lease, [0], values=[bytes(1 << 20)]))
    assert [len(lease.lengths) // 4 for lease in bench.take_all(m.Lease)] == [4, 4]


# --- which outputs are used -----------------------------------------------------------------------


def test_what_two_leases_report_is_used_once_whatever_they_share() -> None:
    bench, worker, client, lease = running(count=9)
    bench.frame(worker, report(lease, [0]))
    first = bench.take_all(m.Lease)[0]
    assert (first.start, len(first.lengths) // 4) == (1, 4)
    bench.lose(worker)
    other = bench.worker(cpu=1, number=2)
    again = bench.started_lease(other)
    bench.frame(other, report(again, [0, 0], values=[b"a", b"b"]))
    bench.forget(m.Outputs)
    back = bench.worker(cpu=1, number=1)
    bench.blob(BLOB)
    bench.blob(OTHER_BLOB)
    late = report(first, [0] * 4, [(1, [OTHER_BLOB]), (3, [BLOB])], [b"p", b"q", b"r", b"s"])
    bench.frame(back, late)
    assert shown(bench, client) == [(3, b"\0\0", b"rs", [(1, [BLOB])])]
    assert bench.blobs_sent() == [(client, BLOB)]
    assert bench.core.state.counts == {"duplicate output": 1}


def test_failures_under_a_void_lease_mean_nothing_and_its_values_do() -> None:
    bench, worker, client, lease = running(count=9)
    bench.frame(worker, report(lease, [0]))
    first = bench.take_all(m.Lease)[0]
    bench.lose(worker)
    bench.forget(m.Outputs)
    back = bench.worker(cpu=1, number=1)
    bench.frame(back, report(first, [1, 0, 2, 0], values=[b"a", b"b", b"c", b"d"]))
    assert shown(bench, client) == [(2, b"\0", b"b", []), (4, b"\0", b"d", [])]
    assert bench.core.state.counts == {"failure under a void lease": 2}
    assert [i for i in range(9) if i in call_of(bench).finished] == [0, 2, 4]


@pytest.mark.parametrize("is_item", [False, True], ids=["output", "item"])
def test_a_worker_whose_report_names_what_is_not_here_has_to_come_again(is_item: bool) -> None:
    """It believes that the blob is here, and would never offer it again."""
    bench, worker, client, lease = running()
    lengths = (1).to_bytes(4, "little")
    item = m.LeaseItems(1, lease.lease_id, lease.call_id, 0, 0, lengths, [(0, [BLOB])], b"i")
    bench.frame(worker, item if is_item else report(lease, [0], [(0, [BLOB])]))
    assert shown(bench, client) == []
    assert bench.core.state.counts == {"report without its blobs": 1}
    assert [order.code for order in bench.take_commands(Disconnect)] == ["blobs"]
    bench.frame(worker, report(lease, [1]))
    bench.later(1)
    assert not bench.take_all(m.OutputsAck), "nothing behind it is acknowledged either"
    again = bench.worker(cpu=1)
    assert [lease.start for lease in bench.start_all(again)] == [0]


def test_what_a_worker_has_brought_waits_for_its_report_however_long_that_takes() -> None:
    bench, worker, client, lease = running()
    bench.tell(BlobCompleted(BLOB, 8, PeerId(worker)), BlobCompleted(OTHER_BLOB, 8, PeerId(worker)))
    for _ in range(50):
        bench.later(9)
        bench.frame(worker, m.Heartbeat(1))
    assert bench.core.state.present_blobs.keys() == {BLOB, OTHER_BLOB}
    bench.frame(worker, report(lease, [0], [(0, [BLOB])]))
    assert [start for start, *_ in shown(bench, client)] == [0]
    assert bench.blobs_dropped() == []
    bench.lose(worker)
    assert bench.blobs_dropped() == [OTHER_BLOB]


def test_a_report_of_another_calls_input_does_not_fit() -> None:
    bench, worker, client, lease = running(count=9)
    bench.frame(worker, report(lease, [0]))
    first = bench.take_all(m.Lease)[0]
    bench.forget(m.Outputs)
    for message in (
        report(first, [0], start=0),
        report(first, [0, 0], start=4),
        report(first, []),
    ):
        bench.frame(worker, message)
    wrong = report(first, [0])
    wrong.call_id = b"?" * 16
    bench.frame(worker, wrong)
    assert shown(bench, client) == []
    assert bench.core.state.counts == {"report that does not fit its lease": 4}
    bench.frame(worker, report(first, [0], start=4))
    assert [start for start, *_ in shown(bench, client)] == [4]


def test_a_report_of_an_ended_call_ends_its_lease() -> None:
    bench, worker, client, lease = running()
    bench.frame(client, m.CancelCall(lease.call_id))
    bench.frame(worker, report(lease, [0]))
    assert not bench.core.state.leases
    assert bench.core.state.counts == {"output of an ended call": 1}


# --- inputs that need not be kept -----------------------------------------------------------------


def test_blobs_of_inputs_go_with_the_last_input_of_their_chunk() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 4})
    bench.blob(BLOB)
    bench.blob(OTHER_BLOB)
    call_id = bench.open(client, is_sealed=False)
    lengths, payload = table([b"a", b"b"])
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(1, [BLOB])], payload))
    bench.frame(client, m.Inputs(call_id, 2, lengths, [(0, [BLOB, OTHER_BLOB])], payload))
    assert bench.core.state.blob_references == {BLOB: 2, OTHER_BLOB: 1}
    assert bench.blobs_sent() == [(worker, BLOB), (worker, OTHER_BLOB)], "each of them once"
    leases = bench.take_all(m.Lease)
    bench.start(worker, leases[0].container_id)
    assert [(o.start, o.blobs) for o in leases] == [
        (0, [(1, [BLOB])]),
        (2, [(0, [BLOB, OTHER_BLOB])]),
    ]
    bench.finish(worker, leases[1], count=1)
    bench.finish(worker, leases[0], count=1)
    assert bench.blobs_dropped() == []
    bench.finish(worker, leases[1], count=1, skip=1)
    assert bench.blobs_dropped() == [OTHER_BLOB]
    bench.finish(worker, leases[0], count=1, skip=1)
    assert bench.blobs_dropped() == [BLOB]
    dropped = bench.blobs_withdrawn(worker)
    assert dropped == [OTHER_BLOB, BLOB]
    assert not bench.core.state.blob_references


def test_inputs_that_lack_a_blob_are_asked_for_again_when_their_client_is_back() -> None:
    """The connection was lost while the blob was on its way, and nobody else would bring it."""
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, is_sealed=False)
    lengths, payload = table([b"a", b"b", b"c"])
    frame = m.Inputs(call_id, 0, lengths, [(1, [BLOB])], payload)
    bench.frame(client, m.Inputs(call_id, 3, lengths, [], payload), frame)
    bench.lose(client)
    again = bench.connect(session=client.to_bytes(16, "big"))
    bench.frame(again, m.OpenCall(call_id, b"f" * 16, False, True, None, is_resumed=True))
    assert bench.take(m.CallOpened, again).present == [(3, 3)]
    bench.frame(again, frame)
    bench.blob(BLOB)
    assert not bench.core.state.calls[call_id].parked
    assert bench.core.state.calls[call_id].queued.first == 0


def test_the_blob_of_a_result_that_nobody_wants_any_more_goes_with_its_report() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.tell(BlobCompleted(BLOB, 8, PeerId(worker)))
    bench.frame(client, m.CancelCall(call_id))
    assert bench.blobs_dropped() == []
    bench.finish(worker, lease, blobs=[(0, [BLOB])])
    assert bench.blobs_dropped() == [BLOB]


def test_a_blob_that_its_client_has_not_named_goes_after_a_while() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.tell(BlobCompleted(BLOB, 8, PeerId(client)))
    bench.later(59)
    assert bench.blobs_dropped() == []
    bench.later(2)
    assert bench.blobs_dropped() == [BLOB]
    assert not bench.core.state.present_blobs


@pytest.mark.parametrize("is_durable", [False, True])
def test_inputs_wait_for_their_blobs_and_blobs_end_with_the_call(is_durable: bool) -> None:
    bench = Bench()
    bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, is_sealed=False, is_durable=is_durable)
    bench.store()
    lengths, payload = table([b"a"])
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [BLOB, OTHER_BLOB])], payload))
    bench.blob(OTHER_BLOB)
    assert bench.take_all(m.Lease) == []
    (row,) = bench.core.snapshot()["calls"]
    assert row["waiting_for"] == "blobs that are still on their way"
    bench.blob(BLOB)
    bench.store()
    bench.take(m.Lease)
    bench.frame(client, m.CancelCall(call_id))
    assert sorted(bench.blobs_dropped()) == [BLOB, OTHER_BLOB]
    assert not bench.core.state.blob_references


def test_a_call_that_ends_while_its_blobs_are_on_their_way_lets_them_go() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, is_sealed=False, is_durable=True)
    bench.store()
    lengths, payload = table([b"a"])
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(0, [BLOB])], payload))
    bench.frame(client, m.CancelCall(call_id))
    bench.store()
    bench.blob(BLOB)
    assert bench.store() == []
    assert not bench.core.state.blob_references
    assert bench.blobs_dropped() == [BLOB]


def test_acknowledged_outputs_and_their_blobs_are_forgotten_in_their_order() -> None:
    bench, worker, client, lease = running(count=3, max_inputs=3)
    bench.blob(BLOB)
    bench.blob(OTHER_BLOB)
    bench.frame(worker, report(lease, [0], [(0, [OTHER_BLOB])], start=1))
    bench.frame(worker, report(lease, [0, 0][:1], [(0, [BLOB])], start=0))
    call_id = lease.call_id
    bench.frame(client, ack(call_id, 0, 1, 0))
    assert [o.start for o in call_of(bench).outputs] == [1]
    bench.frame(client, ack(call_id, 1, 1, 2, 2))
    assert not call_of(bench).outputs
    assert sorted(bench.blobs_dropped()) == [BLOB, OTHER_BLOB]
    call = call_of(bench)
    assert (call.consumed_count, call.consumed_bytes) == (2, 2)
    bench.frame(client, ack(call_id, 0, 1, 1, 1))
    assert (call.consumed_count, call.consumed_bytes) == (2, 2), "counts only grow"
    bench.frame(client, ack(call_id, 0, 1, 2, 99999))
    assert call.output_bytes == 99999


# --- retries --------------------------------------------------------------------------------------


def test_delays_between_attempts_grow_up_to_their_maximum() -> None:
    bench, worker, client, lease = running(retries=[4, 2.0, 3.0, 10.0])
    delays = []
    for _ in range(4):
        bench.finish(worker, lease, status=m.Status.ERROR)
        assert shown(bench, client) == []
        began = bench.now
        while not (leases := bench.take_all(m.Lease)):
            deadline = bench.core.next_deadline()
            assert deadline is not None
            bench.later(deadline - bench.now)
            bench.frame(worker, m.Heartbeat(1))
        (lease,) = leases
        delays.append(bench.now - began)
    assert delays == [2.0, 6.0, 10.0, 10.0]
    bench.finish(worker, lease, status=m.Status.ERROR)
    assert [statuses for _, statuses, *_ in shown(bench, client)] == [b"\1"]
    assert not call_of(bench).attempts


def test_outputs_around_a_failed_one_are_delivered_with_their_blobs() -> None:
    bench, worker, client, lease = running(count=4, max_inputs=4, retries=[1, 5.0, 1.0, 60.0])
    bench.blob(BLOB)
    bench.blob(OTHER_BLOB)
    blobs = [(0, [BLOB]), (1, [BLOB]), (3, [OTHER_BLOB])]
    message = report(lease, [0, 1, 1, 0], blobs, [b"aa", b"b", b"ccc", b"d"])
    bench.frame(worker, message)
    assert shown(bench, client) == [
        (0, b"\0", b"aa", [(0, [BLOB])]),
        (3, b"\0", b"d", [(0, [OTHER_BLOB])]),
    ]
    assert list(call_of(bench).backing_off) == [(1, 3)]
    bench.later(5)
    assert sorted(lease.start for lease in bench.take_all(m.Lease)) == [1]
    assert not call_of(bench).backing_off


def test_an_output_ends_what_was_known_of_its_attempts_and_of_no_others() -> None:
    bench, worker, client, lease = running(count=3, max_inputs=3, retries=[5, 0.0, 1.0, 60.0])
    bench.frame(worker, report(lease, [1, 1, 1]))
    bench.later(0.01)
    call = call_of(bench)
    assert call.attempts == {0: 1, 1: 1, 2: 1}
    lease = bench.take(m.Lease)
    bench.frame(worker, report(lease, [0], start=1))
    assert call.attempts == {0: 1, 2: 1}
    assert shown(bench, client) == [(1, b"\0", b"v", [])]


# --- items of generators --------------------------------------------------------------------------


def items(
    lease: m.Lease, number: int, values: list[bytes], sequence: int = 1, blobs: Any = ()
) -> m.LeaseItems:
    lengths, payload = table(values)
    return m.LeaseItems(
        sequence, lease.lease_id, lease.call_id, lease.start, number, lengths, list(blobs), payload
    )


def test_items_are_acknowledged_to_their_worker_like_outputs() -> None:
    bench, worker, client, lease = running(is_generator=True)
    bench.frame(worker, items(lease, 0, [b"a"], sequence=1), items(lease, 1, [b"b"], sequence=2))
    assert [item.number for item in bench.take_all(m.Items, client)] == [0, 1]
    assert bench.take_all(m.OutputsAck) == []
    bench.later(0.02)
    assert bench.take(m.OutputsAck, worker).sequence == 2


def test_items_that_are_known_are_cut_off_with_their_blobs() -> None:
    bench, worker, client, lease = running(is_generator=True)
    for blob_id in (BLOB, OTHER_BLOB):
        bench.blob(blob_id)
    bench.frame(worker, items(lease, 0, [b"a", b"bb"], blobs=[(1, [BLOB])]))
    assert bench.blobs_sent() == [(client, BLOB)]
    bench.forget(m.Items)
    blobs = [(0, [BLOB]), (1, [OTHER_BLOB]), (2, [BLOB])]
    bench.frame(worker, items(lease, 1, [b"bb", b"ccc", b"d"], blobs=blobs))
    told = bench.take(m.Items, client)
    assert (told.number, bytes(told.payload)) == (2, b"cccd")
    assert told.blobs == [(0, [OTHER_BLOB]), (1, [BLOB])]
    assert told.lengths == table([b"ccc", b"d"])[0]
    assert bench.core.state.blob_references == {BLOB: 2, OTHER_BLOB: 1}
    bench.frame(client, m.ItemCredit(lease.call_id, 0, 8, 1))
    assert bench.core.state.blob_references == {BLOB: 2, OTHER_BLOB: 1}, "one of two is not here"
    bench.frame(client, m.ItemCredit(lease.call_id, 0, 8, 2))
    assert bench.core.state.blob_references == {BLOB: 1, OTHER_BLOB: 1}
    bench.frame(client, m.ItemCredit(lease.call_id, 0, 8, 4))
    assert sorted(bench.blobs_dropped()) == [BLOB, OTHER_BLOB]


def test_items_out_of_order_or_twice_or_of_nobody_are_dropped_and_counted() -> None:
    bench, worker, client, lease = running(is_generator=True)
    bench.frame(worker, items(lease, 1, [b"b"]))
    bench.frame(worker, items(lease, 0, [b"a"]), items(lease, 0, [b"a"]))
    assert [item.number for item in bench.take_all(m.Items, client)] == [0]
    bench.frame(client, m.CancelCall(lease.call_id))
    bench.frame(worker, items(lease, 1, [b"b"]))
    assert bench.take_all(m.Items) == []
    assert bench.core.state.counts == {
        "items out of order": 1, "duplicate items": 1, "items of an unknown lease": 1,
    }  # fmt: skip


def test_credit_that_a_waiting_generator_has_already_is_sent_at_once() -> None:
    bench, worker, client, lease = running(is_generator=True)
    bench.frame(client, m.ItemCredit(lease.call_id, 0, 8, 0))
    assert bench.take(m.LeaseCredit, worker).upto == 8
    bench.frame(worker, m.LeaseWaits(lease.lease_id, 4))
    credit = bench.take(m.LeaseCredit, worker)
    assert (credit.lease_id, credit.upto) == (lease.lease_id, 8)
    (container,) = bench.core.state.containers.values()
    assert not container.is_waiting
    bench.frame(client, m.ItemCredit(lease.call_id, 0, 8, 0), m.ItemCredit(lease.call_id, 0, 7, 0))
    assert bench.take_all(m.LeaseCredit) == []
    bench.frame(worker, m.LeaseWaits(lease.lease_id, 8), m.LeaseWaits(99, 8))
    assert container.is_waiting
    assert bench.core.state.counts == {"wait of an unknown lease": 1}


def test_credit_goes_to_the_generator_that_it_is_for() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"is_generator": True})
    call_id = bench.open(client, count=2)
    leases = bench.take_all(m.Lease, worker)
    bench.frame(client, m.ItemCredit(call_id, 5, 8, 0))
    assert bench.take_all(m.LeaseCredit) == []
    bench.frame(client, m.ItemCredit(call_id, 1, 8, 0))
    assert bench.take(m.LeaseCredit).lease_id == leases[1].lease_id


# --- crashes --------------------------------------------------------------------------------------


def test_the_third_crash_says_how_the_container_died() -> None:
    bench, worker, client, lease = running(count=2, cpu=1)
    details = {"text": "killed by SIGSEGV", "signal": "SIGSEGV"}
    for number in range(3):
        running_inputs = [(lease.lease_id, 0), (lease.lease_id, 77), (99, 0)]
        exited = m.ContainerExited(lease.container_id, "crash", running_inputs, details, b"")
        bench.frame(worker, exited)
        if number < 2:
            lease = bench.started_lease(worker)
    ((start, statuses, payload, _),) = shown(bench, client)
    assert (start, statuses) == (0, bytes([m.Status.FAILURE]))
    code, text, told = msgpack.unpackb(payload)
    assert code == "crash"
    assert text == "the container died 3 times while it ran input 0 of f: killed by SIGSEGV"
    assert told == details | {"call_id": lease.call_id, "input_index": 0, "crash_count": 3}
    assert not call_of(bench).crashes


def test_only_inputs_that_ran_and_have_no_output_are_suspects() -> None:
    bench, worker, client, lease = running(count=4, max_inputs=4)
    bench.frame(worker, report(lease, [0]))
    indexes = [(lease.lease_id, index) for index in (0, 1, 2)]
    bench.frame(worker, m.ContainerExited(lease.container_id, "crash", indexes, {}, b""))
    assert list(call_of(bench).suspects) == [(1, 3)]
    alone = bench.started_lease(worker)
    assert (alone.start, len(alone.lengths) // 4) == (1, 1)
    bench.frame(worker, report(alone, [0]))
    assert list(call_of(bench).suspects) == [(2, 3)]


def test_what_runs_before_a_suspect_ends_where_the_suspect_begins() -> None:
    bench, worker, client, lease = running(count=6, max_inputs=6)
    indexes = [(lease.lease_id, index) for index in (2, 4)]
    bench.frame(worker, m.ContainerExited(lease.container_id, "crash", indexes, {}, b""))
    first = bench.started_lease(worker)
    assert (first.start, len(first.lengths) // 4) == (0, 2)
    seen = []
    waiting = [first]
    while waiting:
        lease = waiting.pop()
        seen.append((lease.start, len(lease.lengths) // 4))
        bench.finish(worker, lease)
        waiting += bench.take_all(m.Lease)
    assert sorted(seen) == [(0, 2), (2, 1), (3, 1), (4, 1), (5, 1)]


def test_an_input_of_a_call_that_has_ended_is_charged_nothing() -> None:
    bench, worker, client, lease = running()
    call = call_of(bench)
    bench.frame(client, m.CancelCall(lease.call_id))
    crash = m.ContainerExited(lease.container_id, "crash", [(lease.lease_id, 0)], {}, b"")
    bench.frame(worker, crash)
    assert not call.crashes
    assert bench.take_all(m.Lease) == []


# --- acknowledging --------------------------------------------------------------------------------


def test_many_reports_are_acknowledged_before_their_moment_is_over() -> None:
    bench, worker, client, lease = running(count=40, max_inputs=40)
    for number in range(31):
        bench.frame(worker, report(lease, [0], start=number, sequence=number + 1))
    assert bench.take_all(m.OutputsAck) == []
    bench.frame(worker, report(lease, [0], start=31, sequence=32))
    assert bench.take(m.OutputsAck, worker).sequence == 32
    bench.frame(worker, report(lease, [0], start=32, sequence=33))
    bench.later(0.019)
    assert bench.take_all(m.OutputsAck) == []
    bench.later(0.002)
    assert bench.take(m.OutputsAck, worker).sequence == 33
    assert not bench.core.state.acknowledging
    bench.frame(client, ack(lease.call_id, 0, 33, 33), inputs(lease.call_id, 40, 1))
    bench.later(1)
    assert bench.take_all(m.OutputsAck) == []


def test_a_container_that_died_without_a_word_is_told_without_one() -> None:
    bench, worker, client, lease = running()
    for number in range(3):
        died = m.ContainerExited(lease.container_id, "crash", [(lease.lease_id, 0)], {}, b"")
        bench.frame(worker, died)
        if number < 2:
            lease = bench.started_lease(worker)
    ((_, _, payload, _),) = shown(bench, client)
    assert msgpack.unpackb(payload)[1].endswith("while it ran input 0 of f: ")


def test_what_only_workers_and_containers_say_is_nothing_from_others() -> None:
    bench, worker, client, lease = running(is_generator=True)
    orders = list(bench.orders)
    bench.frame(client, report(lease, [0]), items(lease, 0, [b"a"]))
    bench.frame(client, m.SessionWaits(0), m.SessionRuns())
    bench.frame(worker, m.SessionWaits(0), m.SessionRuns())
    lost = m.LeaseItems(1, 99, lease.call_id, 0, 0, b"\1\0\0\0", [], b"x")
    bench.frame(worker, lost)
    assert bench.orders == orders
    assert bench.core.state.counts == {"items of an unknown lease": 1}
    (container,) = bench.core.state.containers.values()
    assert not container.is_waiting


def test_an_output_and_its_blobs_come_back_from_disk() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1, is_durable=True)
    records = [record for store in bench.store() for record in store.records]
    bench.blob(BLOB)
    bench.frame(worker, report(bench.started_lease(worker), [0], [(0, [BLOB])]))
    records += [record for store in bench.store() for record in store.records]
    again = Bench(epoch=2)
    again.core.restore(records, again.now)
    again.blob(BLOB)
    assert again.core.state.blob_references == {BLOB: 1}
    reader = again.connect()
    again.frame(reader, m.FetchOutputs(1, b"\1" * 16, 0, 1))
    assert shown(again, reader) == [(0, b"\0", b"v", [(0, [BLOB])])]
    assert again.blobs_sent() == [(reader, BLOB)]


@pytest.mark.parametrize("is_durable", [False, True])
def test_items_for_a_client_that_is_away_are_kept_for_it(is_durable: bool) -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"is_generator": True})
    bench.open(client, count=1, is_durable=is_durable)
    bench.store()
    lease = bench.started_lease(worker)
    bench.blob(BLOB)
    bench.lose(client)
    bench.frame(worker, items(lease, 0, [b"a"], blobs=[(0, [BLOB])]))
    assert bench.blobs_sent() == []
    assert bench.take_all(m.Items) == []
    assert bench.core.state.blob_references == {BLOB: 1}


def test_a_late_value_of_an_input_that_lacks_its_blobs_is_its_output() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = b"\1" * 16
    # It may have run in an earlier life of the scheduler, of whose leases nobody knows.
    bench.frame(client, m.OpenCall(call_id, b"f" * 16, False, True, None, is_resumed=True))
    lengths, payload = table([b"a", b"b"])
    bench.frame(client, m.Inputs(call_id, 0, lengths, [(1, [BLOB])], payload))
    late = m.LeaseOutputs(1, 77, call_id, 0, 10, b"\1\0\0\0", b"\0", [], b"v")
    bench.frame(worker, late)
    assert shown(bench, client) == [(0, b"\0", b"v", [])]
    assert list(call_of(bench).parked) == [(1, 2)]
    bench.blob(BLOB)
    assert bench.take(m.Lease).start == 1


def test_a_report_that_came_before_waits_for_all_that_is_on_its_way_to_disk() -> None:
    bench = Bench()
    worker, client = bench.worker(cpu=1), bench.client(f={"max_inputs": 8})
    bench.open(client, count=8, is_durable=True)
    bench.store()
    (lease,) = bench.start_all(worker)
    sequences = {}
    for start in (2, 0, 6):
        bench.finish(worker, lease, count=2, skip=start)
        sequences[start] = bench.core.state.store_sequence
    found = {
        (start, stop): durable.stores_of(call_of(bench), start, stop)
        for start, stop in [(0, 2), (1, 3), (3, 7), (4, 6), (3, 4), (0, 8)]
    }
    first, second, last = sequences[0], sequences[2], sequences[6]
    assert found == {
        (0, 2): [first], (1, 3): [first, second], (3, 7): [second, last], (4, 6): [],
        (3, 4): [second], (0, 8): [first, second, last],
    }  # fmt: skip
    bench.store()
    assert durable.stores_of(call_of(bench), 0, 8) == []
