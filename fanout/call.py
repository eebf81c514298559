"""A handle of a spawned call: its results, now or from another process later."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from fanout.context import CALL_PREFIX
from fanout.exceptions import InvalidError, NotFoundError, OutputExpiredError
from fanout.twin import Twin, shorten, twin

if TYPE_CHECKING:
    from fanout.types import InputInfo

R = TypeVar("R")
T = TypeVar("T")

PREFIX = CALL_PREFIX


class FunctionCall(Generic[R]):
    """A call made by `spawn` or `spawn_map`. It goes on when this process ends; anybody with its
    `object_id` and the same scheduler can collect the results, for seven days."""

    __slots__ = ("_call_id",)

    def __init__(self, call_id: bytes) -> None:
        self._call_id = call_id

    @classmethod
    def from_id(cls, object_id: str, client: Any = None) -> FunctionCall[Any]:
        """The call with this id. Whether there is one is seen when it is used.

        Args:
            object_id: ``"fc-"`` and 32 hexadecimal digits, as `object_id` gives it.
            client: as in Modal; ignored, since FANOUT_URL names the scheduler.

        Raises:
            InvalidError: it does not have that form.
        """
        text = object_id.removeprefix(PREFIX) if isinstance(object_id, str) else ""
        try:
            call_id = bytes.fromhex(text)
        except ValueError:
            call_id = b""
        if len(call_id) != 16 or not object_id.startswith(PREFIX):
            raise InvalidError(
                f"{object_id!r} is not the id of a call; it must be {PREFIX!r} and 32 hexadecimal "
                "digits, as FunctionCall.object_id gives it"
            )
        return FunctionCall(call_id)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            from fanout.compat import missing_attribute

            raise missing_attribute("FunctionCall", name)

    @property
    def object_id(self) -> str:
        """The id to come back with: ``fc-`` and 32 hexadecimal digits."""
        return PREFIX + self._call_id.hex()

    def __repr__(self) -> str:
        return f"FunctionCall.from_id({self.object_id!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FunctionCall):
            return NotImplemented
        return self._call_id == other._call_id

    def __hash__(self) -> int:
        return hash(self._call_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionCall, (self._call_id,)

    async def _get(self, timeout: float | None = None, *, index: int = 0) -> R:
        """The result of one input. It stays with the scheduler and can be asked for again.

        Args:
            timeout: seconds to wait; None waits for ever, 0 looks once.
            index: of the input; 0 for `spawn`.

        Raises:
            TimeoutError: the builtin: it is not there in time.
            NotFoundError: the scheduler knows no such call.
            OutputExpiredError: its results were kept their time, and are gone.
            InvalidError: the call has no input of that index.
            Exception: what the function raised.
        """
        from fanout.client.fetch import get_output

        value: R = await get_output(self._call_id, index, timeout, self.object_id)
        return value

    async def _num_inputs(self) -> int:
        """How many inputs the call has, so far.

        Raises:
            NotFoundError: the scheduler knows no such call.
        """
        return int((await self._info()).input_count)

    async def _cancel(self, terminate_containers: bool = False) -> None:
        """End the call: what runs is stopped, and what has no result yet ends with
        `InputCancelledError`. Calls that its inputs have made end with it, spawned ones excepted.

        Args:
            terminate_containers: kill the containers that run it, instead of raising
                `InputCancellation` in the code first. Inputs of other calls that they had run
                elsewhere, and are not charged an attempt.

        Raises:
            NotFoundError: the scheduler knows no such call.
        """
        from fanout.client.fetch import cancel_call

        await self._info()
        await cancel_call(self._call_id, terminate_containers)

    async def _get_call_graph(self) -> list[InputInfo]:
        """The inputs of the call, each with the inputs of the calls that it made, and so on: a tree
        for each input. What the scheduler knows now: at most 1000 inputs, those nearest to this
        call; of calls that are over, the newest; after a restart of the scheduler, only what came
        since. A line on the log says when something is missing.

        Raises:
            NotFoundError: the scheduler knows no such call.
        """
        from fanout.client.fetch import ask_graph

        return await ask_graph(self._call_id, self.object_id)

    async def _info(self) -> Any:
        from fanout.client.fetch import GONE, ask_call

        info = await ask_call(self._call_id)
        if info.state in GONE:
            raise gone(self.object_id, info.state)
        return info

    async def _iter_aio(self, *, start: int = 0, end: int | None = None) -> AsyncGenerator[R, None]:
        """The results of inputs `start` to `end` (all, if None), in order, as they come.

        Raises:
            ValueError: the range does not lie within the call.
            NotFoundError: the scheduler knows no such call.
            Exception: what the function raised, in the place of its result.
        """
        from fanout.client.fetch import Reader

        reader = Reader(self._call_id, start, await self._check_range(start, end))
        try:
            while (values := await reader.next_values()) is not None:
                for value in values:
                    yield value
        except BaseException as error:
            shorten(error)
            raise
        finally:
            reader.close()

    def _iter(self, *, start: int = 0, end: int | None = None) -> Generator[R, None, None]:
        from fanout.client import loop
        from fanout.client.fetch import Reader

        loop.forbid_in_loop("FunctionCall.iter", "async for x in call.iter.aio(...)")
        stop = loop.run(lambda: self._check_range(start, end))
        reader = Reader(self._call_id, start, stop)
        try:
            while (values := loop.run(reader.next_values)) is not None:
                yield from values
        except BaseException as error:
            shorten(error)
            raise
        finally:
            loop.background_loop().call_soon_threadsafe(reader.close)

    _iter.__doc__ = _iter_aio.__doc__

    async def _check_range(self, start: int, end: int | None) -> int:
        count = await self._num_inputs()
        stop = count if end is None else end
        if not 0 <= start <= stop <= count:
            raise ValueError(
                f"range {start} to {stop} does not lie within the {count} inputs of the call"
            )
        return stop

    #: The first result of each of several calls.
    gather: ClassVar[_Gather]
    get = twin(_get)
    num_inputs = twin(_num_inputs)
    cancel = twin(_cancel)
    get_call_graph = twin(_get_call_graph)
    iter = Twin(_iter, _iter_aio)


class _Gather:
    """`FunctionCall.gather`: blocking when called, `aio` for asyncio. Written out, because a
    `Twin` is a method of an object."""

    def __call__(self, *calls: FunctionCall[T]) -> list[T]:
        """The first result of each call, in order. Raises the first error; the other calls go
        on."""
        from fanout.client import loop

        loop.forbid_in_loop("FunctionCall.gather", "await FunctionCall.gather.aio(...)")
        try:
            return loop.run(lambda: self.aio(*calls))
        except BaseException as error:
            shorten(error)
            raise

    async def aio(self, *calls: FunctionCall[T]) -> list[T]:
        """The same for asyncio."""
        import asyncio

        tasks = [asyncio.ensure_future(call.get.aio()) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException as error:
            shorten(error)
            raise
        finally:
            for task in tasks:
                task.cancel()


FunctionCall.gather = _Gather()


def gone(object_id: str, state: str) -> NotFoundError | OutputExpiredError:
    """The error for the id of a call of which the scheduler has nothing; `state` as `CallInfo` has
    it."""
    if state == "expired":
        return OutputExpiredError(
            f"the results of call {object_id} were kept their time, 7 days from its end, and are "
            "gone; collect them earlier, or have the function write them where they stay"
        )
    return NotFoundError(
        f"the scheduler knows no call {object_id}: it was made at another one, its results have "
        "expired long ago, or it was not made by spawn or spawn_map"
    )
