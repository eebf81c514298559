"""What containers write, as whole lines, and what of it a terminal gets to see."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanout.output.log_lines import (
    LINE_SIZE_BYTES_MAX,
    RETURN_GRACE_S,
    ROWS_MAX,
    STALE_S,
    LineBuffer,
    LogBook,
    Origin,
)
from fanout.output.style import cells, clean, cut, cut_line, width_of

OUT, ERR = 1, 2


def origin(index: int = 0, container: int = 1, source: int = OUT, call: bytes = b"c") -> Origin:
    return Origin(container, source, call, index)


def book(is_raw: bool = False) -> LogBook:
    return LogBook(lambda source: is_raw)


# --- lines ---------------------------------------------------------------------------------------


def test_whole_lines_pass_at_once() -> None:
    assert LineBuffer(is_raw=False).feed(b"one\ntwo\n", 0) == b"one\ntwo\n"


def test_a_line_in_pieces_comes_when_it_is_whole() -> None:
    buffer = LineBuffer(is_raw=False)
    assert buffer.feed(b"half a ", 0) == b""
    assert buffer.live == [b"half a "]
    assert buffer.feed(b"line\nnext", 0) == b"half a line\n"
    assert buffer.close() == b"next\n"


@given(st.lists(st.binary(max_size=20).filter(lambda b: b"\r" not in b and b"\x1b" not in b)))
def test_text_without_returns_is_kept_whatever_its_pieces(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    for is_raw in (False, True):
        buffer = LineBuffer(is_raw)
        lines = b"".join(buffer.feed(piece, 0) for piece in pieces)
        more, rest = buffer.release()
        assert lines + more + rest == whole


@given(st.lists(st.binary(max_size=20)))
def test_raw_text_is_kept_whatever_is_in_it(pieces: list[bytes]) -> None:
    buffer = LineBuffer(is_raw=True)
    lines = b"".join(buffer.feed(piece, 0) for piece in pieces)
    assert lines == b"" or lines.endswith(b"\n")
    more, rest = buffer.release()
    assert lines + more + rest == b"".join(pieces)


def test_a_rewritten_row_is_one_line_with_its_last_state() -> None:
    buffer = LineBuffer(is_raw=False)
    for percent in range(100):
        assert buffer.feed(b"\r%d %%" % percent, 0) == b""
        assert buffer.live == [b"%d %%" % percent]
    buffer.feed(b"\n", 0)
    assert buffer.settle(RETURN_GRACE_S) == b"99 %\n"
    assert buffer.is_empty


def test_a_return_wipes_nothing_before_the_next_text() -> None:
    buffer = LineBuffer(is_raw=False)
    buffer.feed(b"10 %\r", 0)
    assert buffer.live == [b"10 %"]
    buffer.feed(b"20 %\r", 0)
    assert buffer.live == [b"20 %"]


def test_windows_line_ends_are_line_ends() -> None:
    buffer = LineBuffer(is_raw=False)
    assert buffer.feed(b"one\r\ntwo\r", 0) + buffer.feed(b"\n", 0) == b"one\ntwo\n"


def test_nested_bars_leave_one_line_each() -> None:
    # What tqdm writes for a bar at position 1, each piece flushed on its own.
    buffer = LineBuffer(is_raw=False)
    lines = buffer.feed(b"\router 0", 0.0)
    for step in range(50):
        now = step * 0.1
        for piece in (b"\n", b"\rinner %d" % step, b"\x1b[A", b"\router %d" % step):
            lines += buffer.feed(piece, now)
    assert lines == b""
    assert buffer.live == [b"outer 49", b"inner 49"]
    assert buffer.close() == b"outer 49\ninner 49\n"


def test_a_plain_line_below_a_bar_does_not_wait() -> None:
    buffer = LineBuffer(is_raw=False)
    assert buffer.feed(b"\r100 %\n", 0) == b""
    assert buffer.feed(b"trained\n", 0) == b"100 %\ntrained\n"


def test_a_bar_that_wipes_itself_out_leaves_no_line() -> None:
    buffer = LineBuffer(is_raw=False)
    buffer.feed(b"\r50 %\r    \r", 0)
    assert buffer.close() == b""


def test_a_line_without_end_is_broken() -> None:
    for is_raw in (False, True):
        buffer = LineBuffer(is_raw)
        piece = b"x" * (64 << 10)
        done = b""
        for _ in range(LINE_SIZE_BYTES_MAX // len(piece) + 1):
            done += buffer.feed(piece, 0)
        assert len(done) > LINE_SIZE_BYTES_MAX


def test_rewritten_rows_that_wait_are_bounded() -> None:
    buffer = LineBuffer(is_raw=False)
    done = b"".join(buffer.feed(b"\r%d\n" % n, 0) for n in range(1000))
    assert done.count(b"\n") >= 1000 - ROWS_MAX


# --- many containers -----------------------------------------------------------------------------


def test_lines_of_two_containers_are_not_mixed() -> None:
    log = book()
    assert log.feed(origin(0, container=1), b"first ", 0) == []
    assert log.feed(origin(1, container=2), b"second ", 0) == []
    (one,) = log.feed(origin(0, container=1), b"end\n", 0)
    (two,) = log.feed(origin(1, container=2), b"end\n", 0)
    assert (one[1], two[1]) == (b"first end\n", b"second end\n")
    assert log.is_empty


def test_text_that_an_input_left_without_newline_ends_with_the_next_input() -> None:
    log = book(is_raw=True)
    log.feed(origin(0), b"no newline", 0)
    before, after = log.feed(origin(1), b"next\n", 0)
    assert before == (origin(0), b"no newline\n")
    assert after == (origin(1), b"next\n")


def test_bars_of_inputs_that_share_a_container_move_side_by_side() -> None:
    log = book()
    for step in range(20):
        for index in (0, 1):
            assert log.feed(origin(index, source=ERR), b"\r%d %%" % step, step) == []
    assert [row for _, row in log.live(4)] == [b"19 %", b"19 %"]


def test_unfinished_rows_keep_their_places() -> None:
    log = book()
    for step in range(3):
        for index in (3, 1, 2, 0) if step else (0, 1, 2, 3):
            log.feed(origin(index, container=index), b"\r%d" % step, step)
    assert [(found.input_index, row) for found, row in log.live(3)] == [
        (0, b"2"),
        (1, b"2"),
        (2, b"2"),
    ]


def test_a_bar_that_nobody_moves_any_more_is_finished_as_it_stands() -> None:
    log = book()
    log.feed(origin(0), b"\r50 %", 0)
    assert log.tick(STALE_S - 1) == []
    assert log.tick(STALE_S) == [(origin(0), b"50 %\n")]
    assert log.is_empty


def test_what_a_call_left_ends_with_it() -> None:
    log = book()
    log.feed(origin(0, call=b"c"), b"\r50 %", 0)
    log.feed(origin(0, container=2, call=b"d"), b"\r60 %", 0)
    assert log.end_call(b"c") == [(origin(0, call=b"c"), b"50 %\n")]
    assert len(log.close()) == 1


# --- what a terminal obeys -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J\x1b[Hab",  # clears the screen
        "a\x1b[10;20Hb",  # moves the cursor
        "a\x1b]0;title\x07b",  # sets the title
        "a\x1b]52;c;c2VjcmV0\x1b\\b",  # writes to the clipboard
        "a\x1bP+q\x1b\\b",
        "a\x1bcb",  # resets the terminal
        "a\x07\x08\x0eb",
        "a\x9b2Jb".replace("2J", ""),
        "ab\x1b",
        "ab\x1b[",
    ],
)
def test_what_would_do_more_than_show_text_is_removed(text: str) -> None:
    assert clean(text, has_colours=True) == "ab"


def test_colours_stay_where_there_are_colours_and_end_with_the_line() -> None:
    assert clean("\x1b[31mred", has_colours=True) == "\x1b[31mred\x1b[0m"
    assert clean("\x1b[31mred\x1b[0m", has_colours=False) == "red"


@given(st.text())
def test_cleaned_text_holds_no_control_characters(text: str) -> None:
    assert not any(ord(c) < 32 and c not in "\t\n" for c in clean(text, has_colours=False))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 30))
def test_cut_text_fits(text: str, width: int) -> None:
    assert cells(cut(text, width)) <= width
    assert width_of(cut_line([(text, ""), (text, "dim")], width)) <= width


def test_wide_characters_count_twice() -> None:
    assert cells("日本") == 4
    assert cut("日本語", 5) == "日本…"
    assert cells("e\u0301") == 1
