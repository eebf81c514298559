"""What a container that runs several inputs keeps of each: the inputs, and the code that runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fanout import context
from fanout.exceptions import InputCancellation
from fanout_worker.runtime.loader import Entry
from fanout_worker.runtime.runner import LeaseOrder
from fanout_worker.runtime.threads import StopGate

#: Status, bytes, and the large buffers beside them.
Output = tuple[int, bytes, list[memoryview]]


@dataclass(slots=True, eq=False)
class LiveInput:
    """An input without an output."""

    lease: LeaseOrder
    offset: int
    data: bytes | memoryview
    entry: Entry
    #: Items of its generator below this may be sent.
    credit: int
    #: Why it was asked to stop (`shared.REASON_...`); 0: it was not.
    reason: int = 0
    #: What runs it; None while it waits for its batch.
    execution: Execution | None = None

    @property
    def index(self) -> int:
        return self.lease.start + self.offset

    @property
    def key(self) -> tuple[int, int]:
        return self.lease.lease_id, self.index

    @property
    def skip(self) -> int:
        """So many items of its generator are there already; a lease knows it of its first input."""
        return self.lease.skip if self.offset == 0 else 0


@dataclass(slots=True, eq=False)
class Execution:
    """User code that runs, for one input or for a batch of them."""

    inputs: list[LiveInput]
    entry: Entry
    #: What the code finds to be the present input: of a batch, the first that was not
    #: stopped. Always this object, as who waits is told by it.
    place: context.InputContext
    began_ns: int = field(default_factory=time.perf_counter_ns)
    is_stopped: bool = False
    #: Async code.
    task: asyncio.Task[None] | None = None
    #: Sync code.
    gate: StopGate = field(default_factory=StopGate)
    #: Its generator waits for credit and may be called by this, in the loop's thread.
    wake: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, inputs: list[LiveInput]) -> Execution:
        """What runs these inputs, which are for the same function."""
        first = inputs[0]
        place = context.InputContext(first.lease.call_id, first.index, first.lease.lease_id)
        execution = cls(inputs, first.entry, place)
        for live in inputs:
            live.execution = execution
        return execution

    @property
    def duration_ns(self) -> int:
        """The time of each of its inputs, until now."""
        return (time.perf_counter_ns() - self.began_ns) // len(self.inputs)

    def stop(self) -> None:
        """Raise in the code; in the loop's thread."""
        if self.is_stopped:
            return
        self.is_stopped = True
        if self.task is not None:
            self.task.cancel()
        else:
            self.gate.ask()
            self.wake()


class Credit:
    """A sync generator's wait for credit, in its own thread."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._news = threading.Event()
        execution.wake = self._news.set

    def wait(self, number: int) -> None:
        """Until item `number` may be sent.

        Raises:
            InputCancellation: the input was asked to stop.
        """
        live = self._execution.inputs[0]
        while number >= live.credit:
            if self._execution.gate.is_asked:
                raise InputCancellation("the input was asked to stop")
            self._news.wait()
            self._news.clear()


class AsyncCredit:
    """An async generator's wait for credit. Its task is cancelled to stop it."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._news = asyncio.Event()
        execution.wake = self._news.set

    async def wait(self, number: int) -> None:
        """Until item `number` may be sent."""
        live = self._execution.inputs[0]
        while number >= live.credit:
            await self._news.wait()
            self._news.clear()


def is_stop(error: BaseException) -> bool:
    """Whether an error is how an input that was asked to stop does so."""
    return isinstance(error, InputCancellation | asyncio.CancelledError)


def arguments_by_parameter(
    signature: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a batched function: one list for each parameter.

    Args:
        signature: that of the function, an `inspect.Signature`.
        calls: arguments of each input, which fit it.
    """
    bound = [signature.bind(*args, **kwargs) for args, kwargs in calls]
    for one in bound:
        one.apply_defaults()
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        column = [one.arguments[name] for one in bound]
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = column
        else:
            args.append(column)
    return args, kwargs
