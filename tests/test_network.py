"""Bad networks between hosts: cut, deaf on one side, slow, lossy; and hosts that stand still."""

from __future__ import annotations

import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fanout.config import BLOB_SIZE_BYTES_MIN, CLIENT_GRACE_S, WORKER_DEADLINE_S
from fanout.protocol.wire import SILENCE_S
from tests.conftest import TIMEOUT_FACTOR
from tests.network_kit import (
    IS_FULL,
    Client,
    Cluster,
    Stories,
    let_pass,
    notes,
    record,
    release,
    until,
    until_notes,
)

stories = Stories()


@pytest.fixture(scope="module")
def endings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return stories.run(request, tmp_path_factory.mktemp("network"))


def make(stack: ExitStack, folder: Path, *names: str) -> Cluster:
    cluster = Cluster(folder, *names)
    stack.callback(cluster.network.close)
    return cluster


# --- workers --------------------------------------------------------------------------------------

NOTHING_PASSES = {"is_cut": True}
CUTS: dict[str, dict[str, Any]] = {
    "brief": {"outward": NOTHING_PASSES, "inward": NOTHING_PASSES},
    "long": {"outward": NOTHING_PASSES, "inward": NOTHING_PASSES},
    "mute": {"outward": NOTHING_PASSES},
    "deaf": {"inward": NOTHING_PASSES},
}
LOST = [name for name in CUTS if name != "brief"]
#: TCP pauses longer and longer between attempts, up to as long again as the cut was.
BRIEF_CUT_S = WORKER_DEADLINE_S / 3
#: Longer than TCP itself waits for an answer, so that workers have to dial and cannot.
LONG_CUT_S = 50.0 if IS_FULL else WORKER_DEADLINE_S
#: What `network.py held` has in flight: two inputs of a map, two spawned ones, a generator.
HELD_COUNT = 5


def results_of(client: Client) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for line in client.of("kind"):
        kinds.setdefault(line["kind"], []).append(line["x"])
    return kinds


def start_held(cluster: Cluster, name: str) -> tuple[Client, set[str]]:
    """A worker, and a client of it that fills it; its containers. The other workers are full."""
    cluster.network.lay_cable(name)
    cluster.start_worker(name, cpu=1)
    client = cluster.client("desk", "held")
    return client, {pid for pid, *_ in until_notes(cluster[name], "begun", HELD_COUNT, str(client))}


@stories.test
def test_cut_workers_are_waited_for_or_replaced_and_taken_back(
    folder: Path, stack: ExitStack
) -> None:
    cluster = make(stack, folder, "desk", *CUTS, "steady")
    held = {name: start_held(cluster, name) for name in CUTS}
    release(cluster["steady"])
    steady = cluster.start_worker("steady", cpu=2)

    for name, settings in CUTS.items():
        cluster.network.cables[name].set(**settings)
    cut_at = time.monotonic()
    let_pass(BRIEF_CUT_S)
    cluster.network.cables["brief"].set()
    release(cluster["brief"])
    held["brief"][0].until("held")
    for client, _ in held.values():
        lines = client.until("held", timeout_s=1.5 * WORKER_DEADLINE_S)
        if client is not held["brief"][0]:
            waited_s = lines[0]["at"] - cut_at
            assert WORKER_DEADLINE_S - 5 < waited_s < WORKER_DEADLINE_S + 5 * TIMEOUT_FACTOR
    for client, _ in held.values():
        assert results_of(client) == {"map": [0, 1], "item": [0, 1, 2, 3, 4], "spawned": [0, 1]}
    let_pass(max(0.0, cut_at + LONG_CUT_S - time.monotonic()))
    for name in LOST:
        # Whoever was cut off goes on with what it has, and cannot know that it is void.
        assert notes(cluster[name], "stopped") == notes(cluster[name], "ended") == []
        cluster.network.cables[name].set()
    _require_taken_back(cluster, held)
    steady.terminate()
    assert steady.wait() == 0
    _require_same_containers(cluster, held)


def _require_taken_back(cluster: Cluster, held: dict[str, tuple[Client, set[str]]]) -> None:
    for name in LOST:
        stopped = until_notes(cluster[name], "stopped", HELD_COUNT)
        assert {pid for pid, *_ in stopped} == held[name][1], "its leases were void"
        told = r"lost the scheduler at 10.77.0.1:7337: .*(?s:.)*joined .* again after \d+ s"
        cluster[name].find_in_log(f"({told})")
        record(cluster[name].log)
    everybody = {*CUTS, "steady"}
    until(lambda: cluster.worker_names() == everybody, lambda: str(cluster.status()), 30)
    # It was never given up: each input ran there, and once.
    ended = notes(cluster["brief"], "ended")
    mine = [line for line in notes(cluster["brief"], "begun") if line[0] in held["brief"][1]]
    assert sorted(ended[:HELD_COUNT]) == sorted(mine[:HELD_COUNT])
    assert {line["host"] for line in held["brief"][0].of("kind")} == {"brief"}
    assert "lost the scheduler" not in cluster["brief"].log


def _require_same_containers(cluster: Cluster, held: dict[str, tuple[Client, set[str]]]) -> None:
    """Once more, with all that was cut. A client's containers are on its worker only, and those
    that it got elsewhere meanwhile."""
    for name in LOST:
        release(cluster[name])
    for name, (client, pids) in held.items():
        client.go_on()
        client.until_done()
        again = client.of("kind", "again")
        assert [line["x"] for line in again] == list(range(8))
        assert {str(line["pid"]) for line in again if line["host"] == name} & pids, (pids, again)


# --- clients --------------------------------------------------------------------------------------

#: Longer than TCP waits, and not as long as TCP and then the scheduler.
CUT_S = 26.0
FLOW_COUNT = 200
#: A client that stands still, with more to read than its host has room for.
STOP_S = 75.0 if IS_FULL else 38.0
STOP_INPUT_COUNT = 60
STOP_OUTPUT_SIZE_BYTES = 400_000
#: Only of the full run: the connection, the grace and more are over, and then it comes back.
LATE = ("late",) if IS_FULL else ()


@stories.test
def test_clients_that_come_back_get_everything_and_lost_ones_are_given_up(
    folder: Path, stack: ExitStack
) -> None:
    back = ("long", "mute", "deaf")
    cluster = make(stack, folder, *back, *LATE, "vanished", "desk", "work")
    work = cluster["work"]
    cluster.start_worker("work", cpu=4)
    for name in (*back, *LATE, "vanished"):
        cluster.network.lay_cable(name)
    vanished = cluster.client("vanished", "spawn")
    call_id = vanished.until("call_id")[0]["call_id"]
    until_notes(work, "begun", 3)
    cluster.network.cables["vanished"].set(**CUTS["long"])
    vanished_at = time.monotonic()
    flows = {name: cluster.client(name, "flow", str(FLOW_COUNT), "0.1") for name in back + LATE}
    for flow in flows.values():
        flow.until("kind", 10, 40)

    for name in (*back, *LATE):
        cluster.network.cables[name].set(**CUTS.get(name, CUTS["long"]))
    let_pass(CUT_S)
    for name in back:
        assert flows[name].process.poll() is None, "it was not done before"
        assert not flows[name].of("end")
        cluster.network.cables[name].set()
    [[_, stopped_kind, *_]] = until_notes(work, "stopped", 1, timeout_s=60)
    given_up_s = time.monotonic() - vanished_at
    limit_s = SILENCE_S + CLIENT_GRACE_S
    record(f"a client that vanished was given up after {given_up_s:.1f} s")
    assert CLIENT_GRACE_S < given_up_s < limit_s + 8 * TIMEOUT_FACTOR
    for name in LATE:
        cluster.network.cables[name].set()
    for flow in flows.values():
        flow.until_done(60)
        assert results_of(flow) == dict.fromkeys(("map", "item", "spawned"), [*range(FLOW_COUNT)])
    release(work)
    for name in back:
        ran = sorted(int(x) for [x] in notes(work, f"ran-{name}"))
        assert ran == sorted([*range(FLOW_COUNT)] * 2), "the inputs of both calls ran once"
    collect = cluster.client("desk", "collect", call_id)
    collect.until_done()
    assert (stopped_kind, len(notes(work, "stopped"))) == ("attached", 1)
    assert results_of(collect) == {"spawned": [0, 1]}


@stories.test
def test_client_that_was_stopped_goes_on_as_if_nothing_had_been(
    folder: Path, stack: ExitStack
) -> None:
    cluster = make(stack, folder, "desk", "work")
    cluster.start_worker("work", cpu=0.2)
    client = cluster.client("desk", "large", str(STOP_INPUT_COUNT), str(STOP_OUTPUT_SIZE_BYTES))
    client.until("x")
    client.signal(signal.SIGSTOP)
    port = connections_of(cluster, "desk")
    let_pass(STOP_S)
    assert connections_of(cluster, "desk") == port, "it is connected as before"
    client.signal(signal.SIGCONT)
    client.until_done(60)
    assert [line["x"] for line in client.of("x")] == list(range(STOP_INPUT_COUNT))
    ran = sorted(int(x) for [x] in notes(cluster["work"], "large"))
    assert ran == list(range(STOP_INPUT_COUNT)), "each ran once"
    assert client.errors == ""


def connections_of(cluster: Cluster, name: str) -> list[str]:
    """The connections of a host to the scheduler, by address and port."""
    shown = cluster["head"].run("ss", "-tn", "state", "established").stdout
    return re.findall(rf"{re.escape(cluster[name].address)}:\d+", shown)


# --- bad cables -----------------------------------------------------------------------------------

FAR_AND_LOSSY = {"delay_s": 0.2, "loss": 0.01}


@stories.test
def test_delay_and_loss_cost_time_and_nothing_else(folder: Path, stack: ExitStack) -> None:
    cluster = make(stack, folder, "desk", "work")
    cluster.start_worker("work", cpu=1)
    for name in ("desk", "work"):
        cluster.network.lay_cable(name).set(outward=FAR_AND_LOSSY, inward=FAR_AND_LOSSY)
    begun = time.monotonic()
    clients = {
        "map": cluster.client("desk", "map", "3000"),
        "items": cluster.client("desk", "generator", "300"),
        "calls": cluster.client("desk", "calls", "20"),
    }
    for name, client in clients.items():
        client.until_done(60)
        record(f"{name} over 0.2 s and 1 % loss: {client.of('done')[0]['at'] - begun:.1f} s")
    assert results_of(clients["map"]) == {"map": list(range(3000))}
    assert results_of(clients["items"]) == {"item": list(range(300))}
    assert [line["x"] for line in clients["calls"].of("x")] == list(range(20))
    for cable in cluster.network.cables.values():
        counts = cable.counts()
        assert min(counts.out_dropped_count, counts.in_dropped_count) > 0, counts
    assert "lost the scheduler" not in cluster["work"].log


#: The full run has the figures of the promise; the other one what takes less time for the same.
NARROW = {"bits_s": 1e6 if IS_FULL else 8e6}
LARGE_SIZE_BYTES = (50 if IS_FULL else 7) << 20
#: One frame, just too small for a blob, that takes longer than a worker may be silent.
TEXT_SIZE_BYTES = BLOB_SIZE_BYTES_MIN - 10_000
NARROWEST = {"bits_s": TEXT_SIZE_BYTES * 8 / (WORKER_DEADLINE_S + 4)}
#: What is before a small answer on its way: buffers of the kernel, and of the modem.
CALL_S_MAX = 24.0 if IS_FULL else 3.0


@stories.test
def test_nobody_is_lost_while_bytes_flow_on_a_narrow_cable(folder: Path, stack: ExitStack) -> None:
    cluster = make(stack, folder, "desk", "thin", "work")
    cluster.start_worker("thin", cpu=0.05)  # enough for the text, and for nothing else
    cluster.network.lay_cable("thin").set(outward=NARROWEST)
    text = cluster.client("desk", "text", str(TEXT_SIZE_BYTES))
    until_notes(cluster["thin"], "text", 1)
    cluster.start_worker("work", cpu=1)
    cluster.network.lay_cable("work").set(outward=NARROW, inward=NARROW)
    begun = time.monotonic()
    large = cluster.client("desk", "large", "2", str(LARGE_SIZE_BYTES))
    until_notes(cluster["work"], "large", 2)
    calls = cluster.client("desk", "calls", "8")
    calls.until_done(200)
    took_s = [line["seconds"] for line in calls.of("seconds")]
    assert not large.of("done"), "the calls were beside the large results"
    assert max(took_s) < CALL_S_MAX * TIMEOUT_FACTOR, took_s
    large.until_done(2000)
    record(f"large: {large.of('done')[0]['at'] - begun:.1f} s, calls beside: {max(took_s):.2f} s")
    assert [line["x"] for line in large.of("x")] == [0, 1]
    text.until_done(60)
    assert sorted(notes(cluster["work"], "large")) == [["0"], ["1"]], "each ran once"
    for name in ("thin", "work"):
        assert "lost the scheduler" not in cluster[name].log
    assert len(notes(cluster["thin"], "text")) == 1
    assert notes(cluster["work"], "text") == []
