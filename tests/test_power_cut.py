"""The power is cut: whatever was acknowledged is there when the machine starts again.

See `power_kit.py` for what is taken to be on disk.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import fanout
from tests import restart_kit as kit
from tests.conftest import poll_until
from tests.power_kit import PowerCluster

SEED = int(os.environ.get("FANOUT_TEST_SEED") or random.randrange(1 << 32))
CUTS = 20 if kit.FULL else 3

#: A client that has gone when the power is cut, and so heals nothing. It says what it was promised.
SPAWN_AND_LEAVE = """
import json
from tests import restart_kit as kit
with kit.app.run():
    small = [kit.same.spawn(x) for x in range(10)]
    large = [kit.size_of.spawn(bytes([x]) * (2 << 20)) for x in range(3)]
    many = kit.same.spawn_map(range(500))
    print(json.dumps([call.object_id for call in [*small, *large, many]]), flush=True)
    import os
    os._exit(0)
"""


@pytest.fixture
def powered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PowerCluster]:
    cluster = PowerCluster(tmp_path)
    try:
        cluster.start_scheduler()
        monkeypatch.setenv("FANOUT_URL", cluster.client_join)
        yield cluster
    finally:
        cluster.stop()


def test_spawned_calls_that_nobody_ran_yet_are_there_with_their_blobs(
    powered: PowerCluster,
) -> None:
    done = powered.python("-c", SPAWN_AND_LEAVE)
    powered.cut_power()
    assert done.returncode == 0, done.stderr
    calls = [fanout.FunctionCall.from_id(object_id) for object_id in json.loads(done.stdout)]
    powered.start_scheduler()
    powered.start_worker("w1", cpu=2)
    assert [call.get(timeout=30)[0] for call in calls[:10]] == list(range(10))
    assert [call.get(timeout=30) for call in calls[10:13]] == [2 << 20] * 3
    assert [value[0] for value in calls[13].iter()] == list(range(500))


def test_what_was_acknowledged_before_a_random_moment_survives_again_and_again(
    powered: PowerCluster,
) -> None:
    chance = random.Random(SEED)
    powered.start_worker("w1", cpu=2)
    seen: dict[fanout.FunctionCall[str], str] = {}
    accepted: list[fanout.FunctionCall[str]] = []
    queued: list[int] = []
    with kit.app.run():
        queue = fanout.Queue.from_name("q", create_if_missing=True)
        table = fanout.Dict.from_name("d", create_if_missing=True)
        for _ in range(CUTS):
            for number in range(chance.randrange(5, 40)):
                accepted.append(kit.unique.spawn())
                queue.put(number)
                queued.append(number)
                table["last"] = len(queued)
                if chance.random() < 0.3:
                    assert queue.get() == queued.pop(0)
                    table["last"] = len(queued)
                if chance.random() < 0.5:
                    call = chance.choice(accepted)
                    seen[call] = call.get(timeout=30)
            powered.cut_power()
            powered.start_scheduler()
            assert table["last"] == len(queued), f"seed {SEED}"
            assert queue.len() == len(queued), f"seed {SEED}"
            for call in accepted:
                value = call.get(timeout=30)
                assert seen.setdefault(call, value) == value, f"a result has changed (seed {SEED})"
        assert queue.get_many(len(queued) + 1) == queued
    poll_until(lambda: powered.open_call_count() == 0, "no call is left")
