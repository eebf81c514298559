"""Compare fanout with what a user would pick instead, and with the bare chain of its shape.

    python -m benchmarks.bench [--quick | --full] [--peers] [--json FILE] [--check]

Every engine has two worker processes, runs the same bodies and stays warm; rounds of the engines
are interleaved, figures are medians over rounds, and ratios are taken round by round. Higher is
better for inputs/s and MiB/s, lower for microseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report as bars
from benchmarks.process import (
    ANSWER_TIMEOUT_S,
    BenchmarkError,
    EngineProcess,
    MemorySampler,
    cluster_home,
    daemon_pids,
)
from benchmarks.report import MIB, Report, machine
from benchmarks.startup import Start, measure_import_s, measure_starts

ALWAYS = ["fanout", "bare", "bare, two threads", "executor", "pool", "joblib"]
#: Engine and the module that it needs.
PEERS = {"mpire": "mpire", "ray": "ray", "dask": "distributed"}

MAP_ORDERED = "no-op map, ordered, inputs/s"
MAP_UNORDERED = "no-op map, unordered, inputs/s"
CALL_P50 = "single blocking call, p50, us"
CALL_P99 = "single blocking call, p99, us"
ECHO = "echo of 1 MiB values, ordered, MiB/s each way"

#: Engines that are so much slower at something that the full count would take minutes.
SLOW_MAPS = {"dask": 50}
SLOW_CALLS = {"joblib": 20, "ray": 5, "dask": 20}
#: A lazy map that is slower than this counts as stuck.
CONSUME_RATE_MIN = 1000


#: A map of MANY inputs may need no more memory than one of FEW.
FEW, MANY = 100_000, 1_000_000


@dataclass(frozen=True)
class MemoryCase:
    """A lazy map of few and of many inputs, which must need the same memory."""

    name: str
    few: int
    many: int
    size_bytes: int = 0
    pause_s: float = 0.0

    @property
    def bar_name(self) -> str:
        """Says how many inputs it is about: only `--full` asks for a million of each kind."""
        return f"memory growth, {self.name}, {self.few:,} to {self.many:,}"


@dataclass(frozen=True)
class Plan:
    """How much of everything; the defaults take about a minute."""

    round_count: int = 5
    map_count: int = 100_000
    call_count: int = 800
    echo_count: int = 200
    echo_round_count: int = 3
    cold_count: int = 3
    warm_count: int = 5
    memory_round_count: int = 3
    memory: tuple[MemoryCase, ...] = (
        MemoryCase("ints", FEW, MANY),
        # Fewer of the large values, to stay within the minute.
        MemoryCase("10 KiB values", 20_000, 60_000, 10 << 10),
        # 80 MiB is already more than the credit of a call, so both fill every buffer there is.
        MemoryCase("10 KiB values, slow consumer", 8_000, 24_000, 10 << 10, 0.01),
    )


QUICK = Plan(
    round_count=1,
    map_count=30_000,
    call_count=300,
    echo_count=40,
    echo_round_count=1,
    cold_count=1,
    warm_count=2,
    memory_round_count=1,
    memory=(MemoryCase("ints", 50_000, 500_000),),
)

FULL = Plan(
    memory_round_count=1,
    memory=tuple(dataclasses.replace(c, few=FEW, many=MANY) for c in Plan().memory),
)


def percentile(times: list[float], percent: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * percent / 100))]


def run_map(engine: EngineProcess, plan: Plan, report: Report, *, is_ordered: bool) -> None:
    count = plan.map_count // SLOW_MAPS.get(engine.name, 1)
    seconds = engine.ask("map", count=count, is_ordered=is_ordered)
    rate = None if seconds is None else count / seconds
    report.add(MAP_ORDERED if is_ordered else MAP_UNORDERED, engine.name, rate)


def run_calls(engine: EngineProcess, plan: Plan, report: Report) -> None:
    count = plan.call_count // SLOW_CALLS.get(engine.name, 1)
    times = engine.ask("calls", count=count)
    report.add(CALL_P50, engine.name, percentile(times, 50) * 1e6)
    report.add(CALL_P99, engine.name, percentile(times, 99) * 1e6)


def run_echo(engine: EngineProcess, plan: Plan, report: Report) -> None:
    seconds = engine.ask("echo", count=plan.echo_count, size_bytes=MIB)
    report.add(ECHO, engine.name, None if seconds is None else plan.echo_count / seconds)


def warm_up(engine: EngineProcess, plan: Plan) -> None:
    """Processes are started, modules loaded and buffers grown before anything is measured."""
    engine.ask("map", count=plan.map_count // SLOW_MAPS.get(engine.name, 1), is_ordered=True)
    engine.ask("calls", count=100 // SLOW_CALLS.get(engine.name, 1))


@contextmanager
def noted(report: Report) -> Iterator[None]:
    """A failure in the block ends the block alone: the report says it, and the rest goes on."""
    try:
        yield
    except BenchmarkError as error:
        report.failures.append(str(error))


def run_round(engine: EngineProcess, plan: Plan, report: Report, *, has_echo: bool) -> None:
    """One turn of one engine. What fails is not tried again; the rest goes on, with a fresh
    engine. One that cannot be started has no figures."""
    steps: list[tuple[list[str], Callable[[], None]]] = [
        ([MAP_ORDERED], lambda: run_map(engine, plan, report, is_ordered=True)),
        ([MAP_UNORDERED], lambda: run_map(engine, plan, report, is_ordered=False)),
        ([CALL_P50, CALL_P99], lambda: run_calls(engine, plan, report)),
    ]
    if has_echo:
        steps.append(([ECHO], lambda: run_echo(engine, plan, report)))
    for figures, step in steps:
        has_failed = (engine.name, figures[0]) in report.failed
        try:
            if engine.is_running and not has_failed:
                step()
                continue
        except BenchmarkError as error:
            report.failures.append(str(error))
            report.failed.add((engine.name, figures[0]))
            with noted(report):
                engine.start()
        for figure in figures:
            report.add(figure, engine.name, None)


def run_rounds(names: list[str], plan: Plan, report: Report) -> None:
    with ExitStack() as stack:
        home = stack.enter_context(cluster_home())
        engines = []
        for name in names:
            engine = EngineProcess(name, home)
            stack.callback(engine.close)
            with noted(report):
                engine.start()
                warm_up(engine, plan)
            engines.append(engine)
        for number in range(plan.round_count):
            # Nobody is always the one that runs after the heaviest.
            turn = number % len(engines)
            for engine in engines[turn:] + engines[:turn]:
                run_round(engine, plan, report, has_echo=number < plan.echo_round_count)


def peak_mib(case: MemoryCase, count: int) -> tuple[float, float]:
    """(PSS, USS) in MiB of client, scheduler and worker daemon, all fresh, at their peak."""
    with cluster_home() as home:
        engine = EngineProcess("fanout", home)
        try:
            engine.start()
            engine.ask("map", count=1000, is_ordered=True)
            sampler = MemorySampler([engine.pid, *daemon_pids(home)])
            sampler.start()
            engine.ask(
                "consume",
                timeout_s=ANSWER_TIMEOUT_S + count / CONSUME_RATE_MIN,
                count=count,
                size_bytes=case.size_bytes,
                pause_s=case.pause_s,
            )
            peak = sampler.finish()
        finally:
            engine.close()
    return peak.pss / MIB, peak.uss / MIB


def measure_memory(
    case: MemoryCase, round_count: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The median peaks of few and of many inputs, from fresh processes each. One peak is a matter
    of chance: of whether all buffers were full at the same moment."""
    peaks = [(peak_mib(case, case.few), peak_mib(case, case.many)) for _ in range(round_count)]
    few, many = (sorted(each)[round_count // 2] for each in zip(*peaks, strict=True))
    return few, many


def run_memory(plan: Plan, report: Report) -> None:
    print("\nmemory of client + scheduler + worker daemon, peak PSS (USS), MiB")
    for case in plan.memory:
        try:
            few, many = measure_memory(case, plan.memory_round_count)
        except BenchmarkError as error:
            report.failures.append(str(error))
            continue
        print(
            f"  {case.name}: {few[0]:.1f} ({few[1]:.1f}) at {case.few:,} inputs, "
            f"{many[0]:.1f} ({many[1]:.1f}) at {case.many:,}"
        )
        counts = {"few_count": case.few, "many_count": case.many}
        report.details[f"memory, {case.name}"] = {"few": few, "many": many, **counts}
        report.require(case.bar_name, many[0] - few[0], bars.MEMORY_GROWTH_MIB_MAX, "MiB")


def run_start(plan: Plan, report: Report) -> None:
    cold, warm = measure_starts(plan.cold_count, plan.warm_count)
    import_s = measure_import_s(max(3, plan.warm_count))
    print("\n`python script.py`, stages, ms")
    for name, start in (("cold", cold), ("warm", warm)):
        print(f"  {name}: {stages_line(start)}")
        report.details[f"start, {name}"] = {"first result": start.first_result_s, **start.stages}
    report.details["import fanout"] = import_s
    report.require(
        "cold start to the first result", cold.first_result_s, bars.COLD_START_S_MAX, "s"
    )
    report.require(
        "warm start to the first result", warm.first_result_s, bars.WARM_START_S_MAX, "s"
    )
    report.require("import fanout", import_s, bars.IMPORT_S_MAX, "s")


def stages_line(start: Start) -> str:
    stages = ", ".join(f"{name} {1000 * s:.0f}" for name, s in start.stages.items())
    return f"{1000 * start.first_result_s:.0f} to the first result; {stages}"


def judge_rounds(report: Report) -> None:
    for figure in (MAP_ORDERED, MAP_UNORDERED):
        ours = report.series[figure]["fanout"]
        # The bare chain has one map, an ordered one.
        value = bars.ratio(ours, report.series[MAP_ORDERED]["bare"])
        name = f"{figure.removesuffix(', inputs/s')}, to the bare chain"
        report.require_at_least(name, value, bars.MAP_RATIO_MIN)
    p50 = report.ratio_to("bare, two threads", CALL_P50)
    report.require("single call p50, to the bare chain", p50, bars.CALL_RATIO_MAX)
    calls = [report.series[figure]["fanout"] for figure in (CALL_P99, CALL_P50)]
    report.require("single call p99, to its p50", bars.ratio(*calls), bars.TAIL_RATIO_MAX)


def chosen_engines(has_peers: bool) -> list[str]:
    names = list(ALWAYS)
    for name, module in PEERS.items() if has_peers else ():
        if importlib.util.find_spec(module) is None:
            print(f"{name} is left out: it is not installed")
        else:
            names.append(name)
    return names


@contextmanager
def progress(what: str) -> Iterator[None]:
    if sys.stderr.isatty():
        print(f"... {what}", end="\r", file=sys.stderr, flush=True)
    yield
    if sys.stderr.isatty():
        print(" " * (len(what) + 4), end="\r", file=sys.stderr, flush=True)


def run(plan: Plan, names: list[str], report: Report) -> None:
    with progress("maps, calls and payloads"):
        run_rounds(names, plan, report)
    for figure in report.series:
        print("\n".join(report.table(figure)))
    with progress("starts"):
        run_start(plan, report)
    with progress("memory"):
        run_memory(plan, report)
    judge_rounds(report)
    print("\nbars")
    for bar in report.bars:
        print(bar.line())
    for failure in report.failures:
        print(f"\nfailed: {failure.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="about ten seconds, rough figures")
    extent.add_argument(
        "--full", action="store_true", help=f"memory with {FEW:,} and {MANY:,} of all; many minutes"
    )
    parser.add_argument("--peers", action="store_true", help="also mpire, Ray and Dask")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is not met")
    arguments = parser.parse_args()
    about = machine()
    print(f"Python {about['python']}, {about['cores']} cores, {about['system']}")
    report, begin = Report(), time.perf_counter()
    try:
        plan = QUICK if arguments.quick else FULL if arguments.full else Plan()
        run(plan, chosen_engines(arguments.peers), report)
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 2
    print(f"\n{time.perf_counter() - begin:.0f} s")
    if arguments.json:
        report.write_json(arguments.json)
    if report.failures:
        return 2
    is_met = all(bar.is_met for bar in report.bars)
    return 1 if arguments.check and not is_met else 0


if __name__ == "__main__":
    sys.exit(main())
