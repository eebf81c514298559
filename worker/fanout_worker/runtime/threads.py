"""Threads in which inputs run, and how code in one of them is stopped.

Python can be asked to raise an exception in another thread, which happens before one of the next
instructions that thread executes, whatever they are by then. A `StopGate` sees to it that it can
only be instructions of the input that is meant, as `runner.Gate` does for the signal.
"""

from __future__ import annotations

import contextvars
import ctypes
import queue
import threading
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

from fanout.exceptions import ExecutionError, InputCancellation

R = TypeVar("R")


class StopGate:
    """Stops the code of one input, wherever it is, at most once."""

    def __init__(self) -> None:
        self.is_asked = False
        self._lock = threading.Lock()
        #: The thread in which user code runs; 0 while none does.
        self._thread = 0
        #: The exception is on its way.
        self._is_pending = False

    def ask(self) -> None:
        """In any thread: raise `InputCancellation` in the input's code, now or when it goes on."""
        with self._lock:
            if self.is_asked:
                return
            self.is_asked = True
            if self._thread:
                self._is_pending = True
                _raise_in(self._thread, InputCancellation)

    def run(self, call: Callable[[], R]) -> R:
        """Call user code so that it can be stopped.

        Raises:
            BaseException: what it raised; `InputCancellation` if it was asked to stop.
        """
        try:
            try:
                self._open()
                return call()
            finally:
                self._shut()
        except InputCancellation:
            # It may have fallen between the user's code and the line that shuts the gate.
            self._shut()
            raise

    def _open(self) -> None:
        with self._lock:
            if self.is_asked:
                raise InputCancellation("the input was asked to stop")
            self._thread = threading.get_ident()

    def _shut(self) -> None:
        while True:
            try:
                with self._lock:
                    thread, self._thread = self._thread, 0
                    if self._is_pending:
                        self._is_pending = False
                        _raise_in(thread, None)
                return
            except InputCancellation:
                # Here it may be, but no further.
                continue


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Have an exception raised in a thread; with None, not any more."""
    exception = ctypes.py_object() if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


class Threads:
    """As many as there is work at a time; they are kept for later work, and end with the process.

    Not those of the standard library, which joins its own at exit: user code may never end.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[contextvars.Context, Callable[[], Any]]] = (
            queue.SimpleQueue()
        )
        self._idle = threading.Semaphore(0)
        self._numbers = count(1)

    def run(self, work: Callable[[], None]) -> None:
        """Run something at once, in a copy of the caller's context. It must not raise.

        Raises:
            ExecutionError: it cannot run, as the host gives no more threads.
        """
        if not self._idle.acquire(blocking=False):
            name = f"fanout-input-{next(self._numbers)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise ExecutionError(
                    f"no thread could be started for the input beside {threading.active_count()} "
                    f"others: {error}. Lower max_inputs, or raise the limits of the worker's user "
                    "(ulimit -u) and the function's memory"
                ) from None
        self._work.put((contextvars.copy_context(), work))

    def _serve(self) -> None:
        while True:
            context, work = self._work.get()
            context.run(work)
            # A thread that waits keeps nothing of the last input alive.
            del context, work
            self._idle.release()
