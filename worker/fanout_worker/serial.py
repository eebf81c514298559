"""One input at a time: leases run in order, outputs come through the ring.

Outputs come in three ways: through the ring (`shared.py`), as frames when they are large, and by
the daemon's own hand when it had to kill the container in mid-input. Whatever the way, they are
told in the order of the lease's inputs.

Order on the channel. A container writes an input's log before its output, into the socket before
the ring. So a drain first notes how far the ring is written, then reads the socket and the pipes,
then the ring up to the noted entry: no output overtakes its log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m
from fanout_worker import channel as ch
from fanout_worker import outcome, shared
from fanout_worker.leases import Given, LeaseTable
from fanout_worker.ways import Process

logger = logging.getLogger("fanout.worker")

#: While outputs flow, the ring is read this often and the container need not ring the bell.
DRAIN_INTERVAL_S = 0.001
#: Between lowering a limit and asking how far the container is.
LIMIT_DELAY_S = 0.001


@dataclass(slots=True)
class _Stopping:
    """An input that was asked to stop."""

    slot: int
    index: int
    reason: int
    timer: asyncio.TimerHandle


class SerialWay:
    """See `ways.Way`."""

    def __init__(self, process: Process) -> None:
        self.recent = (b"", 0)
        self._process = process
        self._host = process.host
        self._memory = process.memory
        self._reader = shared.Reader(process.memory)
        self._leases = LeaseTable(process.memory)
        self._stopping: _Stopping | None = None
        self._is_polling = False
        self._last_progress: shared.Progress | None = None

    # --- orders ---

    @property
    def is_active(self) -> bool:
        return bool(self._leases)

    def started(self) -> None:
        """Leases are with the container already; it begins by itself."""

    def give(self, lease: m.Lease) -> None:
        self._leases.enqueue(lease)
        self.give_queued()

    def give_queued(self) -> None:
        """Hand over the leases that wait, as long as there is a free slot for them."""
        while self._leases.has_queued and not (self._process.is_over or self._process.is_broken):
            try:
                handed_out = self._leases.hand_out()
            except ProtocolError as error:
                self._process.distrust(error)
                return
            if handed_out is None:
                return
            self._write_lease(*handed_out)

    def _write_lease(self, given: Given, lease: m.Lease) -> None:
        self.recent = (lease.call_id, lease.start)
        header = ch.prefix(
            ch.LEASE, lease.lease_id, given.slot, lease.call_id, lease.start, lease.lengths,
            lease.blobs, lease.skip, lease.method, lease.credit, payload_size=len(lease.payload),
        )  # fmt: skip
        self._process.wire.write([header, lease.payload])

    def lower_limit(self, lease_id: int, keep: int, is_cancelled: bool) -> None:
        stop = self._leases.lower_queued(lease_id, keep)
        given = self._leases.find(lease_id)
        if given is None:
            self._host.events.lease_reclaimed(lease_id, stop or 0)
            return
        begun = self._begun(given)
        assert begun is not None, "a tentative input counts as begun here"
        limit = min(given.stop, begun + keep)
        if self._leases.has(given):
            self._memory.words[shared.LIMIT + given.slot] = limit
        # A moment for the container, which may have read the old limit just now.
        self._host.loop.call_later(LIMIT_DELAY_S, self._limit_lowered, given, limit, is_cancelled)

    def give_credit(self, lease_id: int, upto: int) -> None:
        self._leases.give_credit_queued(lease_id, upto)
        given = self._leases.find(lease_id)
        if given is None:
            return
        words = self._memory.words
        words[shared.CREDIT + given.slot] = max(upto, words[shared.CREDIT + given.slot])
        # Credit that was given before may be given again: it ends no wait.
        if given.is_waiting and upto > given.waits_upto:
            given.is_waiting = False
            self._process.wire.write([ch.CREDIT_FRAME])

    # --- the tick ---

    def tick(self) -> None:
        process = self._process
        if self._has_unread():
            process.drain()
        process.settle()
        if process.is_paused or process.is_over:
            return
        progress = self._memory.progress()
        if progress is None or progress.is_tentative or process.timeout_s is None:
            return
        given = self._leases.get(progress.slot)
        if given is None or given.is_waiting or self._stopping is not None:
            return
        if time.perf_counter_ns() - progress.since_ns > process.timeout_s * 1e9:
            # The clock may have been read for the input before; what counts is a steady place.
            again = self._memory.progress()
            if again == progress:
                self._ask_to_stop(given, progress.index, shared.REASON_TIMEOUT)

    def resumed(self, paused_ns: int) -> None:
        """The container holds its clock itself while it waits for us."""

    # --- what comes ---

    def head(self) -> int:
        return self._reader.head()

    def take(self, head: int) -> None:
        """Take the ring's entries below number `head`."""
        if head > self._reader.tail:
            self._process.release_text()
            for segment in self._reader.read(head):
                self._on_segment(segment, [])

    def drained(self) -> None:
        """While more is to come look again without a doorbell."""
        if self._leases and not self._is_polling:
            self._is_polling = True
            self._reader.set_polled(True)
            self._host.loop.call_later(DRAIN_INTERVAL_S, self._poll)

    def _has_unread(self) -> bool:
        return not self._process.is_paused and self._reader.head() != self._reader.tail

    def _poll(self) -> None:
        self._is_polling = False
        if self._process.is_over:
            return
        if self._has_unread():
            self._process.drain()
        if not self._is_polling and not self._process.is_over:
            self._reader.set_polled(False)
            # It may have written just before it could see that.
            if self._has_unread():
                self._process.drain()

    def on_frame(self, fields: list[Any], payload: bytes) -> None:
        if fields[0] == ch.OUTPUT:
            self._on_output_frame(fields, payload)
        elif fields[0] == ch.WAITS:
            self._on_waits(fields[1], fields[2])
        elif fields[0] != ch.BELL:
            raise ProtocolError(f"frame {fields[0]} of a container that runs one input at a time")

    def _on_waits(self, slot: int, upto: int) -> None:
        if upto > m.INDEX_MAX:
            raise ProtocolError(f"a generator waits for item {upto}; {m.INDEX_MAX} is the last")
        self.take(self._reader.head())
        given = self._leases.of_slot(slot)
        if self._memory.words[shared.CREDIT + slot] > upto:
            # Credit came while the question was on its way.
            self._process.wire.write([ch.CREDIT_FRAME])
            return
        given.is_waiting = True
        given.waits_upto = upto
        self._host.events.lease_waits(given.lease_id, upto)

    def _on_output_frame(self, fields: list[Any], payload: bytes) -> None:
        _, entry, slot, kind, index, number, status, duration_ns, drafts = fields
        self.take(entry)
        blob_ids = [self._process.adopt_draft(draft) for draft in drafts]
        if status > m.STATUS_MAX or kind not in (shared.KIND_OUTPUT, shared.KIND_ITEM):
            raise ProtocolError(f"an output with status {status} of kind {kind}")
        segment = shared.Segment(
            slot, kind, index, number, 1, duration_ns // 1000, len(payload).to_bytes(4, "little"),
            bytes([status]), payload,
        )  # fmt: skip
        self._on_segment(segment, [(0, blob_ids)] if blob_ids else [])

    def _on_segment(self, segment: shared.Segment, blobs: list[tuple[int, list[bytes]]]) -> None:
        given = self._leases.of_slot(segment.slot)
        if segment.kind == shared.KIND_ITEM:
            if segment.index != given.start + given.done or segment.number > m.INDEX_MAX:
                raise ProtocolError(f"items of input {segment.index}, which does not run")
            if max(segment.statuses) > m.Status.VALUE:
                raise ProtocolError(f"an item with status {max(segment.statuses)}")
            self._host.events.lease_items(
                given.lease_id, segment.index, segment.number, segment.lengths, blobs,
                segment.payload,
            )  # fmt: skip
            return
        end = segment.index + segment.count
        if segment.index != given.start + given.done or end > given.stop:
            raise ProtocolError(
                f"outputs {segment.index} to {end} of a lease that is at {given.start + given.done}"
            )
        if max(segment.statuses) > m.STATUS_MAX:
            raise ProtocolError(f"an output with status {max(segment.statuses)}")
        stopping = self._stopping
        if (
            stopping is not None
            and stopping.slot == segment.slot
            and segment.index <= stopping.index < end
        ):
            self._end_stopping(stopping)
            timeout_s = self._process.timeout_s
            stopped = (stopping.reason, timeout_s, given.call_id, stopping.index)
            segment, blobs = outcome.replaced(segment, *stopped), []
        given.done += segment.count
        self.recent = (given.call_id, end - 1)
        if given.start + given.done >= given.stop:
            self._leases.forget(given)
        self._host.events.lease_outputs(
            given.lease_id, segment.index, min(segment.busy_us, m.INDEX_MAX), segment.lengths,
            segment.statuses, blobs, segment.payload,
        )  # fmt: skip

    def current(self) -> tuple[bytes, int]:
        progress = self._memory.progress()
        given = self._leases.get(progress.slot) if progress is not None else None
        if given is not None and progress is not None:
            return given.call_id, progress.index
        return self.recent

    # --- limits ---

    def _begun(self, given: Given, is_final: bool = False) -> int | None:
        """Before which index all inputs of the lease were begun; None if that is being decided
        at this moment (only with `is_final`)."""
        progress = self._memory.progress()
        is_current = self._leases.has(given)
        if progress is not None and progress.slot == given.slot and is_current:
            if progress.is_tentative and is_final:
                return None
            return progress.index + 1
        # It runs nothing of this lease, so what was begun has an output in the ring.
        self._process.take_all()
        return given.start + given.done

    def _limit_lowered(self, given: Given, limit: int, is_cancelled: bool) -> None:
        if self._process.is_over:
            return
        begun = self._begun(given, is_final=True)
        if begun is None:
            # It was stopped between two instructions; it decides when it runs again.
            self._host.loop.call_later(
                LIMIT_DELAY_S, self._limit_lowered, given, limit, is_cancelled
            )
            return
        given.stop = max(min(given.stop, max(limit, begun)), given.start + given.done)
        is_running = begun > given.start + given.done
        if given.start + given.done >= given.stop:
            self._leases.forget(given)
        elif is_cancelled and is_running and self._stopping is None:
            self._ask_to_stop(given, begun - 1, shared.REASON_CANCELLED)
        self._host.events.lease_reclaimed(given.lease_id, given.stop)
        self._process.settle()
        self._host.changed()

    def _ask_to_stop(self, given: Given, index: int, reason: int) -> None:
        words = self._memory.words
        words[shared.CANCEL_REASON] = reason
        words[shared.CANCEL_TARGET] = shared.place(given.slot, index)
        logger.info(
            "= %r: input %d is asked to stop (%s)", self._process, index, outcome.REASONS[reason]
        )
        timer = self._host.loop.call_later(self._host.settings.kill_grace_s, self._lose_patience)
        self._stopping = _Stopping(given.slot, index, reason, timer)
        os.kill(self._process.pid, signal.SIGUSR1)

    def _end_stopping(self, stopping: _Stopping) -> None:
        stopping.timer.cancel()
        self._stopping = None
        self._memory.words[shared.CANCEL_TARGET] = 0

    def _lose_patience(self) -> None:
        """The input did not stop by itself."""
        if self._process.is_over:
            return
        self._process.take_all()
        self._host.changed()
        if self._stopping is not None:
            self._process.kill_for(self._stopping.reason)

    # --- the end ---

    def close(self) -> None:
        if self._stopping is not None:
            self._stopping.timer.cancel()
        self._last_progress = self._memory.progress()

    def running(self) -> list[tuple[int, int]]:
        """What ran when the process died; only after `close`."""
        progress = self._last_progress
        given = self._leases.get(progress.slot) if progress is not None else None
        if (
            given is not None
            and progress is not None
            and not progress.is_tentative
            and given.start + given.done <= progress.index < given.stop
        ):
            return [(given.lease_id, progress.index)]
        return []

    def end_killed(self) -> None:
        stopping = self._stopping
        given = self._leases.get(stopping.slot) if stopping is not None else None
        if stopping is None or given is None or given.start + given.done != stopping.index:
            return
        reason, index, timeout_s = stopping.reason, stopping.index, self._process.timeout_s
        payload = outcome.stopped_payload(reason, timeout_s, given.call_id, index)
        progress = self._last_progress
        began_ns = progress.since_ns if progress is not None else time.perf_counter_ns()
        given.done += 1
        self._host.events.lease_outputs(
            given.lease_id, index, max(0, time.perf_counter_ns() - began_ns) // 1000,
            len(payload).to_bytes(4, "little"), bytes([m.Status.FAILURE]), [], payload,
        )  # fmt: skip
