"""What a user may count on, seen from outside: who waits for whom, how much is held, what stops."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import fanout
from fanout.exceptions import FunctionTimeoutError, InputCancelledError
from tests import behaviour_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster, is_alive, poll_until
from tests.engine_fixture import (
    KILL_GRACE_S,
    status,
    wait_until_no_call_is_open,
)
from tests.engine_fixture import engine as engine
from tests.engine_fixture import running as running

MEBIBYTE = 1 << 20
SCRIPTS = Path(__file__).parent / "scripts"


def warm_up(function: Any) -> None:
    """Let both cores have a container of the function."""
    list(kit.nap.map(range(8), kwargs={"seconds": 0.02}))
    list(function.map(range(1, 400)))


# --- one slow input delays nobody -----------------------------------------------------------------


@pytest.mark.parametrize("function", [kit.sleep_first, kit.spin_first], ids=["sleep", "c-loop"])
def test_a_slow_first_input_delays_no_other(running: None, function: Any) -> None:
    warm_up(function)
    results = function.map(range(1000), order_outputs=False)
    got = [next(results)]
    first_s = time.monotonic()
    got += itertools.islice(results, 998)
    last_s = time.monotonic()
    kit.close(results)
    assert sorted(got) == list(range(1, 1000))
    assert last_s - first_s < 0.5 * TIMEOUT_FACTOR


# --- what is read ahead is bounded ----------------------------------------------------------------


class Counted:
    """An endless iterator that knows how often it was asked."""

    def __init__(self, value: Any = None) -> None:
        self.count = 0
        self.value = value

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.count += 1
        return self.count if self.value is None else self.value(self.count)


def settled_count(inputs: Counted, quiet_s: float = 0.5) -> int:
    """The count when nobody has asked for `quiet_s` seconds."""
    state = {"count": -1, "since": time.monotonic()}

    def is_quiet() -> bool:
        if inputs.count != state["count"]:
            state.update(count=inputs.count, since=time.monotonic())
        return time.monotonic() - state["since"] > quiet_s * TIMEOUT_FACTOR

    poll_until(is_quiet, lambda: f"the iterator is left alone; it was asked {inputs.count} times")
    return int(state["count"])


def test_a_consumer_that_sleeps_stops_the_reading_of_tiny_inputs(running: None) -> None:
    inputs = Counted()
    results = kit.same.map(inputs)
    assert next(results) == 1
    first = settled_count(inputs)
    assert first <= 20_000
    assert list(itertools.islice(results, 20_000)) == list(range(2, 20_002))
    assert settled_count(inputs) - 20_001 <= 20_000
    kit.close(results)
    wait_until_no_call_is_open()


@pytest.mark.slow
def test_a_consumer_that_sleeps_bounds_the_memory_of_all_processes(
    engine: Cluster, running: None
) -> None:
    list(kit.first_byte.map([b"a" * (5 * MEBIBYTE)] * 4))
    gc.collect()

    def all_processes() -> set[int]:
        daemons = set(engine.daemon_pids().values())
        return {os.getpid(), *daemons}.union(*map(kit.descendants_of, daemons))

    before_bytes = kit.shared_out_bytes(all_processes())
    inputs = Counted(lambda number: number.to_bytes(4, "big") * (5 * MEBIBYTE // 4))
    results = kit.first_byte.map(inputs)
    assert next(results) == 0
    assert settled_count(inputs) < 30
    grown_bytes = kit.shared_out_bytes(all_processes()) - before_bytes
    assert grown_bytes <= 128 * MEBIBYTE, f"{grown_bytes / MEBIBYTE:.0f} MiB"
    assert list(itertools.islice(results, 20)) == [0] * 20
    assert settled_count(inputs) < 50
    kit.close(results)


def test_an_endless_iterator_ends_with_the_loop(running: None) -> None:
    for value in kit.same.map(itertools.count()):
        if value == 3000:
            break
    gc.collect()
    wait_until_no_call_is_open()


# --- classes keep their identity ------------------------------------------------------------------


def test_classes_of_a_script_keep_their_identity_across_processes(engine: Cluster) -> None:
    done = engine.python(SCRIPTS / "shapes.py")
    assert (done.returncode, done.stderr) == (0, "")
    call_ids = done.stdout.split()
    again = engine.python(SCRIPTS / "read_shapes.py", *call_ids)
    assert (again.returncode, again.stdout, again.stderr) == (0, "Square 9 BadShape 4\n", "")


# --- large values ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_array_that_all_inputs_use_crosses_the_wire_once(engine: Cluster, running: None) -> None:
    """Counted by the system calls of the daemons, since a unix socket has no counters."""
    size_bytes = 64 * MEBIBYTE
    array = numpy.full(size_bytes // 4, 5, dtype=numpy.uint32)
    assert kit.same.remote(1) == 1
    pids = engine.daemon_pids()
    before = {name: kit.io_bytes(pid) for name, pid in pids.items()}
    firsts = list(kit.change_in_place.map(range(980), kwargs={"array": array}))
    firsts += kit.change_in_place.map(range(20), kwargs={"array": array})
    read_bytes = {name: kit.io_bytes(pid) - before[name] for name, pid in pids.items()}
    assert firsts == [5] * 1000, "an input saw what another one had changed"
    assert array[0] == 5
    assert size_bytes < read_bytes["scheduler"] < 1.25 * size_bytes
    assert size_bytes < read_bytes["worker"] < 2.25 * size_bytes  # and reads the file it wrote


def test_a_large_result_arrives_whole(running: None) -> None:
    array = kit.ones.remote(20 * MEBIBYTE)
    assert (len(array), int(array.sum()), array[-1]) == (20 * MEBIBYTE, 20 * MEBIBYTE + 6, 7)


@pytest.mark.slow
def test_a_huge_argument_delays_no_small_call(engine: Cluster, running: None) -> None:
    """None of its own client and none of another. Were it in the way as a whole, the call behind it
    would take about half of its time; in large pieces, many calls would take a part of that."""
    array = numpy.arange(300 * MEBIBYTE // 4, dtype=numpy.uint32)
    got: list[tuple[float, Any, float]] = []

    def call() -> None:
        got.append((time.monotonic(), kit.checksum.remote(array), time.monotonic()))

    def has_ended() -> bool:
        thread.join(kit.BETWEEN_CALLS_S)
        return not thread.is_alive()

    with subprocess.Popen(
        [sys.executable, SCRIPTS / "small_calls.py"],
        env=engine.variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        kit.checksum.remote(array[:1])
        # While the other one calls too, so that each has its container.
        list(map(kit.same.remote, range(100)))
        thread = threading.Thread(target=call)
        thread.start()
        own_times = kit.time_calls(has_ended)
        other_times = json.loads(other.communicate()[0])
    ((begin_s, result, end_s),) = got
    assert result == (len(array), zlib.crc32(array.data))
    for times in (own_times, other_times):
        took_s = sorted(took for at, took in times if begin_s < at + took and at < end_s)
        slow = f"of {len(took_s)} calls in {end_s - begin_s:.2f} s: {took_s[-10:]}"
        assert took_s[-1] < (end_s - begin_s) / 5, slow
        assert took_s[int(0.95 * len(took_s))] < (end_s - begin_s) / 50, slow


# --- what is stopped stops ------------------------------------------------------------------------


def begun(folder: Path, x: int) -> int:
    """The pid of the container in which input `x` of `note_and_wait` runs."""
    path = folder / f"begun-{x}"
    poll_until(path.exists, f"input {x} begins")
    return int(path.read_text())


def test_the_time_limit_ends_code_that_never_looks_up(running: None) -> None:
    begin_s = time.monotonic()
    with pytest.raises(FunctionTimeoutError, match=r"0\.5 s"):
        kit.spin_too_long.remote()
    assert time.monotonic() - begin_s < (0.5 + KILL_GRACE_S + 2) * TIMEOUT_FACTOR


def test_the_time_limit_is_that_of_one_input_alone(running: None) -> None:
    mixed = kit.sleep_too_long.map([0.0, 5.0, 0.3, 0.4, 0.3], return_exceptions=True)
    first, late, *others = mixed
    assert (first, others) == (0.0, [0.3, 0.4, 0.3])
    assert isinstance(late, FunctionTimeoutError)


def test_an_input_that_ran_too_long_is_tried_again(running: None, tmp_path: Path) -> None:
    assert kit.hang_once.remote(str(tmp_path)) == "second attempt"


@pytest.mark.parametrize(("success_at", "attempts"), [(3, 3), (9, 3)], ids=["enough", "too-few"])
def test_retries_are_attempts_beyond_the_first(
    running: None, tmp_path: Path, success_at: int, attempts: int
) -> None:
    if success_at <= attempts:
        assert kit.fail_until.remote(str(tmp_path), success_at) == success_at
    else:
        with pytest.raises(kit.Coded) as caught:
            kit.fail_until.remote(str(tmp_path), success_at)
        assert caught.value.code == attempts
    assert len(list(tmp_path.iterdir())) == attempts


def test_breaking_out_of_a_map_stops_what_runs(running: None, tmp_path: Path) -> None:
    folder = str(tmp_path)
    results = kit.note_and_wait.starmap([(0, folder, 0.0), (1, folder)], order_outputs=False)
    for value in results:
        assert value == 0
        begun(tmp_path, 1)
        break
    kit.close(results)
    poll_until(is_idle, "the container is free again", (KILL_GRACE_S + 2))
    assert not (tmp_path / "ended-1").exists()


def test_cancelling_a_spawned_call_stops_what_runs(running: None, tmp_path: Path) -> None:
    call = kit.note_and_wait.spawn(1, str(tmp_path))
    begun(tmp_path, 1)
    call.cancel()
    with pytest.raises(InputCancelledError):
        call.get(timeout=30)
    poll_until(is_idle, "the container is free again")
    assert not (tmp_path / "ended-1").exists()


def is_idle() -> bool:
    """Whether no container has anything to do."""
    return all(container["leases"] == 0 for container in status()["containers"])


def test_cancelling_ends_code_that_never_looks_up(running: None, tmp_path: Path) -> None:
    call = kit.note_and_spin.spawn(str(tmp_path))
    path = tmp_path / "begun"
    poll_until(lambda: path.exists() and path.read_text(), "the loop begins")
    call.cancel()
    poll_until(lambda: not is_alive(int(path.read_text())), "the loop ends")


def test_cancelling_stops_an_async_function(running: None, tmp_path: Path) -> None:
    call = kit.note_and_wait_async.spawn(str(tmp_path))
    poll_until((tmp_path / "begun").exists, "the function begins")
    call.cancel()
    poll_until((tmp_path / "stopped").exists, "its finally block runs")


def test_leaving_a_generator_early_closes_it(running: None, tmp_path: Path) -> None:
    for item in kit.note_items.remote_gen(str(tmp_path)):
        if item == 10:
            break
    gc.collect()
    poll_until((tmp_path / "closed").exists, "the generator is closed in its container")


def test_a_generator_that_nobody_reads_waits(running: None, tmp_path: Path) -> None:
    results = kit.note_items.remote_gen(str(tmp_path))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    made = tmp_path / "made"
    seen = {"count": -1, "since": time.monotonic()}

    def is_quiet() -> bool:
        count = int(made.read_text() or -1)
        if count != seen["count"]:
            seen.update(count=count, since=time.monotonic())
        return time.monotonic() - seen["since"] > 0.3 * TIMEOUT_FACTOR

    poll_until(is_quiet, "the generator stops for want of credit")
    assert kit.same.remote(1) == 1, "it gives its core away"
    kit.close(results)
    poll_until((tmp_path / "closed").exists, "the generator is closed in its container")


# --- whole programs -------------------------------------------------------------------------------


def test_ctrl_c_ends_a_script_and_what_it_ran(engine: Cluster, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "error", SCRIPTS / "endless.py", str(tmp_path)],
        env=engine.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        pid = begun(tmp_path, 5)
        begin_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30 * TIMEOUT_FACTOR)
        took_s = time.monotonic() - begin_s
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    assert errors.count("Traceback") == 1, errors
    assert took_s < 3 * TIMEOUT_FACTOR
    wait_until_no_call_is_open()
    assert not (tmp_path / "ended-5").exists()
    poll_until(lambda: not is_alive(pid) or is_idle(), "nothing of it runs")


def test_a_spawned_call_outlives_its_script(engine: Cluster, tmp_path: Path) -> None:
    done = engine.python(SCRIPTS / "spawn_and_leave.py", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "go").exists()
    (tmp_path / "go").touch()
    call: fanout.FunctionCall[int] = fanout.FunctionCall.from_id(done.stdout.strip())
    assert list(call.iter()) == [0, 1, 2]
