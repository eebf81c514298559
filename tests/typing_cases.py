"""What type checkers see of calls. Never run: `test_typing.py` gives it to mypy and to pyright.

Each mistake is marked with the error that mypy gives for it; pyright must find it too.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Iterator
from typing import Any, assert_type

import fanout
from fanout.results import BlockingResults, Results

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
def generated(n: int, fill: bytes = b"") -> Generator[bytes, None, None]:
    yield fill


@app.function()
async def later_items(n: int) -> AsyncIterator[bytes]:
    yield b""


@app.function()
async def later_generated(n: int) -> AsyncGenerator[bytes, None]:
    yield b""


@app.function()
def optional(x: int | None = None) -> list[str] | None:
    return None


@app.local_entrypoint()
def main(count: int) -> None:
    return None


async def numbers() -> AsyncIterator[int]:
    yield 1


def single_calls() -> None:
    assert_type(plain.remote(1, label="a"), float)
    assert_type(plain.local(1), float)
    assert_type(later.remote(1), str)
    _ = assert_type(later.local(1), Coroutine[Any, Any, str])
    assert_type(optional.remote(), list[str] | None)
    assert_type(items.remote_gen(1), BlockingResults[bytes])
    assert_type(generated.remote_gen(1, fill=b""), BlockingResults[bytes])
    assert_type(later_items.remote_gen(1), BlockingResults[bytes])
    assert_type(later_generated.remote_gen(1), BlockingResults[bytes])
    assert_type(items.local(1), Iterator[bytes])
    assert_type(generated.local(1), Generator[bytes, None, None])
    assert_type(later_generated.local(1), AsyncGenerator[bytes, None])
    items.remote_gen(1).close()
    assert_type(main(3), None)


def many_inputs() -> None:
    results = plain.map([1], order_outputs=False)
    assert_type(results, BlockingResults[float])
    as_generator: Generator[float, None, None] = results
    as_generator.close()
    assert_type(next(results), float)
    assert_type(list(results), list[float])
    assert_type([x for x in later.map(numbers(), "ab")], list[str])  # noqa: C416
    assert_type([x for x in later_items.map([1])], list[bytes])  # noqa: C416
    assert_type(plain.starmap([(1,)], kwargs={"label": ""}), BlockingResults[float])
    assert_type(plain.for_each([1], ignore_exceptions=True), None)
    assert_type(plain.spawn_map([1]), fanout.FunctionCall[float])
    assert_type(plain.experimental_spawn_map([1]), fanout.FunctionCall[float])


def spawned_calls() -> None:
    call = plain.spawn(1, label="a")
    assert_type(call, fanout.FunctionCall[float])
    assert_type(call.get(timeout=1.0), float)
    assert_type(call.iter(start=1), Generator[float, None, None])
    assert_type(call.num_inputs(), int)
    assert_type(call.cancel(terminate_containers=True), None)
    assert_type(call.get_call_graph(), list[fanout.types.InputInfo])
    assert_type(call.get_call_graph()[0].status, fanout.types.InputStatus)
    assert_type(call.object_id, str)
    assert_type(fanout.FunctionCall.from_id("fc-"), fanout.FunctionCall[Any])
    assert_type(fanout.FunctionCall.gather(call, call), list[float])
    assert_type(later.spawn(1).get(), str)


async def coroutines() -> None:
    assert_type(await plain.remote.aio(1, label="a"), float)
    assert_type(await later.remote.aio(1), str)
    assert_type(plain.map.aio([1]), Results[float])
    assert_type(await plain.map.aio([1]), list[float])
    assert_type(await later_items.starmap.aio([(1,)]), list[bytes])
    assert_type([x async for x in plain.map.aio(numbers())], list[float])
    assert_type([x async for x in plain.map([1])], list[float])
    assert_type([x async for x in items.remote_gen.aio(1)], list[bytes])
    assert_type([x async for x in later_generated.remote_gen.aio(1)], list[bytes])
    await plain.map.aio([1]).aclose()
    assert_type(await plain.for_each.aio([1]), None)
    call = await plain.spawn.aio(1)
    assert_type(call, fanout.FunctionCall[float])
    assert_type(await plain.spawn_map.aio([1]), fanout.FunctionCall[float])
    assert_type(await call.get.aio(timeout=1.0), float)
    assert_type([x async for x in call.iter.aio()], list[float])
    assert_type(await call.num_inputs.aio(), int)
    assert_type(await call.cancel.aio(), None)
    assert_type(await call.get_call_graph.aio(), list[fanout.types.InputInfo])
    assert_type(await fanout.FunctionCall.gather.aio(call, call), list[float])


async def apps() -> None:
    with app.run(name="other") as running:
        assert_type(running, fanout.App)
    async with app.run() as running:
        assert_type(running, fanout.App)
    assert_type(app.include(fanout.App("b", tags={"a": "b"})), fanout.App)
    assert_type(app.get_tags(), dict[str, str])
    assert_type(app.name, str | None)


def mistakes() -> None:
    plain.remote("1")  # type: ignore[arg-type]
    plain.remote(1, lable="a")  # type: ignore[call-arg]
    plain.remote()  # type: ignore[call-arg]
    plain.remote(1, "a")  # type: ignore[call-arg]
    _ = plain.remote.aio("1")  # type: ignore[arg-type]
    plain.spawn(None)  # type: ignore[arg-type]
    plain.local("1")  # type: ignore[arg-type]
    items.remote_gen("1")  # type: ignore[arg-type]
    later_items.remote_gen.aio(n="1")  # type: ignore[arg-type]
    plain.map([1], ordered=False)  # type: ignore[call-arg]
    plain.map(1)  # type: ignore[arg-type]
    plain.map([1], return_exceptions="no")  # type: ignore[arg-type]
    plain.starmap([1, 2])  # type: ignore[list-item]
    plain.starmap([(1,)], order_output=False)  # type: ignore[call-arg]
    plain.for_each([1], return_exceptions=True)  # type: ignore[call-arg]
    later.remote(1).bit_length()  # type: ignore[attr-defined]
    plain.spawn(1).get("soon")  # type: ignore[arg-type]
    plain.spawn(1).get().lower()  # type: ignore[attr-defined]
    app.function(timeout="1")  # type: ignore[arg-type]
    number: int = plain.remote(1)  # type: ignore[assignment]
    texts: list[str] = list(plain.map([number]))  # type: ignore[arg-type]
    texts.clear()


# --- classes, queues, dicts -----------------------------------------------------------------------


@app.cls(max_containers=2)
class Model:
    size: str = fanout.parameter(default="small")

    @fanout.enter()
    def load(self) -> None: ...

    @fanout.method()
    def predict(self, text: str, *, top: int = 1) -> float:
        return 1.0

    @fanout.method()
    def stream(self, count: int) -> Iterator[bytes]:
        yield b""


def classes() -> None:
    model = Model()
    assert_type(model.predict.remote("a", top=2), float)
    assert_type(model.predict.map(["a"]), BlockingResults[float])
    assert_type(model.stream.remote_gen(3), BlockingResults[bytes])
    assert_type(model.predict.spawn("a"), fanout.FunctionCall[float])
    assert_type(model.size, str)


def stores() -> None:
    queue = fanout.Queue.from_name("q", create_if_missing=True)
    assert_type(queue, fanout.Queue)
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


def wrong_uses_of_classes_and_stores() -> None:
    Model().predict.remote(3)  # type: ignore[arg-type]
    fanout.Queue.from_name("q").put(1, partiton="p")  # type: ignore[call-arg]
    fanout.Queue.from_name("q").get(timeout="1")  # type: ignore[arg-type]
