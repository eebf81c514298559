"""Classes whose methods run in containers, as a user sees them."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout.exceptions import InvalidError
from tests import classes_kit as kit
from tests.conftest import Cluster, poll_until
from tests.engine_fixture import status

# To mypy a class has no parameters; pyright sees those that `fanout.parameter` declares.
Counter: Any = kit.Counter
Derived: Any = kit.Derived
Short: Any = kit.Short
Unready: Any = kit.Unready
Environ: Any = kit.Environ
Blocking: Any = kit.Blocking


@pytest.fixture
def running(cluster: Cluster) -> Iterator[None]:
    with kit.app.run():
        yield


# --- calling --------------------------------------------------------------------------------------


def test_every_kind_of_call_works_on_methods(running: None) -> None:
    counter = Counter(start=10)
    assert counter.later.remote(5) == 15
    assert list(counter.later.map(range(3))) == [10, 11, 12]
    assert list(counter.later.starmap([(1,), (2,)])) == [11, 12]
    assert list(counter.count_to.remote_gen(13)) == [10, 11, 12]
    assert list(counter.later_items.map([12, 11])) == [10, 11, 10]
    assert counter.later.spawn(1).get() == 11
    assert counter.later.spawn_map([1, 2]).get(index=1) == 12


async def test_methods_have_their_aio_twins(cluster: Cluster) -> None:
    async with kit.app.run():
        counter = Counter(start=10)
        assert await counter.later.remote.aio(5) == 15
        assert await counter.later.map.aio(range(2)) == [10, 11]
        assert [x async for x in counter.count_to.remote_gen.aio(12)] == [10, 11]


def test_an_instance_lives_as_long_as_its_container(running: None) -> None:
    counter = Counter()
    (pid, first), (again, second) = counter.add.remote(), counter.add.remote(by=5)
    assert pid == again != os.getpid()
    assert (first, second) == (1, 6)
    assert counter.state.remote() == (0, "fixed", 1), "the hook ran once"


def test_each_set_of_parameters_has_containers_of_its_own(running: None) -> None:
    first = Counter(start=1).add.remote()
    second = Counter(start=2).add.remote()
    again = Counter(start=1).add.remote()
    assert first[0] == again[0] != second[0]
    assert (first[1], second[1], again[1]) == (2, 3, 3)


def test_a_method_calls_others_of_its_object(running: None) -> None:
    # 3 from another container, 3 here, and 1000.
    assert Counter(start=1).by_way_of_another.remote(2) == 3 + 1 + 1000


def test_hooks_and_methods_of_base_classes_are_inherited(running: None) -> None:
    derived = Derived(name="mine")
    assert derived.who.remote() == "Derived mine ['first', 'second']"
    assert derived.replaced.remote() == "derived"


def test_local_runs_the_hooks_once_in_this_process() -> None:
    counter = Counter(start=5)
    assert counter.add.local() == (os.getpid(), 6)
    assert counter.add.local() == (os.getpid(), 7)
    assert counter.helper() == 1000
    assert counter.start == 5


def test_plain_attributes_are_readable_without_entering() -> None:
    assert Counter(start=4).start == 4
    assert Counter.__doc__ is None or isinstance(Counter.__doc__, str)
    assert Counter.get_user_cls().__name__ == "Counter"


def test_a_hook_that_fails_is_told_on_every_input(running: None) -> None:
    results: list[object] = list(Unready().use.map(range(300), return_exceptions=True))
    assert len(results) == 300
    assert {type(result) for result in results} == {LookupError}
    assert "no weights here" in str(results[0])


def test_exit_hooks_run_when_a_container_leaves(running: None, tmp_path: Path) -> None:
    assert Short(folder=str(tmp_path)).ask.remote()
    poll_until(lambda: (tmp_path / "left").exists(), "the exit hook has run")


def test_exit_hooks_run_at_the_end_of_the_app(cluster: Cluster, tmp_path: Path) -> None:
    with kit.app.run():
        pid, _ = Counter(folder=str(tmp_path)).add.remote()
    poll_until(lambda: (tmp_path / f"exit-{pid}").exists(), "the exit hook has run")
    assert len(list(tmp_path.glob("enter-*"))) == 1


def test_objects_and_classes_travel_as_arguments_and_results(running: None) -> None:
    assert kit.use_handle.remote(Counter(start=7), 1) == 8
    assert kit.use_handle.remote(Counter, 1) == 101
    assert kit.make_handle.remote(50).later.remote(1) == 51


def test_a_class_by_value_works(running: None) -> None:
    @kit.app.cls(serialized=True, cpu=0.1)
    class Plain:
        size: int = fanout.parameter(default=3)

        @fanout.method()
        def double(self, x: int) -> int:
            return 2 * x * self.size

        @fanout.method()
        def twice(self, x: int) -> int:
            again: Any = Plain
            result: int = again(size=self.size).double.remote(x)
            return result

    Local: Any = Plain
    assert Local(size=5).double.remote(1) == 10
    assert Local().twice.remote(1) == 6


def test_a_class_by_value_calls_its_own_methods(running: None) -> None:
    @kit.app.cls(serialized=True, cpu=0.1, env={"KIT_VARIABLE": "own"})
    class Plain:
        size: int = fanout.parameter(default=3)

        @fanout.method()
        def double(self, x: int) -> int:
            return 2 * x * self.size

        @fanout.method()
        def near_and_far(self, x: int) -> tuple[int, int, int]:
            other: Any = Plain
            return (
                self.double.local(x),
                self.double.remote(x),
                other(size=self.size + 1).double.remote(x),
            )

        @fanout.method()
        def variable(self) -> str | None:
            return os.environ.get("KIT_VARIABLE")

    Local: Any = Plain
    assert Local(size=5).near_and_far.remote(1) == (10, 10, 12)
    assert Local(size=6).double.remote(1) == 12
    assert Local().variable.remote() == "own"
    names = [function["name"] for function in status()["functions"]]
    assert names.count("Plain") == 3, "one for each set of parameters"


def test_a_class_with_other_options_keeps_them_on_its_way(running: None) -> None:
    other = Environ.with_options(env={"KIT_VARIABLE": "other"})
    assert kit.ask_both.remote(other(), "KIT_VARIABLE") == ("other", None)
    assert kit.ask_both.remote(Environ(), "KIT_VARIABLE") == ("own", None)


def test_objects_made_again_and_again_share_one_definition(running: None) -> None:
    run = kit.app._current_run("the test")
    Counter(start=1).add.remote()
    before = len(run.definitions)
    values = [Counter(start=1).add.remote(by=0)[1] for _ in range(30)]
    assert values == [2] * 30
    assert len(run.definitions) == before


def test_sync_hooks_of_a_class_with_async_methods_may_block(running: None) -> None:
    with fanout.Dict.ephemeral() as notes:
        notes["start"] = 40
        assert Blocking(notes=notes.object_id).ask.remote() == (40, "set by a hook", True)
        assert notes["entered"] is True
        poll_until(lambda: notes.get("left"), "the exit hook has run")


# --- options --------------------------------------------------------------------------------------


def test_with_options_gives_other_containers_and_leaves_the_class_alone(running: None) -> None:
    other = Counter.with_options(max_containers=1, timeout=20)
    assert other(start=1).add.remote()[0] != Counter(start=1).add.remote()[0]
    assert other._options.max_containers == 1
    assert Counter._options.max_containers is None


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: Counter(5), InvalidError, "takes its parameters by name"),
        (lambda: Counter(stat=5), InvalidError, "no parameter of that name"),
        (lambda: Counter(fixed="x"), InvalidError, "no parameter of that name"),
        (lambda: Counter(start="5"), TypeError, "expected int, got str"),
        (lambda: Counter(start=True), TypeError, "expected int, got bool"),
        (lambda: Short(), InvalidError, "'folder' has no default"),
        (lambda: Counter.add, AttributeError, "forget to instantiate the class first"),
        (lambda: Counter().add(), InvalidError, "does not run by being called"),
        (lambda: Counter().add.with_options(cpu=1), InvalidError, "is a method"),
        (lambda: Counter().add.autoscaler, InvalidError, "is a method"),
        (lambda: Counter.with_options(retries=1), InvalidError, "'count_to' is a generator"),
        (lambda: Counter.with_options(name="x"), InvalidError, "what it is called is said once"),
        (lambda: Counter.with_options(serialized=True), InvalidError, "how its code travels"),
        (lambda: types.new_class("Sub", (Counter,)), InvalidError, "cannot inherit from Counter"),
        (lambda: kit.count_up.with_options(retries=1), InvalidError, "of generator function"),
        (lambda: kit.once.with_options(serialized=True), InvalidError, "how its code travels"),
    ],
)
def test_wrong_uses_of_a_class_say_what_to_do(
    make: Callable[[], Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        make()


def test_classes_that_no_container_could_make_are_refused() -> None:
    app = fanout.App("refused")

    class WithInit:
        def __init__(self) -> None: ...

    class BadParameter:
        size: list[int] = fanout.parameter()

    class TwoBatched:
        @fanout.batched(max_batch_size=2, wait_ms=1)
        def one(self, xs: list[int]) -> list[int]:
            return xs

        @fanout.method()
        def two(self) -> None: ...

    for user_class, words in (
        (WithInit, "__init__ of its own"),
        (BadParameter, "must be one of str, int, bool and bytes"),
        (TwoBatched, "has a batched method and others"),
    ):
        with pytest.raises(InvalidError, match=words):
            app.cls(serialized=True)(user_class)
    with pytest.raises(InvalidError, match="is for classes"):
        app.cls()(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="write `@app.cls\\(\\)`"):
        app.function(serialized=True)(WithInit)
    with pytest.raises(InvalidError, match="belongs on"):
        fanout.method()(fanout.concurrent(max_inputs=2)(lambda self: None))
