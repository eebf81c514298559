"""One container, seen from the daemon: its process, its memory, its socket and its leases.

Outputs come in three ways: through the ring (`shared.py`), as frames when they are large, and by
the daemon's own hand when it had to kill the container in mid-input. Whatever the way, they are
told in the order of the lease's inputs.

Order on the channel. A container writes an input's log before its output, into the socket before
the ring. So a drain first notes how far the ring is written, then reads the socket and the pipes,
then the ring up to the noted entry: no output overtakes its log.

The process runs user code, so nothing that comes from it is believed: a frame or an entry that
does not fit its lease ends the container, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanout.definition import unpack_definition
from fanout.exceptions import ContainerStartError, ProtocolError
from fanout.protocol import messages as m
from fanout.remote_errors import encode_error
from fanout_worker import channel as ch
from fanout_worker import outcome, process, resources, shared
from fanout_worker.environment import Launch, plan_launch, start_info
from fanout_worker.host import Host
from fanout_worker.leases import Given, LeaseTable
from fanout_worker.logs import LogMeter
from fanout_worker.pipes import Pipes
from fanout_worker.wire import Wire

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


class Container:
    """Give it leases with `give`; it tells `Host.events` what comes of them."""

    def __init__(self, host: Host, message: m.DefineFunction, container_id: int) -> None:
        """Nothing is started yet: await `start`.

        Args:
            message: the function's definition, as the client sent it.
            container_id: the scheduler's number for it.
        """
        self.container_id = container_id
        #: 0 until the process is there, and again when it was waited for.
        self.pid = 0
        self.is_started = False
        #: By which the container proves who it is when it makes nested calls.
        self.secret = os.urandom(32)
        self._host = host
        self._message = message
        self._timeout_s: float | None = message.options.get("timeout")
        self._leave_grace_s = host.settings.kill_grace_s
        if message.options.get("methods") is not None:
            self._leave_grace_s = max(self._leave_grace_s, host.settings.exit_grace_s)
        self._memory = shared.SharedMemory.create()
        self._reader = shared.Reader(self._memory)
        try:
            self._wire = Wire(host.loop, self._drain)
        except OSError:
            self._memory.close()
            raise
        self._pipes = Pipes(host.loop, self._on_raw_text)
        self._pidfd = -1
        self._leases = LeaseTable(self._memory)
        self._start_timer: asyncio.TimerHandle | None = None
        self._leave_timer: asyncio.TimerHandle | None = None
        #: The last call and input that ran, for text on raw descriptors.
        self._recent = (b"", 0)
        self._stopping: _Stopping | None = None
        self._meter = LogMeter(host.loop.time())
        self._start_order_at = host.loop.time()
        self._start_failure = b""
        self._killed_for = 0
        self._oom_kill_count = resources.oom_kill_count()
        self._fault = ""
        self._is_stop_ordered = False
        self._is_kill_ordered = False
        self._is_paused = False
        self._is_polling = False
        self._is_over = False
        self._ended = asyncio.Event()
        host.containers[container_id] = self

    def __repr__(self) -> str:
        return f"<Container {self.container_id} of {self._message.name}, pid {self.pid}>"

    # --- orders ---

    async def start(self) -> None:
        """Fork the process and have it load the user's code. Failures are told as an exit."""
        pid = 0
        try:
            launch = await plan_launch(
                unpack_definition(self._message.payload), self._host.settings
            )
            pid = await self._fork(launch)
            if self._is_kill_ordered:
                os.kill(pid, signal.SIGKILL)
            self._attach(pid)
            # Leases and a stop may have been ordered meanwhile; they come behind it.
            info = start_info(launch, self._host.settings, self._message)
            info |= {"container_id": self.container_id, "secret": self.secret}
            payload = self._message.payload
            self._wire.open([ch.prefix(ch.START, info, payload_size=len(payload)), payload])
        except Exception as error:
            # Whatever it is, somebody waits to be told.
            if not self._is_over:
                self._end_unstarted(error, pid)
            return
        self._host.changed()

    def give(self, lease: m.Lease) -> None:
        """Have it run a lease, after those that it has."""
        self._leases.enqueue(lease)
        self._give_queued()
        self._host.activate()

    def _give_queued(self) -> None:
        """Hand over the leases that wait, as long as there is a free slot for them."""
        while not self._is_over and not self._fault:
            try:
                handed_out = self._leases.hand_out()
            except ProtocolError as error:
                self._distrust(error)
                return
            if handed_out is None:
                return
            self._write_lease(*handed_out)

    def _write_lease(self, given: Given, lease: m.Lease) -> None:
        self._recent = (lease.call_id, lease.start)
        header = ch.prefix(
            ch.LEASE, lease.lease_id, given.slot, lease.call_id, lease.start, lease.lengths,
            lease.blobs, lease.skip, lease.method, payload_size=len(lease.payload),
        )  # fmt: skip
        self._wire.write([header, lease.payload])

    def lower_limit(self, lease_id: int, keep: int, is_cancelled: bool) -> None:
        """Let the lease begin at most `keep` more inputs; `lease_reclaimed` says what came of it.

        Args:
            lease_id: one that was given.
            keep: how many of the inputs that have not begun may.
            is_cancelled: stop the one that runs, too.
        """
        if self._is_over:
            return
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
        """Let the lease's generator give items below `upto`."""
        self._leases.give_credit_queued(lease_id, upto)
        given = self._leases.find(lease_id)
        if given is None or self._is_over:
            return
        words = self._memory.words
        words[shared.CREDIT + given.slot] = max(upto, words[shared.CREDIT + given.slot])
        # Credit that was given before may be given again: it ends no wait.
        if given.is_waiting and upto > given.waits_upto:
            given.is_waiting = False
            self._wire.write([ch.CREDIT_FRAME])

    def stop(self, kill: bool) -> None:
        """Have it leave when its leases are done; at once if `kill`."""
        self._is_stop_ordered = True
        if kill:
            self._is_kill_ordered = True
            self._kill()
        else:
            self._wire.write([ch.STOP_FRAME])
            self._settle()

    async def wait_ended(self) -> None:
        """Until its exit was told."""
        await self._ended.wait()

    def set_paused(self, is_paused: bool) -> None:
        """Read nothing for a while: the container waits before its next input when its ring is
        full."""
        if is_paused == self._is_paused or self._is_over:
            return
        self._is_paused = is_paused
        self._wire.set_paused(is_paused)
        if not is_paused and self.pid:
            self._drain()

    # --- the tick ---

    @property
    def is_active(self) -> bool:
        """It has a lease."""
        return bool(self._leases)

    def tick(self) -> None:
        """Look for what the doorbell missed, and for an input that runs too long."""
        if self._is_over:
            return
        if not self._is_paused and self._reader.head() != self._reader.tail:
            self._drain()
        self._settle()
        if self._is_paused or self._is_over:
            return
        progress = self._memory.progress()
        if progress is None or progress.is_tentative or self._timeout_s is None:
            return
        given = self._leases.get(progress.slot)
        if given is None or given.is_waiting or self._stopping is not None:
            return
        if time.perf_counter_ns() - progress.since_ns > self._timeout_s * 1e9:
            # The clock may have been read for the input before; what counts is a steady place.
            again = self._memory.progress()
            if again == progress:
                self._ask_to_stop(given, progress.index, shared.REASON_TIMEOUT)

    # --- start ---

    async def _fork(self, launch: Launch) -> int:
        writers: list[int] = []
        try:
            writers = self._pipes.open()
            descriptors = [self._wire.theirs.fileno(), self._memory.fd, *writers]
            return await self._host.launcher.fork(
                launch.interpreter, self.container_id, descriptors
            )
        finally:
            self._wire.theirs.close()
            for descriptor in writers:
                os.close(descriptor)

    def _attach(self, pid: int) -> None:
        self.pid = pid
        self._host.watch(pid)
        loop = self._host.loop
        self._pidfd = os.pidfd_open(pid)
        loop.add_reader(self._pidfd, self._on_death)
        self._pipes.watch()
        limit = outcome.start_limit(self._message.options)
        if limit is not None:
            self._start_timer = loop.call_later(limit[0], self._end_start, limit[1])
        logger.debug("= %r forked", self)

    def _end_start(self, text: str) -> None:
        """It has not loaded the user's code in time."""
        self._take_all()
        if not self.is_started and not self._is_over and not self._start_failure:
            self._start_failure = encode_error(ContainerStartError(text))
            self._kill()

    def _end_unstarted(self, error: Exception, pid: int) -> None:
        """There is no process that could be used, and another attempt would fare no better."""
        if not isinstance(error, ContainerStartError | OSError):
            logger.warning("%r cannot start", self, exc_info=error)
        self.pid = 0
        self._release()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._host.unwatch(pid)
            self._host.bury(pid)
        is_told = isinstance(error, ContainerStartError)
        shown = error if is_told else ContainerStartError(f"no container can start: {error}")
        reason = "stopped" if self._is_stop_ordered else "start"
        self._host.events.container_exited(
            self.container_id, reason, [], {"text": str(shown)}, encode_error(shown)
        )
        self._ended.set()
        self._host.changed()

    # --- the channel, in ---

    def _drain(self) -> None:
        """Take what there is, and while more is to come look again without a doorbell."""
        if self._is_over:
            return
        self._take_all()
        self._settle()
        self._host.changed()
        if self._leases and not self._is_polling and not self._is_over:
            self._is_polling = True
            self._reader.set_polled(True)
            self._host.loop.call_later(DRAIN_INTERVAL_S, self._poll)

    def _has_unread(self) -> bool:
        return not self._is_paused and self._reader.head() != self._reader.tail

    def _poll(self) -> None:
        self._is_polling = False
        if self._is_over:
            return
        if self._has_unread():
            self._drain()
        if not self._is_polling and not self._is_over:
            self._reader.set_polled(False)
            # It may have written just before it could see that.
            if self._has_unread():
                self._drain()

    def _settle(self) -> None:
        """Leases may have ended: others may follow them, or the container leave."""
        self._give_queued()
        if self._is_stop_ordered and not self.is_active and self._leave_timer is None:
            # It leaves by itself, unless something of the user's keeps it.
            self._leave_timer = self._host.loop.call_later(self._leave_grace_s, self._hurry)

    def _hurry(self) -> None:
        self._leave_timer = None
        if not self._is_over and not self.is_active:
            logger.info("= %r was told to leave and did not", self)
            self._is_kill_ordered = True
            self._kill()

    def _cancel_start_timer(self) -> None:
        if self._start_timer is not None:
            self._start_timer.cancel()

    def _take_all(self) -> None:
        """Read everything that is there, also while paused: the callers have to know it."""
        if self._is_over or self._fault:
            return
        try:
            head = self._reader.head()
            for header, payload in self._wire.read():
                self._on_frame(ch.parse_checked(header), payload)
            self._pipes.read_all()
            if head > self._reader.tail:
                self._consume(head)
        except ProtocolError as error:
            self._distrust(error)

    def _on_frame(self, fields: list[Any], payload: bytes) -> None:
        kind = fields[0]
        if kind == ch.LOG:
            self._on_log(fields[1], fields[2], fields[3], payload)
        elif kind == ch.OUTPUT:
            self._on_output_frame(fields, payload)
        elif kind == ch.WAITS:
            self._on_waits(fields[1], fields[2])
        elif kind == ch.STARTED and not self.is_started:
            self.is_started = True
            self._cancel_start_timer()
            start_time_s = self._host.loop.time() - self._start_order_at
            self._host.events.container_started(self.container_id, self.pid, start_time_s)
        elif kind == ch.START_FAILED:
            self._start_failure = payload

    def _on_waits(self, slot: int, upto: int) -> None:
        if upto > m.INDEX_MAX:
            raise ProtocolError(f"a generator waits for item {upto}; {m.INDEX_MAX} is the last")
        self._consume(self._reader.head())
        given = self._leases.of_slot(slot)
        if self._memory.words[shared.CREDIT + slot] > upto:
            # Credit came while the question was on its way.
            self._wire.write([ch.CREDIT_FRAME])
            return
        given.is_waiting = True
        given.waits_upto = upto
        self._host.events.lease_waits(given.lease_id, upto)

    def _on_output_frame(self, fields: list[Any], payload: bytes) -> None:
        _, entry, slot, kind, index, number, status, duration_ns, drafts = fields
        self._consume(entry)
        blob_ids = [self._adopt_draft(draft) for draft in drafts]
        if status > max(m.Status) or kind not in (shared.KIND_OUTPUT, shared.KIND_ITEM):
            raise ProtocolError(f"an output with status {status} of kind {kind}")
        segment = shared.Segment(
            slot, kind, index, number, 1, duration_ns // 1000, len(payload).to_bytes(4, "little"),
            bytes([status]), payload,
        )  # fmt: skip
        self._on_segment(segment, [(0, blob_ids)] if blob_ids else [])

    def _adopt_draft(self, draft: Any) -> bytes:
        """Make a blob of the file that the container wrote for a large buffer."""
        match draft:
            case [bytes() as blob_id, str() as name] if len(blob_id) == 32:
                folder = Path(self._host.settings.blob_folder)
                if name.startswith(f"{blob_id.hex()}.{self.pid}-") and "/" not in name:
                    with contextlib.suppress(OSError):
                        os.rename(folder / name, folder / blob_id.hex())
                        return blob_id
        raise ProtocolError(f"a blob of an output is not there: {draft!r:.200}")

    def _consume(self, upto: int) -> None:
        """Take the ring's entries below number `upto`."""
        if upto > self._reader.tail:
            for segment in self._reader.read(upto):
                self._on_segment(segment, [])

    def _on_segment(self, segment: shared.Segment, blobs: list[tuple[int, list[bytes]]]) -> None:
        given = self._leases.of_slot(segment.slot)
        if segment.kind == shared.KIND_ITEM:
            if segment.index != given.start + given.done or segment.number > m.INDEX_MAX:
                raise ProtocolError(f"items of input {segment.index}, which does not run")
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
            stopped = (stopping.reason, self._timeout_s, given.call_id, stopping.index)
            segment, blobs = outcome.replaced(segment, *stopped), []
        given.done += segment.count
        self._recent = (given.call_id, end - 1)
        if given.start + given.done >= given.stop:
            self._leases.forget(given)
        self._host.events.lease_outputs(
            given.lease_id, segment.index, min(segment.busy_us, m.INDEX_MAX), segment.lengths,
            segment.statuses, blobs, segment.payload,
        )  # fmt: skip

    # --- logs ---

    def _on_log(self, source: int, call_id: bytes, index: int, payload: bytes) -> None:
        if source not in (m.Source.STDOUT, m.Source.STDERR) or len(call_id) not in (0, 16):
            raise ProtocolError("a log line that names no stream or no call")
        if not self._meter.admits(len(payload), self._host.loop.time()):
            return
        self._tell_dropped(call_id, index)
        index = min(index, m.INDEX_MAX)
        self._host.events.log(m.ContainerLog(self.container_id, call_id, index, source, payload))

    def _tell_dropped(self, call_id: bytes, index: int) -> None:
        notice = self._meter.take_notice()
        if notice:
            self._host.events.log(
                m.ContainerLog(self.container_id, call_id, index, m.Source.SYSTEM, notice)
            )

    def _on_raw_text(self, source: int, data: bytes) -> None:
        """Text on a raw descriptor: from C code, or a process that user code started."""
        call_id, index = self._recent
        progress = self._memory.progress()
        given = self._leases.get(progress.slot) if progress is not None else None
        if given is not None and progress is not None:
            call_id, index = given.call_id, progress.index
        self._on_log(source, call_id, index, data)
        self._host.changed()

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
        self._take_all()
        return given.start + given.done

    def _limit_lowered(self, given: Given, limit: int, is_cancelled: bool) -> None:
        if self._is_over:
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
        self._settle()
        self._host.changed()

    def _ask_to_stop(self, given: Given, index: int, reason: int) -> None:
        words = self._memory.words
        words[shared.CANCEL_REASON] = reason
        words[shared.CANCEL_TARGET] = shared.place(given.slot, index)
        logger.info("= %r: input %d is asked to stop (%s)", self, index, outcome.REASONS[reason])
        timer = self._host.loop.call_later(self._host.settings.kill_grace_s, self._lose_patience)
        self._stopping = _Stopping(given.slot, index, reason, timer)
        os.kill(self.pid, signal.SIGUSR1)

    def _end_stopping(self, stopping: _Stopping) -> None:
        stopping.timer.cancel()
        self._stopping = None
        self._memory.words[shared.CANCEL_TARGET] = 0

    def _lose_patience(self) -> None:
        """The input did not stop by itself."""
        if self._is_over:
            return
        self._take_all()
        self._host.changed()
        if self._stopping is not None:
            self._killed_for = self._stopping.reason
            self._kill()

    def _kill(self) -> None:
        if self.pid:
            process.kill_group(self.pid)

    def _distrust(self, error: ProtocolError) -> None:
        """It sent what no container sends, so nothing more of it is used."""
        logger.warning("%r sent nonsense: %s", self, error)
        self._fault = f"the container sent nonsense ({error}); did code write to its descriptors?"
        self._is_paused = True
        self._wire.set_paused(True)
        self._kill()

    # --- the end ---

    def _on_death(self) -> None:
        self._take_all()
        pid, self.pid = self.pid, 0
        # While it has not been waited for, its number is its own, and its group's.
        self._host.unwatch(pid)
        process.kill_group(pid)
        status, peak_memory_kib = None, 0
        with contextlib.suppress(ChildProcessError):
            _, status, usage = os.wait4(pid, 0)
            peak_memory_kib = usage.ru_maxrss
        name, is_started = self._message.name, self.is_started
        details = outcome.exit_details(status, peak_memory_kib, name, is_started)
        self._release()
        self._host.bury(pid)
        self._remove_drafts(pid)
        reason, running = self._judge(details)
        self._tell_dropped(*self._recent)
        self._host.events.container_exited(
            self.container_id, reason, running, details, self._start_failure
        )
        self._ended.set()
        self._host.changed()

    def _judge(self, details: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Reason and running inputs of the exit. Makes the output of an input that was killed."""
        progress = self._memory_at_death
        running: list[tuple[int, int]] = []
        given = self._leases.get(progress.slot) if progress is not None else None
        if (
            given is not None
            and progress is not None
            and not progress.is_tentative
            and given.start + given.done <= progress.index < given.stop
        ):
            running = [(given.lease_id, progress.index)]
        if self._start_failure:
            details["text"] = "the user's code could not be loaded"
            return "start", []
        if self._killed_for:
            self._make_output()
            return outcome.REASONS[self._killed_for], []
        if self._is_kill_ordered or (self._is_stop_ordered and not running):
            return "stopped", []
        if self._fault:
            details["text"] = self._fault
        elif details["signal"] == "SIGKILL":
            outcome.explain_kill(details, self._message.options, self._oom_kill_count)
        if not self.is_started:
            return "start", []
        return "crash", running

    def _make_output(self) -> None:
        """The output of the input for which the container was killed."""
        stopping = self._stopping
        given = self._leases.get(stopping.slot) if stopping is not None else None
        if stopping is None or given is None or given.start + given.done != stopping.index:
            return
        reason, index = stopping.reason, stopping.index
        payload = outcome.stopped_payload(reason, self._timeout_s, given.call_id, index)
        progress = self._memory_at_death
        began_ns = progress.since_ns if progress is not None else time.perf_counter_ns()
        given.done += 1
        self._host.events.lease_outputs(
            given.lease_id, index, max(0, time.perf_counter_ns() - began_ns) // 1000,
            len(payload).to_bytes(4, "little"), bytes([m.Status.FAILURE]), [], payload,
        )  # fmt: skip

    def _release(self) -> None:
        """Give back all that the container had of the daemon's."""
        self._is_over = True
        if self._stopping is not None:
            self._stopping.timer.cancel()
        if self._leave_timer is not None:
            self._leave_timer.cancel()
        self._cancel_start_timer()
        self._memory_at_death = self._memory.progress()
        loop = self._host.loop
        self._wire.close()
        self._pipes.close()
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._memory.close()
        self._host.containers.pop(self.container_id, None)

    def _remove_drafts(self, pid: int) -> None:
        for path in Path(self._host.settings.blob_folder).glob(f"*.{pid}-*.part"):
            path.unlink(missing_ok=True)
