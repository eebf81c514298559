"""What is filed of free cores and of leases, compared with a search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fanout.protocol import messages as m
from fanout_scheduler.core.capacity import FreeCores
from fanout_scheduler.core.events import PeerId
from fanout_scheduler.core.state import Worker
from tests.core_kit import Bench


def worker_of(number: int, cpu: float) -> Worker:
    return Worker(
        worker_id=number.to_bytes(16, "big"),
        peer_id=PeerId(number),
        number=number,
        name=f"w{number}",
        cpu=cpu,
        cpu_free=cpu,
        memory_mib=1000,
        memory_free_mib=1000,
        is_embedded=False,
        heard_at=0.0,
    )


#: (what, which worker, how many cores); 0 comes, 1 takes cores, 2 gives cores back, 3 goes.
changes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0])),
    max_size=40,
)


@given(changes, st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.sets(st.integers(0, 4)))
def test_the_worker_with_the_most_free_cores_is_found(
    steps: list[tuple[int, int, float]], wanted: float, unfit: set[int]
) -> None:
    cores = FreeCores()
    workers: dict[int, Worker] = {}
    number = 0
    for what, at, cpu in steps:
        if what == 0 and at not in workers:
            number += 1
            workers[at] = worker_of(number, cpu)
            cores.grew(workers[at])
        elif what == 1 and at in workers:
            workers[at].cpu_free -= cpu
        elif what == 2 and at in workers:
            workers[at].cpu_free += cpu
            cores.grew(workers[at])
        elif what == 3 and at in workers:
            cores.lost(workers.pop(at))
        most = max((worker.cpu_free for worker in workers.values()), default=-1.0)
        assert cores.has(wanted) == (most >= wanted)
    bad = {workers[at].number for at in unfit if at in workers}
    fit = [w for w in workers.values() if w.cpu_free >= wanted and w.number not in bad]
    expected = min(fit, key=lambda w: (-w.cpu_free, w.number), default=None)
    assert cores.find(wanted, lambda worker: worker.number not in bad) is expected
    # Those that were looked at and were not fit are found the next time.
    having = [w for w in workers.values() if w.cpu_free >= wanted]
    best = min(having, key=lambda w: (-w.cpu_free, w.number), default=None)
    assert cores.find(wanted, lambda worker: True) is best


def test_free_cores_hold_few_entries_however_often_cores_come_back() -> None:
    cores = FreeCores()
    worker = worker_of(1, 1.0)
    cores.grew(worker)
    for _ in range(10_000):
        worker.cpu_free -= 1.0
        assert not cores.has(1.0)
        worker.cpu_free += 1.0
        cores.grew(worker)
    assert len(cores._heap) < 100


def test_of_the_entries_of_a_worker_one_counts() -> None:
    """Also when it has so many cores free as an old entry says, which another has replaced."""
    cores = FreeCores()
    worker = worker_of(1, 1.0)
    cores.grew(worker)
    for _ in range(5):
        worker.cpu_free = 0.0
        assert not cores.has(1.0)
        worker.cpu_free = 1.0
        cores.grew(worker)
    worker.cpu_free = 0.0
    looked_at: list[Worker] = []

    def is_fit(worker: Worker) -> bool:
        looked_at.append(worker)
        return False

    assert cores.find(0.0, is_fit) is None
    assert looked_at == [worker]


def test_a_lease_whose_last_input_runs_has_nothing_to_take_back() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=100)
    bench.finish(worker, bench.started_lease(worker), input_s=0.01)
    lease = bench.take_all(m.Lease)[0]
    count = len(lease.lengths) // 4
    assert count > 1
    function = bench.core.state.functions[b"f" * 16]
    assert lease.lease_id in function.tails
    bench.finish(worker, lease, count=count - 1)
    assert lease.lease_id not in function.tails
