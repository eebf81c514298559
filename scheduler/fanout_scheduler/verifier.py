"""Looks whether the files of blobs hold what their names say, where a peer says that one does not.

One file at a time, in a thread that ends with the process: it may be one of gigabytes, and whoever
asks may lie. All who ask about a blob before it was looked at get the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from fanout.protocol.blob_store import FileBlobStore, Finding

if TYPE_CHECKING:
    from fanout_scheduler.peer import Peer


class Verifier:
    """See the module's text.

    Args:
        files: where the blobs are; a file that has changed is removed there.
        tell: called on the loop with what was found, and who had asked.
    """

    def __init__(
        self, files: FileBlobStore, tell: Callable[[bytes, Finding, list[Peer]], None]
    ) -> None:
        self._files = files
        self._tell = tell
        #: By blob, in the order in which they are looked at.
        self._askers: dict[bytes, list[Peer]] = {}
        self._is_looking = False

    def ask(self, blob_id: bytes, peer: Peer) -> None:
        """Have a look at a blob, and say what was found."""
        self._askers.setdefault(blob_id, []).append(peer)
        if not self._is_looking:
            self._look()

    def _look(self) -> None:
        self._is_looking = True
        blob_id = next(iter(self._askers))
        loop = asyncio.get_running_loop()

        def work() -> None:
            finding = self._files.inspect(blob_id)
            # The loop may have ended meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._found, blob_id, finding)

        threading.Thread(target=work, name="fanout-verify", daemon=True).start()

    def _found(self, blob_id: bytes, finding: Finding) -> None:
        askers = self._askers.pop(blob_id)
        self._is_looking = False
        if self._askers:
            self._look()
        self._tell(blob_id, finding, askers)
