"""Small calls, one after the other until the input ends; then the times of all of them."""

import json
import select
import sys

from tests import behaviour_kit as kit


def is_told_to_end() -> bool:
    return bool(select.select([sys.stdin], [], [], kit.BETWEEN_CALLS_S)[0])


def main() -> None:
    with kit.app.run():
        kit.same.remote(0)
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        json.dump(kit.time_calls(is_told_to_end), sys.stdout)


if __name__ == "__main__":
    main()
