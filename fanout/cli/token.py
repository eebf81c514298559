"""`fanout token`: who may join a scheduler, decided on the scheduler's host.

The right to do this is the right to write to the scheduler's home, so these commands work on the
token file (`fanout.protocol.tokens`) and run where the scheduler runs. A running scheduler follows
the file by itself and says so in `scheduler.json`, which is what is waited for here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fanout.cli.cluster import section_lines
from fanout.cli.failure import EXIT_ERROR, complain
from fanout.client.home import Daemon, find_daemon, state_folder, wait_until
from fanout.client.local import ask_status
from fanout.exceptions import (
    ConnectionError,
    Error,
    InvalidError,
    NotFoundError,
    StorageError,
)
from fanout.protocol.join import JoinString, Token
from fanout.protocol.tokens import FILE_NAME, NAME_SIZE_MAX, TOKENS_MAX, Entry, TokenFile

#: A scheduler looks at its tokens twice a second; one that is stopped does not.
FOLLOW_TIMEOUT_S = 5.0

app = typer.Typer(
    no_args_is_help=True,
    help="Say who may join a scheduler of this host. A running scheduler follows at once.",
)

Home = Annotated[
    str, typer.Option(help="The scheduler's --home; the one of `fanout scheduler` by default.")
]


@contextmanager
def _system_errors_told() -> Iterator[None]:
    """What the system refuses, a full disk for one, as a sentence and not as a traceback."""
    try:
        yield
    except Error:
        # Some of ours are the system's errors, too.
        raise
    except OSError as error:
        raise StorageError(
            f"the tokens cannot be read or changed: {error}. Repair that and do it again; "
            f"`fanout token list` shows what is in force."
        ) from error


class Role(StrEnum):
    """Who joins: programs, or hosts that run functions."""

    client = "client"
    worker = "worker"


@app.command()
@_system_errors_told()
def create(
    role: Annotated[Role, typer.Argument(help="For programs that make calls, or for workers.")],
    name: Annotated[str, typer.Option(help="Whose it is, for `fanout token list`.")] = "",
    home: Home = "",
) -> None:
    """Make a further token and print its join string, which holds a secret, this once."""
    _check_name(name)
    folder, file = _find(home)
    scheduler = find_daemon(folder, "scheduler")
    if scheduler is None:
        raise InvalidError(
            f"no scheduler runs with the home {folder}, and a join string names its address: "
            f"start it, then create the token"
        )
    known = JoinString.parse(scheduler.client_join)
    with file.locked():
        entries = file.read().entries
        if len(entries) >= TOKENS_MAX:
            raise InvalidError(
                f"there are {len(entries)} tokens, the limit is {TOKENS_MAX}: revoke some first"
            )
        entry = Entry(Token.new(role.value), name, time.time())
        file.write((*entries, entry))
    # Nothing shows it again, so it is shown whatever comes now, Ctrl-C included.
    typer.echo(str(JoinString.of(entry.token, known.address, known.fingerprint)))
    _follow(folder, file)


@app.command("list")
@_system_errors_told()
def list_tokens(home: Home = "") -> None:
    """Show ids, roles and names, and how many connections each token has now. Never secrets."""
    folder, file = _find(home)
    entries = file.read().entries
    used = _connections(find_daemon(folder, "scheduler"))
    rows = [
        (
            entry.token.token_id,
            entry.token.role,
            entry.name,
            _date(entry.made_at),
            None if used is None else used.get(entry.token.token_id, 0),
        )
        for entry in entries
    ]
    heads = ("ID", "ROLE", "NAME", "MADE", "CONNECTIONS")
    typer.echo("\n".join(section_lines("tokens", heads, rows)[1:]))
    if used is None:
        complain(f"no scheduler answers for {folder}, so nobody knows which tokens are in use")


@app.command()
@_system_errors_told()
def revoke(
    token_id: Annotated[str, typer.Argument(help="The id, as `fanout token list` shows it.")],
    home: Home = "",
) -> None:
    """Make a token void: its connections end now, and no other one begins."""
    folder, file = _find(home)
    with file.locked():
        entries = file.read().entries
        found = [entry for entry in entries if entry.token.token_id == token_id]
        if not found:
            raise NotFoundError(
                f"there is no token {token_id!r} in {file.path}; `fanout token list` shows all"
            )
        (entry,) = found
        role = entry.token.role
        if sum(other.token.role == role for other in entries) == 1:
            raise InvalidError(
                f"{token_id} is the only token for {role}s, and without one no {role} can join. "
                f"Create its successor first (fanout token create {role}), hand that out, and "
                f"revoke this one then. To end everything, stop the scheduler."
            )
        file.write(tuple(other for other in entries if other is not entry))
    if find_daemon(folder, "scheduler") is None:
        typer.echo(f"revoked {token_id}; no scheduler runs with the home {folder}")
        return
    _follow(folder, file)
    typer.echo(f"revoked {token_id}; no connection with it is left")


def _find(home: str) -> tuple[str, TokenFile]:
    """The scheduler's home folder, and its tokens."""
    folder = os.path.abspath(home) if home else os.path.join(state_folder(), "serve")
    file = TokenFile(Path(folder) / FILE_NAME)
    _check_owner(folder)
    if not file.path.exists():
        raise InvalidError(
            f"no scheduler has been started with the home {folder}: there is no {FILE_NAME}. "
            f"Run this where `fanout scheduler` runs, with the same --home."
        )
    return folder, file


def _check_owner(folder: str) -> None:
    """The file is replaced by one of this user, and its scheduler must be able to read that."""
    if not os.path.exists(folder):
        return
    owner = os.stat(folder).st_uid
    if owner != os.geteuid():
        raise InvalidError(
            f"the scheduler's home {folder} belongs to user {owner}, and this is user "
            f"{os.geteuid()}: run this as that user, with the same --home (sudo -u '#{owner}' ...)"
        )


def _check_name(name: str) -> None:
    if len(name) > NAME_SIZE_MAX or not name.isprintable():
        raise InvalidError(
            f"the name {name[:80]!r} of a token is not 0 to {NAME_SIZE_MAX} printable characters"
        )


def _follow(folder: str, file: TokenFile) -> None:
    """Wait until the running scheduler has taken what is in the file now. That is our change, or a
    later one that was made on top of it."""

    def has_followed() -> bool:
        scheduler = find_daemon(folder, "scheduler")
        return scheduler is None or scheduler.tokens == file.read().digest

    try:
        wait_until(has_followed, time.monotonic() + FOLLOW_TIMEOUT_S)
    except TimeoutError:
        scheduler = find_daemon(folder, "scheduler")
        complain(
            f"the change is written, but the scheduler (pid {scheduler.pid if scheduler else '?'}) "
            f"has not taken it within {FOLLOW_TIMEOUT_S:g} s. Is it stopped? Its log says more; it "
            f"takes the change when it goes on, or when it is started again."
        )
        raise typer.Exit(EXIT_ERROR) from None


def _connections(scheduler: Daemon | None) -> dict[str, int] | None:
    """How many connections each token has, this question's own left out; None: nobody answers."""
    if scheduler is None:
        return None
    join = JoinString.parse(scheduler.client_join)
    try:
        used: dict[str, int] = dict(ask_status(join).get("tokens", {}))
    except ConnectionError:
        return None
    used[join.token_id] = used.get(join.token_id, 1) - 1
    return used


def _date(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
