"""Hypothesis strategies that follow the field checks of `fanout.protocol.messages`.

They are derived from the checks themselves, so a message or a field that is added is tested
without a word here, and a new kind of check fails loudly.
"""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import strategies as st

from fanout.protocol import messages as m

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | _TEXT
    | st.binary(max_size=20)
)
_PLAIN = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(_TEXT | st.binary(max_size=8), inner)
    ),
    max_leaves=8,
)
_IDS = st.binary(min_size=32, max_size=32)
_PAIR = st.lists(st.integers(0, m.ID_MAX), min_size=2, max_size=2)
_NUMBERS = st.integers(-(10**14), 10**14) | st.floats(-1e14, 1e14)
_BLOB_REFS = st.lists(
    st.tuples(st.integers(0, m.CHUNK_INPUTS_MAX - 1), st.lists(_IDS, max_size=3)).map(list),
    max_size=3,
)


def values_of(check: m.Check) -> st.SearchStrategy[Any]:
    """Values that a field check accepts."""
    if isinstance(check, m.Between):
        return st.integers(check.low, check.high)
    if isinstance(check, m.Sized):
        return _sized(check)
    if isinstance(check, m.Usually):
        check = check.check
    by_name: dict[str, st.SearchStrategy[Any]] = {
        "_is_number": _NUMBERS,
        "_is_pairs": st.lists(_PAIR, max_size=5),
        "_is_pair_or_none": st.none() | _PAIR,
        "_is_call_ids": st.lists(st.binary(min_size=16, max_size=16), max_size=3),
        "_is_blob_ids": st.lists(_IDS, max_size=3),
        "_is_blob_refs": _BLOB_REFS,
        "_is_lengths": st.just(b""),
        "_is_value_lengths": st.just(b""),
        "<lambda>": st.booleans(),
    }
    return by_name[check.__name__]


def _sized(check: m.Sized) -> st.SearchStrategy[Any]:
    most = min(check.high, max(check.low, 40))
    if check.kind is bytes:
        return st.binary(min_size=check.low, max_size=most)
    if check.kind is str:
        characters = st.characters(exclude_categories=["Cs"])
        return st.text(characters, min_size=check.low, max_size=most)
    if check.kind is list:
        return st.lists(_PLAIN, min_size=check.low, max_size=4)
    assert check.kind is dict
    return st.dictionaries(_TEXT, _PLAIN, min_size=check.low, max_size=4)


@st.composite
def messages_of(draw: st.DrawFn, cls: type[m.Message]) -> m.Message:
    """Valid messages of one class; its length table, statuses and payload fit each other."""
    values = {name: draw(values_of(check)) for name, check in cls.CHECKS}
    if cls.HAS_PAYLOAD:
        values["payload"] = draw(st.binary(max_size=200))
    if "lengths" in values:
        lengths = draw(st.lists(st.integers(0, 60), max_size=8))
        values["lengths"] = struct.pack(f"<{len(lengths)}I", *lengths)
        values["payload"] = draw(st.binary(min_size=sum(lengths), max_size=sum(lengths)))
        if "statuses" in values:
            statuses = st.integers(0, max(m.Status))
            count = len(lengths)
            values["statuses"] = bytes(draw(st.lists(statuses, min_size=count, max_size=count)))
    return cls(**values)


def any_message() -> st.SearchStrategy[m.Message]:
    """A valid message of any kind."""
    return st.sampled_from(sorted(m.KINDS)).flatmap(lambda kind: messages_of(m.KINDS[kind]))


def frame_of(message: m.Message) -> bytes:
    """The bytes of a message on the wire."""
    return b"".join(m.encode(message))
