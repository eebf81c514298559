"""What clients do on a bad network; each result is printed as a line of JSON, with its time."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fanout

app = fanout.App("network")


def note(name: str, text: str) -> None:
    """Append a line to a file in the home folder of the host that runs this."""
    with Path(os.environ["HOME"], name).open("a") as notes:
        notes.write(f"{text}\n")


@app.function(cpu=0.1)
def look(x: int, seconds: float = 0.0) -> tuple[int, str, int]:
    time.sleep(seconds)
    return x, socket.gethostname(), os.getpid()


@app.function(cpu=0.1)
def items(count: int, seconds: float = 0.0) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


@app.function(cpu=0.1)
def large(x: int, size: int) -> bytes:
    note("large", str(x))
    return x.to_bytes(8, "little") * (size // 8)


@app.function(cpu=0.1)
def endless(x: int) -> int:
    note("begun", str(os.getpid()))
    try:
        time.sleep(600)
    except BaseException as error:
        note("stopped", f"{os.getpid()} {type(error).__name__}")
        raise
    return x


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps({"at": time.monotonic(), **what}) + "\n")
    sys.stdout.flush()


def run_map(count: str, seconds: str) -> None:
    for x, host, pid in look.map(range(int(count)), kwargs={"seconds": float(seconds)}):
        say(x=x, host=host, pid=pid)


def run_generator(count: str, seconds: str) -> None:
    for item in items.remote_gen(int(count), float(seconds)):
        say(item=item)


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


def run_endless() -> None:
    say(x=endless.remote(1))


def run_spawn(count: str, seconds: str) -> None:
    call = look.spawn_map(range(int(count)), kwargs={"seconds": float(seconds)})
    say(call_id=call.object_id)
    sys.stdin.readline()


def run_collect(call_id: str) -> None:
    for x, host, pid in fanout.FunctionCall.from_id(call_id).iter():
        say(x=x, host=host, pid=pid)


if __name__ == "__main__":
    begun = time.monotonic()
    with app.run():
        say(connected=time.monotonic() - begun)
        globals()[f"run_{sys.argv[1]}"](*sys.argv[2:])
    say(done=True)
