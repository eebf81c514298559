"""The same calls from an asyncio program: every method has a twin under `.aio`.

python examples/async_app.py
"""

import asyncio

import fanout

app = fanout.App("async-app")


@app.function()
def square(x: int) -> int:
    return x * x


@app.function()
async def slow_square(x: int) -> int:
    """Functions may be async too; the container runs them on an event loop."""
    await asyncio.sleep(0.01)
    return x * x


async def main() -> None:
    async with app.run():
        squares = await square.map.aio(range(1000))
        print(f"awaited map: {len(squares)} squares, the last is {squares[-1]}")

        total = 0
        async for value in square.map.aio(range(1000), order_outputs=False):
            total += value
        print(f"async for: the squares add up to {total}")

        values = await asyncio.gather(*(slow_square.remote.aio(x) for x in range(100)))
        print(f"a hundred calls at once: they add up to {sum(values)}")


if __name__ == "__main__":
    asyncio.run(main())
