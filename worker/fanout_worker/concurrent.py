"""Several inputs at a time: every input of every lease begins as soon as the container has it.

There is no order among inputs and so nothing to share but messages: leases go in, and `BEGUN` and
`OUTPUTS` come back in the order in which things happened. What has begun cannot be given back, so
a reclaim takes nothing, and a cancelled lease has each of its inputs asked to stop. In batches
inputs begin when their batch runs; till then their time does not pass.

When one does not stop, the container is killed: those that were asked to stop end with that as
their output, the others go back to the scheduler uncharged.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m
from fanout_worker import channel as ch
from fanout_worker import outcome, shared
from fanout_worker.ways import Process

logger = logging.getLogger("fanout.worker")


@dataclass(slots=True)
class _Input:
    """An input without an output."""

    lease_id: int
    index: int
    #: 0 until it has begun.
    since_ns: int = 0
    #: Why it was asked to stop (`shared.REASON_...`), and until when it may go on once it runs.
    reason: int = 0
    timer: asyncio.TimerHandle | None = None
    #: Since when its generator waits for credit, and for items from which number on; 0: it runs.
    waits_since_ns: int = 0
    waits_upto: int = 0


@dataclass(slots=True)
class _Given:
    lease_id: int
    call_id: bytes
    stop: int
    credit: int
    inputs: dict[int, _Input] = field(default_factory=dict)


@dataclass(slots=True)
class _Outputs:
    """Outputs of consecutive inputs of a lease, to be told as one."""

    lease_id: int
    start: int
    busy_us: int = 0
    lengths: list[int] = field(default_factory=list)
    statuses: bytearray = field(default_factory=bytearray)
    blobs: list[tuple[int, list[bytes]]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)


class ConcurrentWay:
    """See `ways.Way`."""

    def __init__(self, process: Process) -> None:
        self.recent = (b"", 0)
        self._process = process
        self._host = process.host
        #: Leases that came before the container was ready.
        self._queue: deque[m.Lease] = deque()
        self._leases: dict[int, _Given] = {}
        #: No input can be over its time before this.
        self._due_ns = 0
        #: When the container was last read again after a pause.
        self._resumed_ns = 0
        #: A generator has waited for credit.
        self._has_waits = False

    # --- orders ---

    @property
    def is_active(self) -> bool:
        return bool(self._leases or self._queue)

    def started(self) -> None:
        self.give_queued()

    def give(self, lease: m.Lease) -> None:
        self._queue.append(lease)
        self.give_queued()

    def give_queued(self) -> None:
        if not self._process.is_started or self._process.is_over:
            return
        while self._queue:
            self._write(self._queue.popleft())

    def _write(self, lease: m.Lease) -> None:
        stop = lease.start + len(lease.lengths) // 4
        given = _Given(lease.lease_id, lease.call_id, stop, lease.credit)
        for index in range(lease.start, stop):
            given.inputs[index] = _Input(lease.lease_id, index)
        self._leases[lease.lease_id] = given
        self.recent = (lease.call_id, lease.start)
        header = ch.prefix(
            ch.LEASE, lease.lease_id, 0, lease.call_id, lease.start, lease.lengths, lease.blobs,
            lease.skip, lease.method, lease.credit, payload_size=len(lease.payload),
        )  # fmt: skip
        self._process.wire.write([header, lease.payload])

    def lower_limit(self, lease_id: int, keep: int, is_cancelled: bool) -> None:
        for lease in self._queue:
            if lease.lease_id == lease_id and keep == 0:
                # It is not even ready, so this costs nobody anything.
                self._queue.remove(lease)
                self._host.events.lease_reclaimed(lease_id, lease.start)
                self._process.settle()
                return
            if lease.lease_id == lease_id:
                self._host.events.lease_reclaimed(lease_id, lease.start + len(lease.lengths) // 4)
                return
        given = self._leases.get(lease_id)
        if given is None:
            self._host.events.lease_reclaimed(lease_id, 0)
            return
        if is_cancelled:
            for running in list(given.inputs.values()):
                self._ask_to_stop(running, shared.REASON_CANCELLED)
        self._host.events.lease_reclaimed(lease_id, given.stop)

    def give_credit(self, lease_id: int, upto: int) -> None:
        for lease in self._queue:
            if lease.lease_id == lease_id:
                lease.credit = max(lease.credit, upto)
        given = self._leases.get(lease_id)
        if given is None or upto <= given.credit:
            return
        given.credit = upto
        # One that waited may be due before all that did not.
        self._due_ns = 0
        now_ns = time.perf_counter_ns()
        for running in given.inputs.values():
            if running.waits_since_ns and upto > running.waits_upto:
                # The wait was not its own, so its time stood still.
                running.since_ns += now_ns - running.waits_since_ns
                running.waits_since_ns = 0
        self._process.wire.write([ch.prefix(ch.ITEM_CREDIT, lease_id, upto)])

    # --- time ---

    def tick(self) -> None:
        self._process.settle()
        timeout_s = self._process.timeout_s
        if timeout_s is None or self._process.is_paused or self._process.is_over:
            return
        now_ns, timeout_ns = time.perf_counter_ns(), int(timeout_s * 1e9)
        if now_ns < self._due_ns:
            return
        # Whatever begins later is due later than this.
        due_ns = now_ns + timeout_ns
        for given in self._leases.values():
            for running in given.inputs.values():
                if not running.since_ns or running.waits_since_ns or running.reason:
                    continue
                if now_ns > running.since_ns + timeout_ns:
                    self._ask_to_stop(running, shared.REASON_TIMEOUT)
                else:
                    due_ns = min(due_ns, running.since_ns + timeout_ns)
        self._due_ns = due_ns

    def resumed(self, paused_ns: int) -> None:
        """The container could not hand over what it had: that is nobody's time."""
        self._resumed_ns = time.perf_counter_ns()
        for given in self._leases.values():
            for running in given.inputs.values():
                if running.since_ns and not running.waits_since_ns:
                    running.since_ns += paused_ns

    def _ask_to_stop(self, running: _Input, reason: int) -> None:
        if running.reason:
            return
        running.reason = reason
        if running.since_ns:
            self._arm(running)
        logger.info(
            "= %r: input %d is asked to stop (%s)",
            self._process, running.index, outcome.REASONS[reason],
        )  # fmt: skip
        frame = ch.prefix(ch.STOP_INPUT, running.lease_id, running.index, reason)
        self._process.wire.write([frame])

    def _arm(self, running: _Input) -> None:
        """Its code has so long to stop. What has not begun has none, and is not to cost the
        others theirs: it waits for its batch, or behind code that holds up the loop."""
        running.timer = self._host.loop.call_later(
            self._host.settings.kill_grace_s, self._lose_patience, running
        )

    def _lose_patience(self, running: _Input) -> None:
        """The input did not stop by itself."""
        if self._process.is_over:
            return
        self._process.take_all()
        self._host.changed()
        given = self._leases.get(running.lease_id)
        if given is not None and running.index in given.inputs:
            self._process.kill_for(running.reason)

    # --- what comes ---

    def head(self) -> int:
        return 0

    def take(self, head: int) -> None:
        """There is no ring."""

    def drained(self) -> None:
        """Whatever comes makes the channel readable."""

    def on_frame(self, fields: list[Any], payload: bytes) -> None:
        match fields[0]:
            case ch.BEGUN:
                self._on_begun(fields[1], ch.check_ranges(fields[2]))
            case ch.OUTPUTS:
                self._on_outputs(ch.check_entries(fields[1]), payload)
            case ch.ITEM_WAITS:
                self._on_waits(*fields[1:])
            case kind:
                raise ProtocolError(f"frame {kind} of a container that runs several inputs")

    def _find(self, lease_id: int, index: int) -> tuple[_Given, _Input]:
        given = self._leases.get(lease_id)
        running = given.inputs.get(index) if given is not None else None
        if given is None or running is None:
            raise ProtocolError(
                f"something of input {index} of lease {lease_id}, which does not run"
            )
        return given, running

    def _on_begun(self, since_ns: int, ranges: list[tuple[int, int, int]]) -> None:
        # One that began in a pause is heard of only now.
        since_ns = max(min(since_ns, time.perf_counter_ns()), self._resumed_ns)
        for lease_id, start, count in ranges:
            if count > m.CHUNK_INPUTS_MAX:
                raise ProtocolError(f"{count} inputs began at once")
            for index in range(start, start + count):
                given, running = self._find(lease_id, index)
                running.since_ns = since_ns
                if running.reason:
                    self._arm(running)
                self.recent = (given.call_id, index)

    def _on_waits(self, lease_id: int, index: int, upto: int) -> None:
        given, running = self._find(lease_id, index)
        if upto > m.INDEX_MAX:
            raise ProtocolError(f"a generator waits for item {upto}; {m.INDEX_MAX} is the last")
        if given.credit > upto:
            # Credit is on its way.
            return
        running.waits_since_ns = time.perf_counter_ns()
        running.waits_upto = upto
        self._has_waits = True
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        """The container gives its core away when all that runs in it waits for credit."""
        waiting: _Input | None = None
        for given in self._leases.values():
            for running in given.inputs.values():
                if not running.waits_since_ns:
                    return
                waiting = running
        if waiting is not None:
            self._host.events.lease_waits(waiting.lease_id, waiting.waits_upto)

    def _on_outputs(self, entries: list[Any], payload: bytes) -> None:
        position = 0
        outputs: _Outputs | None = None
        for lease_id, kind, index, number, status, duration_ns, length, drafts in entries:
            given, running = self._find(lease_id, index)
            end = position + length
            if end > len(payload) or status > m.STATUS_MAX or number > m.INDEX_MAX:
                raise ProtocolError(f"an output with status {status} and {length} bytes")
            blob_ids = [self._process.adopt_draft(draft) for draft in drafts]
            value = payload[position:end]
            position = end
            if kind == shared.KIND_ITEM:
                if status != m.Status.VALUE:
                    raise ProtocolError(f"an item with status {status}")
                self._host.events.lease_items(
                    lease_id, index, number, length.to_bytes(4, "little"),
                    [(0, blob_ids)] if blob_ids else [], value,
                )  # fmt: skip
                continue
            if outputs is None or (outputs.lease_id, outputs.start + len(outputs.lengths)) != (
                lease_id,
                index,
            ):
                self._tell(outputs)
                outputs = _Outputs(lease_id, index)
            self._add(outputs, given.call_id, running, (status, value, blob_ids), duration_ns)
            self._end(given, running)
        self._tell(outputs)
        if self._has_waits:
            # One that ran has ended; those that are left may all wait.
            self._tell_waiting()

    def _add(
        self,
        outputs: _Outputs,
        call_id: bytes,
        running: _Input,
        output: tuple[int, bytes, list[bytes]],
        duration_ns: int,
    ) -> None:
        status, value, blob_ids = output
        if running.reason:
            # Whatever the code made of it: an input that ran over its time has not succeeded.
            status, blob_ids = m.Status.FAILURE, []
            value = outcome.stopped_payload(
                running.reason, self._process.timeout_s, call_id, running.index
            )
        if blob_ids:
            outputs.blobs.append((len(outputs.lengths), blob_ids))
        outputs.lengths.append(len(value))
        outputs.statuses.append(status)
        outputs.parts.append(value)
        outputs.busy_us += duration_ns // 1000

    def _end(self, given: _Given, running: _Input) -> None:
        if running.timer is not None:
            running.timer.cancel()
        self.recent = (given.call_id, running.index)
        del given.inputs[running.index]
        if not given.inputs:
            del self._leases[given.lease_id]

    def _tell(self, outputs: _Outputs | None) -> None:
        if outputs is not None:
            self._host.events.lease_outputs(
                outputs.lease_id, outputs.start, min(outputs.busy_us, m.INDEX_MAX),
                b"".join(length.to_bytes(4, "little") for length in outputs.lengths),
                bytes(outputs.statuses), outputs.blobs, b"".join(outputs.parts),
            )  # fmt: skip

    def current(self) -> tuple[bytes, int]:
        """Nobody can tell which of several inputs wrote to a raw descriptor."""
        running = self.running()
        if len(running) == 1:
            lease_id, index = running[0]
            return self._leases[lease_id].call_id, index
        return (b"", 0) if running else self.recent

    # --- the end ---

    def running(self) -> list[tuple[int, int]]:
        running = (
            (running.lease_id, running.index)
            for given in self._leases.values()
            for running in given.inputs.values()
            if running.since_ns
        )
        # More than a message can name go back as if they had not begun.
        return list(itertools.islice(running, m.LIST_LENGTH_MAX))

    def end_killed(self) -> None:
        now_ns = time.perf_counter_ns()
        for given in list(self._leases.values()):
            for running in list(given.inputs.values()):
                if running.reason:
                    outputs = _Outputs(given.lease_id, running.index)
                    duration_ns = now_ns - running.since_ns if running.since_ns else 0
                    nothing: tuple[int, bytes, list[bytes]] = (m.Status.FAILURE, b"", [])
                    self._add(outputs, given.call_id, running, nothing, max(0, duration_ns))
                    self._end(given, running)
                    self._tell(outputs)

    def close(self) -> None:
        for given in self._leases.values():
            for running in given.inputs.values():
                if running.timer is not None:
                    running.timer.cancel()
