"""Who leaves where there is no room: idle containers of others, and no more than have to."""

from __future__ import annotations

from fanout.protocol import messages as m
from tests.core_kit import Bench, exited


def warm_containers(bench: Bench, worker: int, client: int, count: int) -> None:
    """So many idle containers of `a` with 100 MiB each."""
    bench.open(client, "a", call=1, count=count)
    for lease in bench.start_all(worker):
        bench.finish(worker, lease, input_s=1.0)
    bench.orders.clear()


def test_no_more_idle_containers_leave_than_have_to() -> None:
    bench = Bench()
    worker = bench.worker(cpu=8)
    client = bench.client(a={"memory": 100}, l={"memory": 550})
    warm_containers(bench, worker, client, 6)
    bench.open(client, "l", call=2, count=1)
    leaving = bench.take_all(m.StopContainer)
    assert len(leaving) == 2, "400 MiB are free"
    # They are on their way, so nobody else has to go.
    bench.frame(worker, m.Heartbeat(0))
    assert bench.take_all(m.StopContainer) == []
    for order in leaving:
        bench.frame(worker, exited(order.container_id))
    assert bench.take(m.StartContainer)


def test_idle_containers_leave_on_one_worker() -> None:
    """The one where the fewest have to."""
    bench = Bench()
    workers = [bench.worker(cpu=4, number=number) for number in (1, 2)]
    client = bench.client(a={"memory": 200}, l={"memory": 900})
    warm = dict.fromkeys(workers, 0)
    bench.open(client, "a", call=1, count=5)
    for worker in workers:
        for lease in bench.start_all(worker):
            warm[worker] += 1
            bench.finish(worker, lease, input_s=1.0)
    assert sorted(warm.values()) == [2, 3]
    bench.orders.clear()
    bench.open(client, "l", call=2, count=1)
    least = min(workers, key=lambda worker: warm[worker])
    assert len(bench.take_all(m.StopContainer, least)) == 2
    assert bench.take_all(m.StopContainer) == []


def test_where_it_is_not_enough_idle_containers_leave_one_after_the_other() -> None:
    """While they are there, it looks as if somebody got on."""
    bench = Bench()
    worker = bench.worker(cpu=8)
    client = bench.client(a={"memory": 100}, b={"memory": 500}, l={"memory": 900})
    warm_containers(bench, worker, client, 5)
    bench.open(client, "b", call=2, count=1)
    bench.started_lease(worker)
    bench.open(client, "l", call=3, count=1)
    assert len(bench.take_all(m.StopContainer)) == 1
    bench.frame(worker, m.Heartbeat(0))
    assert len(bench.take_all(m.StopContainer)) == 1


def test_a_container_that_is_kept_for_its_settings_leaves_for_an_input_only() -> None:
    bench = Bench()
    worker = bench.worker(cpu=8)
    client = bench.client(a={"memory": 100, "min_containers": 2})
    warm_containers(bench, worker, client, 5)
    bench.define(client, "l", {"memory": 800, "min_containers": 1})
    assert len(bench.take_all(m.StopContainer)) == 3
    bench.define(client, "h", {"memory": 1000, "min_containers": 1})
    assert bench.take_all(m.StopContainer) == []
    bench.open(client, "h", call=3, count=1)
    assert len(bench.take_all(m.StopContainer)) == 2
