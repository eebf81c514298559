"""What containers print, on the client's own stdout and stderr, while enabled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fanout.protocol import messages as m

_lock = threading.Lock()
_enabled_count = 0


@contextmanager
def enable_output() -> Iterator[None]:
    """Show what the functions of this process's calls print, for as long as the block lasts::

        with fanout.enable_output(), app.run():
            f.remote()

    Without it nothing is shown. `fanout run` enables it.
    """
    global _enabled_count
    with _lock:
        _enabled_count += 1
    try:
        yield
    finally:
        with _lock:
            _enabled_count -= 1


def show_log(message: m.Log) -> None:
    """Write a container's text to the stream it was written to over there."""
    if _enabled_count <= 0:
        return
    from fanout.protocol.messages import Source

    text = bytes(message.payload).decode(errors="replace")
    stream = sys.stdout if message.source == Source.STDOUT else sys.stderr
    if stream is None or stream.closed:
        return
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding))
    except (OSError, ValueError):
        # Nobody reads our stdout any more; the call itself is none the worse for it.
        return
