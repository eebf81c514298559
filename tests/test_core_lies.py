"""What a peer says that cannot be so is not believed: it harms nobody else, and nothing stays."""

from __future__ import annotations

from fanout.protocol import messages as m
from tests.core_kit import Bench, ack

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
