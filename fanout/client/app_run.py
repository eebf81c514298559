"""One run of an app, as all sessions of this process see it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanout.client.session import Session


#: Ids of spawned calls that are kept, to tell them to a person.
SPAWNED_IDS_MAX = 5


class AppRun:
    """One run of an app: from entering `app.run()` until leaving it."""

    def __init__(self, name: str, app_id: bytes) -> None:
        self.name = name
        self.app_id = app_id
        self.is_open = True
        #: The session that opened it over there; any other session only uses it.
        self.owner: Session | None = None
        #: Life of the scheduler in which it was last opened.
        self.opened_epoch = -1
        #: Definitions made for this run, by their `Service`; and "code", which all of them share.
        self.definitions: dict[Any, Any] = {}
        #: Calls that were spawned: the last ones, and how many in all.
        self.spawned_ids: deque[bytes] = deque(maxlen=SPAWNED_IDS_MAX)
        self.spawned_count = 0
