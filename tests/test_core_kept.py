"""Which outputs of a call are kept, and how they are found again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core.kept import KeptOutputs, stop_of


def frame(start: int, count: int) -> m.Outputs:
    return m.Outputs(b"c" * 16, start, b"\0" * 4 * count, b"\0" * count, [], b"")


#: Frames of one to three inputs side by side, with gaps, in any order.
frames = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=12
).flatmap(
    lambda sizes: st.permutations(
        [
            frame(sum(count + gap for count, gap in sizes[:at]), sizes[at][0])
            for at in range(len(sizes))
        ]
    )
)  # fmt: skip


def kept_of(added: list[m.Outputs]) -> KeptOutputs:
    kept = KeptOutputs()
    for outputs in added:
        kept.add(outputs)
    return kept


@given(frames, st.integers(0, 40), st.integers(0, 40))
def test_frames_are_found_by_the_inputs_in_them(added: list[m.Outputs], a: int, b: int) -> None:
    start, stop = min(a, b), max(a, b)
    wanted = [x for x in added if x.start < stop and start < stop_of(x)] if start < stop else []
    wanted.sort(key=lambda x: x.start)
    assert kept_of(added).among(start, stop) == wanted


@given(frames, st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=5))
def test_only_what_is_wholly_acknowledged_goes_and_nothing_behind_what_is_not(
    added: list[m.Outputs], ranges: list[tuple[int, int]]
) -> None:
    kept = kept_of(added)
    indexes = IntervalSet((start, start + count) for start, count in ranges)
    rest = sorted(added, key=lambda x: x.start)
    gone = []
    while rest and indexes.covers(rest[0].start, stop_of(rest[0])):
        gone.append(rest.pop(0))
    assert kept.take(indexes) == gone
    assert list(kept) == rest
    assert bool(kept) == bool(rest)
    kept.add(frame(1000, 1))
    assert kept.among(1000, 1001) == [frame(1000, 1)]


def test_an_empty_one_shares_nothing_with_another() -> None:
    one, other = KeptOutputs(), KeptOutputs()
    one.add(frame(0, 1))
    assert list(other) == []
    one.clear()
    one.add(frame(5, 1))
    assert [x.start for x in one] == [5]
    assert list(other) == []
