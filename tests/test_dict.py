"""Dicts as a user has them: keys and values, locks, limits, several processes, restarts."""

from __future__ import annotations

import asyncio
import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fanout
from fanout import exceptions
from fanout.client import sessions
from tests.conftest import Cluster, HandStarted

app = fanout.App("dicts")


class Unwelcome:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ImportError("not here")


@app.function()
def take_lock(locks: fanout.Dict, worker: int) -> bool:
    return locks.put("lock", worker, skip_if_exists=True)


@app.function()
def count_up(counts: fanout.Dict, key: str) -> fanout.Dict:
    counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.fixture
def d(cluster: Cluster) -> Iterator[fanout.Dict]:
    with fanout.Dict.ephemeral() as made:
        yield made


def test_making_one_without_a_name_says_what_to_write() -> None:
    with pytest.raises(RuntimeError, match=r"Dict\.from_name.*Dict\.ephemeral"):
        fanout.Dict()


def test_it_is_used_like_a_dict(d: fanout.Dict) -> None:
    d["a"] = 1
    assert d["a"] == 1
    assert "a" in d
    assert "b" not in d
    assert d.get("a") == 1
    assert d.get("b") is None
    assert d.get("b", 7) == 7
    d["a"] = {"nested": [1, 2]}
    assert d["a"] == {"nested": [1, 2]}
    del d["a"]
    assert d.contains("a") is False
    for missing in (lambda: d["a"], lambda: d.__delitem__("a"), lambda: d.pop("a")):
        with pytest.raises(KeyError, match="a"):
            missing()
    assert d.pop("a", 3) == 3
    assert d.pop("a", None) is None
    with pytest.raises(TypeError, match="not iterable"):
        iter(d)


def test_none_is_a_value(d: fanout.Dict) -> None:
    d["none"] = None
    assert "none" in d
    assert d.get("none", 1) is None
    assert d["none"] is None
    assert d.pop("none") is None
    assert "none" not in d


def test_values_are_copies(d: fanout.Dict) -> None:
    value = [1]
    d["a"] = value
    value.append(2)
    d["a"].append(3)
    assert d["a"] == [1]


def test_many_are_set_and_seen(d: fanout.Dict) -> None:
    d.update({"a": 1, "b": 2}, c=3)
    d.update([("d", 4)])
    d.update(b=20)
    assert d.len() == 4
    assert list(d.keys()) == ["a", "b", "c", "d"]
    assert list(d.values()) == [1, 20, 3, 4]
    assert dict(d.items()) == {"a": 1, "b": 20, "c": 3, "d": 4}
    assert d.pop("a") == 1
    assert list(d.keys()) == ["b", "c", "d"]
    d.clear()
    assert (d.len(), list(d.items())) == (0, [])
    d.update()


def test_more_entries_than_one_request_has_are_all_set(d: fanout.Dict) -> None:
    d.update({number: str(number) for number in range(12_000)})
    assert d.len() == 12_000
    assert list(d.items()) == [(number, str(number)) for number in range(12_000)]


def test_keys_of_many_types_are_found_again(d: fanout.Dict) -> None:
    keys: list[Any] = [0, 1.5, True, None, "text", b"bytes", ("a", 1), ("a", ("a", "a"))]
    keys += [frozenset({1}), datetime.date(2026, 1, 1)]
    for position, key in enumerate(keys):
        d[key] = position
    assert [d[key] for key in keys] == list(range(len(keys)))
    assert list(d.keys()) == keys


def test_equal_keys_are_one_key_however_they_were_made(d: fanout.Dict) -> None:
    part = "ab"
    d[part, part] = 1
    assert d["".join(["a", "b"]), "ab"] == 1
    d[1] = "int"
    assert d.get(1.0) is None


def test_of_those_who_skip_what_exists_one_inserts(d: fanout.Dict) -> None:
    assert d.put("a", 1, skip_if_exists=True) is True
    assert d.put("a", 2, skip_if_exists=True) is False
    assert d["a"] == 1
    assert d.put("a", 3) is True
    assert d["a"] == 3


def test_one_of_many_containers_gets_a_lock(cluster: Cluster) -> None:
    locks = fanout.Dict.from_name("locks", create_if_missing=True)
    with app.run():
        got = list(take_lock.starmap([(locks, number) for number in range(20)]))
    assert got.count(True) == 1
    assert locks["lock"] == got.index(True)


def test_handles_work_as_arguments_and_results(d: fanout.Dict) -> None:
    with app.run():
        assert count_up.remote(d, "x")["x"] == 1
        assert count_up.remote(d, "x").object_id == d.object_id
    assert d["x"] == 2


def test_a_name_means_one_dict_to_all_processes(cluster: Cluster) -> None:
    shared = fanout.Dict.from_name("shared", create_if_missing=True)
    shared[("a", "a")] = [1]
    code = (
        "import fanout; d = fanout.Dict.from_name('shared'); print(d['a', 'a']); d['back'] = 2;"
        "k = 'b'; d[k, k] = 3"
    )
    done = cluster.python("-c", code)
    assert done.stdout == "[1]\n", done.stderr
    assert shared["back"] == 2
    assert shared["b", "".join(["b"])] == 3, "also from a process without a main file"
    with pytest.raises(exceptions.NotFoundError, match="no dict named 'other'"):
        fanout.Dict.from_name("other").len()


def test_dicts_are_made_listed_and_deleted_by_name(cluster: Cluster) -> None:
    fanout.Dict.objects.create("one")
    with pytest.raises(exceptions.AlreadyExistsError):
        fanout.Dict.objects.create("one")
    (found,) = fanout.Dict.objects.list()
    assert found.info().name == "one"
    assert found.hydrate().object_id.startswith("di-")
    fanout.Dict.delete("one")
    with pytest.raises(exceptions.NotFoundError):
        found["a"] = 1
    assert fanout.Dict.objects.list() == []


def test_a_value_that_cannot_be_unpickled_names_its_key(d: fanout.Dict) -> None:
    d["bad"] = Unwelcome()
    for read in (lambda: d["bad"], lambda: list(d.items()), lambda: d.pop("bad")):
        with pytest.raises(exceptions.DeserializationError, match="key 'bad' of Dict.*not here"):
            read()


def test_limits_are_checked_before_anything_is_sent() -> None:
    d = fanout.Dict.from_name("never-reached")
    with pytest.raises(exceptions.RequestSizeError, match="a key has 70"):
        d["x" * 70_000] = 1
    with pytest.raises(exceptions.RequestSizeError, match="'k' and its value have 16777"):
        d["k"] = b"x" * (16 << 20)
    with pytest.raises(exceptions.RequestSizeError, match="'late'"):
        d.update({"early": 1, "late": b"x" * (16 << 20)})
    with pytest.raises(exceptions.SerializationError, match="the value of key 'k', a _thread.lock"):
        d["k"] = threading.Lock()
    with pytest.raises(exceptions.SerializationError, match="the key, a _thread.lock"):
        d.get(threading.Lock())


def test_a_value_of_some_megabytes_goes_through(d: fanout.Dict) -> None:
    value = bytes(range(256)) * (15 << 12)
    d["big"] = value
    d["small"] = 1
    assert d["big"] == value
    assert [key for key, _ in d.items()] == ["big", "small"]


async def test_everything_has_an_async_form(cluster: Cluster) -> None:
    async with fanout.Dict.ephemeral() as d:
        assert await d.put.aio("a", 1)
        await d.update.aio({"b": 2}, c=3)
        assert await d.get.aio("a") == 1
        assert await d.contains.aio("b")
        assert await d.pop.aio("c") == 3
        assert await d.len.aio() == 2
        assert [key async for key in d.keys.aio()] == ["a", "b"]
        assert [value async for value in d.values.aio()] == [1, 2]
        assert [pair async for pair in d.items.aio()] == [("a", 1), ("b", 2)]
        await d.clear.aio()
        got = await asyncio.gather(*[d.put.aio("lock", n, skip_if_exists=True) for n in range(20)])
        assert got.count(True) == 1
        with pytest.raises(exceptions.InvalidError, match=r"await dict\.get\.aio"):
            d["a"]
    await sessions.close_here()


def test_what_was_written_survives_a_killed_scheduler(
    scheduler_and_workers: Callable[..., HandStarted],
) -> None:
    started = scheduler_and_workers(0)
    d = fanout.Dict.from_name("durable", create_if_missing=True)
    d.update({"a": 1, "b": 2, "c": 3})
    d["a"] = 10
    assert d.pop("b") == 2
    assert started.scheduler is not None
    started.scheduler.kill()
    started.scheduler.wait()
    started.start_scheduler()
    assert dict(d.items()) == {"a": 10, "c": 3}
    assert d.put("a", 0, skip_if_exists=True) is False
    d.clear()
    started.scheduler.kill()
    started.scheduler.wait()
    started.start_scheduler()
    assert fanout.Dict.from_name("durable").len() == 0
