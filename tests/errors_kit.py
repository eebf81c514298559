"""What the tests of errors and of the context run in containers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import fanout

app = fanout.App("errors")

IS_LOCAL_AT_IMPORT = fanout.is_local()

Ids = tuple[str | None, str | None]


# --- failing --------------------------------------------------------------------------------------


class Stubborn(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"failed with {code}")
        self.code = code


def divide(x: int) -> int:
    return 1 // x


@app.function()
def fail(x: int) -> int:
    return divide(x)


@app.function()
async def fail_async(x: int) -> int:
    await asyncio.sleep(0)
    return divide(x)


@app.function()
def fail_after_one(x: int) -> Iterator[int]:
    yield x
    divide(x)


@app.function()
async def fail_after_one_async(x: int) -> AsyncIterator[int]:
    yield x
    divide(x)


@app.function()
def fail_further_in(x: int) -> int:
    return fail.remote(x)


@app.function()
def fail_oddly(kind: str) -> Any:
    if kind == "keyword":
        raise Stubborn(code=3)
    if kind == "attribute":
        error = Stubborn(code=3)
        error.door = threading.Lock()  # type: ignore[attr-defined]
        raise error
    if kind == "local":

        class Local(Exception):
            pass

        raise Local("by value")
    if kind == "huge":
        raise ValueError("x" * (8 << 20))
    if kind == "recursion":
        return fail_oddly.local(kind)
    if kind == "exit":
        sys.exit(7)
    if kind == "interrupt":
        raise KeyboardInterrupt("from afar")
    raise AssertionError(kind)


@app.function()
async def fail_as_a_group() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_fail_with_cause())
        tasks.create_task(_fail_plainly())


async def _fail_plainly() -> None:
    divide(0)


async def _fail_with_cause() -> None:
    try:
        divide(0)
    except ZeroDivisionError as error:
        error.add_note("a note")
        raise Stubborn(code=4) from error


@app.function()
def die(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(7)


@app.function(timeout=0.3)
def hang() -> None:
    time.sleep(600)


@app.function()
def wait(x: int) -> None:
    time.sleep(600)


@app.function(memory=64)
def take_memory(size_mib: int) -> int:
    taken = [bytearray(os.urandom(1 << 20)) for _ in range(size_mib)]
    return len(taken)


# --- looking round --------------------------------------------------------------------------------


def ids() -> Ids:
    return fanout.current_input_id(), fanout.current_function_call_id()


@app.function()
def own_ids(x: int) -> Ids:
    return ids()


@app.function()
async def own_ids_async(x: int) -> list[Ids]:
    return [ids(), await asyncio.create_task(_ids_later()), await asyncio.to_thread(ids)]


async def _ids_later() -> Ids:
    await asyncio.sleep(0)
    return ids()


@app.function()
def own_ids_as_item(x: int) -> Iterator[Ids]:
    yield ids()
    yield ids()


@app.function()
def ids_of_threads() -> tuple[Ids, Ids, Ids]:
    found: list[Ids] = []
    in_copy = copy_context()
    for target in (lambda: found.append(ids()), lambda: in_copy.run(lambda: found.append(ids()))):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    return ids(), found[0], found[1]


@app.function()
def ids_and_those_of_a_call() -> tuple[Ids, Ids, Ids]:
    before = ids()
    return before, own_ids.remote(1), ids()


@app.function(retries=fanout.Retries(max_retries=2, initial_delay=0))
def note_id_and_fail(folder: str) -> None:
    with open(os.path.join(folder, "ids"), "a") as file:
        file.write(f"{fanout.current_input_id()}\n")
    raise ValueError("again")


@app.function()
def where() -> tuple[bool, bool, str]:
    code = "import fanout; print(fanout.is_local())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return fanout.is_local(), IS_LOCAL_AT_IMPORT, done.stdout.strip()


@app.function()
def variables() -> tuple[dict[str, str], str]:
    shown = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    return dict(os.environ), shown


@app.function()
def try_interact() -> None:
    fanout.interact()


@app.function()
def touch(path: str) -> None:
    Path(path).touch()
