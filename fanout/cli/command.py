"""The list of commands, as typer shows and parses it."""

from __future__ import annotations

from typing import Annotated

import typer

import fanout
from fanout.cli import cluster, daemon, token

app = typer.Typer(
    name="fanout",
    help="Batch work on your own machines.",
    no_args_is_help=True,
    add_completion=False,
    # Plain text: it can be read on every terminal and in a pipe, and rich need not be loaded.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"fanout {fanout.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command(
    "run",
    # All of it is for the parser of `fanout.cli.run`; typer only lists the command.
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
    short_help="Run an entrypoint or a function of a file.",
)
def run(context: typer.Context) -> None:
    """Run a local entrypoint or a function of FILE[::NAME]; see `fanout run --help`."""
    from fanout.cli.run import main

    raise typer.Exit(main(context.args))


app.command("scheduler", short_help="Run a scheduler for several hosts.")(daemon.scheduler)
app.command("worker", short_help="Run a worker on this host.")(daemon.worker)
app.command("status", short_help="Show what runs, and what waits for what.")(cluster.status)
app.command("stop", short_help="End the daemons that fanout started here by itself.")(cluster.stop)
app.add_typer(token.app, name="token", short_help="Create, list and revoke tokens.")
