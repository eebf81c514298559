"""A client of the tests of floods: functions that print, and what comes of the work beside them."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import fanout

app = fanout.App("prints")


@app.function(cpu=1)
def flood(how: str, size_bytes: int, line_size_bytes: int) -> float:
    """Print so much, as fast as it goes; gives the seconds that it took."""
    line = "x" * (line_size_bytes - 1) + "\n"
    data = line.encode()
    start = time.perf_counter()
    for _ in range(size_bytes // line_size_bytes):
        if how == "print":
            sys.stdout.write(line)
        else:
            os.write(1, data)
    return time.perf_counter() - start


@app.function(cpu=1)
def quick(x: int) -> int:
    return x


@app.function(cpu=0.5)
def chat(x: int, line_size_bytes: int) -> int:
    sys.stdout.write(f"{x:08}" + "y" * (line_size_bytes - 9) + "\n")
    time.sleep(0.002)
    return x


def beside(call: Any) -> dict[str, Any]:
    """How long small calls take while this one runs."""
    got: list[float] = []
    thread = threading.Thread(target=lambda: got.append(call()))
    quick.remote(0)
    thread.start()
    took_s: list[float] = []
    while thread.is_alive():
        start = time.perf_counter()
        assert quick.remote(len(took_s)) == len(took_s)
        took_s.append(time.perf_counter() - start)
    thread.join()
    return {"flood_s": got[0], "median_s": median(took_s), "worst_s": max(took_s)}


def measure(how: str, size_bytes: int, line_size_bytes: int) -> dict[str, Any]:
    found = beside(lambda: flood.remote(how, size_bytes, line_size_bytes))
    found["memory_bytes"] = peak_memory_bytes()
    return found


def peak_memory_bytes() -> int:
    """Of this process alone: the peak of `getrusage` begins with that of who started it."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) << 10


def talk(path: str, count: int, line_size_bytes: int) -> None:
    """Spawn inputs that print, and be there for as long as they run."""
    call = chat.spawn_map(range(count), kwargs={"line_size_bytes": line_size_bytes})
    Path(path).touch()
    assert call.get(index=count - 1) == count - 1


if __name__ == "__main__":
    path, what, *numbers = sys.argv[1:]
    with fanout.enable_output(show_progress=False), app.run():
        if what == "talk":
            talk(path, *map(int, numbers))
        else:
            found = measure(what, *map(int, numbers))
            Path(path).write_text(json.dumps(found))
