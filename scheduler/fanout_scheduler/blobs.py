"""Which blob files the scheduler keeps, and for how long after the core has let go of them.

The core drops a blob when the last frame that names it is gone. At that moment another client may
already have been told that the scheduler holds this blob, and its frame is on the way. So a
dropped blob stays for a while; when a frame names it after all, the core is told once more that
the blob is here.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from fanout.protocol import messages as m
from fanout.protocol.blob_store import KeptBlobStore

#: How long a dropped blob stays; offer and frame of a client are at most a slow network apart.
DROP_GRACE_S = 60.0


class BlobKeeper:
    """The blobs of one scheduler.

    Args:
        store: where they are.
    """

    def __init__(self, store: KeptBlobStore) -> None:
        self.store = store
        #: When each dropped blob is deleted; insertion order is the order in time.
        self._dropped: dict[bytes, float] = {}

    def sizes(self) -> dict[bytes, int]:
        """Of all that is here whole, by id."""
        return {blob_id: self.store.size(blob_id) for blob_id in self.store.ids()}

    def clean(self, wanted: Container[bytes]) -> None:
        """Delete what a life of the scheduler that has ended did not need, or did not finish."""
        self.store.remove_drafts()
        for blob_id in self.store.ids():
            if blob_id not in wanted:
                self.store.drop(blob_id)

    def drop(self, blob_id: bytes, now: float) -> None:
        """The core has let go of a blob."""
        self._dropped.pop(blob_id, None)
        self._dropped[blob_id] = now + DROP_GRACE_S

    def keep_offered(self, blob_id: bytes, now: float) -> None:
        """A peer offers a blob: were it dropped, the grace begins again."""
        if blob_id in self._dropped:
            self.drop(blob_id, now)

    @property
    def has_dropped(self) -> bool:
        return bool(self._dropped)

    def revive(self, message: m.Message) -> list[bytes]:
        """The dropped blobs that a received frame names; they are kept again."""
        # All inputs of a frame may name the same one.
        revived = list({blob_id for blob_id in named_by(message) if blob_id in self._dropped})
        for blob_id in revived:
            del self._dropped[blob_id]
        return [blob_id for blob_id in revived if self.store.has(blob_id)]

    def keep(self, blob_id: bytes) -> None:
        """The core is told that it is here, or that it is gone: it is not deleted later."""
        self._dropped.pop(blob_id, None)

    def expire(self, now: float) -> None:
        """Delete what was dropped long enough ago."""
        while self._dropped:
            blob_id, deadline = next(iter(self._dropped.items()))
            if deadline > now:
                return
            del self._dropped[blob_id]
            self.store.drop(blob_id)


def named_by(message: m.Message) -> Iterator[bytes]:
    """The ids of the blobs that a frame names."""
    for entry in getattr(message, "blobs", ()):
        if isinstance(entry, bytes):
            yield entry
        else:
            yield from entry[1]
