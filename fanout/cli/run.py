"""`fanout run FILE[::NAME] [flags]`: run a local entrypoint, or one function with one input.

This is the command that people wait for, so it is parsed here, without typer, and imports nothing
that a run does not need.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fanout import config
from fanout.call import PREFIX
from fanout.cli.failure import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    complain,
    show_traceback,
)
from fanout.cli.flag import UsageError, parse_flags
from fanout.cli.interrupt import Interrupts
from fanout.cli.reference import Runnable, find_runnable, import_reference, parse_reference
from fanout.exceptions import ConnectionError, Error

if TYPE_CHECKING:
    from fanout.client.app_run import AppRun

_EPILOG = """\
NAME is a local entrypoint or a function; it may be left out where the file has only one of them.
Flags after FILE come from its parameters: `max_size: int = 3` is typed as --max-size 10.
`fanout run FILE[::NAME] --help` lists them.
"""


class NotStartedError(Exception):
    """The run did not begin, for a reason outside of the user's code; the text says which."""


def main(arguments: Sequence[str]) -> int:
    """Run what the command line names; returns the exit code.

    Args:
        arguments: the command line after ``fanout run``.

    Raises:
        SystemExit: `--help`, a wrong flag, or `sys.exit` in the user's code.
    """
    runs: list[AppRun] = []
    try:
        with Interrupts(lambda: _farewell(runs, is_at_once=True)):
            options, reference_text, flags = _split(arguments)
            with _shown(options.quiet):
                reference = parse_reference(reference_text, options.m)
                module = import_reference(reference, flags)
                runnable = find_runnable(module, reference)
                bound = _bind(runnable, reference_text, flags)
                _run(runnable, bound, runs)
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
    except (ConnectionError, NotStartedError) as error:
        complain(str(error))
        return EXIT_ERROR
    except KeyboardInterrupt:
        complain(_farewell(runs))
        return EXIT_INTERRUPTED
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # A cancelled entrypoint is one that failed, too.
        show_traceback(error)
        return EXIT_ERROR
    return 0


def _split(arguments: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """Our own options, the reference, and the flags of what it names.

    Ours come before the reference. So a function may have a flag of the same name.
    """
    parser = argparse.ArgumentParser(
        prog="fanout run",
        usage="fanout run [-m] [-q] FILE[::NAME] [flags]",
        description="Run a local entrypoint, or one function with one input.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-m", action="store_true", help="FILE is the name of a module")
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="show neither what containers print nor how calls get on",
    )
    parser.add_argument("reference", metavar="FILE[::NAME]")
    own = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    options = parser.parse_args(arguments[: own + 1])
    flags = list(arguments[own + 1 :])
    if flags[:1] == ["--"]:
        del flags[0]
    return options, options.reference, flags


def _bind(runnable: Runnable, text: str, flags: list[str]) -> inspect.BoundArguments:
    """The arguments for the entrypoint or the function, from the flags."""
    from fanout.app import LocalEntrypoint

    raw_f = runnable.target.get_raw_f()
    if isinstance(runnable.target, LocalEntrypoint):
        return parse_flags(raw_f, text, flags)
    if runnable.target.is_generator:
        raise UsageError(
            f"{runnable.name} is a generator function, whose items nobody here would take. "
            f"Write an @app.local_entrypoint() that loops over {runnable.name}.remote_gen(...)."
        )
    return parse_flags(raw_f, text, flags)


def _shown(is_quiet: bool) -> contextlib.AbstractContextManager[None]:
    """Shows the run. From before the user's module is imported, so that streams which it takes hold
    of then (a logging handler does) are those that step aside for the bars."""
    from fanout.output import enable_output

    return contextlib.nullcontext() if is_quiet else enable_output()


def _run(runnable: Runnable, bound: inspect.BoundArguments, runs: list[AppRun]) -> None:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(runnable.app.run())
        except Error as error:
            raise NotStartedError(str(error)) from error
        runs += filter(None, [runnable.app._run])
        target: Any = runnable.target
        if not runnable.is_entrypoint:
            target.remote(*bound.args, **bound.kwargs)
            return
        result = target(*bound.args, **bound.kwargs)
        if inspect.iscoroutine(result):
            import asyncio

            asyncio.run(result)


def _farewell(runs: Sequence[AppRun], is_at_once: bool = False) -> str:
    """What becomes of the work of an interrupted run."""
    if not runs:
        return "interrupted before anything ran"
    run = runs[0]
    called = f"the calls of app {run.name!r}"
    if is_at_once:
        fate = f"left at once: {called} are cancelled within {config.CLIENT_GRACE_S:g} s"
    else:
        fate = f"interrupted: {called} are cancelled"
    if not run.spawned_count:
        return fate
    ids = ", ".join(PREFIX + call_id.hex() for call_id in run.spawned_ids)
    rest = run.spawned_count - len(run.spawned_ids)
    more = f" and {rest:,} more" if rest else ""
    return f"{fate}, and spawned ones go on: {ids}{more} (`fanout status` shows them)"
