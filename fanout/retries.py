"""How often, and after what delay, an input that failed is run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fanout.exceptions import InvalidError

#: What `retries=n` means: a fixed delay of this many seconds.
DELAY_S = 1.0


@dataclass(frozen=True, slots=True)
class Retries:
    """Run an input that raised, or ran out of time, again.

    The delay before attempt n + 1 is ``initial_delay * backoff_coefficient ** (n - 1)`` seconds,
    at most `max_delay`. An input that lost its worker is run again without using up any of these.

    Args:
        max_retries: attempts beyond the first; at least 0.
        backoff_coefficient: from 1.0 (fixed delay) to 10.0.
        initial_delay: seconds, from 0 to 60.
        max_delay: seconds, from 1 to 60.

    Raises:
        InvalidError: an argument is of the wrong type or out of its range.
    """

    max_retries: int
    backoff_coefficient: float = 2.0
    initial_delay: float = 1.0
    max_delay: float = 60.0

    def __post_init__(self) -> None:
        if type(self.max_retries) is not int or not 0 <= self.max_retries < 1 << 31:
            raise InvalidError(
                f"Retries(max_retries={self.max_retries!r}): must be an int of at least 0"
            )
        _check("backoff_coefficient", self.backoff_coefficient, 1.0, 10.0)
        _check("initial_delay", self.initial_delay, 0.0, 60.0)
        _check("max_delay", self.max_delay, 1.0, 60.0)

    def as_data(self) -> list[float]:
        """``[max_retries, initial_delay, backoff_coefficient, max_delay]``, as on the wire."""
        return [
            self.max_retries,
            float(self.initial_delay),
            float(self.backoff_coefficient),
            float(self.max_delay),
        ]


def _check(name: str, value: Any, low: float, high: float) -> None:
    if type(value) not in (int, float) or not low <= value <= high:
        raise InvalidError(f"Retries({name}={value!r}): must be a number from {low:g} to {high:g}")


def as_retries(value: Any) -> Retries | None:
    """What the option `retries=` means: None, a count with a fixed delay of a second, or itself.

    Raises:
        InvalidError: it is none of these, or negative.
    """
    if value is None or isinstance(value, Retries):
        return value
    if type(value) is not int or value < 0:
        raise InvalidError(
            f"retries={value!r}: must be an int of at least 0 or a fanout.Retries(...)"
        )
    return Retries(value, backoff_coefficient=1.0, initial_delay=DELAY_S) if value else None
