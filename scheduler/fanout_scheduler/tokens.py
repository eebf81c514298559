"""Who may join, as the running scheduler knows it.

Two tokens are made at the first start, one for clients and one for workers, and kept, so that join
strings which people have copied go on working after a restart. `fanout token` makes more and
withdraws them; see `fanout/protocol/tokens.py` for how the two agree.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from fanout.exceptions import StorageError
from fanout.protocol.join import ROLES, Token
from fanout.protocol.tokens import Content, Entry, TokenFile

#: What the holder of a token that is not valid any more reads.
REVOKED = (
    "the token {token_id} was revoked at the scheduler; whoever runs the scheduler gives out a new "
    "join string with `fanout token create`"
)

log = logging.getLogger("fanout.scheduler")


class Tokens:
    """The tokens in a file of mode 0600; made when it is not there.

    Raises:
        StorageError: the file is there and is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self._file = TokenFile(path)
        if not path.exists():
            now = time.time()
            self._file.write(tuple(Entry(Token.new(role), made_at=now) for role in ROLES))
        # Whoever copied the folder may have lost the mode on the way.
        path.chmod(0o600)
        # Looked at before it is read: a change in between is then seen the next time.
        self._seen = self._look()
        self._is_failure_told = False
        self._take(self._file.read())

    def lookup(self, token_id: str) -> Token | None:
        """The token with this public id, or None."""
        return self._by_id.get(token_id)

    def of_role(self, role: str) -> Token:
        """The oldest token that lets peers of this role ("client" or "worker") in."""
        return next(token for token in self._by_id.values() if token.role == role)

    def reread(self) -> bool:
        """Take what is in the file now. Returns whether it is something else than before.

        A file that is damaged, gone or cannot be read changes nothing: whoever was let in by what
        it held stays, and the log says so once. What could not be read is tried again each time,
        as it may be a revocation.
        """
        seen = self._look()
        if seen == self._seen:
            return False
        try:
            content = self._file.read()
        except OSError as error:
            if not self._is_failure_told:
                log.error("the tokens that were read before stay in force: %s", error)
            self._is_failure_told = True
            return False
        except StorageError as error:
            self._seen = seen
            log.error("the tokens that were read before stay in force: %s", error)
            return False
        self._seen, self._is_failure_told = seen, False
        if content.digest == self.digest:
            return False
        self._take(content)
        return True

    def _take(self, content: Content) -> None:
        #: Which content of the file is in force.
        self.digest = content.digest
        self._by_id = {entry.token.token_id: entry.token for entry in content.entries}

    def _look(self) -> tuple[int, int, int] | None:
        """What changes with each replacement of the file; None when it is not there."""
        try:
            found = os.stat(self._file.path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
