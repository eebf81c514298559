"""Everything that code can do to its own process, at every time at which it can: the right error on
the right input, neighbours unharmed, no process left, and all cores and permits back.

Not among the cells, because they say nothing new or make no sense:

- What returns (changed cwd, signals, streams, threads) while a value is pickled or unpickled: the
  process is then as after the same deed in `run`, one instruction earlier.
- A flood in any stage but `run`: who prints does not matter to the limit.
- A limit on memory while a module is imported: a `MemoryError` is an exception there as any other.
- Loops in `@exit`: that the hooks are killed after their grace, which is 30 s, is tested in
  `test_container_classes.py` with a shorter one.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fanout import exceptions
from tests import crash_kit as kit
from tests.behaviour_kit import descendants_of
from tests.conftest import Cluster, is_alive, poll_until
from tests.engine_fixture import engine_of, status, wait_until_no_call_is_open

#: Inputs of a map; the one that goes wrong is in the middle.
COUNT, BAD = 8, 3


# --- what is expected -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """The input ends well."""

    def check(self, result: Any, deed: str) -> None:
        assert result == deed


@dataclass(frozen=True)
class Raised:
    """The input ends with an exception of its own."""

    kind: type[BaseException]
    text: str = ""

    def check(self, result: Any, deed: str) -> None:
        assert type(result) is self.kind, repr(result)
        assert self.text in str(result)


@dataclass(frozen=True)
class Died:
    """The process died under the input; or while it was started, before any input ran."""

    signal: str | None = None
    exit_code: int | None = None

    def check(self, result: Any, deed: str) -> None:
        assert isinstance(result, exceptions.ContainerCrashedError), repr(result)
        assert (result.signal, result.exit_code) == (self.signal, self.exit_code)
        assert (result.crash_count, result.input_index) == (3, BAD)
        assert re.fullmatch("fc-[0-9a-f]{32}", result.call_id or "")
        assert (result.peak_memory_mib or 0) > 0

    def check_start(self, result: Any) -> None:
        assert isinstance(result, exceptions.ContainerStartError), repr(result)
        assert (result.signal, result.exit_code) == (self.signal, self.exit_code)


@dataclass(frozen=True)
class TimedOut:
    """It was stopped, by an exception or by SIGKILL."""

    def check(self, result: Any, deed: str) -> None:
        assert isinstance(result, exceptions.FunctionTimeoutError), repr(result)
        assert (result.timeout, result.input_index) == (kit.TIMEOUT_S, BAD)


Expected = Value | Raised | Died | TimedOut

OOPS = Raised(kit.Oops, "as planned")
LEFT = Raised(SystemExit, str(kit.EXIT_CODE))
MEMORY = Raised(MemoryError)
EXITED = Died(exit_code=kit.EXIT_CODE)
FAULTED = Died(signal="SIGSEGV")
KILLED = Died(signal="SIGKILL")

#: By deed, when an input does it while it runs.
RUN: dict[str, Expected] = {
    "exception": OOPS,
    "sys.exit": LEFT,
    "os._exit": EXITED,
    "SIGSEGV": FAULTED,
    "memory-limit": MEMORY,
    "SIGKILL": KILLED,
    "c-loop": TimedOut(),
    "re-match": TimedOut(),
    "children": Value(),
    "children-and-death": EXITED,
    "flood": Value(),
    "stdio-closed": Value(),
    "stdio-replaced": Value(),
    "all-closed": Value(),
    "cwd-gone": Value(),
    "signals-changed": Value(),
    "signals-changed-and-hang": TimedOut(),
    "threads-left": Value(),
}
#: Between two items of a generator.
YIELD: dict[str, Expected] = {
    deed: RUN[deed]
    for deed in (
        "exception", "sys.exit", "os._exit", "SIGSEGV", "memory-limit", "SIGKILL", "c-loop",
        "children", "children-and-death", "stdio-closed", "all-closed", "signals-changed",
    )
}  # fmt: skip
#: While the input's argument is unpickled. An exception is then one about the argument.
UNPICKLE: dict[str, Expected] = {
    "exception": Raised(exceptions.DeserializationError, "as planned"),
    "sys.exit": LEFT,
    "os._exit": EXITED,
    "SIGSEGV": FAULTED,
    "SIGKILL": KILLED,
    "memory-limit": Raised(exceptions.DeserializationError, "MemoryError"),
    "c-loop": TimedOut(),
    "children-and-death": EXITED,
}
#: While the input's result is pickled.
PICKLE: dict[str, Expected] = {
    "exception": Raised(exceptions.SerializationError, "as planned"),
    "sys.exit": LEFT,
    "os._exit": EXITED,
    "SIGSEGV": FAULTED,
    "SIGKILL": KILLED,
    "memory-limit": Raised(exceptions.SerializationError, "MemoryError"),
    "c-loop": TimedOut(),
    "children-and-death": EXITED,
}
#: While a container is started, by the import of its module or by a hook: all inputs share it.
START: dict[str, Expected] = {
    "exception": OOPS,
    "sys.exit": LEFT,
    "os._exit": EXITED,
    "SIGSEGV": FAULTED,
    "SIGKILL": KILLED,
    "c-loop": Raised(exceptions.ContainerStartError, f"startup_timeout={kit.TIMEOUT_S:g} s"),
    "children": Value(),
    "children-and-death": EXITED,
    "stdio-closed": Value(),
    "stdio-replaced": Value(),
    "cwd-gone": Value(),
    "signals-changed": Value(),
    "threads-left": Value(),
}
#: In an enter hook; what is expected is in `START`.
ENTER = (
    "exception", "sys.exit", "os._exit", "SIGSEGV", "SIGKILL", "c-loop", "children-and-death",
    "threads-left",
)  # fmt: skip
#: Whatever happens in an exit hook, the results are there already.
EXIT = (
    "exception", "sys.exit", "os._exit", "SIGSEGV", "children", "children-and-death",
    "all-closed", "threads-left",
)  # fmt: skip

ENDLESS = {"c-loop", "re-match", "signals-changed-and-hang"}

#: Cells that come only with FANOUT_TEST_FULL=1: other cells take the same way through the code.
ONLY_IN_FULL = {
    "run": {"children", "signals-changed", "stdio-replaced"},
    "yield": {"sys.exit", "children-and-death", "signals-changed", "all-closed"},
    "pickle": {"sys.exit", "SIGSEGV", "children-and-death"},
    "unpickle": {"os._exit", "SIGKILL", "children-and-death"},
    "import": {
        "SIGKILL", "children-and-death", "stdio-closed", "stdio-replaced", "cwd-gone",
    },
    "enter": {"sys.exit", "os._exit", "SIGSEGV", "children-and-death", "threads-left"},
    "exit": {"sys.exit", "children-and-death", "threads-left"},
}  # fmt: skip


def cells(stage: str, deeds: Iterable[str]) -> list[str]:
    """Which deeds are done at this stage in this run."""
    is_full = os.environ.get("FANOUT_TEST_FULL") == "1"
    return [deed for deed in deeds if is_full or deed not in ONLY_IN_FULL[stage]]


# --- around each cell -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two cores that kills what does not stop after a short while."""
    yield from engine_of(tmp_path_factory, "2", kill_grace_s=0.3)


def worker_processes(cluster: Cluster) -> set[int]:
    """All processes below the worker, dead ones that nobody has waited for among them."""
    return descendants_of(cluster.daemon_pids()["worker"])


@pytest.fixture
def around(impatient: Cluster, tmp_path: Path) -> Iterator[None]:
    """Runs the app with a neighbour at work; afterwards everything must be as it was."""
    with kit.app.run():
        kit.neighbour.remote(0)
    poll_until(lambda: status()["workers"][0]["containers"] == 0, "the first container leaves")
    before = worker_processes(impatient)
    with kit.app.run():
        calls = kit.neighbour.spawn_map(range(20))
        yield
        assert list(calls.iter()) == list(range(20))
        met = kit.meet.map(range(2), kwargs={"folder": str(tmp_path), "count": 2})
        assert list(met) == [0, 1], "both cores are free"
    wait_until_no_call_is_open()
    poll_until(lambda: is_idle(status()["workers"][0]), lambda: f"all is back: {status()}")
    poll_until(lambda: not left_of(tmp_path), lambda: f"no child is left: {left_of(tmp_path)}")
    poll_until(
        lambda: worker_processes(impatient) <= before,
        lambda: f"no process is left: {worker_processes(impatient) - before}",
    )


def is_idle(worker: dict[str, Any]) -> bool:
    return bool(worker["containers"] == 0 and worker["cpu_free"] == worker["cpu"])


def left_of(folder: Path) -> list[str]:
    """Which of the processes that deeds have started run."""
    return [f"{name} {pid}" for pid, name in kit.noted(folder).items() if is_alive(pid)]


def limited(function: Any, deed: str, **limits: float) -> Any:
    """With a time limit, for what never ends."""
    return function.with_options(**limits) if deed in ENDLESS else function


def check_map(results: list[Any], expected: Expected, deed: str) -> None:
    """The bad input has what is expected, all others their value."""
    assert [x for at, x in enumerate(results) if at != BAD] == [x for x in range(COUNT) if x != BAD]
    expected.check(results[BAD], deed)


def inputs(bad: Any) -> list[Any]:
    return [bad if x == BAD else x for x in range(COUNT)]


# --- the cells ------------------------------------------------------------------------------------


@pytest.mark.parametrize("deed", cells("run", RUN))
def test_while_an_input_runs(around: None, tmp_path: Path, deed: str) -> None:
    function = limited(kit.run, deed, timeout=kit.TIMEOUT_S)
    options = {"deed": deed, "folder": str(tmp_path)}
    results = list(function.map(inputs(deed), kwargs=options, return_exceptions=True))
    check_map(results, RUN[deed], deed)


@pytest.mark.parametrize("deed", cells("pickle", PICKLE))
def test_while_a_result_is_pickled(around: None, tmp_path: Path, deed: str) -> None:
    function = limited(kit.give, deed, timeout=kit.TIMEOUT_S)
    options = {"deed": deed, "folder": str(tmp_path)}
    results = list(function.map(inputs(deed), kwargs=options, return_exceptions=True))
    check_map(results, PICKLE[deed], deed)


@pytest.mark.parametrize("deed", cells("unpickle", UNPICKLE))
def test_while_an_argument_is_unpickled(around: None, tmp_path: Path, deed: str) -> None:
    function = limited(kit.run, deed, timeout=kit.TIMEOUT_S)
    bomb = kit.Bomb(deed, str(tmp_path), "unpickle")
    results = list(function.map(inputs(bomb), return_exceptions=True))
    check_map(results, UNPICKLE[deed], deed)


@pytest.mark.parametrize("deed", cells("yield", YIELD))
def test_between_two_items(around: None, tmp_path: Path, deed: str) -> None:
    function = limited(kit.stream, deed, timeout=kit.TIMEOUT_S)
    options = {"deed": deed, "folder": str(tmp_path)}
    results = list(function.map(inputs(deed), kwargs=options, return_exceptions=True))
    wanted: list[Any] = [(x, number) for x in inputs(deed) for number in range(3)]
    at = 3 * BAD + 1
    if not isinstance(YIELD[deed], Value):
        wanted[at : at + 2] = [results[at]]
        YIELD[deed].check(results[at], deed)
    assert results == wanted


def check_start(results: list[Any], expected: Expected, deed: str) -> None:
    assert len(results) == COUNT
    if isinstance(expected, Value):
        assert results == list(range(COUNT))
        return
    for result in results:
        if isinstance(expected, Died):
            expected.check_start(result)
        else:
            expected.check(result, deed)


@pytest.mark.parametrize("deed", cells("import", START))
def test_while_the_module_is_imported(
    around: None, tmp_path: Path, deed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASH_AT_IMPORT", deed)
    monkeypatch.setenv("CRASH_FOLDER", str(tmp_path))
    module = importlib.import_module("tests.crash_import")
    with module.app.run():
        function = limited(module.run, deed, startup_timeout=kit.TIMEOUT_S)
        results = list(function.map(range(COUNT), return_exceptions=True))
    check_start(results, START[deed], deed)


@pytest.mark.parametrize("deed", cells("enter", ENTER))
def test_in_an_enter_hook(around: None, tmp_path: Path, deed: str) -> None:
    hooked: Any = limited(kit.Hooked, deed, startup_timeout=kit.TIMEOUT_S)
    with kit.last.run():
        made = hooked(at_enter=deed, folder=str(tmp_path))
        results = list(made.run.map(range(COUNT), return_exceptions=True))
    check_start(results, START[deed], deed)


@pytest.mark.parametrize("deed", cells("exit", EXIT))
def test_in_an_exit_hook(impatient: Cluster, around: None, tmp_path: Path, deed: str) -> None:
    hooked: Any = kit.Hooked
    with kit.last.run():
        made = hooked(at_exit=deed, folder=str(tmp_path))
        assert list(made.run.map(range(COUNT))) == list(range(COUNT))
    poll_until(lambda: list(tmp_path.glob("exit-*")), "the hook runs")
