"""Handles of functions and calls as values: arguments, results, closures, in containers of data."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import fanout
from fanout.exceptions import ExecutionError
from tests import calls_kit as kit
from tests.conftest import Cluster
from tests.engine_fixture import engine as engine
from tests.engine_fixture import status, wait_until_no_call_is_open


@pytest.fixture
def running(engine: Cluster) -> Iterator[None]:
    """The app of the kit runs; nothing of it is left open at the end."""
    with kit.app.run():
        yield
    wait_until_no_call_is_open()


def test_handles_travel_within_containers_of_data(running: None) -> None:
    functions = {"list": [kit.same, kit.add], "nested": {"tuple": (kit.same,)}}
    assert kit.call_all.remote(functions, 5) == {"list": [5, 5], "nested": {"tuple": [5]}}
    (mapped,) = kit.call_all.map([[kit.add, kit.add]], kwargs={"x": 2})
    assert mapped == [2, 2]


def test_handles_come_back_as_the_functions_they_are(running: None) -> None:
    back = kit.hand_back.remote(kit.add)
    assert back["function"] is kit.add
    ((call, function),) = back["calls"]
    assert isinstance(call, fanout.FunctionCall)
    assert call.get() == 2
    assert function is kit.hand_back


def test_a_call_is_collected_by_another_function(running: None) -> None:
    calls = {"b": kit.add.spawn(1, 1), "a": kit.same.spawn("first")}
    assert kit.collect.remote(calls) == ["first", 2]


def test_a_closure_may_hold_handles(running: None) -> None:
    function, call = kit.add, kit.add.spawn(20)

    @kit.app.function(serialized=True)
    def use(x: int) -> int:
        y: int = function.remote(x, 1)
        return y + call.get()

    assert use.remote(1) == 22
    assert list(use.map(range(3))) == [21, 22, 23]


def test_a_function_that_travels_by_value_may_call_itself(running: None) -> None:
    @kit.app.function(serialized=True)
    def factorial(n: int) -> int:
        rest: int = factorial.remote(n - 1) if n > 1 else 1
        return n * rest

    assert factorial.remote(5) == 120
    assert kit.call_all.remote([factorial], 4) == [24]


def test_functions_that_travel_by_value_may_call_each_other(running: None) -> None:
    @kit.app.function(serialized=True)
    def even(n: int) -> bool:
        answer: bool = n == 0 or odd.remote(n - 1)
        return answer

    @kit.app.function(serialized=True)
    def odd(n: int) -> bool:
        answer: bool = n != 0 and even.remote(n - 1)
        return answer

    assert list(even.map(range(5))) == [True, False, True, False, True]
    assert odd.remote(4) is False


def test_a_function_by_value_that_calls_itself_is_one_function(running: None) -> None:
    @kit.app.function(serialized=True)
    def descend(n: int) -> int:
        depth: int = descend.remote(n - 1) + 1 if n else 0
        return depth

    assert descend.remote(4) == 4
    names = [function["name"] for function in status()["functions"]]
    assert names.count("descend") == 1


SCRIPT = """
import sys
import fanout

app = fanout.App("script")

@app.function()
def double(x):
    return 2 * x

@app.function()
def apply(functions, x):
    return [function.remote(x) for function in functions]

@app.function()
def pick(name):
    return {"double": double, "apply": apply}[name]

def make_adder():
    inner = double
    @app.function(serialized=True)
    def adder(x):
        return inner.remote(x) + double.remote(x)
    return adder

if __name__ == "__main__":
    adder = make_adder()
    with app.run():
        sys.stdout.write(f"{apply.remote([double, adder, pick.remote('double')], 3)} ")
        sys.stdout.write(f"{list(adder.map([1, 2]))} {pick.remote('double') is double} ")
        sys.stdout.write(f"{apply.remote([adder], 1)}")
"""


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_script_hands_its_own_functions_around(engine: Cluster, tmp_path: Path, way: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    if way == "file":
        done = engine.python(path)
        is_same = "True"
    else:
        done = engine.python("-", input=SCRIPT)
        is_same = "False"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"[6, 12, 6] [4, 8] {is_same} [4]"
    wait_until_no_call_is_open()


def test_a_handle_needs_a_running_app() -> None:
    app = fanout.App("not-running")
    function = app.function(name="same")(kit.same.get_raw_f())
    with pytest.raises(ExecutionError, match="pickling same: app 'not-running' is not running"):
        pickle.dumps(function)


def test_a_handle_keeps_its_options_where_its_module_is_loaded(running: None) -> None:
    other = kit.variable.with_options(env={"KIT_VARIABLE": "other"})
    assert kit.call_all.remote([kit.variable, other], "KIT_VARIABLE") == ["own", "other"]
    back = kit.hand_back.remote(kit.same.with_concurrency(max_inputs=3))["function"]
    assert back.service.options.concurrency.max_inputs == 3
    assert kit.hand_back.remote(kit.variable)["function"] is kit.variable


def test_a_handle_with_other_options_runs_locally_where_its_module_is_loaded(
    running: None,
) -> None:
    other = kit.add.with_options(timeout=77, env={"A": "b"})
    assert kit.call_local.remote(other, 5) == 5
    back = kit.hand_back.remote(other)["function"]
    assert back.local(1, 2) == 3
    assert (back.service.options.timeout, back.service.options.env) == (77, (("A", "b"),))


def test_equal_handles_share_one_definition(running: None) -> None:
    kit.same.remote(1)
    run = kit.app._current_run("the test")
    before = len(run.definitions)
    for _ in range(30):
        assert kit.same.with_options(timeout=50).remote(2) == 2
    assert len(run.definitions) == before + 1


def test_a_handle_without_code_gets_other_options(running: None) -> None:
    @kit.app.function(serialized=True)
    def double(xs: list[int]) -> list[int]:
        return [2 * x for x in xs]

    assert kit.call_batched.remote(double, 4) == 8


def test_a_handle_without_code_gets_another_environment(running: None) -> None:
    @kit.app.function(serialized=True, env={"KIT_VARIABLE": "own"})
    def own_variable(name: str) -> str | None:
        return os.environ.get(name)

    found = kit.call_with_env.remote(own_variable, [{"KIT_VARIABLE": "other"}, {}])
    assert found == ["own", "other", None]
