"""Bad networks between hosts: cut, deaf on one side, slow, lossy; and hosts that stand still."""

from __future__ import annotations

import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fanout.config import CLIENT_GRACE_S, WORKER_DEADLINE_S
from tests.conftest import TIMEOUT_FACTOR
from tests.network_kit import (
    IS_FULL,
    Client,
    Cluster,
    Stories,
    let_pass,
    notes,
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
    let_pass(WORKER_DEADLINE_S / 2)
    cluster.network.cables["brief"].set()
    release(cluster["brief"])
    held["brief"][0].until("held")
    for client, _ in held.values():
        lines = client.until("held", timeout_s=1.5 * WORKER_DEADLINE_S)
        if client is not held["brief"][0]:
            waited_s = lines[0]["at"] - cut_at
            assert WORKER_DEADLINE_S - 3.5 < waited_s < WORKER_DEADLINE_S + 5 * TIMEOUT_FACTOR
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

#: A client that stands still; longer than TCP waits for one that does not read.
STOP_S = 75.0 if IS_FULL else 38.0
STOP_INPUT_COUNT = 60
STOP_OUTPUT_SIZE_BYTES = 400_000


@stories.test
def test_clients_that_are_cut_off_or_stopped_get_everything_and_lost_ones_are_given_up(
    folder: Path, stack: ExitStack
) -> None:
    cluster = make(stack, folder, "cut", "mute", "deaf", "vanished", "stopped", "desk", "work")
    for name in ("cut", "mute", "deaf", "vanished"):
        cluster.network.lay_cable(name)
    cluster.start_worker("work", cpu=4)
    work = cluster["work"]
    vanished = cluster.client("vanished", "spawn", "40", "0.5")
    call_id = vanished.until("call_id")[0]["call_id"]
    until_notes(work, "begun", 1)
    stopped = cluster.client("stopped", "large", str(STOP_INPUT_COUNT), str(STOP_OUTPUT_SIZE_BYTES))
    maps = [cluster.client(name, "map", "1500", "0.01", "0.01") for name in ("cut", "mute", "deaf")]
    stopped.until("x")
    stopped.signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    for client in maps:
        client.until("x", 50)
    for name in CUTS:
        if name in cluster.network.cables:
            cluster.network.cables[name].set(**CUTS[name])
    cluster.network.cables["cut"].set(**CUTS["long"])
    cluster.network.cables["vanished"].set(**CUTS["long"])
    vanished_at = time.monotonic()
    let_pass(12)
    for name in ("cut", "mute", "deaf"):
        cluster.network.cables[name].set()
    for client in maps:
        client.until_done(60)
        print(client.name, time.monotonic() - vanished_at, client.errors)
        assert [line["x"] for line in client.of("x")] == list(range(1500))
    let_pass(max(0.0, stopped_at + STOP_S - time.monotonic()))
    stopped.signal(signal.SIGCONT)
    stopped.until_done(60)
    print(stopped.name, time.monotonic() - stopped_at, stopped.errors)
    assert [line["x"] for line in stopped.of("x")] == list(range(STOP_INPUT_COUNT))
    print([int(x) for (x,) in notes(work, "large")])
    until_notes(work, "stopped", 1, timeout_s=60)
    print("given up", time.monotonic() - vanished_at)
    collect = cluster.client("desk", "collect", call_id)
    collect.until_done()
    assert [line["x"] for line in collect.of("x")] == list(range(40))
    print(cluster["head"].log)
    assert 0
