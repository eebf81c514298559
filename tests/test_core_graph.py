"""Call graphs in the bare core: who made which call, what is kept of it, what is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from fanout.config import RESULT_RETENTION_S
from fanout.protocol import messages as m
from fanout_scheduler.core import graph
from fanout_scheduler.core.events import PeerId
from tests.core_kit import Bench, ack, table


class Nest:
    """A spawned call (1) of two inputs that run, each able to make calls of its own."""

    def __init__(self, functions: Any = None) -> None:
        self.bench = bench = Bench()
        self.worker = bench.worker(cpu=1)
        self.client = bench.client(f={"module": "mod"}, g={"module": "other"})
        self.root = bench.open(self.client, count=2, is_durable=True)
        bench.store()
        self.lease = bench.started_lease(self.worker)
        self.nested = bench.connect(
            "nested", worker=self.worker, container_id=self.lease.container_id
        )

    def call(self, number: int, count: int = 1, index: int = 0) -> bytes:
        """Input `index` of the root makes a call."""
        parent = (self.lease.lease_id, index)
        return self.bench.open(self.nested, "g", number, count, parent=parent)

    def ask(self, call_id: bytes) -> dict[str, Any]:
        self.bench.frame(self.client, m.AskCallGraph(5, call_id))
        answer = self.bench.take(m.CallGraph, self.client)
        assert answer.request_id == 5
        return answer.graph

    def rows(self) -> list[tuple[str, int, int, str]]:
        """(function, index, position of what made it, status) of each input."""
        answer = self.ask(self.root)
        return [
            (answer["calls"][position][1], index, above, status)
            for position, index, above, status, _ in answer["inputs"]
        ]


def test_the_inputs_of_a_nested_call_hang_on_the_input_that_made_it() -> None:
    nest = Nest()
    nested = nest.call(2, count=2, index=1)
    answer = nest.ask(nest.root)
    assert answer["calls"] == [[nest.root.hex(), "f", "mod"], [nested.hex(), "g", "other"]]
    container = f"ct-{nest.lease.container_id:x}"
    assert answer["inputs"] == [
        [0, 0, -1, "pending", container],
        [0, 1, -1, "pending", ""],
        [1, 0, 1, "pending", ""],
        [1, 1, 1, "pending", ""],
    ]
    assert not answer["is_cut"]


def finish_nested(nest: Nest, status: int, values: list[bytes]) -> None:
    """The parent waits, the nested call runs on its core and is taken."""
    bench = nest.bench
    bench.frame(nest.nested, m.SessionWaits(0))
    lease = bench.started_lease(nest.worker)
    bench.finish(nest.worker, lease, status=status, values=values)
    count = len(lease.lengths) // 4
    bench.frame(nest.nested, ack(lease.call_id, 0, count, count))
    assert lease.call_id not in bench.core.state.calls, "the scheduler has forgotten the call"


@pytest.mark.parametrize(
    ("status", "value", "word"),
    [
        (m.Status.VALUE, b"v", "success"),
        (m.Status.ERROR, b"e", "failure"),
        (m.Status.FAILURE, m.failure_payload("timeout", "late"), "timeout"),
        (m.Status.FAILURE, m.failure_payload("cancelled", "no"), "terminated"),
        (m.Status.FAILURE, m.failure_payload("start", "no"), "init_failure"),
        (m.Status.FAILURE, m.failure_payload("crash", "died"), "failure"),
        (m.Status.FAILURE, b"\xc1", "failure"),
    ],
)
def test_a_nested_call_stays_in_the_graph_when_it_is_over(
    status: m.Status, value: bytes, word: str
) -> None:
    nest = Nest()
    nest.call(2)
    finish_nested(nest, int(status), [value])
    assert ("g", 0, 0, word) in nest.rows()


def test_what_the_root_itself_gave_is_told_from_its_kept_outputs() -> None:
    nest = Nest()
    bench = nest.bench
    bench.finish(nest.worker, nest.lease, count=1, status=int(m.Status.ERROR))
    bench.store()
    assert nest.rows()[0] == ("f", 0, -1, "failure")
    bench.frame(nest.client, m.CancelCall(nest.root))
    bench.store()
    assert nest.rows() == [("f", 0, -1, "failure"), ("f", 1, -1, "terminated")]


def test_a_nested_call_that_was_given_up_ended_by_force() -> None:
    nest = Nest()
    nested = nest.call(2, count=2)
    nest.bench.frame(nest.nested, m.CancelCall(nested))
    assert nest.rows()[2:] == [("g", 0, 0, "terminated"), ("g", 1, 0, "terminated")]


@pytest.mark.parametrize("index", [0, 1])
def test_only_the_newest_of_what_ended_is_kept(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setattr(graph, "ENDED_MAX", 2)
    nest = Nest()
    for number in range(2, 6):
        nest.bench.frame(nest.nested, m.CancelCall(nest.call(number, index=index)))
    answer = nest.ask(nest.root)
    assert [call[0][:2] for call in answer["calls"]] == ["01", "04", "05"]
    assert answer["is_cut"]
    assert len(nest.bench.core.state.ended_nodes) == 2


def test_an_answer_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "ROWS_MAX", 3)
    nest = Nest()
    nest.call(2, count=5)
    nest.call(3, count=5)
    answer = nest.ask(nest.root)
    assert (len(answer["inputs"]), len(answer["calls"]), answer["is_cut"]) == (3, 2, True)


def test_calls_below_an_attached_call_are_not_remembered() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    attached = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=lease.container_id)
    call_id = bench.open(nested, "g", 2, 1, parent=(lease.lease_id, 0))
    bench.frame(nested, m.CancelCall(call_id))
    assert not bench.core.state.ended_nodes
    bench.frame(client, m.AskCallGraph(5, attached))
    assert bench.take(m.CallGraph).graph == {}


def test_terminating_a_call_kills_the_containers_that_run_it_and_charges_nobody() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    doomed = bench.open(client, call=1, count=1, is_durable=True)
    bench.store()
    lease = bench.started_lease(worker)
    bench.frame(client, m.TerminateCall(doomed))
    stop = bench.take(m.StopContainer, worker)
    assert (stop.container_id, stop.kill) == (lease.container_id, True)
    bench.forget(m.CancelLease)
    innocent = bench.open(client, call=2, count=1)
    bench.frame(worker, m.ContainerExited(lease.container_id, "stopped", [], {}, b""))
    again = bench.started_lease(worker)
    assert again.call_id == innocent
    assert bench.core.state.calls[innocent].crashes == {}


def run_nested(nest: Nest, statuses: list[m.Status], values: list[bytes]) -> None:
    """The root waits for its nested call (2), whose inputs end like this."""
    bench = nest.bench
    nested = nest.call(2, count=len(values))
    peer = bench.core.state.peers[PeerId(nest.nested)]
    # Quick enough for several inputs in one report.
    bench.core.state.functions[b"g" * 16].methods[""].input_s = 1e-6
    done = 0
    while done < len(values):
        bench.frame(nest.nested, m.SessionWaits(peer.wait_frames))
        for start in bench.take_all(m.StartContainer):
            bench.start(nest.worker, start.container_id)
        for lease in bench.take_all(m.Lease):
            stop = lease.start + len(lease.lengths) // 4
            lengths, payload = table(values[lease.start : stop])
            codes = bytes(statuses[lease.start : stop])
            report = m.LeaseOutputs(
                1, lease.lease_id, nested, lease.start, 1, lengths, codes, [], payload
            )
            bench.frame(nest.worker, report)
            done = stop


def test_of_many_failures_the_first_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "FAILURES_MAX", 2)
    for count in (2, 3):
        nest = Nest()
        run_nested(nest, [m.Status.ERROR] * count, [b"e"] * count)
        assert nest.ask(nest.root)["is_cut"] is (count == 3)
        assert [row[3] for row in nest.rows()[2:4]] == ["failure", "failure"]


def test_a_nested_call_that_could_not_start_is_told_as_such_when_it_is_over() -> None:
    nest = Nest()
    bench = nest.bench
    nested = nest.call(2)
    bench.frame(nest.nested, m.SessionWaits(0))
    container_id = bench.take(m.StartContainer).container_id
    bench.frame(nest.worker, m.ContainerExited(container_id, "start", [], {}, b"pickled"))
    assert nest.rows()[2:] == [("g", 0, 0, "init_failure")]
    bench.frame(nest.nested, m.CallsFinished([nested]))
    assert nested not in bench.core.state.calls
    assert nest.rows()[2:] == [("g", 0, 0, "init_failure")]


def test_failures_are_told_apart_by_their_place_and_their_bytes() -> None:
    nest = Nest()
    late, no_start = (m.failure_payload(code, "why") for code in ("timeout", "start"))
    value, error, failure = m.Status.VALUE, m.Status.ERROR, m.Status.FAILURE
    statuses = [value, failure, error, failure, value, failure]
    run_nested(nest, statuses, [b"v", late, b"an error", no_start, b"w", late])
    words = [row[3] for row in nest.rows()[2:]]
    assert words == ["success", "timeout", "failure", "init_failure", "success", "timeout"]


def test_a_container_is_named_with_the_inputs_that_it_has_and_no_others() -> None:
    nest = Nest()
    bench = nest.bench
    bench.finish(nest.worker, nest.lease, input_s=1.0)
    bench.store()
    second = bench.take(m.Lease)
    rows = nest.ask(nest.root)["inputs"]
    assert [row[4] for row in rows] == ["", f"ct-{second.container_id:x}"]


def test_a_root_that_is_forgotten_leaves_nothing_of_its_graph_to_ask_for() -> None:
    nest = Nest()
    bench = nest.bench
    nest.bench.frame(nest.nested, m.CancelCall(nest.call(2)))
    bench.frame(nest.client, m.CancelCall(nest.root))
    bench.store()
    bench.later(RESULT_RETENTION_S + 1)
    assert nest.root not in bench.core.state.calls
    bench.lose(nest.client)
    reader = bench.connect()
    bench.frame(reader, m.AskCallGraph(5, nest.root))
    assert bench.take(m.CallGraph, reader).graph == {}
