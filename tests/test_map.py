"""`map` and its family, as a script that was written for Modal uses them."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fanout.client import stream
from fanout.client.inputs import Puller
from fanout.config import WINDOW_BYTES, WINDOW_COUNT_MAX, WINDOW_COUNT_MIN
from fanout.exceptions import InvalidError
from tests import calls_kit as kit
from tests.conftest import TIMEOUT_FACTOR, Cluster, poll_until
from tests.engine_fixture import engine as engine
from tests.engine_fixture import status, wait_until_no_call_is_open

MEBIBYTE = 1 << 20


@pytest.fixture
def running(engine: Cluster) -> Iterator[None]:
    """The app of the kit runs; nothing of it is left open at the end."""
    with kit.app.run():
        yield
    wait_until_no_call_is_open()


def is_quiet(count: Callable[[], int], quiet_s: float = 0.5) -> int:
    """The count, once it has not changed for `quiet_s` seconds."""
    seen = {"count": -1, "since": time.monotonic()}

    def has_settled() -> bool:
        if count() != seen["count"]:
            seen.update(count=count(), since=time.monotonic())
        return time.monotonic() - seen["since"] > quiet_s * TIMEOUT_FACTOR

    poll_until(has_settled, lambda: f"the count stands still; it is {count()}", 20)
    return int(seen["count"])


async def in_thread(action: Callable[[], Any]) -> Any:
    """Run something that blocks, in a thread that is gone afterwards."""
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, action)


# --- what is read ahead --------------------------------------------------------------------------


class Asked:
    """Endless inputs: 0 first, then what `make` makes. Knows how often it was asked."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.count = 0
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.count += 1
            yield self.make(self.count) if self.count > 1 else 0


def large(number: int) -> bytes:
    """A MiB that no other input shares."""
    return number.to_bytes(4, "big") * (MEBIBYTE // 4)


@pytest.mark.parametrize(
    ("make", "most"),
    [(str, WINDOW_COUNT_MAX), (large, WINDOW_BYTES // MEBIBYTE + 4)],
    ids=["items", "bytes"],
)
def test_slow_functions_bound_how_far_a_quick_iterator_is_read(
    running: None, tmp_path: Path, make: Callable[[int], Any], most: int
) -> None:
    inputs = Asked(make)
    results = kit.hold.map(inputs, kwargs={"folder": str(tmp_path)})
    assert next(results) == 0
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(next(results)))
    thread.start()
    assert is_quiet(lambda: inputs.count) <= most
    (tmp_path / "go").touch()
    thread.join()
    assert got == [1]
    results.close()


async def test_slow_functions_bound_how_far_a_loop_reads(engine: Cluster, tmp_path: Path) -> None:
    inputs = Asked(str)
    async with kit.app.run():
        results = kit.hold.map.aio(inputs, kwargs={"folder": str(tmp_path)})
        assert await anext(aiter(results)) == 0
        assert await in_thread(lambda: is_quiet(lambda: inputs.count)) <= WINDOW_COUNT_MAX
        assert inputs.count >= WINDOW_COUNT_MIN
        await results.aclose()


def test_a_flat_map_holds_generators_to_the_pace_of_the_consumer(
    running: None, tmp_path: Path
) -> None:
    results = kit.endless.map("ab", kwargs={"folder": str(tmp_path)}, order_outputs=False)
    got = list(itertools.islice(results, 5))
    assert {name for name, _ in got} <= {"a", "b"}

    def made() -> int:
        return sum(int(path.read_text() or 0) for path in tmp_path.glob("made-*"))

    ahead = is_quiet(made) - len(got)
    assert ahead < 500, "a generator runs on although nobody takes its items"
    more = list(itertools.islice(results, 2000))
    for name in "ab":
        numbers = [number for which, number in got + more if which == name]
        assert numbers == list(range(len(numbers)))
    assert is_quiet(made) - 2005 < 5000
    results.close()


@pytest.mark.parametrize("method", ["map", "spawn_map"])
def test_an_iterator_that_blocks_does_not_hold_back_what_it_gave_before(
    running: None, tmp_path: Path, method: str
) -> None:
    """It waits for the effect of the inputs that it has just given, page after page."""
    (tmp_path / "go").touch()

    def have_ended(count: int) -> None:
        poll_until(lambda: len(ended(tmp_path)) == count, f"{count} inputs end")

    def pages() -> Iterator[int]:
        for start in range(0, 300, 100):
            yield from range(start, start + 100)
            have_ended(start + 100)

    kwargs = {"folder": str(tmp_path)}
    if method == "map":
        assert list(kit.note_and_hold.map(pages(), kwargs=kwargs)) == list(range(300))
    else:
        call = kit.note_and_hold.spawn_map(pages(), kwargs=kwargs)
        assert list(call.iter()) == list(range(300))


def test_what_is_taken_from_under_a_blocked_iterator_keeps_its_order(
    running: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both threads hand inputs over, in quick alternation."""
    monkeypatch.setattr(stream, "RESCUE_AFTER_S", 0.0002)
    rescued: list[int] = []
    rescue = Puller.rescue

    def counted(self: Puller, since: float) -> Any:
        encoded = rescue(self, since)
        rescued.append(len(encoded.inputs) if encoded is not None else 0)
        return encoded

    monkeypatch.setattr(Puller, "rescue", counted)

    def inputs() -> Iterator[int]:
        for number in range(20_000):
            if number % 97 == 0:
                blocked_until_s = time.perf_counter() + 0.002
                poll_until(lambda: time.perf_counter() > blocked_until_s, "a moment passes")  # noqa: B023
            yield number

    assert list(kit.same.map(inputs())) == list(range(20_000))
    assert sum(rescued) > 1000, "the background loop took a part of them"


# --- leaving early -------------------------------------------------------------------------------


def begun(folder: Path) -> int:
    return len(list(folder.glob("begun-*")))


def ended(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("ended-*")]


def is_idle() -> bool:
    return all(container["leases"] == 0 for container in status()["containers"])


def leave_by_break(folder: Path) -> None:
    for value in kit.note_and_hold.map(range(50), kwargs={"folder": str(folder)}):
        assert value == 0
        poll_until(lambda: begun(folder) > 1, "another input runs")
        break


def leave_by_close(folder: Path) -> None:
    results = kit.note_and_hold.map(range(50), kwargs={"folder": str(folder)})
    assert next(results) == 0
    poll_until(lambda: begun(folder) > 1, "another input runs")
    results.close()
    assert list(results) == []


def leave_by_forgetting(folder: Path) -> None:
    results = kit.note_and_hold.starmap((x, str(folder)) for x in range(50))
    assert next(results) == 0
    poll_until(lambda: begun(folder) > 1, "another input runs")
    del results
    gc.collect()


def leave_by_an_error(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        for value in kit.note_and_hold.map(range(50), kwargs={"folder": str(folder)}):
            poll_until(lambda: begun(folder) > 1, "another input runs")
            1 / value


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_close, leave_by_forgetting, leave_by_an_error]
)
def test_leaving_a_map_early_stops_what_runs_and_what_waits_never_does(
    running: None, tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    leave(tmp_path)
    poll_until(is_idle, "what ran is stopped")
    assert begun(tmp_path) <= 4
    (tmp_path / "go").touch()
    wait_until_no_call_is_open()
    assert ended(tmp_path) == ["ended-0"]


def test_the_users_iterator_is_closed_with_the_map_and_in_its_own_thread(running: None) -> None:
    closed: list[threading.Thread] = []

    def inputs() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.current_thread())

    for _ in kit.same.map(inputs()):
        break
    results = kit.same.map(inputs())
    next(results)
    results.close()
    assert closed == [threading.current_thread()] * 2


@pytest.mark.parametrize("way", ["break", "aclose", "form"])
async def test_leaving_an_async_map_early_stops_what_runs(
    engine: Cluster, tmp_path: Path, way: str
) -> None:
    kwargs = {"folder": str(tmp_path)}

    def another_runs() -> Any:
        return poll_until(lambda: begun(tmp_path) > 1, "another input runs")

    async with kit.app.run():
        if way == "aclose":
            results = kit.note_and_hold.map.aio(range(50), kwargs=kwargs)
            assert await anext(aiter(results)) == 0
            await in_thread(another_runs)
            await results.aclose()
        elif way == "break":
            async for _ in kit.note_and_hold.map.aio(range(50), kwargs=kwargs):
                await in_thread(another_runs)
                break
        else:
            async for _ in kit.note_and_hold.map(range(50), kwargs=kwargs):
                await in_thread(another_runs)
                break
        await in_thread(lambda: poll_until(is_idle, "what ran is stopped"))
        (tmp_path / "go").touch()
    assert ended(tmp_path) == ["ended-0"]


# --- errors --------------------------------------------------------------------------------------


def test_an_ordered_map_raises_its_first_error_though_a_later_input_failed_before(
    running: None, tmp_path: Path
) -> None:
    kwargs = {"folder": str(tmp_path)}
    got: list[int] = []
    with pytest.raises(kit.Refused) as caught:
        got.extend(kit.fail_late_and_early.map(range(2000), kwargs=kwargs))
    assert (got, caught.value.args) == (list(range(7)), (7,))
    assert (tmp_path / "failed-70").exists()


async def test_an_ordered_async_map_raises_its_first_error_too(
    engine: Cluster, tmp_path: Path
) -> None:
    got: list[int] = []
    async with kit.app.run():
        with pytest.raises(kit.Refused, match="7"):
            async for x in kit.fail_late_and_early.map.aio(
                range(200), kwargs={"folder": str(tmp_path)}
            ):
                got.append(x)  # noqa: PERF401
    assert got == list(range(7))


class Broken(Exception):
    """An error of the user's own iterator."""


def broken(x: int) -> Iterator[int]:
    yield from range(x)
    raise Broken


async def broken_async(x: int) -> AsyncIterator[int]:
    for number in range(x):
        yield number
    raise Broken


@pytest.mark.parametrize("make", [broken, broken_async])
@pytest.mark.parametrize("count", [0, 3, 1000])
def test_an_error_of_the_users_iterator_reaches_the_caller_and_ends_the_call(
    running: None, make: Callable[[int], Any], count: int
) -> None:
    for use in (
        lambda: list(kit.same.map(make(count))),
        lambda: list(kit.same.map(make(count), order_outputs=False, return_exceptions=True)),
        lambda: list(kit.add.map(itertools.count(), make(count))),
        lambda: kit.same.for_each(make(count), ignore_exceptions=True),
    ):
        with pytest.raises(Broken):
            use()
    wait_until_no_call_is_open()


@pytest.mark.parametrize("make", [broken, broken_async])
async def test_an_error_of_the_users_iterator_reaches_an_async_caller(
    engine: Cluster, make: Callable[[int], Any]
) -> None:
    async with kit.app.run():
        with pytest.raises(Broken):
            await kit.same.map.aio(make(3))
        with pytest.raises(Broken):
            await kit.same.for_each.aio(make(1000))
        with pytest.raises(Broken):
            async for _ in kit.same.map(make(1000)):
                pass
        with pytest.raises(Broken):
            await kit.same.spawn_map.aio(make(5000))
        await in_thread(wait_until_no_call_is_open)


def test_a_spawn_map_whose_iterator_fails_runs_no_further(running: None, tmp_path: Path) -> None:
    def inputs() -> Iterator[int]:
        yield 1
        poll_until(lambda: begun(tmp_path) == 1, "the first input runs")
        raise Broken

    with pytest.raises(Broken):
        kit.note_and_hold.spawn_map(inputs(), kwargs={"folder": str(tmp_path)})
    wait_until_no_call_is_open()
    assert not (tmp_path / "ended-1").exists()


# --- the forms of a call -------------------------------------------------------------------------


async def test_inside_a_running_loop_the_blocking_form_is_iterated_with_async_for(
    engine: Cluster,
) -> None:
    async with kit.app.run():
        assert [x async for x in kit.same.map([1, 2])] == [1, 2]
        assert [x async for x in kit.add.starmap([(1, 2)], kwargs={"z": 3})] == [6]
        assert [x async for x in kit.items.remote_gen(3)] == [0, 1, 2]
        results = kit.same.map([1])
        with pytest.raises(InvalidError, match=r"async for x in same\.map\.aio\(\.\.\.\)"):
            list(results)
        with pytest.raises(InvalidError, match="would block the event loop"):
            next(kit.items.remote_gen(1))
        assert [x async for x in results] == [1]
        with pytest.raises(InvalidError, match="with `async for` already"):
            list(results)


def test_a_map_that_nobody_iterates_warns_and_runs_nothing(running: None, tmp_path: Path) -> None:
    kwargs = {"folder": str(tmp_path)}
    with pytest.warns(RuntimeWarning, match=r"nobody iterated over note_and_hold\.map\(\.\.\.\)"):
        kit.note_and_hold.map([0], kwargs=kwargs)
    with pytest.warns(RuntimeWarning, match=r"note_and_hold\.starmap\.aio\(\.\.\.\)"):
        kit.note_and_hold.starmap.aio([(0, str(tmp_path))])
    with pytest.warns(RuntimeWarning, match=r"items\.remote_gen\(\.\.\.\)"):
        kit.items.remote_gen(3)
    kit.note_and_hold.map([0], kwargs=kwargs).close()
    assert kit.same.remote(1) == 1
    assert not begun(tmp_path)


def test_iterating_again_goes_on_where_it_stopped(running: None) -> None:
    results = kit.same.map(range(1000))
    for x in results:
        if x == 9:
            break
    assert next(results) == 10
    assert list(results) == list(range(11, 1000))
    assert list(results) == []


def test_a_text_is_iterated_over_letter_by_letter(running: None) -> None:
    assert list(kit.same.map("abc")) == ["a", "b", "c"]
    assert list(kit.same.starmap(["a", "b"])) == ["a", "b"]


def test_keyword_arguments_are_those_of_every_input(running: None) -> None:
    assert list(kit.add.map([1, 2], [10, 20], kwargs={"z": 100})) == [111, 122]
    assert list(kit.same.map([])) == []
    assert list(kit.same.map([None, None])) == [None, None]


def test_returned_exceptions_are_never_wrapped(running: None, tmp_path: Path) -> None:
    (tmp_path / "failed-70").touch()
    for value in (True, False):
        with pytest.warns(DeprecationWarning, match="come as they are"):
            results = kit.fail_late_and_early.map(
                [7],
                kwargs={"folder": str(tmp_path)},
                return_exceptions=True,
                wrap_returned_exceptions=value,
            )
        assert [type(x).__name__ for x in results] == ["Refused"]


def test_an_input_that_leaves_the_interpreter_is_returned_as_the_exception_it_raised(
    running: None,
) -> None:
    first, left, last = kit.leave.map(range(3), return_exceptions=True)
    assert (first, last) == (0, 2)
    assert isinstance(left, SystemExit)
    with pytest.raises(SystemExit):
        list(kit.leave.map(range(3)))


def test_the_experimental_name_is_that_of_spawn_map(running: None) -> None:
    call = kit.same.experimental_spawn_map(range(600))
    assert call.num_inputs() == 600
    assert list(call.iter()) == list(range(600))
    assert call.get(index=599) == 599


def test_two_maps_that_have_one_permit_together_can_be_consumed_side_by_side(
    running: None,
) -> None:
    """Each of them holds the permit for as long as its consumer, which waits for the other one,
    takes nothing."""
    pairs = zip(kit.six_from.map([0]), kit.six_from.map([10]), strict=True)
    assert list(pairs) == [(x, x + 10) for x in range(6)]
