"""Flags from a function's signature, and what `fanout run` is given to run."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest

from fanout.cli.flag import UsageError, parse_flags
from fanout.cli.reference import parse_reference

# --- flags ---------------------------------------------------------------------------------------


def call(function: Callable[..., Any], *arguments: str) -> Any:
    bound = parse_flags(function, "script.py", arguments)
    return function(*bound.args, **bound.kwargs)


def test_each_annotation_is_parsed_from_its_flag() -> None:
    def main(  # type: ignore[no-untyped-def]
        text: str,
        count: int,
        share: float,
        when: datetime.datetime,
        mode: Literal["fast", "slow"],
        level: Literal[1, 2],
        plain,
        anything: Any,
        noted: Annotated[int, "a note"],
    ) -> tuple[Any, ...]:
        return text, count, share, when, mode, level, plain, anything, noted

    typed = "--text a --count -3 --share 1e-3 --when 2026-01-02T03:04 --mode slow --level 2"
    more = "--plain 7 --anything 8 --noted 9"
    assert call(main, *typed.split(), *more.split()) == (
        "a", -3, 0.001, datetime.datetime(2026, 1, 2, 3, 4), "slow", 2, "7", "8", 9,
    )  # fmt: skip


def test_default_makes_a_flag_optional() -> None:
    def main(max_size: int = 3, name: str | None = None, other: Optional[float] = 0.5) -> Any:  # noqa: UP045
        return max_size, name, other

    assert call(main) == (3, None, 0.5)
    assert call(main, "--max-size", "4", "--name", "x", "--other=-1") == (4, "x", -1.0)


def test_bool_is_a_pair_of_flags() -> None:
    def main(dry_run: bool, color: bool = True) -> tuple[bool, bool]:
        return dry_run, color

    assert call(main, "--no-dry-run", "--no-color") == (False, False)
    assert call(main, "--dry-run") == (True, True)


def test_names_and_flags_of_keyword_only_and_variadic_parameters() -> None:
    def main(first: int, *rest: str, last: str = "z") -> tuple[Any, ...]:
        return first, rest, last

    assert call(main, "--first", "1") == (1, (), "z")
    assert call(main, "--first", "1", "--last", "y", "a", "b") == (1, ("a", "b"), "y")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--count"),
        (["--count", "many"], "argument --count: 'many' is not a whole number"),
        (["--count", "1", "--extra", "2"], "--extra"),
        (["--coun", "1"], "--count"),
        (["--count", "1", "--mode", "odd"], "invalid choice: 'odd'"),
    ],
)
def test_wrong_flags_are_named_and_exit_with_two(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(count: int, mode: Literal["a", "b"] = "a") -> None: ...

    with pytest.raises(SystemExit) as caught:
        parse_flags(main, "script.py", arguments)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_annotation_without_a_parser_is_a_usage_error_that_names_the_parameter() -> None:
    def main(paths: list[str]) -> None: ...

    with pytest.raises(UsageError, match=r"'paths' is annotated list\[str\].*Supported are str"):
        parse_flags(main, "script.py", [])


def test_annotation_that_cannot_be_evaluated_is_a_usage_error() -> None:
    def main(path: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UsageError, match="Missing"):
        parse_flags(main, "script.py", [])


def test_keyword_catchall_is_a_usage_error() -> None:
    def main(**options: str) -> None: ...

    with pytest.raises(UsageError, match=r"\*\*options"):
        parse_flags(main, "script.py", [])


def test_percent_sign_in_a_default_does_not_break_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(pattern: str = "100 %d") -> None:
        """Match 100 % of them."""

    with pytest.raises(SystemExit) as caught:
        parse_flags(main, "script.py", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--pattern" in shown
    assert "100 %" in shown


# --- references ----------------------------------------------------------------------------------


def test_reference_is_split_at_the_double_colon(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text("")
    whole = parse_reference(str(script), is_module=False)
    assert (whole.source, whole.name) == (str(script), "")
    named = parse_reference(f"{script}::app.main", is_module=False)
    assert (named.source, named.name) == (str(script), "app.main")


@pytest.mark.parametrize(
    ("text", "is_module", "part"),
    [
        ("missing.py", False, "there is no file 'missing.py'"),
        ("package.module", False, "fanout run -m package.module"),
        ("::main", False, "FILE::NAME"),
        ("a.py::", False, "FILE::NAME"),
        (".", False, "it is a folder"),
        ("a.py", True, "leave out -m"),
    ],
)
def test_wrong_reference_says_what_to_type(text: str, is_module: bool, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_reference(text, is_module)
