"""Maps over inputs that never end; to be interrupted or killed."""

import itertools
import sys
import time
from pathlib import Path

import fanout

app = fanout.App("endless")


@app.function()
def wait(x: int, folder: str) -> int:
    import os

    if x >= 5:
        path = Path(folder, f"begun-{x}")
        path.with_suffix(".part").write_text(str(os.getpid()))
        path.with_suffix(".part").rename(path)
        time.sleep(600)
        Path(folder, f"ended-{x}").touch()
    return x


def main(folder: str) -> None:
    with app.run():
        for _ in wait.map(itertools.count(), kwargs={"folder": folder}):
            pass


if __name__ == "__main__":
    main(sys.argv[1])
