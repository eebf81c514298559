"""What containers print and how calls get on, shown to the person at the client while enabled.

Nothing here is loaded or done before that. `active` is the seam to the client: its sessions ask
whether there is one and tell it what happens.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fanout.output.watcher import Watcher

#: Who is told of calls and text; None while output is not enabled.
active: Watcher | None = None

_lock = threading.Lock()
_enabled_count = 0
_is_fork_known = False


@contextmanager
def enable_output(show_progress: bool = True) -> Iterator[None]:
    """Show what the functions of this process's calls print, and how the calls get on, for as
    long as the block lasts::

        with fanout.enable_output(), app.run():
            f.remote()

    On a terminal there is a bar for each map and a label before each line; a stream that goes to a
    file or a pipe gets the bare lines. `docs/output.md` has the details. `fanout run` enables it;
    without it nothing is shown. In a container it does nothing.

    Args:
        show_progress: show bars too, and not only what is printed.
    """
    global _enabled_count
    with _lock:
        _enabled_count += 1
        if _enabled_count == 1:
            _start(show_progress)
    try:
        yield
    finally:
        with _lock:
            # In a process that was forked inside of the block it is 0 already.
            _enabled_count = max(0, _enabled_count - 1)
            if _enabled_count == 0:
                _stop()


def _start(show_progress: bool) -> None:
    global active, _is_fork_known
    from fanout import context
    from fanout.output.watcher import Watcher

    if context.container is not None:
        return
    if not _is_fork_known:
        _is_fork_known = True
        os.register_at_fork(after_in_child=_forget)
    active = Watcher(show_progress)
    _tell_sessions(True)


def _stop() -> None:
    global active
    ending, active = active, None
    if ending is not None:
        _tell_sessions(False)
        ending.stop()


def _tell_sessions(is_on: bool) -> None:
    sessions = sys.modules.get("fanout.client.sessions")
    for session in [] if sessions is None else sessions.all_here():
        try:
            session.loop.call_soon_threadsafe(session.watch, is_on)
        except RuntimeError:
            # Its loop is closed.
            continue


def _forget() -> None:
    """In a forked child: the screen is the parent's, and so are the calls."""
    global active, _lock, _enabled_count
    _lock = threading.Lock()
    _enabled_count = 0
    inherited, active = active, None
    if inherited is not None:
        inherited.abandon()
