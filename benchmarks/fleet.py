"""A scheduler with a thousand workers: what it costs while they idle, and how much they get done.

::

    python -m benchmarks.fleet                 1,000 connections of 8 containers, in 4 processes
    python -m benchmarks.fleet --input-s 1     inputs of a second instead of none

Each worker is a real connection over a socket, and the state behind it is the one that the worker
daemon ships (`fanout_worker.worker_state`); only its containers are made up: they wait as long as
an input takes and give None. The client is a real one, in this process.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from contextlib import ExitStack

from benchmarks.hand_started import HandStarted, hand_started, wait_until
from benchmarks.limits import connect_to, mib, say
from benchmarks.process import ROOT, BenchmarkError, variables

WORKER_COUNT = 1_000
CONTAINER_COUNT = 8
PROCESS_COUNT = 4
INPUT_COUNT = 300_000
IDLE_S = float(os.environ.get("IDLE_S", "10"))
CONNECT_TIMEOUT_S = 120.0
#: Descriptors of the scheduler beside its connections.
SPARE_DESCRIPTORS = 100


def require_descriptors(count: int) -> None:
    """Allow this process and its children as many open files as the connections need.

    Raises:
        BenchmarkError: the system allows fewer; says how to change that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BenchmarkError(
            f"{count} connections need {needed} open files in the scheduler, and the hard limit "
            f"is {hard}: raise it (`ulimit -Hn {needed}` as root), or measure fewer connections"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def status_of(cluster: HandStarted) -> dict[str, int]:
    from fanout.client.local import ask_status
    from fanout.protocol.join import JoinString

    status = ask_status(JoinString.parse(cluster.address["client_join"]))
    return {
        "workers": status["worker_count"],
        "containers": status["container_count"],
        "open calls": status["open_call_count"],
    }


def start_workers(
    cluster: HandStarted, options: argparse.Namespace, stack: ExitStack
) -> list[subprocess.Popen[bytes]]:
    """The processes that hold the connections; they end with the stack."""
    processes = []
    for number in range(options.processes):
        count = options.workers // options.processes
        count += number < options.workers % options.processes
        arguments = [cluster.address["worker_join"], str(count), str(options.containers)]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fleet_workers", *arguments, str(options.input_s)],
            env=variables(cluster.folder / "none"),
            cwd=ROOT,
            stdin=subprocess.PIPE,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        processes.append(process)
    return processes


def say_cost(what: str, cluster: HandStarted, begin_cpu_s: float, begin: float) -> None:
    share = (cluster.scheduler_cpu_s() - begin_cpu_s) / (time.perf_counter() - begin)
    say(f"{what}: {100 * share:.1f} % of a core, {mib(cluster.scheduler_bytes())}")


def measure_idle(what: str, cluster: HandStarted) -> None:
    cpu_s, begin = cluster.scheduler_cpu_s(), time.perf_counter()
    time.sleep(IDLE_S)
    say_cost(what, cluster, cpu_s, begin)


def measure_busy(cluster: HandStarted, options: argparse.Namespace) -> None:
    bench = connect_to(cluster)
    container_count = options.workers * options.containers
    with bench.app.run():
        # Every container is started by an input of its own.
        begin = time.perf_counter()
        bench.noop.for_each(range(8 * container_count))
        started = status_of(cluster)["containers"]
        say(f"first {8 * container_count:,} inputs in {time.perf_counter() - begin:.1f} s")
        say(f"  {started:,} containers started")
        cpu_s, begin = cluster.scheduler_cpu_s(), time.perf_counter()
        results = bench.noop.map(range(options.inputs), order_outputs=False)
        count = sum(1 for _ in results)
        seconds = time.perf_counter() - begin
        if count != options.inputs:
            raise BenchmarkError(f"{count} results of {options.inputs} inputs")
        say(f"{count:,} inputs in {seconds:.1f} s, {count / seconds:,.0f}/s")
        say_cost("busy", cluster, cpu_s, begin)
        measure_idle(f"idle with {started:,} warm containers", cluster)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=WORKER_COUNT)
    parser.add_argument("--containers", type=int, default=CONTAINER_COUNT, help="of each worker")
    parser.add_argument("--processes", type=int, default=PROCESS_COUNT)
    parser.add_argument("--inputs", type=int, default=INPUT_COUNT)
    parser.add_argument("--input-s", type=float, default=0.0, help="seconds that an input takes")
    parser.add_argument("--profile", metavar="FILE", help="write a profile of the scheduler")
    options = parser.parse_args()
    require_descriptors(options.workers)
    with hand_started(options.profile) as cluster, ExitStack() as stack:
        begin = time.perf_counter()
        processes = start_workers(cluster, options, stack)

        def are_connected() -> bool:
            for process in processes:
                if process.poll() is not None:
                    raise BenchmarkError("a process of workers has ended; it says above why")
            return status_of(cluster)["workers"] == options.workers

        wait_until(are_connected, "all workers are connected", CONNECT_TIMEOUT_S)
        seconds = time.perf_counter() - begin
        say(f"{options.workers:,} workers connected in {seconds:.1f} s")
        measure_idle("idle", cluster)
        measure_busy(cluster, options)


if __name__ == "__main__":
    os.environ.pop("FANOUT_HOME", None)
    main()
