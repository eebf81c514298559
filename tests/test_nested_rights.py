"""A client in a container acts for the app of its container and for its own calls; and a report
that comes late counts only from the worker that had the inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fanout.protocol import messages as m
from fanout_scheduler.core.events import Disconnect
from tests.core_kit import Bench, inputs, table

OTHER_APP = b"o" * 16
STORED, ATTACHED = bytes([7]) * 16, bytes([8]) * 16
LENGTHS, PAYLOAD = table([b"x"])


class Nest:
    """A container of one app with a client inside, and a client with an app of its own: that one
    has a spawned and an attached call, and a queue."""

    def __init__(self) -> None:
        self.bench = bench = Bench()
        self.worker = bench.worker(cpu=1)
        self.client = bench.client(f={})
        bench.open(self.client, "f", 1, 1)
        self.lease = bench.started_lease(self.worker)
        self.other = bench.connect()
        bench.frame(
            self.other,
            m.OpenApp(OTHER_APP, "other"),
            m.DefineFunction(b"h" * 16, OTHER_APP, "h", {"max_containers": 3}, [], b"code"),
            m.OpenObject(1, b"q" * 16, m.ObjectType.QUEUE, "", m.OpenMode.EPHEMERAL),
            m.QueueGet(2, b"q" * 16, b"", 1, True),
        )
        bench.open(self.other, "h", STORED[0], 1, is_durable=True)
        bench.open(self.other, "h", ATTACHED[0], 1)
        bench.frame(self.other, m.FetchOutputs(5, STORED, 0, 1))
        self.nested = bench.connect(
            "nested", worker=self.worker, container_id=self.lease.container_id
        )
        while bench.store():
            pass
        bench.orders.clear()

    def facts(self) -> object:
        """What belongs to the client of the other app."""
        state = self.bench.core.state
        session = state.peers[self.other].session  # type: ignore[index]
        client = state.objects.clients[session.session_id]  # type: ignore[union-attr]
        calls = [state.calls[call_id] for call_id in (STORED, ATTACHED)]
        function = state.functions[b"h" * 16]
        return (
            [(c.session is session, c.received.count, c.sealed_count, c.is_over) for c in calls],
            [(c.consumed_count, c.acknowledged.count, dict(c.generators)) for c in calls],
            list(calls[0].fetches),
            (function.max_containers, function.min_containers, sorted(state.functions)),
            sorted(client.requests),
            sorted(state.apps[OTHER_APP].calls),
            [peer for peer in state.peers if peer != self.nested],
        )


Forge = Callable[[Nest], list[m.Message]]


def _calls(nest: Nest) -> list[m.Message]:
    parent = (nest.lease.lease_id, 0)
    return [
        m.OpenCall(bytes([50]) * 16, b"h" * 16, True, True, parent),
        m.OpenCall(bytes([51]) * 16, b"h" * 16, False, True, parent),
        m.OpenCall(STORED, b"h" * 16, True, True, None, is_resumed=True),
        m.OpenCall(ATTACHED, b"h" * 16, False, True, None, is_resumed=True),
    ]


def _submits(nest: Nest) -> list[m.Message]:
    return [
        m.SubmitCall(call_id, b"h" * 16, False, True, None, "", LENGTHS, [], PAYLOAD)
        for call_id in (ATTACHED, bytes([52]) * 16)
    ]


#: What a client in a container may try against another app and its client.
FORGERIES: dict[type[m.Message], Forge] = {
    m.DefineFunction: lambda n: [m.DefineFunction(b"z" * 16, OTHER_APP, "z", {}, [], b"code")],
    m.OpenCall: _calls,
    m.SubmitCall: _submits,
    m.Inputs: lambda n: [inputs(ATTACHED, 1, 1)],
    m.SealCall: lambda n: [m.SealCall(ATTACHED, 0)],
    m.Ack: lambda n: [m.Ack(ATTACHED, [(0, 1)], 1, 1)],
    m.CallsFinished: lambda n: [m.CallsFinished([ATTACHED, STORED])],
    m.ItemCredit: lambda n: [m.ItemCredit(ATTACHED, 0, 10, 10)],
    m.CancelCall: lambda n: [m.CancelCall(ATTACHED)],
    m.TerminateCall: lambda n: [m.TerminateCall(ATTACHED)],
    m.StopFetch: lambda n: [m.StopFetch(5)],
    m.AskFunction: lambda n: [m.AskFunction(9, b"h" * 16, {"max_containers": 1})],
    m.SessionWaits: lambda n: [m.SessionWaits(0)],
    m.SessionRuns: lambda n: [m.SessionRuns()],
    m.CancelRequest: lambda n: [m.CancelRequest(9, 2, True)],
    m.RequestsDone: lambda n: [m.RequestsDone([(0, 100)])],
    m.RequestsRepeated: lambda n: [m.RequestsRepeated(0)],
}

#: Those that act by an id which nobody can guess, as of a spawned call that was handed on, or on
#: queues and dicts, which belong to all apps: whoever is given the id or the name may use it.
BY_ID = m.BLOB_KINDS | {
    m.Goodbye, m.Heartbeat, m.FetchOutputs, m.AskCall, m.AskCallGraph,
    m.OpenObject, m.ListObjects, m.QueuePut, m.QueueGet, m.QueuePeek, m.DictPut, m.DictGet,
    m.DictScan, m.ObjectAction,
}  # fmt: skip


def test_every_kind_that_a_nested_client_may_send_is_dealt_with() -> None:
    assert set(FORGERIES) | BY_ID == m.FROM_NESTED_CLIENT
    assert not set(FORGERIES) & BY_ID


@pytest.mark.parametrize("kind", list(FORGERIES))
def test_a_client_in_a_container_changes_nothing_of_another_app(kind: type[m.Message]) -> None:
    nest = Nest()
    before = nest.facts()
    for message in FORGERIES[kind](nest):
        assert isinstance(message, kind)
        nest.bench.frame(nest.nested, message)
    assert nest.facts() == before
    assert nest.bench.take_all(m.Message, nest.other) == []


def test_a_client_in_a_container_goes_on_with_its_own_spawned_call() -> None:
    nest = Nest()
    bench = nest.bench
    call_id = bench.open(nest.nested, "f", 60, 1, is_durable=True, is_sealed=False)
    bench.store()
    bench.take_all(m.Message, nest.nested)
    bench.frame(nest.nested, m.OpenCall(call_id, b"f" * 16, True, True, None, is_resumed=True))
    assert bench.take(m.CallOpened, nest.nested).present == [(0, 1)]


def test_a_session_id_is_good_for_one_client_alone() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    session_id = bench.core.state.peers[client].session_id  # type: ignore[index]
    nested = bench.connect(
        "nested", session=session_id, worker=worker, container_id=lease.container_id
    )
    (refusal,) = [order for order in bench.orders if isinstance(order, Disconnect)]
    assert (refusal.peer_id, refusal.code) == (nested, "refused")
    bench.orders.clear()
    bench.finish(worker, lease)
    bench.take(m.Outputs, client)


# --- reports that come late -----------------------------------------------------------------------


def _lost_lease() -> tuple[Bench, int, m.Lease]:
    """A client, and a lease whose worker was lost."""
    bench = Bench()
    worker = bench.worker(cpu=1, number=1)
    client = bench.client(f={})
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.lose(worker)
    bench.orders.clear()
    return bench, client, lease


def test_what_a_lost_worker_had_is_taken_from_it_when_it_is_back() -> None:
    bench, client, lease = _lost_lease()
    bench.finish(bench.worker(cpu=1, number=1), lease)
    bench.take(m.Outputs, client)


def test_what_a_lost_worker_had_is_not_taken_from_another() -> None:
    bench, client, lease = _lost_lease()
    other = bench.worker(cpu=1, number=2)
    bench.finish(other, lease)
    assert bench.take_all(m.Outputs, client) == []
    assert bench.core.state.counts["report under a lease that its worker never had"] == 1
    bench.finish(other, bench.started_lease(other))
    bench.take(m.Outputs, client)


@pytest.mark.parametrize("is_resumed", [True, False])
def test_leases_of_an_earlier_life_count_for_calls_that_there_may_have_been(
    is_resumed: bool,
) -> None:
    bench = Bench(epoch=2)
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = b"c" * 16
    bench.frame(
        client,
        m.OpenCall(call_id, b"f" * 16, False, True, None, is_resumed=is_resumed),
        inputs(call_id, 0, 1),
        m.SealCall(call_id, 1),
    )
    old = m.Lease(5, 1 << m.EPOCH_SHIFT | 7, call_id, 0, LENGTHS, [], 0, 0, "", PAYLOAD)
    bench.finish(worker, old)
    assert len(bench.take_all(m.Outputs, client)) == is_resumed
