"""Ends while a map is under way, in one of several ways."""

import itertools
import sys
import threading
from typing import Any

import fanout

app = fanout.App("ends-in-the-middle")


@app.function()
def same(x: int) -> int:
    return x


def consume(results: Any) -> None:
    for _ in results:
        pass


def main(way: str) -> None:
    if way in ("generator", "thread"):
        # Never left in order: the interpreter ends with the app running.
        app.run().__enter__()
        if way == "thread":
            thread = threading.Thread(
                target=consume, args=(same.map(itertools.count()),), daemon=True
            )
            thread.start()
        results = same.map(itertools.count())
        next(results)
        return
    with app.run():
        results = same.map(itertools.count())
        for value in results:
            if value < 2000:
                continue
            if way == "exit":
                sys.exit(3)
            if way == "error":
                raise ZeroDivisionError("division by zero")
            return


if __name__ == "__main__":
    main(sys.argv[1])
