"""A script as a user writes it, with the time of each stage of its start.

`startup.py` runs it; it prints one JSON line of stages and the time at which each was over.
"""

import time

entered = time.time()

import fanout  # noqa: E402

app = fanout.App("first-result")
imported = time.time()


@app.function()
def noop(x: int) -> int:
    return x


def main() -> None:
    import json

    with app.run():
        running = time.time()
        assert noop.remote(1) == 1
        first = time.time()
        assert noop.remote(2) == 2
        second = time.time()
    print(
        json.dumps(
            {
                "interpreter": entered,
                "import fanout": imported,
                "app.run()": running,
                "first remote()": first,
                "second remote()": second,
                "leaving app.run()": time.time(),
            }
        )
    )


if __name__ == "__main__":
    main()
