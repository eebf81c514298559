"""What code inside a container knows about where it runs.

The worker's runtime fills this in before it imports anything of the user's; in any other process
`container` stays None. The client library reads it: in a container it joins the scheduler through
its own daemon, belongs to the app that its function belongs to, and names the input that makes a
nested call.
"""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanout.definition import Environment


#: Begins the id of a call, as users see it; 32 hexadecimal digits follow.
CALL_PREFIX = "fc-"


@dataclass(slots=True)
class InputContext:
    """The input that is running.

    A container that runs its inputs one after another keeps one object for a lease and moves
    `index` on, so whoever needs the numbers later has to copy them.
    """

    call_id: bytes
    index: int
    lease_id: int
    #: It has ended, and what runs in its name was left behind by it. Known only where several
    #: inputs run at a time.
    is_over: bool = False


class Watcher(Protocol):
    """A session of the container, which tells the scheduler whether the container waits."""

    def waits_changed(self) -> None:
        """Called in any thread: all inputs wait now, or not all of them any more."""


class Waits:
    """Which of the container's inputs do nothing but wait for the scheduler.

    A container gives its core away only when all of them do. One that runs a single input at a
    time does as soon as anything in it waits. Every event loop of a process has a session of its
    own, so what all of them must agree on is kept here. Any thread may use it.
    """

    def __init__(self) -> None:
        # A wait may end when its coroutine is collected, which may be while this thread is in here.
        self._lock = threading.RLock()
        #: Inputs that run, by the identity of their `InputContext`; None: one at a time.
        self._running: set[int] | None = None
        #: How many things each input waits for, and the object, whose identity must stay its own.
        self._waiting: dict[int, int] = {}
        self._waiters: dict[int, InputContext] = {}
        #: How many keys of `_waiting` are in `_running`.
        self._waiting_count = 0
        #: Waits of threads that have no context. Whose they are cannot be told; each counts as if
        #: it were an input's: a core that is shared costs less than one that nobody gets.
        self._anonymous_count = 0
        self._was_all = False
        self._watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()

    @property
    def running_count(self) -> int:
        """How many inputs run; 1 where it is never more."""
        return 1 if self._running is None else len(self._running)

    @property
    def are_all(self) -> bool:
        """Everything that runs here waits."""
        waiting_count = self._waiting_count + self._anonymous_count
        return waiting_count > 0 and waiting_count >= self.running_count

    def watch(self, watcher: Watcher) -> None:
        """Tell it when `are_all` changes, as long as it exists."""
        with self._lock:
            self._watchers.add(watcher)

    def run_many(self) -> None:
        """From now on inputs are counted by `input_began` and `input_ended`."""
        self._running = set()

    def input_began(self, running: InputContext) -> None:
        with self._lock:
            assert self._running is not None
            self._running.add(id(running))
        self._tell()

    def input_ended(self, running: InputContext) -> None:
        with self._lock:
            assert self._running is not None
            self._running.discard(id(running))
            # What it has left behind may wait as long as it likes.
            self._waiting_count -= id(running) in self._waiting
        self._tell()

    def begin(self, watcher: Watcher | None = None) -> InputContext | None:
        """What runs in this context waits. Returns what `end` is to be given. The watcher that
        says so is not told of it."""
        running = current_input.get()
        with self._lock:
            if running is None:
                self._anonymous_count += 1
            else:
                key = id(running)
                self._waiters[key] = running
                self._waiting[key] = self._waiting.get(key, 0) + 1
                if self._waiting[key] == 1:
                    self._waiting_count += self._counts(running)
        self._tell(watcher)
        return running

    def end(self, running: InputContext | None, watcher: Watcher | None = None) -> None:
        """A wait is over; in any context."""
        with self._lock:
            if running is None:
                self._anonymous_count -= 1
            else:
                key = id(running)
                self._waiting[key] -= 1
                if self._waiting[key] == 0:
                    del self._waiting[key], self._waiters[key]
                    self._waiting_count -= self._counts(running)
        self._tell(watcher)

    def _counts(self, running: InputContext) -> bool:
        return self._running is None or id(running) in self._running

    def _tell(self, but: Watcher | None = None) -> None:
        with self._lock:
            if self.are_all == self._was_all:
                return
            self._was_all = not self._was_all
            watchers = list(self._watchers)
        for watcher in watchers:
            if watcher is not but:
                watcher.waits_changed()


@dataclass(slots=True)
class ContainerContext:
    """The container that this process is."""

    container_id: int
    app_id: bytes
    app_name: str
    function_id: bytes
    function_name: str
    environment: Environment
    #: Whether the code runs on another host than the client, from unpacked sources.
    is_remote_host: bool
    #: The daemon's unix socket, and what proves to it which container is calling.
    socket_path: str
    secret: bytes
    #: Blobs are files here, named by the hex of their id.
    blob_folder: str
    #: Folder of the sources that came from the client, on another host than the client's; else "".
    sources: str = ""
    #: The definition as it came (`fanout.definition`), and the raw function, or class by value,
    #: found by it.
    definition: bytes = b""
    function: Callable[..., Any] | None = None
    waits: Waits = field(default_factory=Waits)


#: Set once, by the runtime of a container.
container: ContainerContext | None = None

#: Set round each input.
current_input: ContextVar[InputContext | None] = ContextVar("current_input", default=None)
