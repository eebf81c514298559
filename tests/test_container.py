"""One container as the daemon sees it: real processes, no daemon round them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import cloudpickle
import numpy
import pytest

from fanout.definition import Target
from fanout.exceptions import ContainerStartError, DeserializationError, InvalidError
from fanout.protocol import messages as m
from fanout.protocol.blob_store import FileBlobStore, blob_id_of
from fanout.remote_errors import decode_error
from fanout.serialization import decode_value, encode_args
from tests.conftest import environment, is_alive, poll_until
from tests.worker_kit import CALL, containers, lease_of, lengths_of, let_pass

NOOP = "def f(x): return x\n"
#: A loop in C that does not return to the interpreter for minutes.
C_LOOP = "def f(x): return sum(range(10**11)) if x else x\n"


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def make_file(path: str) -> None:
    Path(path).touch()


# --- inputs and outputs ---------------------------------------------------------------------------


async def test_a_lease_gives_its_outputs_in_order() -> None:
    async with containers() as kit:
        container = await kit.start("def f(x, y=1): return x * y\n")
        container.give(lease_of([(i, 3) for i in range(3000)]))
        await kit.outputs(3000)
        assert [kit.events.value(i) for i in range(3000)] == [3 * i for i in range(3000)]


async def test_two_leases_run_one_after_the_other() -> None:
    async with containers() as kit:
        container = await kit.start(NOOP)
        for number in range(20):
            container.give(lease_of([(number,)] * 10, lease_id=number, start=10 * number))
            if number % 2:
                await kit.outputs(10 * number + 10)
        assert [kit.events.value(10 * n) for n in range(20)] == list(range(20))


async def test_a_finished_output_leaves_before_the_next_input_runs_even_in_a_c_loop() -> None:
    async with containers() as kit:
        container = await kit.start(C_LOOP)
        container.give(lease_of([(0,), (0,), (1,)]))
        await kit.outputs(2)
        assert container.is_active
        assert sorted(kit.events.outputs) == [0, 1]


async def test_an_exception_arrives_as_its_own_type_with_the_users_frames_only() -> None:
    async with containers() as kit:
        container = await kit.start("def f(x): return 1 // x\n")
        container.give(lease_of([(1,), (0,), (2,)]))
        await kit.outputs(3)
        error = kit.events.error(1)
        assert isinstance(error, ZeroDivisionError)
        assert "user_code_0.py" in shown(error)
        assert "fanout_worker" not in shown(error)
        assert kit.events.value(2) == 0


@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()"])
async def test_what_would_end_a_process_ends_only_the_input(raised: str) -> None:
    async with containers() as kit:
        container = await kit.start(f"def f(x):\n  if x: raise {raised}\n")
        container.give(lease_of([(1,), (0,)]))
        await kit.outputs(2)
        assert type(kit.events.error(0)).__name__ == raised.partition("(")[0]
        assert kit.events.value(1) is None


async def test_an_input_that_cannot_be_unpickled_is_its_own_error_alone() -> None:
    async with containers() as kit:
        container = await kit.start(NOOP)
        parts = [encode_args((1,), None)[0], b"\0not a pickle", encode_args((2,), None)[0]]
        container.give(m.Lease(1, 1, CALL, 0, lengths_of(parts), [], 0, 0, "", b"".join(parts)))
        await kit.outputs(3)
        assert isinstance(kit.events.error(1), DeserializationError)
        assert kit.events.value(2) == 2


async def test_a_value_that_cannot_be_pickled_is_its_own_error_alone() -> None:
    async with containers() as kit:
        container = await kit.start("import threading\ndef f(x): return threading.Lock()\n")
        container.give(lease_of([(1,), (2,)]))
        await kit.outputs(2)
        assert "cannot be pickled" in str(kit.events.error(1))


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ("async def g(): pass\ndef f(x): return g()\n", "async def"),
        ("def f(x): return (i for i in range(x))\n", "is_generator=True"),
    ],
)
async def test_a_function_declared_wrongly_is_told_how_to_declare_it(body: str, hint: str) -> None:
    async with containers() as kit:
        container = await kit.start(body)
        container.give(lease_of([(1,)]))
        await kit.outputs(1)
        error = kit.events.error(0)
        assert isinstance(error, InvalidError)
        assert hint in str(error)


async def test_large_outputs_and_small_ones_stay_in_order() -> None:
    async with containers() as kit:
        container = await kit.start("def f(n): return 'x' * n\n")
        sizes = [3, 900_000, 5, 300_000, 300_000, 0, 900_000]
        container.give(lease_of([(size,) for size in sizes]))
        await kit.outputs(len(sizes))
        assert [index for _, index in kit.events.order] == list(range(len(sizes)))
        assert [len(kit.events.value(i)) for i in range(len(sizes))] == sizes


async def test_large_buffers_come_as_private_mappings_and_go_as_blobs() -> None:
    async with containers() as kit:
        container = await kit.start("def f(a):\n  a += 1\n  return a\n")
        store = FileBlobStore(kit.folder / "blobs")
        array = numpy.arange(300_000, dtype="int64")
        data, buffers = encode_args((array,), None)
        ids = [blob_id_of(buffer) for buffer in buffers]
        for blob_id, buffer in zip(ids, buffers, strict=True):
            store.put(blob_id, buffer)
        blobs = [(0, ids), (1, ids)]
        container.give(m.Lease(1, 1, CALL, 0, lengths_of([data] * 2), blobs, 0, 0, "", data * 2))
        await kit.outputs(2)
        for index in (0, 1):
            _, encoded = kit.events.outputs[index]
            held = [store.buffer(blob_id) for blob_id in kit.events.output_blobs[index]]
            result = decode_value(encoded, held)
            assert (result == array + 1).all(), "a change of one input was seen by another"
        assert not list((kit.folder / "blobs").glob("*.part"))


async def test_the_input_in_progress_and_container_are_known_to_user_code() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            from fanout import context
            def f(x):
                now = context.current_input.get()
                return now.index, now.lease_id, context.container.container_id
            """
        )
        container.give(lease_of([(0,)] * 3, start=40, lease_id=9))
        await kit.outputs(3)
        assert [kit.events.value(i) for i in (40, 41, 42)] == [(i, 9, 1) for i in (40, 41, 42)]


# --- logs -----------------------------------------------------------------------------------------


async def test_what_is_printed_carries_its_input_and_arrives_before_the_output() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import os, subprocess, sys
            def f(x):
                print("out", x)
                print("err", x, file=sys.stderr)
                os.write(1, b"raw\\n")
            """
        )
        container.give(lease_of([(i,) for i in range(20)]))
        await kit.outputs(20)
        assert kit.events.text(m.Source.STDERR) == "".join(f"err {i}\n" for i in range(20))
        for index in range(20):
            tagged = [x for x in kit.events.logs if x.index == index and b"out" in x.payload]
            assert tagged, f"no text of input {index}"
            assert tagged[0].call_id == CALL
            order = kit.events.order
            assert order.index(("log", index)) < order.index(("output", index))
        assert kit.events.text().count("raw\n") == 20


async def test_text_without_a_newline_leaves_with_flush_or_with_the_output() -> None:
    async with containers() as kit:
        code = "import time\ndef f(x):\n  print('a', end='', flush=x)\n  time.sleep(100 * x)\n"
        container = await kit.start(code)
        container.give(lease_of([(False,)]))
        await kit.outputs(1)
        assert kit.events.text() == "a"
        container.give(lease_of([(True,)], lease_id=2, start=1))
        await kit.until(lambda: kit.events.text() == "aa", "the flushed text")
        assert len(kit.events.outputs) == 1


async def test_text_of_processes_that_user_code_starts_is_seen_before_the_output() -> None:
    async with containers() as kit:
        container = await kit.start(
            "import subprocess\ndef f(x): subprocess.run(['echo', 'from echo'])\n"
        )
        container.give(lease_of([(0,)]))
        await kit.outputs(1)
        assert kit.events.text() == "from echo\n"


async def test_a_process_that_prints_without_end_is_cut_with_a_count_and_stops_nobody() -> None:
    async with containers() as kit:
        container = await kit.start("def f(x):\n  for _ in range(400): print('y' * 10000)\n")
        container.give(lease_of([(0,), (0,)]))
        await kit.outputs(2)
        container.stop(kill=False)
        await kit.until(lambda: kit.events.exits, "the container left")
        assert len(kit.events.text(m.Source.STDOUT)) < 3 << 20
        assert "bytes of output were dropped" in kit.events.text(m.Source.SYSTEM)


async def test_a_forked_child_of_user_code_cannot_break_the_channel() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import os
            def f(x):
                pid = os.fork()
                if pid == 0:
                    for i in range(50): print(f"child {i}", flush=True)
                    os._exit(0)
                for i in range(50): print("parent", i)
                os.waitpid(pid, 0)
                return x
            """
        )
        container.give(lease_of([(i,) for i in range(5)]))
        await kit.outputs(5)
        assert [kit.events.value(i) for i in range(5)] == list(range(5))
        assert kit.events.text().count("child 49") == 5


# --- crashes --------------------------------------------------------------------------------------


async def test_a_crash_loses_no_finished_output_and_names_the_input_that_ran() -> None:
    async with containers() as kit:
        container = await kit.start(
            "import os, signal\ndef f(x):\n  if x == 700: os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        container.give(lease_of([(i,) for i in range(1000)], lease_id=5))
        await kit.until(lambda: kit.events.exits, "the container died")
        assert sorted(kit.events.outputs) == list(range(700))
        reason, running, details, _ = kit.events.exits[1]
        assert (reason, running) == ("crash", [(5, 700)])
        assert details["signal"] == "SIGKILL"
        assert details["peak_memory_mib"] > 0


async def test_a_segmentation_fault_is_named() -> None:
    async with containers() as kit:
        container = await kit.start("import ctypes\ndef f(x): ctypes.string_at(0)\n")
        container.give(lease_of([(0,)]))
        await kit.until(lambda: kit.events.exits, "the container died")
        reason, running, details, _ = kit.events.exits[1]
        assert (reason, running, details["signal"]) == ("crash", [(1, 0)], "SIGSEGV")
        assert "Segmentation fault" in kit.events.text(), "the interpreter's own report is shown"


async def test_a_death_between_inputs_charges_nobody() -> None:
    async with containers() as kit:
        container = await kit.start(NOOP)
        container.give(lease_of([(0,)]))
        await kit.outputs(1)
        os.kill(container.pid, signal.SIGKILL)
        await kit.until(lambda: kit.events.exits, "the container died")
        assert kit.events.exits[1][:2] == ("crash", [])


async def test_an_exit_by_user_code_is_a_crash_with_its_code() -> None:
    async with containers() as kit:
        container = await kit.start("import os\ndef f(x): os._exit(7)\n")
        container.give(lease_of([(0,)]))
        await kit.until(lambda: kit.events.exits, "the container died")
        reason, running, details, _ = kit.events.exits[1]
        assert (reason, running, details["exit_code"]) == ("crash", [(1, 0)], 7)


async def test_code_that_writes_over_the_shared_memory_ends_only_its_container() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import mmap, os
            def f(x):
                for fd in map(int, os.listdir("/proc/self/fd")):
                    try:
                        if "fanout-container" in os.readlink(f"/proc/self/fd/{fd}"):
                            m = mmap.mmap(fd, 4096)
                            m[:] = os.urandom(4096)
                    except OSError:
                        pass
            """
        )
        container.give(lease_of([(0,)] * 10))
        await kit.until(lambda: kit.events.exits, "the container was ended")
        assert kit.events.exits[1][0] == "crash"


async def test_what_a_dead_container_started_is_killed_too() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import os, subprocess
            def f(path):
                child = subprocess.Popen(["sleep", "1000"], process_group=0)
                with open(path, "w") as file: file.write(str(child.pid))
                os._exit(1)
            """
        )
        path = kit.folder / "pid"
        container.give(lease_of([(str(path),)]))
        await kit.until(lambda: kit.events.exits, "the container died")
        pid = int(path.read_text())
        poll_until(lambda: not is_alive(pid), "its child is gone")


# --- stopping code --------------------------------------------------------------------------------


async def test_an_input_that_runs_too_long_is_interrupted_and_the_next_ones_run() -> None:
    async with containers() as kit:
        container = await kit.start(
            "import time\ndef f(x):\n  while x: time.sleep(0.01)\n  return x\n", timeout=0.2
        )
        container.give(lease_of([(0,), (1,), (0,)]))
        await kit.outputs(3)
        assert kit.events.failure(1) == "timeout"
        assert kit.events.value(2) == 0
        assert not kit.events.exits


async def test_a_c_loop_that_runs_too_long_is_killed_and_its_output_says_why() -> None:
    async with containers(kill_grace_s=0.2) as kit:
        container = await kit.start(C_LOOP, timeout=0.2)
        container.give(lease_of([(0,), (1,), (0,)]))
        await kit.until(lambda: kit.events.exits, "the container was killed")
        assert kit.events.value(0) == 0
        assert kit.events.failure(1) == "timeout"
        assert kit.events.exits[1][:2] == ("timeout", [])
        assert 2 not in kit.events.outputs


async def test_a_timeout_that_code_swallows_is_a_timeout_all_the_same() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import time
            def f(x):
                try:
                    time.sleep(100)
                except BaseException:
                    return "swallowed"
            """,
            timeout=0.1,
        )
        container.give(lease_of([(0,)]))
        await kit.outputs(1)
        assert kit.events.failure(0) == "timeout"


async def test_a_cancel_interrupts_what_runs_and_takes_the_rest_back() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import time
            def f(x):
                if x:
                    print("running")
                    time.sleep(100)
            """
        )
        container.give(lease_of([(0,), (1,), (0,), (0,)], lease_id=3))
        await kit.until(lambda: "running" in kit.events.text(), "input 1 runs")
        container.lower_limit(3, 0, True)
        await kit.outputs(2)
        assert kit.events.failure(1) == "cancelled"
        assert kit.events.reclaimed == [(3, 2)]
        container.give(lease_of([(0,)], lease_id=4, start=50))
        await kit.outputs(3)
        assert sorted(kit.events.outputs) == [0, 1, 50]


async def test_the_tail_of_a_lease_can_be_taken_back() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import os
            def f(path):
                if path:
                    print("running")
                    while not os.path.exists(path): pass
            """
        )
        path = str(kit.folder / "go")
        container.give(lease_of([(path,)] + [("",)] * 9, lease_id=3))
        await kit.until(lambda: "running" in kit.events.text(), "input 0 runs")
        container.lower_limit(3, 2, False)
        await kit.until(lambda: kit.events.reclaimed, "the answer")
        assert kit.events.reclaimed == [(3, 3)]
        make_file(path)
        await kit.until(lambda: not container.is_active, "the rest ran")
        assert sorted(kit.events.outputs) == [0, 1, 2]


async def test_reclaiming_at_any_moment_neither_loses_nor_invents_an_input() -> None:
    async with containers() as kit:
        container = await kit.start("def f(x): return x\n")
        for lease_id in range(60):
            kit.events.outputs.clear()
            kit.events.reclaimed.clear()
            container.give(lease_of([(i,) for i in range(400)], lease_id=lease_id))
            for _ in range(lease_id % 12):
                await let_pass(0)
            was_over = not container.is_active
            container.lower_limit(lease_id, lease_id % 3, False)
            await kit.until(lambda: kit.events.reclaimed, "the answer")
            await kit.until(lambda: not container.is_active, "what is kept ran")
            stop = kit.events.reclaimed[0][1]
            count = len(kit.events.outputs)
            assert sorted(kit.events.outputs) == list(range(count))
            # Of a lease that had ended before, nothing is known any more.
            assert (stop, count) == ((0, 400) if was_over else (count, count))


async def test_a_container_told_to_stop_finishes_its_leases_first() -> None:
    async with containers() as kit:
        container = await kit.start(NOOP)
        container.give(lease_of([(i,) for i in range(500)]))
        container.stop(kill=False)
        await kit.until(lambda: kit.events.exits, "it left")
        assert len(kit.events.outputs) == 500
        assert kit.events.exits[1][:2] == ("stopped", [])


# --- starting -------------------------------------------------------------------------------------


async def test_code_that_cannot_be_loaded_is_told_as_the_users_own_exception() -> None:
    async with containers() as kit:
        await kit.launch(kit.define("raise ValueError('in the module')\n"))
        await kit.until(lambda: kit.events.exits, "it failed")
        reason, _, _, payload = kit.events.exits[1]
        assert reason == "start"
        error = decode_error(payload)
        assert isinstance(error, ValueError)
        assert "user_code_0.py" in shown(error)


async def test_a_process_that_dies_while_it_loads_gives_no_exception() -> None:
    async with containers() as kit:
        await kit.launch(kit.define("import os\nos._exit(3)\n"))
        await kit.until(lambda: kit.events.exits, "it failed")
        reason, _, details, payload = kit.events.exits[1]
        assert (reason, payload) == ("start", b"")
        assert "exited with code 3 while it loaded" in details["text"]


async def test_a_missing_function_is_named() -> None:
    async with containers() as kit:
        await kit.launch(kit.define("x = 1\n", "absent"))
        await kit.until(lambda: kit.events.exits, "it failed")
        error = decode_error(kit.events.exits[1][3])
        assert isinstance(error, ContainerStartError)
        assert "'absent'" in str(error)


async def test_a_missing_interpreter_is_named() -> None:
    async with containers() as kit:
        message = kit.define(NOOP)
        message.payload = bytes(message.payload).replace(
            sys.executable.encode(), b"/" + b"x" * (len(sys.executable) - 1)
        )
        await kit.launch(message)
        assert "/xxx" in str(decode_error(kit.events.exits[1][3]))


async def test_a_script_is_loaded_under_its_own_name_with_main_as_alias() -> None:
    async with containers() as kit:
        script = kit.folder / "script.py"
        script.write_text(
            "class Point: pass\n"
            "def f(x):\n"
            "  import __main__, script\n"
            "  return __name__, __main__ is script, __main__.Point is Point, type(x).__name__\n"
            "if __name__ == '__main__': raise SystemExit('the guard did not hold')\n"
        )
        container = await kit.start("", target=Target("script", "f", file=str(script)))
        container.give(lease_of([(1,)]))
        await kit.outputs(1)
        assert kit.events.value(0) == ("script", True, True, "int")


async def test_a_function_may_travel_by_value() -> None:
    async with containers() as kit:
        offset = 5
        pickled = cloudpickle.dumps(lambda x: x + offset)
        container = await kit.start("", target=Target("__main__", "<lambda>", pickled=pickled))
        container.give(lease_of([(1,)]))
        await kit.outputs(1)
        assert kit.events.value(0) == 6


async def test_variables_of_the_environment_hold_in_the_container() -> None:
    async with containers() as kit:
        code = (
            "import os, sys\ndef f(x): return os.environ['COLOUR'], sys.flags.dont_write_bytecode\n"
        )
        variables = {"COLOUR": "green", "PYTHONDONTWRITEBYTECODE": "1"}
        container = await kit.start(code, variables=variables)
        container.give(lease_of([(0,)]))
        await kit.outputs(1)
        assert kit.events.value(0) == ("green", 1)


async def test_a_container_is_a_child_of_the_daemon_and_leads_its_own_session() -> None:
    async with containers() as kit:
        container = await kit.start(
            "import os\ndef f(x): return \\\n"
            "  os.getppid(), os.getsid(0), os.nice(0), os.listdir('/proc/self/fd')\n"
        )
        container.give(lease_of([(0,)]))
        await kit.outputs(1)
        parent, session, nice, descriptors = kit.events.value(0)
        assert (parent, session) == (os.getpid(), container.pid)
        assert nice >= os.nice(0)
        # Standard streams, channel, memory, and the folder that was listed.
        assert len(descriptors) == 6


def test_a_killed_daemon_leaves_neither_containers_nor_their_children(tmp_path: Path) -> None:
    """The daemon is another process here, which starts a container and says its pids."""
    script = tmp_path / "daemon.py"
    script.write_text(
        "import asyncio\n"
        "from tests.worker_kit import containers, lease_of\n"
        "CODE = '''\n"
        "import os, subprocess\n"
        "def f(x):\n"
        "    child = subprocess.Popen(['sleep', '1000'], process_group=0)\n"
        "    print(os.getpid(), child.pid)\n"
        "    child.wait()\n"
        "'''\n"
        "async def main():\n"
        "    async with containers() as kit:\n"
        "        container = await kit.start(CODE)\n"
        "        container.give(lease_of([(1,)]))\n"
        "        await kit.until(lambda: chr(10) in kit.events.text(), 'pids')\n"
        "        print(kit.events.text(), flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    daemon = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env=environment(TMPDIR=str(tmp_path)),
    )
    try:
        assert daemon.stdout is not None
        line = daemon.stdout.readline()
        pids = [int(word) for word in line.split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
    finally:
        daemon.kill()
        daemon.communicate()
    poll_until(lambda: not any(map(is_alive, pids)), f"{pids} are gone")
