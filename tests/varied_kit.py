"""Something of all that a script can ask for, for tests of what must hold whatever is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fanout
from tests import behaviour_kit as kit
from tests import classes_kit

LARGE_BYTES = 3 << 20


def run_everything(folder: Path, name: str) -> None:
    """Calls of every kind, each with the right answer. `name` is for what is named and stays."""
    large = b"L" * LARGE_BYTES
    folder = folder / name
    folder.mkdir()
    with kit.app.run():
        assert kit.same.remote({"a": [1, 2]}) == {"a": [1, 2]}
        assert [x for x, _ in kit.nap.map(range(200))] == list(range(200))
        assert list(kit.items.remote_gen(20)) == list(range(20))
        assert kit.first_byte.remote(large) == large[0]
        assert kit.trunk.remote(1, str(folder)) == 6
        results = list(kit.fail.map([1, 3], return_exceptions=True))
        assert [type(result) for result in results] == [int, kit.Coded]
        assert kit.fail_until.remote(str(folder), 3) == 3
        assert kit.chatter.remote(100) is not None
        spawned = [kit.same.spawn(x) for x in range(5)]
        assert [call.get() for call in spawned] == list(range(5))
        assert kit.same.spawn(large).get() == large
        cancelled = kit.note_and_wait.spawn(7, str(folder))
        cancelled.cancel()
        _use_objects(name)
    with classes_kit.app.run():
        assert classes_kit.Counter(start=3).later.remote(4) == 7  # type: ignore[call-arg]


def _use_objects(name: str) -> None:
    queue = fanout.Queue.from_name(f"{name}-queue", create_if_missing=True)
    values: list[Any] = [1, {"two": 2}, b"three"]
    queue.put_many(values)
    assert queue.get_many(3) == values
    queue.put("left behind")
    entries = fanout.Dict.from_name(f"{name}-dict", create_if_missing=True)
    entries["key"] = ("value", 1)
    assert entries["key"] == ("value", 1)
