"""The rules of docs/architecture.md that a program can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 650
#: A table: every message on one page is worth more than two files of half the length.
LONG_FILES = {"fanout/protocol/messages.py"}

PACKAGES = {
    "fanout": ROOT / "fanout",
    "fanout_scheduler": ROOT / "scheduler" / "fanout_scheduler",
    "fanout_worker": ROOT / "worker" / "fanout_worker",
}
#: What both daemons may import of `fanout`, besides `fanout.protocol`.
SHARED_LEAVES = {
    "fanout.config",
    "fanout.context",
    "fanout.definition",
    "fanout.exceptions",
    "fanout.filesystem",
    "fanout.intervals",
    "fanout.partial",
    "fanout.remote_errors",
    "fanout.serialization",
    "fanout.tracebacks",
}
#: What the container side may import besides, when user code that needs it is loaded.
CONTAINER_LEAVES = {"fanout.cls"}
#: What a sans-IO module may import besides other sans-IO modules and the leaves without IO.
PURE_STANDARD_LIBRARY = {
    "__future__", "abc", "array", "bisect", "builtins", "collections", "contextlib", "copy",
    "dataclasses", "enum", "functools", "hashlib", "heapq", "hmac", "itertools", "math", "operator",
    "re", "struct", "types", "typing", "unicodedata",
}  # fmt: skip
#: Parts of libraries that only compute.
PURE_LIBRARIES = {"rich.cells", "rich.text"}
PURE_LEAVES = {"fanout.config", "fanout.definition", "fanout.exceptions", "fanout.intervals"}
SANS_IO_FILES = [
    "fanout/protocol/frames.py",
    "fanout/protocol/messages.py",
    "fanout/protocol/connection.py",
    "fanout/protocol/handshake.py",
    "fanout/client/call_state.py",
    "fanout/client/chunk.py",
    "fanout/client/item_stream.py",
    "fanout/output/board.py",
    "fanout/output/log_lines.py",
    "fanout/output/style.py",
    "worker/fanout_worker/commands.py",
    "worker/fanout_worker/worker_state.py",
]
NOT_FOR_IMPORT_FANOUT = ["typer", "rich", "click", "uvloop", "cryptography", "anyio"]
IMPORT_TIME_S_MAX = 0.1
#: Where tests may sleep: the functions that poll, what functions in containers call to take time,
#: and where passing time is what is tested. Functions that fanout decorated are recognised.
SLEEPERS = {
    ("conftest.py", "poll_until"),
    # Polls too, in containers, which do not import what poll_until stands among.
    ("behaviour_kit.py", "wait_for_file"),
    # Containers hold a core with it for a moment, so that two that hold it at once are seen.
    ("behaviour_kit.py", "alone"),
    # How long a network is cut is what is tested.
    ("network_kit.py", "let_pass"),
    # In a container, as the above.
    ("network.py", "wait_for_release"),
    ("test_server_time.py", "test_a_worker_is_not_lost_because_the_scheduler_was_stopped"),
    # A task that ticks: how often it gets a turn while a map is awaited is what is measured.
    ("test_values_and_errors.py", "test_a_running_loop_is_not_blocked_by_a_map"),
}


def files_of(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


SHIPPED = files_of(*PACKAGES.values())
TESTS = files_of(ROOT / "tests")
OTHERS = [
    path
    for path in files_of(ROOT / "examples", ROOT / "benchmarks")
    if path.parent != ROOT / "examples" / "data"
]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    """The dotted name under which a shipped file is imported."""
    for name, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise AssertionError(f"{path} is in no package")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import that happens when the code runs, wherever it stands.

    `from a import b` gives "a.b" when that is a module of ours, and "a" otherwise.
    """
    ours = {module_name(shipped) for shipped in SHIPPED}
    nodes: list[ast.AST] = [parse(path)]
    while nodes:
        node = nodes.pop()
        if is_type_checking(node):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno} imports relatively"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & ours
            yield from ((node.lineno, name) for name in sorted(modules))
            if names - modules:
                yield node.lineno, node.module


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def sans_io_files() -> list[Path]:
    core = files_of(ROOT / "scheduler" / "fanout_scheduler" / "core")
    return core + [ROOT / name for name in SANS_IO_FILES]


def test_there_are_files_to_check() -> None:
    assert len(SHIPPED) > 20
    assert len(TESTS) > 5
    assert all(path.exists() for path in sans_io_files())


def test_fanout_imports_no_daemon() -> None:
    wrong = [
        f"{shown(path)}:{line} imports {name}"
        for path in files_of(PACKAGES["fanout"])
        for line, name in imports_of(path)
        if is_within(name, "fanout_scheduler") or is_within(name, "fanout_worker")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "other"),
    [("fanout_scheduler", "fanout_worker"), ("fanout_worker", "fanout_scheduler")],
)
def test_a_daemon_imports_only_itself_the_protocol_and_the_shared_leaves(
    package: str, other: str
) -> None:
    wrong = []
    for path in files_of(PACKAGES[package]):
        for line, name in imports_of(path):
            if name in CONTAINER_LEAVES and path.parent.name == "runtime":
                continue
            if is_within(name, other) or (
                is_within(name, "fanout")
                and not is_within(name, "fanout.protocol")
                and name not in SHARED_LEAVES | {"fanout"}
            ):
                wrong.append(f"{shown(path)}:{line} imports {name}")
    assert wrong == []


def test_the_protocol_and_the_leaves_import_nothing_above_them() -> None:
    below = SHARED_LEAVES | {"fanout", "fanout.protocol"}
    wrong = []
    for path in files_of(PACKAGES["fanout"]):
        if module_name(path) not in SHARED_LEAVES and path.parent.name != "protocol":
            continue
        for line, name in imports_of(path):
            if (
                is_within(name, "fanout")
                and name not in below
                and not is_within(name, "fanout.protocol")
            ):
                wrong.append(f"{shown(path)}:{line} imports {name}")
    assert wrong == []


def test_sans_io_modules_import_nothing_that_does_io_or_reads_a_clock() -> None:
    pure = {module_name(path) for path in sans_io_files()} | PURE_LEAVES
    packages = {"fanout.protocol", "fanout_scheduler.core"}
    wrong = []
    for path in sans_io_files():
        for line, name in imports_of(path):
            top = name.partition(".")[0]
            is_ours = name in pure | packages | PURE_LIBRARIES
            if not (is_ours or top in PURE_STANDARD_LIBRARY or top == "msgpack"):
                wrong.append(f"{shown(path)}:{line} imports {name}")
    assert wrong == []


def test_the_container_side_needs_only_the_standard_library_cloudpickle_and_msgpack() -> None:
    allowed = {"cloudpickle", "msgpack", "fanout", "fanout_worker"} | sys.stdlib_module_names
    wrong = [
        f"{shown(path)}:{line} imports {name}"
        for path in files_of(PACKAGES["fanout_worker"] / "runtime")
        for line, name in imports_of(path)
        if name.partition(".")[0] not in allowed
    ]
    assert wrong == []


def test_no_function_is_longer_than_a_screen() -> None:
    wrong = []
    for path in SHIPPED + TESTS + OTHERS:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    wrong.append(f"{shown(path)}:{node.lineno} {node.name} has {length} lines")
    assert wrong == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {shown(path): path.read_bytes().count(b"\n") for path in SHIPPED + TESTS + OTHERS}
    too_long = {name: n for name, n in lengths.items() if n > FILE_LINES_MAX}
    assert {name: n for name, n in too_long.items() if name not in LONG_FILES} == {}


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{shown(path)}:{node.lineno}"
        for path in SHIPPED
        if not path.is_relative_to(ROOT / "fanout" / "cli")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []


def test_no_except_without_a_type() -> None:
    wrong = [
        f"{shown(path)}:{node.lineno}"
        for path in SHIPPED + TESTS + OTHERS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert wrong == []


def sleeps_in(path: Path) -> Iterator[tuple[str, int]]:
    """(name of the top-level function or class around it, line) of each call of a sleep."""
    for top in parse(path).body:
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "asyncio.sleep",
                "anyio.sleep",
                "time.sleep",
            ):
                has_no_duration = [ast.unparse(a) for a in node.args] == ["0"]
                if not has_no_duration:
                    yield getattr(top, "name", ""), node.lineno


def runs_in_a_container(path: Path, line: int) -> bool:
    """Whether the line stands in a function that fanout decorated: work that takes time."""
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
        and any(
            ast.unparse(decorator).partition("(")[0].endswith((".function", ".generator"))
            for decorator in node.decorator_list
        )
        for node in ast.walk(parse(path))
    )


def test_tests_wait_for_conditions_and_never_for_time() -> None:
    wrong = [
        f"{shown(path)}:{line}"
        for path in TESTS
        for function, line in sleeps_in(path)
        if (path.name, function) not in SLEEPERS and not runs_in_a_container(path, line)
    ]
    assert wrong == []


def run_python(code: str) -> str:
    folders = [str(ROOT), str(ROOT / "scheduler"), str(ROOT / "worker")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_import_fanout_loads_nothing_heavy() -> None:
    code = f"import fanout, sys; print([n for n in {NOT_FOR_IMPORT_FANOUT} if n in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_declaring_an_app_loads_nothing_heavy() -> None:
    code = (
        "import fanout, sys; app = fanout.App('a'); f = app.function()(lambda x: x);"
        f"print([n for n in {NOT_FOR_IMPORT_FANOUT} if n in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_import_fanout_is_quick() -> None:
    code = (
        "import time; start = time.perf_counter(); import fanout; fanout.App;"
        "print(time.perf_counter() - start)"
    )
    times = [float(run_python(code)) for _ in range(5)]
    factor = 5 if os.environ.get("CI") else 1
    # The best of several: whatever else the machine does only adds to it.
    assert min(times) < IMPORT_TIME_S_MAX * factor
