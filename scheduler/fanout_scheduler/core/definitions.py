"""What a definition's options may be: the core counts with them.

The library checks them for its users, with better words. What gets here otherwise was made by hand,
and one bad number would make each later decision fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COUNT_MAX = 1 << 31
SECONDS_MAX = 1e9
CORES_MAX = 1e6
#: An input that backs off keeps its call alive. The library allows a minute.
RETRY_DELAY_S_MAX = 3600.0
#: So that powers of it stay numbers; see `outputs.EXPONENT_MAX`.
COEFFICIENT_MAX = 1e4

_Check = Callable[[Any], bool]


def _is_number(value: Any, high: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= high


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < COUNT_MAX


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_span(value: Any) -> bool:
    return _is_number(value, SECONDS_MAX)


def _are_retries(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) == 4
        and _is_count(value[0])
        and _is_number(value[1], RETRY_DELAY_S_MAX)
        and _is_number(value[2], COEFFICIENT_MAX)
        and _is_number(value[3], RETRY_DELAY_S_MAX)
    )


def _is_batch(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _is_count(value[0]) and value[0] > 0


def _are_methods(value: Any) -> bool:
    return type(value) is dict and all(
        type(name) is str and type(shape) is dict and "is_generator" in shape
        for name, shape in value.items()
    )


_CHECKS: dict[str, _Check] = {
    "batch": _is_batch,
    "buffer_containers": _is_count,
    "cpu": lambda value: _is_number(value, CORES_MAX),
    "is_generator": _is_flag,
    "is_mixed": _is_flag,
    "max_containers": lambda value: _is_count(value) and value > 0,
    "max_inputs": _is_count,
    "memory": _is_count,
    "methods": _are_methods,
    "min_containers": _is_count,
    "retries": _are_retries,
    "scaledown_window": _is_span,
    "single_use": _is_flag,
    "target_inputs": _is_count,
    "timeout": _is_span,
}
#: The first must not be above the second, which is so much where it is not set.
_PAIRS: list[tuple[str, str, int | None]] = [
    ("min_containers", "max_containers", None),
    ("target_inputs", "max_inputs", 1),
]
#: For these there is no "not set".
_ALWAYS_SET = frozenset({"scaledown_window"})


def fault_of(options: dict[str, Any]) -> str:
    """The first option that no library would send, in words; "" when all are well."""
    for name, is_valid in _CHECKS.items():
        if name not in options or (options[name] is None and name not in _ALWAYS_SET):
            continue
        if not is_valid(options[name]):
            return f"the option {name}={options[name]!r} of a function is not valid"[:500]
    for low, high, high_default in _PAIRS:
        limit = options.get(high) or high_default
        if limit is not None and (options.get(low) or 0) > limit:
            return f"the option {low}={options[low]} of a function is above {high}={limit}"
    return ""
