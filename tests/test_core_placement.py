"""Who runs what next, case by case: options, choice of container and worker, leases, waits."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fanout.config import SCALEDOWN_WINDOW_S, TIMEOUT_S
from fanout.protocol import messages as m
from fanout_scheduler.core import placement
from fanout_scheduler.core.placement import NOTICE_S
from fanout_scheduler.core.state import App, Method, make_function
from tests.core_kit import APP, Bench, ack, exited, inputs


def sizes(leases: list[m.Lease]) -> list[tuple[int, int]]:
    """(start, count) of each."""
    return [(lease.start, len(lease.lengths) // 4) for lease in leases]


def waits_for(bench: Bench, number: int = 1) -> str:
    return bench.core.state.calls[bytes([number]) * 16].waits_for


def text_of(failed: m.CallFailed) -> tuple[str, str]:
    code, text, _ = msgpack.unpackb(failed.payload)
    return code, text


# --- what a definition says -----------------------------------------------------------------------

PLAIN = {
    "cpu": 1.0, "memory_mib": 0, "max_containers": None, "min_containers": 0,
    "buffer_containers": 0, "scaledown_window_s": SCALEDOWN_WINDOW_S, "timeout_s": TIMEOUT_S,
    "methods": {"": Method("", False)}, "slots": 1, "is_concurrent": False, "target": 1,
    "is_batched": False, "is_single_use": False, "retries": None,
}  # fmt: skip
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"cpu": 0}, {"cpu": 0.0}),
    ({"cpu": 2, "memory": 512.0}, {"cpu": 2.0, "memory_mib": 512}),
    ({"max_containers": 3, "min_containers": 2}, {"max_containers": 3, "min_containers": 2}),
    ({"buffer_containers": 4, "min_containers": None}, {"buffer_containers": 4}),
    ({"scaledown_window": 7}, {"scaledown_window_s": 7.0}),
    ({"scaledown_window": 0}, {"scaledown_window_s": 0.0}),
    ({"timeout": 9}, {"timeout_s": 9.0}),
    ({"timeout": None}, {}),
    ({"is_generator": True}, {"methods": {"": Method("", True)}}),
    ({"is_generator": 1, "methods": None}, {"methods": {"": Method("", True)}}),
    (
        {"methods": {"a": {"is_generator": True}, "b": {"is_generator": False}}},
        {"methods": {"a": Method("a", True), "b": Method("b", False)}},
    ),
    ({"max_inputs": 1}, {}),
    ({"max_inputs": 2}, {"slots": 2, "target": 2, "is_concurrent": True}),
    (
        {"max_inputs": 6, "target_inputs": 4},
        {"slots": 6, "target": 4, "is_concurrent": True},
    ),
    ({"batch": [5, 100]}, {"slots": 5, "target": 5, "is_concurrent": True, "is_batched": True}),
    (
        {"batch": [5, 100], "max_inputs": 3, "target_inputs": 2},
        {"slots": 15, "target": 10, "is_concurrent": True, "is_batched": True},
    ),
    ({"is_mixed": True}, {"is_concurrent": True}),
    ({"single_use": True}, {"is_single_use": True}),
    ({"retries": [3, 1, 2, 60]}, {"retries": (3, 1.0, 2.0, 60.0)}),
    ({"retries": [3, 1, 2, 60, "unknown"]}, {"retries": (3, 1.0, 2.0, 60.0)}),
    ({"unknown": 1}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "changed"), OPTIONS)
def test_options_of_a_definition_make_a_function(
    options: dict[str, Any], changed: dict[str, Any]
) -> None:
    app = App(APP, "app")
    definition = m.DefineFunction(b"f" * 16, APP, "f", options, [], b"code")
    function = make_function(definition, app, 7)
    assert (function.definition, function.app, function.number) == (definition, app, 7)
    found = {name: getattr(function, name) for name in PLAIN}
    assert found == PLAIN | changed
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in (PLAIN | changed).items()
    }


# --- which worker ---------------------------------------------------------------------------------


def test_the_worker_with_the_most_free_cores_gets_the_next_container() -> None:
    bench = Bench()
    peers = [bench.worker(cpu=cpu, number=number) for number, cpu in enumerate((2, 4, 4), 1)]
    client = bench.client(f={})
    bench.open(client, count=10)
    order = [
        peers.index(send.peer_id) + 1  # type: ignore[union-attr]
        for send in bench.orders
        if isinstance(getattr(send, "message", None), m.StartContainer)
    ]
    assert order == [2, 3, 2, 3, 1, 2, 3, 1, 2, 3], "of equals the one that came first"


def test_a_container_goes_where_it_fits() -> None:
    bench = Bench()
    bench.worker(cpu=8, number=1)
    large = bench.connect("worker")
    bench.frame(large, m.WorkerReady(b"\2" * 16, "large", 1.0, 4000, True, [], []))
    bench.take(m.WorkerAccepted)
    client = bench.client(f={"memory": 1001})
    bench.open(client, count=2)
    assert len(bench.take_all(m.StartContainer, large)) == 1
    assert bench.take_all(m.StartContainer) == []
    assert waits_for(bench) == "a free core"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cpu": 3.5}, "f asks for cpu=3.5 and memory=0 MiB"),
        ({"memory": 1001}, "f asks for cpu=1 and memory=1001 MiB"),
    ],
)
def test_what_this_machine_cannot_give_is_said_with_what_it_has(
    options: dict[str, Any], words: str
) -> None:
    bench = Bench()
    bench.worker(cpu=2, number=1)
    bench.worker(cpu=3, number=2)
    client = bench.client(f=options)
    bench.open(client, count=1)
    code, text = text_of(bench.take(m.CallFailed))
    assert code == "unplaceable"
    assert text == (
        f"{words}; this machine gives 3 cores and 1000 MiB. Ask for less, or connect to a "
        "scheduler with a larger worker (FANOUT_URL)"
    )


def test_what_fits_exactly_is_run() -> None:
    bench = Bench()
    bench.worker(cpu=2)
    client = bench.client(f={"cpu": 2.0000000001, "memory": 1000})
    bench.open(client, count=1)
    bench.take(m.Lease)


def test_a_wait_that_only_a_person_can_end_is_told_once() -> None:
    bench = Bench()
    client = bench.client(f={}, g={"cpu": 9})
    bench.open(client, count=1)
    assert waits_for(bench) == "a worker: none is connected"
    bench.later(NOTICE_S - 0.1)
    assert bench.take_all(m.Notice) == []
    bench.later(0.2)
    notice = bench.take(m.Notice, client)
    assert (notice.code, notice.text) == ("waiting", "f waits for a worker: none is connected")
    worker = bench.worker(cpu=2, is_embedded=False)
    bench.open(client, "g", call=2, count=1)
    bench.later(NOTICE_S + 0.1)
    notice = bench.take(m.Notice, client)
    assert notice.text == "g waits for a worker that has as much cpu and memory as it asks for"
    for _ in range(4):
        bench.later(NOTICE_S)
        bench.frame(worker, m.Heartbeat(1))
    assert bench.take_all(m.Notice) == []


def test_a_wait_that_ended_meanwhile_begins_anew() -> None:
    bench = Bench()
    client = bench.client(f={})
    bench.open(client, count=1)
    bench.later(NOTICE_S - 1)
    worker = bench.worker(cpu=1)
    bench.take(m.Lease)
    bench.lose(worker)
    bench.later(NOTICE_S - 1)
    assert bench.take_all(m.Notice) == []
    bench.later(1.1)
    bench.take(m.Notice, client)


# --- room on a worker -----------------------------------------------------------------------------


def idle_containers(names: str, cpu: float = 4) -> tuple[Bench, int, int, dict[str, int]]:
    """One idle container of each of these functions, of 300 MiB, in the order of their idleness."""
    bench = Bench()
    worker = bench.worker(cpu=cpu)
    client = bench.client(**{name: {"memory": 300} for name in [*names, "x"]})
    found = {}
    leases = []
    for number, name in enumerate(reversed(names), 1):
        bench.open(client, name, call=number, count=1)
        leases.append(bench.started_lease(worker))
        found[name] = leases[-1].container_id
    for lease in reversed(leases):
        bench.finish(worker, lease)
        bench.later(0.1)
    bench.forget(m.Outputs, m.OutputsAck)
    return bench, worker, client, found


def test_the_container_that_was_idle_for_longest_makes_room() -> None:
    bench, worker, client, found = idle_containers("fgh")
    bench.open(client, "x", call=9, count=1)
    stop = bench.take(m.StopContainer, worker)
    assert (stop.container_id, stop.kill) == (found["f"], False)
    assert waits_for(bench, 9) == "free memory"
    bench.frame(worker, exited(found["f"]))
    assert bench.take(m.StartContainer, worker).function_id == b"x" * 16


def test_a_container_that_no_input_needs_drives_out_none_that_is_kept() -> None:
    bench, worker, client, found = idle_containers("fgh")
    for name in "fg":
        bench.frame(client, m.AskFunction(1, name.encode() * 16, {"min_containers": 1}))
    bench.frame(client, m.AskFunction(1, b"x" * 16, {"min_containers": 1}))
    assert bench.take(m.StopContainer, worker).container_id == found["h"]


def test_a_worker_has_a_largest_number_of_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "CONTAINERS_MAX", 2)
    bench = Bench()
    worker = bench.worker(cpu=9)
    client = bench.client(f={}, g={})
    bench.open(client, count=3)
    leases = bench.start_all(worker)
    assert len(leases) == 2
    assert waits_for(bench) == "a worker with room for another container"
    bench.finish(worker, leases[0], input_s=1.0)
    bench.finish(worker, bench.take(m.Lease), input_s=1.0)
    bench.open(client, "g", call=2, count=1)
    assert bench.take(m.StopContainer).container_id == leases[0].container_id


# --- leases ---------------------------------------------------------------------------------------


def test_a_queue_is_spread_over_all_containers() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, count=42)
    for lease in bench.start_all(worker):
        bench.finish(worker, lease, input_s=0.0001)
    leases = bench.take_all(m.Lease)
    # Each is a quarter of what is left: two containers with two leases each.
    assert sizes(leases) == [(2, 10), (12, 8), (20, 6), (26, 4)]


def test_a_lease_is_as_many_inputs_as_take_its_time() -> None:
    for input_s, count in ((0.01, 3), (0.0151, 1), (0.001, 30), (0.06, 1)):
        bench = Bench()
        worker = bench.worker(cpu=1)
        client = bench.client(f={})
        bench.open(client, count=500)
        bench.finish(worker, bench.started_lease(worker), input_s=input_s)
        leases = bench.take_all(m.Lease)
        assert sizes(leases)[0] == (1, count)
        assert len(leases) == (2 if input_s <= placement.QUICK_S else 1)


def test_slow_inputs_have_nothing_waiting_behind_them() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={"is_generator": True}, h={"single_use": True})
    for number, name in enumerate("gh", 1):
        bench.open(client, name, call=number, count=9)
        lease = bench.started_lease(worker)
        bench.finish(worker, lease, status=m.Status.DONE if name == "g" else 0, input_s=1e-5)
        assert [count for _, count in sizes(bench.take_all(m.Lease))] == [1]
        bench.frame(client, m.CancelCall(bytes([number]) * 16))
        bench.frame(worker, exited(lease.container_id, "crash"))
        bench.frame(client, m.CloseApp(b"?" * 16))
        bench.forget(m.StopContainer, m.CancelLease)
        for container in list(bench.core.state.containers):
            bench.frame(worker, exited(container))
        bench.forget(m.StartContainer)


def test_nothing_waits_behind_a_lease_that_is_cancelled_stuck_or_of_a_suspect() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_containers": 1})
    bench.open(client, call=1, count=1)
    bench.finish(worker, bench.started_lease(worker), input_s=1e-5)
    bench.open(client, call=2, count=1)
    lease = bench.take(m.Lease)
    bench.frame(client, m.CancelCall(lease.call_id))
    bench.open(client, call=3, count=1)
    assert bench.take_all(m.Lease) == [], "who knows how long it takes to stop"
    bench.finish(worker, lease, status=m.Status.FAILURE)
    lease = bench.take(m.Lease)
    bench.later(1.1 * placement.STUCK_S)
    bench.open(client, call=4, count=1)
    assert bench.take_all(m.Lease) == [], "it is not as quick as it was"
    bench.finish(worker, lease, input_s=1e-5)
    assert bench.take(m.Lease).call_id == bytes([4]) * 16


def test_a_function_that_waits_for_a_core_gets_it_before_a_second_lease_is_given() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.open(client, call=1, count=1)
    bench.finish(worker, bench.started_lease(worker), input_s=1e-5)
    bench.open(client, "g", call=2, count=1)
    other = bench.started_lease(worker)
    bench.open(client, call=3, count=50)
    assert bench.take_all(m.Lease) == []
    bench.open(client, "g", call=4, count=1)
    bench.finish(worker, other, input_s=1e-5)
    leases = bench.take_all(m.Lease)
    assert [lease.call_id[0] for lease in leases] == [3], "no second one while g waits"


def test_deeper_calls_go_first_and_equal_ones_by_their_service() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={}, h={})
    bench.open(client, "f", call=1, count=1)
    outer = bench.started_lease(worker)
    bench.open(client, "g", call=2, count=1)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "h", call=3, count=1, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    assert bench.started_lease(worker).call_id == bytes([3]) * 16


# --- tails ----------------------------------------------------------------------------------------


def with_tail(input_s: float) -> tuple[Bench, int, list[m.Lease]]:
    """One container has the last three inputs of a call, and another core has become free."""
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={}, g={})
    bench.open(client, "g", call=9, count=1)
    blocker = bench.started_lease(worker)
    bench.open(client, call=1, count=1)
    bench.finish(worker, bench.started_lease(worker), input_s=input_s)
    bench.open(client, call=2, count=3)
    leases = bench.take_all(m.Lease)
    assert sizes(leases) == [(0, 2), (2, 1)]
    assert bench.take_all(m.Reclaim) == [], "nobody is idle"
    bench.finish(worker, blocker, input_s=1.0)
    bench.later(1.01 * placement.RECLAIM_INTERVAL_S)
    return bench, worker, leases


def reclaims(bench: Bench) -> list[tuple[int, int]]:
    return [(reclaim.lease_id, reclaim.keep) for reclaim in bench.take_all(m.Reclaim)]


def test_half_of_a_lease_goes_to_who_is_idle() -> None:
    bench, worker, leases = with_tail(0.01)
    assert reclaims(bench) == [(leases[0].lease_id, 1)]
    bench.frame(worker, m.Reclaimed(leases[0].lease_id, 1))
    assert sizes([bench.started_lease(worker)]) == [(1, 1)]


def test_a_tail_that_would_be_run_at_once_is_left_where_it_is_until_it_is_stuck() -> None:
    bench, _, leases = with_tail(0.004)
    bench.later(0.9 * placement.STUCK_S)
    assert reclaims(bench) == []
    bench.later(0.6 * placement.STUCK_S)
    assert reclaims(bench) == [(lease.lease_id, 0) for lease in leases], "whatever has not begun"
    bench.later(1)
    assert reclaims(bench) == [], "it is asked for once"


def test_a_reclaim_that_freed_nothing_is_repeated_after_a_while() -> None:
    bench, worker, leases = with_tail(0.01)
    first, second = (lease.lease_id for lease in leases)
    assert reclaims(bench) == [(first, 1)]
    bench.frame(worker, m.Reclaimed(first, 2), m.Reclaimed(12345, 0))
    assert bench.core.state.counts == {"reclaim of an unknown lease": 1}
    bench.later(0.01)
    assert reclaims(bench) == [(second, 0)], "meanwhile the other one is tried"
    bench.frame(worker, m.Reclaimed(second, 3))
    bench.later(0.03)
    assert reclaims(bench) == []
    bench.later(0.08)
    assert reclaims(bench) == [(first, 0), (second, 0)]


@pytest.mark.parametrize("why", ["it is cancelled", "its container waits"])
def test_nothing_is_taken_back_of_a_lease_when(why: str) -> None:
    bench, worker, leases = with_tail(0.004)
    if why == "it is cancelled":
        bench.frame(2, m.CancelCall(leases[0].call_id))
    else:
        nested = bench.connect("nested", worker=worker, container_id=leases[0].container_id)
        bench.frame(nested, m.SessionWaits(0))
        # What has not begun is asked for at once, and not again.
        assert reclaims(bench) == [(lease.lease_id, 0) for lease in leases]
    bench.later(1)
    assert reclaims(bench) == []


def test_what_was_taken_back_runs_elsewhere_in_its_order() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, call=1, count=1)
    bench.finish(worker, bench.started_lease(worker), input_s=0.001)
    call_id = bench.open(client, call=2, count=30)
    first = bench.take_all(m.Lease)[0]
    assert sizes([first]) == [(0, 15)]
    lease = bench.core.state.leases[first.lease_id]
    bench.frame(worker, m.Reclaimed(first.lease_id, 5))
    assert (lease.stop, lease.end, list(lease.open)) == (5, 15, [(0, 5)])
    call = bench.core.state.calls[call_id]
    assert next(iter(call.queued))[0] == 5 or call.leased_count > 5
    bench.finish(worker, first, count=5)
    bench.frame(client, ack(call_id, 0, 5, 5), inputs(call_id, 30, 1))
    assert first.lease_id not in bench.core.state.leases


STANDS_FIRST = ["one input", "more in its queue", "cancelled", "generator", "concurrent", "waits"]


@pytest.mark.parametrize("what", STANDS_FIRST)
def test_a_lease_of_which_nothing_can_be_taken_is_passed_over(what: str) -> None:
    options: dict[str, Any] = {"max_containers": 1}
    if what in ("generator", "concurrent"):
        options |= {"is_generator": True} if what == "generator" else {"max_inputs": 2}
    bench = Bench()
    worker = bench.worker(cpu=3)
    client = bench.client(e=options, f={}, g={})
    bench.open(client, "e", call=7, count=1 if what in ("one input", "generator") else 2)
    first = bench.started_lease(worker)
    if what in ("cancelled", "waits"):
        bench.finish(worker, first, input_s=0.001)
        bench.open(client, "e", call=6, count=4)
        first = bench.take_all(m.Lease)[0]
    bench.open(client, "g", call=9, count=1)
    blocker = bench.started_lease(worker)
    bench.open(client, call=1, count=1)
    bench.finish(worker, bench.started_lease(worker), input_s=0.01)
    bench.open(client, call=2, count=3)
    leases = bench.take_all(m.Lease)
    assert sizes(leases) == [(0, 2), (2, 1)]
    if what == "cancelled":
        bench.frame(client, m.CancelCall(first.call_id))
    elif what == "waits":
        nested = bench.connect("nested", worker=worker, container_id=first.container_id)
        bench.frame(nested, m.SessionWaits(0))
    bench.finish(worker, blocker, input_s=1.0)
    bench.later(0.01)
    assert (leases[0].lease_id, 1) in reclaims(bench)


# --- which container ------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "chosen"), [({"max_inputs": 4}, 1), ({"batch": [4, 100]}, 0)])
def test_an_input_goes_to_the_emptiest_container_and_to_the_fullest_batch(
    options: dict[str, Any], chosen: int
) -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f=options)
    bench.open(client, call=1, count=8)
    leases = bench.start_all(worker)
    bench.open(client, call=2, count=0, is_sealed=False)
    containers = list(bench.core.state.containers.values())
    for container, left in zip(containers, (3, 1), strict=True):
        for lease in leases:
            if lease.container_id == container.container_id:
                count = min(len(lease.lengths) // 4, container.open_count - left)
                bench.finish(worker, lease, count=count)
    assert [container.open_count for container in containers] == [3, 1]
    bench.frame(client, inputs(bytes([2]) * 16, 0, 1))
    assert bench.take(m.Lease).container_id == containers[chosen].container_id


def test_a_warm_container_without_a_core_waits_for_that_and_for_nothing_else() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_containers": 1}, g={})
    bench.open(client, call=1, count=1)
    bench.finish(worker, bench.started_lease(worker))
    bench.open(client, "g", call=2, count=1)
    other = bench.started_lease(worker)
    bench.open(client, call=3, count=1)
    assert waits_for(bench, 3) == "a free core"
    bench.finish(worker, other)
    assert bench.take(m.Lease).call_id == bytes([3]) * 16
    assert waits_for(bench, 3) == ""


def test_an_input_drives_out_what_is_kept_for_no_input() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"memory": 600}, g={"memory": 600, "min_containers": 1})
    kept = bench.take(m.StartContainer).container_id
    bench.start(worker, kept)
    bench.open(client, call=1, count=1)
    assert bench.take(m.StopContainer).container_id == kept


def test_part_of_a_chunk_has_its_own_blobs() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    names = [bytes([letter]) * 32 for letter in b"ABC"]
    for name in names:
        bench.blob(name)
    call_id = bench.open(client, is_sealed=False)
    lengths = b"\1\0\0\0" * 4
    blobs = [(0, [names[0]]), (1, [names[1]]), (3, [names[2]])]
    bench.frame(client, m.Inputs(call_id, 0, lengths, blobs, b"wxyz"))
    lease = bench.started_lease(worker)
    assert (lease.blobs, bytes(lease.payload)) == ([(0, [names[0]])], b"w")
    bench.finish(worker, lease, input_s=0.01)
    told = [(o.start, o.blobs, bytes(o.payload)) for o in bench.take_all(m.Lease)]
    assert told == [(1, [(0, [names[1]])], b"xy"), (3, [(0, [names[2]])], b"z")]


@pytest.mark.parametrize(("count", "is_told"), [(32, False), (33, True)])
def test_a_window_that_would_grow_by_less_than_a_quarter_stays(count: int, is_told: bool) -> None:
    bench = Bench()
    bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": count})
    bench.open(client, count=count)
    assert bench.core.state.calls[bytes([1]) * 16].leased_count == count
    assert bool(bench.take_all(m.Window)) is is_told


def test_a_container_is_filled_up_to_its_target_before_another_one_is_started() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"max_inputs": 4, "target_inputs": 2})
    bench.open(client, call=1, count=1)
    first = bench.started_lease(worker)
    bench.open(client, call=2, count=1)
    assert bench.take(m.Lease).container_id == first.container_id
    bench.open(client, call=3, count=1)
    assert bench.take(m.StartContainer).container_id == bench.take(m.Lease).container_id


def test_inputs_beside_a_suspect_of_their_call_may_have_company() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 4})
    older = bench.open(client, call=2, count=0, is_sealed=False)
    bench.open(client, call=1, count=4)
    lease = bench.started_lease(worker)
    indexes = [(lease.lease_id, index) for index in (2, 3)]
    with bench.one_turn():
        crash = m.ContainerExited(lease.container_id, "crash", indexes, {}, b"")
        bench.frame(worker, crash)
        bench.frame(client, inputs(older, 0, 1))
    leases = bench.take_all(m.Lease)
    told = [(lease.call_id[0], lease.start, len(lease.lengths) // 4) for lease in leases]
    assert told == [(2, 0, 1), (1, 0, 2)]
    assert len({lease.container_id for lease in leases}) == 1


@pytest.mark.parametrize(("input_s", "is_started"), [(0.003, True), (0.002, False)])
def test_a_container_is_started_for_what_all_waiting_calls_take(
    input_s: float, is_started: bool
) -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, call=1, count=1)
    bench.finish(worker, bench.started_lease(worker), input_s=input_s)
    bench.open(client, call=2, count=1)
    bench.take(m.Lease)
    with bench.one_turn():
        bench.open(client, call=3, count=1)
        bench.open(client, call=4, count=1)
    assert bool(bench.take_all(m.StartContainer)) is is_started
