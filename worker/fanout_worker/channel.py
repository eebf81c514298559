"""What a worker daemon and a container say to each other over their socketpair.

The frames are those of `fanout.protocol.frames`; the header is a msgpack array that begins with
one of the kinds below. They never leave the host, and both ends must run the same code, which
`fingerprint` tells. Outputs of a container that runs one input at a time do not travel here unless
they are large: see `shared.py`. For one that runs several (`runs_many`), messages are all there is.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgpack

from fanout.exceptions import ProtocolError
from fanout.protocol import frames

# --- daemon to container ---
#: [START, info]; payload: the function's definition. `info` is plain data, see `container.py`.
START = 1
#: [LEASE, lease id, slot, call id, start, lengths, blobs, skip, method, credit]; payload: the
#: inputs end to end. One input at a time: `credit` is in the slot's memory and grows there. Several
#: at a time: there are no slots.
LEASE = 2
#: [CREDIT]: the credit word of a waiting generator was raised.
CREDIT = 3
#: [STOP]: leave when the leases before this are done.
STOP = 4
#: [ITEM_CREDIT, lease id, upto]: several at a time: the lease's generator may give items below.
ITEM_CREDIT = 5
#: [STOP_INPUT, lease id, index, reason]: several at a time: stop one input; `shared.REASON_...`.
STOP_INPUT = 6

# --- container to daemon ---
#: [BELL]: there is something in the ring.
BELL = 10
#: [STARTED]: the user's code is loaded, and hooks that run first have run.
STARTED = 11
#: [START_FAILED]; payload: the encoded exception. The container leaves.
START_FAILED = 12
#: [OUTPUT, entry, slot, kind, index, number, status, duration_ns, blob ids]; payload: the value.
#: It stands in the order of outputs just before ring entry number `entry`.
OUTPUT = 13
#: [WAITS, slot, upto]: a generator has used its credit.
WAITS = 14
#: [LOG, source, call id, index]; payload: bytes as written.
LOG = 15

# --- the same, of a container that runs several inputs at a time ---
#: [BEGUN, since_ns, ranges]: inputs run from now on; a range is [lease id, start, count]. Written
#: before any of their code runs, so a death tells who ran.
BEGUN = 16
#: [OUTPUTS, entries]; payload: the values end to end. An entry is [lease id, kind, index, number,
#: status, duration_ns, length, blob ids], in any order of inputs.
OUTPUTS = 17
#: [ITEM_WAITS, lease id, index, upto]: a generator has used its credit.
ITEM_WAITS = 18

_FIELDS: dict[int, tuple[type, ...]] = {
    BELL: (),
    STARTED: (),
    START_FAILED: (),
    OUTPUT: (int,) * 7 + (list,),
}
_FIELDS |= {WAITS: (int, int), LOG: (int, bytes, int)}
_FIELDS |= {BEGUN: (int, list), OUTPUTS: (list,), ITEM_WAITS: (int, int, int)}
_RANGE = (int, int, int)
_ENTRY = (int,) * 7 + (list,)

#: Paths and environment variables may be any bytes, and are text with surrogates then.
_UNICODE_ERRORS = "surrogateescape"
_pack = msgpack.Packer(use_bin_type=True, autoreset=True, unicode_errors=_UNICODE_ERRORS).pack


def prefix(*header: Any, payload_size: int = 0) -> bytes:
    """A frame's bytes up to its payload."""
    packed: bytes = _pack(header)
    return frames.prefix(packed, payload_size) + packed


BELL_FRAME = prefix(BELL)
_BELL_HEADER = BELL_FRAME[frames.PREFIX_SIZE_BYTES :]
CREDIT_FRAME = prefix(CREDIT)
STOP_FRAME = prefix(STOP)
STARTED_FRAME = prefix(STARTED)


def parse(header: bytes) -> list[Any]:
    """The fields of a header, kind first, unchecked: for what comes from the daemon."""
    fields: list[Any] = msgpack.unpackb(header, raw=False, unicode_errors=_UNICODE_ERRORS)
    return fields


def parse_checked(header: bytes) -> list[Any]:
    """The fields of a header that a container sent, in a process that user code shares.

    Raises:
        ProtocolError: it is not one of the kinds above with fields of the right types.
    """
    if header == _BELL_HEADER:
        return [BELL]
    try:
        fields = msgpack.unpackb(header, raw=False, max_ext_len=0)
    except Exception as error:
        raise ProtocolError(f"container frame is not msgpack: {error}") from error
    if type(fields) is not list or not fields or fields[0] not in _FIELDS:
        raise ProtocolError("container frame has no known kind")
    types = _FIELDS[fields[0]]
    if len(fields) != len(types) + 1:
        raise ProtocolError(f"container frame {fields[0]} has {len(fields) - 1} fields")
    for value, kind in zip(fields[1:], types, strict=True):
        if type(value) is not kind or (type(value) is int and value < 0):
            raise ProtocolError(f"container frame {fields[0]} has an invalid field")
    return fields


def runs_many(options: dict[str, Any]) -> bool:
    """Whether containers of a definition with these options run several inputs at a time; or
    could: of a class with sync and async methods the former need a thread beside the loop."""
    max_inputs: int | None = options.get("max_inputs")
    is_mixed = bool(options.get("is_mixed"))
    return (max_inputs or 1) > 1 or options.get("batch") is not None or is_mixed


def check_ranges(ranges: list[Any]) -> list[tuple[int, int, int]]:
    """The ranges of `BEGUN`.

    Raises:
        ProtocolError: they are none.
    """
    return [_checked(fields, _RANGE) for fields in ranges]


def check_entries(
    entries: list[Any],
) -> list[tuple[int, int, int, int, int, int, int, list[Any]]]:
    """The entries of `OUTPUTS`.

    Raises:
        ProtocolError: they are none.
    """
    return [_checked(fields, _ENTRY) for fields in entries]


def _checked(fields: Any, types: tuple[type, ...]) -> Any:
    if type(fields) is not list or len(fields) != len(types):
        raise ProtocolError("a container frame has an invalid entry")
    for value, kind in zip(fields, types, strict=True):
        if type(value) is not kind or (type(value) is int and value < 0):
            raise ProtocolError("a container frame has an entry with an invalid field")
    return tuple(fields)


def fingerprint() -> str:
    """A digest of the code that daemon and container must have in common. They may come from
    different installations, and an installation may change while a daemon runs."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    both = [folder / name for name in ("channel.py", "outcome.py", "process.py", "shared.py")]
    for path in (*both, *sorted(folder.glob("runtime/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
