"""Containers of classes: the instance, its hooks and its methods."""

from __future__ import annotations

import os
import signal
import traceback
from typing import Any

import cloudpickle
import pytest

from fanout import partial
from fanout.definition import Target
from fanout.exceptions import ContainerStartError, InvalidError
from fanout.protocol import messages as m
from fanout.remote_errors import decode_error
from tests.worker_kit import Kit, containers, lease_of, shapes

HEAD = "import asyncio, os, sys, time\nimport fanout\nfrom fanout.partial import *\n"
HEAD += "from fanout.partial import enter, exit, method\n"

COUNTER = (
    HEAD
    + """
class C:
    @enter()
    def load(self):
        self.count = 100
        print("entered")
    @method()
    def add(self, n):
        self.count += n
        return self.count
    @method()
    def items(self, n):
        yield from range(n)
    @exit()
    def leave(self):
        print("left with", self.count)
"""
)
COUNTER_SHAPES = shapes(add="sync", items="generator")


async def exit_of(kit: Kit) -> tuple[str, list[tuple[int, int]], dict[str, Any], bytes]:
    await kit.until(lambda: kit.events.exits, "the container is gone")
    return kit.events.exits[1]


# --- the instance and its methods -----------------------------------------------------------------


async def test_methods_share_one_instance_and_are_found_by_the_leases_name() -> None:
    async with containers() as kit:
        container = await kit.start(COUNTER, "C", methods=COUNTER_SHAPES)
        container.give(lease_of([(1,), (2,)], method="add"))
        container.give(lease_of([(3,)], lease_id=2, start=2, method="items", credit=10))
        container.give(lease_of([(4,)], lease_id=3, start=3, method="add"))
        await kit.outputs(4)
        assert [kit.events.value(i) for i in (0, 1, 3)] == [101, 103, 107]
        assert kit.events.items[2] == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("max_inputs", [1, 2])
async def test_a_method_that_is_not_there_is_an_error_of_its_inputs_alone(
    kind: str, max_inputs: int
) -> None:
    async with containers() as kit:
        code = COUNTER if kind == "sync" else COUNTER.replace("def add", "async def add")
        container = await kit.start(code, "C", methods=shapes(add=kind), max_inputs=max_inputs)
        container.give(lease_of([(1,), (1,)], method="subtract"))
        container.give(lease_of([(1,)], lease_id=2, start=2, method="add"))
        await kit.outputs(3)
        for index in (0, 1):
            error = kit.events.error(index)
            assert isinstance(error, InvalidError)
            assert "'subtract'" in str(error)
        assert kit.events.value(2) == 101


async def test_a_method_that_the_client_promises_and_the_class_lacks_fails_the_start() -> None:
    async with containers() as kit:
        await kit.launch(kit.define(COUNTER, "C", methods=shapes(absent="sync")))
        reason, _, _, payload = await exit_of(kit)
        assert reason == "start"
        assert "'absent'" in str(decode_error(payload))


async def test_a_class_of_an_app_gets_its_parameters() -> None:
    code = """
        app = fanout.App("a")
        @app.cls()
        class C:
            size: int = fanout.parameter()
            name: str = fanout.parameter(default="x")
            @enter()
            def load(self): self.loaded = self.name * self.size
            @method()
            def get(self): return self.loaded, self.size
        """
    async with containers() as kit:
        message = kit.define(
            HEAD + "\n".join(line[8:] for line in code.splitlines()),
            "C",
            extra={"parameters": {"size": 3, "name": "ab"}},
            methods=shapes(get="sync"),
        )
        container = await kit.launch(message)
        container.give(lease_of([()], method="get"))
        await kit.outputs(1)
        assert kit.events.value(0) == ("ababab", 3)


async def test_a_class_may_travel_by_value() -> None:
    class Local:
        @partial.enter()
        def load(self) -> None:
            self.base = 40

        @partial.method()
        def get(self, x: int) -> int:
            return self.base + x

    async with containers() as kit:
        target = Target("__main__", "Local", pickled=cloudpickle.dumps(Local))
        container = await kit.start("", target=target, methods=shapes(get="sync"))
        container.give(lease_of([(2,)], method="get"))
        await kit.outputs(1)
        assert kit.events.value(0) == 42


MIXED = (
    HEAD
    + """
class C:
    @enter()
    async def load(self):
        self.loop = asyncio.get_running_loop()
        self.ticks = 0
        self.task = asyncio.create_task(self.tick())
    async def tick(self):
        while True:
            self.ticks += 1
            await asyncio.sleep(0)
    @method()
    async def is_same_loop(self): return self.loop is asyncio.get_running_loop()
    @method()
    def sync(self, x):
        if x: print("running")
        end = time.monotonic() + 60 * x
        while time.monotonic() < end: pass
        return asyncio._get_running_loop() is None and self.loop.is_running()
    @method()
    def numbers(self, n):
        try:
            for i in range(n):
                yield i
                if i == 3: print("at three")
        finally:
            print("closed")
    @method()
    async def async_numbers(self, n):
        for i in range(n): yield i
    @exit()
    async def leave(self):
        print("ticks on", self.ticks > 0, self.loop is asyncio.get_running_loop())
"""
)
MIXED_SHAPES = shapes(
    is_same_loop="async", sync="sync", numbers="generator", async_numbers="async generator"
)


async def test_sync_methods_run_beside_the_loop_that_async_ones_and_hooks_share() -> None:
    async with containers() as kit:
        container = await kit.start(MIXED, "C", methods=MIXED_SHAPES, is_mixed=True)
        container.give(lease_of([()], method="is_same_loop"))
        container.give(lease_of([(0,)], lease_id=2, start=1, method="sync"))
        container.give(lease_of([(9,)], lease_id=3, start=2, method="numbers", credit=99))
        container.give(lease_of([(9,)], lease_id=4, start=3, method="async_numbers", credit=99))
        container.stop(kill=False)
        assert (await exit_of(kit))[0] == "stopped"
        assert (kit.events.value(0), kit.events.value(1)) == (True, True)
        expected = [(i, i) for i in range(9)]
        assert kit.events.items == {2: expected, 3: expected}
        assert kit.events.text().endswith("ticks on True True\n")


async def test_a_sync_method_beside_a_loop_can_be_stopped() -> None:
    async with containers() as kit:
        container = await kit.start(MIXED, "C", methods=MIXED_SHAPES, is_mixed=True)
        container.give(lease_of([(1,)], lease_id=3, method="sync"))
        await kit.until(lambda: "running" in kit.events.text(), "it runs")
        container.lower_limit(3, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        container.give(lease_of([()], lease_id=4, start=1, method="is_same_loop"))
        await kit.outputs(2)
        assert kit.events.value(1) is True


async def test_a_sync_generator_beside_a_loop_waits_for_credit_and_can_be_stopped() -> None:
    async with containers() as kit:
        container = await kit.start(MIXED, "C", methods=MIXED_SHAPES, is_mixed=True)
        container.give(lease_of([(9,)], lease_id=3, method="numbers", credit=2))
        await kit.until(lambda: kit.events.waits, "it waits")
        container.give_credit(3, 5)
        await kit.until(lambda: len(kit.events.waits) == 2, "it waits again")
        assert kit.events.items[0] == [(i, i) for i in range(5)]
        container.lower_limit(3, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        assert kit.events.text().endswith("closed\n")


async def test_a_sync_generator_beside_a_loop_that_never_waits_can_be_stopped() -> None:
    async with containers() as kit:
        container = await kit.start(MIXED, "C", methods=MIXED_SHAPES, is_mixed=True)
        container.give(lease_of([(1 << 40,)], lease_id=3, method="numbers", credit=1 << 40))
        await kit.until(lambda: "at three" in kit.events.text(), "it runs")
        container.lower_limit(3, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        assert not kit.events.exits


# --- enter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_enter_hooks_run_once_before_the_start_is_told_those_of_bases_first(
    kind: str,
) -> None:
    async with containers() as kit:
        await kit.start(
            HEAD
            + f"""
class Base:
    @enter()
    {kind} first(self): print("base")
class C(Base):
    @enter()
    {kind} second(self): print("one")
    @enter()
    {kind} third(self): print("two")
    @method()
    def f(self): pass
""",
            "C",
            methods=shapes(f="sync"),
        )
        assert kit.events.text() == "base\none\ntwo\n"
        assert {log.call_id for log in kit.events.logs} == {b""}


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_an_enter_hook_that_raises_fails_the_start_with_its_own_exception(kind: str) -> None:
    async with containers() as kit:
        code = f"""
class C:
    @enter()
    {kind} load(self):
        print("about to fail")
        raise ValueError("no weights")
    @method()
    def f(self): pass
    @exit()
    def leave(self): print("never")
"""
        await kit.launch(kit.define(HEAD + code, "C", methods=shapes(f="sync")))
        reason, running, _, payload = await exit_of(kit)
        assert (reason, running) == ("start", [])
        error = decode_error(payload)
        assert isinstance(error, ValueError)
        assert "user_code_0.py" in "".join(traceback.format_exception(error))
        assert kit.events.text() == "about to fail\n"
        assert not kit.events.started


async def test_an_enter_hook_that_ends_the_process_fails_the_start() -> None:
    async with containers() as kit:
        code = (
            "class C:\n  @enter()\n  def load(self): os._exit(4)\n  @method()\n  def f(self): 0\n"
        )
        await kit.launch(kit.define(HEAD + code, "C", methods=shapes(f="sync")))
        reason, _, details, payload = await exit_of(kit)
        assert (reason, payload) == ("start", b"")
        assert "exited with code 4 while it loaded" in details["text"]


@pytest.mark.parametrize(
    "body", ["  @enter()\n  def load(self): time.sleep(1000)\n", "  time.sleep(1000)\n"]
)
async def test_code_that_is_not_loaded_in_time_is_killed_and_the_limit_named(body: str) -> None:
    async with containers() as kit:
        code = f"class C:\n{body}  @method()\n  def f(self): 0\n"
        message = kit.define(HEAD + code, "C", methods=shapes(f="sync"), startup_timeout=0.5)
        container = await kit.launch(message)
        container.give(lease_of([()], method="f"))
        reason, running, _, payload = await exit_of(kit)
        assert (reason, running) == ("start", [])
        error = decode_error(payload)
        assert isinstance(error, ContainerStartError)
        assert "startup_timeout=0.5 s" in str(error)
        assert not kit.events.outputs


async def test_a_short_timeout_of_inputs_does_not_hold_for_the_start() -> None:
    async with containers() as kit:
        container = await kit.start("import time\ntime.sleep(0.3)\ndef f(x): return x", timeout=0.1)
        container.give(lease_of([(1,)]))
        await kit.outputs(1)
        assert kit.events.value(0) == 1


async def test_the_variables_of_a_function_come_last() -> None:
    async with containers() as kit:
        message = kit.define(
            "import os, sys\n"
            "def f(x): return os.environ['A'], os.environ['B'], sys.flags.dont_write_bytecode\n",
            variables={"A": "theirs", "B": "theirs"},
            extra={"env": {"A": "own", "PYTHONDONTWRITEBYTECODE": "1"}},
        )
        container = await kit.launch(message)
        container.give(lease_of([(0,)]))
        await kit.outputs(1)
        assert kit.events.value(0) == ("own", "theirs", 1)


# --- exit -----------------------------------------------------------------------------------------


async def test_exit_hooks_run_after_the_last_input_and_print_as_the_container() -> None:
    async with containers() as kit:
        container = await kit.start(COUNTER, "C", methods=COUNTER_SHAPES)
        container.give(lease_of([(i,) for i in range(5)], method="add"))
        container.stop(kill=False)
        reason, running, details, _ = await exit_of(kit)
        assert (reason, running, details["exit_code"]) == ("stopped", [], 0)
        assert len(kit.events.outputs) == 5
        last = kit.events.logs[-1]
        assert last.payload == b"left with 110\n"
        assert last.call_id == b""


async def test_exit_hooks_run_after_an_input_that_failed() -> None:
    async with containers() as kit:
        container = await kit.start(COUNTER, "C", methods=COUNTER_SHAPES)
        container.give(lease_of([("text",)], method="add"))
        container.stop(kill=False)
        await exit_of(kit)
        assert isinstance(kit.events.error(0), TypeError)
        assert kit.events.text().endswith("left with 100\n")


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_an_exit_hook_that_raises_is_shown_and_stops_no_other(kind: str) -> None:
    async with containers() as kit:
        code = f"""
class C:
    @method()
    {kind} f(self): pass
    @exit()
    {kind} one(self): raise SystemExit("first")
    @exit()
    {kind} two(self): raise ValueError("second")
    @exit()
    {kind} three(self): print("third")
"""
        shape = "async" if kind.startswith("async") else "sync"
        container = await kit.start(HEAD + code, "C", methods=shapes(f=shape))
        container.stop(kill=False)
        reason, _, details, _ = await exit_of(kit)
        assert (reason, details["exit_code"]) == ("stopped", 0)
        shown = kit.events.text(m.Source.STDERR)
        assert "SystemExit: first" in shown
        assert "ValueError: second" in shown
        assert "user_code_0.py" in shown
        assert "fanout_worker" not in shown
        assert kit.events.text(m.Source.STDOUT) == "third\n"


async def test_an_exit_hook_has_more_time_than_the_kill_grace() -> None:
    async with containers(kill_grace_s=0.1) as kit:
        code = COUNTER.replace('print("left', 'time.sleep(0.6); print("left')
        container = await kit.start(code, "C", methods=COUNTER_SHAPES)
        container.stop(kill=False)
        assert (await exit_of(kit))[2]["exit_code"] == 0
        assert kit.events.text().endswith("left with 100\n")


async def test_an_exit_hook_that_hangs_is_killed_after_its_grace() -> None:
    async with containers(kill_grace_s=0.1, exit_grace_s=0.5) as kit:
        code = COUNTER.replace('print("left', 'time.sleep(1000); print("left')
        container = await kit.start(code, "C", methods=COUNTER_SHAPES)
        container.stop(kill=False)
        reason, running, details, _ = await exit_of(kit)
        assert (reason, running, details["signal"]) == ("stopped", [], "SIGKILL")


async def test_exit_hooks_do_not_run_in_a_container_that_was_killed() -> None:
    async with containers() as kit:
        container = await kit.start(COUNTER, "C", methods=COUNTER_SHAPES)
        os.kill(container.pid, signal.SIGKILL)
        assert (await exit_of(kit))[0] == "crash"
        assert "left" not in kit.events.text()
