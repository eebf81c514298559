"""What a peer says that cannot be so is not believed: it harms nobody else, and nothing stays."""

from __future__ import annotations

from typing import Any

import pytest

from fanout.protocol import messages as m
from fanout_scheduler.core import workers
from fanout_scheduler.core.events import Disconnect
from tests.core_kit import Bench, ack, exited, table

# --- clients --------------------------------------------------------------------------------------


def test_an_acknowledgement_leaves_the_outputs_of_a_spawned_call_to_whoever_fetches_them() -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_durable=True)
    bench.store()
    for lease in bench.start_all(worker):
        bench.finish(worker, lease)
    bench.store()
    bench.frame(client, ack(call_id, 0, 2, 2))
    bench.orders.clear()
    bench.frame(client, m.FetchOutputs(1, call_id, 0, 2))
    assert sum(len(o.statuses) for o in bench.take_all(m.Outputs, client)) == 2


def test_a_client_in_a_container_that_is_gone_can_leave_nothing_behind() -> None:
    bench = Bench()
    client = bench.client(f={})
    worker = bench.worker()
    bench.open(client, count=1)
    container_id = bench.started_lease(worker).container_id
    nested = bench.connect("nested", worker=worker, container_id=container_id)
    bench.orders.clear()
    bench.frame(worker, exited(container_id))
    (refused,) = bench.take_commands(Disconnect)
    assert (refused.peer_id, refused.code) == (nested, "refused")
    known = set(bench.core.state.calls)
    bench.frame(nested, m.OpenCall(b"n" * 16, b"f" * 16, False, True, None))
    bench.frame(nested, m.OpenObject(1, b"o" * 16, 1, "", 3))
    assert set(bench.core.state.calls) == known
    assert not bench.core.state.objects.by_id
    bench.lose(nested)
    bench.lose(worker)


@pytest.mark.parametrize(
    ("options", "is_taken"),
    [
        ({"max_inputs": 2, "target_inputs": 3}, False),
        ({"target_inputs": 2}, False),
        ({"max_inputs": 0, "target_inputs": 2}, False),
        ({"max_inputs": 3, "target_inputs": 3}, True),
        ({"max_inputs": None, "target_inputs": None}, True),
        ({"min_containers": 3, "max_containers": 2}, False),
        ({"min_containers": 3, "max_containers": 3}, True),
        ({"min_containers": 3, "max_containers": None}, True),
        ({"retries": [3, 1e9, 1.0, 60.0]}, False),
        ({"retries": [3, 1.0, 1.0, 1e9]}, False),
        ({"retries": [3, 60.0, 10.0, 60.0]}, True),
    ],
)
def test_options_of_a_function_must_fit_together(options: dict[str, Any], is_taken: bool) -> None:
    bench = Bench()
    bench.worker(cpu=1)
    client = bench.client(f=options)
    assert bool(bench.core.state.functions) is is_taken
    refused = [(order.peer_id, order.code) for order in bench.take_commands(Disconnect)]
    assert refused == ([] if is_taken else [(client, "protocol")])


# --- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "possible_s"), [({}, 2.0), ({"max_inputs": 4}, 8.0)])
def test_nobody_is_charged_for_more_time_than_there_was(
    options: dict[str, int], possible_s: float
) -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f=options)
    call = bench.core.state.calls[bench.open(client, count=2)]
    lease = bench.started_lease(worker)
    bench.later(2)
    for index in range(len(lease.lengths) // 4):
        message = m.LeaseOutputs(
            index + 1, lease.lease_id, lease.call_id, index, 1 << 39, b"\1\0\0\0", b"\0", [], b"v"
        )
        bench.frame(worker, message)
    assert call.service_s == pytest.approx(possible_s)
    container = bench.core.state.containers[lease.container_id]
    assert container.busy_s == pytest.approx(possible_s)
    assert (call.method.input_s or 0.0) <= possible_s


def test_a_generator_gives_no_more_than_its_consumer_has_asked_for() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"is_generator": True})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)

    def given(start: int, count: int) -> int:
        lengths, payload = table([b"i"] * count)
        bench.frame(
            worker, m.LeaseItems(1, lease.lease_id, call_id, 0, start, lengths, [], payload)
        )
        return sum(len(items.lengths) // 4 for items in bench.take_all(m.Items, client))

    assert given(0, lease.credit + 1) == 0
    assert bench.core.state.counts == {"items beyond the credit": 1}
    assert given(0, lease.credit) == lease.credit
    assert given(lease.credit, 1) == 0
    bench.frame(client, m.ItemCredit(call_id, 0, lease.credit + 2, lease.credit))
    assert given(lease.credit, 2) == 2
    # What was said before the credit was used up may be said again.
    assert given(0, lease.credit) == 0
    assert bench.core.state.counts == {"items beyond the credit": 2, "duplicate items": 1}


@pytest.mark.parametrize("cpu", [-3.0, 1e9])
def test_a_worker_that_cannot_be_is_sent_away(cpu: float) -> None:
    bench = Bench()
    peer = bench.connect("worker")
    bench.frame(peer, m.WorkerReady(b"w" * 16, "w", cpu, 1000, False, [], []))
    (refused,) = bench.take_commands(Disconnect)
    assert (refused.peer_id, refused.code) == (peer, "protocol")
    assert not bench.core.state.workers


def kept(bench: Bench, number: int, containers: list[int]) -> list[int]:
    """A worker (of 1000 MiB) comes with these containers of f. Returns which it may keep."""
    records = [[container_id, b"f" * 16] for container_id in containers]
    peer = bench.connect("worker")
    worker_id = bytes([number]) * 16
    bench.frame(peer, m.WorkerReady(worker_id, "w", 2.0, 1000, False, records, []))
    return bench.take(m.WorkerAccepted).keep


@pytest.mark.parametrize(("memory", "count"), [(300, 3), (0, 256)])
def test_no_more_containers_are_adopted_than_a_worker_has_room_for(memory: int, count: int) -> None:
    bench = Bench(epoch=2)
    bench.client(f={"memory": memory})
    old = [1 << m.EPOCH_SHIFT | n for n in range(1000)]
    assert len(kept(bench, 1, old)) == count
    (worker,) = bench.core.state.workers.values()
    assert worker.memory_free_mib == 1000 - memory * count


def test_a_worker_may_keep_its_own_containers_and_no_other() -> None:
    bench = Bench()
    first = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1)
    container_id = bench.started_lease(first).container_id
    this_life = range(1 << m.EPOCH_SHIFT, container_id + 50)
    never_given = [n for n in this_life if n != container_id]
    bench.lose(first)
    assert kept(bench, 2, [container_id]) == []
    assert kept(bench, 1, [-1, *never_given, container_id]) == [container_id]


def test_the_containers_of_so_many_lost_workers_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "LOST_WORKERS_MAX", 1)
    bench = Bench()
    client = bench.client(f={})
    ids = []
    for number in (1, 2):
        worker = bench.worker(cpu=1, number=number)
        bench.open(client, call=number, count=1)
        ids.append(bench.started_lease(worker).container_id)
        bench.frame(client, m.CancelCall(bytes([number]) * 16))
        bench.lose(worker)
    assert kept(bench, 1, ids) == []
    assert kept(bench, 2, ids) == [ids[1]]
