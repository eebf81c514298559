"""One container, seen from the daemon: its process, its memory, its socket, its logs, its death.

How its leases run is for `serial.py` or `concurrent.py` to know; see `ways.py`.

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
from pathlib import Path
from typing import Any

from fanout.definition import unpack_definition
from fanout.exceptions import ContainerStartError, ProtocolError
from fanout.protocol import messages as m
from fanout.remote_errors import encode_error
from fanout_worker import channel as ch
from fanout_worker import outcome, process, resources, shared
from fanout_worker.concurrent import ConcurrentWay
from fanout_worker.environment import Launch, plan_launch, start_info
from fanout_worker.host import Host
from fanout_worker.logs import NOTICE_DELAY_S, NOTICE_RATE, LogJoiner, LogMeter, Writer
from fanout_worker.pipes import Pipes
from fanout_worker.serial import SerialWay
from fanout_worker.ways import Way
from fanout_worker.wire import Wire

logger = logging.getLogger("fanout.worker")


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
        self.host = host
        self._message = message
        self.timeout_s: float | None = message.options.get("timeout")
        self._leave_grace_s = host.settings.kill_grace_s
        if message.options.get("methods") is not None:
            self._leave_grace_s = max(self._leave_grace_s, host.settings.exit_grace_s)
        self.memory = shared.SharedMemory.create(host.leftovers.mark_of(container_id))
        try:
            self.wire = Wire(host.loop, self.drain)
        except OSError:
            self.memory.close()
            raise
        self._pipes = Pipes(host.loop, self._on_raw_text)
        self._pidfd = -1
        self._way: Way = ConcurrentWay(self) if ch.runs_many(message.options) else SerialWay(self)
        self._start_timer: asyncio.TimerHandle | None = None
        self._leave_timer: asyncio.TimerHandle | None = None
        self._meter = LogMeter(host.loop.time())
        self._joiner = LogJoiner(self._emit_text)
        self._text_timer: asyncio.TimerHandle | None = None
        self._notice_timer: asyncio.TimerHandle | None = None
        #: Call and input of the last text that was dropped.
        self._dropped_of = (b"", 0)
        self._start_order_at = host.loop.time()
        self._start_failure = b""
        self._killed_for = 0
        self._oom_kill_count = resources.oom_kill_count()
        self._fault = ""
        self._paused_ns = 0
        self._is_stop_ordered = False
        self._is_kill_ordered = False
        self.is_paused = False
        self.is_over = False
        self._ended = asyncio.Event()
        host.containers[container_id] = self

    def __repr__(self) -> str:
        return f"<Container {self.container_id} of {self._message.name}, pid {self.pid}>"

    # --- orders ---

    async def start(self) -> None:
        """Fork the process and have it load the user's code. Failures are told as an exit."""
        pid = 0
        try:
            self.host.guard()
            launch = await plan_launch(unpack_definition(self._message.payload), self.host.settings)
            pid = await self._fork(launch)
            if self._is_kill_ordered:
                os.kill(pid, signal.SIGKILL)
            self._attach(pid)
            # Leases and a stop may have been ordered meanwhile; they come behind it.
            info = start_info(launch, self.host.settings, self._message)
            info |= {"container_id": self.container_id, "secret": self.secret}
            info |= {"mark": self.host.leftovers.mark_of(self.container_id)}
            payload = self._message.payload
            self.wire.open([ch.prefix(ch.START, info, payload_size=len(payload)), payload])
        except Exception as error:
            # Whatever it is, somebody waits to be told.
            if not self.is_over:
                self._end_unstarted(error, pid)
            return
        self.host.changed()

    def give(self, lease: m.Lease) -> None:
        """Have it run a lease, after or beside those that it has."""
        self._way.give(lease)
        self.host.activate()

    def lower_limit(self, lease_id: int, keep: int, is_cancelled: bool) -> None:
        """Let the lease begin at most `keep` more inputs; `lease_reclaimed` says what came of it.

        Args:
            lease_id: one that was given.
            keep: how many of the inputs that have not begun may.
            is_cancelled: stop those that run, too.
        """
        if not self.is_over:
            self._way.lower_limit(lease_id, keep, is_cancelled)

    def give_credit(self, lease_id: int, upto: int) -> None:
        """Let the lease's generator give items below `upto`."""
        if not self.is_over:
            self._way.give_credit(lease_id, upto)

    def stop(self, kill: bool) -> None:
        """Have it leave when its leases are done; at once if `kill`."""
        self._is_stop_ordered = True
        if kill:
            self._is_kill_ordered = True
            self._kill()
        else:
            self._tell_to_stop()
            self.settle()

    def _tell_to_stop(self) -> None:
        """Behind its leases, some of which may not have been written before it has started."""
        if self.is_started:
            self.wire.write([ch.STOP_FRAME])

    async def wait_ended(self) -> None:
        """Until its exit was told."""
        await self._ended.wait()

    def set_paused(self, is_paused: bool) -> None:
        """Read nothing for a while: the container waits before its next input when its ring is
        full."""
        if is_paused == self.is_paused or self.is_over:
            return
        self.is_paused = is_paused
        self.wire.set_paused(is_paused)
        if is_paused:
            self._paused_ns = time.perf_counter_ns()
            return
        self._way.resumed(time.perf_counter_ns() - self._paused_ns)
        if self.pid:
            self.drain()

    # --- the tick ---

    @property
    def is_active(self) -> bool:
        """It has a lease."""
        return self._way.is_active

    def tick(self) -> None:
        """Look for what the doorbell missed, and for an input that runs too long."""
        if not self.is_over:
            self._way.tick()

    # --- start ---

    async def _fork(self, launch: Launch) -> int:
        writers: list[int] = []
        try:
            writers = self._pipes.open()
            descriptors = [self.wire.theirs.fileno(), self.memory.fd, *writers]
            return await self.host.launcher.fork(launch.interpreter, self.container_id, descriptors)
        finally:
            self.wire.theirs.close()
            for descriptor in writers:
                os.close(descriptor)

    def _attach(self, pid: int) -> None:
        self.pid = pid
        self.host.watch(pid)
        loop = self.host.loop
        self._pidfd = os.pidfd_open(pid)
        loop.add_reader(self._pidfd, self._on_death)
        self._pipes.watch()
        limit = outcome.start_limit(self._message.options)
        if limit is not None:
            self._start_timer = loop.call_later(limit[0], self._end_start, limit[1])
        logger.debug("= %r forked", self)

    def _end_start(self, text: str) -> None:
        """It has not loaded the user's code in time."""
        self.take_all()
        if not self.is_started and not self.is_over and not self._start_failure:
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
            self.host.unwatch(pid)
            self.host.bury(pid, self.container_id)
        is_told = isinstance(error, ContainerStartError)
        shown = error if is_told else ContainerStartError(f"no container can start: {error}")
        reason = "stopped" if self._is_stop_ordered else "start"
        self.host.events.container_exited(
            self.container_id, reason, [], {"text": str(shown)}, encode_error(shown)
        )
        self._ended.set()
        self.host.changed()

    # --- the channel, in ---

    def drain(self) -> None:
        """Take what there is, and do what follows from it."""
        if self.is_over:
            return
        self.take_all()
        self.settle()
        self.host.changed()
        if not self.is_over:
            self._way.drained()

    def settle(self) -> None:
        """Leases may have ended: others may follow them, or the container leave."""
        self._way.give_queued()
        if self._is_stop_ordered and not self.is_active and self._leave_timer is None:
            # It leaves by itself, unless something of the user's keeps it.
            self._leave_timer = self.host.loop.call_later(self._leave_grace_s, self._hurry)

    def _hurry(self) -> None:
        self._leave_timer = None
        if not self.is_over and not self.is_active:
            logger.info("= %r was told to leave and did not", self)
            self._is_kill_ordered = True
            self._kill()

    def take_all(self) -> None:
        """Read everything that is there, also while paused: the callers have to know it."""
        if self.is_over or self._fault:
            return
        try:
            head = self._way.head()
            for header, payload in self.wire.read():
                self._on_frame(ch.parse_checked(header), payload)
            self._pipes.read_all()
            self._way.take(head)
        except ProtocolError as error:
            self.distrust(error)

    def _on_frame(self, fields: list[Any], payload: bytes) -> None:
        kind = fields[0]
        if kind == ch.LOG:
            self._on_log(fields[1], fields[2], fields[3], payload)
            return
        if kind != ch.BELL:
            self.release_text()
        if kind == ch.STARTED and not self.is_started:
            self.is_started = True
            _cancel(self._start_timer)
            start_time_s = self.host.loop.time() - self._start_order_at
            self.host.events.container_started(self.container_id, self.pid, start_time_s)
            self._way.started()
            if self._is_stop_ordered:
                self._tell_to_stop()
        elif kind == ch.START_FAILED:
            self._start_failure = payload
        else:
            self._way.on_frame(fields, payload)

    def adopt_draft(self, draft: Any) -> bytes:
        """Make a blob of the file that the container wrote for a large buffer."""
        match draft:
            case [bytes() as blob_id, str() as name] if len(blob_id) == 32:
                folder = Path(self.host.settings.blob_folder)
                if name.startswith(f"{blob_id.hex()}.{self.pid}-") and "/" not in name:
                    with contextlib.suppress(OSError):
                        os.rename(folder / name, folder / blob_id.hex())
                        return blob_id
        raise ProtocolError(f"a blob of an output is not there: {draft!r:.200}")

    # --- logs ---

    def _on_log(self, source: int, call_id: bytes, index: int, payload: bytes) -> None:
        if source not in (m.Source.STDOUT, m.Source.STDERR) or len(call_id) not in (0, 16):
            raise ProtocolError("a log line that names no stream or no call")
        index = min(index, m.INDEX_MAX)
        if self._meter.admits(len(payload), self.host.loop.time()):
            self._tell_dropped(is_due=True)
            self._add_text((source, call_id, index), payload)
        else:
            self._dropped_of = call_id, index
            if self._notice_timer is None:
                self._tell_dropped_in(NOTICE_DELAY_S)

    def _tell_dropped(self, is_due: bool) -> None:
        notice = self._meter.take_notice(self.host.loop.time(), is_due)
        if notice:
            _cancel(self._notice_timer)
            self._notice_timer = None
            self._joiner.release(self.host.loop.time())
            self._emit_text((m.Source.SYSTEM, *self._dropped_of), notice)

    def _add_text(self, writer: Writer, data: bytes) -> None:
        loop = self.host.loop
        due = self._joiner.add(writer, data, loop.time())
        if due is None:
            _cancel(self._text_timer)
            self._text_timer = None
        elif self._text_timer is None:
            self._text_timer = loop.call_at(due, self._on_text_due)

    def _on_text_due(self) -> None:
        self._text_timer = None
        self._joiner.release(self.host.loop.time())
        self.host.changed()

    def release_text(self) -> None:
        """Let text that waits for more of it go before what is told next, and say what was
        dropped: whoever gets the output may be about to leave."""
        loop = self.host.loop
        self._joiner.release(loop.time())
        if self._meter.has_dropped:
            self._tell_dropped(is_due=False)
            if self._meter.has_dropped:
                self._tell_dropped_in(1 / NOTICE_RATE)

    def _tell_dropped_in(self, delay_s: float) -> None:
        if self.is_over:
            # Its exit tells.
            return
        due = self.host.loop.time() + delay_s
        if self._notice_timer is None or due < self._notice_timer.when():
            _cancel(self._notice_timer)
            self._notice_timer = self.host.loop.call_at(due, self._on_notice_due)

    def _on_notice_due(self) -> None:
        self._notice_timer = None
        self._tell_dropped(is_due=True)
        self.host.changed()

    def _emit_text(self, writer: Writer, data: bytes) -> None:
        source, call_id, index = writer
        self.host.events.log(m.ContainerLog(self.container_id, call_id, index, source, data))

    def _on_raw_text(self, source: int, data: bytes) -> None:
        """Text on a raw descriptor: from C code, or a process that user code started."""
        call_id, index = self._way.current()
        self._on_log(source, call_id, index, data)
        self.host.changed()

    def kill_for(self, reason: int) -> None:
        """An input did not stop by itself: the process ends, with this as its reason."""
        self._killed_for = reason
        self._kill()

    @property
    def is_broken(self) -> bool:
        """It sent what no container sends, and is about to end."""
        return bool(self._fault)

    def _kill(self) -> None:
        if self.pid:
            process.kill_group(self.pid)

    def distrust(self, error: ProtocolError) -> None:
        """It sent what no container sends, so nothing more of it is used."""
        logger.warning("%r sent nonsense: %s", self, error)
        self._fault = f"the container sent nonsense ({error}); did code write to its descriptors?"
        self.is_paused = True
        self.wire.set_paused(True)
        self._kill()

    # --- the end ---

    def _on_death(self) -> None:
        self.take_all()
        pid, self.pid = self.pid, 0
        # While it has not been waited for, its number is its own, and its group's.
        self.host.unwatch(pid)
        process.kill_group(pid)
        status, peak_memory_kib = None, 0
        with contextlib.suppress(ChildProcessError):
            _, status, usage = os.wait4(pid, 0)
            peak_memory_kib = usage.ru_maxrss
        name, is_started = self._message.name, self.is_started
        details = outcome.exit_details(status, peak_memory_kib, name, is_started)
        self._release()
        self.host.bury(pid, self.container_id)
        self._remove_drafts(pid)
        self.release_text()
        reason, running = self._judge(details)
        self._tell_dropped(is_due=True)
        self.host.events.container_exited(
            self.container_id, reason, running, details, self._start_failure
        )
        self._ended.set()
        self.host.changed()

    def _judge(self, details: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Reason and running inputs of the exit. Makes the outputs of inputs for which it was
        killed."""
        running = self._way.running()
        if self._start_failure:
            details["text"] = "the user's code could not be loaded"
            return "start", []
        if self._killed_for:
            self._way.end_killed()
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

    def _release(self) -> None:
        """Give back all that the container had of the daemon's."""
        self.is_over = True
        for timer in (self._start_timer, self._leave_timer, self._text_timer, self._notice_timer):
            _cancel(timer)
        self._way.close()
        loop = self.host.loop
        self.wire.close()
        self._pipes.close()
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self.memory.close()
        self.host.containers.pop(self.container_id, None)

    def _remove_drafts(self, pid: int) -> None:
        for path in Path(self.host.settings.blob_folder).glob(f"*.{pid}-*.part"):
            path.unlink(missing_ok=True)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
