"""The background loop of the blocking API, and the narrow bridge to it.

One daemon thread runs one event loop for the whole process, from the first blocking call on. The
bridge is lean on purpose: a blocking call costs one `call_soon_threadsafe` and one wait on a lock,
which is what separates a round trip of 100 us from one of 150.

After a fork the child has no such thread; the next blocking call starts a new loop. What it
inherits of the old one is kept for ever and never touched, except that the sockets are replaced by
/dev/null, so that the parent's connections do not live on in the child.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fanout.exceptions import InvalidError

R = TypeVar("R")

#: How long an interrupted call, and the exit of the interpreter, wait for the loop to clean up.
CLEANUP_TIMEOUT_S = 3.0


class _Background:
    """The loop and its thread."""

    def __init__(self) -> None:
        self.loop = _new_loop()
        self._started = threading.Event()
        self.thread = threading.Thread(target=self._run, name="fanout-loop", daemon=True)
        self.thread.start()
        self._started.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._started.set)
        self.loop.run_forever()
        self.loop.close()

    def stop(self) -> None:
        """Close what is open on the loop, end its tasks, and join the thread."""
        if not self.loop.is_running():
            return
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._shut_down(), self.loop)
            self.thread.join(CLEANUP_TIMEOUT_S)

    async def _shut_down(self) -> None:
        from fanout.client import sessions

        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLEANUP_TIMEOUT_S / 2):
                await sessions.close_here()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLEANUP_TIMEOUT_S / 2):
                await self.loop.shutdown_asyncgens()
                await self.loop.shutdown_default_executor()
        self.loop.stop()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


_lock = threading.Lock()
_background: _Background | None = None
#: Loops of the parent that a fork brought along.
_inherited: list[_Background] = []


def background_loop() -> asyncio.AbstractEventLoop:
    """The background loop, started if it does not run."""
    background = _background
    if background is None:
        background = _start()
    return background.loop


def _start() -> _Background:
    global _background
    with _lock:
        if _background is None:
            _background = _Background()
            atexit.register(stop)
        return _background


def stop() -> None:
    """Close the connection of the blocking API and end its thread. The next blocking call starts
    both again. Called at the interpreter's exit."""
    global _background
    with _lock:
        background, _background = _background, None
    if background is not None and background.thread is not threading.current_thread():
        background.stop()


def _after_fork() -> None:
    global _lock, _background
    _lock = threading.Lock()
    if _background is not None:
        _inherited.append(_background)
        _background = None
    sessions = sys.modules.get("fanout.client.sessions")
    if sessions is not None:
        sessions.forget_after_fork()


os.register_at_fork(after_in_child=_after_fork)


def forbid_in_loop(name: str, advice: str) -> None:
    """A blocking call would stop the event loop that runs in this thread.

    In a notebook every cell runs inside a loop and blocking is what a person means, so there it
    is allowed.

    Raises:
        InvalidError: with `advice`, the line to write instead.
    """
    if asyncio._get_running_loop() is None or _is_notebook():
        return
    raise InvalidError(
        f"{name} would block the event loop that is running in this thread; write `{advice}`"
    )


def _is_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


class _Run:
    """One coroutine on the background loop, with somebody blocked on it."""

    __slots__ = ("done", "error", "make", "result", "task")

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self.make = make
        self.done = threading.Lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            self.result = await self.make()
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


def run(make: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Run a coroutine on the background loop and wait for it, in the caller's context.

    Ctrl-C cancels the coroutine, waits a moment for it to clean up, and goes on as
    KeyboardInterrupt.
    """
    loop = background_loop()
    running = _Run(make)
    loop.call_soon_threadsafe(running.start)
    try:
        running.done.acquire()
    except BaseException:
        loop.call_soon_threadsafe(running.cancel)
        running.done.acquire(timeout=CLEANUP_TIMEOUT_S)
        raise
    if running.error is not None:
        error, running.error = running.error, None
        raise error
    result: R = running.result
    return result


async def in_thread(action: Callable[[], R]) -> R:
    """Run something that blocks. In a thread of its own that is gone afterwards, since the pool of
    the loop is the user's, and its threads would stay."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[R] = loop.create_future()

    def settle(settled: concurrent.futures.Future[R]) -> None:
        # The loop may be gone by now, with whoever waited.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_copy_result, settled, future)

    def work() -> None:
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    done: concurrent.futures.Future[R] = concurrent.futures.Future()
    done.add_done_callback(settle)
    threading.Thread(target=work, name="fanout-start", daemon=True).start()
    return await future


def _copy_result(source: concurrent.futures.Future[R], target: asyncio.Future[R]) -> None:
    if target.done():
        return
    error = source.exception()
    if error is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())
