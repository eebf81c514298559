"""Another program collects what `shapes.py` has spawned, and knows its classes by import."""

import sys

from shapes import BadShape, Square  # type: ignore[import-not-found]

import fanout


def main(value_id: str, error_id: str) -> None:
    value = fanout.FunctionCall.from_id(value_id).get(timeout=30)
    if not isinstance(value, Square):
        sys.exit(f"the result is of another class: {type(value)}")
    try:
        fanout.FunctionCall.from_id(error_id).get(timeout=30)
    except BadShape as error:
        sys.stdout.write(
            f"{type(value).__name__} {value.side} {type(error).__name__} {error.sides}\n"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
