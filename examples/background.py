"""Start work, leave, and come back for the results in another process.

    $ python examples/background.py
    fc-0123...
    $ python examples/background.py fc-0123...
    100 results, they add up to 328350

`spawn_map` returns as soon as the inputs are stored. The script may end, the scheduler may even be
restarted: the call goes on, and its results are kept for seven days.
"""

import sys
import time

import fanout

app = fanout.App("background")


@app.function()
def slow_square(x: int) -> int:
    time.sleep(0.02)
    return x * x


def start() -> None:
    with app.run():
        call = slow_square.spawn_map(range(100))
    print(call.object_id)


def collect(call_id: str) -> None:
    call: fanout.FunctionCall[int] = fanout.FunctionCall.from_id(call_id)
    results = list(call.iter())
    print(f"{len(results)} results, they add up to {sum(results)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(sys.argv[1])
    else:
        start()
