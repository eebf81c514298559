"""Containers that run several inputs at a time, and those whose function takes inputs in batches.

An event loop in the main thread reads orders and runs async code, each input as a task. Sync code
runs in threads. An output leaves at once, from wherever its code ran, before any more code of its
input's does, and holds up nothing else: there is no order among inputs.

Who ends an input claims it first, by taking it out of `_inputs`, as code in a thread may come to
its end while the loop stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import msgpack

from fanout import context
from fanout.exceptions import ExecutionError, InvalidError
from fanout.protocol.messages import Status
from fanout.serialization import decode_args, encode_value
from fanout_worker import channel as ch
from fanout_worker import shared
from fanout_worker.outcome import stopped_payload
from fanout_worker.runtime.batching import Batcher
from fanout_worker.runtime.child_async import LoopRunner, settled
from fanout_worker.runtime.live import (
    AsyncCredit,
    Credit,
    Execution,
    LiveInput,
    Output,
    arguments_by_parameter,
    is_stop,
)
from fanout_worker.runtime.runner import LeaseOrder, error_output
from fanout_worker.runtime.threads import Threads

#: A frame of outputs is closed when it has so much.
_FRAME_SIZE_BYTES = 1 << 20
#: What an entry costs beside its value, and each of its blobs; headers are limited, too.
_ENTRY_SIZE_BYTES = 160

_END: Any = object()


class ConcurrentRunner(LoopRunner):
    """Runs functions and generators of both kinds, and methods of mixed classes."""

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._inputs: dict[tuple[int, int], LiveInput] = {}
        self._execution_count = 0
        self._threads = Threads()
        self._batcher = self._make_batcher()
        self._lead_lock = threading.Lock()
        self._batch_timer: asyncio.TimerHandle | None = None
        self._signatures: dict[Callable[..., Any], inspect.Signature] = {}
        assert context.container is not None
        self._waits = context.container.waits
        self._waits.run_many()
        self._loop.add_reader(self._channel.fileno(), self._on_readable)
        try:
            # Some may have come behind the order to start.
            self._obey()
            await self._over.wait()
        finally:
            self._loop.remove_reader(self._channel.fileno())

    def _make_batcher(self) -> Batcher[LiveInput] | None:
        batch = self._options.get("batch")
        if batch is None:
            return None
        return Batcher(batch[0], batch[1] / 1000, self._options.get("max_inputs") or 1)

    # --- orders ---

    def _on_readable(self) -> None:
        self._channel.read()
        self._obey()

    def _obey(self) -> None:
        channel = self._channel
        came: list[LiveInput] = []
        while channel.leases:
            came += self._accept(channel.leases.popleft())
        if self._batcher is not None:
            for live in came:
                self._batcher.add(live.lease.method, live, self._loop.time())
        elif came:
            executions = [Execution.of([live]) for live in came]
            # Before any of them runs, so that it is known whoever ends the process.
            self._tell_begun(executions)
            for execution in executions:
                self._run(execution)
        while channel.orders:
            kind, lease_id, *rest = channel.orders.popleft()
            if kind == ch.STOP_INPUT:
                self._stop(lease_id, *rest)
            else:
                self._raise_credit(lease_id, *rest)
        self._go_on()

    def _accept(self, lease: LeaseOrder) -> list[LiveInput]:
        entry = self._code.find(lease.method)
        position = 0
        came = []
        for offset, length in enumerate(lease.lengths):
            data = lease.payload[position : position + length]
            position += length
            live = LiveInput(lease, offset, data, entry, lease.credit)
            self._inputs[live.key] = live
            came.append(live)
        return came

    def _go_on(self) -> None:
        """Run the batches that are ready; leave when told to and nothing is left."""
        if self._batcher is not None:
            self._run_batches(self._batcher)
        if self._channel.is_stopping and not self._inputs and not self._execution_count:
            self._over.set()

    def _run_batches(self, batcher: Batcher[LiveInput]) -> None:
        if self._batch_timer is not None:
            self._batch_timer.cancel()
            self._batch_timer = None
        while batch := batcher.take(self._loop.time(), is_hurried=self._channel.is_stopping):
            execution = Execution.of(batch)
            self._tell_begun([execution])
            self._run(execution)
        due = batcher.deadline()
        if due is not None:
            self._batch_timer = self._loop.call_at(due, self._go_on)

    def _raise_credit(self, lease_id: int, upto: int) -> None:
        for live in list(self._inputs.values()):
            if live.lease.lease_id == lease_id:
                live.credit = max(live.credit, upto)
                if live.execution is not None:
                    live.execution.wake()

    def _stop(self, lease_id: int, index: int, reason: int) -> None:
        live = self._inputs.get((lease_id, index))
        if live is None:
            # Its output is on its way.
            return
        live.reason = reason
        execution = live.execution
        if execution is None:
            assert self._batcher is not None, "only in a batch an input waits"
            self._batcher.drop(live.lease.method, live)
            self._end([(live, self._stopped(live))], 0)
        elif sum(other.key in self._inputs for other in execution.inputs) > 1:
            # The batch goes on for the others. Its own calls are theirs from now on, before the
            # scheduler hears that this input is over and refuses it any.
            self._lead(execution)
            self._end([(live, self._stopped(live))], execution.duration_ns)
        else:
            execution.stop()

    # --- running ---

    def _tell_begun(self, executions: list[Execution]) -> None:
        ranges: list[list[int]] = []
        for execution in executions:
            for live in execution.inputs:
                lease_id, index = live.key
                last = ranges[-1] if ranges else None
                if last is not None and last[0] == lease_id and last[1] + last[2] == index:
                    last[2] += 1
                else:
                    ranges.append([lease_id, index, 1])
        self._channel.send_frame(ch.BEGUN, executions[0].began_ns, ranges)

    def _run(self, execution: Execution) -> None:
        self._execution_count += 1
        self._waits.input_began(execution.place)
        if execution.entry.is_async:
            execution.task = self._loop.create_task(self._run_async(execution))
            execution.task.add_done_callback(partial(self._on_task_done, execution))
        else:
            self._run_in_background(execution)

    def _run_in_background(self, execution: Execution) -> None:
        try:
            self._threads.run(partial(self._run_sync, execution))
        except ExecutionError as error:
            outputs = self._failed(error, None, execution.inputs)
            self._end(list(zip(execution.inputs, outputs, strict=True)), execution.duration_ns)
            # Later, as whoever began this one may be about to begin others.
            self._loop.call_soon(self._on_ended, execution)

    async def _run_async(self, execution: Execution) -> None:
        # A task has a context of its own.
        context.current_input.set(execution.place)
        calls = self._arguments(execution)
        if not calls:
            self._end_all(execution, [], [])
            return
        value: Any = None
        try:
            if execution.entry.is_generator:
                number = await self._generate_async(execution, *calls[0][1])
                outputs: list[Output] = [(Status.DONE, msgpack.packb(number), [])]
            else:
                args, kwargs = self._joined(execution, calls)
                value = await settled(execution.entry.function(*args, **kwargs))
                outputs = self._encoded(value, len(calls))
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: let out of a task, they would end the loop.
            outputs = self._failed(error, value, [live for live, _ in calls])
        self._end_all(execution, calls, outputs)

    def _on_task_done(self, execution: Execution, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            # Before its first step, when it could not catch that itself.
            left = [live for live in execution.inputs if live.key in self._inputs]
            self._end([(live, self._stopped(live)) for live in left], execution.duration_ns)
        elif (error := task.exception()) is not None:
            self._give_up(error)
        self._on_ended(execution)

    def _run_sync(self, execution: Execution) -> None:
        """In a thread, in a context of its own."""
        try:
            self._run_in_thread(execution)
        except BaseException as error:
            self._give_up(error)
        self._loop.call_soon_threadsafe(self._on_ended, execution)

    def _give_up(self, error: BaseException) -> NoReturn:
        """Not the user's code but ours has failed, and an input would wait for ever. The daemon
        knows what runs."""
        with contextlib.suppress(BaseException):
            traceback.print_exception(error)
        os._exit(70)

    def _run_in_thread(self, execution: Execution) -> None:
        context.current_input.set(execution.place)
        calls = self._arguments(execution)
        if not calls:
            self._end_all(execution, [], [])
            return
        value: Any = None
        try:
            if execution.entry.is_generator:
                number = self._generate(execution, *calls[0][1])
                outputs: list[Output] = [(Status.DONE, msgpack.packb(number), [])]
            else:
                args, kwargs = self._joined(execution, calls)
                function = partial(execution.entry.function, *args, **kwargs)
                value = execution.gate.run(function)
                outputs = self._encoded(value, len(calls))
        except BaseException as error:
            outputs = self._failed(error, value, [live for live, _ in calls])
        self._end_all(execution, calls, outputs)

    def _on_ended(self, execution: Execution) -> None:
        """The code of an execution has come to its end; in the loop's thread."""
        self._execution_count -= 1
        self._waits.input_ended(execution.place)
        # They know each other, and what they hold should not wait for the garbage collector.
        for live in execution.inputs:
            live.execution = None
        if self._batcher is not None:
            self._batcher.ended()
        self._go_on()

    # --- arguments ---

    def _arguments(
        self, execution: Execution
    ) -> list[tuple[LiveInput, tuple[tuple[Any, ...], dict[str, Any]]]]:
        """The arguments of those inputs that have any that fit. The others end here, alone."""
        calls = []
        for live in execution.inputs:
            try:
                blobs = live.lease.blobs
                buffers = [*map(self._store.private_buffer, blobs.get(live.offset, ()))]
                args, kwargs = decode_args(live.data, buffers)
                if self._batcher is not None:
                    self._check_fit(live, args, kwargs)
                calls.append((live, (args, kwargs)))
            except BaseException as error:
                self._end([(live, (*self._failure(live, error, None), []))], execution.duration_ns)
        if self._batcher is not None:
            self._lead(execution)
        return calls

    def _lead(self, execution: Execution) -> None:
        """Let the first input of a batch that still wants an output be the present one."""
        # A batch may look for it in its thread, while the loop stops one of its inputs.
        with self._lead_lock:
            for live in execution.inputs:
                if live.key in self._inputs and not live.reason:
                    place = execution.place
                    place.call_id, place.index = live.lease.call_id, live.index
                    place.lease_id = live.lease.lease_id
                    return

    def _signature(self, live: LiveInput) -> inspect.Signature:
        function = live.entry.function
        signature = self._signatures.get(function)
        if signature is None:
            signature = self._signatures[function] = inspect.signature(function)
        return signature

    def _check_fit(self, live: LiveInput, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._signature(live).bind(*args, **kwargs)
        except TypeError as error:
            name = getattr(live.entry.function, "__qualname__", "function")
            raise InvalidError(
                f"an input does not fit the batched {name}{self._signature(live)}: {error}"
            ) from None

    def _joined(
        self,
        execution: Execution,
        calls: list[tuple[LiveInput, tuple[tuple[Any, ...], dict[str, Any]]]],
    ) -> tuple[Any, dict[str, Any]]:
        """What the function is called with."""
        if self._batcher is None:
            return calls[0][1]
        return arguments_by_parameter(
            self._signature(execution.inputs[0]), [arguments for _, arguments in calls]
        )

    # --- generators ---

    def _generate(self, execution: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Run a sync generator to its end. Returns how many items it gave."""
        live, gate = execution.inputs[0], execution.gate
        credit = Credit(execution)
        stream = gate.run(partial(execution.entry.function, *args, **kwargs))
        step = partial(next, iter(stream), _END)
        number = 0
        try:
            while (value := gate.run(step)) is not _END:
                if number >= live.skip:
                    if number >= live.credit:
                        self._begin_item_wait(live, number)
                        try:
                            credit.wait(number)
                        finally:
                            self._waits.end(execution.place)
                    self._send_item(live, number, value)
                number += 1
        except BaseException:
            if hasattr(stream, "close"):
                # It may refuse to end, or fail at it; the first error is the one to tell.
                with contextlib.suppress(BaseException):
                    stream.close()
            raise
        return number

    async def _generate_async(
        self, execution: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int:
        live, credit, number = execution.inputs[0], AsyncCredit(execution), 0
        stream = execution.entry.function(*args, **kwargs)
        async with contextlib.AsyncExitStack() as stack:
            if hasattr(stream, "aclose"):
                stack.push_async_callback(stream.aclose)
            async for value in stream:
                if number >= live.skip:
                    if number >= live.credit:
                        self._begin_item_wait(live, number)
                        try:
                            await credit.wait(number)
                        finally:
                            self._waits.end(execution.place)
                    self._send_item(live, number, value)
                number += 1
        return number

    def _begin_item_wait(self, live: LiveInput, number: int) -> None:
        self._waits.begin()
        self._channel.send_frame(ch.ITEM_WAITS, *live.key, number)

    def _send_item(self, live: LiveInput, number: int, value: Any) -> None:
        """Hand over an item. An error is none, and so is raised.

        Raises:
            SerializationError: it cannot be pickled, or could not be written.
        """
        data, buffers = encode_value(value)
        drafts = self._write_drafts(buffers)
        lease_id, index = live.key
        status = int(Status.VALUE)
        entry = [lease_id, shared.KIND_ITEM, index, number, status, 0, len(data), drafts]
        self._channel.send_frame(ch.OUTPUTS, [entry], payload=data)

    # --- outputs ---

    def _encoded(self, value: Any, count: int) -> list[Output]:
        """The outputs in what the function gave.

        Raises:
            InvalidError: it gave no list, or one of another length than there were inputs.
            SerializationError: it cannot be pickled.
        """
        if self._batcher is None:
            return [(Status.VALUE, *encode_value(value))]
        if inspect.iscoroutine(value):
            value.close()
        if not isinstance(value, list):
            raise InvalidError(
                f"a batched function must return a list, of one result for each input; this one "
                f"returned a {type(value).__name__} for {count} inputs"
            )
        if len(value) != count:
            raise InvalidError(
                f"a batched function must return a list of one result for each input; this one "
                f"returned {len(value)} for {count} inputs"
            )
        outputs: list[Output] = []
        for one in value:
            try:
                outputs.append((Status.VALUE, *encode_value(one)))
            except BaseException as error:
                outputs.append((*error_output(error, one), []))
        return outputs

    def _failed(self, error: BaseException, value: Any, inputs: list[LiveInput]) -> list[Output]:
        """The outputs of code that raised."""
        return [(*self._failure(live, error, value), []) for live in inputs]

    def _failure(self, live: LiveInput, error: BaseException, value: Any) -> tuple[int, bytes]:
        if live.reason and is_stop(error):
            return self._stopped(live)[:2]
        return error_output(error, value)

    def _stopped(self, live: LiveInput) -> Output:
        call_id = live.lease.call_id
        payload = stopped_payload(live.reason, self._timeout_s, call_id, live.index)
        return Status.FAILURE, payload, []

    def _end_all(self, execution: Execution, calls: list[Any], outputs: list[Output]) -> None:
        lives = [live for live, _ in calls]
        execution.place.is_over = True
        for stream in self._streams:
            stream.flush_input(execution.place)
        self._end(list(zip(lives, outputs, strict=True)), execution.duration_ns)

    def _end(self, outputs: list[tuple[LiveInput, Output]], duration_ns: int) -> None:
        """These inputs end; each only once, whoever says it first."""
        claimed = [entry for entry in outputs if self._inputs.pop(entry[0].key, None) is not None]
        if not claimed:
            return
        self._send(claimed, duration_ns)

    def _send(self, outputs: list[tuple[LiveInput, Output]], duration_ns: int) -> None:
        """Hand over outputs; many small ones in one frame."""
        entries: list[list[Any]] = []
        parts: list[bytes] = []
        size = 0
        for live, output in outputs:
            status, data, drafts = self._portable(*output)
            cost = len(data) + _ENTRY_SIZE_BYTES * (1 + len(drafts))
            if entries and size + cost > _FRAME_SIZE_BYTES:
                self._channel.send_frame(ch.OUTPUTS, entries, payload=b"".join(parts))
                entries, parts, size = [], [], 0
            lease_id, index = live.key
            entries.append(
                [
                    lease_id,
                    shared.KIND_OUTPUT,
                    index,
                    0,
                    int(status),
                    duration_ns,
                    len(data),
                    drafts,
                ]
            )
            parts.append(data)
            size += cost
        self._channel.send_frame(ch.OUTPUTS, entries, payload=b"".join(parts))
