"""A scheduler with a thousand workers: what it costs while they idle, and how much they get done.

::

    python -m benchmarks.fleet                 1,000 connections of 8 containers, in 4 processes
    python -m benchmarks.fleet --input-s 1     inputs of a second instead of a tenth

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
from typing import Any

from benchmarks.hand_started import HandStarted, cpu_s_of, hand_started, wait_until
from benchmarks.limits import connect_to, mib, say
from benchmarks.process import ROOT, BenchmarkError, variables

WORKER_COUNT = 1_000
CONTAINER_COUNT = 8
PROCESS_COUNT = 4
INPUT_COUNT = 200_000
#: So 8,000 containers want 80,000 inputs a second, more than there is.
INPUT_S = 0.1
IDLE_S = 10.0
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


def measure_idle(what: str, cluster: HandStarted, seconds: float) -> None:
    before_s = cluster.scheduler_cpu_s()
    time.sleep(seconds)
    share = (cluster.scheduler_cpu_s() - before_s) / seconds
    say(f"{what}: {100 * share:.1f} % of a core, {mib(cluster.scheduler_bytes())}")


class Fleet:
    """The scheduler, and the processes that hold the workers."""

    def __init__(self, cluster: HandStarted, processes: list[subprocess.Popen[bytes]]) -> None:
        self.cluster = cluster
        self.processes = processes

    def cpu_s(self) -> tuple[float, float, float]:
        """Seconds of a core that scheduler, workers and client have used."""
        workers = sum(cpu_s_of(process.pid) for process in self.processes)
        return self.cluster.scheduler_cpu_s(), workers, cpu_s_of(os.getpid())

    def measure_map(self, what: str, bench: Any, count: int) -> None:
        """All of them share the cores of this machine: how much each uses says which is slow."""
        before, begin = self.cpu_s(), time.perf_counter()
        found = sum(1 for _ in bench.noop.map(range(count), order_outputs=False))
        seconds = time.perf_counter() - begin
        if found != count:
            raise BenchmarkError(f"{found} results of {count} inputs")
        used = [after - first for after, first in zip(self.cpu_s(), before, strict=True)]
        each = [f"{1e6 * cpu_s / count:.0f}" for cpu_s in used]
        say(f"{what}: {count:,} inputs in {seconds:.1f} s, {count / seconds:,.0f}/s")
        say(f"  scheduler {100 * used[0] / seconds:.0f} % of a core")
        say(f"  an input: scheduler {each[0]} us, all workers {each[1]} us, client {each[2]} us")


def measure_busy(fleet: Fleet, options: argparse.Namespace) -> None:
    cluster = fleet.cluster
    bench = connect_to(cluster)
    with bench.app.run():
        first_count = 2 * options.workers * options.containers
        fleet.measure_map("first, with the start of containers", bench, first_count)
        started = status_of(cluster)["containers"]
        fleet.measure_map(f"busy with {started:,} containers", bench, options.inputs)
        measure_idle(f"idle with {started:,} containers", cluster, options.idle_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=WORKER_COUNT)
    parser.add_argument("--containers", type=int, default=CONTAINER_COUNT, help="of each worker")
    parser.add_argument("--processes", type=int, default=PROCESS_COUNT)
    parser.add_argument("--inputs", type=int, default=INPUT_COUNT)
    parser.add_argument("--input-s", type=float, default=INPUT_S, help="length of an input")
    parser.add_argument("--idle-s", type=float, default=IDLE_S, help="how long to watch it idle")
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
            return bool(status_of(cluster)["workers"] == options.workers)

        wait_until(are_connected, "all workers are connected", CONNECT_TIMEOUT_S)
        seconds = time.perf_counter() - begin
        say(f"{options.workers:,} workers connected in {seconds:.1f} s")
        measure_idle("idle", cluster, options.idle_s)
        measure_busy(Fleet(cluster, processes), options)


if __name__ == "__main__":
    os.environ.pop("FANOUT_HOME", None)
    main()
