"""Containers that run several inputs at a time."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import threading
from functools import partial
from pathlib import Path

import numpy
import pytest

from fanout.exceptions import DeserializationError, ExecutionError, InputCancellation
from fanout.protocol import messages as m
from fanout.protocol.blob_store import FileBlobStore, blob_id_of
from fanout.serialization import decode_value, encode_args
from fanout_worker.runtime.threads import StopGate
from tests.conftest import poll_until
from tests.worker_kit import CALL, Kit, containers, lease_of, lengths_of, let_pass, shapes

HEAD = "import asyncio, os, threading, time\nfrom fanout import context\n"
#: Inputs that end when a file of their name is there; "meet": when all have come.
SYNC = (
    HEAD
    + """
def f(path):
    print("begun", path[-1:])
    while not os.path.exists(path): time.sleep(0.001)
    return path
"""
)
ASYNC = SYNC.replace("def f", "async def f").replace("time.sleep", "await asyncio.sleep")
BOTH = pytest.mark.parametrize("code", [SYNC, ASYNC], ids=["threads", "tasks"])
#: An input of the second kind does not stop before the container is killed.
C_LOOP = HEAD + "def f(x):\n  print('begun')\n  return sum(range(10**11)) if x else x\n"


def make_file(path: str) -> None:
    Path(path).touch()


def paths_of(kit: Kit, count: int) -> list[tuple[str]]:
    return [(str(kit.folder / f"go{i}"),) for i in range(count)]


async def all_begun(kit: Kit, count: int) -> None:
    await kit.until(lambda: kit.events.text().count("begun") >= count, f"{count} have begun")


async def exited(kit: Kit) -> tuple[str, list[tuple[int, int]]]:
    await kit.until(lambda: kit.events.exits, "the container is gone")
    reason, running, _, _ = kit.events.exits[1]
    return reason, sorted(running)


# --- inputs and outputs ---------------------------------------------------------------------------


@BOTH
async def test_all_inputs_of_all_leases_begin_at_once_and_end_in_any_order(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=6)
        paths = paths_of(kit, 6)
        container.give(lease_of(paths[:3], lease_id=1))
        container.give(lease_of(paths[3:5], lease_id=2, start=3))
        container.give(lease_of(paths[5:], lease_id=3, start=5))
        await all_begun(kit, 6)
        for index in (4, 0, 5, 2, 1, 3):
            make_file(paths[index][0])
            await kit.until(partial(kit.events.outputs.__contains__, index), "its output")
        assert [index for kind, index in kit.events.order if kind == "output"] == [4, 0, 5, 2, 1, 3]
        assert not container.is_active


async def test_async_functions_are_tasks_of_one_loop_and_sync_ones_named_daemon_threads() -> None:
    async with containers() as kit:
        code = """
class C:
    @enter()
    async def load(self): self.loop = asyncio.get_running_loop()
    @method()
    async def is_on_loop(self): return self.loop is asyncio.get_running_loop()
    @method()
    def thread(self):
        now = threading.current_thread()
        return now.name.rstrip("0123456789"), now.daemon, now is threading.main_thread()
    @method()
    def numbers(self, n): yield from range(n)
    @method()
    async def async_numbers(self, n):
        for i in range(n): yield i
"""
        kinds = shapes(
            is_on_loop="async", thread="sync", numbers="generator", async_numbers="async generator"
        )
        head = HEAD + "from fanout.partial import enter, method\n"
        container = await kit.start(head + code, "C", max_inputs=4, methods=kinds)
        container.give(lease_of([()], method="is_on_loop"))
        container.give(lease_of([()], lease_id=2, start=1, method="thread"))
        container.give(lease_of([(3,)], lease_id=3, start=2, method="numbers", credit=9))
        container.give(lease_of([(3,)], lease_id=4, start=3, method="async_numbers", credit=9))
        await kit.outputs(4)
        assert kit.events.value(0) is True
        assert kit.events.value(1) == ("fanout-input-", True, False)
        expected = [(i, i) for i in range(3)]
        assert kit.events.items == {2: expected, 3: expected}
        assert kit.events.outputs[3] == (m.Status.DONE, b"\x03")


@BOTH
async def test_many_leases_of_all_sizes_give_each_output_once(code: str) -> None:
    body = "\n  return x * 2\n" if code is SYNC else "\n  await asyncio.sleep(0)\n  return x * 2\n"
    async with containers() as kit:
        container = await kit.start(code.split("def f")[0] + "def f(x):" + body, max_inputs=50)
        start = 0
        for number in range(120):
            count = number % 7 + 1
            inputs = [(i,) for i in range(start, start + count)]
            container.give(lease_of(inputs, lease_id=number, start=start))
            start += count
        await kit.outputs(start)
        assert [kit.events.value(i) for i in range(start)] == [2 * i for i in range(start)]


@BOTH
async def test_each_input_knows_itself_in_its_task_or_thread(code: str) -> None:
    pause = "await asyncio.sleep" if code is ASYNC else "time.sleep"
    async with containers() as kit:
        container = await kit.start(
            code.split("def f")[0]
            + f"def f(x):\n  now = context.current_input.get()\n  {pause}(0.01)\n"
            + "  return now.index, now.lease_id, now is context.current_input.get()\n",
            max_inputs=20,
        )
        container.give(lease_of([(0,)] * 20, start=40, lease_id=9))
        await kit.outputs(20)
        assert [kit.events.value(i) for i in range(40, 60)] == [(i, 9, True) for i in range(40, 60)]


@BOTH
async def test_an_error_is_that_of_its_input_alone(code: str) -> None:
    async with containers() as kit:
        name = "async def" if code is ASYNC else "def"
        container = await kit.start(
            f"import threading\n{name} f(x):\n"
            "  if x == 1: raise SystemExit(3)\n  return threading.Lock() if x == 2 else x\n",
            max_inputs=9,
        )
        parts = [encode_args((i,), None)[0] for i in range(3)] + [b"\0not a pickle"]
        container.give(m.Lease(1, 1, CALL, 0, lengths_of(parts), [], 0, 0, "", b"".join(parts)))
        container.give(lease_of([(7,)], lease_id=2, start=4))
        await kit.outputs(5)
        assert (kit.events.value(0), kit.events.value(4)) == (0, 7)
        assert isinstance(kit.events.error(1), SystemExit)
        assert "cannot be pickled" in str(kit.events.error(2))
        assert isinstance(kit.events.error(3), DeserializationError)


async def test_large_buffers_and_large_outputs_travel_as_ever() -> None:
    async with containers() as kit:
        container = await kit.start(
            "def f(a):\n  a += 1\n  return a, 'x' * 900_000\n", max_inputs=4
        )
        store = FileBlobStore(kit.folder / "blobs")
        array = numpy.arange(300_000, dtype="int64")
        data, buffers = encode_args((array,), None)
        ids = [blob_id_of(buffer) for buffer in buffers]
        for blob_id, buffer in zip(ids, buffers, strict=True):
            store.put(blob_id, buffer)
        blobs = [(i, ids) for i in range(4)]
        container.give(m.Lease(1, 1, CALL, 0, lengths_of([data] * 4), blobs, 0, 0, "", data * 4))
        await kit.outputs(4)
        for index in range(4):
            held = [store.buffer(blob_id) for blob_id in kit.events.output_blobs[index]]
            result, text = decode_value(kit.events.outputs[index][1], held)
            assert (result == array + 1).all(), "a change of one input was seen by another"
            assert len(text) == 900_000
        assert not list((kit.folder / "blobs").glob("*.part"))


@pytest.mark.parametrize("batch", [None, [1, 0]])
async def test_inputs_for_which_there_is_no_thread_end_and_later_ones_run(
    batch: list[int] | None,
) -> None:
    # While the first input runs, threads are to have stacks that are larger than any memory.
    code = """
def f(paths):
    threading.stack_size(1 << 46)
    print("begun")
    while not os.path.exists(paths[0] if isinstance(paths, list) else paths): time.sleep(0.001)
    threading.stack_size(0)
    return paths
"""
    async with containers() as kit:
        container = await kit.start(HEAD + code, max_inputs=3, batch=batch)
        paths = paths_of(kit, 4)
        container.give(lease_of(paths[:1]))
        await all_begun(kit, 1)
        container.give(lease_of(paths[1:3], lease_id=2, start=1))
        await kit.outputs(2)
        for index in (1, 2):
            error = kit.events.error(index)
            assert isinstance(error, ExecutionError)
            assert "no thread could be started" in str(error)
        make_file(paths[0][0])
        await kit.outputs(3)
        assert kit.events.value(0) == paths[0][0]
        container.give(lease_of(paths[3:], lease_id=3, start=3))
        make_file(paths[3][0])
        await kit.outputs(4)
        assert kit.events.value(3) == paths[3][0]
        container.stop(kill=False)
        assert await exited(kit) == ("stopped", [])


# --- generators -----------------------------------------------------------------------------------

GENERATOR = (
    HEAD
    + """
def f(n):
    try:
        for i in range(n): yield i
    finally: print("closed")
"""
)
ASYNC_GENERATOR = GENERATOR.replace("def f", "async def f")
GENERATORS = pytest.mark.parametrize("code", [GENERATOR, ASYNC_GENERATOR], ids=["sync", "async"])


@GENERATORS
async def test_each_generator_has_credit_of_its_own(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=3, is_generator=True)
        for number, credit in enumerate((2, 100, 3)):
            container.give(lease_of([(5,)], lease_id=number, start=number, credit=credit))
        await kit.until(
            lambda: len(kit.events.outputs) == 1 and len(kit.events.waits) == 1, "two wait"
        )
        assert [len(kit.events.items[i]) for i in range(3)] == [2, 5, 3]
        container.give_credit(0, 100)
        await kit.until(lambda: 0 in kit.events.outputs, "the first goes on")
        container.give_credit(2, 4)
        await kit.until(lambda: len(kit.events.items[2]) == 4, "one more item")
        container.give_credit(2, 5)
        await kit.outputs(3)
        assert all(kit.events.items[i] == [(k, k) for k in range(5)] for i in range(3))


@GENERATORS
async def test_waiting_for_credit_is_told_only_when_all_that_runs_waits(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=3, is_generator=True)
        container.give(lease_of([(5,)], lease_id=1, credit=1))
        await kit.until(lambda: kit.events.waits == [(1, 1)], "the only one waits")
        container.give(lease_of([(2,)], lease_id=2, start=1, credit=1))
        await kit.until(lambda: len(kit.events.waits) == 2, "both wait")
        container.give_credit(2, 9)
        await kit.until(lambda: len(kit.events.waits) == 3, "told anew, as the other has ended")
        assert kit.events.waits[2] == (1, 1)


@GENERATORS
async def test_a_generator_that_runs_again_skips_what_is_there(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=3, is_generator=True)
        container.give(lease_of([(6,)], credit=10, skip=4))
        await kit.outputs(1)
        assert kit.events.items[0] == [(4, 4), (5, 5)]


@GENERATORS
async def test_a_generator_can_be_cancelled_while_it_waits_and_its_time_stands_still(
    code: str,
) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=3, is_generator=True, timeout=0.3)
        container.give(lease_of([(6,)], credit=1, lease_id=2))
        await kit.until(lambda: kit.events.waits, "it waits")
        await let_pass(0.5)
        container.give_credit(2, 2)
        await kit.until(lambda: len(kit.events.waits) == 2, "it waits again")
        container.lower_limit(2, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        assert kit.events.text() == "closed\n"


@GENERATORS
async def test_time_that_a_generator_waits_for_credit_is_not_its_own(code: str) -> None:
    pause = "await asyncio.sleep" if code is ASYNC_GENERATOR else "time.sleep"
    async with containers() as kit:
        code = code.replace("yield i", f"yield {pause}(0.1)")
        container = await kit.start(code, max_inputs=3, is_generator=True, timeout=0.5)
        container.give(lease_of([(3,)], credit=1, lease_id=2))
        await kit.until(lambda: kit.events.waits, "it waits")
        await let_pass(0.6)
        container.give_credit(2, 9)
        await kit.outputs(1)
        assert kit.events.outputs[0] == (m.Status.DONE, b"\x03")


# --- stopping code --------------------------------------------------------------------------------


@BOTH
async def test_a_reclaim_takes_nothing_back_and_a_cancel_stops_what_still_runs(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=6)
        paths = paths_of(kit, 6)
        container.give(lease_of(paths[:4], lease_id=3))
        container.give(lease_of(paths[4:], lease_id=4, start=4))
        await all_begun(kit, 6)
        container.lower_limit(3, 0, False)
        assert kit.events.reclaimed == [(3, 4)]
        make_file(paths[1][0])
        await kit.outputs(1)
        container.lower_limit(3, 0, True)
        assert kit.events.reclaimed == [(3, 4), (3, 4)]
        await kit.outputs(4)
        assert [kit.events.failure(i) for i in (0, 2, 3)] == ["cancelled"] * 3
        for path in paths[4:]:
            make_file(path[0])
        await kit.outputs(6)
        assert kit.events.value(4) == paths[4][0]
        assert not kit.events.exits


async def test_a_lease_that_is_cancelled_before_the_start_is_given_back_whole() -> None:
    async with containers() as kit:
        message = kit.define("import time\ntime.sleep(0.3)\ndef f(x): return x", max_inputs=3)
        container = await kit.launch(message)
        container.give(lease_of([(1,), (2,)], lease_id=3, start=8))
        container.give(lease_of([(3,)], lease_id=4))
        container.lower_limit(3, 0, True)
        assert kit.events.reclaimed == [(3, 8)]
        container.stop(kill=False)
        assert (await exited(kit))[0] == "stopped"
        assert sorted(kit.events.outputs) == [0]


async def test_async_code_is_cancelled_and_code_in_threads_gets_an_input_cancellation() -> None:
    async with containers() as kit:
        code = """
class C:
    @method()
    async def tasks(self):
        print("begun")
        try: await asyncio.sleep(100)
        except BaseException as error: print(type(error).__name__); raise
    @method()
    def threads(self):
        print("begun")
        try:
            while True: time.sleep(0.001)
        except BaseException as error: print(type(error).__name__); raise
"""
        head = HEAD + "from fanout.partial import method\n"
        kinds = shapes(tasks="async", threads="sync")
        container = await kit.start(head + code, "C", max_inputs=4, methods=kinds)
        container.give(lease_of([()], lease_id=1, method="tasks"))
        container.give(lease_of([()], lease_id=2, start=1, method="threads"))
        await all_begun(kit, 2)
        container.lower_limit(1, 0, True)
        container.lower_limit(2, 0, True)
        await kit.outputs(2)
        assert [kit.events.failure(i) for i in (0, 1)] == ["cancelled"] * 2
        assert {"CancelledError", "InputCancellation"} <= set(kit.events.text().split())


@BOTH
async def test_only_the_input_that_runs_too_long_is_stopped(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=6, timeout=0.5)
        paths = paths_of(kit, 2)
        container.give(lease_of(paths[:1]))
        await let_pass(0.3)
        container.give(lease_of(paths[1:], lease_id=2, start=1))
        await kit.outputs(1)
        assert kit.events.failure(0) == "timeout"
        make_file(paths[1][0])
        await kit.outputs(2)
        assert kit.events.value(1) == paths[1][0]


async def test_a_pause_is_not_the_time_of_an_input_that_began_in_it() -> None:
    async with containers() as kit:
        code = SYNC.replace("    while", "    open(path + '.begun', 'w').close()\n    while")
        container = await kit.start(code, max_inputs=4, timeout=1.0)
        container.set_paused(True)
        ((path,),) = paths_of(kit, 1)
        container.give(lease_of([(path,)]))
        loop = asyncio.get_running_loop()
        has_begun = partial(os.path.exists, path + ".begun")
        await loop.run_in_executor(None, poll_until, has_begun, "it runs")
        await let_pass(1.2)
        container.set_paused(False)
        # So that the daemon looks at its clock meanwhile.
        await let_pass(0.3)
        make_file(path)
        await kit.outputs(1)
        assert kit.events.value(0) == path


@BOTH
async def test_a_timeout_that_code_swallows_is_a_timeout_all_the_same(code: str) -> None:
    swallowing = code.replace("    while", "    try:\n     while").replace(
        "    return path", "    except BaseException: pass\n    return path"
    )
    async with containers() as kit:
        container = await kit.start(swallowing, max_inputs=2, timeout=0.2)
        container.give(lease_of(paths_of(kit, 1)))
        await kit.outputs(1)
        assert kit.events.failure(0) == "timeout"
        assert not kit.events.exits


async def test_an_exception_meant_for_one_input_never_falls_into_another() -> None:
    """Inputs end just when they are stopped, and their threads take others at once."""
    async with containers() as kit:
        container = await kit.start(
            HEAD + "def f(x):\n  end = time.perf_counter() + x\n"
            "  while time.perf_counter() < end: pass\n  return x\n",
            max_inputs=4,
        )
        count = 300
        for number in range(count):
            container.give(lease_of([(0.0003,)], lease_id=2 * number, start=2 * number))
            await let_pass(0)
            container.lower_limit(2 * number, 0, True)
            container.give(lease_of([(0.0001,)], lease_id=2 * number + 1, start=2 * number + 1))
            await kit.outputs(2 * number)
        await kit.outputs(2 * count)
        assert {kit.events.value(2 * i + 1) for i in range(count)} == {0.0001}
        ends = {kit.events.outputs[2 * i][0] for i in range(count)}
        assert ends <= {m.Status.VALUE, m.Status.FAILURE}
        assert m.Status.FAILURE in ends


def test_a_stop_is_raised_within_the_code_that_it_means_or_not_at_all() -> None:
    """The thread of the test is the one that runs inputs; another one stops each at some moment."""
    gates: queue.SimpleQueue[StopGate | None] = queue.SimpleQueue()

    def stop_them() -> None:
        while (gate := gates.get()) is not None:
            gate.ask()

    stopper = threading.Thread(target=stop_them)
    stopper.start()
    ends: list[str] = []
    try:
        for number in range(20_000):
            gate = StopGate()
            gates.put(gate)
            try:
                gate.run(partial(sum, range(number % 200)))
                ends.append("ended")
            except InputCancellation:
                ends.append("stopped")
    finally:
        gates.put(None)
        stopper.join()
    assert len(ends) == 20_000
    assert set(ends) == {"ended", "stopped"}


async def test_a_c_loop_is_killed_after_its_grace_and_the_others_go_back_uncharged() -> None:
    async with containers(kill_grace_s=0.3) as kit:
        container = await kit.start(
            C_LOOP.replace("x else x", "x else time.sleep(99)"), timeout=0.3, max_inputs=4
        )
        container.give(lease_of([(1,)], lease_id=5))
        await all_begun(kit, 1)
        await let_pass(0.25)
        container.give(lease_of([(1,), (0,)], lease_id=6, start=1))
        assert await exited(kit) == ("timeout", [])
        assert kit.events.failure(0) == "timeout"
        others = {index for index in kit.events.outputs if index != 0}
        assert all(kit.events.failure(index) == "timeout" for index in others)


async def test_what_is_cancelled_and_does_not_stop_ends_the_container_and_no_other_input() -> None:
    async with containers(kill_grace_s=0.2) as kit:
        code = "def f(x):\n  print('begun')\n  time.sleep(100)\n"
        container = await kit.start(HEAD + code, max_inputs=4)
        container.give(lease_of([(0,)], lease_id=1))
        container.give(lease_of([(0,), (0,)], lease_id=2, start=1))
        await all_begun(kit, 3)
        container.lower_limit(1, 0, True)
        assert await exited(kit) == ("cancelled", [])
        assert sorted(kit.events.outputs) == [0]
        assert kit.events.failure(0) == "cancelled"


async def test_an_input_cancelled_before_it_is_heard_to_run_has_its_grace_from_then() -> None:
    async with containers(kill_grace_s=0.2) as kit:
        code = "def f(path):\n  open(path, 'w').close()\n  return sum(range(10**11))\n"
        container = await kit.start(code, max_inputs=4)
        container.set_paused(True)
        path = str(kit.folder / "begun")
        container.give(lease_of([(path,)]))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, poll_until, lambda: os.path.exists(path), "it runs")
        container.lower_limit(1, 0, True)
        container.set_paused(False)
        assert await exited(kit) == ("cancelled", [])
        assert kit.events.failure(0) == "cancelled"


# --- crashes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crash", "name"),
    [("os.kill(os.getpid(), 9)", "SIGKILL"), ("ctypes.string_at(0)", "SIGSEGV")],
)
@BOTH
async def test_a_crash_names_all_inputs_that_ran_and_loses_none_that_ended(
    code: str, crash: str, name: str
) -> None:
    async with containers() as kit:
        crashing = code.replace(
            "    return path", f"    if path.endswith('3'): {crash}\n    return path"
        )
        container = await kit.start("import ctypes\n" + crashing, max_inputs=6)
        paths = paths_of(kit, 5)
        container.give(lease_of(paths[:3], lease_id=7))
        container.give(lease_of(paths[3:], lease_id=8, start=3))
        await all_begun(kit, 5)
        make_file(paths[1][0])
        await kit.outputs(1)
        make_file(paths[3][0])
        assert await exited(kit) == ("crash", [(7, 0), (7, 2), (8, 3), (8, 4)])
        assert kit.events.exits[1][2]["signal"] == name
        assert sorted(kit.events.outputs) == [1]


async def test_outputs_that_end_in_the_turn_of_a_crash_are_not_lost() -> None:
    async with containers() as kit:
        container = await kit.start(
            "import os\nasync def f(x):\n  if x == 9: os.kill(os.getpid(), 9)\n  return x\n",
            max_inputs=20,
        )
        container.give(lease_of([(i,) for i in range(20)], lease_id=7))
        assert await exited(kit) == ("crash", [(7, i) for i in range(9, 20)])
        assert sorted(kit.events.outputs) == list(range(9))


async def test_a_lease_that_the_container_has_not_read_did_not_run() -> None:
    async with containers() as kit:
        container = await kit.start(
            "import time\nasync def f(x):\n  print('begun')\n  time.sleep(60)\n", max_inputs=4
        )
        container.give(lease_of([(0,)], lease_id=1))
        await all_begun(kit, 1)
        container.give(lease_of([(0,)], lease_id=2, start=1))
        await let_pass(0.1)
        os.kill(container.pid, signal.SIGKILL)
        assert await exited(kit) == ("crash", [(1, 0)])


async def test_nonsense_on_the_channel_ends_the_container() -> None:
    async with containers() as kit:
        container = await kit.start(
            HEAD + "import gc\nfrom fanout_worker.runtime.runner import Channel\n"
            "from fanout_worker import channel as ch\n"
            "def f(x):\n  c = [o for o in gc.get_objects() if isinstance(o, Channel)][0]\n"
            "  c.send_frame(ch.OUTPUTS, [[1, 0, 77, 0, 0, 0, 0, []]])\n  time.sleep(60)\n",
            max_inputs=4,
        )
        container.give(lease_of([(0,)], lease_id=1))
        assert await exited(kit) == ("crash", [(1, 0)])
        assert "nonsense" in kit.events.exits[1][2]["text"]


# --- leaving --------------------------------------------------------------------------------------


@BOTH
async def test_a_container_told_to_stop_lets_its_inputs_end_and_runs_its_exit_hooks(
    code: str,
) -> None:
    kind = "async" if code is ASYNC else "sync"
    code += """
from fanout.partial import exit, method
class C:
    m = method()(f)
    @exit()
    def leave(self): print("left")
"""
    async with containers() as kit:
        code = code.replace("def f(path)", "def f(self, path)")
        container = await kit.start(code, "C", max_inputs=3, methods=shapes(m=kind))
        paths = paths_of(kit, 3)
        container.give(lease_of(paths, method="m"))
        await all_begun(kit, 3)
        container.stop(kill=False)
        for path in paths:
            make_file(path[0])
        assert (await exited(kit))[0] == "stopped"
        assert sorted(kit.events.outputs) == [0, 1, 2]
        assert kit.events.text().endswith("left\n")
        assert kit.events.logs[-1].call_id == b""
