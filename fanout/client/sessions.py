"""One session for each event loop, made when it is first used."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any

from fanout import context
from fanout.client.session import Session

_sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Session] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()
#: Sessions of the parent process, after a fork. Kept so that nothing of them is finalized here.
_inherited: list[Any] = []


def session_here() -> Session:
    """The session of the running loop; not necessarily connected."""
    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None:
        with _lock:
            session = _sessions[loop] = Session(loop, lambda: _forget(loop))
    return session


def _forget(loop: asyncio.AbstractEventLoop) -> None:
    with _lock:
        _sessions.pop(loop, None)


async def connected() -> Session:
    """The session of the running loop, connected.

    Raises:
        ConnectionError: no scheduler can be reached.
    """
    session = session_here()
    if not session.is_up:
        await session.connect()
    return session


def all_here() -> list[Session]:
    """The sessions of all loops of this process."""
    with _lock:
        return list(_sessions.values())


async def close_here() -> None:
    """Close the session of the running loop, its apps included."""
    if (session := _sessions.get(asyncio.get_running_loop())) is not None:
        await session.close_all()


def forget_after_fork() -> None:
    """In a forked child: drop the parent's connections without a word on them."""
    global _sessions, _lock
    for session in list(_sessions.values()):
        _inherited.append(session)
        if session.transport is not None:
            session.transport.abandon()
    _inherited.append(_sessions)
    if context.container is not None:
        # Its lock may be held by a thread that is not here, and its inputs run elsewhere.
        context.container.waits = context.Waits()
    _sessions = weakref.WeakKeyDictionary()
    _lock = threading.Lock()
