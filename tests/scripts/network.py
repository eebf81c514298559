"""What clients do on a bad network; each result is printed as a line of JSON, with its time."""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import Any

import fanout

app = fanout.App("network")


def note(name: str, text: str) -> None:
    """Append a line to a file in the home folder of the host that runs this."""
    with Path(os.environ["HOME"], name).open("a") as notes:
        notes.write(f"{text}\n")


def wait_for_release() -> None:
    """Until the test puts a file into the home folder of this host."""
    while not Path(os.environ["HOME"], "release").exists():
        time.sleep(0.05)


@app.function(cpu=0.1, timeout=900, max_containers=3)
def look(x: int, seconds: float = 0.0, label: str = "") -> tuple[int, str, int]:
    if label:
        note(f"ran-{label}", str(x))
    time.sleep(seconds)
    return x, socket.gethostname(), os.getpid()


@app.function(cpu=0.1, timeout=900)
def items(count: int, seconds: float = 0.0) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


@app.function(cpu=0.2)
def held(kind: str, x: int) -> tuple[int, str, int]:
    note("begun", f"{os.getpid()} {kind} {x}")
    try:
        wait_for_release()
    except BaseException as error:
        note("stopped", f"{os.getpid()} {kind} {x} {type(error).__name__}")
        raise
    note("ended", f"{os.getpid()} {kind} {x}")
    return x, socket.gethostname(), os.getpid()


@app.function(cpu=0.2)
def held_items(count: int) -> Iterator[tuple[int, str, int]]:
    for x in range(count):
        if x == 3:
            note("begun", f"{os.getpid()} item {x}")
            try:
                wait_for_release()
            except BaseException as error:
                note("stopped", f"{os.getpid()} item {x} {type(error).__name__}")
                raise
            note("ended", f"{os.getpid()} item {x}")
        yield x, socket.gethostname(), os.getpid()


@app.function(cpu=0.1, timeout=2400, max_containers=2)
def large(x: int, size: int) -> bytes:
    note("large", str(x))
    return x.to_bytes(8, "little") * (size // 8)


@app.function(cpu=0.05, timeout=2400)
def long_text(size: int) -> str:
    note("text", str(size))
    return "x" * size


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps({"at": time.monotonic(), **what}) + "\n")
    sys.stdout.flush()


async def tell(kind: str, results: AsyncIterable[tuple[int, str, int]]) -> None:
    async for x, host, pid in results:
        say(kind=kind, x=x, host=host, pid=pid)
    say(end=kind)


async def tell_items(results: AsyncIterable[int]) -> None:
    async for x in results:
        say(kind="item", x=x)
    say(end="item")


def run_flow(count: str, seconds: str) -> None:
    """A map, a generator and a spawned call at the same time."""
    inputs = range(int(count))
    kwargs = {"seconds": float(seconds), "label": socket.gethostname()}

    async def main() -> None:
        spawned = await look.spawn_map.aio(inputs, kwargs=kwargs)
        await asyncio.gather(
            tell("map", look.map.aio(inputs, kwargs=kwargs)),
            tell_items(items.remote_gen.aio(int(count), float(seconds))),
            tell("spawned", spawned.iter.aio()),
        )

    asyncio.run(main())


def run_map(count: str) -> None:
    asyncio.run(tell("map", look.map.aio(range(int(count)))))


def run_generator(count: str) -> None:
    asyncio.run(tell_items(items.remote_gen.aio(int(count))))


def run_calls(count: str) -> None:
    for x in range(int(count)):
        begun = time.monotonic()
        assert look.remote(x)[0] == x
        say(x=x, seconds=time.monotonic() - begun)


def run_large(count: str, size: str) -> None:
    results = large.map(range(int(count)), kwargs={"size": int(size)})
    for x, result in enumerate(results):
        assert result == x.to_bytes(8, "little") * (int(size) // 8)
        say(x=x)


def run_text(size: str) -> None:
    assert long_text.remote(int(size)) == "x" * int(size)
    say(x=0)


def run_held() -> None:
    """Five inputs that end when they are released: of a map, of a generator, and spawned."""

    async def main() -> None:
        spawned = await held.spawn_map.aio(["spawned"] * 2, range(2))
        say(call_id=spawned.object_id)
        await asyncio.gather(
            tell("map", held.map.aio(["map"] * 2, range(2))),
            tell("item", held_items.remote_gen.aio(5)),
            tell("spawned", spawned.iter.aio()),
        )

    asyncio.run(main())
    say(held=True)
    sys.stdin.readline()
    asyncio.run(tell("again", held.map.aio(["again"] * 8, range(8))))


def run_spawn() -> None:
    call = held.spawn_map(["spawned"] * 2, range(2))
    say(call_id=call.object_id)
    held.remote("attached", 0)


def run_collect(call_id: str) -> None:
    asyncio.run(tell("spawned", fanout.FunctionCall.from_id(call_id).iter.aio()))


if __name__ == "__main__":
    begun = time.monotonic()
    with app.run():
        say(connected=time.monotonic() - begun)
        globals()[f"run_{sys.argv[1]}"](*sys.argv[2:])
    say(done=True)
