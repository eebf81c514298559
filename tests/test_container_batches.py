"""Containers whose function takes inputs in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanout.exceptions import DeserializationError, InvalidError
from fanout.protocol import messages as m
from fanout.serialization import encode_args
from fanout_worker.runtime.batching import Batcher
from tests.worker_kit import CALL, Kit, containers, lease_of, lengths_of, let_pass, shapes

HEAD = "import asyncio, os, sys, time\nfrom fanout import context\n"
#: Each result tells its batch.
SYNC = HEAD + "def f(xs, ys):\n  return [(x, y, xs) for x, y in zip(xs, ys)]\n"
ASYNC = SYNC.replace("def f", "async def f")
#: A batch ends when there is a file of the name that its first input gives.
GATED = (
    HEAD
    + """
def f(xs, paths):
    print("begun", xs)
    while not os.path.exists(paths[0]): time.sleep(0.001)
    return xs
"""
)
GATED_ASYNC = GATED.replace("def f", "async def f").replace("time.sleep", "await asyncio.sleep")
BOTH = pytest.mark.parametrize("code", [SYNC, ASYNC], ids=["sync", "async"])
BOTH_GATED = pytest.mark.parametrize("code", [GATED, GATED_ASYNC], ids=["sync", "async"])
#: Longer than any test takes.
LONG_MS = 600_000


def make_file(path: Path) -> None:
    path.touch()


async def begun(kit: Kit, count: int = 1) -> None:
    await kit.until(lambda: kit.events.text().count("begun") >= count, f"{count} batches run")


async def exited(kit: Kit) -> tuple[str, list[tuple[int, int]]]:
    await kit.until(lambda: kit.events.exits, "the container is gone")
    reason, running, _, _ = kit.events.exits[1]
    return reason, sorted(running)


# --- gathering ------------------------------------------------------------------------------------


@BOTH
async def test_a_full_batch_runs_at_once_whatever_leases_and_calls_its_inputs_are_of(
    code: str,
) -> None:
    async with containers() as kit:
        container = await kit.start(code, batch=[4, LONG_MS])
        container.give(lease_of([(0, "a"), (1, "b")], lease_id=1))
        container.give(lease_of([(2, "c")], lease_id=2, start=2, call_id=b"d" * 16))
        container.give(lease_of([(3, "d")], lease_id=3, start=3))
        await kit.outputs(4)
        batch = [0, 1, 2, 3]
        assert [kit.events.value(i) for i in batch] == [(i, "abcd"[i], batch) for i in batch]


@BOTH
async def test_a_batch_that_does_not_fill_runs_when_its_first_input_has_waited(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, batch=[4, 150])
        container.give(lease_of([(0, 0)], lease_id=1))
        await let_pass(0.05)
        container.give(lease_of([(1, 1)], lease_id=2, start=1))
        assert not kit.events.outputs
        await kit.outputs(2)
        assert kit.events.value(0) == (0, 0, [0, 1])


async def test_keyword_arguments_and_positional_ones_bind_to_the_same_parameters() -> None:
    async with containers() as kit:
        code = "def f(a, /, b, *, c): return [list(x) for x in zip(a, b, c)]\n"
        container = await kit.start(code, batch=[3, LONG_MS])
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((1, 2), {"c": 3}), ((4,), {"c": 6, "b": 5}), ((7, 8), {"c": 9}),
        ]  # fmt: skip
        parts = [encode_args(args, kwargs)[0] for args, kwargs in calls]
        container.give(m.Lease(1, 1, CALL, 0, lengths_of(parts), [], 0, 0, "", b"".join(parts)))
        await kit.outputs(3)
        assert [kit.events.value(i) for i in range(3)] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


async def test_a_method_of_a_class_may_be_batched() -> None:
    async with containers() as kit:
        container = await kit.start(
            "from fanout.partial import batched, enter, method\n"
            "class C:\n  @enter()\n  def load(self): self.base = 10\n"
            "  @batched(max_batch_size=2, wait_ms=0)\n"
            "  def f(self, xs): return [self.base + x for x in xs]\n",
            "C",
            batch=[2, 0],
            methods=shapes(f="sync"),
        )
        container.give(lease_of([(1,), (2,), (3,)], method="f"))
        await kit.outputs(3)
        assert [kit.events.value(i) for i in range(3)] == [11, 12, 13]


@BOTH_GATED
async def test_one_batch_runs_at_a_time_and_the_next_fills_meanwhile(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, batch=[2, 0])
        paths = [str(kit.folder / name) for name in ("one", "two")]
        container.give(lease_of([(0, paths[0])], lease_id=1))
        await begun(kit)
        container.give(lease_of([(1, paths[1])], lease_id=2, start=1))
        container.give(lease_of([(2, paths[1]), (3, paths[1])], lease_id=3, start=2))
        make_file(kit.folder / "two")
        await let_pass(0.1)
        assert not kit.events.outputs
        make_file(kit.folder / "one")
        await kit.outputs(4)
        assert kit.events.text() == "begun [0]\nbegun [1, 2]\nbegun [3]\n"


@BOTH_GATED
async def test_several_batches_run_at_a_time_where_max_inputs_says_so(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, batch=[2, 0], max_inputs=2)
        path = str(kit.folder / "go")
        container.give(lease_of([(i, path) for i in range(6)]))
        await begun(kit, 2)
        await let_pass(0.1)
        assert sorted(kit.events.text().splitlines()) == ["begun [0, 1]", "begun [2, 3]"]
        make_file(kit.folder / "go")
        await kit.outputs(6)


async def test_the_present_input_is_the_first_of_the_batch() -> None:
    async with containers() as kit:
        code = HEAD + "def f(xs):\n  now = context.current_input.get()\n  print('text')\n"
        container = await kit.start(
            code + "  return [(now.lease_id, now.index)] * len(xs)\n", batch=[3, LONG_MS]
        )
        container.give(lease_of([(0,)], lease_id=5, start=40))
        container.give(lease_of([(0,), (0,)], lease_id=6, start=50))
        await kit.outputs(3)
        assert [kit.events.value(i) for i in (40, 50, 51)] == [(5, 40)] * 3
        assert kit.events.logs[0].index == 40


# --- errors ---------------------------------------------------------------------------------------


@BOTH
async def test_an_exception_is_that_of_every_input_of_the_batch(code: str) -> None:
    async with containers() as kit:
        failing = code.split("  return")[0] + "  if 7 in xs: raise KeyError(7)\n  return xs\n"
        container = await kit.start(failing, batch=[2, LONG_MS])
        container.give(lease_of([(7, 0), (1, 0), (2, 0), (3, 0)]))
        await kit.outputs(4)
        assert [type(kit.events.error(i)) for i in (0, 1)] == [KeyError, KeyError]
        assert [kit.events.value(i) for i in (2, 3)] == [2, 3]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("xs[:1]", "returned 1 for 2 inputs"),
        ("xs * 2", "returned 4 for 2 inputs"),
        ("tuple(xs)", "returned a tuple for 2 inputs"),
        ("None", "returned a NoneType for 2 inputs"),
        ("(x for x in xs)", "returned a generator for 2 inputs"),
        ("g()", "returned a coroutine for 2 inputs"),
    ],
)
async def test_a_result_that_is_no_list_of_as_many_fails_every_input(
    result: str, text: str
) -> None:
    async with containers() as kit:
        code = f"async def g(): pass\ndef f(xs): return {result}\n"
        container = await kit.start(code, batch=[2, LONG_MS])
        container.give(lease_of([(1,), (2,)]))
        await kit.outputs(2)
        for index in (0, 1):
            error = kit.events.error(index)
            assert isinstance(error, InvalidError)
            assert text in str(error)


async def test_an_input_that_does_not_fit_fails_alone_before_its_batch_runs() -> None:
    async with containers() as kit:
        container = await kit.start(GATED, batch=[6, LONG_MS])
        path = str(kit.folder / "go")
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((0,), {}), ((1, path), {}), ((2, path, 3), {}), ((3, path), {"xs": 1}),
            ((4, path), {"other": 1}),
        ]  # fmt: skip
        parts = [encode_args(args, kwargs)[0] for args, kwargs in calls] + [b"\0not a pickle"]
        container.give(m.Lease(1, 1, CALL, 0, lengths_of(parts), [], 0, 0, "", b"".join(parts)))
        await kit.outputs(5)
        await begun(kit)
        assert kit.events.text() == "begun [1]\n"
        for index, hint in ((0, "missing"), (2, "too many"), (3, "multiple"), (4, "other")):
            error = kit.events.error(index)
            assert isinstance(error, InvalidError)
            assert hint in str(error)
            assert "f(xs, paths)" in str(error)
        assert isinstance(kit.events.error(5), DeserializationError)
        make_file(kit.folder / "go")
        await kit.outputs(6)
        assert kit.events.value(1) == 1


async def test_a_batch_of_which_no_input_fits_does_not_run() -> None:
    async with containers() as kit:
        container = await kit.start(GATED, batch=[2, LONG_MS])
        container.give(lease_of([(), ()]))
        await kit.outputs(2)
        container.give(lease_of([(1,), (1,)], lease_id=2, start=2))
        await kit.outputs(4)
        assert kit.events.text() == ""


async def test_a_result_that_cannot_be_pickled_is_its_own_error_alone() -> None:
    async with containers() as kit:
        code = "import threading\ndef f(xs): return [threading.Lock() if x else x for x in xs]\n"
        container = await kit.start(code, batch=[3, LONG_MS])
        container.give(lease_of([(0,), (1,), (0,)]))
        await kit.outputs(3)
        assert (kit.events.value(0), kit.events.value(2)) == (0, 0)
        assert "cannot be pickled" in str(kit.events.error(1))


# --- stopping -------------------------------------------------------------------------------------


async def test_a_cancelled_input_of_a_batch_that_waits_is_dropped() -> None:
    async with containers() as kit:
        container = await kit.start(SYNC, batch=[3, LONG_MS])
        container.give(lease_of([(0, 0)], lease_id=1))
        container.give(lease_of([(1, 1)], lease_id=2, start=1))
        container.lower_limit(1, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        container.give(lease_of([(2, 2), (3, 3)], lease_id=3, start=2))
        await kit.outputs(4)
        assert kit.events.value(1) == (1, 1, [1, 2, 3])
        assert not kit.events.exits


@BOTH_GATED
async def test_a_batch_that_runs_goes_on_without_the_input_that_was_cancelled(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, batch=[3, LONG_MS])
        path = str(kit.folder / "go")
        container.give(lease_of([(0, path)], lease_id=1))
        container.give(lease_of([(1, path), (2, path)], lease_id=2, start=1))
        await begun(kit)
        container.lower_limit(1, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        make_file(kit.folder / "go")
        await kit.outputs(3)
        assert [kit.events.value(i) for i in (1, 2)] == [1, 2]


@BOTH_GATED
async def test_the_first_input_that_was_not_cancelled_becomes_the_present_one(code: str) -> None:
    tell = (
        "    now = context.current_input.get()\n    return [(now.lease_id, now.index)] * len(xs)\n"
    )
    async with containers() as kit:
        container = await kit.start(code.replace("    return xs\n", tell), batch=[4, LONG_MS])
        path = str(kit.folder / "go")
        container.give(lease_of([(0, path), (1, path)], lease_id=1))
        container.give(lease_of([(2, path)], lease_id=2, start=2, call_id=b"d" * 16))
        container.give(lease_of([(3, path)], lease_id=3, start=3))
        await begun(kit)
        container.lower_limit(1, 0, True)
        await kit.outputs(2)
        make_file(kit.folder / "go")
        await kit.outputs(4)
        assert [kit.events.value(i) for i in (2, 3)] == [(2, 2)] * 2


@BOTH_GATED
async def test_a_batch_of_which_all_inputs_were_cancelled_is_stopped(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, batch=[2, 0])
        container.give(lease_of([(0, "/absent")], lease_id=1))
        container.give(lease_of([(1, "/absent")], lease_id=2, start=1))
        await begun(kit)
        container.lower_limit(1, 0, True)
        container.lower_limit(2, 0, True)
        await kit.outputs(2)
        assert [kit.events.failure(i) for i in (0, 1)] == ["cancelled"] * 2
        make_file(kit.folder / "go")
        container.give(lease_of([(2, str(kit.folder / "go"))], lease_id=3, start=2))
        await kit.outputs(3)
        assert kit.events.value(2) == 2
        assert not kit.events.exits


async def test_a_batch_that_does_not_stop_is_killed_though_most_of_its_inputs_have_ended() -> None:
    async with containers(kill_grace_s=0.2) as kit:
        code = HEAD + "def f(xs):\n  print('begun')\n  time.sleep(100)\n"
        container = await kit.start(code, batch=[3, LONG_MS])
        container.give(lease_of([(0,), (1,), (2,)]))
        await begun(kit)
        container.lower_limit(1, 0, True)
        assert await exited(kit) == ("cancelled", [])
        assert [kit.events.failure(i) for i in range(3)] == ["cancelled"] * 3


#: The first batch holds up the loop; it ends by itself when there is a file.
BLOCKING = GATED.replace("def f", "async def f")


async def test_a_cancelled_input_that_waits_behind_a_blocked_loop_costs_no_container() -> None:
    async with containers(kill_grace_s=0.2) as kit:
        container = await kit.start(BLOCKING, batch=[1, 0])
        path = str(kit.folder / "go")
        container.give(lease_of([(0, path)], lease_id=1))
        await begun(kit)
        container.give(lease_of([(1, path)], lease_id=2, start=1))
        container.lower_limit(2, 0, True)
        await let_pass(0.6)
        make_file(kit.folder / "go")
        await kit.outputs(2)
        assert kit.events.value(0) == 0
        assert kit.events.failure(1) == "cancelled"
        assert not kit.events.exits


@BOTH_GATED
async def test_the_time_of_a_batch_counts_from_when_it_runs(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, batch=[3, 800], timeout=0.5)
        container.give(lease_of([(0, "/absent"), (1, "/absent")]))
        await begun(kit)
        assert not kit.events.outputs, "it waited for longer than the timeout"
        await kit.outputs(2)
        assert [kit.events.failure(i) for i in range(2)] == ["timeout"] * 2
        assert not kit.events.exits


async def test_a_container_told_to_stop_runs_a_batch_that_waits_at_once() -> None:
    async with containers() as kit:
        container = await kit.start(SYNC, batch=[3, LONG_MS])
        container.give(lease_of([(0, 0), (1, 1)]))
        container.stop(kill=False)
        assert await exited(kit) == ("stopped", [])
        assert kit.events.value(1) == (1, 1, [0, 1])


async def test_a_crash_names_the_inputs_of_the_batch_and_not_those_that_wait() -> None:
    async with containers() as kit:
        code = "import ctypes\ndef f(xs): ctypes.string_at(0)\n"
        container = await kit.start(code, batch=[2, LONG_MS])
        container.give(lease_of([(0,)], lease_id=1))
        container.give(lease_of([(1,), (2,)], lease_id=2, start=1))
        assert await exited(kit) == ("crash", [(1, 0), (2, 1)])


# --- the rule itself ------------------------------------------------------------------------------

Step = tuple[str, float]


@given(
    st.integers(1, 4), st.sampled_from([0.0, 1.0]), st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["add", "drop", "end", "pass"]), st.floats(0, 2))),
)  # fmt: skip
def test_no_input_waits_longer_than_it_must(
    size_max: int, wait_s: float, running_max: int, steps: list[Step]
) -> None:
    batcher: Batcher[int] = Batcher(size_max, wait_s, running_max)
    now, running = 0.0, 0
    came: list[tuple[int, float]] = []
    for number, (step, passed) in enumerate(steps):
        if step == "add":
            batcher.add("f", number, now)
            came.append((number, now))
        elif step == "drop" and came:
            batcher.drop("f", came.pop(len(came) // 2)[0])
        elif step == "end" and running:
            batcher.ended()
            running -= 1
        elif step == "pass":
            due = batcher.deadline()
            now = now + passed if due is None else max(now, min(due, now + passed))
        while batch := batcher.take(now):
            assert running < running_max
            is_due = came[0][1] + wait_s <= now
            assert len(batch) == min(size_max, len(came))
            assert is_due or len(batch) == size_max
            assert batch == [entry[0] for entry in came[: len(batch)]]
            del came[: len(batch)]
            running += 1
        if came and running < running_max:
            due = batcher.deadline()
            assert due is not None
            assert due > now
            assert len(came) < size_max
        else:
            assert batcher.deadline() is None
