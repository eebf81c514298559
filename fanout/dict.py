"""A dict between processes: functions, their callers, and anybody else with the same scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from fanout import config
from fanout.client.objects import Handle, ObjectManager, exchange, nothing, table, values_of
from fanout.exceptions import RequestSizeError
from fanout.protocol import messages as m
from fanout.serialization import decode_in_band, encode_in_band, encode_key
from fanout.twin import BoundTwin, Twin, twin

_NONE = object()


class Dict(Handle):
    """Keys and values that any number of processes may read and write::

        seen = fanout.Dict.from_name("seen", create_if_missing=True)
        seen["a"] = 1
        if seen.put("lock", "mine", skip_if_exists=True):
            ...

    What is written has been on the scheduler's disk since the call returned. Values are pickled
    copies: after changing one that you read, put it again. Keys are the same when their pickles
    are; so use texts, numbers, bytes and tuples of them. (`1`, `1.0` and `True` are three keys.)

    Key and value have at most 16 MiB together, a key at most 64 KiB. An entry that nobody reads or
    writes for 7 days expires.
    """

    __slots__ = ()

    _TYPE = m.ObjectType.DICT
    _PREFIX = "di-"
    _EXAMPLE = "dict"

    objects: ClassVar[ObjectManager[Dict]]
    #: Deletes one by its name; the same as `objects.delete`.
    delete: ClassVar[BoundTwin[..., None, Coroutine[Any, Any, None]]]
    #: Or else `for x in d` would ask for the keys 0, 1, 2, ...
    __iter__ = None

    async def _hydrate(self) -> Dict:
        """Look it up now, or make it, and not at its first use; returns itself.

        Raises:
            NotFoundError: there is none.
        """
        await self._resolve()
        return self

    async def _get(self, key: Any, default: Any = None) -> Any:
        """The value of a key, or `default` if the key is not there.

        Raises:
            NotFoundError: there is no such dict.
            DeserializationError: the value cannot be unpickled here.
        """
        return await self._look(key, m.Look.GET, default)

    async def _contains(self, key: Any) -> bool:
        """Whether the key is there.

        Raises:
            NotFoundError: there is no such dict.
        """
        return bool(await self._look(key, m.Look.CONTAINS, False))

    async def _pop(self, key: Any, default: Any = _NONE) -> Any:
        """Remove a key and return its value. Of several who do it at once, one gets the value.

        Args:
            default: returned if the key is not there.

        Raises:
            KeyError: the key is not there, and no default was given.
            NotFoundError: there is no such dict.
            DeserializationError: the value cannot be unpickled here; the key is removed.
        """
        value = await self._look(key, m.Look.POP, default)
        if value is _NONE:
            raise KeyError(key)
        return value

    async def _look(self, key: Any, look: m.Look, default: Any) -> Any:
        raw = _key(key)
        object_id = await self._resolve()
        answer = await exchange(lambda n: m.DictGet(n, object_id, look, raw), nothing)
        assert answer is not None
        if not answer.number:
            return default
        if look == m.Look.CONTAINS:
            return True
        return self._decoded(values_of(answer)[0], key)

    def _decoded(self, data: memoryview, key: Any) -> Any:
        return decode_in_band(data, f"the value of key {key!r} of {self!r}")

    async def _put(self, key: Any, value: Any, *, skip_if_exists: bool = False) -> bool:
        """Set the value of a key.

        Args:
            key, value: any values that can be pickled, of at most 64 KiB and 16 MiB then.
            skip_if_exists: leave a key that is there alone. Of several who do it at once, one
                gets True.

        Returns:
            Whether it was set.

        Raises:
            NotFoundError: there is no such dict.
            RequestSizeError: key or value are too large.
            SerializationError: one of them cannot be pickled.
            ResourceExhaustedError: the scheduler's memory for queues and dicts is full.
            StorageError: the scheduler's disk is full.
        """
        return bool(await self._set([_entry(key, value)], skip_if_exists))

    async def _update(self, other: Any = None, /, **kwargs: Any) -> None:
        """Set many: those of a mapping or of an iterable of pairs, then the keyword arguments.

        One request of up to 5,000 entries and 16 MiB is done as a whole; more take several.

        Raises:
            NotFoundError, RequestSizeError, SerializationError, ResourceExhaustedError,
            StorageError: as for `put`; those that were sent in earlier requests are set.
        """
        pairs: Iterable[tuple[Any, Any]] = ()
        if other is not None:
            pairs = other.items() if isinstance(other, Mapping) else other
        # All of them first, so that one that cannot be sent is found before any is.
        entries = [_entry(key, value) for key, value in [*pairs, *kwargs.items()]]
        batch: list[tuple[bytes, bytes]] = []
        size = 0
        for entry in entries:
            entry_size = len(entry[0]) + len(entry[1])
            is_full = size + entry_size > config.OBJECT_REQUEST_SIZE_BYTES_MAX
            if batch and (is_full or len(batch) >= m.VALUES_MAX // 2):
                await self._set(batch, False)
                batch, size = [], 0
            batch.append(entry)
            size += entry_size
        if batch:
            await self._set(batch, False)

    async def _set(self, entries: list[tuple[bytes, bytes]], if_missing: bool) -> int:
        lengths, payload = table(part for entry in entries for part in entry)
        object_id = await self._resolve()
        answer = await exchange(
            lambda n: m.DictPut(n, object_id, if_missing, lengths, payload), nothing
        )
        assert answer is not None
        return answer.number

    async def _len(self) -> int:
        """How many keys there are.

        Raises:
            NotFoundError: there is no such dict.
        """
        return await self._act(m.Action.LEN)

    async def _clear(self) -> None:
        """Remove all keys.

        Raises:
            NotFoundError: there is no such dict.
        """
        await self._act(m.Action.CLEAR)

    # --- going through all -----------------------------------------------------------------------

    async def _page(
        self, after: int, has_keys: bool, has_values: bool
    ) -> tuple[list[Any], int] | None:
        """Keys, values or pairs behind number `after`, and the number of the last one."""
        object_id = await self._resolve()
        answer = await exchange(
            lambda n: m.DictScan(n, object_id, after, has_keys, has_values), nothing
        )
        assert answer is not None
        raw = values_of(answer)
        if not raw:
            return None
        if not has_values:
            return [_decoded_key(data) for data in raw], answer.number
        if not has_keys:
            what = f"a value of {self!r}"
            return [decode_in_band(data, what) for data in raw], answer.number
        keys = [_decoded_key(data) for data in raw[::2]]
        values = [self._decoded(data, key) for key, data in zip(keys, raw[1::2], strict=True)]
        return list(zip(keys, values, strict=True)), answer.number

    async def _scan_aio(self, has_keys: bool, has_values: bool) -> AsyncIterator[Any]:
        after = 0
        while (page := await self._page(after, has_keys, has_values)) is not None:
            found, after = page
            for one in found:
                yield one

    def _scan(self, name: str, has_keys: bool, has_values: bool) -> Iterator[Any]:
        from fanout.client import loop

        loop.forbid_in_loop(f"Dict.{name}", f"async for x in dict.{name}.aio()")
        after = 0
        while (
            page := loop.run(
                lambda after=after: self._page(after, has_keys, has_values)  # type: ignore[misc]
            )
        ) is not None:
            found, after = page
            yield from found

    def _keys(self) -> Iterator[Any]:
        """The keys, in the order in which they came. What is changed meanwhile may be missed.

        Raises:
            NotFoundError: there is no such dict.
            DeserializationError: a key cannot be unpickled here.
        """
        return self._scan("keys", True, False)

    def _keys_aio(self) -> AsyncIterator[Any]:
        return self._scan_aio(True, False)

    def _values(self) -> Iterator[Any]:
        """The values, in the order of `keys`.

        Raises:
            NotFoundError: there is no such dict.
            DeserializationError: a value cannot be unpickled here.
        """
        return self._scan("values", False, True)

    def _values_aio(self) -> AsyncIterator[Any]:
        return self._scan_aio(False, True)

    def _items(self) -> Iterator[tuple[Any, Any]]:
        """Keys and values as pairs, in the order of `keys`.

        Raises:
            NotFoundError: there is no such dict.
            DeserializationError: a key or value cannot be unpickled here.
        """
        return self._scan("items", True, True)

    def _items_aio(self) -> AsyncIterator[tuple[Any, Any]]:
        return self._scan_aio(True, True)

    hydrate = twin(_hydrate)
    get = twin(_get)
    contains = twin(_contains)
    pop = twin(_pop)
    put = twin(_put)
    update = twin(_update)
    len = twin(_len)
    clear = twin(_clear)
    keys = Twin(_keys, _keys_aio)
    values = Twin(_values, _values_aio)
    items = Twin(_items, _items_aio)

    # --- operators: blocking only ----------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        value = self.get(key, _NONE)
        if value is _NONE:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.put(key, value)

    def __delitem__(self, key: Any) -> None:
        self.pop(key)

    def __contains__(self, key: Any) -> bool:
        return self.contains(key)


Dict.objects = ObjectManager(Dict)
Dict.delete = Dict.objects.delete


def _key(key: Any) -> bytes:
    raw = encode_key(key)
    if len(raw) > m.DICT_KEY_SIZE_MAX:
        raise RequestSizeError(
            f"a key has {len(raw)} bytes, at most {m.DICT_KEY_SIZE_MAX} are possible: use a hash "
            "of it"
        )
    return raw


def _decoded_key(data: memoryview) -> Any:
    return decode_in_band(data, "a key")


def _entry(key: Any, value: Any) -> tuple[bytes, bytes]:
    """Key and value as bytes, every limit checked before anything is sent."""
    raw = _key(key)
    data = encode_in_band(value, f"the value of key {key!r}")
    if len(raw) + len(data) > config.OBJECT_REQUEST_SIZE_BYTES_MAX:
        raise RequestSizeError(
            f"key {key!r} and its value have {len(raw) + len(data)} bytes, an entry of a dict at "
            f"most {config.OBJECT_REQUEST_SIZE_BYTES_MAX}: put it into a file, and its path here"
        )
    return raw, data
