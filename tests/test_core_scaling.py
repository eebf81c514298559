"""The scheduler's core where containers run several inputs at a time, serve several methods, or
live without an input that asks for them."""

from __future__ import annotations

from typing import Any

import pytest

from fanout.config import SCALEDOWN_WINDOW_S
from fanout.protocol import messages as m
from tests.core_kit import Bench, inputs


def sizes_of(leases: list[m.Lease]) -> list[int]:
    return [len(lease.lengths) // 4 for lease in leases]


def crash(lease: m.Lease, *indexes: int) -> m.ContainerExited:
    running = [(lease.lease_id, index) for index in indexes]
    return m.ContainerExited(lease.container_id, "crash", running, {"text": "died"}, b"")


def info_of(bench: Bench, client: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    bench.frame(client, m.AskFunction(7, b"f" * 16, changes or {}))
    return bench.take(m.FunctionInfo).info


# --- several inputs at a time ---------------------------------------------------------------------


def test_a_concurrent_container_gets_as_many_inputs_as_it_may_run() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 5})
    bench.open(client, count=8)
    first = bench.started_lease(worker)
    assert sizes_of([first]) == [5], "all begin at once, so nothing of it can be taken back"
    bench.finish(worker, first, count=2)
    assert sizes_of([bench.take(m.Lease)]) == [2]
    bench.finish(worker, first, count=1, skip=2)
    assert sizes_of([bench.take(m.Lease)]) == [1]


def test_outputs_of_a_concurrent_lease_come_in_any_order() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 4})
    bench.open(client, count=4)
    lease = bench.started_lease(worker)
    for index in (2, 0, 3, 1):
        bench.finish(worker, lease, count=1, skip=index)
    assert [outputs.start for outputs in bench.take_all(m.Outputs)] == [2, 0, 3, 1]
    assert not bench.core.state.leases


def test_inputs_of_different_calls_share_a_concurrent_container() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 3})
    bench.open(client, call=1, count=1)
    first = bench.started_lease(worker)
    bench.open(client, call=2, count=1)
    second = bench.take(m.Lease)
    assert second.container_id == first.container_id


def test_another_container_is_started_at_the_target_and_the_rest_goes_beyond_it() -> None:
    bench = Bench()
    bench.worker(cpu=2)
    client = bench.client(f={"max_inputs": 10, "target_inputs": 2})
    bench.open(client, count=30)
    starts = bench.take_all(m.StartContainer)
    assert len(starts) == 2, "as many containers as cores"
    leases = bench.take_all(m.Lease)
    counts = [0, 0]
    for lease in leases:
        counts[lease.container_id == starts[1].container_id] += len(lease.lengths) // 4
    assert counts == [10, 10], "where no other can be started they take all they can"


def test_a_concurrent_container_whose_inputs_wait_may_get_another_one() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 2}, g={})
    bench.open(client, call=1, count=1)
    outer = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    bench.open(nested, "g", call=2, count=1, parent=(outer.lease_id, 0))
    bench.frame(nested, m.SessionWaits(0))
    inner = bench.started_lease(worker)
    bench.open(client, call=3, count=1)
    assert bench.take_all(m.Lease) == [], "the one core runs g"
    bench.finish(worker, inner)
    assert bench.take(m.Lease).container_id == outer.container_id
    assert bench.take(m.Outputs, nested).call_id == bytes([2]) * 16


def test_a_batched_function_fills_one_container_before_the_next() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"batch": [4, 100]})
    bench.open(client, call=1, count=6)
    leases = bench.take_all(m.Lease)
    assert sizes_of(leases) == [4, 2]
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    bench.open(client, call=2, count=1)
    assert bench.take(m.Lease).container_id == leases[1].container_id


# --- who is to blame ------------------------------------------------------------------------------


def test_of_several_inputs_that_ran_in_a_crash_the_one_that_dies_alone_is_charged() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 3})
    bench.open(client, count=3)
    lease = bench.started_lease(worker)
    bench.frame(worker, crash(lease, 0, 1, 2))
    deaths = 0
    failures: list[m.Outputs] = []
    while not failures:
        for start in bench.take_all(m.StartContainer):
            bench.start(worker, start.container_id)
        (lease,) = bench.take_all(m.Lease)
        assert sizes_of([lease]) == [1], "each suspect runs alone"
        if lease.start == 1:
            deaths += 1
            bench.frame(worker, crash(lease, 1))
        else:
            bench.finish(worker, lease)
        failures = [o for o in bench.take_all(m.Outputs) if any(o.statuses)]
    assert (deaths, [failure.start for failure in failures]) == (3, [1])


def test_a_suspect_gets_no_company() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 3})
    bench.open(client, count=2)
    lease = bench.started_lease(worker)
    bench.frame(worker, crash(lease, 0, 1))
    alone = bench.started_lease(worker)
    bench.open(client, call=2, count=2)
    assert bench.take_all(m.Lease) == []
    bench.finish(worker, alone)
    assert sizes_of(bench.take_all(m.Lease)) == [1], "the other suspect, alone too"


# --- methods --------------------------------------------------------------------------------------

METHODS = {
    "load": {"is_generator": False, "is_async": False},
    "stream": {"is_generator": True, "is_async": False},
}


def test_methods_of_a_class_share_its_containers() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"methods": METHODS})
    bench.open(client, call=1, count=1, method="load")
    first = bench.started_lease(worker)
    assert first.method == "load"
    bench.finish(worker, first)
    bench.open(client, call=2, count=1, method="stream")
    second = bench.take(m.Lease)
    assert (second.method, second.container_id) == ("stream", first.container_id)


def test_a_slow_method_does_not_make_the_leases_of_a_quick_one_small() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    methods = {name: {"is_generator": False, "is_async": False} for name in ("quick", "slow")}
    client = bench.client(f={"methods": methods})
    for call, (name, seconds) in enumerate([("quick", 1e-5), ("slow", 2.0)], 1):
        bench.open(client, call=call, count=1, method=name)
        lease = bench.started_lease(worker) if call == 1 else bench.take(m.Lease)
        bench.finish(worker, lease, input_s=seconds)
    bench.open(client, call=3, count=400, method="quick")
    assert min(sizes_of(bench.take_all(m.Lease))) > 50


def test_an_unknown_method_is_refused() -> None:
    bench = Bench()
    bench.worker()
    client = bench.client(f={"methods": METHODS})
    bench.open(client, call=1, count=1, method="lead")
    assert b"no method 'lead'" in bytes(bench.take(m.CallFailed).payload)


def test_a_method_survives_a_restart_of_the_scheduler() -> None:
    bench = Bench()
    bench.worker()
    client = bench.client(f={"methods": METHODS})
    bench.open(client, call=1, count=1, is_durable=True, method="load")
    records = [record for store in bench.store() for record in store.records]
    again = Bench(epoch=2)
    again.core.restore(records, again.now)
    worker = again.worker()
    assert again.started_lease(worker).method == "load"


# --- single use -----------------------------------------------------------------------------------


def test_each_input_of_a_single_use_function_has_a_container_of_its_own() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"single_use": True})
    bench.open(client, count=3)
    seen = set()
    for _ in range(3):
        lease = bench.started_lease(worker)
        assert sizes_of([lease]) == [1]
        seen.add(lease.container_id)
        bench.finish(worker, lease, input_s=0.0001)
        assert bench.take(m.StopContainer).container_id == lease.container_id
        bench.frame(worker, m.ContainerExited(lease.container_id, "stopped", [], {}, b""))
    assert len(seen) == 3


# --- containers that no input asks for ------------------------------------------------------------


def test_the_minimum_of_containers_is_started_with_the_app_and_kept_when_idle() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"min_containers": 2, "scaledown_window": 5.0})
    starts = bench.take_all(m.StartContainer)
    assert len(starts) == 2, "a container holds no core while it is idle"
    for start in starts:
        bench.start(worker, start.container_id)
    for _ in range(20):
        bench.later(2)
        bench.frame(worker, m.Heartbeat(1))
    assert bench.take_all(m.StopContainer) == []
    bench.frame(client, m.CloseApp(b"a" * 16))
    assert len(bench.take_all(m.StopContainer)) == 2


def test_a_buffer_is_kept_while_something_runs_and_leaves_afterwards() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"buffer_containers": 1, "scaledown_window": 2.0})
    assert bench.take_all(m.StartContainer) == []
    bench.open(client, count=1)
    lease = bench.take(m.Lease)
    starts = bench.take_all(m.StartContainer)
    assert len(starts) == 2
    for start in starts:
        bench.start(worker, start.container_id)
    bench.later(4)
    assert bench.take_all(m.StopContainer) == []
    bench.finish(worker, lease)
    bench.later(4)
    assert len(bench.take_all(m.StopContainer)) == 2


def test_a_minimum_that_cannot_start_is_not_tried_for_ever() -> None:
    bench = Bench()
    worker = bench.worker()
    bench.client(f={"min_containers": 1})
    start = bench.take(m.StartContainer)
    failed = m.ContainerExited(start.container_id, "start", [], {}, b"pickled error")
    bench.frame(worker, failed)
    bench.later(10)
    assert bench.take_all(m.StartContainer) == []


def test_without_a_client_nothing_is_kept() -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(f={"min_containers": 1, "scaledown_window": 1.0})
    start = bench.take(m.StartContainer)
    bench.start(worker, start.container_id)
    bench.lose(client)
    for _ in range(10):
        bench.later(4)
        bench.frame(worker, m.Heartbeat(1))
    assert bench.take(m.StopContainer).container_id == start.container_id


def test_idle_containers_leave_after_the_default_window() -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(f={})
    bench.open(client, count=1)
    bench.finish(worker, bench.started_lease(worker))
    for _ in range(int(SCALEDOWN_WINDOW_S / 5) - 1):
        bench.later(5)
        bench.frame(worker, m.Heartbeat(1))
    assert bench.take_all(m.StopContainer) == []
    bench.later(6)
    assert len(bench.take_all(m.StopContainer)) == 1


def test_a_window_of_nothing_ends_a_container_with_its_last_input() -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(f={"scaledown_window": 0.0})
    bench.open(client, count=1)
    bench.finish(worker, bench.started_lease(worker))
    bench.later(0.001)
    assert len(bench.take_all(m.StopContainer)) == 1


# --- settings -------------------------------------------------------------------------------------


def test_settings_can_be_changed_while_the_app_runs() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    assert info_of(bench, client)["min_containers"] == 0
    info = info_of(bench, client, {"min_containers": 2, "scaledown_window": 3})
    assert (info["min_containers"], info["scaledown_window"]) == (2, 3.0)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    info_of(bench, client, {"min_containers": 0})
    bench.later(4)
    assert len(bench.take_all(m.StopContainer)) == 2


def test_a_lower_maximum_lets_busy_containers_end_what_they_have() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={})
    bench.open(client, count=2)
    leases = bench.take_all(m.Lease)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    info_of(bench, client, {"max_containers": 1})
    stop = bench.take(m.StopContainer)
    assert not stop.kill
    stopped = next(lease for lease in leases if lease.container_id == stop.container_id)
    bench.finish(worker, stopped)
    bench.frame(worker, m.ContainerExited(stop.container_id, "stopped", [], {}, b""))
    assert len(bench.take_all(m.Outputs)) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_containers": 3}, "would be above max_containers=2"),
        ({"max_containers": 0}, "max_containers=0"),
        ({"window": 1}, "window=1"),
        ({"min_containers": "many"}, "'many'"),
    ],
)
def test_changes_that_make_no_sense_are_refused_whole(changes: dict[str, Any], words: str) -> None:
    bench = Bench()
    bench.worker()
    client = bench.client(f={"max_containers": 2})
    assert words in info_of(bench, client, {**changes, "buffer_containers": 1})["error"]
    assert info_of(bench, client)["buffer_containers"] == 0


def test_current_numbers_tell_what_waits_and_runs() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 2})
    call_id = bench.open(client, count=0, is_sealed=False)
    bench.frame(client, inputs(call_id, 0, 5))
    bench.started_lease(worker)
    info = info_of(bench, client)
    numbers = [info[name] for name in ("backlog", "containers", "running", "headroom")]
    assert numbers == [3, 1, 2, 0]


def test_changing_settings_again_and_again_leaves_one_deadline() -> None:
    bench = Bench()
    worker = bench.worker(cpu=2)
    client = bench.client(f={"min_containers": 1})
    bench.start(worker, bench.take(m.StartContainer).container_id)
    for _ in range(20):
        info_of(bench, client, {"buffer_containers": 0})
        bench.later(0.2)
    for _ in range(8):
        bench.later(10)
        bench.frame(worker, m.Heartbeat(1))
    kinds = [kind for _, _, kind, _ in bench.core.state.deadlines]
    assert kinds.count("idle") == 1, "those that were moved are not planned again"


def test_a_call_that_fits_into_a_waiting_container_is_no_deadlock() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"max_inputs": 2, "max_containers": 1}, g={})
    bench.open(client, call=1, count=1)
    outer = bench.started_lease(worker)
    bench.open(client, "g", call=2, count=1)
    nested = bench.connect("nested", worker=worker, container_id=outer.container_id)
    with bench.one_turn():
        bench.frame(nested, m.SessionWaits(0))
    busy = bench.started_lease(worker)
    assert busy.call_id == bytes([2]) * 16
    bench.open(nested, call=3, count=1, parent=(outer.lease_id, 0))
    assert bench.take_all(m.CallFailed) == [], "it waits for the core alone"
    bench.finish(worker, busy)
    assert bench.take(m.Lease).call_id == bytes([3]) * 16


def test_a_container_that_leaves_patiently_can_still_be_killed() -> None:
    bench = Bench()
    bench.worker(cpu=2)
    client = bench.client(f={})
    call_id = bench.open(client, count=2)
    bench.forget(m.StartContainer, m.Lease)
    info_of(bench, client, {"max_containers": 1})
    patient = bench.take(m.StopContainer)
    bench.frame(client, m.TerminateCall(call_id))
    killed = {stop.container_id for stop in bench.take_all(m.StopContainer) if stop.kill}
    assert patient.container_id in killed
