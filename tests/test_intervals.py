"""Interval sets behave like sets of integers, whatever is added and removed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fanout.intervals import IntervalSet

ranges = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1]))
steps = st.lists(st.tuples(st.sampled_from(["add", "remove", "pop"]), ranges), max_size=30)


def members(intervals: IntervalSet) -> set[int]:
    return {i for start, stop in intervals for i in range(start, stop)}


@given(steps)
def test_interval_set_is_a_set_of_integers(history: list[tuple[str, tuple[int, int]]]) -> None:
    intervals, model = IntervalSet(), set[int]()
    for step, (start, stop) in history:
        chosen = set(range(start, stop))
        if step == "add":
            assert intervals.add(start, stop) == len(chosen - model)
            model |= chosen
        elif step == "remove":
            assert intervals.remove(start, stop) == len(chosen & model)
            model -= chosen
        elif intervals:
            low, high = intervals.pop_front(3, intervals.first + 2)
            assert low == min(model)
            assert 0 < high - low <= 2
            model -= set(range(low, high))
        assert members(intervals) == model
        assert intervals.count == len(model)
        pairs = list(intervals)
        assert all(a[1] < b[0] for a, b in zip(pairs, pairs[1:], strict=False)), "not merged"


@given(st.lists(ranges, max_size=8), ranges)
def test_missing_and_common_split_a_range(
    added: list[tuple[int, int]], probe: tuple[int, int]
) -> None:
    intervals = IntervalSet(added)
    inside = members(intervals)
    wanted = set(range(*probe))
    gaps = {i for start, stop in intervals.missing(*probe) for i in range(start, stop)}
    shared = {i for start, stop in intervals.common(*probe) for i in range(start, stop)}
    assert gaps == wanted - inside
    assert shared == wanted & inside
    assert intervals.covers(*probe) == (wanted <= inside)
    assert all((i in intervals) == (i in inside) for i in range(60))


@given(st.integers(0, 40), st.integers(1, 12))
def test_one_range_makes_a_set(start: int, count: int) -> None:
    made = IntervalSet.of(start, start + count)
    assert made == IntervalSet([(start, start + count)])
    assert made.count == count
    made.add(start + count, start + count + 1)
    assert IntervalSet.of(start, start + count).count == count, "nothing is shared"
