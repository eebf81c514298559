"""Bad networks between hosts: cut, deaf on one side, slow, lossy; and hosts that stand still."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fanout.config import CLIENT_GRACE_S, WORKER_DEADLINE_S
from tests.network_kit import (
    IS_FULL,
    Client,
    Cluster,
    Stories,
    let_pass,
    notes,
    release,
    until,
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

CUT = {
    "brief": {"outward": {"is_cut": True}, "inward": {"is_cut": True}},
    "long": {"outward": {"is_cut": True}, "inward": {"is_cut": True}},
    "mute": {"outward": {"is_cut": True}},
    "deaf": {"inward": {"is_cut": True}},
}
#: What `network.py held` has in flight: two inputs of a map, two spawned ones, a generator.
HELD_COUNT = 5


def results_of(client: Client) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for line in client.of("kind"):
        kinds.setdefault(line["kind"], []).append(line["x"])
    return kinds


@stories.test
def test_cut_workers_are_waited_for_or_replaced_and_taken_back(
    folder: Path, stack: ExitStack
) -> None:
    cluster = make(stack, folder, "desk", *CUT, "steady")
    clients: dict[str, Client] = {}
    begun: dict[str, set[int]] = {}
    for name in CUT:
        cable = cluster.network.lay_cable(name)
        cluster.start_worker(name, cpu=1)
        clients[name] = cluster.client("desk", "held")
        # The other workers are full, so all of it is here.
        noted = until(
            lambda: (
                len(notes(cluster[name], "begun")) == HELD_COUNT and notes(cluster[name], "begun")
            ),
            lambda: f"{HELD_COUNT} held on {name}: {notes(cluster[name], 'begun')} {clients[name]}",
            20,
        )
        begun[name] = {int(pid) for pid, *_ in noted}
    release(cluster["steady"])
    steady = cluster.start_worker("steady", cpu=2)
    lost = [name for name in CUT if name != "brief"]

    cut_at = time.monotonic()
    for name, settings in CUT.items():
        cluster.network.cables[name].set(**settings)
    let_pass(WORKER_DEADLINE_S / 2)
    cluster.network.cables["brief"].set()
    release(cluster["brief"])
    clients["brief"].until("held", timeout_s=20)
    print("brief", time.monotonic() - cut_at)
    assert all(
        line["host"] == "brief" for line in clients["brief"].of("kind") if line["kind"] != "item"
    )
    for name in lost:
        clients[name].until("held", timeout_s=20)
        print(name, time.monotonic() - cut_at)
        print(name, clients[name].of("kind"))
    for name in CUT:
        assert results_of(clients[name]) == {
            "map": [0, 1],
            "item": list(range(5)),
            "spawned": [0, 1],
        }
    for name in lost:
        cluster.network.cables[name].set()
    until(
        lambda: cluster.worker_names() == {*CUT, "steady"}, lambda: str(cluster.worker_names()), 30
    )
    print("back", time.monotonic() - cut_at)
    for name in lost:
        until(
            lambda: len(notes(cluster[name], "stopped")) == HELD_COUNT,
            lambda: f"{notes(cluster[name], 'stopped')} {cluster[name].log}",
            10,
        )
        print(notes(cluster[name], "stopped"))
    steady.terminate()
    steady.wait()
    for name in lost:
        release(cluster[name])
    for name in CUT:
        clients[name].go_on()
        clients[name].until_done()
        print(name, begun[name], clients[name].of("kind", "again"))
        print(name, cluster[name].log)
        print(clients[name].errors)
    assert 0
