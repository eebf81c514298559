"""The worker's sans-IO state: leases, reports that must arrive, blobs, reconnects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from fanout.protocol import messages as m
from fanout_worker import worker_state as ws

APP = b"a" * 16
FUNCTION = b"f" * 16
CALL = b"c" * 16
BLOB = b"b" * 32
OTHER_BLOB = b"o" * 32

C = TypeVar("C")


class Kit:
    """A state that is connected and has one container, 7."""

    def __init__(self, blobs: Sequence[bytes] = ()) -> None:
        self.state = ws.WorkerState(b"w" * 16, "w", 2.0, 1024, False)
        self.state.connected()
        self.state.handle(m.DefineFunction(FUNCTION, APP, "f", {}, list(blobs), b"code"))
        self.state.handle(m.StartContainer(7, FUNCTION))
        self.first = self.state.take_commands()

    def commands(self, kind: type[C]) -> list[C]:
        return [command for command in self.state.take_commands() if isinstance(command, kind)]

    def sent(self, kind: type[C] | None = None) -> list[Any]:
        messages = [command.message for command in self.commands(ws.Send)]
        return [one for one in messages if kind is None or isinstance(one, kind)]

    def lease(
        self,
        lease_id: int,
        count: int,
        start: int = 0,
        blobs: Sequence[tuple[int, list[bytes]]] = (),
    ) -> None:
        self.state.handle(
            m.Lease(
                7, lease_id, CALL, start, b"\1\0\0\0" * count, list(blobs), 0, 0, "", b"i" * count
            )
        )

    def outputs(self, lease_id: int, start: int, count: int, blobs: Any = ()) -> None:
        self.state.lease_outputs(
            lease_id, start, 10, b"\1\0\0\0" * count, bytes(count), list(blobs), b"o" * count
        )


def test_a_worker_introduces_itself_first() -> None:
    ready = Kit().first[0]
    assert isinstance(ready, ws.Send)
    assert isinstance(ready.message, m.WorkerReady)
    assert (ready.message.cpu, ready.message.memory) == (2.0, 1024)
    assert ready.message.containers == []


def test_a_container_starts_when_its_function_is_known() -> None:
    start = Kit().first[-1]
    assert isinstance(start, ws.Start)
    assert start.container_id == 7
    assert start.definition.function_id == FUNCTION


def test_a_container_of_an_unknown_function_is_reported_as_failed() -> None:
    kit = Kit()
    kit.state.handle(m.StartContainer(8, b"?" * 16))
    (exited,) = kit.sent(m.ContainerExited)
    assert (exited.container_id, exited.reason) == (8, "start")


def test_a_container_waits_for_the_blobs_of_its_function() -> None:
    kit = Kit(blobs=[BLOB])
    assert not any(isinstance(command, ws.Start) for command in kit.first)
    kit.state.blob_completed(BLOB)
    assert len(kit.commands(ws.Start)) == 1


def test_outputs_are_numbered_and_end_the_lease() -> None:
    kit = Kit()
    kit.lease(1, 3)
    assert len(kit.commands(ws.GiveLease)) == 1
    kit.outputs(1, 0, 2)
    assert list(kit.state.leases) == [1]
    kit.outputs(1, 2, 1)
    assert [(one.sequence, one.start) for one in kit.sent(m.LeaseOutputs)] == [(1, 0), (2, 2)]
    assert not kit.state.leases


def test_a_lease_waits_for_its_blobs_and_later_leases_wait_behind_it() -> None:
    kit = Kit()
    kit.lease(1, 1, blobs=[(0, [BLOB])])
    kit.lease(2, 1, start=1)
    assert kit.commands(ws.GiveLease) == []
    kit.state.blob_completed(BLOB)
    assert [given.lease.lease_id for given in kit.commands(ws.GiveLease)] == [1, 2]


def test_unacknowledged_reports_are_sent_again_after_a_reconnect_in_order() -> None:
    kit = Kit()
    kit.lease(1, 4)
    for index in range(3):
        kit.outputs(1, index, 1)
    kit.state.handle(m.OutputsAck(1))
    kit.state.disconnected()
    kit.outputs(1, 3, 1)
    kit.state.container_exited(7, "crash", [], {})
    kit.state.take_commands()
    kit.state.connected()
    sent = kit.sent()
    assert isinstance(sent[0], m.WorkerReady)
    assert [one.start for one in sent[1:-1]] == [1, 2, 3]
    numbers = [one.sequence for one in sent[1:-1]]
    assert numbers == sorted(numbers)
    assert numbers[0] > 1
    assert isinstance(sent[-1], m.ContainerExited)


def test_nothing_is_sent_while_disconnected() -> None:
    kit = Kit()
    kit.lease(1, 2)
    kit.state.disconnected()
    kit.outputs(1, 0, 1)
    kit.state.lease_waits(1, 3)
    assert kit.sent() == []


def test_reconnecting_tells_of_living_containers_and_leases() -> None:
    kit = Kit()
    kit.lease(1, 2)
    kit.state.disconnected()
    kit.state.take_commands()
    kit.state.connected()
    (ready,) = kit.sent(m.WorkerReady)
    assert ready.containers == [[7, FUNCTION]]
    assert ready.leases == [1]


def test_a_wait_for_credit_is_told_again_after_a_reconnect() -> None:
    kit = Kit()
    kit.lease(1, 1)
    kit.state.lease_waits(1, 4)
    kit.state.disconnected()
    kit.state.take_commands()
    kit.state.connected()
    assert [(one.lease_id, one.upto) for one in kit.sent(m.LeaseWaits)] == [(1, 4)]


def test_containers_that_the_scheduler_does_not_keep_are_killed() -> None:
    kit = Kit()
    kit.state.handle(m.StartContainer(8, FUNCTION))
    kit.state.take_commands()
    kit.state.handle(m.WorkerAccepted([7]))
    assert kit.commands(ws.Stop) == [ws.Stop(8, True)]


def test_an_acknowledged_exit_is_not_told_again() -> None:
    kit = Kit()
    kit.state.handle(m.StartContainer(8, FUNCTION))
    kit.state.container_exited(8, "stopped", [], {})
    kit.lease(1, 1)
    kit.outputs(1, 0, 1)
    kit.state.handle(m.OutputsAck(1))
    assert kit.state.unacknowledged_count == 0


def test_exits_alone_never_congest_a_worker() -> None:
    kit = Kit()
    for container_id in range(100, 100 + ws.UNACKNOWLEDGED_COUNT_MAX + 10):
        kit.state.handle(m.StartContainer(container_id, FUNCTION))
        kit.state.container_exited(container_id, "stopped", [], {})
    assert not kit.state.is_congested


def test_too_many_unacknowledged_bytes_congest_until_they_are_acknowledged() -> None:
    kit = Kit()
    kit.lease(1, 100)
    payload = b"o" * (16 << 20)
    for index in range(4):
        assert not kit.state.is_congested
        kit.state.lease_outputs(1, index, 0, len(payload).to_bytes(4, "little"), b"\0", [], payload)
    assert kit.state.is_congested
    kit.state.handle(m.OutputsAck(1))
    assert not kit.state.is_congested


def test_a_reclaim_goes_to_the_container_and_is_answered_with_what_it_said() -> None:
    kit = Kit()
    kit.lease(1, 10)
    kit.state.take_commands()
    kit.state.handle(m.Reclaim(1, 2))
    assert kit.commands(ws.LowerLimit) == [ws.LowerLimit(7, 1, 2, False)]
    kit.state.lease_reclaimed(1, 5)
    assert kit.sent() == [m.Reclaimed(1, 5)]
    kit.outputs(1, 0, 5)
    assert not kit.state.leases


def test_a_reclaim_of_all_that_is_left_ends_the_lease() -> None:
    kit = Kit()
    kit.lease(1, 10)
    kit.outputs(1, 0, 3)
    kit.state.lease_reclaimed(1, 3)
    assert not kit.state.leases


def test_a_parked_lease_is_cut_without_asking_anybody() -> None:
    kit = Kit()
    kit.lease(1, 4, blobs=[(0, [BLOB]), (3, [OTHER_BLOB])])
    kit.state.handle(m.Reclaim(1, 2))
    assert kit.sent(m.Reclaimed) == [m.Reclaimed(1, 2)]
    kit.state.blob_completed(BLOB)
    kit.state.blob_completed(OTHER_BLOB)
    (given,) = kit.commands(ws.GiveLease)
    assert len(given.lease.lengths) == 8
    assert bytes(given.lease.payload) == b"ii"
    assert given.lease.blobs == [(0, [BLOB])]


def test_a_cancelled_parked_lease_is_gone() -> None:
    kit = Kit()
    kit.lease(1, 4, blobs=[(0, [BLOB])])
    kit.state.handle(m.CancelLease(1))
    assert kit.sent(m.Reclaimed) == [m.Reclaimed(1, 0)]
    kit.state.blob_completed(BLOB)
    assert kit.commands(ws.GiveLease) == []


def test_a_cancel_asks_the_container_to_stop_what_runs() -> None:
    kit = Kit()
    kit.lease(1, 4)
    kit.state.take_commands()
    kit.state.handle(m.CancelLease(1))
    assert kit.commands(ws.LowerLimit) == [ws.LowerLimit(7, 1, 0, True)]


def test_an_unknown_lease_is_given_back_whole_and_counted() -> None:
    kit = Kit()
    kit.state.handle(m.Reclaim(99, 3))
    assert kit.sent() == [m.Reclaimed(99, 0)]
    assert kit.state.oddities["reclaim of an unknown lease"] == 1


def test_late_and_duplicate_messages_are_counted_and_change_nothing() -> None:
    kit = Kit()
    kit.lease(1, 2)
    kit.lease(1, 2)
    kit.state.handle(m.StartContainer(7, FUNCTION))
    kit.state.handle(m.StopContainer(55, True))
    kit.state.handle(m.LeaseCredit(55, 3))
    kit.state.container_exited(55, "crash", [], {})
    kit.outputs(55, 0, 1)
    assert sum(kit.state.oddities.values()) == 6
    assert len(kit.commands(ws.GiveLease)) == 1


def test_an_exit_takes_the_containers_leases_with_it() -> None:
    kit = Kit()
    kit.lease(1, 2)
    kit.lease(2, 2, blobs=[(0, [BLOB])])
    kit.state.container_exited(7, "crash", [(1, 0)], {"signal": "SIGSEGV"})
    assert not kit.state.leases
    (exited,) = kit.sent(m.ContainerExited)
    assert exited.running == [(1, 0)]
    travelled = m.decode(m.encode_header(exited), b"")
    assert isinstance(travelled, m.ContainerExited)
    assert travelled.details == {"signal": "SIGSEGV"}


def test_credit_reaches_a_parked_lease_too() -> None:
    kit = Kit()
    kit.lease(1, 1, blobs=[(0, [BLOB])])
    kit.state.handle(m.LeaseCredit(1, 12))
    kit.state.blob_completed(BLOB)
    (given,) = kit.commands(ws.GiveLease)
    assert given.lease.credit == 12


def test_a_blob_of_an_output_is_offered_before_its_report_and_again_after_a_reconnect() -> None:
    kit = Kit()
    kit.lease(1, 1)
    kit.state.take_commands()
    kit.outputs(1, 0, 1, blobs=[(0, [BLOB])])
    kinds = [type(command) for command in kit.state.take_commands()]
    assert kinds == [ws.OfferBlob]
    kit.state.disconnected()
    kit.state.connected()
    assert kit.commands(ws.OfferBlob) == [ws.OfferBlob(BLOB)]


def test_a_report_is_sent_when_its_blob_is_delivered_and_what_follows_it_behind_it() -> None:
    kit = Kit()
    kit.lease(1, 3)
    kit.state.take_commands()
    kit.outputs(1, 0, 1, blobs=[(0, [BLOB])])
    kit.outputs(1, 1, 1)
    kit.state.container_exited(7, "crash", [], {})
    assert kit.sent() == []
    kit.state.blob_delivered(BLOB)
    sent = kit.sent()
    assert [type(one) for one in sent] == [m.LeaseOutputs, m.LeaseOutputs, m.ContainerExited]
    assert [one.start for one in sent[:2]] == [0, 1]


def test_what_waits_for_its_blob_is_not_given_back() -> None:
    kit = Kit()
    kit.lease(1, 2)
    kit.state.take_commands()
    kit.outputs(1, 0, 2, blobs=[(0, [BLOB])])
    kit.state.handle(m.Reclaim(1, 0))
    assert kit.sent() == [m.Reclaimed(1, 2)]
    kit.state.blob_delivered(BLOB)
    assert [type(one) for one in kit.sent()] == [m.LeaseOutputs]
    kit.state.handle(m.Reclaim(1, 0))
    assert kit.sent() == [m.Reclaimed(1, 0)]


def test_a_report_that_waits_for_its_blob_delays_no_other_lease_and_the_exit_comes_last() -> None:
    kit = Kit()
    kit.lease(1, 2)
    kit.lease(2, 1)
    kit.state.take_commands()
    kit.outputs(1, 0, 1, blobs=[(0, [BLOB])])
    kit.outputs(2, 0, 1)
    assert [(one.lease_id, one.start) for one in kit.sent(m.LeaseOutputs)] == [(2, 0)]
    kit.state.container_exited(7, "crash", [], {})
    assert kit.sent() == []
    kit.state.blob_delivered(BLOB)
    assert [type(one) for one in kit.sent()] == [m.LeaseOutputs, m.ContainerExited]


def test_a_lease_ends_with_its_last_output_in_whatever_order_they_come() -> None:
    kit = Kit()
    kit.lease(1, 4)
    for index in (2, 0, 3):
        kit.outputs(1, index, 1)
        assert 1 in kit.state.leases
    kit.outputs(1, 1, 1)
    assert not kit.state.leases


def test_a_blob_of_an_output_is_removed_when_its_report_is_safe() -> None:
    kit = Kit()
    kit.lease(1, 1)
    kit.outputs(1, 0, 1, blobs=[(0, [BLOB])])
    kit.state.blob_delivered(BLOB)
    kit.state.take_commands()
    kit.state.handle(m.OutputsAck(1))
    assert kit.commands(ws.RemoveBlob) == [ws.RemoveBlob(BLOB)]


def test_a_blob_that_the_scheduler_sent_stays_until_it_says_so_and_no_lease_needs_it() -> None:
    kit = Kit()
    kit.state.blob_completed(BLOB)
    kit.lease(1, 1, blobs=[(0, [BLOB])])
    kit.state.handle(m.BlobDrop(BLOB))
    assert kit.commands(ws.RemoveBlob) == []
    kit.outputs(1, 0, 1)
    assert kit.commands(ws.RemoveBlob) == [ws.RemoveBlob(BLOB)]


def test_an_output_that_is_also_an_input_blob_stays_for_the_next_lease() -> None:
    kit = Kit()
    kit.state.blob_completed(BLOB)
    kit.lease(1, 1, blobs=[(0, [BLOB])])
    kit.outputs(1, 0, 1, blobs=[(0, [BLOB])])
    kit.state.blob_delivered(BLOB)
    kit.state.handle(m.OutputsAck(1))
    assert kit.commands(ws.RemoveBlob) == []
    kit.lease(2, 1, blobs=[(0, [BLOB])])
    assert len(kit.commands(ws.GiveLease)) == 1


def test_the_code_of_a_container_that_starts_is_kept_over_a_lost_connection() -> None:
    kit = Kit(blobs=[BLOB])
    kit.state.blob_completed(BLOB)
    assert len(kit.commands(ws.Start)) == 1
    kit.state.disconnected()
    kit.state.connected()
    assert kit.commands(ws.RemoveBlob) == []
    kit.state.container_started(7, 1, 0.1)
    assert kit.commands(ws.RemoveBlob) == [ws.RemoveBlob(BLOB)]


def test_what_came_over_an_earlier_connection_is_not_kept_for_the_scheduler() -> None:
    kit = Kit()
    kit.state.blob_completed(BLOB)
    kit.state.disconnected()
    kit.state.take_commands()
    kit.state.connected()
    assert kit.commands(ws.RemoveBlob) == [ws.RemoveBlob(BLOB)]


def test_parked_leases_do_not_survive_a_lost_connection() -> None:
    kit = Kit()
    kit.lease(1, 1, blobs=[(0, [BLOB])])
    kit.state.disconnected()
    assert not kit.state.leases


def test_a_stop_goes_to_the_container_and_it_is_not_offered_again() -> None:
    kit = Kit()
    kit.state.handle(m.StopContainer(7, False))
    assert kit.commands(ws.Stop) == [ws.Stop(7, False)]
    kit.state.disconnected()
    kit.state.connected()
    (ready,) = kit.sent(m.WorkerReady)
    assert ready.containers == []


def test_a_blob_may_complete_for_several_containers_whose_function_is_gone() -> None:
    kit = Kit(blobs=[BLOB])
    kit.state.handle(m.StartContainer(8, FUNCTION))
    kit.state.handle(m.DropFunction(FUNCTION))
    kit.state.blob_completed(BLOB)
    exits = kit.sent(m.ContainerExited)
    assert [(one.container_id, one.reason) for one in exits] == [(7, "start"), (8, "start")]
    assert not kit.state.containers


def test_a_leaving_worker_gives_back_what_it_does_not_begin() -> None:
    kit = Kit()
    kit.state.refuse(m.Lease(7, 3, CALL, 40, b"\1\0\0\0" * 2, [], 0, 0, "", b"ii"))
    kit.state.refuse(m.StartContainer(8, FUNCTION))
    reclaimed, exited = kit.sent()
    assert reclaimed == m.Reclaimed(3, 40)
    assert (exited.container_id, exited.reason, exited.running) == (8, "stopped", [])
    assert set(kit.state.containers) == {7}


def test_sources_are_removed_with_the_last_function_and_container_that_need_them() -> None:
    kit = Kit(blobs=[BLOB])
    kit.state.blob_completed(BLOB)
    other = b"g" * 16
    kit.state.handle(m.DefineFunction(other, APP, "g", {}, [BLOB], b"code"))
    kit.state.handle(m.DropFunction(FUNCTION))
    kit.state.handle(m.DropFunction(other))
    assert not kit.commands(ws.RemoveSources), "container 7 may still import from them"
    kit.state.container_exited(7, "stopped", [], {})
    assert kit.commands(ws.RemoveSources) == [ws.RemoveSources(BLOB)]
