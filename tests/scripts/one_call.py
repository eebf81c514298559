"""Makes one call."""

import sys

import fanout

app = fanout.App("one-call")


@app.function()
def square(x: int) -> int:
    return x * x


if __name__ == "__main__":
    with app.run():
        sys.stdout.write(f"{square.remote(7)}\n")
