"""Messages that are valid, and that no honest peer would send: the core takes each without failing,
and its invariants hold. A failure names its seed."""

from __future__ import annotations

import os
import random

import pytest

from fanout.exceptions import ProtocolError
from fanout.protocol import frames
from fanout.protocol import messages as m
from fanout_scheduler.core.events import Disconnect
from tests.core_kit import Bench
from tests.hostile_kit import Mutator, encoded, sample

IS_FULL = os.environ.get("FANOUT_TEST_FULL") == "1"
SEED_COUNT = 2000 if IS_FULL else 150
MESSAGES_PER_SEED = 60

CALL, STREAM, STORED, QUEUE, FUNCTION = (bytes([n]) * 16 for n in (1, 2, 3, 4, ord("f")))
ODD: list[object] = [
    None,
    True,
    -1,
    0,
    1.5,
    "",
    "text",
    b"",
    b"i" * 16,
    [],
    [[]],
    {},
    {"a": [1]},
    1 << 62,
    -1e14,
]
OPTIONS = (
    "timeout", "retries", "max_containers", "min_containers", "buffer_containers", "cpu", "memory",
    "is_generator", "scaledown_window", "batch", "max_inputs", "target_inputs", "single_use",
    "methods", "is_mixed",
)  # fmt: skip


class World:
    """A core with everything in it that a message can name."""

    def __init__(self, seed: int) -> None:
        self.mutator = Mutator(seed)
        self.random: random.Random = self.mutator.random
        self.bench = bench = Bench()
        self.worker = bench.worker(cpu=4)
        self.client = bench.client(f={}, g={"is_generator": True})
        bench.open(self.client, "f", 1, 3)
        bench.open(self.client, "g", 2, 1)
        bench.open(self.client, "f", 3, 2, is_durable=True)
        bench.store()
        lease = bench.take_all(m.Lease, self.worker)[0]
        bench.start(self.worker, lease.container_id)
        self.nested = bench.connect("nested", worker=self.worker, container_id=lease.container_id)
        bench.frame(
            self.client, m.OpenObject(1, QUEUE, m.ObjectType.QUEUE, "", m.OpenMode.EPHEMERAL)
        )
        state = bench.core.state
        self.numbers = [0, 1, 2, 3, 1 << 40, *state.leases, *state.containers, m.ID_MAX]
        self.ids = [CALL, STREAM, STORED, QUEUE, FUNCTION, b"g" * 16, b"a" * 16, b"z" * 16]
        self.roles = {
            self.worker: m.FROM_WORKER,
            self.client: m.FROM_CLIENT,
            self.nested: m.FROM_NESTED_CLIENT,
        }

    def message(self, cls: type[m.Message]) -> m.Message | None:
        """Something valid of a kind that names what there is."""
        made = sample(cls)
        for name, check in cls.CHECKS:
            value = self._value(name, check, getattr(made, name))
            if name not in ("lengths", "statuses") and check(value):
                setattr(made, name, value)
        data = encoded(made)
        if self.random.random() < 0.3:
            data = self.mutator.spoil(data)
        try:
            (frame,) = frames.FrameReader().feed(data)
            decoded = m.decode(*frame)
        except (ProtocolError, ValueError):
            return None
        return decoded if type(decoded) is cls else None

    def _value(self, name: str, check: m.Check, value: object) -> object:
        choose = self.random.choice
        if isinstance(check, m.Between):
            return choose(self.numbers)
        if name in ("options", "changes"):
            return {choose(OPTIONS): choose(ODD) for _ in range(self.random.randrange(4))}
        if isinstance(check, m.Plain):
            return [choose(ODD), [choose(self.numbers), choose(ODD)]] if check.kind is list else {}
        if isinstance(check, m.Sized) and check.kind is bytes:
            return choose(self.ids)
        if value is True:
            return choose([True, False])
        if name == "parent":
            return choose([None, [choose(self.numbers), choose(self.numbers)]])
        if isinstance(value, list) and value and value[0] == [1, 2]:
            return [[choose(self.numbers), choose(self.numbers)]]
        if isinstance(value, float):
            return choose([0, -1, 1.5, 1e14, -1e14])
        return value


@pytest.mark.parametrize("half", [0, 1])
def test_no_valid_message_of_a_peer_makes_the_core_fail(half: int) -> None:
    for seed in range(half, SEED_COUNT, 2):
        world = World(seed)
        bench = world.bench
        story: list[object] = []
        try:
            for _ in range(MESSAGES_PER_SEED):
                peer = world.random.choice(list(world.roles))
                kinds = sorted(world.roles[peer] - m.BLOB_KINDS, key=lambda cls: cls.KIND)
                message = world.message(world.random.choice(kinds))
                if message is None or type(message) in (m.Goodbye, m.Relay):
                    continue
                story.append((peer, message))
                bench.frame(peer, message)
                if world.random.random() < 0.1:
                    bench.store()
                    bench.later(world.random.choice([0.1, 2.0, 40.0]))
        except Exception as bug:
            raise AssertionError(f"seed {seed}, after {story[-3:]}: {bug!r}") from bug


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cpu", -1),
        ("max_containers", "many"),
        ("methods", 3),
        ("retries", [1, 0.0, 1e300, 1.0]),
        ("scaledown_window", None),
        ("max_inputs", 1 << 40),
    ],
)
def test_a_definition_that_no_library_sends_is_refused_by_name(name: str, value: object) -> None:
    bench = Bench()
    client = bench.client()
    bench.define(client, "f", {name: value})
    (refusal,) = [order for order in bench.orders if isinstance(order, Disconnect)]
    assert refusal.code == "protocol"
    assert f"the option {name}=" in refusal.text
    assert bench.core.state.functions == {}


@pytest.mark.parametrize("mode", [m.OpenMode.MAKE, m.OpenMode.MAKE_IF_MISSING])
def test_no_object_gets_the_id_of_another(mode: m.OpenMode) -> None:
    bench = Bench()
    client, other = bench.connect(), bench.connect()
    kind = m.ObjectType.QUEUE
    bench.frame(client, m.OpenObject(1, QUEUE, kind, "", m.OpenMode.EPHEMERAL))
    bench.frame(client, m.OpenObject(2, STORED, kind, "on its way", m.OpenMode.MAKE))
    kept = bench.core.state.objects.by_id[QUEUE]
    for number, object_id in enumerate((QUEUE, STORED)):
        bench.frame(other, m.OpenObject(number, object_id, kind, f"mine{number}", mode))
        answer = bench.take(m.ObjectAnswer, other)
        assert (answer.code, "id is that of another" in answer.info[0]) == ("invalid", True)
    assert bench.core.state.objects.by_id == {QUEUE: kept}


def test_the_delay_before_a_retry_is_a_number_however_often_it_failed() -> None:
    bench = Bench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"retries": [400, 1.0, 10.0, 0.001]})
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    for _ in range(350):
        bench.finish(worker, lease, status=m.Status.ERROR)
        bench.later(0.01)
        lease = bench.take(m.Lease, worker)
        bench.forget(m.OutputsAck)
    assert bench.take_all(m.Outputs, client) == []
