"""One core for everything: functions that call functions, and results that leave at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fanout.exceptions import DeadlockError
from tests import behaviour_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster, environment
from tests.engine_fixture import one_core as one_core
from tests.engine_fixture import running_on_one_core as running_on_one_core

pytestmark = pytest.mark.usefixtures("running_on_one_core")


def test_a_result_leaves_its_container_before_the_next_input_ends(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert list(kit.second_waits.map(range(10, 200), kwargs={"folder": folder}))
    results = kit.second_waits.map(range(2), kwargs={"folder": folder})
    assert next(results) == 0
    (tmp_path / "seen").touch()
    assert list(results) == [1]


def test_a_nested_call_takes_a_moment() -> None:
    assert kit.depth.remote(1) == 1
    begin_s = time.monotonic()
    assert kit.depth.remote(3) == 3
    assert time.monotonic() - begin_s < 2 * TIMEOUT_FACTOR


def test_at_most_one_input_runs_on_one_core(tmp_path: Path) -> None:
    folder = str(tmp_path)
    results = list(kit.trunk.map(range(10), kwargs={"folder": folder}))
    assert results == [2 * (x + 2) for x in range(10)]
    assert not list(tmp_path.glob("overlap-*"))
    assert (tmp_path / "core").exists()


def test_calls_nest_fifty_deep() -> None:
    assert kit.depth.remote(50) == 50


def test_async_functions_call_functions() -> None:
    assert sorted(kit.trunk_async.map([0, 100])) == [20, 520]


def test_results_of_one_map_are_inputs_of_another() -> None:
    assert kit.each_after_the_other.remote(100) == list(range(100))
    squares = kit.same.map(kit.items.map([3] * 200))
    assert list(squares) == [0, 1, 2] * 200
    assert [kit.same.remote(value) for value in kit.items.map([30, 30])] == [*range(30)] * 2


@pytest.mark.parametrize(
    ("function", "names"),
    [(kit.alone_and_deep, ["alone_and_deep"]), (kit.ping, ["ping", "pong"])],
    ids=["itself", "each-other"],
)
def test_a_call_that_only_its_ancestors_block_ends_with_the_chain(
    function: Any, names: list[str]
) -> None:
    with pytest.raises(DeadlockError) as caught:
        function.remote(3)
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert function.remote(0) == 0


def test_a_map_of_a_function_that_maps_another_ends_without_killing_a_container(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import fanout\n"
        "app = fanout.App('nested-maps')\n"
        "@app.function()\n"
        "def g(x): return x\n"
        "@app.function()\n"
        "def f(x): return sum(g.remote(x) for _ in range(8))\n"
        "if __name__ == '__main__':\n"
        "    with app.run():\n"
        "        assert list(f.map(range(150))) == [8 * x for x in range(150)]\n"
    )
    home = tmp_path / "home"
    cluster = Cluster(home, environment(FANOUT_HOME=str(home), FANOUT_CPU="2"))
    try:
        result = cluster.python(script)
        assert result.returncode == 0, result.stderr
        (output,) = home.rglob("worker.output")
        assert "sent nonsense" not in output.read_text(errors="replace")
    finally:
        cluster.stop()
