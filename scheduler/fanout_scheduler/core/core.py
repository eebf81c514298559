"""The scheduler's core: five synchronous methods, no socket, no clock, no randomness.

::

    handle(event, now)     take one fact; never raises for what a peer did
    decide(now)            place work once for all that changed; the orders, in order
    next_deadline()        when something must be decided without any event
    check()                assert every invariant
    snapshot()             plain data for people

The shell feeds every frame it has read in a turn of its loop and asks once, so batches grow by
themselves under load. State is a function of the (event, now) pairs: the simulator replays any
run from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop
from typing import Any

from fanout.config import SPAWNED_SIZE_BYTES_MAX
from fanout.protocol import messages as m
from fanout_scheduler.core import (
    advice,
    blobs,
    calls,
    damage,
    durable,
    graph,
    leasing,
    objects,
    outputs,
    placement,
    progress,
    restore,
    scaling,
    workers,
)
from fanout_scheduler.core import check as invariants
from fanout_scheduler.core.events import (
    BlobCompleted,
    BlobLost,
    BlobRefused,
    Command,
    Disconnect,
    Event,
    FrameReceived,
    PeerConnected,
    PeerHeard,
    PeerLost,
    PeerWritable,
    Record,
    Stored,
    StoreFailed,
    TimePassed,
)
from fanout_scheduler.core.snapshot import snapshot
from fanout_scheduler.core.state import Call, Peer, State

#: Messages of clients that name a call, and what handles them.
CALL_MESSAGES: dict[type[m.Message], Callable[[State, Call, Any], None]] = {
    m.SealCall: calls.on_seal_call,
    m.Ack: calls.on_ack,
    m.ItemCredit: outputs.on_item_credit,
}

#: Messages that need to know who sent them.
PEER_MESSAGES: dict[type[m.Message], Callable[[State, Peer, Any], None]] = {
    m.OpenApp: calls.on_open_app,
    m.CloseApp: calls.on_close_app,
    m.DefineFunction: workers.on_define_function,
    m.OpenCall: calls.on_open_call,
    m.SubmitCall: calls.on_submit_call,
    m.FetchOutputs: calls.on_fetch_outputs,
    m.StopFetch: calls.on_stop_fetch,
    m.AskFunction: scaling.on_ask_function,
    m.CallsFinished: calls.on_calls_finished,
    m.AskCall: calls.on_ask_call,
    m.AskCallGraph: graph.on_ask_call_graph,
    m.AskStatus: calls.on_ask_status,
    m.AskShutdown: calls.on_ask_shutdown,
    m.WatchProgress: progress.on_watch,
    m.WorkerReady: workers.on_worker_ready,
    m.ContainerStarted: workers.on_container_started,
    m.ContainerExited: workers.on_container_exited,
    m.CpuTimes: advice.on_cpu_times,
    m.ContainerLog: calls.container_log,
    **objects.OBJECT_MESSAGES,
}

#: Messages of workers and nested clients about leases.
LEASE_MESSAGES: dict[type[m.Message], Callable[[State, Any, Any], None]] = {
    m.LeaseOutputs: outputs.on_lease_outputs,
    m.LeaseItems: outputs.on_lease_items,
    m.Reclaimed: leasing.on_reclaimed,
    m.LeaseWaits: leasing.on_lease_waits,
    m.SessionWaits: leasing.on_session_waits,
    m.SessionRuns: leasing.on_session_runs,
}


#: They name blobs that must be here.
_REPORTS = (m.LeaseOutputs, m.LeaseItems)


class Scheduler:
    """See the module's docstring.

    Args:
        epoch: the number of this life; it only grows.
        spawned_bytes_max: how much memory spawned calls may take; see spawned.py.
    """

    def __init__(self, epoch: int, spawned_bytes_max: int = SPAWNED_SIZE_BYTES_MAX) -> None:
        self.state = State(epoch, spawned_bytes_max=spawned_bytes_max)

    def restore(
        self,
        records: Iterable[Record],
        now: float,
        wall_time_s: float = 0.0,
        present: dict[bytes, int] | None = None,
    ) -> None:
        """Take what the store kept, before any event.

        Args:
            wall_time_s: seconds since 1970.
            present: the sizes of the blobs that are here, by id. What needs another one fails. None
                if that is not known yet: then `BlobCompleted` tells of each.
        """
        self.state.now = self.state.started_at = now
        self.state.wall_offset_s = wall_time_s - now
        restore.restore(self.state, records, present)

    def handle(self, event: Event, now: float) -> None:
        """Take one fact. Frames of peers that are gone are ignored."""
        state = self.state
        state.now = now
        kind = type(event)
        if kind is FrameReceived:
            self._handle_frame(event)  # type: ignore[arg-type]
        elif kind is TimePassed:
            self._fire_deadlines()
        elif isinstance(event, PeerConnected):
            self._on_peer_connected(event)
        elif isinstance(event, PeerLost):
            self._on_peer_lost(event)
        elif isinstance(event, PeerHeard):
            peer = state.peers.get(event.peer_id)
            if peer is not None and peer.worker is not None:
                peer.worker.heard_at = now
        elif isinstance(event, PeerWritable):
            peer = state.peers.get(event.peer_id)
            if peer is not None:
                peer.is_writable = event.is_writable
                if peer.is_writable and peer.session is not None:
                    calls.tell_lost_text(state, peer.session)
        elif isinstance(event, Stored):
            durable.on_stored(state, event.sequence)
            workers.acknowledge_stored(self.state)
        elif isinstance(event, StoreFailed):
            durable.on_store_failed(state, event.sequence, event.text)
        elif isinstance(event, BlobRefused):
            blobs.on_refused(state, event.blob_id, event.text)
        elif isinstance(event, BlobCompleted):
            peer = None if event.peer_id is None else state.peers.get(event.peer_id)
            blobs.on_completed(state, event.blob_id, event.size_bytes, peer)
        elif isinstance(event, BlobLost):
            damage.on_blob_lost(state, event.blob_id, event.peer_id)

    def decide(self, now: float) -> list[Command]:
        """Everything that can be decided now, as orders to be carried out in this order."""
        state = self.state
        state.now = now
        if state.deadlines and state.deadlines[0][0] <= now:
            self._fire_deadlines()
        placement.place(state)
        if state.scaled:
            placement.scale(state)
        workers.acknowledge(state)
        commands, state.commands = state.commands, []
        return commands

    def next_deadline(self) -> float | None:
        deadlines = self.state.deadlines
        return deadlines[0][0] if deadlines else None

    def check(self) -> None:
        """Raise AssertionError, naming the invariant of scheduler/README.md, if one is broken."""
        invariants.check(self.state)

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.state)

    @property
    def open_call_count(self) -> int:
        """How many calls are not over."""
        return sum(app.open_count for app in self.state.apps.values())

    def has_blob(self, blob_id: bytes) -> bool:
        """Whether a blob is here and was not let go of."""
        return blob_id in self.state.present_blobs

    # --- events -----------------------------------------------------------------------------------

    def _on_peer_connected(self, event: PeerConnected) -> None:
        state = self.state
        peer = Peer(event.peer_id, event.role, event.session_id, event.info)
        state.peers[event.peer_id] = peer
        if event.role == "worker":
            return
        container = None
        if event.role == "nested":
            container = workers.container_of_nested(state, peer)
            if container is None:
                # Perhaps one that is held for a client that is not back yet (`workers._hold`). It
                # comes again after a moment, and must not believe that it is heard meanwhile.
                state.note("nested client of an unknown container")
                self._refuse(peer, "the container of this session is not known at its worker")
                return
        session = state.sessions.get(event.session_id)
        if session is not None and session.container is not container:
            state.note("session id of somebody else")
            self._refuse(peer, "its session id is that of another client")
            return
        calls.on_client_connected(state, peer, container)

    def _refuse(self, peer: Peer, text: str) -> None:
        del self.state.peers[peer.peer_id]
        self.state.commands.append(Disconnect(peer.peer_id, "refused", text))

    def _on_peer_lost(self, event: PeerLost) -> None:
        peer = self.state.peers.pop(event.peer_id, None)
        if peer is None:
            return
        if peer.role == "worker":
            workers.on_worker_lost(self.state, event.peer_id, peer)
        else:
            calls.on_client_lost(self.state, peer, event.is_final)

    def _handle_frame(self, event: FrameReceived) -> None:
        state = self.state
        peer = state.peers.get(event.peer_id)
        if peer is None:
            return
        message = event.message
        kind = type(message)
        if peer.role == "worker":
            if peer.worker is not None:
                peer.worker.heard_at = state.now
            elif kind is not m.WorkerReady:
                return
        if (about_lease := LEASE_MESSAGES.get(kind)) is not None:
            if isinstance(message, _REPORTS) and message.blobs:
                self._take_large_report(peer, message)
            else:
                about_lease(state, event.peer_id, message)
        elif (of_peer := PEER_MESSAGES.get(kind)) is not None:
            of_peer(state, peer, message)
        else:
            self._handle_call_frame(peer, message)

    def _take_large_report(self, peer: Peer, message: m.LeaseOutputs | m.LeaseItems) -> None:
        """A report that names blobs. Its worker has seen to it that they are here."""
        state, worker = self.state, peer.worker
        if worker is None:
            return
        ids = blobs.ids(message.blobs)
        if not all(blob_id in state.present_blobs for blob_id in ids):
            # It thinks that they are, and would do so for ever. It comes again, offers them again,
            # and repeats all that was not acknowledged, this report included.
            state.note("report without its blobs")
            text = "a report names large values that are not here"
            state.commands.append(Disconnect(peer.peer_id, "blobs", text))
            self._on_peer_lost(PeerLost(peer.peer_id, text))
            return
        LEASE_MESSAGES[type(message)](state, peer.peer_id, message)
        blobs.end_claims(state, worker, ids)

    def _handle_call_frame(self, peer: Peer, message: Any) -> None:
        state = self.state
        call_id = getattr(message, "call_id", None)
        if call_id is None:
            return
        call = state.calls.get(call_id)
        if call is None:
            state.note("message for an unknown call")
            return
        kind = type(message)
        if kind is m.CancelCall or kind is m.TerminateCall:
            # A spawned call may be cancelled by whoever knows its id.
            if call.is_durable or call.session is peer.session:
                end = calls.cancel_call if kind is m.CancelCall else calls.terminate_call
                end(state, call)
            return
        if call.session is not peer.session:
            state.note("message for another session's call")
        elif kind is m.Inputs:
            calls.on_inputs(state, peer, call, message)
        else:
            CALL_MESSAGES[kind](state, call, message)

    # --- deadlines --------------------------------------------------------------------------------

    def _fire_deadlines(self) -> None:
        state = self.state
        while state.deadlines and state.deadlines[0][0] <= state.now:
            _, _, kind, what = heappop(state.deadlines)
            if kind == "retry":
                outputs.on_retry_due(state, *what)
            elif kind == "idle":
                workers.on_idle_deadline(state, what)
            elif kind == "session":
                calls.on_session_deadline(state, what)
            elif kind == "worker":
                workers.on_worker_deadline(state, what)
            elif kind == "unclaimed":
                workers.on_unclaimed_deadline(state, what)
            elif kind == "store":
                durable.on_store_retry(state, what)
            elif kind == "forget":
                calls.forget_call(state, what)
            elif kind == "progress":
                progress.on_due(state, what)
            elif kind == "unopened":
                calls.on_unopened_deadline(state, what)
            elif kind == "unnamed":
                blobs.on_unnamed_deadline(state, what)
            elif kind == "unsealed":
                calls.on_unsealed_deadline(state, what)
            elif kind in objects.DEADLINES:
                objects.DEADLINES[kind](state, what)
            else:
                # Nothing to do but to decide again.
                assert kind == "look", kind
