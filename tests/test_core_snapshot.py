"""What `fanout status` is told, exactly."""

from __future__ import annotations

import msgpack
import pytest

from fanout.protocol import messages as m
from fanout_scheduler.core import snapshot
from tests.core_kit import APP, Bench, inputs
from tests.object_kit import ObjectBench


def test_all_that_a_person_may_ask_for_is_there() -> None:
    bench = ObjectBench(epoch=3)
    worker = bench.worker(cpu=2.00049)
    client = bench.client(f={"max_containers": 2, "memory": 10}, g={})
    bench.make(client)
    bench.put_stored(client, b"a", b"b")
    call_id = bench.open(client, count=5, is_sealed=False)
    bench.open(client, "g", call=2, count=1, is_durable=True)
    bench.store()
    leases = bench.take_all(m.Lease)
    bench.start(worker, leases[0].container_id)
    bench.finish(worker, leases[0], input_s=1.0)
    bench.now += 2.5
    bench.tell()
    first, second = (f"ct-{lease.container_id:x}" for lease in leases)
    assert bench.core.snapshot() == {
        "epoch": 3,
        "uptime_s": 2.5,
        "sessions": 1,
        "workers": [
            {
                "name": "w1",
                "cpu": 2.00049,
                "cpu_free": 0.0,
                "memory": 1000,
                "containers": 2,
                "is_connected": True,
                "reserved_for": "",
            }
        ],
        "containers": [
            {"id": first, "function": "f", "worker": "w1", "state": "running", "leases": 1,
             "waits": ""},
            {"id": second, "function": "f", "worker": "w1", "state": "starting", "leases": 1,
             "waits": ""},
        ],
        "functions": [
            {"name": "f", "app": "app", "containers": 2, "max_containers": 2},
            {"name": "g", "app": "app", "containers": 0, "max_containers": None},
        ],
        "objects": [{"name": "q", "type": "queue", "values": 2}],
        "object_bytes": 3 * 512 + 2,
        "calls": [
            {"id": f"fc-{call_id.hex()}", "function": "f", "state": "open", "inputs": 5,
             "queued": 2, "running": 2, "done": 1, "durable": False,
             "waiting_for": "a permit: max_containers are in use"},
            {"id": "fc-" + "02" * 16, "function": "g", "state": "sealed", "inputs": 1,
             "queued": 1, "running": 0, "done": 0, "durable": True,
             "waiting_for": "a free core"},
        ],
        "worker_count": 1,
        "container_count": 2,
        "tokens": {},
        "call_count": 2,
        "open_call_count": 2,
        "counts": {},
    }  # fmt: skip


def test_inputs_that_lack_a_blob_or_back_off_are_queued() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"retries": [1, 50.0, 1.0, 60.0]})
    call_id = bench.open(client, count=2)
    bench.finish(worker, bench.started_lease(worker), status=m.Status.ERROR)
    lengths = (1).to_bytes(4, "little") * 3
    bench.frame(client, m.Inputs(call_id, 2, lengths, [(0, [b"B" * 32])], b"xyz"))
    (row,) = bench.core.snapshot()["calls"]
    assert (row["inputs"], row["queued"], row["running"]) == (5, 4, 1)
    bench.frame(worker, m.LeaseOutputs(2, 0, b"?" * 16, 0, 1, lengths[:4], b"\0", [], b"x"))
    assert bench.core.snapshot()["counts"] == {"output of an ended call": 1}


def waits(bench: Bench, position: int = 0) -> str:
    """What a call is said to wait for."""
    reason: str = bench.core.snapshot()["calls"][position]["waiting_for"]
    return reason


def test_a_call_whose_inputs_back_off_waits_for_their_delay() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"retries": [1, 50.0, 1.0, 60.0]})
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    assert waits(bench) == ""
    bench.finish(worker, lease, status=m.Status.ERROR)
    assert waits(bench) == "the delay before inputs that failed run again"


def test_a_call_that_is_not_on_disk_waits_for_the_disk() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1, is_durable=True)
    assert waits(bench) == "the disk"
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    assert waits(bench) == "the disk"
    bench.store()
    assert waits(bench) == "", "it is over"


def test_a_call_that_has_had_its_turn_waits_for_its_client() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    call_id = bench.open(client, count=1, is_sealed=False)
    bench.finish(worker, bench.started_lease(worker))
    assert waits(bench) == "more inputs from its client"
    bench.frame(client, m.SealCall(call_id, 1))
    assert waits(bench) == "its client, which has yet to say that it has all results"


def test_calls_of_one_function_wait_for_what_the_first_of_them_waits_for() -> None:
    bench = Bench()
    bench.worker(cpu=1)
    client = bench.client(f={"max_containers": 1}, g={})
    for call in range(1, 4):
        bench.open(client, call=call, count=3)
    shown = [waits(bench, position) for position in range(3)]
    assert shown == ["a permit: max_containers are in use"] * 3


def test_states_of_a_container_are_words() -> None:
    bench = ObjectBench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={}, g={})
    bench.make(client)
    bench.open(client, count=1)
    lease = bench.started_lease(worker)

    def shown() -> tuple[str, str]:
        row = bench.core.snapshot()["containers"][0]
        return row["state"], row["waits"]

    assert shown() == ("running", "")
    nested = bench.connect("nested", worker=worker, container_id=lease.container_id)
    bench.frame(nested, m.SessionWaits(0))
    assert shown() == ("waiting", "its own calls")
    bench.get(nested)
    assert shown() == ("waiting", "queue 'q'")
    bench.open(client, "g", call=2, count=1)
    other = bench.started_lease(worker)
    bench.put(client, b"a")
    bench.write()
    assert shown() == ("waiting", "its core"), "another call has it"
    bench.finish(worker, other)
    assert shown() == ("running", "")
    bench.finish(worker, lease)
    assert shown() == ("idle", "")
    bench.later(10)
    bench.frame(worker, m.Heartbeat(1))
    bench.frame(client, m.CloseApp(APP))
    assert shown() == ("stopping", "")


def test_a_generator_without_credit_waits_for_its_consumer() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"is_generator": True})
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.frame(worker, m.LeaseWaits(lease.lease_id, 4))
    (row,) = bench.core.snapshot()["containers"]
    assert (row["state"], row["waits"]) == ("waiting", "its consumer")


def test_calls_that_are_over_and_apps_that_are_closing_are_told_as_such() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={})
    bench.open(client, count=1, is_durable=True)
    bench.store()
    bench.finish(worker, bench.started_lease(worker))
    bench.store()
    (row,) = bench.core.snapshot()["calls"]
    assert (row["state"], row["done"], row["durable"]) == ("over", 1, True)
    assert bench.core.snapshot()["open_call_count"] == 0
    bench.frame(client, m.CloseApp(APP))
    assert bench.core.snapshot()["functions"] == []


def test_a_dict_is_shown_with_its_entries() -> None:
    bench = ObjectBench()
    peer = bench.connect()
    bench.make(peer, kind=2)
    bench.set(peer, b"k", b"v")
    bench.write()
    assert bench.core.snapshot()["objects"] == [{"name": "q", "type": "dict", "values": 1}]


def test_no_list_is_longer_than_a_person_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "ROWS_MAX", 2)
    bench = ObjectBench()
    for number in range(1, 4):
        bench.worker(cpu=1, number=number)
    client = bench.client(f={}, g={}, h={})
    for number in range(1, 4):
        bench.frame(client, m.OpenObject(number, bytes([number]) * 16, 1, "", m.OpenMode.EPHEMERAL))
        bench.open(client, call=number, count=1)
    shown = bench.core.snapshot()
    names = ("workers", "containers", "functions", "objects", "calls")
    assert [len(shown[name]) for name in names] == [2] * 5
    assert shown["call_count"] == 3
    assert msgpack.unpackb(msgpack.packb(shown)) == shown


def test_who_would_be_cut_off_by_a_shutdown_is_named() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(**{name: {} for name in "gfjihk"})
    assert snapshot.describe_busy(bench.core.state) == ""
    for number, name in enumerate("gfjihkf", 1):
        bench.open(client, name, call=number, count=2)
    bench.finish(worker, bench.started_lease(worker))
    words = "7 calls of f, g, h, i, j with 13 unfinished inputs"
    assert snapshot.describe_busy(bench.core.state) == words


def test_inputs_are_counted_before_the_call_is_sealed() -> None:
    bench = Bench()
    client = bench.client(f={})
    call_id = bench.open(client, count=2, is_sealed=False)
    bench.frame(client, inputs(call_id, 2, 3))
    (row,) = bench.core.snapshot()["calls"]
    assert (row["state"], row["inputs"], row["queued"]) == ("open", 5, 5)
    assert row["waiting_for"] == "a worker: none is connected"
