"""What sync and async containers share: the channel to the daemon, and how outputs leave."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from fanout import context
from fanout.exceptions import InputCancellation, InvalidError, SerializationError
from fanout.protocol import frames
from fanout.protocol.blob_store import FileBlobStore, blob_id_of
from fanout.protocol.messages import Status
from fanout.remote_errors import encode_error
from fanout.tracebacks import is_own_file
from fanout_worker import channel as ch
from fanout_worker import shared
from fanout_worker.outcome import stopped_payload
from fanout_worker.runtime.loader import UserCode
from fanout_worker.runtime.streams import LogWriter

#: How long a container sleeps before it looks again whether the daemon made room in the ring.
ROOM_INTERVAL_S = 0.0005
_READ_SIZE_BYTES = 256 << 10
#: How long the bell waits for a thread that is sending; the daemon looks by itself soon.
_BELL_PATIENCE_S = 0.001
#: Inputs of less than four times this are sliced by copying.
_SMALL_SIZE_BYTES = 256


@dataclass(slots=True)
class LeaseOrder:
    """A lease, as the daemon hands it over."""

    lease_id: int
    slot: int
    call_id: bytes
    start: int
    lengths: memoryview
    blobs: dict[int, list[bytes]]
    skip: int
    #: Of a class; "" for a function.
    method: str
    #: Items of a generator that may be sent; what counts is in memory, where there is a slot.
    credit: int
    #: Bytes when the inputs are small: a slice that copies is cheaper than a view then.
    payload: bytes | memoryview


class Channel:
    """The container's end of the socketpair. Blocking; threads of user code may print, so sending
    takes a lock."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = frames.FrameReader()
        self._lock = threading.Lock()
        self.leases: deque[LeaseOrder] = deque()
        self.start: tuple[dict[str, Any], bytes] | None = None
        self.is_stopping = False
        #: Orders about inputs that run, for a container that runs several.
        self.orders: deque[list[Any]] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        with self._lock:
            self._socket.sendall(data)

    def send_frame(self, *header: Any, payload: bytes = b"") -> None:
        data = ch.prefix(*header, payload_size=len(payload))
        with self._lock:
            if len(payload) <= _READ_SIZE_BYTES:
                self._socket.sendall(data + payload)
            else:
                self._socket.sendall(data)
                self._socket.sendall(payload)

    def ring_bell(self) -> None:
        """Wake the daemon, without waiting for it: what fills the socket wakes it just as well."""
        if not self._lock.acquire(timeout=_BELL_PATIENCE_S):
            return
        try:
            sent = self._socket.send(ch.BELL_FRAME, socket.MSG_DONTWAIT)
            if sent < len(ch.BELL_FRAME):
                self._socket.sendall(ch.BELL_FRAME[sent:])
        except BlockingIOError:
            return
        finally:
            self._lock.release()

    def read(self) -> None:
        """Block until at least some bytes came, and take the orders in them."""
        data = self._socket.recv(_READ_SIZE_BYTES)
        if not data:
            # The daemon is gone, and with it everything that a result could go to.
            os._exit(1)
        for header, payload in self._reader.feed(data):
            self._take(ch.parse(header), payload)

    def _take(self, fields: list[Any], payload: bytes) -> None:
        kind = fields[0]
        if kind == ch.LEASE:
            _, lease_id, slot, call_id, start, lengths, blobs, skip, method, credit = fields
            self.leases.append(
                LeaseOrder(
                    lease_id,
                    slot,
                    call_id,
                    start,
                    memoryview(lengths).cast("I"),
                    dict(blobs),
                    skip,
                    method,
                    credit,
                    payload
                    if len(payload) < len(lengths) * _SMALL_SIZE_BYTES
                    else memoryview(payload),
                )
            )
        elif kind in (ch.STOP_INPUT, ch.ITEM_CREDIT):
            self.orders.append(fields)
        elif kind == ch.START:
            self.start = (fields[1], payload)
        elif kind == ch.STOP:
            self.is_stopping = True


class Gate:
    """Whether the cancel signal may raise at this moment.

    `is_open[0]` is true only while user code runs, so that the signal never interrupts the
    runtime in the middle of a frame. A list, because the loop that runs inputs sets it twice for
    each and an attribute costs more.
    """

    def __init__(self, memory: shared.SharedMemory) -> None:
        self._words = memory.words
        self.is_open = [0]
        self._holds = 0
        self._held_at_ns = self._since_ns = 0

    def hold_clock(self) -> None:
        """Until `release_clock` the running input's time stands still: it is the runtime that
        waits for the daemon. May be nested; only in the main thread."""
        self._holds += 1
        if self._holds == 1:
            self._held_at_ns = time.perf_counter_ns()
            self._since_ns = self._words[shared.SINCE_NS]
            self._words[shared.SINCE_NS] = shared.CLOCK_HELD

    def release_clock(self) -> None:
        """The time that passed since `hold_clock` does not count against the timeout."""
        self._holds -= 1
        if self._holds == 0:
            passed_ns = time.perf_counter_ns() - self._held_at_ns
            self._words[shared.SINCE_NS] = self._since_ns + passed_ns

    def is_target(self) -> bool:
        """Whether the daemon wants the input that runs now to stop."""
        words = self._words
        target = words[shared.CANCEL_TARGET]
        return target != 0 and target == words[shared.PROGRESS]

    def on_signal(self, signum: int, frame: object) -> None:
        if self.is_open[0] and self.is_target():
            # Once for an input: the code may be cleaning up when the signal comes again.
            self.is_open[0] = 0
            raise InputCancellation("the input was asked to stop")


class Runner:
    """Base of both kinds of container."""

    def __init__(
        self,
        channel: Channel,
        memory: shared.SharedMemory,
        gate: Gate,
        code: UserCode,
        options: dict[str, Any],
        blob_folder: str,
    ) -> None:
        self._channel = channel
        self._memory = memory
        self._words = memory.words
        self._gate = gate
        self._code = code
        #: What the present lease runs.
        self._function: Callable[..., Any] = print
        self._is_generator = False
        self._options = options
        self._timeout_s = options.get("timeout")
        self._store = FileBlobStore(blob_folder)
        self._drafts = count()
        self._writer = shared.Writer(memory, channel.ring_bell)
        self._input = context.InputContext(b"", 0, 0)
        self._streams: list[LogWriter] = []
        self._is_holding = [0]

    def enter(self) -> None:
        """Run the hooks that come before the first input.

        Raises:
            BaseException: what one of them raised.
        """
        for hook in self._code.enters:
            self._run_hook(hook)

    def serve(self) -> None:
        """Run leases until told to stop."""
        raise NotImplementedError

    def exit(self) -> None:
        """Run the hooks that come after the last input: all of them, whatever one raises."""
        self._end_inputs()
        for hook in self._code.exits:
            try:
                self._run_hook(hook)
            except BaseException as error:
                tell_failed_hook(error)

    def _run_hook(self, hook: Callable[[], Any]) -> None:
        hook()

    def _end_inputs(self) -> None:
        """What is printed from now on belongs to the container and to no input."""
        context.current_input.set(None)
        for stream in self._streams:
            stream.recent = None

    def add_streams(self, streams: list[LogWriter]) -> None:
        """The streams that are to be flushed before each output."""
        self._streams = streams
        for stream in streams:
            stream.recent = self._input
            stream.is_holding = self._is_holding

    def _flush_streams(self) -> None:
        for stream in self._streams:
            stream.flush()

    # --- around inputs ---

    def _choose(self, lease: LeaseOrder) -> None:
        """Prepare for what the lease is to run."""
        entry = self._code.find(lease.method)
        self._function = entry.function
        self._is_generator = entry.is_generator

    def _begin_lease(self, lease: LeaseOrder) -> None:
        running = self._input
        running.call_id, running.lease_id = lease.call_id, lease.lease_id
        context.current_input.set(running)

    def _end_lease(self) -> None:
        words = self._words
        words[shared.PROGRESS] = 0
        # Now that nothing of the lease is looked at any more, its slot may be used again.
        words[shared.ENDED] += 1
        if words[shared.IS_AWAITED]:
            self._channel.ring_bell()
        else:
            self._writer.flush()

    def _buffers(self, lease: LeaseOrder, offset: int) -> list[memoryview]:
        """The large buffers of an input, each a mapping of its own that code may write to."""
        return [self._store.private_buffer(blob_id) for blob_id in lease.blobs.get(offset, ())]

    # --- outputs ---

    def _emit(
        self,
        lease: LeaseOrder,
        kind: int,
        index: int,
        number: int,
        output: tuple[int, bytes, list[memoryview]],
        duration_ns: int,
    ) -> None:
        """Hand over what did not go into the ring at the first attempt, or may not."""
        self._gate.hold_clock()
        try:
            self._emit_slowly(lease, kind, index, number, output, duration_ns)
        finally:
            self._gate.release_clock()

    def _emit_slowly(
        self,
        lease: LeaseOrder,
        kind: int,
        index: int,
        number: int,
        output: tuple[int, bytes, list[memoryview]],
        duration_ns: int,
    ) -> None:
        status, data, buffers = output
        if not buffers and len(data) <= shared.ENTRY_SIZE_BYTES_MAX:
            # The ring is full for the moment: the daemon reads it soon, or has reason not to.
            while not self._writer.put(status, data, duration_ns):
                time.sleep(ROOM_INTERVAL_S)
            return
        if kind == shared.KIND_ITEM:
            # An error is no item but the end of its generator, so it is raised there.
            drafts = self._write_drafts(buffers)
        else:
            status, data, drafts = self._portable(status, data, buffers)
        self._channel.send_frame(
            ch.OUTPUT, self._writer.entry, lease.slot, kind, index, number, int(status),
            duration_ns, drafts, payload=data,
        )  # fmt: skip
        if kind == shared.KIND_OUTPUT:
            self._writer.mark(lease.slot, kind, index + 1, 0)
        else:
            self._writer.mark(lease.slot, kind, index, number + 1)

    def _portable(
        self, status: int, data: bytes, buffers: list[memoryview]
    ) -> tuple[int, bytes, list[Any]]:
        """An output with its large buffers written to files; an error where that is not
        possible."""
        try:
            return status, data, self._write_drafts(buffers)
        except SerializationError as error:
            return Status.ERROR, encode_error(error), []

    def _write_drafts(self, buffers: list[memoryview]) -> list[Any]:
        """Write the large buffers that stand beside the bytes of a value to files.

        Raises:
            SerializationError: a file cannot be written.
        """
        try:
            return [self._write_draft(buffer) for buffer in buffers]
        except OSError as error:
            raise SerializationError(
                f"the value could not be written to {self._store.folder}: {error}"
            ) from None

    def _write_draft(self, buffer: memoryview) -> list[Any]:
        """Write a buffer beside the blobs; the daemon makes it one when it reads the output.

        Not under its final name, as the daemon may be deleting a blob of the same content.
        """
        data = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        blob_id = blob_id_of(data)
        name = f"{blob_id.hex()}.{os.getpid()}-{next(self._drafts)}.part"
        path = self._store.folder / name
        with path.open("xb", buffering=0) as file:
            os.chmod(path, 0o600)
            while len(data):
                data = data[file.write(data) :]
        return [blob_id, name]

    def _failure_of(self, error: BaseException, value: object) -> tuple[int, bytes]:
        """Status and bytes of an input that raised."""
        if isinstance(error, InputCancellation) and self._gate.is_target():
            running = context.current_input.get() or self._input
            return Status.FAILURE, stopped_payload(
                self._words[shared.CANCEL_REASON], self._timeout_s, running.call_id, running.index
            )
        return error_output(error, value)


def error_output(error: BaseException, value: object) -> tuple[int, bytes]:
    """Status and bytes of an input whose code raised, or gave a value that cannot be pickled."""
    if isinstance(error, SerializationError):
        error = _explained(value, error)
    return Status.ERROR, encode_error(error)


def tell_failed_hook(error: BaseException) -> None:
    """Print what an exit hook raised, from the hook's own frame on: nobody waits for an answer."""
    trace = error.__traceback__
    while trace is not None and _is_around_hooks(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    error.__traceback__ = trace
    with contextlib.suppress(Exception):
        traceback.print_exception(error)


def _is_around_hooks(filename: str) -> bool:
    return is_own_file(filename) or f"{os.sep}asyncio{os.sep}" in filename


def _explained(value: object, error: SerializationError) -> BaseException:
    """A function that was declared as something it is not gives a value nobody can pickle."""
    kind = type(value).__name__
    if kind == "coroutine":
        value.close()  # type: ignore[attr-defined]
        advice = "returned a coroutine: define it with `async def` itself, or await it inside"
    elif kind == "generator":
        advice = "returned a generator: declare it with is_generator=True, or return a list"
    elif kind == "async_generator":
        advice = "returned an async generator: declare it with is_generator=True, or collect it"
    else:
        return error
    explained = InvalidError(f"the function {advice}")
    explained.__cause__ = error
    return explained
