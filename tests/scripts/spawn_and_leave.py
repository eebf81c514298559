"""Spawns inputs that wait for a file, tells their call and ends."""

import sys
import time
from pathlib import Path

import fanout

app = fanout.App("spawn-and-leave")


@app.function()
def wait(x: int, folder: str) -> int:
    deadline = time.monotonic() + 60
    while not Path(folder, "go").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody let the function go")
        time.sleep(0.005)
    return x


def main(folder: str) -> None:
    with app.run():
        call = wait.spawn_map(range(3), kwargs={"folder": folder})
    sys.stdout.write(call.object_id)


if __name__ == "__main__":
    main(sys.argv[1])
