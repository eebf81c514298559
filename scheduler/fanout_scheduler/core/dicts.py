"""Dicts: keys and values, both bytes that the scheduler never looks into.

What is read is on disk. Of each key one change at a time is on its way there; the next one waits
for it, in the order of coming, so that it is decided on what is true and not on what may yet fail:
`if_missing` can serve as a lock. A change of all keys (`clear`) waits for all others.

An entry that nobody has used for `DICT_ENTRY_RETENTION_S` expires, within the hour. When an entry
was used is not written down: a restart counts as use.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

from fanout.config import DICT_ENTRY_RETENTION_S, OBJECT_REQUEST_SIZE_BYTES_MAX
from fanout.protocol import messages as m
from fanout_scheduler.core import durable
from fanout_scheduler.core.events import ForgetRecord, Record
from fanout_scheduler.core.object_requests import (
    answer_of,
    charge,
    commit,
    done,
    finish,
    has_room,
    hold,
    no_room_text,
    receipt,
    refuse,
    refuse_missing,
    split,
)
from fanout_scheduler.core.object_state import Entry, Request, StoredObject, entry_key
from fanout_scheduler.core.state import State

SWEEP_INTERVAL_S = 3600.0
#: Bytes and entries of one page of a scan.
PAGE_SIZE_BYTES_MAX = 1 << 20
PAGE_ENTRIES_MAX = m.VALUES_MAX // 2


# --- reading -------------------------------------------------------------------------------------


def on_get(state: State, request: Request) -> None:
    message: m.DictGet = request.message
    if not 1 <= len(message.payload) <= m.DICT_KEY_SIZE_MAX:
        refuse(state, request, "size", f"a key is at most {m.DICT_KEY_SIZE_MAX} bytes")
        return
    if message.look == m.Look.POP:
        hold(state, request, len(message.payload))
        change(state, request)
        return
    entry = request.of.entries.get(bytes(message.payload))
    if entry is None:
        finish(state, request, answer_of(request.request_id))
        return
    entry.used_at = state.now
    values = [entry.value] if message.look == m.Look.GET else []
    finish(state, request, answer_of(request.request_id, number=1, values=values))


def on_scan(state: State, request: Request) -> None:
    message: m.DictScan = request.message
    of = request.of
    values: list[bytes] = []
    size = number = 0
    first = bisect_right(of.numbers, message.after)
    for position in range(first, min(first + PAGE_ENTRIES_MAX, len(of.numbers))):
        entry = of.entries[of.keys_by_number[of.numbers[position]]]
        shown = [entry.key] * message.has_keys + [entry.value] * message.has_values
        size += sum(map(len, shown))
        if values and size > PAGE_SIZE_BYTES_MAX:
            break
        values += shown
        number = of.numbers[position]
    finish(state, request, answer_of(request.request_id, number=number, values=values))


# --- changing ------------------------------------------------------------------------------------


def on_put(state: State, request: Request) -> None:
    message: m.DictPut = request.message
    sizes = memoryview(message.lengths).cast("I")
    key_sizes = sizes[::2].tolist()
    if len(sizes) % 2 or not all(1 <= size <= m.DICT_KEY_SIZE_MAX for size in key_sizes):
        refuse(state, request, "size", f"a key is at most {m.DICT_KEY_SIZE_MAX} bytes")
    elif len(message.payload) > OBJECT_REQUEST_SIZE_BYTES_MAX:
        refuse(state, request, "size", "the entries are over the limit of a request")
    elif not sizes:
        finish(state, request, answer_of(request.request_id))
    elif not has_room(state, len(message.payload), len(key_sizes)):
        refuse(state, request, "exhausted", no_room_text(state))
    else:
        hold(state, request, len(message.payload))
        change(state, request)


def on_clear(state: State, request: Request) -> None:
    change(state, request)


def keys_of(request: Request) -> list[bytes | None]:
    """The keys that a change concerns; None for all."""
    message = request.message
    if isinstance(message, m.ObjectAction):
        return [None]
    if isinstance(message, m.DictGet):
        return [bytes(message.payload)]
    return [*split(message.lengths, message.payload)[::2]]


def overlaps(keys: list[bytes | None], others: set[bytes | None]) -> bool:
    if not others:
        return False
    return None in others or None in keys or any(key in others for key in keys)


def change(state: State, request: Request) -> None:
    """Make a change, now or when those before it of the same keys are on disk."""
    request.of.blocked.append(request)
    advance(state, request.of)


def advance(state: State, of: StoredObject) -> None:
    """Start every change whose keys are free, and not wanted by one that came before it."""
    blocked, of.blocked = of.blocked, []
    wanted: set[bytes | None] = set()
    for request in blocked:
        keys = keys_of(request)
        if overlaps(keys, of.busy) or overlaps(keys, wanted):
            of.blocked.append(request)
            wanted.update(keys)
        else:
            start(state, request)


def start(state: State, request: Request) -> None:
    message = request.message
    if isinstance(message, m.DictPut):
        put(state, request)
    elif isinstance(message, m.DictGet):
        pop(state, request)
    else:
        clear(state, request)


def put(state: State, request: Request) -> None:
    message: m.DictPut = request.message
    of = request.of
    values = split(message.lengths, message.payload)
    # The frame is not needed any more; its values are.
    message.payload, message.lengths = b"", b""
    # Of a key that comes twice the last value counts.
    pairs = dict(zip(values[::2], values[1::2], strict=True))
    if message.if_missing:
        pairs = {key: value for key, value in pairs.items() if key not in of.entries}
    if not pairs:
        finish(state, request, answer_of(request.request_id))
        return
    records: list[Record] = [receipt(request, number=len(pairs))]
    entries = []
    for key, value in pairs.items():
        known = of.entries.get(key)
        number = state.next_id() if known is None else known.number
        entries.append(Entry(number, key, value, state.now))
        records.append(m.DictEntry(of.object_id, number, key, value))

    def then() -> None:
        if not of.is_deleted:
            for entry in entries:
                remove(state, of, entry.key)
                add(state, of, entry)
            sweep_later(state, of)

    _commit(
        state, request, {*pairs}, records, answer_of(request.request_id, number=len(pairs)), then
    )


def pop(state: State, request: Request) -> None:
    of = request.of
    key = bytes(request.message.payload)
    request.message.payload = b""
    entry = of.entries.get(key)
    if entry is None:
        finish(state, request, answer_of(request.request_id))
        return
    records: list[Record] = [
        ForgetRecord(of.object_id, entry_key(key)),
        receipt(request, number=1, values=[entry.value]),
    ]

    def then() -> None:
        remove(state, of, key)
        # Until its client has it, the value is the answer's.
        hold(state, request, len(entry.value))

    answer = answer_of(request.request_id, number=1, values=[entry.value])
    _commit(state, request, {key}, records, answer, then)


def clear(state: State, request: Request) -> None:
    of = request.of
    if not of.entries:
        finish(state, request, answer_of(request.request_id))
        return
    records: list[Record] = [ForgetRecord(of.object_id, entry_key(key)) for key in of.entries]
    records.append(receipt(request))

    def then() -> None:
        for key in list(of.entries):
            remove(state, of, key)

    _commit(state, request, {None}, records, answer_of(request.request_id), then)


def _commit(
    state: State,
    request: Request,
    keys: set[bytes | None],
    records: list[Record],
    answer: m.ObjectAnswer,
    make_visible: Callable[[], None],
) -> None:
    of = request.of
    of.busy |= keys

    def then() -> None:
        of.busy -= keys
        hold(state, request, 0)
        make_visible()
        done(state, request, answer)
        advance(state, of)

    def undo() -> None:
        of.busy -= keys
        advance(state, of)

    commit(state, request, records, then, undo)


# --- entries -------------------------------------------------------------------------------------


def add(state: State, of: StoredObject, entry: Entry) -> None:
    """A key that is not there; its number may lie among the others."""
    of.entries[entry.key] = entry
    position = len(of.numbers)
    if of.numbers and entry.number < of.numbers[-1]:
        position = bisect_left(of.numbers, entry.number)
    of.numbers.insert(position, entry.number)
    of.keys_by_number[entry.number] = entry.key
    charge(state, entry.size_bytes)


def remove(state: State, of: StoredObject, key: bytes) -> None:
    entry = of.entries.pop(key, None)
    if entry is not None:
        del of.numbers[bisect_left(of.numbers, entry.number)]
        del of.keys_by_number[entry.number]
        charge(state, -entry.size_bytes)


def sweep_later(state: State, of: StoredObject) -> None:
    if of.entries and not of.has_sweep:
        of.has_sweep = True
        state.at(state.now + SWEEP_INTERVAL_S, "sweep", of)


def on_sweep(state: State, of: StoredObject) -> None:
    """Remove what has expired; entries that are just being changed are in use."""
    of.has_sweep = False
    if of.is_deleted:
        return
    if None not in of.busy:
        expired = [
            entry.key
            for entry in of.entries.values()
            if entry.used_at + DICT_ENTRY_RETENTION_S <= state.now and entry.key not in of.busy
        ]
        if of.is_ephemeral:
            for key in expired:
                remove(state, of, key)
        elif expired:
            _expire(state, of, expired)
    sweep_later(state, of)


def _expire(state: State, of: StoredObject, keys: list[bytes]) -> None:
    """Remove entries from the disk and then from here. Until that is done nobody changes them, or
    else a write that is tried again could remove what came after it."""
    of.busy |= set(keys)

    def stored() -> None:
        of.busy -= set(keys)
        for key in keys:
            remove(state, of, key)
        advance(state, of)

    def failed(text: str) -> None:
        # They expire at the next look.
        of.busy -= set(keys)
        advance(state, of)

    records: list[Record] = [ForgetRecord(of.object_id, entry_key(key)) for key in keys]
    durable.store_objects(state, records, stored, failed)


# --- ends ----------------------------------------------------------------------------------------


def stop_waiting(state: State, request: Request) -> None:
    request.of.blocked.remove(request)
    advance(state, request.of)


def delete(state: State, of: StoredObject) -> None:
    """The dict is gone, and changes that wait with it."""
    blocked, of.blocked = of.blocked, []
    for request in blocked:
        refuse_missing(state, request)
    for key in list(of.entries):
        remove(state, of, key)
