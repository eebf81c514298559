"""What a container's process and the way its leases run need of each other.

There are two ways: one input at a time, through shared memory (`serial.py`), and several at a
time, through messages alone (`concurrent.py`). The process is the same for both
(`container.py`): its start, its channel, its logs, its death.
"""

from __future__ import annotations

from typing import Any, Protocol

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m
from fanout_worker import shared
from fanout_worker.host import Host
from fanout_worker.wire import Wire


class Process(Protocol):
    """The container, as a way of running sees it."""

    host: Host
    memory: shared.SharedMemory
    wire: Wire
    pid: int
    #: After so long an input is stopped; None: never.
    timeout_s: float | None
    is_started: bool
    #: Nothing more is to be read, for good or for a while.
    is_over: bool
    is_paused: bool

    @property
    def is_broken(self) -> bool:
        """It sent what no container sends, and is about to end."""

    def drain(self) -> None:
        """Take what there is, and do what follows from it."""

    def take_all(self) -> None:
        """Take what there is, and nothing else."""

    def release_text(self) -> None:
        """What it has printed so far is to leave before what is told next."""

    def settle(self) -> None:
        """Leases may have ended."""

    def distrust(self, error: ProtocolError) -> None:
        """It sent what no container sends."""

    def kill_for(self, reason: int) -> None:
        """An input did not stop by itself; `shared.REASON_...`."""

    def adopt_draft(self, draft: Any) -> bytes:
        """Make a blob of a file that the container wrote; returns its id."""


class Way(Protocol):
    """How leases run. Facts go to `Host.events` at once."""

    #: The last call and input that ran, for text on raw descriptors.
    recent: tuple[bytes, int]

    @property
    def is_active(self) -> bool:
        """There is a lease."""

    def started(self) -> None:
        """The user's code is loaded."""

    def give(self, lease: m.Lease) -> None: ...

    def give_queued(self) -> None:
        """Hand over leases that had to wait, if they need not any more."""

    def lower_limit(self, lease_id: int, keep: int, is_cancelled: bool) -> None: ...

    def give_credit(self, lease_id: int, upto: int) -> None: ...

    def head(self) -> int:
        """How far it has written; asked before its channel is read."""

    def take(self, head: int) -> None:
        """Take what was written up to there; its channel was read meanwhile."""

    def on_frame(self, fields: list[Any], payload: bytes) -> None:
        """A frame that the process itself does not understand.

        Raises:
            ProtocolError: nor do we.
        """

    def drained(self) -> None:
        """Everything was read."""

    def tick(self) -> None:
        """Look for what was missed, and for inputs that run too long."""

    def resumed(self, paused_ns: int) -> None:
        """The container was not read for so long, and is again."""

    def current(self) -> tuple[bytes, int]:
        """Call and input that run, as far as one can tell."""

    def running(self) -> list[tuple[int, int]]:
        """(lease id, index) of the inputs that run, or ran when the process died."""

    def end_killed(self) -> None:
        """The container was killed for inputs that did not stop: make their outputs."""

    def close(self) -> None:
        """The process is gone, and its memory is about to be."""
