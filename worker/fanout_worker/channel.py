"""What a worker daemon and a container say to each other over their socketpair.

The frames are those of `fanout.protocol.frames`; the header is a msgpack array that begins with
one of the kinds below. They never leave the host, and both ends must run the same code, which
`fingerprint` tells. Outputs do not travel here unless they are large: see `shared.py`.
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
#: [LEASE, lease id, slot, call id, start, lengths, blobs, skip, method]; payload: the inputs end
#: to end.
LEASE = 2
#: [CREDIT]: the credit word of a waiting generator was raised.
CREDIT = 3
#: [STOP]: leave when the leases before this are done.
STOP = 4

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

_FIELDS: dict[int, tuple[type, ...]] = {
    BELL: (),
    STARTED: (),
    START_FAILED: (),
    OUTPUT: (int,) * 7 + (list,),
}
_FIELDS |= {WAITS: (int, int), LOG: (int, bytes, int)}

#: Paths and environment variables may be any bytes, and are text with surrogates then.
_UNICODE_ERRORS = "surrogateescape"
_pack = msgpack.Packer(use_bin_type=True, autoreset=True, unicode_errors=_UNICODE_ERRORS).pack


def prefix(*header: Any, payload_size: int = 0) -> bytes:
    """A frame's bytes up to its payload."""
    packed: bytes = _pack(header)
    return frames.prefix(packed, payload_size) + packed


BELL_FRAME = prefix(BELL)
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


def fingerprint() -> str:
    """A digest of the code that daemon and container must have in common. They may come from
    different installations, and an installation may change while a daemon runs."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (folder / "channel.py", folder / "shared.py", *sorted(folder.glob("runtime/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
