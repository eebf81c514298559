"""Command-line flags from a function's signature, as `fanout run` offers them.

A parameter `max_size: int = 3` becomes `--max-size`, optional; without a default the flag is
required. A bool becomes `--x` and `--no-x`, a Literal a choice. `*names` takes what follows, as
text. An annotation that no text can be turned into is an error of the program, named with its
parameter, and not a flag that would pass on a string where something else is meant.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

#: How a message names the types that a flag can have.
SUPPORTED = "str, int, float, bool, datetime.datetime, a Literal of these, or Optional of one"

_PARSERS: dict[Any, Callable[[str], Any]] = {}


class UsageError(Exception):
    """The command line is wrong, or asks for something the program does not have.

    The text is for the person who typed it; the exit code is 2.
    """


def _parses(kind: Any, what: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Register a parser; a text that it refuses with a ValueError is "not {what}"."""

    def register(parse: Callable[[str], Any]) -> Callable[[str], Any]:
        def parse_or_say(value: str) -> Any:
            try:
                return parse(value)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{value!r} is not {what}") from None

        _PARSERS[kind] = parse_or_say
        return parse

    return register


@_parses(str, "a text")
def _text(value: str) -> str:
    return value


@_parses(int, "a whole number")
def _whole_number(value: str) -> int:
    return int(value)


@_parses(float, "a number")
def _number(value: str) -> float:
    return float(value)


@_parses(datetime.datetime, "a date like 2024-05-31 or 2024-05-31T12:30:00")
def _date(value: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(value)


def parse_flags(
    function: Callable[..., Any], name: str, arguments: Sequence[str]
) -> inspect.BoundArguments:
    """The arguments for a function from the text that a person typed.

    Args:
        function: whose signature says which flags there are.
        name: how the usage line calls it.
        arguments: what came after it on the command line.

    Returns:
        Arguments to call it with; defaults are left to the function itself.

    Raises:
        UsageError: a parameter's annotation cannot be parsed from text.
        SystemExit: `--help` was asked for (0) or the flags are wrong (2); argparse has said why.
    """
    signature = inspect.signature(function)
    hints = _hints_of(function, name)
    parser = argparse.ArgumentParser(
        prog=f"fanout run {name}",
        description=inspect.getdoc(function),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # A function may have a parameter called `help`; its own flag then wins.
        conflict_handler="resolve",
    )
    for parameter in signature.parameters.values():
        _add(parser, parameter, hints.get(parameter.name, str), name)
    given = vars(parser.parse_args(list(arguments)))
    bound = signature.bind_partial()
    for parameter in signature.parameters.values():
        if parameter.name in given:
            value = given[parameter.name]
            is_rest = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            bound.arguments[parameter.name] = tuple(value) if is_rest else value
    return bound


def _hints_of(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception as error:
        # Annotations are arbitrary expressions when they are strings, so anything can be raised.
        raise UsageError(f"{name} has an annotation that cannot be evaluated: {error}") from error


def _add(
    parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any, name: str
) -> None:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        parser.add_argument(parameter.name, nargs="*", default=argparse.SUPPRESS)
        return
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        raise UsageError(
            f"{name} takes **{parameter.name}, and flags cannot be made from that. "
            f"Give it named parameters."
        )
    options: dict[str, Any] = {
        "dest": parameter.name,
        "required": parameter.default is inspect.Parameter.empty,
        "default": argparse.SUPPRESS,
        "help": _help_of(parameter),
    }
    kind = _without_none(hint)
    choices = _choices_of(kind)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif choices is not None:
        options["type"] = _PARSERS[type(choices[0])]
        options["choices"] = choices
    elif kind in (Any, inspect.Parameter.empty):
        options["type"] = _PARSERS[str]
    elif isinstance(kind, type) and kind in _PARSERS:
        options["type"] = _PARSERS[kind]
    else:
        shown = getattr(hint, "__name__", None) if isinstance(hint, type) else None
        raise UsageError(
            f"{name}: parameter {parameter.name!r} is annotated {shown or hint}, which cannot be "
            f"parsed from a flag. Supported are {SUPPORTED}."
        )
    parser.add_argument(flag_of(parameter.name), **options)


def flag_of(parameter: str) -> str:
    """``max_size`` is typed as ``--max-size``."""
    return "--" + parameter.strip("_").replace("_", "-")


def _help_of(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    if parameter.default is None:
        return ""
    return f"default: {parameter.default}".replace("%", "%%")


def _without_none(hint: Any) -> Any:
    """The X of `Optional[X]` and `X | None`; any other annotation as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
    return hint


def _choices_of(kind: Any) -> list[Any] | None:
    """The values of a Literal that are all text or all integers; None for anything else."""
    if typing.get_origin(kind) is not typing.Literal:
        return None
    values = list(typing.get_args(kind))
    if {type(value) for value in values} in ({str}, {int}):
        return values
    return None
