"""The file of a scheduler's tokens: the truth about who may join.

`fanout token` changes it, and a running scheduler looks at it twice a second: nothing else passes
between the two, so a change is never half in force, and what is in force after a restart is what
was in force before. Whoever may write to the scheduler's home decides about its tokens; no token
gives that right.

The file is replaced in one step, under a lock that all who change it take. Files of earlier
versions hold two tokens without names, and go on working.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanout.exceptions import StorageError
from fanout.filesystem import write_private
from fanout.protocol.join import ROLES, SECRET_SIZE_BYTES, Token

FILE_NAME = "tokens.json"
#: More than this is a mistake in a script that makes them, and each costs a line on the screen.
TOKENS_MAX = 1000
NAME_SIZE_MAX = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A token, with what a person wants to know of it."""

    token: Token
    #: "" for the two that a scheduler makes at its first start.
    name: str = ""
    #: Seconds since 1970; None where an earlier version did not write it.
    made_at: float | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """What the file held when it was read."""

    entries: tuple[Entry, ...]
    #: Tells this content from others; how the scheduler says which one it has read.
    digest: str


class TokenFile:
    """The tokens of the scheduler with this home folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Content:
        """What is in the file now.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it is not one of ours.
        """
        data = self.path.read_bytes()
        return Content(self._parse(data), _digest(data))

    def write(self, entries: tuple[Entry, ...]) -> Content:
        """Replace the file, readable by its owner alone. It is on disk when this returns."""
        data = _dump(entries)
        write_private(self.path, data)
        return Content(entries, _digest(data))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else change the file between a `read` and a `write`."""
        path = self.path.with_name("tokens.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _parse(self, data: bytes) -> tuple[Entry, ...]:
        try:
            entries = tuple(_entry(record) for record in json.loads(data)["tokens"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damage(repr(error)) from error
        for entry in entries:
            token = entry.token
            is_whole = (
                type(token.token_id) is str
                and token.role in ROLES
                and len(token.secret) == SECRET_SIZE_BYTES
            )
            if not is_whole:
                raise self._damage("a secret has the wrong size, or a role is not known")
        if {entry.token.role for entry in entries} != set(ROLES):
            raise self._damage("it lacks a token for clients, or one for workers")
        if len({entry.token.token_id for entry in entries}) != len(entries):
            raise self._damage("an id is there twice")
        return entries

    def _damage(self, detail: str) -> StorageError:
        return StorageError(
            f"the token file {self.path} is damaged: {detail}. Put a copy back, or delete it to "
            f"have new tokens made; join strings that were given out then end."
        )


def _entry(record: dict[str, Any]) -> Entry:
    made_at = record.get("made_at")
    return Entry(
        Token(
            token_id=record["token_id"],
            role=record["role"],
            secret=base64.urlsafe_b64decode(record["secret"]),
        ),
        name=str(record.get("name", "")),
        made_at=None if made_at is None else float(made_at),
    )


def _dump(entries: tuple[Entry, ...]) -> bytes:
    records = [
        {
            "token_id": entry.token.token_id,
            "role": entry.token.role,
            "name": entry.name,
            "made_at": entry.made_at,
            "secret": base64.urlsafe_b64encode(entry.token.secret).decode("ascii"),
        }
        for entry in entries
    ]
    return json.dumps({"tokens": records}, indent=1).encode() + b"\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
