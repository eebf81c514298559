"""What type checkers see of the library. Never run: `test_typing.py` gives it to mypy.

Each mistake is marked with the error it must give; strict mypy complains of a mark without one.
"""

from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, assert_type

import fanout
from fanout.function import Results

app = fanout.App("typing")


@app.function()
def plain(x: int, *, label: str = "") -> float:
    return float(x)


@app.function(timeout=10)
async def later(x: int) -> str:
    return str(x)


@app.function()
def items(n: int) -> Iterator[bytes]:
    yield b""


@app.function()
async def later_items(n: int) -> AsyncIterator[bytes]:
    yield b""


@app.local_entrypoint()
def main(count: int) -> None:
    return None


def blocking() -> None:
    assert_type(plain.remote(1, label="a"), float)
    assert_type(plain.local(1), float)
    assert_type(later.remote(1), str)
    _ = assert_type(later.local(1), Coroutine[Any, Any, str])
    assert_type(items.remote_gen(1), Iterator[bytes])
    assert_type(later_items.remote_gen(1), Iterator[bytes])
    assert_type(plain.map([1], order_outputs=False), Iterator[float])
    assert_type(plain.starmap([(1,)]), Iterator[float])
    assert_type(plain.for_each([1], ignore_exceptions=True), None)
    assert_type(plain.spawn(1), fanout.FunctionCall[float])
    assert_type(plain.spawn(1).get(timeout=1.0), float)
    assert_type(plain.spawn(1).iter(start=1), Iterator[float])
    assert_type(plain.spawn_map([1]), fanout.FunctionCall[float])
    assert_type(plain.spawn(1).num_inputs(), int)
    assert_type(main(3), None)
    with app.run() as running:
        assert_type(running, fanout.App)


async def coroutines() -> None:
    assert_type(await plain.remote.aio(1, label="a"), float)
    assert_type(plain.map.aio([1]), Results[float])
    async for value in plain.map.aio([1]):
        assert_type(value, float)
    async for item in items.remote_gen.aio(1):
        assert_type(item, bytes)
    call = await plain.spawn.aio(1)
    assert_type(call, fanout.FunctionCall[float])
    assert_type(await call.get.aio(timeout=1.0), float)
    async for value in call.iter.aio():
        assert_type(value, float)
    await plain.for_each.aio([1])
    async with app.run() as running:
        assert_type(running, fanout.App)


def stores() -> None:
    queue = fanout.Queue.from_name("q", create_if_missing=True)
    assert_type(queue, fanout.Queue)
    assert_type(queue.hydrate(), fanout.Queue)
    assert_type(queue.get_many(3, timeout=1.0), list[Any])
    assert_type(queue.put(1, partition="p"), None)
    assert_type(queue.len(total=True), int)
    assert_type(queue.iterate(), Iterator[Any])
    assert_type(fanout.Queue.objects.list(), list[fanout.Queue])
    shared = fanout.Dict.from_id("di-0")
    assert_type(shared.put("a", 1, skip_if_exists=True), bool)
    assert_type(shared.items(), Iterator[tuple[Any, Any]])
    with fanout.Dict.ephemeral() as ephemeral:
        assert_type(ephemeral, fanout.Dict)


async def stores_aio() -> None:
    async with fanout.Queue.ephemeral() as queue:
        assert_type(queue, fanout.Queue)
        assert_type(await queue.len.aio(), int)
        assert_type(queue.iterate.aio(), AsyncIterator[Any])


def mistakes() -> None:
    plain.remote("1")  # type: ignore[arg-type]
    plain.remote(1, lable="a")  # type: ignore[call-arg]
    plain.remote()  # type: ignore[call-arg]
    _ = plain.remote.aio("1")  # type: ignore[arg-type]
    plain.spawn(None)  # type: ignore[arg-type]
    plain.map([1], ordered=False)  # type: ignore[call-arg]
    fanout.Queue.from_name("q").put(1, partiton="p")  # type: ignore[call-arg]
    fanout.Queue.from_name("q").get(timeout="1")  # type: ignore[arg-type]
    later.remote(1).bit_length()  # type: ignore[attr-defined]
    app.function(timeout="1")  # type: ignore[arg-type]
