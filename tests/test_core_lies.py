"""What a peer says that cannot be so is not believed: it harms nobody else, and nothing stays."""

from __future__ import annotations

import pytest

from fanout.protocol import messages as m
from fanout_scheduler.core.events import Disconnect
from tests.core_kit import Bench, ack, exited

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
