"""A container: its start, and the plain blocking loop that runs sync functions.

The loop has one thread, no event loop and no heartbeat. Everything it does for an input beside
unpickling, calling and pickling is a few stores to shared memory (`shared.py`), in an order that
matters: progress, limit, progress; then, when the output is there, the output, before anything
else of the user's runs.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import random
import resource
import select
import signal
import socket
import sys
import threading
import time
import typing
from typing import Any

import msgpack

from fanout import context
from fanout.definition import Definition, unpack_definition
from fanout.exceptions import InputCancellation
from fanout.protocol.messages import Source, Status
from fanout.remote_errors import encode_error
from fanout.serialization import decode_args, encode_value
from fanout_worker import channel as ch
from fanout_worker import process, shared
from fanout_worker.runtime import loader, streams
from fanout_worker.runtime.runner import Channel, Gate, LeaseOrder, Runner


class SyncRunner(Runner):
    """Runs plain functions and generator functions, one input after another."""

    def serve(self) -> None:
        channel = self._channel
        while True:
            while not channel.leases:
                if channel.is_stopping:
                    return
                channel.read()
            lease = channel.leases.popleft()
            self._choose(lease)
            if self._is_generator:
                self._run_generators(lease)
            else:
                self._run_lease(lease)

    def _run_lease(self, lease: LeaseOrder) -> None:
        # The hot loop: names are bound to locals, and nothing is made that the input does not
        # need.
        self._begin_lease(lease)
        words, running, is_open = self._words, self._input, self._gate.is_open
        is_holding = self._is_holding
        function, put, clock = self._function, self._writer.put, time.perf_counter_ns
        slot, payload, has_blobs = lease.slot, lease.payload, bool(lease.blobs)
        limit, bit = shared.LIMIT + slot, shared.TENTATIVE
        progress, since = shared.PROGRESS, shared.SINCE_NS
        position, index = 0, lease.start - 1
        tentative = (shared.TENTATIVE | shared.place(slot, lease.start)) - 1
        self._writer.mark(slot, shared.KIND_OUTPUT, lease.start, 0)
        now = clock()
        for length in lease.lengths:
            index += 1
            running.index = index
            tentative += 1
            words[since] = now
            words[progress] = tentative
            if index >= words[limit]:
                break
            words[progress] = tentative ^ bit
            end = position + length
            buffers: list[memoryview] = []
            value = None
            try:
                try:
                    if has_blobs:
                        buffers = self._buffers(lease, index - lease.start)
                    is_open[0] = 1
                    args, kwargs = decode_args(payload[position:end], buffers)
                    value = function(*args, **kwargs)
                    is_open[0] = 0
                    args = kwargs = buffers = None  # type: ignore[assignment]
                    data, buffers = encode_value(value)
                    status = 0
                except BaseException as error:
                    is_open[0] = 0
                    buffers = []
                    status, data = self._failure_of(error, value)
            except InputCancellation as error:
                # The signal fell between the user's own exception and the line that shuts the
                # gate. It comes only once.
                buffers = []
                status, data = self._failure_of(error, None)
            value = args = kwargs = None  # type: ignore[assignment]
            if is_holding[0]:
                self._flush_streams()
            position = end
            then, now = now, clock()
            if buffers or not put(status, data, now - then):
                output = (status, data, buffers)
                self._emit(lease, shared.KIND_OUTPUT, index, 0, output, now - then)
                # It may have waited for the daemon, at nobody's expense.
                now = clock()
        self._end_lease()

    # --- generators ---

    def _run_generators(self, lease: LeaseOrder) -> None:
        self._begin_lease(lease)
        words = self._words
        position, skip = 0, lease.skip
        for offset, length in enumerate(lease.lengths):
            index = lease.start + offset
            self._input.index = index
            place = shared.place(lease.slot, index)
            began = words[shared.SINCE_NS] = time.perf_counter_ns()
            words[shared.PROGRESS] = shared.TENTATIVE | place
            if index >= words[shared.LIMIT + lease.slot]:
                break
            words[shared.PROGRESS] = place
            try:
                data = self._generate(lease, offset, position, skip)
                status: int = Status.DONE
            except BaseException as error:
                self._gate.is_open[0] = 0
                status, data = self._failure_of(error, None)
            position += length
            skip = 0
            if self._is_holding[0]:
                self._flush_streams()
            duration_ns = time.perf_counter_ns() - began
            self._writer.mark(lease.slot, shared.KIND_OUTPUT, index, 0)
            if not self._writer.put(status, data, duration_ns):
                self._emit(lease, shared.KIND_OUTPUT, index, 0, (status, data, []), duration_ns)
        self._end_lease()

    def _generate(self, lease: LeaseOrder, offset: int, position: int, skip: int) -> bytes:
        """Run one generator to its end. Returns the payload of its `DONE`."""
        is_open, words, writer = self._gate.is_open, self._words, self._writer
        index, credit = lease.start + offset, shared.CREDIT + lease.slot
        buffers = self._buffers(lease, offset) if lease.blobs else []
        is_open[0] = 1
        end = position + lease.lengths[offset]
        args, kwargs = decode_args(lease.payload[position:end], buffers)
        stream = self._function(*args, **kwargs)
        number = 0
        writer.mark(lease.slot, shared.KIND_ITEM, index, skip)
        try:
            for value in stream:
                is_open[0] = 0
                if number >= skip:
                    if number >= words[credit]:
                        self._await_credit(lease.slot, number)
                    data, buffers = encode_value(value)
                    if buffers or not writer.put(Status.VALUE, data, 0):
                        item = (Status.VALUE, data, buffers)
                        self._emit(lease, shared.KIND_ITEM, index, number, item, 0)
                number += 1
                is_open[0] = 1
            is_open[0] = 0
        except BaseException:
            is_open[0] = 0
            if hasattr(stream, "close"):
                # It may refuse to end, or fail at it; the first error is the one to tell.
                with contextlib.suppress(BaseException):
                    stream.close()
            raise
        packed: bytes = msgpack.packb(number)
        return packed

    def _await_credit(self, slot: int, number: int) -> None:
        """Wait until item `number` may be sent. The time does not count against the timeout."""
        self._gate.hold_clock()
        try:
            self._wait_for_credit(slot, number)
        finally:
            self._gate.release_clock()

    def _wait_for_credit(self, slot: int, number: int) -> None:
        words, is_open, channel = self._words, self._gate.is_open, self._channel
        channel.send_frame(ch.WAITS, slot, number)
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        while number >= words[shared.CREDIT + slot]:
            # Only this wait may be interrupted, and not the read: half a read would be lost.
            is_open[0] = 1
            if self._gate.is_target():
                # The signal came just before the gate was open.
                is_open[0] = 0
                raise InputCancellation("the input was asked to stop")
            poll.poll()
            is_open[0] = 0
            channel.read()


def main(channel_fd: int, memory_fd: int, stdout_fd: int, stderr_fd: int) -> typing.NoReturn:
    """Be a container: called once, in a process that was just forked from a template. It never
    returns."""
    _leave_template(channel_fd, memory_fd, stdout_fd, stderr_fd)
    channel = Channel(socket.socket(fileno=channel_fd))
    memory = shared.SharedMemory(memory_fd)
    # The mapping has a descriptor of its own.
    os.close(memory_fd)
    gate = Gate(memory)
    signal.signal(signal.SIGUSR1, gate.on_signal)
    while channel.start is None:
        channel.read()
    info, payload = channel.start
    process.die_with_parent(info["daemon_pid"])
    try:
        runner = _prepare(info, bytes(payload), channel, memory, gate)
        runner.enter()
    except BaseException as error:
        _flush()
        channel.send_frame(ch.START_FAILED, payload=encode_error(error))
        _leave(1)
    channel.send(ch.STARTED_FRAME)
    runner.serve()
    runner.exit()
    _leave(0)


def _leave(status: int) -> typing.NoReturn:
    """End the process. Not by returning, as the interpreter would wait for the threads that user
    code has left running, some of which never end."""
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _leave_template(channel_fd: int, memory_fd: int, stdout_fd: int, stderr_fd: int) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (stdout_fd, 1), (stderr_fd, 2)):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in (0, 1, 2, channel_fd, memory_fd):
            # The folder's own descriptor is among them, and closed already.
            with contextlib.suppress(OSError):
                os.close(int(name))
    os.set_inheritable(channel_fd, False)
    os.set_inheritable(memory_fd, False)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    process.lower_priority()


def _prepare(
    info: dict[str, Any],
    payload: bytes,
    channel: Channel,
    memory: shared.SharedMemory,
    gate: Gate,
) -> Runner:
    """Make the process what the definition says, and load the user's code."""
    definition = unpack_definition(payload)
    if info["descriptors_max"]:
        # The daemon has raised its own limit, which user code is not to inherit.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (info["descriptors_max"], hard))
    os.environ.clear()
    os.environ.update(info["variables"])
    os.environ.update(_own_variables(info, definition))
    time.tzset()
    os.chdir(info["cwd"])
    sys.path[:] = info["path"]
    sys.argv = [definition.target.file]
    context.container = context.ContainerContext(
        container_id=info["container_id"],
        app_id=info["app_id"],
        app_name=definition.app_name,
        function_id=info["function_id"],
        function_name=definition.function_name,
        environment=definition.environment,
        is_remote_host=bool(info["sources"]),
        socket_path=info["socket_path"],
        secret=info["secret"],
        blob_folder=info["blob_folder"],
        sources=info["sources"],
        definition=payload,
    )
    options = info["options"]
    sender = LogSender(channel, gate)
    runs_many = ch.runs_many(options)
    make_writer = streams.ConcurrentLogWriter if runs_many else streams.LogWriter
    writers = [make_writer(source, sender) for source in (Source.STDOUT, Source.STDERR)]
    sys.stdout, sys.stderr = map(streams.make_stream, writers)
    faulthandler.enable(file=2)
    code = loader.load_code(definition, info["sources"], options)
    if "" in code.entries:
        context.container.function = code.entries[""].function
    if runs_many:
        from fanout_worker.runtime.child_concurrent import ConcurrentRunner

        kind: type[Runner] = ConcurrentRunner
    elif code.needs_loop:
        from fanout_worker.runtime.child_async import AsyncRunner

        kind = AsyncRunner
    else:
        kind = SyncRunner
    runner = kind(channel, memory, gate, code, options, info["blob_folder"])
    runner.add_streams(writers)
    return runner


def _own_variables(info: dict[str, Any], definition: Definition) -> dict[str, str]:
    """By which programs that user code starts, too, can tell where they run; with the names that
    scripts for Modal look for."""
    number = str(info["container_id"])
    return {
        "FANOUT_IS_REMOTE": "1",
        "FANOUT_CONTAINER_ID": number,
        "FANOUT_CONTAINER_MARK": info["mark"],
        "FANOUT_APP_NAME": definition.app_name,
        "FANOUT_FUNCTION_NAME": definition.function_name,
        "MODAL_IS_REMOTE": "1",
        "MODAL_TASK_ID": f"ta-{number}",
    }


class LogSender:
    """Sends what user code prints, and lets no cancel signal cut a frame in half."""

    def __init__(self, channel: Channel, gate: Gate) -> None:
        self._channel = channel
        self._gate = gate
        self._main = threading.main_thread().ident

    def __call__(self, source: int, call_id: bytes, index: int, data: bytes) -> None:
        is_open = self._gate.is_open
        if threading.get_ident() != self._main:
            # Signals are handled in the main thread only.
            self._channel.send_frame(ch.LOG, source, call_id, index, payload=data)
            return
        if not is_open[0]:
            self._send_held(source, call_id, index, data)
            return
        is_open[0] = 0
        self._send_held(source, call_id, index, data)
        is_open[0] = 1
        if self._gate.is_target():
            # The signal came meanwhile.
            self._gate.on_signal(signal.SIGUSR1, None)

    def _send_held(self, source: int, call_id: bytes, index: int, data: bytes) -> None:
        """A daemon that takes nothing for a while must not cost the input its time."""
        self._gate.hold_clock()
        self._channel.send_frame(ch.LOG, source, call_id, index, payload=data)
        self._gate.release_clock()
