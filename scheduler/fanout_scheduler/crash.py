"""What is written down when the core breaks one of its own rules.

The file is for whoever mends the bug: what came in, where it failed, and what the core knew.
Payloads appear by size and never by content; they are the user's.
"""

from __future__ import annotations

import os
import pprint
import time
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

#: A bug that strikes at each frame must not fill the disk.
_CRASH_FILES_MAX = 20
_SHOWN_BYTES_MAX = 32
#: Bytes of the user's, however few; other short ones are ids.
_USERS_FIELDS = frozenset({"payload", "key", "partition"})


def describe(value: Any) -> str:
    """An event, command or message in one line."""
    if isinstance(value, bytes | bytearray | memoryview):
        size = len(value)
        return bytes(value).hex() if size <= _SHOWN_BYTES_MAX else f"<{size} bytes>"
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(
            f"{f.name}={_field(f.name, getattr(value, f.name))}" for f in fields(value)
        )
        return f"{type(value).__name__}({inner})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(describe(item) for item in value[:20])}]"
    if isinstance(value, dict):
        # Maps carry what a peer says of itself; the names are enough to find the bug.
        return f"{{{', '.join(str(key) for key in list(value)[:50])}}}"
    text = repr(value)
    return text if len(text) <= 500 else text[:497] + "..."


def _field(name: str, value: Any) -> str:
    if name in _USERS_FIELDS and isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return describe(value)


def write_crash(
    folder: Path, error: BaseException, doing: str, snapshot: Callable[[], dict[str, Any]]
) -> Path | None:
    """Write `crash-<time>.txt` into the folder; returns where, None when that was not possible.

    Args:
        folder: the home.
        error: what was raised.
        doing: what the core was asked to do, from `describe`.
        snapshot: gives the core's state; may fail itself, in the state that it is in.
    """
    try:
        if len(list(folder.glob("crash-*.txt"))) >= _CRASH_FILES_MAX:
            return None
        try:
            state = pprint.pformat(snapshot(), width=100, compact=True)
        except Exception as snapshot_error:
            state = f"no snapshot: {snapshot_error!r}"
        text = "\n".join(
            [
                "fanout's scheduler broke one of its own rules. Please report this file.",
                "It holds no arguments and no results, but names of functions and hosts.",
                f"\nWhile: {doing}\n",
                "".join(traceback.format_exception(error)),
                "State:",
                state,
                "",
            ]
        )
        stamp = time.strftime("%Y%m%dT%H%M%S")
        path = folder / f"crash-{stamp}-{time.monotonic_ns() % 1_000_000_000}.txt"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    except OSError:
        return None
    return path
