"""A queue between processes: functions, their callers, and anybody else with the same scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from queue import Empty, Full
from typing import Any, ClassVar

from fanout import config
from fanout.client.objects import Handle, ObjectManager, exchange, table, values_of
from fanout.exceptions import DeserializationError, InvalidError, RequestSizeError
from fanout.protocol import messages as m
from fanout.serialization import decode_in_band, encode_in_band
from fanout.twin import BoundTwin, Twin, twin

#: Items in one page of an iteration.
_PAGE_ITEMS_MAX = 1000


def _warns_of_timeout(position: int) -> Callable[..., None]:
    """Warns of a timeout that means nothing; `block` and `timeout` are arguments of a method from
    this position on."""

    def warn(*args: Any, **given: Any) -> None:
        by_position = dict(zip(("block", "timeout"), args[position:], strict=False))
        values = {"block": True, "timeout": None, **by_position, **given}
        if not values["block"] and values["timeout"] is not None:
            from fanout.warning import warn_user

            warn_user("timeout= means nothing with block=False")

    return warn


class Queue(Handle):
    """A FIFO of Python values that any number of processes may put into and get from::

        queue = fanout.Queue.from_name("to-do", create_if_missing=True)

        @app.function()
        def work():
            while (item := queue.get(timeout=60)) is not None:
                ...

    Each item goes to one `get`. A put that has returned is on the scheduler's disk; an item that a
    client got is gone, and one whose client died before the item arrived goes to the next. See
    `docs/queues_and_dicts.md` for the exact rule.

    A queue has up to 100,000 *partitions*, each a FIFO of its own with up to 5,000 items; without
    `partition=` the default one is meant. An item is at most 1 MiB, pickled. A partition expires
    `partition_ttl` seconds after the last put into it.
    """

    __slots__ = ()

    _TYPE = m.ObjectType.QUEUE
    _PREFIX = "qu-"
    _EXAMPLE = "queue"

    objects: ClassVar[ObjectManager[Queue]]
    #: Deletes one by its name; the same as `objects.delete`.
    delete: ClassVar[BoundTwin[..., None, Coroutine[Any, Any, None]]]

    async def _hydrate(self) -> Queue:
        """Look it up now, or make it, and not at its first use; returns itself.

        Raises:
            NotFoundError: there is none.
        """
        await self._resolve()
        return self

    async def _get(
        self, block: bool = True, timeout: float | None = None, *, partition: str | None = None
    ) -> Any:
        """Take the next item.

        Args:
            block: wait for one; otherwise None is returned if there is none.
            timeout: seconds to wait; None waits for ever.
            partition: which FIFO: 1 to 64 bytes in UTF-8, or None for the default one.

        Raises:
            queue.Empty: none came in time.
            NotFoundError: there is no such queue.
            DeserializationError: the item cannot be unpickled here. It is in the queue again.
        """
        values = await self._take(1, block, timeout, partition)
        return values[0] if values else None

    async def _get_many(
        self,
        n_values: int,
        block: bool = True,
        timeout: float | None = None,
        *,
        partition: str | None = None,
    ) -> list[Any]:
        """Take up to `n_values` items, as many as are there, as soon as there is one. They are
        fewer than are there when they have more than 16 MiB together.

        Args:
            n_values: at least 0.
            block: wait for the first one; otherwise [] is returned if there is none.
            timeout: seconds to wait for it; None waits for ever.
            partition: as for `get`.

        Raises:
            queue.Empty: none came in time.
            NotFoundError: there is no such queue.
            DeserializationError: an item cannot be unpickled here. All are in the queue again.
        """
        if type(n_values) is not int or n_values < 0:
            raise InvalidError(f"n_values={n_values!r}: must be an int of at least 0")
        return await self._take(n_values, block, timeout, partition)

    async def _take(
        self, count: int, block: bool, timeout: float | None, partition: str | None
    ) -> list[Any]:
        key = _partition_key(partition)
        _check_timeout(timeout)
        object_id = await self._resolve()
        values = await exchange(
            lambda number: m.QueueGet(number, object_id, key, min(count, m.VALUES_MAX), block),
            self._decoded,
            timeout=timeout,
            waits=block,
        )
        if values is None and block:
            raise Empty
        return values or []

    def _decoded(self, answer: m.ObjectAnswer) -> list[Any]:
        values = values_of(answer)
        try:
            return [decode_in_band(value, f"an item of {self!r}") for value in values]
        except DeserializationError as error:
            items = "The item is" if len(values) == 1 else f"All {len(values)} items are"
            raise DeserializationError(f"{error}. {items} in the queue again") from error

    async def _put(
        self,
        v: Any,
        block: bool = True,
        timeout: float | None = None,
        *,
        partition: str | None = None,
        partition_ttl: float = config.QUEUE_PARTITION_TTL_S,
    ) -> None:
        """Append an item.

        Args:
            v: any value that can be pickled, of at most 1 MiB then.
            block: wait for room.
            timeout: seconds to wait; None waits for ever.
            partition: as for `get`.
            partition_ttl: seconds after which the partition expires if nothing else is put into
                it; at most 7 days.

        Raises:
            queue.Full: there is no room, or none in time.
            NotFoundError: there is no such queue.
            RequestSizeError: the item is too large.
            SerializationError: it cannot be pickled.
            ResourceExhaustedError: the scheduler's memory for queues and dicts is full.
            StorageError: the scheduler's disk is full.
        """
        await self._append([v], block, timeout, partition, partition_ttl)

    async def _put_many(
        self,
        vs: list[Any],
        block: bool = True,
        timeout: float | None = None,
        *,
        partition: str | None = None,
        partition_ttl: float = config.QUEUE_PARTITION_TTL_S,
    ) -> None:
        """Append items: all of them, or none.

        Args:
            vs: at most 5,000, of at most 16 MiB together.
            block: wait until there is room for all.
            timeout, partition, partition_ttl: as for `put`.

        Raises:
            queue.Full: there is no room, or none in time.
            InvalidError: a partition never has room for so many.
            NotFoundError, RequestSizeError, SerializationError, ResourceExhaustedError,
            StorageError: as for `put`.
        """
        await self._append(list(vs), block, timeout, partition, partition_ttl)

    async def _append(
        self,
        values: list[Any],
        block: bool,
        timeout: float | None,
        partition: str | None,
        ttl_s: float,
    ) -> None:
        key = _partition_key(partition)
        _check_timeout(timeout)
        if type(ttl_s) not in (int, float) or not 0 < ttl_s <= config.QUEUE_PARTITION_TTL_S_MAX:
            raise InvalidError(
                f"partition_ttl={ttl_s!r}: must be more than 0 and at most "
                f"{config.QUEUE_PARTITION_TTL_S_MAX:.0f} seconds"
            )
        lengths, payload = table(_pickled(values))
        object_id = await self._resolve()
        done = await exchange(
            lambda n: m.QueuePut(n, object_id, key, ttl_s, block, lengths, payload),
            lambda answer: True,
            timeout=timeout,
            waits=block,
        )
        if done is None:
            raise Full

    async def _len(self, *, partition: str | None = None, total: bool = False) -> int:
        """How many items can be taken.

        Args:
            partition: as for `get`.
            total: of all partitions together.

        Raises:
            NotFoundError: there is no such queue.
        """
        if total and partition is not None:
            raise InvalidError("len(partition=, total=True): give one of the two")
        return await self._act(
            m.Action.LEN_TOTAL if total else m.Action.LEN, _partition_key(partition)
        )

    async def _clear(self, *, partition: str | None = None, all: bool = False) -> None:
        """Throw away what is in a partition.

        Args:
            partition: as for `get`.
            all: of all partitions.

        Raises:
            NotFoundError: there is no such queue.
        """
        if all and partition is not None:
            raise InvalidError("clear(partition=, all=True): give one of the two")
        await self._act(m.Action.CLEAR_ALL if all else m.Action.CLEAR, _partition_key(partition))

    async def _iterate_aio(
        self, *, partition: str | None = None, item_poll_timeout: float = 0.0
    ) -> AsyncIterator[Any]:
        """Look at all items, from the next one on, and leave them in the queue.

        Args:
            partition: as for `get`.
            item_poll_timeout: seconds to wait for another item, after which it ends.

        Raises:
            NotFoundError: there is no such queue.
            DeserializationError: an item cannot be unpickled here.
        """
        after = 0
        while (page := await self._page(partition, after, item_poll_timeout)) is not None:
            values, after = page
            for value in values:
                yield value

    def _iterate(
        self, *, partition: str | None = None, item_poll_timeout: float = 0.0
    ) -> Iterator[Any]:
        from fanout.client import loop

        loop.forbid_in_loop("Queue.iterate", "async for x in queue.iterate.aio(...)")
        after = 0
        while (
            page := loop.run(
                lambda after=after: self._page(partition, after, item_poll_timeout)  # type: ignore[misc]
            )
        ) is not None:
            values, after = page
            yield from values

    _iterate.__doc__ = _iterate_aio.__doc__

    async def _page(
        self, partition: str | None, after: int, timeout: float | None
    ) -> tuple[list[Any], int] | None:
        """The items behind number `after`, and the number of the last one."""
        key = _partition_key(partition)
        if timeout is None:
            raise InvalidError(
                "item_poll_timeout=None: must be at least 0 seconds; an iteration ends when no new "
                "item came for that long"
            )
        _check_timeout(timeout)
        object_id = await self._resolve()
        waits = timeout > 0
        return await exchange(
            lambda n: m.QueuePeek(n, object_id, key, after, _PAGE_ITEMS_MAX, waits),
            lambda answer: (
                [decode_in_band(value, f"an item of {self!r}") for value in values_of(answer)],
                answer.number,
            ),
            timeout=timeout,
            waits=waits,
        )

    hydrate = twin(_hydrate)
    get = twin(_get, _warns_of_timeout(0))
    get_many = twin(_get_many, _warns_of_timeout(1))
    put = twin(_put, _warns_of_timeout(1))
    put_many = twin(_put_many, _warns_of_timeout(1))
    len = twin(_len)
    clear = twin(_clear)
    iterate = Twin(_iterate, _iterate_aio)


Queue.objects = ObjectManager(Queue)
Queue.delete = Queue.objects.delete


def _partition_key(partition: str | None) -> bytes:
    if partition is None:
        return b""
    key = partition.encode(errors="surrogatepass") if isinstance(partition, str) else b""
    if not 1 <= len(key) <= m.PARTITION_SIZE_MAX:
        raise InvalidError(
            f"partition={partition!r}: must be a text of 1 to {m.PARTITION_SIZE_MAX} bytes in "
            "UTF-8, or None"
        )
    return key


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and (type(timeout) not in (int, float) or not timeout >= 0):
        raise InvalidError(f"timeout={timeout!r}: must be None or at least 0 seconds")


def _pickled(values: list[Any]) -> list[bytes]:
    """The items as bytes, every limit checked before anything is sent."""
    if len(values) > config.QUEUE_PARTITION_ITEMS_MAX:
        raise InvalidError(
            f"{len(values)} items at once: a partition has room for "
            f"{config.QUEUE_PARTITION_ITEMS_MAX}; put fewer at a time"
        )
    pickled = []
    for position, value in enumerate(values):
        what = "the item" if len(values) == 1 else f"item {position}"
        data = encode_in_band(value, what)
        if len(data) > config.QUEUE_ITEM_SIZE_BYTES_MAX:
            raise RequestSizeError(
                f"{what} has {len(data)} bytes, an item of a queue at most "
                f"{config.QUEUE_ITEM_SIZE_BYTES_MAX}: put it into a file or a Dict, and its path "
                "or key into the queue"
            )
        pickled.append(data)
    size = sum(map(len, pickled))
    if size > config.OBJECT_REQUEST_SIZE_BYTES_MAX:
        raise RequestSizeError(
            f"{len(pickled)} items have {size} bytes together, one put_many at most "
            f"{config.OBJECT_REQUEST_SIZE_BYTES_MAX}: put fewer at a time"
        )
    return pickled
