"""`sys.stdout` and `sys.stderr` of a container: each line leaves at once, with its input's name.

What has no newline yet waits for it, for `flush`, or for the end of the input, as on a terminal;
`print` writes each of its arguments on its own.

A process that user code forks inherits the objects but must not write to the channel, where its
frames would fall between the container's own; there the text goes to the descriptor instead.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import Any

from fanout import context
from fanout.protocol.messages import Source

#: A log frame takes at most this much of one write.
LOG_SIZE_BYTES_MAX = 64 << 10

#: Called with source, call id, index and the bytes.
SendLog = Callable[[int, bytes, int, bytes], None]


class LogWriter(io.RawIOBase):
    """The binary stream below; `sys.stdout.buffer` in user code."""

    def __init__(self, source: Source, send: SendLog) -> None:
        self._source = source
        self._send = send
        self._pid = os.getpid()
        self._held = b""
        #: Whether anything is held; a list, as the loop that runs inputs asks after each of them.
        self.is_holding = [0]
        #: The input that ran last: for threads of user code, which have no context of their own.
        self.recent: context.InputContext | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._source)

    def isatty(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if os.getpid() != self._pid:
            rest = view
            while len(rest):
                rest = rest[os.write(int(self._source), rest) :]
            return len(view)
        data = self._held + bytes(view)
        if not data.endswith(b"\n") and len(data) < LOG_SIZE_BYTES_MAX:
            self._held = data
            self.is_holding[0] = 1
        else:
            self._held = b""
            self._emit(data)
        return len(view)

    def flush(self) -> None:
        """Let go of what has no newline."""
        data, self._held = self._held, b""
        self.is_holding[0] = 0
        if data and os.getpid() == self._pid:
            self._emit(data)

    def flush_input(self, running: context.InputContext) -> None:
        """Let go of what this input has printed without a newline."""
        self.flush()

    def _emit(self, data: bytes) -> None:
        self._emit_of(context.current_input.get(), data)

    def _emit_of(self, running: context.InputContext | None, data: bytes) -> None:
        running = running or self.recent
        call_id, index = (running.call_id, running.index) if running is not None else (b"", 0)
        for start in range(0, len(data), LOG_SIZE_BYTES_MAX):
            self._send(self._source, call_id, index, data[start : start + LOG_SIZE_BYTES_MAX])


class ConcurrentLogWriter(LogWriter):
    """The same for inputs that print at the same time: each has its own line under way.

    What is printed in the name of an input that has ended leaves at once, as nobody comes to flush
    it; and so the identity of a context is its line's name only as long as the context exists.
    """

    def __init__(self, source: Source, send: SendLog) -> None:
        super().__init__(source, send)
        self._lines: dict[int, bytes] = {}
        # An object that prints when it is collected may be collected in here.
        self._lock = threading.RLock()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if os.getpid() != self._pid:
            return super().write(data)
        running = context.current_input.get()
        with self._lock:
            data = self._lines.pop(id(running), b"") + bytes(view)
            leaves = data.endswith(b"\n") or len(data) >= LOG_SIZE_BYTES_MAX
            if not leaves and running is not None:
                leaves = running.is_over
            if not leaves:
                self._lines[id(running)] = data
        if leaves:
            self._emit(data)
        return len(view)

    def flush(self) -> None:
        self._flush_line(context.current_input.get())

    def flush_input(self, running: context.InputContext) -> None:
        self._flush_line(running)

    def _flush_line(self, running: context.InputContext | None) -> None:
        with self._lock:
            data = self._lines.pop(id(running), b"")
        if data and os.getpid() == self._pid:
            self._emit_of(running, data)


def make_stream(writer: LogWriter) -> io.TextIOWrapper:
    """A text stream that holds nothing back from the writer below."""
    return io.TextIOWrapper(
        writer,  # type: ignore[arg-type]
        encoding="utf-8",
        errors="backslashreplace",
        newline="\n",
        write_through=True,
    )
