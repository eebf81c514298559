"""Containers when things do not go smoothly: backpressure, full slots, damaged files, no forks."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import zipfile
from pathlib import Path

import pytest

from fanout.exceptions import ContainerStartError
from fanout.protocol import messages as m
from fanout.remote_errors import decode_error
from fanout_worker import shared
from fanout_worker.launcher import TEMPLATES_MAX
from tests.conftest import poll_until
from tests.worker_kit import containers, lease_of, let_pass

NOOP = "def f(x): return x\n"


def make_file(path: str) -> None:
    Path(path).touch()


async def test_leases_that_come_and_go_behind_a_long_one_leave_it_and_the_rest_alone() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import os
            def f(path):
                if path:
                    print("running")
                    while not os.path.exists(path): pass
                return path
            """
        )
        path = str(kit.folder / "go")
        container.give(lease_of([(path,), ("",)], lease_id=0))
        await kit.until(lambda: "running" in kit.events.text(), "input 0 runs")
        for number in range(1, 41):
            container.give(lease_of([("",)] * 3, lease_id=number, start=100 * number))
            container.lower_limit(number, 1 if number == 30 else 0, False)
            await kit.until(lambda: len(kit.events.reclaimed) == number, "the answer")  # noqa: B023
        container.give(lease_of([("",)] * 5, lease_id=99, start=9900))
        make_file(path)
        await kit.until(lambda: not container.is_active, "all that is left ran")
        assert sorted(kit.events.outputs) == [0, 1, 3000, *range(9900, 9905)]
        stops = [(n, 100 * n + (n == 30)) for n in range(1, 41)]
        assert kit.events.reclaimed == stops
        assert not kit.events.exits


async def test_a_paused_container_that_gives_inputs_back_keeps_what_it_has_finished() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            def f(path):
                if path: open(path, "w").close()
            """
        )
        container.set_paused(True)
        path = str(kit.folder / "done")
        container.give(lease_of([("",)] * 9 + [(path,)]))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, poll_until, lambda: os.path.exists(path), "inputs ran")
        container.lower_limit(1, 0, False)
        await kit.until(lambda: kit.events.reclaimed, "the answer")
        assert kit.events.reclaimed == [(1, 10)]
        container.set_paused(False)
        await kit.outputs(10)
        container.give(lease_of([("",)], lease_id=2, start=10))
        await kit.outputs(11)
        assert not kit.events.exits


@pytest.mark.parametrize("where", ["import", "call"])
async def test_a_thread_that_never_ends_does_not_keep_a_container(where: str) -> None:
    thread = "threading.Thread(target=threading.Event().wait).start()"
    at_import, at_call = (thread, "pass") if where == "import" else ("pass", thread)
    async with containers(kill_grace_s=60) as kit:
        container = await kit.start(f"import threading\n{at_import}\ndef f(x): {at_call}\n")
        container.give(lease_of([(1,)]))
        await kit.outputs(1)
        container.stop(kill=False)
        await kit.until(lambda: kit.events.exits, "it left")
        assert kit.events.exits[1][:2] == ("stopped", [])
        assert kit.events.exits[1][2]["exit_code"] == 0


async def test_a_container_that_cannot_leave_is_killed() -> None:
    code = "import atexit, time\natexit.register(time.sleep, 600)\n" + NOOP
    async with containers(kill_grace_s=0.2) as kit:
        container = await kit.start(code)
        container.give(lease_of([(1,)]))
        container.stop(kill=False)
        await kit.until(lambda: kit.events.exits, "it is gone")
        assert kit.events.value(0) == 1
        assert kit.events.exits[1][:2] == ("stopped", [])


async def test_a_paused_container_waits_and_loses_nothing() -> None:
    async with containers() as kit:
        # Each input takes longer than the daemon needs to look at its clock.
        code = "import time\ndef f(x):\n  time.sleep(0.06)\n  return b'x' * 200_000\n"
        container = await kit.start(code, timeout=0.3)
        container.set_paused(True)
        container.give(lease_of([(i,) for i in range(12)]))
        await let_pass(1.0)
        assert not kit.events.outputs
        container.set_paused(False)
        await kit.outputs(12)
        assert [kit.events.outputs[i][0] for i in range(12)] == [m.Status.VALUE] * 12
        assert shared.RING_SIZE_BYTES < 8 * 200_000, "the ring was too large for this test"


async def test_the_time_that_a_full_channel_takes_is_not_the_inputs_own() -> None:
    async with containers() as kit:
        code = "import time\ndef f(x):\n  print('x' * 2_000_000)\n  time.sleep(0.1)\n"
        container = await kit.start(code, timeout=0.4)
        container.set_paused(True)
        container.give(lease_of([(i,) for i in range(3)]))
        await let_pass(0.8)
        container.set_paused(False)
        await kit.outputs(3)
        assert [kit.events.outputs[i][0] for i in range(3)] == [m.Status.VALUE] * 3


async def test_a_damaged_archive_of_sources_is_told_as_an_exit() -> None:
    async with containers() as kit:
        message = kit.define(NOOP, sources="ab" * 32)
        folder = kit.folder / "blobs"
        with zipfile.ZipFile(folder / ("ab" * 32), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("code.py", "x = 1\n" * 1000)
        data = bytearray((folder / ("ab" * 32)).read_bytes())
        data[40:50] = b"\xff" * 10
        (folder / ("ab" * 32)).write_bytes(data)
        await kit.launch(message)
        await kit.until(lambda: kit.events.exits, "it failed")
        assert kit.events.exits[1][0] == "start"
        assert isinstance(decode_error(kit.events.exits[1][3]), ContainerStartError)


async def test_templates_that_are_starting_are_not_evicted() -> None:
    async with containers() as kit:
        count = TEMPLATES_MAX + 2
        messages = [
            kit.define(NOOP, variables={"PYTHONHASHSEED": str(number)}) for number in range(count)
        ]
        await asyncio.gather(*(kit.launch(message, n) for n, message in enumerate(messages)))
        await kit.until(lambda: len(kit.events.started) == count or kit.events.exits, "all start")
        assert not kit.events.exits
        assert len(kit.host.launcher.pids) <= TEMPLATES_MAX


async def test_a_template_that_cannot_fork_says_why() -> None:
    async with containers() as kit:
        await kit.start(NOOP)
        (template,) = kit.host.launcher.pids
        soft, hard = resource.prlimit(template, resource.RLIMIT_NOFILE)
        # It has no descriptor left for what comes with the next request.
        used = len(os.listdir(f"/proc/{template}/fd"))
        resource.prlimit(template, resource.RLIMIT_NOFILE, (used, hard))
        await kit.launch(kit.define(NOOP), container_id=2)
        await kit.until(lambda: 2 in kit.events.exits, "it is told")
        assert os.strerror(errno.EMFILE) in str(decode_error(kit.events.exits[2][3]))
        resource.prlimit(template, resource.RLIMIT_NOFILE, (soft, hard))
        await kit.start(NOOP, container_id=3)
