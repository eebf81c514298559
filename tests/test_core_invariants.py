"""What the simulation relies on: a state that breaks an invariant of scheduler/README.md is told
by its number, and one that breaks none is not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core.events import PeerId, Send
from fanout_scheduler.core.state import GeneratorState, Node, Reservation
from tests.core_kit import Bench, inputs
from tests.object_kit import ObjectBench, bench_with_dict, bench_with_queue

#: What is broken of a state that is right, by the words that tell so.
Break = Callable[[Any], object]


def busy() -> SimpleNamespace:
    """A call of six inputs on a worker with one core: one finished, two leased, three queued."""
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"memory": 100})
    call_id = bench.open(client, count=6)
    bench.finish(worker, bench.started_lease(worker), input_s=0.02)
    state = bench.core.state
    (container,) = state.containers.values()
    call = state.calls[call_id]
    bench.frame(
        client, m.OpenCall(b"n" * 16, b"f" * 16, False, True, None), inputs(b"n" * 16, 0, 1)
    )
    bench.core.check()
    assert len(container.leases) == 2
    lease = next(iter(container.leases.values()))
    return SimpleNamespace(
        bench=bench, state=state, container=container, call=call, lease=lease,
        worker=container.worker, function=call.function, session=call.session,
    )  # fmt: skip


def end(s: Any) -> None:
    """The call is over, which ends what is asked of its inputs."""
    s.call.is_over = True
    s.function.app.open_count -= 1


def forget_lease(s: Any) -> None:
    """The inputs of all leases are nowhere, and nothing else is wrong."""
    end(s)
    for lease in list(s.call.leases.values()):
        s.container.open_count -= lease.open.count
        s.call.leased_count -= lease.open.count
        lease.open = IntervalSet()


def unlist_in_call(s: Any) -> None:
    end(s)
    s.call.leases.clear()
    s.call.leased_count = 0


def unlist_in_container(s: Any) -> None:
    s.container.leases.clear()
    s.container.open_count = 0
    s.container.holds_core = False
    s.worker.cpu_free = s.worker.cpu


def overdraw(s: Any) -> None:
    s.function.cpu = 2.0
    s.worker.cpu_free = -1.0


def hold_no_core(s: Any) -> None:
    s.container.holds_core = False
    s.worker.cpu_free = s.worker.cpu


def run_three_leases(s: Any) -> None:
    s.container.leases[99] = SimpleNamespace(open=IntervalSet())


def crowd(s: Any) -> None:
    s.function.is_concurrent, s.function.slots = True, 2
    s.container.open_count = 3
    for lease in s.container.leases.values():
        lease.open = IntervalSet([(0, 3)]) if lease is s.lease else IntervalSet()
    s.call.is_over = True
    s.call.leased_count = 3


def offer_nothing(s: Any) -> None:
    s.call.is_ready = False
    s.call.waits_for = ""


def finish_too_much(s: Any) -> None:
    s.call.is_over = True
    s.call.finished.add(6, 17)


def give_to_two_sessions(s: Any) -> None:
    s.call.session = SimpleNamespace()


def reserve_lost(s: Any) -> None:
    s.state.reservation = Reservation(s.function, SimpleNamespace(worker_id=b"lost"))  # type: ignore[arg-type]


def reserve_idle(s: Any) -> None:
    s.state.reservation = Reservation(SimpleNamespace(function_id=b"idle"), s.worker)  # type: ignore[arg-type]


BROKEN: list[tuple[str, Break]] = [
    ("1: an input of .* is in two places", lambda s: s.call.parked.add(4, 5)),
    ("1: an input of .* is in two places", lambda s: s.call.backing_off.add(5, 6)),
    ("1: an input of .* is in two places", lambda s: s.call.storing.add(0, 1)),
    ("1: an input of .* is in two places", lambda s: s.call.finished.add(5, 6)),
    ("1: .* queued and leased", lambda s: s.call.queued.add(s.lease.start, s.lease.stop)),
    ("1: .* queued and leased", lambda s: s.call.parked.add(s.lease.start, s.lease.stop)),
    ("1: .* holds", lambda s: s.call.queued.remove(5, 6)),
    ("1: .* holds", lambda s: s.call.received.add(6, 7)),
    ("2: ", lambda s: setattr(s.call.chunk_of(1), "start", 2)),
    ("2: ", lambda s: setattr(s.call.chunk_of(1), "stop", 5)),
    ("3: .* != ", lambda s: setattr(s.call, "leased_count", s.call.leased_count + 1)),
    ("3: ", finish_too_much),
    ("4: .* has queued inputs", offer_nothing),
    ("5: cores of w1", lambda s: setattr(s.worker, "cpu_free", s.worker.cpu_free + 1)),
    ("5: cores of w1", lambda s: setattr(s.worker, "cpu_free", s.worker.cpu_free - 1)),
    ("5: cores overdrawn", overdraw),
    ("5: memory of w1", lambda s: setattr(s.worker, "memory_free_mib", 901)),
    ("6: container", hold_no_core),
    ("6: container", run_three_leases),
    ("6: inputs of", lambda s: setattr(s.container, "open_count", s.container.open_count + 1)),
    ("6: .* has too many inputs", crowd),
    ("6: frames kept", lambda s: s.container.deferred.append(Send(PeerId(1), m.Heartbeat(1)))),
    ("7: .* is empty", forget_lease),
    ("7: call does not list", unlist_in_call),
    ("7: container does not", unlist_in_container),
    ("7: lease of a dead container", lambda s: s.state.containers.clear()),
    ("8: ", lambda s: setattr(s.function, "max_containers", 0)),
    ("9: a call on offer", lambda s: setattr(s.call, "is_ready", False)),
    ("9: function not on offer", lambda s: s.state.ready_functions.clear()),
    ("10: container of a lost worker", lambda s: s.state.workers.clear()),
    ("10: lost container", lambda s: s.function.containers.clear()),
    ("10: a call of two sessions", give_to_two_sessions),
    ("14: a call that is not", lambda s: setattr(s.call, "node", Node(b"", "f", "", None))),
    ("14: a node keeps", lambda s: s.state.ended_nodes.append(Node(b"", "f", "", s.call))),
    ("15: kept free on a lost worker", reserve_lost),
    ("15: kept free for nobody", reserve_idle),
]  # fmt: skip


@pytest.mark.parametrize(("words", "break_it"), BROKEN, ids=lambda value: str(value)[:30])
def test_a_broken_invariant_is_told_by_its_number(words: str, break_it: Break) -> None:
    parts = busy()
    break_it(parts)
    with pytest.raises(AssertionError, match="^" + words):
        parts.bench.core.check()


def test_cores_may_be_overdrawn_by_a_wait_that_was_given_up_and_by_nothing_else() -> None:
    parts = busy()
    overdraw(parts)
    parts.state.note("core taken back early")
    parts.bench.core.check()


def test_inputs_that_wait_for_their_consumer_are_on_offer_to_nobody() -> None:
    parts = busy()
    parts.function.ready.clear()
    parts.call.is_ready = False
    parts.call.waits_for = "its consumer"
    parts.bench.core.check()


@pytest.mark.parametrize("ending", ["is_over", "failure"])
def test_a_call_that_has_ended_owes_nothing_to_its_inputs(ending: str) -> None:
    parts = busy()
    failure = m.CallFailed(parts.call.call_id, m.Status.FAILURE, b"")
    if ending == "is_over":
        end(parts)
    else:
        parts.call.failure = failure
    parts.call.generators[0] = GeneratorState()
    parts.call.chunk_starts.clear()
    parts.call.queued.remove(5, 6)
    offer_nothing(parts)
    parts.function.ready.clear()
    parts.bench.core.check()


# --- queues and dicts -----------------------------------------------------------------------------


def queue() -> SimpleNamespace:
    """Two items, and a client that has taken another one without confirming it."""
    bench, peer = bench_with_queue()
    bench.put_stored(peer, b"a", b"b", b"c")
    bench.get(peer)
    bench.write()
    bench.forget(m.ObjectAnswer)
    return parts_of(bench)


def dictionary() -> SimpleNamespace:
    bench, peer = bench_with_dict()
    for key in (b"k1", b"k2"):
        bench.confirm(peer, bench.set(peer, key, b"value"))
    bench.write()
    bench.forget(m.ObjectAnswer)
    return parts_of(bench)


def parts_of(bench: ObjectBench) -> SimpleNamespace:
    objects = bench.core.state.objects
    (of,) = objects.by_id.values()
    partition = next(iter(of.partitions.values()), None)
    return SimpleNamespace(bench=bench, objects=objects, of=of, partition=partition)


def wait_at(group: str) -> Break:
    """A request waits in this group, although it could be served."""

    def break_it(s: Any) -> None:
        client = next(iter(s.objects.clients.values()))
        (request,) = client.requests.values()
        s.objects.size_bytes -= sum(item.size_bytes for item in request.items)
        request.items = []
        request.state = "waiting"
        request.message = m.QueuePut(1, s.of.object_id, b"", 1.0, True, b"\1\0\0\0", b"x")
        getattr(s.partition, group)[request] = None

    return break_it


def wait_nowhere(s: Any) -> None:
    for client in s.objects.clients.values():
        for request in client.requests.values():
            request.state = "waiting"


def block(s: Any) -> None:
    wait_at("peekers")(s)
    s.of.blocked = list(s.partition.peekers)
    s.partition.peekers.clear()


def wait_without_client(s: Any) -> None:
    wait_at("peekers")(s)
    s.objects.clients.clear()


BROKEN_QUEUE: list[tuple[str, Break]] = [
    ("11: order of queue", lambda s: s.partition.items.reverse()),
    ("11: order of queue", lambda s: s.partition.items.append(s.partition.items[-1])),
    ("12: a get waits", wait_at("getters")),
    ("12: a put waits", wait_at("putters")),
    ("", lambda s: setattr(s.partition, "storing_count", 5001)),
    ("12: a partition never expires", lambda s: setattr(s.partition, "has_deadline", False)),
    ("12: a change waits", block),
    ("11: waiting at queue", wait_nowhere),
    ("11: answered at queue", lambda s: s.partition.peekers.update(
        {request: None for client in s.objects.clients.values()
         for request in client.requests.values()})),
    ("11: requests of nobody", wait_without_client),
    ("13: a client without requests",
     lambda s: [client.requests.clear() for client in s.objects.clients.values()]),
    ("13: ", lambda s: setattr(s.objects, "size_bytes", s.objects.size_bytes + 1)),
    ("13: ", lambda s: s.partition.items.pop()),
]  # fmt: skip
BROKEN_DICT: list[tuple[str, Break]] = [
    ("11: numbers of dict", lambda s: s.of.numbers.reverse()),
    ("11: numbers of dict", lambda s: s.of.entries.pop(b"k1")),
    ("13: ", lambda s: setattr(s.of.entries[b"k1"], "value", b"longer than it was")),
]


@pytest.mark.parametrize(("words", "break_it"), BROKEN_QUEUE, ids=lambda value: str(value)[:30])
def test_a_queue_that_is_not_right_is_told_of(words: str, break_it: Break) -> None:
    parts = queue()
    parts.bench.core.check()
    break_it(parts)
    with pytest.raises(AssertionError, match="^" + words):
        parts.bench.core.check()


@pytest.mark.parametrize(("words", "break_it"), BROKEN_DICT, ids=lambda value: str(value)[:30])
def test_a_dict_that_is_not_right_is_told_of(words: str, break_it: Break) -> None:
    parts = dictionary()
    parts.bench.core.check()
    break_it(parts)
    with pytest.raises(AssertionError, match="^" + words):
        parts.bench.core.check()
