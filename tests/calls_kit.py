"""What the tests of calls and maps run in containers, which import it: nothing here is slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fanout
from tests.behaviour_kit import wait_for_file

app = fanout.App("calls")


class Refused(Exception):
    """What `fail_late_and_early` raises."""


@app.function()
def same(x: Any) -> Any:
    return x


@app.function()
def add(x: int, y: int = 0, *, z: int = 0) -> int:
    return x + y + z


@app.function()
def hold(x: Any, folder: str) -> int:
    """Gives 0 for what is 0, at once; everything else waits until there is a file `go`."""
    if x:
        wait_for_file(os.path.join(folder, "go"))
    return 1 if x else 0


@app.function()
def note_and_hold(x: int, folder: str) -> int:
    """Leaves `begun-<x>`, waits for a file `go`, and leaves `ended-<x>`; input 0 does not wait."""
    Path(folder, f"begun-{x}").touch()
    if x:
        wait_for_file(os.path.join(folder, "go"))
    Path(folder, f"ended-{x}").touch()
    return x


@app.function()
def fail_late_and_early(x: int, folder: str) -> int:
    """Inputs 70 and 7 fail, 7 only after 70 has."""
    if x == 70:
        Path(folder, "failed-70").touch()
        raise Refused(x)
    if x == 7:
        wait_for_file(os.path.join(folder, "failed-70"))
        raise Refused(x)
    return x


@app.function()
def endless(name: str, folder: str) -> Iterator[tuple[str, int]]:
    """Endless; how far it came stands in the file `made-<name>`."""
    number = 0
    while True:
        Path(folder, f"made-{name}").write_text(str(number))
        yield name, number
        number += 1


@app.function()
def leave(x: int) -> int:
    if x == 1:
        raise SystemExit(x)
    return x


@app.function()
def items(n: int) -> Iterator[int]:
    yield from range(n)


# --- functions that call functions ---------------------------------------------------------------


@app.function()
def note_children(x: int, folder: str) -> list[int]:
    """Makes calls of its own and keeps one of them open until there is a file `go`."""
    call = add.spawn(x, 1)
    first: int = same.remote(x)
    held = hold.remote(x, folder)
    return [first, held, call.get()]


@app.function()
def call_all(functions: Any, x: int) -> Any:
    """Calls each handle in a container of data."""
    if isinstance(functions, dict):
        return {name: call_all.local(value, x) for name, value in functions.items()}
    if isinstance(functions, list | tuple):
        return [call_all.local(value, x) for value in functions]
    return functions.remote(x)


@app.function()
def hand_back(function: Any) -> Any:
    """The handle itself, a call that it made, and its own handle, within each other."""
    return {"function": function, "calls": [(function.spawn(2), hand_back)]}


@app.function()
def collect(calls: Any) -> list[Any]:
    return [call.get() for _, call in sorted(calls.items())]


@app.function()
def note_how_it_ends(folder: str) -> None:
    """Leaves its pid in `begun`, and `asked` when it is asked to stop."""
    path = Path(folder, "pid")
    path.write_text(str(os.getpid()))
    path.rename(Path(folder, "begun"))
    try:
        wait_for_file(os.path.join(folder, "go"))
    except BaseException:
        Path(folder, "asked").touch()
        raise


@app.function()
def fail_or_note(x: int, folder: str) -> int:
    if x < 0:
        raise Refused(x)
    wait_for_file(os.path.join(folder, "go"))
    Path(folder, f"ended-{x}").touch()
    return x


@app.function(env={"KIT_VARIABLE": "own"})
def variable(name: str) -> str | None:
    return os.environ.get(name)


@app.function()
def call_local(function: Any, x: int) -> Any:
    return function.local(x)


@app.function()
def call_batched(function: Any, x: int) -> Any:
    return function.with_batching(max_batch_size=2, wait_ms=0).remote(x)


@app.function()
def call_with_env(function: Any, envs: list[dict[str, str]]) -> list[Any]:
    """What a function finds in its own environment, and in others."""
    functions = [function, *(function.with_options(env=env) for env in envs)]
    return [function.remote("KIT_VARIABLE") for function in functions]


@app.function(max_containers=1)
def six_from(start: int) -> Iterator[int]:
    yield from range(start, start + 6)
