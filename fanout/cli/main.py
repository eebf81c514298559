"""The `fanout` command: `main` is the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; leaves by SystemExit with the exit code.

    `run` goes past typer: loading it takes longer than finding the scheduler, and somebody waits.
    """
    arguments = sys.argv[1:]
    if arguments[:1] == ["run"]:
        from fanout.cli.run import main as run

        sys.exit(run(arguments[1:]))
    sys.exit(_command(arguments))


def _command(arguments: list[str]) -> int:
    from fanout.cli.command import app
    from fanout.cli.failure import EXIT_ERROR, EXIT_USAGE, complain
    from fanout.exceptions import Error, InvalidError

    try:
        app(arguments, prog_name="fanout")
    except InvalidError as error:
        complain(str(error))
        return EXIT_USAGE
    except Error as error:
        complain(str(error))
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    main()
