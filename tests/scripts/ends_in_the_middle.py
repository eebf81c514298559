"""Ends while a map is under way, in one of several ways."""

import itertools
import sys

import fanout

app = fanout.App("ends-in-the-middle")


@app.function()
def same(x: int) -> int:
    return x


def main(way: str) -> None:
    if way == "generator":
        # Never left in order: the interpreter ends with the app running.
        app.run().__enter__()
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
