"""The leases of one container, as its daemon keeps them, and the slots that they have.

A lease is *queued* until there is a slot for it, then *given*. A slot is taken until the container
has passed its lease, which the container counts in shared memory (`shared.ENDED`), and until all
outputs that the lease was to have are read here. The container passes leases in the order in which
it got them, so slots are used in turn and a count says which of them are free.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m
from fanout_worker import shared


@dataclass(slots=True)
class Given:
    """A lease of the container. `stop` only falls."""

    lease_id: int
    call_id: bytes
    start: int
    stop: int
    #: -1 while it is queued.
    slot: int = -1
    done: int = 0
    #: Its generator waits for items from `waits_upto` on to be allowed.
    is_waiting: bool = False
    waits_upto: int = 0


class LeaseTable:
    """Which leases a container has, and which slots."""

    def __init__(self, memory: shared.SharedMemory) -> None:
        self._memory = memory
        self._by_slot: dict[int, Given] = {}
        self._queue: deque[tuple[Given, m.Lease]] = deque()
        self._given_count = 0

    def __bool__(self) -> bool:
        return bool(self._by_slot or self._queue)

    @property
    def has_queued(self) -> bool:
        """Whether a lease waits for a slot."""
        return bool(self._queue)

    def enqueue(self, lease: m.Lease) -> None:
        """A lease that is to be run after the others."""
        stop = lease.start + len(lease.lengths) // 4
        self._queue.append((Given(lease.lease_id, lease.call_id, lease.start, stop), lease))

    def hand_out(self) -> tuple[Given, m.Lease] | None:
        """Give the next queued lease a slot, and the slot's words their values. None if there is
        no lease or no slot; in the latter case the container will ring when it has passed one.

        Raises:
            ProtocolError: the container says that it passed more leases than it got.
        """
        words = self._memory.words
        if not self._queue:
            return None
        slot = self._given_count % shared.SLOTS
        passed = words[shared.ENDED]
        if passed > self._given_count:
            raise ProtocolError(f"{passed} leases were passed of {self._given_count}")
        if self._given_count - passed >= shared.SLOTS or slot in self._by_slot:
            words[shared.IS_AWAITED] = 1
            return None
        given, lease = self._queue.popleft()
        assert slot not in self._by_slot, f"lease slot {slot} is taken"
        self._given_count += 1
        self._by_slot[slot] = given
        given.slot = slot
        # Less than the lease holds, if some of it was taken back while it was queued.
        words[shared.LIMIT + slot] = given.stop
        words[shared.CREDIT + slot] = lease.credit
        words[shared.IS_AWAITED] = bool(self._queue)
        return given, lease

    def lower_queued(self, lease_id: int, keep: int) -> int | None:
        """Cut a queued lease to its first `keep` inputs. Returns where it stops now; None if no
        queued lease has this id."""
        for entry in self._queue:
            given = entry[0]
            if given.lease_id == lease_id:
                given.stop = min(given.stop, given.start + keep)
                if given.stop == given.start:
                    self._queue.remove(entry)
                return given.stop
        return None

    def give_credit_queued(self, lease_id: int, upto: int) -> None:
        """Credit for a queued lease; nothing happens if no queued lease has this id."""
        for given, lease in self._queue:
            if given.lease_id == lease_id:
                lease.credit = max(lease.credit, upto)

    def find(self, lease_id: int) -> Given | None:
        """The given lease with this id."""
        return next((g for g in self._by_slot.values() if g.lease_id == lease_id), None)

    def get(self, slot: int) -> Given | None:
        """The given lease in this slot."""
        return self._by_slot.get(slot)

    def of_slot(self, slot: int) -> Given:
        """The given lease in a slot that the container named.

        Raises:
            ProtocolError: there is none.
        """
        given = self._by_slot.get(slot)
        if given is None:
            raise ProtocolError(f"something of lease slot {slot}, which is empty")
        return given

    def has(self, given: Given) -> bool:
        """Whether more is to come of a given lease."""
        return self._by_slot.get(given.slot) is given

    def forget(self, given: Given) -> None:
        """Nothing more is to come of a given lease. Harmless to repeat."""
        if self.has(given):
            del self._by_slot[given.slot]
