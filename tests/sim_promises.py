"""What must hold at every moment of a simulation, seen from outside the cores.

The scheduler's invariants (`check.py`) say whether its books agree with each other. Here its deeds
are compared with the world: what it acknowledges with what is on the disk, whom it gives up with
who was heard, what it leases with what runs, what it forgets with whose grace has not passed. Also
counts what late, duplicate and unknown messages the cores were given.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fanout.config import CLIENT_GRACE_S, WORKER_DEADLINE_S
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import (
    Disconnect,
    FrameReceived,
    PeerConnected,
    PeerId,
    PeerLost,
    Send,
)
from fanout_scheduler.core.state import Call, State
from fanout_scheduler.core.waiting import TURN, reason_of
from tests.sim_story import Broken

if TYPE_CHECKING:
    from tests.sim_world import World

EPSILON = 1e-6


#: What the scheduler notes of peers that lie or have a bug, and there are none here.
LIES = frozenset(
    {
        "acknowledgement for a spawned call",
        "items beyond the credit",
        "log text of an unknown container",
        "report that does not fit its lease",
        "report under somebody else's lease",
        "report without its blobs",
        "session id of somebody else",
    }
)


class Promises:
    """Told of every event before the core is, and of every command before it is carried out."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.on_event: dict[type[m.Message], Callable[[PeerId, Any], None]] = {
            m.LeaseOutputs: self._on_report,
            m.LeaseItems: self._on_items,
            m.ItemCredit: self._on_item_credit,
            m.OpenCall: self._on_open,
            m.Inputs: self._on_inputs,
            m.Ack: self._on_call_frame,
            m.SealCall: self._on_call_frame,
            m.CancelCall: self._on_call_frame,
            m.CallsFinished: self._on_calls_finished,
        }
        self.on_send: dict[type[m.Message], Callable[[PeerId, Any], None]] = {
            m.OutputsAck: self._check_acknowledged,
            m.InputsStored: self._check_stored,
            m.CallOpened: self._check_opened,
            m.Outputs: self._check_shown,
            m.Lease: self._check_lease,
            m.CancelLease: self._note_cancelled,
        }

    def on_new_life(self, core: Scheduler) -> None:
        self.core = core
        self.now = 0.0
        self.heard_at: dict[PeerId, float] = {}
        #: Values of durable calls that a worker reported and that are not acknowledged to it.
        self.reports: dict[PeerId, deque[tuple[int, bytes, int, int]]] = {}
        #: When a client was lost, and the attached calls it had.
        self.lost: dict[bytes, tuple[float, list[Call]]] = {}
        #: By the number of a call and index: items that are here, failures that count.
        self.item_counts: dict[tuple[int, int], int] = {}
        self.failures: Counter[tuple[int, int]] = Counter()
        self.granted: dict[int, PeerId] = {}
        self.cancelled: set[int] = set()

    def before(self, event: Any, now: float) -> None:
        self.now = now
        kind = type(event)
        if kind is FrameReceived:
            self.heard_at[event.peer_id] = now
            handler = self.on_event.get(type(event.message))
            if handler is not None:
                handler(event.peer_id, event.message)
        elif kind is PeerLost:
            self._on_peer_lost(event.peer_id)
        elif kind is PeerConnected and event.role == "client":
            self._on_client_back(event.session_id)

    def on_command(self, command: Any, now: float) -> None:
        self.now = now
        if type(command) is Send:
            handler = self.on_send.get(type(command.message))
            if handler is not None:
                handler(command.peer_id, command.message)
        elif type(command) is Disconnect and command.code == "silent":
            silent_s = now - self.heard_at.get(command.peer_id, 0.0)
            if silent_s < WORKER_DEADLINE_S - EPSILON:
                raise Broken(f"a worker was given up that had been heard {silent_s:g} s ago")

    def on_decided(self, state: State) -> None:
        """After a turn every call that stands still has a reason, and has had a look; and nobody
        was taken for a liar."""
        if lies := LIES & state.counts.keys():
            raise Broken(f"an honest peer was taken for a liar: {sorted(lies)}")
        for call in state.calls.values():
            reason = reason_of(call)
            first = call.function.ready[0][3] if call.function.ready else None
            if reason == TURN and first in (None, call):
                raise Broken(f"{call.call_id.hex()} waits for its turn, and it is its turn")

    # --- a lost client has its grace -------------------------------------------------------------

    def _on_peer_lost(self, peer_id: PeerId) -> None:
        self.reports.pop(peer_id, None)
        peer = self.core.state.peers.get(peer_id)
        if peer is None or peer.role != "client" or peer.session is None:
            return
        if peer.session.peer_id == peer_id:
            attached = [call for call in peer.session.calls.values() if not call.is_durable]
            self.lost[peer.session_id] = (self.now, attached)

    def _on_client_back(self, session_id: bytes) -> None:
        lost_at, calls = self.lost.pop(session_id, (0.0, []))
        if self.now - lost_at >= CLIENT_GRACE_S - EPSILON:
            return
        self.world.counts["client back within its grace"] += bool(calls)
        for call in calls:
            if call.call_id not in self.core.state.calls:
                raise Broken("a call was dropped within its client's grace", call.call_id)

    # --- calls and inputs ------------------------------------------------------------------------

    def _on_call_frame(self, peer_id: PeerId, message: Any) -> None:
        if message.call_id not in self.core.state.calls:
            self.world.counts[f"late or odd: {type(message).__name__} of an unknown call"] += 1

    def _on_calls_finished(self, peer_id: PeerId, message: m.CallsFinished) -> None:
        if any(call_id not in self.core.state.calls for call_id in message.call_ids):
            self.world.counts["late or odd: CallsFinished of an unknown call"] += 1

    def _on_open(self, peer_id: PeerId, message: m.OpenCall) -> None:
        if message.is_resumed:
            is_known = message.call_id in self.core.state.calls
            what = "a call that is known" if is_known else "a call that was forgotten"
            self.world.counts["submitted again: " + what] += 1

    def _on_inputs(self, peer_id: PeerId, message: m.Inputs) -> None:
        call = self.core.state.calls.get(message.call_id)
        if call is None:
            self._on_call_frame(peer_id, message)
            return
        missing = call.received.missing(message.start, message.start + len(message.lengths) // 4)
        if not missing:
            self.world.counts["late or odd: inputs that are here already"] += 1

    def _check_opened(self, peer_id: PeerId, message: m.CallOpened) -> None:
        call = self.core.state.calls.get(message.call_id)
        if call is None or not call.is_durable:
            return
        self._check_on_disk(message.call_id, message.present)

    def _check_stored(self, peer_id: PeerId, message: m.InputsStored) -> None:
        self._check_on_disk(message.call_id, message.stored)
        disk, call_id = self.world.disk, message.call_id
        if message.is_sealed and not (call_id in disk.opened and call_id in disk.sealed):
            raise Broken("a spawn was acknowledged that is not all on disk", message.call_id)

    def _check_on_disk(self, call_id: bytes, pairs: Any) -> None:
        on_disk = self.world.disk.inputs.get(call_id, IntervalSet())
        for start, count in pairs:
            if not on_disk.covers(start, start + count):
                raise Broken("inputs were acknowledged that are not on disk", call_id, start)

    # --- outputs ---------------------------------------------------------------------------------

    def _on_report(self, peer_id: PeerId, message: m.LeaseOutputs) -> None:
        state = self.core.state
        call = state.calls.get(message.call_id)
        if call is None:
            self.world.counts["late or odd: LeaseOutputs of an unknown call"] += 1
            return
        lease = state.leases.get(message.lease_id)
        if lease is None:
            self.world.counts["late or odd: report under a void lease"] += 1
        stop = message.start + len(message.statuses)
        if any(call.finished.common(message.start, stop)) or any(
            call.storing.common(message.start, stop)
        ):
            self.world.counts["late or odd: output that is here already"] += 1
        is_all_values = not any(message.statuses)
        if call.is_durable and is_all_values:
            reports = self.reports.setdefault(peer_id, deque())
            reports.append((message.sequence, message.call_id, message.start, stop))
        if is_all_values or lease is None or call.function.retries is None:
            return
        for position, status in enumerate(message.statuses):
            index = message.start + position
            if status == m.Status.ERROR and index in lease.open:
                self._count_failure(call, index)

    def _count_failure(self, call: Call, index: int) -> None:
        self.failures[call.number, index] += 1
        count = self.failures[call.number, index]
        assert call.function.retries is not None
        if count > call.function.retries[0] + 1:
            raise Broken(f"an input failed {count} times and is run again", call.call_id, index)

    def _check_acknowledged(self, peer_id: PeerId, message: m.OutputsAck) -> None:
        """An output of a spawned call is safe at its worker until it is on disk."""
        reports = self.reports.get(peer_id, deque())
        while reports and reports[0][0] <= message.sequence:
            _, call_id, start, stop = reports.popleft()
            call = self.core.state.calls.get(call_id)
            if call is None or call.failure is not None:
                continue
            on_disk = self.world.disk.outputs.get(call_id, IntervalSet())
            for low, high in call.received.common(start, stop):
                if not on_disk.covers(low, high):
                    raise Broken("an output was acknowledged before it was stored", call_id, low)

    def _check_shown(self, peer_id: PeerId, message: m.Outputs) -> None:
        call = self.core.state.calls.get(message.call_id)
        if call is None or not call.is_durable or call.failure is not None:
            return
        on_disk = self.world.disk.outputs.get(message.call_id, IntervalSet())
        if not on_disk.covers(message.start, message.start + len(message.statuses)):
            text = "an output of a spawned call was shown before it was stored"
            raise Broken(text, message.call_id, message.start)

    # --- generators ------------------------------------------------------------------------------

    def _on_items(self, peer_id: PeerId, message: m.LeaseItems) -> None:
        call = self.core.state.calls.get(message.call_id)
        if call is None or message.lease_id not in self.core.state.leases:
            self.world.counts["late or odd: items under a void lease"] += 1
            return
        key = call.number, message.index
        here = self.item_counts.get(key, 0)
        if message.number <= here:
            end = message.number + len(message.lengths) // 4
            self.item_counts[key] = max(here, end)

    def _on_item_credit(self, peer_id: PeerId, message: m.ItemCredit) -> None:
        call = self.core.state.calls.get(message.call_id)
        if call is None:
            self._on_call_frame(peer_id, message)
        elif call.session is self.core.state.peers[peer_id].session:
            key = call.number, message.index
            self.item_counts[key] = max(self.item_counts.get(key, 0), message.received)

    # --- leases ----------------------------------------------------------------------------------

    def _note_cancelled(self, peer_id: PeerId, message: m.CancelLease) -> None:
        self.cancelled.add(message.lease_id)

    def _check_lease(self, peer_id: PeerId, message: m.Lease) -> None:
        self.granted[message.lease_id] = peer_id
        stop = message.start + len(message.lengths) // 4
        call = self.core.state.calls.get(message.call_id)
        if call is None:
            return  # it ended later in this turn
        for worker in self.world.workers:
            link = worker.link
            if link is None or link.peer_id not in self.core.state.peers:
                continue
            for held in worker.state.leases.values():
                if (
                    held.call_id != message.call_id
                    or held.lease_id == message.lease_id
                    or self.granted.get(held.lease_id) != link.peer_id
                    or held.lease_id in self.cancelled
                    or call.function.is_concurrent
                ):
                    continue
                low, high = max(message.start, held.start + held.done), min(stop, held.stop)
                if low < high:
                    raise Broken("an input was leased that another has", message.call_id, low)
        if call.method.is_generator:
            here = self.item_counts.get((call.number, message.start), 0)
            if message.skip != here:
                text = f"a generator is told to skip {message.skip} items, and {here} are here"
                raise Broken(text, message.call_id, message.start)
            self.world.counts["generator run again behind its first items"] += here > 0
