"""The items of one generator as the client counts them: what has come, what was consumed, what the
generator may send. Sans-IO."""

from __future__ import annotations

from dataclasses import dataclass, field

from fanout.client.chunk import Batch, ItemBatch
from fanout.config import ITEM_CREDIT_INITIAL

#: What a generator may send ahead of its consumer at most; it begins with
#: `config.ITEM_CREDIT_INITIAL`.
ITEM_CREDIT_MAX = 1024
ITEM_CREDIT_BYTES = 1 << 20


@dataclass(slots=True)
class ItemStream:
    """One generator input of a call."""

    window: int = ITEM_CREDIT_INITIAL
    granted: int = ITEM_CREDIT_INITIAL
    received: int = 0
    received_bytes: int = 0
    consumed: int = 0
    #: Items that wait for their turn in an ordered call.
    held: list[ItemBatch] = field(default_factory=list)
    end: Batch | None = None
    #: How many items there are in all, once its end says so.
    total: int = 0

    def consume(self, count: int) -> bool:
        """The user has used up so many items. Returns whether more credit is due: `granted` has
        grown then. The window doubles while it is used up, as far as items are small."""
        self.consumed += count
        if self.end is not None or self.consumed + self.window // 2 < self.granted:
            return False
        mean_size = max(1, self.received_bytes // self.received)
        limit = max(1, min(ITEM_CREDIT_MAX, ITEM_CREDIT_BYTES // mean_size))
        self.window = min(self.window * 2, limit)
        granted = self.consumed + self.window
        if granted <= self.granted:
            return False
        self.granted = granted
        return True
