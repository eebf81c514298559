"""How much fanout takes at a time: spawned inputs that wait, and calls that are open.

::

    python -m benchmarks.limits spawned           1,000,000 inputs in one spawn_map, then drained
    python -m benchmarks.limits spawned --calls   10,000 calls of one input each by spawn
    python -m benchmarks.limits calls             10,000 attached calls open at once

Memory is what the scheduler's process has for itself (unique set size), so what the allocator
loses counts too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.hand_started import HandStarted, hand_started, wait_until

INPUT_COUNT = 1_000_000
CALL_COUNT = 10_000
WARM_COUNT = 1_000
READ_PART = 50
DRAIN_TIMEOUT_S = 600.0


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def mib(size: float) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def connect_to(cluster: HandStarted) -> Any:
    """`benchmarks.fanout_app`, as a client of this scheduler."""
    os.environ["FANOUT_URL"] = cluster.address["client_join"]
    from benchmarks import fanout_app

    return fanout_app


def input_bytes(count: int) -> int:
    """Bytes of the arguments of `noop` for 0 to `count`, as they travel."""
    from fanout.serialization import encode_args

    step = max(1, count // 1000)
    sizes = [len(encode_args((x,), None)[0]) for x in range(0, count, step)]
    return int(statistics.mean(sizes) * count)


def open_call_count(cluster: HandStarted) -> int:
    from fanout.client.local import ask_status
    from fanout.protocol.join import JoinString

    status = ask_status(JoinString.parse(cluster.address["client_join"]))
    return int(status["open_call_count"])


def wait_for_open(cluster: HandStarted, predicate: Callable[[int], bool]) -> None:
    """Until the number of open calls is as it should be."""
    what = "the number of open calls is right"
    wait_until(lambda: predicate(open_call_count(cluster)), what, DRAIN_TIMEOUT_S)


def drain(cluster: HandStarted) -> float:
    """Seconds until a worker has run all that waits."""
    cluster.start_worker()
    begin = time.perf_counter()
    wait_for_open(cluster, lambda n: n == 0)
    return time.perf_counter() - begin


def measure_spawned(count: int, profile: str | None) -> None:
    """One call with many inputs that wait, since no worker is there; then one comes."""
    with hand_started(profile) as cluster:
        bench = connect_to(cluster)
        with bench.app.run():
            bench.noop.spawn_map(range(WARM_COUNT)).cancel()
            before = cluster.scheduler_bytes()
            begin = time.perf_counter()
            call = bench.noop.spawn_map(range(count))
            spawn_s = time.perf_counter() - begin
            waiting = cluster.scheduler_bytes() - before
            payload = input_bytes(count)
            say(f"{count:,} inputs spawned in {spawn_s:.1f} s, {count / spawn_s:,.0f}/s")
            say(f"  payload {mib(payload)}, scheduler +{mib(waiting)}")
            say(f"  beyond its payload: {(waiting - payload) / count:.1f} bytes a waiting input")
            drain_s = drain(cluster)
            done = cluster.scheduler_bytes() - before
            say(f"drained in {drain_s:.1f} s, {count / drain_s:,.0f}/s")
            say(f"  scheduler +{mib(done)} with all outputs, {done / count:.1f} bytes an output")
            say(f"  at its peak {mib(cluster.scheduler_peak_bytes())}")
            begin = time.perf_counter()
            got = sum(1 for _ in call.iter())
            read_s = time.perf_counter() - begin
            say(f"{got:,} results read in {read_s:.1f} s, {got / read_s:,.0f}/s")
            assert got == count


async def spawn_calls(bench: Any, count: int) -> list[Any]:
    calls: list[Any] = []
    for start in range(0, count, 500):
        part = range(start, min(count, start + 500))
        calls += await asyncio.gather(*[bench.noop.spawn.aio(x) for x in part])
    return calls


async def measure_spawned_calls(count: int, profile: str | None) -> None:
    """Many calls of one input each that wait, since no worker is there; then one comes."""
    with hand_started(profile) as cluster:
        bench = connect_to(cluster)
        async with bench.app.run():
            for call in await spawn_calls(bench, WARM_COUNT):
                await call.cancel.aio()
            before = cluster.scheduler_bytes()
            begin = time.perf_counter()
            calls = await spawn_calls(bench, count)
            spawn_s = time.perf_counter() - begin
            waiting = cluster.scheduler_bytes() - before
            say(f"{count:,} calls spawned in {spawn_s:.1f} s, {count / spawn_s:,.0f}/s")
            say(f"  scheduler +{mib(waiting)}, {waiting / count:,.0f} bytes a waiting call")
            drain_s = await asyncio.to_thread(drain, cluster)
            done = cluster.scheduler_bytes() - before
            say(f"drained in {drain_s:.1f} s, {count / drain_s:,.0f}/s")
            say(f"  scheduler +{mib(done)}, {done / count:,.0f} bytes a call that has ended")
            begin = time.perf_counter()
            for start in range(0, count, READ_PART):
                part = calls[start : start + READ_PART]
                await asyncio.gather(*[call.get.aio() for call in part])
            read_s = time.perf_counter() - begin
            say(f"{count:,} results read in {read_s:.1f} s, {count / read_s:,.0f}/s")


async def median_single_s(bench: Any) -> float:
    times = []
    for x in range(200):
        begin = time.perf_counter()
        await bench.noop.remote.aio(x)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


async def measure_calls(count: int, profile: str | None) -> None:
    """Many attached calls at once, of a function that nobody can run; others go on beside them."""
    with hand_started(profile) as cluster:
        cluster.start_worker()
        bench = connect_to(cluster)
        async with bench.app.run():
            await bench.noop.remote.aio(0)
            alone_s = await median_single_s(bench)
            before = cluster.scheduler_bytes()
            begin = time.perf_counter()
            waiting = [asyncio.ensure_future(bench.unplaceable.remote.aio(x)) for x in range(count)]
            await asyncio.to_thread(wait_for_open, cluster, lambda n: n >= count)
            open_s = time.perf_counter() - begin
            used = cluster.scheduler_bytes() - before
            say(f"{count:,} attached calls opened in {open_s:.1f} s")
            say(f"  scheduler +{mib(used)}, {used / count:,.0f} bytes a call")
            beside_s = await median_single_s(bench)
            say(f"a single call takes {alone_s * 1e6:,.0f} us alone, {beside_s * 1e6:,.0f} beside")
            begin = time.perf_counter()
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.to_thread(wait_for_open, cluster, lambda n: n == 0)
            say(f"cancelled in {time.perf_counter() - begin:.1f} s")
            begin = time.perf_counter()
            done = await asyncio.gather(*[bench.noop.remote.aio(x) for x in range(count)])
            run_s = time.perf_counter() - begin
            assert done == list(range(count))
            say(f"{count:,} calls at once that run: {run_s:.1f} s, {count / run_s:,.0f}/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("spawned", "calls"))
    parser.add_argument("--count", type=int, help="of inputs or calls")
    parser.add_argument("--calls", action="store_true", help="spawn one call for each input")
    parser.add_argument("--profile", metavar="FILE", help="write a profile of the scheduler")
    options = parser.parse_args()
    if options.what == "calls":
        asyncio.run(measure_calls(options.count or CALL_COUNT, options.profile))
    elif options.calls:
        asyncio.run(measure_spawned_calls(options.count or CALL_COUNT, options.profile))
    else:
        measure_spawned(options.count or INPUT_COUNT, options.profile)


if __name__ == "__main__":
    main()
