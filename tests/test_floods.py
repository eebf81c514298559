"""Who prints without end, and who does not read: the work of everybody else goes on."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fanout.config import WINDOW_BYTES
from fanout.protocol import messages as m
from fanout_scheduler.core.events import PeerId, PeerWritable
from fanout_worker.logs import (
    JOIN_DELAY_S,
    LOG_RATE_BYTES,
    NOTICE_RATE,
    RESUME_BYTES,
    LogJoiner,
    Writer,
)
from tests import behaviour_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster, poll_until
from tests.core_kit import Bench, ack
from tests.engine_fixture import engine as engine
from tests.engine_fixture import running as running
from tests.engine_fixture import status
from tests.worker_kit import containers, lease_of

MEBIBYTE = 1 << 20
SCRIPTS = Path(__file__).parent / "scripts"


# --- text that a client does not take -------------------------------------------------------------


def printing(bench: Bench) -> tuple[int, int, m.ContainerLog]:
    """A worker, a client, and what a container of the client's call prints."""
    worker, client = bench.worker(), bench.client(f={})
    call_id = bench.open(client, count=1)
    lease = bench.started_lease(worker)
    bench.orders.clear()
    text = m.ContainerLog(lease.container_id, call_id, 0, m.Source.STDOUT, b"hello\n")
    return worker, client, text


def test_text_that_a_slow_client_loses_is_counted_and_told() -> None:
    bench = Bench()
    worker, client, text = printing(bench)
    bench.tell(PeerWritable(PeerId(client), False))
    bench.frame(worker, text, text)
    bench.nothing_left()
    bench.tell(PeerWritable(PeerId(client), True))
    notice = bench.take(m.Log, client)
    assert (notice.call_id, notice.source) == (text.call_id, m.Source.SYSTEM)
    assert b" 12 bytes of output were dropped " in bytes(notice.payload)
    bench.frame(worker, text)
    assert bench.take(m.Log, client).payload == b"hello\n"
    bench.tell(PeerWritable(PeerId(client), False), PeerWritable(PeerId(client), True))
    bench.nothing_left()


def test_text_that_came_while_a_client_was_away_is_counted_and_told() -> None:
    bench = Bench()
    worker, client, text = printing(bench)
    session = bench.core.state.peers[PeerId(client)].session_id
    bench.lose(client)
    bench.frame(worker, text)
    again = bench.connect(session=session)
    assert b" 6 bytes of output were dropped " in bytes(bench.take(m.Log, again).payload)


# --- a container that prints without end ----------------------------------------------------------


def noticed_bytes(text: str) -> int:
    """How much was dropped, by all notices of it."""
    return sum(map(int, re.findall(r"fanout: (\d+) bytes of output were dropped here", text)))


async def test_short_lines_leave_together_and_before_the_output() -> None:
    async with containers() as kit:
        container = await kit.start("def f(n):\n  for i in range(n): print(i)\n")
        start = kit.host.loop.time()
        container.give(lease_of([(20_000,)]))
        await kit.outputs(1)
        took_s = kit.host.loop.time() - start
        assert kit.events.text() == "".join(f"{i}\n" for i in range(20_000))
        assert kit.events.order[-1] == ("output", 0)
        pieces = len(kit.events.logs)
        assert pieces <= took_s / JOIN_DELAY_S + 5, f"{pieces} in {took_s:.2f} s"


def test_lines_of_inputs_that_run_at_once_leave_together_too() -> None:
    passed: list[tuple[Writer, bytes]] = []
    joiner = LogJoiner(lambda writer, data: passed.append((writer, data)))
    first, second = ((int(m.Source.STDOUT), b"c" * 16, index) for index in range(2))
    joiner.add(first, b"at once\n", 1.0)
    assert passed == [(first, b"at once\n")]
    for number in range(100):
        joiner.add(second, b"%d\n" % number, 1.001)
        joiner.add(first, b"%d\n" % number, 1.001)
    joiner.release(1.02)
    lines = b"".join(b"%d\n" % number for number in range(100))
    assert passed[1:] == [(second, lines), (first, lines)]


def test_the_streams_of_one_input_keep_their_order() -> None:
    passed: list[bytes] = []
    joiner = LogJoiner(lambda writer, data: passed.append(data))
    printed = [b"%d\n" % number for number in range(20)]
    for number, line in enumerate(printed):
        source = int(m.Source.STDOUT if number % 3 else m.Source.STDERR)
        joiner.add((source, b"c" * 16, 1), line, 1.0)
        joiner.add((source, b"c" * 16, 2), b"", 1.0)
    joiner.release(1.0)
    assert b"".join(passed) == b"".join(printed)


async def test_text_comes_before_the_output_of_its_input_however_quick_they_are() -> None:
    async with containers() as kit:
        # Around the text there is time for the daemon to look, and not enough to let go of it.
        container = await kit.start(
            """
            import time
            def spin():
                end = time.perf_counter() + 0.003
                while time.perf_counter() < end: pass
            def f(x):
                spin()
                print(x, "one")
                print(x, "two")
                spin()
            """
        )
        count = 50
        container.give(lease_of([(i,) for i in range(count)]))
        await kit.outputs(count)
        assert kit.events.text() == "".join(f"{i} one\n{i} two\n" for i in range(count))
        ends = {index: at for at, (kind, index) in enumerate(kit.events.order) if kind == "output"}
        logs = [(index, at) for at, (kind, index) in enumerate(kit.events.order) if kind == "log"]
        assert [index for index, at in logs if at > ends[index]] == []


async def test_a_line_behind_another_one_comes_although_nothing_follows() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import os
            def f(path):
                print("one")
                print("two")
                while not os.path.exists(path): pass
            """
        )
        path = kit.folder / "go"
        container.give(lease_of([(str(path),)]))
        await kit.until(lambda: kit.events.text() == "one\ntwo\n", "both lines")
        path.touch()
        await kit.outputs(1)


async def test_of_a_flood_passages_pass_and_the_rest_is_counted_before_the_output() -> None:
    async with containers() as kit:
        line_bytes, count = 1000, 40_000
        code = f"def f(n):\n  for _ in range(n): print('x' * {line_bytes - 1})\n"
        container = await kit.start(code)
        start = kit.host.loop.time()
        container.give(lease_of([(count,)]))
        await kit.outputs(1, timeout_s=30)
        took_s = kit.host.loop.time() - start
        assert kit.events.order[-1] == ("output", 0)
        passed = len(kit.events.text(m.Source.STDOUT))
        assert passed <= (took_s + 1) * LOG_RATE_BYTES
        assert passed + noticed_bytes(kit.events.text(m.Source.SYSTEM)) == line_bytes * count
        notices = sum(log.source == m.Source.SYSTEM for log in kit.events.logs)
        assert 1 <= notices <= took_s * LOG_RATE_BYTES / RESUME_BYTES + 2


async def test_what_was_dropped_is_told_although_nothing_follows() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import os
            def f(path):
                for _ in range(6000): print("x" * 999)
                while not os.path.exists(path): pass
            """
        )
        path = kit.folder / "go"
        container.give(lease_of([(str(path),)]))

        def is_all_told() -> bool:
            dropped = noticed_bytes(kit.events.text(m.Source.SYSTEM))
            return len(kit.events.text(m.Source.STDOUT)) + dropped == 6_000_000

        await kit.until(is_all_told, "all that was dropped is told")
        path.touch()
        await kit.outputs(1)


async def test_inputs_that_print_too_much_have_not_a_notice_each() -> None:
    async with containers() as kit:
        container = await kit.start("def f(x): print('x' * 20_000)\n")
        start = kit.host.loop.time()
        container.give(lease_of([(i,) for i in range(400)]))
        await kit.outputs(400)

        def is_all_told() -> bool:
            dropped = noticed_bytes(kit.events.text(m.Source.SYSTEM))
            return len(kit.events.text(m.Source.STDOUT)) + dropped == 400 * 20_001

        await kit.until(is_all_told, "all that was dropped is told")
        took_s = kit.host.loop.time() - start
        notices = sum(log.source == m.Source.SYSTEM for log in kit.events.logs)
        assert 1 <= notices <= (took_s + 1) * (NOTICE_RATE + LOG_RATE_BYTES / RESUME_BYTES)


# --- everybody else -------------------------------------------------------------------------------


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever had."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) << 10


def forget_peak(pid: int) -> None:
    """Let `peak_bytes` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "size_bytes", "line_bytes"),
    [
        ("print", 1 << 30, 1 << 16),
        ("descriptor", 1 << 30, 1 << 16),
        ("print", 20 * MEBIBYTE, 100),
        ("print", 2 * MEBIBYTE, 10),
    ],
    ids=["a-gigabyte", "a-gigabyte-on-the-descriptor", "lines", "short-lines"],
)
def test_a_flood_of_output_costs_others_little_and_is_counted(
    engine: Cluster, running: None, tmp_path: Path, how: str, size_bytes: int, line_bytes: int
) -> None:
    for pid in engine.daemon_pids().values():
        forget_peak(pid)
    before = {name: peak_bytes(pid) for name, pid in engine.daemon_pids().items()}
    numbers = (str(size_bytes), str(line_bytes))
    done = engine.python(SCRIPTS / "prints.py", tmp_path / "found", how, *numbers)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["flood_s"] < 15 * TIMEOUT_FACTOR
    assert found["median_s"] < 0.01 * TIMEOUT_FACTOR
    assert found["worst_s"] < 0.5 * TIMEOUT_FACTOR
    assert found["memory_bytes"] < 160 * MEBIBYTE
    for name, pid in engine.daemon_pids().items():
        assert peak_bytes(pid) - before[name] < 48 * MEBIBYTE, name
    printed_bytes = size_bytes // line_bytes * line_bytes
    assert len(done.stdout) + noticed_bytes(done.stderr) == printed_bytes


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "unread pipe"])
def test_a_client_that_takes_no_output_slows_nobody_and_is_told_what_it_missed(
    engine: Cluster, running: None, tmp_path: Path, how: str
) -> None:
    count, line_bytes = 4000, 10_000
    numbers = (str(count), str(line_bytes))
    with (tmp_path / "err").open("w") as err:
        client = subprocess.Popen(
            [sys.executable, SCRIPTS / "prints.py", tmp_path / "found", "talk", *numbers],
            env=engine.variables,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    assert client.stdout is not None

    def is_all_done() -> bool:
        return any(call["done"] == count for call in status()["calls"])

    try:
        poll_until((tmp_path / "found").exists, "all is spawned", 20)
        if how == "stopped":
            client.send_signal(signal.SIGSTOP)
        before = {name: peak_bytes(pid) for name, pid in engine.daemon_pids().items()}
        assert list(kit.same.map(range(20_000))) == list(range(20_000))
        poll_until(is_all_done, lambda: f"the inputs run all the same: {status()['calls']}", 30)
        if how == "stopped":
            client.send_signal(signal.SIGCONT)
        text = client.stdout.read()
        assert client.wait() == 0
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
    told = (tmp_path / "err").read_text()
    assert "the client was too slow" in told
    assert len(text) + noticed_bytes(told) <= count * line_bytes
    for name, pid in engine.daemon_pids().items():
        assert peak_bytes(pid) - before[name] < 48 * MEBIBYTE, name


# --- results that nobody reads --------------------------------------------------------------------


def finish_all(bench: Bench, worker: int, lease: m.Lease, size_bytes: int) -> int:
    """Finish an input after the other as long as there is one; how many there were."""
    count = 0
    found: m.Lease | None = lease
    while found is not None:
        bench.finish(worker, found, values=[bytes(size_bytes)], input_s=1.0)
        count += 1
        found = next(iter(bench.take_all(m.Lease)), None)
    return count


def test_a_consumer_that_never_reads_stops_inputs_that_end_in_order_too() -> None:
    bench = Bench()
    worker, client = bench.worker(cpu=1), bench.client(f={})
    call_id = bench.open(client, count=50)
    size_bytes = 20 * MEBIBYTE
    assert finish_all(bench, worker, bench.started_lease(worker), size_bytes) == 2
    assert "consumer" in bench.core.state.calls[call_id].waits_for
    # A client does not tell what it has consumed before that is a quarter of the window.
    bench.frame(client, ack(call_id, 0, 2, 1, 2 * size_bytes - WINDOW_BYTES // 4 + 1))
    assert finish_all(bench, worker, bench.take(m.Lease), size_bytes) == 2


def test_the_input_that_a_consumer_waits_for_runs_however_much_is_held_behind_it() -> None:
    bench = Bench()
    worker, client = bench.worker(cpu=2), bench.client(f={"timeout": 5})
    bench.open(client, count=50)
    first, second = bench.take_all(m.Lease)
    for start in bench.take_all(m.StartContainer):
        bench.start(worker, start.container_id)
    assert finish_all(bench, worker, second, 20 * MEBIBYTE) == 2
    bench.frame(worker, m.ContainerExited(first.container_id, "stopped", [], {}, b""))
    assert bench.take(m.Lease).start == 0


@pytest.mark.slow
def test_consumers_that_never_read_hold_up_nobody_and_bound_the_memory(
    engine: Cluster, running: None
) -> None:
    """A map and a generator, both endless, with results of a quarter of a mebibyte."""

    def all_processes() -> set[int]:
        daemons = set(engine.daemon_pids().values())
        return {os.getpid(), *daemons}.union(*map(kit.descendants_of, daemons))

    list(kit.same.map(range(100)))
    before_bytes = kit.shared_out_bytes(all_processes())
    size_bytes = MEBIBYTE // 4
    results = kit.large_result.map(itertools.count(), kwargs={"size_bytes": size_bytes})
    items = kit.large_items.remote_gen(size_bytes)
    try:
        assert next(results)[0] == next(items)[0] == 0
        for _ in range(3):
            assert list(kit.same.map(range(10_000))) == list(range(10_000))
            assert kit.depth.remote(2) == 2

        def are_waiting() -> bool:
            return not any(c["state"] == "running" for c in status()["containers"])

        poll_until(are_waiting, lambda: f"both wait for their reader: {status()['calls']}")
        grown_bytes = kit.shared_out_bytes(all_processes()) - before_bytes
        assert grown_bytes < 160 * MEBIBYTE, f"{grown_bytes / MEBIBYTE:.0f} MiB"
        # They go on where they were.
        assert [next(results)[0] for _ in range(200)] == [x % 256 for x in range(1, 201)]
        assert [next(items)[0] for _ in range(200)] == [x % 256 for x in range(1, 201)]
    finally:
        kit.close(results)
        kit.close(items)


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_consumer_gets_the_result_that_it_waits_for_when_the_window_is_full_behind_it(
    running: None, tmp_path: Path, is_async: bool
) -> None:
    """Input 7 dies when all that may run has run; its next run is what the consumer waits for."""
    options = {"size_bytes": 2 * MEBIBYTE, "late": 7, "folder": str(tmp_path)}

    def let_it_die() -> None:
        def is_held() -> bool:
            return any("consumer" in call["waiting_for"] for call in status()["calls"])

        poll_until(is_held, lambda: f"outputs fill the window: {status()['calls']}")
        (tmp_path / "die").touch()

    async def read() -> list[bytes]:
        return [data async for data in kit.large_and_late.map.aio(range(60), kwargs=options)]

    helper = threading.Thread(target=let_it_die)
    helper.start()
    if is_async:
        rows = asyncio.run(read())
    else:
        rows = list(kit.large_and_late.map(range(60), kwargs=options))
    helper.join()
    assert [row[0] for row in rows] == list(range(60))
