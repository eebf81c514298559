"""Every wrong use of the library says what, which value, and what to do instead."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

import fanout
from fanout import context
from fanout.client.inputs import Encoder, Puller, Rows
from fanout.definition import Environment
from fanout.exceptions import ConnectionError, ExecutionError, InvalidError

#: libuv keeps one pipe for signals in each process; made here, it is no leak of a test.
uvloop.new_event_loop().close()

app = fanout.App("misuse")


@app.function()
def plain(x: int) -> int:
    return x


@app.function()
def items(n: int) -> Iterator[int]:
    yield from range(n)


@app.generator()
def older(n: int) -> Iterator[int]:
    yield n


@app.function()
async def later(x: int) -> int:
    return x


def refuses(pattern: str, action: Callable[[], Any], kind: type[Exception] = InvalidError) -> None:
    with pytest.raises(kind, match=pattern):
        action()


# --- decorating -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"timeout": None}, "timeout=None"),
        ({"timeout": 0}, "timeout=0: must be seconds, more than 0"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": True}, "timeout=True"),
        ({"retries": -1}, "retries=-1: must be an int of at least 0"),
        ({"retries": "2"}, "retries='2'"),
        ({"max_containers": 0}, "max_containers=0: must be an int of at least 1"),
        ({"concurrency_limit": 0}, "max_containers=0"),
        ({"max_containers": 1, "concurrency_limit": 1}, "two names of one option"),
        ({"cpu": 0}, "cpu=0: must be a number of cores above 0"),
        ({"cpu": float("nan")}, "cpu=nan"),
        ({"memory": -1}, "memory=-1: must be an int of MiB"),
        ({"memory": 1.5}, "memory=1.5"),
        ({"scaledown_window": -1}, "scaledown_window=-1"),
        ({"serialized": 1}, "serialized=1"),
        ({"name": ""}, "name=''"),
    ],
)
def test_wrong_options_are_refused_where_they_are_written(
    options: dict[str, Any], pattern: str
) -> None:
    refuses(pattern, lambda: fanout.App().function(**options)(_module_level))


def _module_level() -> None:
    return None


def test_the_limits_of_options_themselves_are_allowed() -> None:
    function = fanout.App().function(timeout=0.001, retries=0, max_containers=1, memory=0)(
        _module_level
    )
    assert function.service.options.retries is None
    assert function.service.options.max_containers == 1


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_retries": 1.0}, "max_retries=1.0"),
        ({"max_retries": 1, "backoff_coefficient": 0.5}, "from 1 to 10"),
        ({"max_retries": 1, "initial_delay": -0.1}, "from 0 to 60"),
        ({"max_retries": 1, "initial_delay": 61}, "from 0 to 60"),
        ({"max_retries": 1, "max_delay": 0.5}, "from 1 to 60"),
    ],
)
def test_retries_are_checked(fields: dict[str, Any], pattern: str) -> None:
    refuses(pattern, lambda: fanout.Retries(**fields))


def test_a_count_of_retries_means_a_fixed_delay() -> None:
    function = fanout.App().function(retries=3)(_module_level)
    assert function.service.options.retries is not None
    assert function.service.options.retries.as_data() == [3, 1.0, 1.0, 60.0]
    assert fanout.Retries(2, initial_delay=0).as_data() == [2, 0.0, 2.0, 60.0]


def test_decorators_need_their_parentheses() -> None:
    wrong: Any = fanout.App()
    refuses("with parentheses", lambda: wrong.function(_module_level))
    refuses("with parentheses", lambda: wrong.generator(_module_level))
    refuses("with parentheses", lambda: wrong.local_entrypoint(_module_level))


def test_only_functions_are_decorated() -> None:
    wrong: Any = fanout.App().function()
    refuses("is a class", lambda: wrong(int))
    refuses("this is a int", lambda: wrong(3))
    refuses("on top of another", lambda: wrong(plain))


def test_a_closure_must_say_that_it_is_serialized() -> None:
    def closure() -> None:
        return None

    refuses("serialized=True", lambda: fanout.App().function()(closure))
    assert fanout.App().function(serialized=True)(closure).get_raw_f() is closure


def test_retries_of_a_generator_are_refused() -> None:
    refuses("items would come twice", lambda: fanout.App().function(retries=1)(items.get_raw_f()))


def test_two_entrypoints_of_one_name_are_refused() -> None:
    other = fanout.App("two")
    other.local_entrypoint()(_module_level)
    refuses("entrypoint '_module_level' already", lambda: other.local_entrypoint()(_module_level))
    other.local_entrypoint(name="second")(_module_level)
    assert sorted(other.registered_entrypoints) == ["_module_level", "second"]


def test_an_app_needs_a_name_that_is_one() -> None:
    refuses("App\\(name=''\\)", lambda: fanout.App(""))
    wrong: Any = fanout.App
    refuses("must be a text", lambda: wrong(_module_level))


def test_stub_is_the_older_name() -> None:
    assert fanout.Stub is fanout.App
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fanout.nothing


# --- calling --------------------------------------------------------------------------------------


def test_a_function_is_not_called_directly() -> None:
    wrong: Any = plain
    refuses(r"plain\.remote\(\.\.\.\)", lambda: wrong(3))
    refuses(r"plain\.remote\(\.\.\.\)", lambda: list(map(wrong, [1])))
    refuses(r"plain\.map\(\.\.\.\)", lambda: list(wrong))
    refuses(r"items\.remote_gen\(\.\.\.\)", lambda: list(items))


def test_local_runs_here() -> None:
    assert plain.local(3) == 3
    assert list(items.local(3)) == [0, 1, 2]
    assert asyncio.run(later.local(3)) == 3


def test_generators_and_plain_functions_are_not_mixed_up() -> None:
    assert items.is_generator
    assert older.is_generator
    refuses(r"items\.remote_gen\(", lambda: items.remote(3))
    refuses(r"plain\.remote\(", lambda: plain.remote_gen(3))
    refuses(r"items is a generator function", lambda: items.spawn(3))
    refuses(r"items\.map\(", lambda: items.spawn_map([3]))


@pytest.mark.parametrize("method", ["map", "for_each", "spawn_map"])
def test_a_map_over_nothing_is_refused(method: str) -> None:
    refuses("got no iterator", getattr(plain, method))


def test_what_is_not_iterable_is_named() -> None:
    number: Any = 2
    refuses(r"argument 1 of plain\.map\(\) is a int", lambda: plain.map([1], number))
    refuses(r"argument 0 of plain\.starmap\(\) is a int", lambda: plain.starmap(number))


def test_starmap_wants_sequences() -> None:
    rows = Rows("f.starmap", ([1],), is_star=True)
    refuses("unpacks each value into arguments, and got a int", lambda: list(rows.start()))


def test_a_call_without_a_running_app_says_how_to_run_one() -> None:
    for action in (
        lambda: plain.remote(1),
        lambda: plain.map([1]),
        lambda: plain.spawn(1),
        lambda: items.remote_gen(1),
    ):
        refuses(r"with app\.run\(\)", action, ExecutionError)


async def test_a_blocking_call_in_a_running_loop_is_refused_with_the_right_line() -> None:
    refuses(r"await plain\.remote\.aio\(\.\.\.\)", lambda: plain.remote(1))
    refuses(r"await plain\.for_each\.aio", lambda: plain.for_each([1]))
    refuses(r"await plain\.spawn\.aio", lambda: plain.spawn(1))
    refuses(r"await plain\.spawn_map\.aio", lambda: plain.spawn_map([1]))
    refuses(r"async with app\.run\(\)", lambda: app.run().__enter__())
    call = fanout.FunctionCall.from_id("fc-" + "0" * 32)
    refuses(r"await call\.get\.aio", lambda: call.get())


@pytest.mark.parametrize(
    "text", ["", "fc-", "fc-xyz", "0" * 32, "fc-" + "0" * 31, "fc-" + "0" * 34]
)
def test_a_wrong_call_id_is_refused(text: str) -> None:
    refuses("32 hexadecimal", lambda: fanout.FunctionCall.from_id(text))


def test_a_call_id_comes_back() -> None:
    call = fanout.FunctionCall.from_id("fc-" + "0123456789abcdef" * 2)
    assert call.object_id == "fc-" + "0123456789abcdef" * 2
    assert call == fanout.FunctionCall.from_id(call.object_id)


def test_running_an_app_in_a_container_names_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment("python", "3.11", [], "/", {})
    here = context.ContainerContext(
        1, b"a" * 16, "app", b"f" * 16, "f", environment, False, "", b"", ""
    )
    monkeypatch.setattr(context, "container", here)
    refuses('if __name__ == "__main__"', app.run)


def test_a_scheduler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "A" * 43
    monkeypatch.setenv("FANOUT_URL", f"fanout://client.abc:{secret}@127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1.*fanout scheduler"):
        app.run().__enter__()
    assert app.app_id is None
    monkeypatch.setenv("FANOUT_URL", "redis://localhost")
    refuses("fanout://", lambda: app.run().__enter__())
    from fanout.client import loop

    loop.stop()


# --- pulling --------------------------------------------------------------------------------------


def test_a_slow_iterator_is_pulled_one_at_a_time() -> None:
    def slow() -> Iterator[int]:
        for number in range(100):
            deadline = time.perf_counter() + 0.003
            while time.perf_counter() < deadline:
                pass
            yield number

    puller = Puller(slow(), Encoder(None, True))
    assert len(puller.pull(512, 1 << 20).inputs) == 1
    assert puller.is_slow


def test_a_quick_iterator_is_pulled_in_chunks_and_never_beyond_the_room() -> None:
    puller = Puller(iter(range(100_000)), Encoder(None, True))
    sizes = [len(puller.pull(512, 1 << 20).inputs) for _ in range(20)]
    assert max(sizes) > 100
    assert len(puller.pull(7, 1 << 20).inputs) == 7
    assert len(puller.pull(512, 1).inputs) == 1


def test_iterators_are_zipped_to_the_shortest() -> None:
    rows = Rows("f.map", ([1, 2, 3], "ab"), is_star=False)
    assert list(rows.start()) == [(1, "a"), (2, "b")]


def test_async_iterables_are_pulled_by_a_blocking_map() -> None:
    async def numbers() -> Any:
        for number in range(5):
            reached = asyncio.Event()
            asyncio.get_running_loop().call_soon(reached.set)
            await reached.wait()
            yield number

    assert list(Rows("f.map", (numbers(),), is_star=False).start()) == [0, 1, 2, 3, 4]
    assert list(Rows("f.map", (numbers(), "abc"), is_star=False).start()) == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]


# --- the package ----------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("typer", "rich", "uvloop", "cryptography", "anyio", "asyncio", "cloudpickle")
    code = (
        "import fanout, sys\nfanout.App('x').function\n"
        f"sys.stdout.write(','.join(n for n in {heavy!r} if n in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.stdout == ""
