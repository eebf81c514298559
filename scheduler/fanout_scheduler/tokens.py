"""The two secrets of a scheduler: one lets clients in, the other lets workers in.

They are made at the first start and kept, so that join strings which people have copied go on
working after a restart. To void them, stop the scheduler and delete the file.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from fanout.exceptions import StorageError
from fanout.protocol.join import ROLES, SECRET_SIZE_BYTES, Token
from fanout_scheduler.home import write_private


class Tokens:
    """The tokens in a file of mode 0600; made when it is not there.

    Raises:
        StorageError: the file is there and is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            tokens = [Token.new(role) for role in ROLES]
            write_private(path, _dump(tokens))
        else:
            # Whoever copied the folder may have lost the mode on the way.
            path.chmod(0o600)
            tokens = self._parse(data)
        self._by_id = {token.token_id: token for token in tokens}
        self._by_role = {token.role: token for token in tokens}

    def lookup(self, token_id: str) -> Token | None:
        """The token with this public id, or None."""
        return self._by_id.get(token_id)

    def of_role(self, role: str) -> Token:
        """The token that lets peers of this role ("client" or "worker") in."""
        return self._by_role[role]

    def _parse(self, data: bytes) -> list[Token]:
        try:
            tokens = [
                Token(
                    token_id=entry["token_id"],
                    role=entry["role"],
                    secret=base64.urlsafe_b64decode(entry["secret"]),
                )
                for entry in json.loads(data)["tokens"]
            ]
            is_whole = {token.role for token in tokens} == set(ROLES) and all(
                type(token.token_id) is str and len(token.secret) == SECRET_SIZE_BYTES
                for token in tokens
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damage(repr(error)) from error
        if not is_whole:
            raise self._damage("it lacks a token, or a secret has the wrong size")
        return tokens

    def _damage(self, detail: str) -> StorageError:
        return StorageError(
            f"the token file {self.path} is damaged: {detail}. Put a copy back, or delete it to "
            f"have new tokens made; join strings that were given out then end."
        )


def _dump(tokens: list[Token]) -> bytes:
    entries = [
        {
            "token_id": token.token_id,
            "role": token.role,
            "secret": base64.urlsafe_b64encode(token.secret).decode("ascii"),
        }
        for token in tokens
    ]
    return json.dumps({"tokens": entries}, indent=1).encode() + b"\n"
