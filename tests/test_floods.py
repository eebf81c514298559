"""Who prints without end, and who does not read: the work of everybody else goes on."""

from __future__ import annotations

from fanout.protocol import messages as m
from fanout_scheduler.core.events import PeerId, PeerWritable
from tests.core_kit import Bench

# --- text that a client does not take -------------------------------------------------------------


def printing(bench: Bench) -> tuple[int, int, m.ContainerLog]:
    """A worker, a client, and what a container of the client's call prints."""
    worker, client = bench.worker(), bench.client(f={})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.orders.clear()
    text = m.ContainerLog(lease.container_id, call_id, 0, m.Source.STDOUT, b"hello\n")
    return worker, client, text


def test_text_that_a_slow_client_loses_is_counted_and_told() -> None:
    bench = Bench()
    worker, client, text = printing(bench)
    bench.tell(PeerWritable(PeerId(client), False))
    bench.frame(worker, text, text)
    bench.nothing_left()
    bench.tell(PeerWritable(PeerId(client), True))
    notice = bench.take(m.Log, client)
    assert (notice.call_id, notice.source) == (text.call_id, m.Source.SYSTEM)
    assert b" 12 bytes of output were dropped " in bytes(notice.payload)
    bench.frame(worker, text)
    assert bench.take(m.Log, client).payload == b"hello\n"
    bench.tell(PeerWritable(PeerId(client), False), PeerWritable(PeerId(client), True))
    bench.nothing_left()


def test_text_that_came_while_a_client_was_away_is_counted_and_told() -> None:
    bench = Bench()
    worker, client, text = printing(bench)
    session = bench.core.state.peers[PeerId(client)].session_id
    bench.lose(client)
    bench.frame(worker, text)
    again = bench.connect(session=session)
    assert b" 6 bytes of output were dropped " in bytes(bench.take(m.Log, again).payload)
