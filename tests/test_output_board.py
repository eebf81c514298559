"""How calls get on: numbers in, lines out."""

from __future__ import annotations

from typing import Any

import pytest

from fanout.output.board import (
    LINES_MAX,
    PLAIN_GLYPHS,
    PLAIN_INTERVAL_S,
    SHOWN_AFTER_S,
    SUMMARY_AFTER_S,
    Board,
    Glyphs,
    duration,
)
from fanout.output.style import plain, width_of
from fanout.protocol import messages as m

SECOND = 1.0


def call_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def shown(board: Board, now: float, width: int = 100, height: int = 24) -> list[str]:
    lines = board.lines(now, width, height)
    assert all(width_of(line) <= width for line in lines)
    assert len(lines) <= height
    return [plain(line) for line in lines]


def board_with_map(total: int | None = 100, name: str = "f") -> Board:
    board = Board(Glyphs())
    board.open_call(call_id(1), name, 0, total, is_durable=False)
    return board


def report(number: int, **changes: Any) -> m.CallProgress:
    values: dict[str, Any] = {
        "call_id": call_id(number), "name": "g", "is_durable": False, "is_nested": True,
        "is_sealed": True, "is_over": False, "input_count": 10, "finished_count": 4,
        "running": 2, "starting": 0, "waits_for": "",
    }  # fmt: skip
    return m.CallProgress(**{**values, **changes})


def test_a_map_has_a_bar_with_done_failed_running_rate_and_time_left() -> None:
    board = board_with_map()
    board.count(call_id(1), 60, 0, 0, False, 0)
    board.report(report(1, name="f", is_nested=False, running=7))
    board.count(call_id(1), 80, 20, 3, False, 2)
    (line,) = shown(board, 2)
    for part in ("f  ━━━━", "───", "20/100", "3 failed", "7 running", "10/s", "8 s left"):
        assert part in line


def test_a_bar_is_as_full_as_its_call_is_done() -> None:
    board = board_with_map(total=4)
    board.count(call_id(1), 4, 1, 0, True, 1)
    (line,) = shown(board, 1)
    assert line.count("━") * 3 == line.count("─")


def test_a_map_of_unknown_length_has_no_bar() -> None:
    board = board_with_map(total=None)
    board.count(call_id(1), 50, 20, 0, False, 2)
    (line,) = shown(board, 2)
    assert "20 done" in line
    assert "━" not in line
    assert "left" not in line
    board.count(call_id(1), 50, 20, 0, True, 2.1)
    assert "20/50" in shown(board, 2.1)[0]


def test_what_is_quickly_over_is_never_shown() -> None:
    board = board_with_map()
    assert shown(board, SHOWN_AFTER_S / 2) == []
    assert board.close_call(call_id(1), SHOWN_AFTER_S / 2) is None
    assert not board.is_busy


def test_a_map_that_took_a_while_leaves_a_line() -> None:
    board = board_with_map()
    board.count(call_id(1), 100, 100, 3, True, 10)
    line = board.close_call(call_id(1), 10)
    assert line is not None
    assert plain(line) == "✗ f  100 inputs  3 failed  in 10 s, 10/s"
    assert shown(board, 10) == []


def test_a_map_that_is_left_early_says_so() -> None:
    board = board_with_map()
    board.count(call_id(1), 70, 40, 0, False, 10)
    line = board.close_call(call_id(1), 10)
    assert line is not None
    assert "■ f  stopped after 40 of 100" in plain(line)


def test_many_maps_of_one_function_are_one_line() -> None:
    board = Board(Glyphs())
    for number in range(20):
        board.open_call(call_id(number), "f", 0, 10, is_durable=False)
        board.count(call_id(number), 10, 5, 1, True, 1)
    (line,) = shown(board, 2)
    assert "100/200" in line
    assert "20 failed" in line
    assert "20 calls" in line


def test_many_functions_are_some_lines_and_how_many_more() -> None:
    board = Board(Glyphs())
    for number in range(30):
        board.open_call(call_id(number), f"f{number}", 0, 10, is_durable=False)
    lines = shown(board, 2)
    assert len(lines) == LINES_MAX
    assert lines[-1] == f"and {30 - LINES_MAX + 1} more"
    assert len(shown(board, 2, height=3)) == 3


def test_single_calls_of_one_function_are_one_line() -> None:
    board = Board(Glyphs())
    for number in range(1000):
        board.open_call(call_id(number), "f", 0, 1, is_durable=False)
    for number in range(400):
        board.close_call(call_id(number), 1)
    board.report(m.FunctionProgress(call_id(1), "f", 8, 0))
    (line,) = shown(board, 2)
    for part in ("400 calls done", "600 open", "8 running", "200/s"):
        assert part in line


def test_one_single_call_shows_how_long_it_takes_and_what_it_waits_for() -> None:
    board = Board(Glyphs())
    board.open_call(call_id(1), "f", 0, 1, is_durable=False)
    waiting = report(1, name="f", is_nested=False, running=0, waits_for="a free core")
    board.report(waiting)
    (line,) = shown(board, 65)
    assert line == "f  waits for a free core  1:05"


def test_calls_that_follow_each_other_are_counted_together() -> None:
    board = Board(Glyphs())
    for number in range(5):
        board.open_call(call_id(number), "f", number, 1, is_durable=False)
        board.close_call(call_id(number), number + 0.9)
    board.open_call(call_id(9), "f", 5, 1, is_durable=False)
    assert "5 calls done" in shown(board, 5.5)[0]
    board.close_call(call_id(9), 6)
    board.open_call(call_id(10), "f", 60, 1, is_durable=False)
    assert "done" not in shown(board, 61)[0]


def test_nested_and_spawned_calls_are_shown_from_what_the_scheduler_says() -> None:
    board = board_with_map()
    board.report(report(2))
    board.report(report(3, is_over=True, finished_count=10, running=0))
    board.report(report(4, name="h", is_nested=False, is_durable=True, running=0, starting=0,
                        waits_for="a free core"))  # fmt: skip
    lines = shown(board, 2)
    assert any("g" in line and "14/20" in line and "nested" in line for line in lines)
    assert any(
        "h" in line and "spawned" in line and "waits for a free core" in line for line in lines
    )


def test_containers_that_start_are_said_with_their_functions() -> None:
    board = board_with_map()
    board.report(m.FunctionProgress(call_id(1), "f", 0, 3))
    assert "starting 3 containers of f" in shown(board, 1)[-1]
    board.report(m.FunctionProgress(call_id(1), "f", 3, 0))
    assert not any("starting" in line for line in shown(board, 1))


def test_what_the_scheduler_said_is_forgotten_with_its_connection() -> None:
    board = board_with_map()
    board.report(m.FunctionProgress(call_id(1), "f", 0, 3))
    board.report(report(2))
    board.forget_reports()
    assert len(shown(board, 1)) == 1


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 200])
def test_lines_fit_and_keep_what_matters_most(width: int) -> None:
    board = board_with_map(name="a_function_with_quite_a_long_name")
    board.report(report(1, is_nested=False, running=2))
    board.count(call_id(1), 60, 0, 0, False, 0)
    board.count(call_id(1), 80, 20, 3, False, 2)
    (line,) = shown(board, 2, width=width)
    if width >= 40:
        assert "20/100" in line
        assert "3 failed" in line
    if width >= 80:
        assert "left" in line


def test_labels_name_function_call_and_input() -> None:
    board = Board(PLAIN_GLYPHS)
    board.open_call(call_id(1), "f", 0, 1, is_durable=False)
    board.open_call(call_id(2), "f", 0, 10, is_durable=False)
    board.report(report(3))
    assert board.label(call_id(1), 0) == "f"
    assert board.label(call_id(2), 7) == "f#2[7]"
    assert board.label(call_id(3), 1) == "g[1]"
    board.close_call(call_id(2), 1)
    assert board.label(call_id(2), 7) == "f#2[7]", "its last lines may still come"
    assert board.label(call_id(99), 5) == "call 00000000[5]"


def test_labels_of_ended_calls_are_bounded() -> None:
    board = Board(Glyphs())
    for number in range(5000):
        board.open_call(call_id(number), "f", 0, 1, is_durable=False)
        board.close_call(call_id(number), 0)
    assert board.label(call_id(4999), 0) == "f#5000"
    assert board.label(call_id(1), 0).startswith("call ")


def test_where_only_lines_can_be_written_there_is_one_now_and_then() -> None:
    board = board_with_map()
    board.count(call_id(1), 100, 50, 2, True, PLAIN_INTERVAL_S)
    assert board.plain_lines(PLAIN_INTERVAL_S - 1) == []
    (line,) = board.plain_lines(PLAIN_INTERVAL_S)
    assert line.startswith("f: 50/100, 2 failed")
    assert board.plain_lines(PLAIN_INTERVAL_S + 1) == []
    assert len(board.plain_lines(2 * PLAIN_INTERVAL_S)) == 1


def test_a_summary_needs_time_to_have_passed() -> None:
    board = board_with_map()
    board.count(call_id(1), 100, 100, 0, True, SUMMARY_AFTER_S / 2)
    assert board.close_call(call_id(1), SUMMARY_AFTER_S / 2) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (125, "2:05"), (3725, "1:02:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
