"""Forks while a map is under way; both sides go on calling."""

import itertools
import os
import sys

import fanout

app = fanout.App("forks")


@app.function()
def same(x: int) -> int:
    return x


def main() -> None:
    with app.run():
        results = same.map(range(20_000))
        got = list(itertools.islice(results, 100))
        child = os.fork()
        if child == 0:
            ok = list(same.map(range(500))) == list(range(500)) and same.remote(7) == 7
            os.write(1, b"child ok\n" if ok else b"child got something else\n")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        got += results
        if status != 0 or got != list(range(20_000)):
            sys.exit(f"the child ended with {status}, the parent has {len(got)} results")
        sys.stdout.write("parent ok\n")


if __name__ == "__main__":
    main()
