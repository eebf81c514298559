"""Containers of async functions: one event loop, kept across inputs, one input at a time.

Between inputs the loop goes on, so that what earlier inputs left running (connection pools,
background tasks) lives, and what hooks made that ran first. The cancel signal cancels the input's
task. A class that has sync methods beside async ones runs in `child_concurrent.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgpack

from fanout import context
from fanout.exceptions import InputCancellation
from fanout.protocol.messages import Status
from fanout.serialization import decode_args, encode_value
from fanout_worker import channel as ch
from fanout_worker import shared
from fanout_worker.runtime.runner import LeaseOrder, Runner

_Output = tuple[int, bytes, list[memoryview]]


async def settled(value: Any) -> Any:
    """What a function gave, awaited if need be."""
    return await value if inspect.isawaitable(value) else value


class LoopRunner(Runner):
    """Base of containers with an event loop: the same one for hooks and for all inputs.

    A sync hook runs in the same thread while the loop stands still, so it may block, and use what
    blocks of fanout; what it makes belongs to the thread of the async methods.
    """

    def enter(self) -> None:
        self._loops = asyncio.Runner()
        # One for all, so that what a hook sets in its context is there in the methods.
        self._context = contextvars.copy_context()
        super().enter()

    def serve(self) -> None:
        self._loops.run(self._serve(), context=self._context)

    def exit(self) -> None:
        super().exit()
        self._loops.close()

    async def _serve(self) -> None:
        raise NotImplementedError

    def _end_inputs(self) -> None:
        super()._end_inputs()
        self._context.run(context.current_input.set, None)

    def _run_hook(self, hook: Callable[[], Any]) -> None:
        result = self._context.run(hook)
        if inspect.isawaitable(result):
            self._loops.run(settled(result), context=self._context)


class AsyncRunner(LoopRunner):
    """Runs coroutine functions and async generator functions."""

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._task: asyncio.Task[_Output] | None = None
        self._is_cancelled = False
        loop.add_reader(self._channel.fileno(), self._on_readable)
        loop.add_signal_handler(signal.SIGUSR1, self._on_cancel)
        try:
            while True:
                while not self._channel.leases:
                    if self._channel.is_stopping:
                        return
                    await self._wait_for_news()
                lease = self._channel.leases.popleft()
                self._choose(lease)
                await self._run_lease(lease)
        finally:
            loop.remove_reader(self._channel.fileno())

    def _on_readable(self) -> None:
        self._channel.read()
        self._news.set()

    async def _wait_for_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _on_cancel(self) -> None:
        if self._task is not None and not self._is_cancelled and self._gate.is_target():
            self._is_cancelled = True
            self._task.cancel()

    async def _run_lease(self, lease: LeaseOrder) -> None:
        self._begin_lease(lease)
        words = self._words
        position, skip = 0, lease.skip
        for offset, length in enumerate(lease.lengths):
            index = lease.start + offset
            self._input.index = index
            # A task that this input leaves behind keeps the context that it was made in.
            context.current_input.set(context.InputContext(lease.call_id, index, lease.lease_id))
            place = shared.place(lease.slot, index)
            began = words[shared.SINCE_NS] = time.perf_counter_ns()
            words[shared.PROGRESS] = shared.TENTATIVE | place
            if index >= words[shared.LIMIT + lease.slot]:
                break
            words[shared.PROGRESS] = place
            data = lease.payload[position : position + length]
            self._is_cancelled = False
            output = await self._run_task(self._run_input(lease, offset, data, skip))
            position += length
            skip = 0
            if self._is_holding[0]:
                self._flush_streams()
            duration_ns = time.perf_counter_ns() - began
            status, value, buffers = output
            if offset == 0 or self._is_generator:
                self._writer.mark(lease.slot, shared.KIND_OUTPUT, index, 0)
            if buffers or not self._writer.put(status, value, duration_ns):
                self._emit(lease, shared.KIND_OUTPUT, index, 0, output, duration_ns)
        self._end_lease()

    async def _run_task(self, running: Coroutine[Any, Any, _Output]) -> _Output:
        """Run an input's coroutine as a task that the signal can cancel."""
        if not self._gate.is_target():
            self._task = asyncio.ensure_future(running)
            try:
                return await self._task
            except asyncio.CancelledError:
                # Cancelled before its first step, it could not catch that itself.
                if not self._is_cancelled:
                    raise
            finally:
                self._task = None
        running.close()
        stopped = InputCancellation("the input was asked to stop")
        return (*self._failure_of(stopped, None), [])

    async def _run_input(
        self, lease: LeaseOrder, offset: int, data: bytes | memoryview, skip: int
    ) -> _Output:
        """Run one input; whatever it raises becomes its output. SystemExit and KeyboardInterrupt
        too: let out of a task, they would end the loop."""
        value: Any = None
        try:
            buffers = self._buffers(lease, offset) if lease.blobs else []
            args, kwargs = decode_args(data, buffers)
            if self._is_generator:
                stream = self._function(*args, **kwargs)
                number = await self._generate(lease, offset, stream, skip)
                return Status.DONE, msgpack.packb(number), []
            value = await settled(self._function(*args, **kwargs))
            encoded, out_buffers = encode_value(value)
            return Status.VALUE, encoded, out_buffers
        except BaseException as error:
            if self._is_cancelled and isinstance(error, asyncio.CancelledError):
                error = InputCancellation("the input was asked to stop")
            status, payload = self._failure_of(error, value)
            return status, payload, []

    async def _generate(self, lease: LeaseOrder, offset: int, stream: Any, skip: int) -> int:
        index, credit = lease.start + offset, shared.CREDIT + lease.slot
        writer, number = self._writer, 0
        writer.mark(lease.slot, shared.KIND_ITEM, index, skip)
        async with contextlib.AsyncExitStack() as stack:
            if hasattr(stream, "aclose"):
                stack.push_async_callback(stream.aclose)
            async for value in stream:
                if number >= skip:
                    if number >= self._words[credit]:
                        await self._await_credit(lease.slot, number)
                    data, buffers = encode_value(value)
                    if buffers or not writer.put(Status.VALUE, data, 0):
                        item = (int(Status.VALUE), data, buffers)
                        self._emit(lease, shared.KIND_ITEM, index, number, item, 0)
                number += 1
        return number

    async def _await_credit(self, slot: int, number: int) -> None:
        self._gate.hold_clock()
        try:
            self._channel.send_frame(ch.WAITS, slot, number)
            while number >= self._words[shared.CREDIT + slot]:
                await self._wait_for_news()
        finally:
            self._gate.release_clock()
