"""The daemon's ends of a container's descriptors 1 and 2: what C code and child processes print."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable

from fanout.protocol import messages as m

_READ_SIZE_BYTES = 64 << 10


class Pipes:
    """Two pipes that a container writes to.

    Args:
        loop: whose reader callbacks are used.
        on_text: called with a `Source` and the bytes of one read.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_text: Callable[[int, bytes], None]
    ) -> None:
        self._loop = loop
        self._on_text = on_text
        self._sources: dict[int, int] = {}
        #: Asks both at once whether there is anything: nearly always there is not.
        self._poll = select.poll()

    def open(self) -> list[int]:
        """Make the pipes. Returns the ends for descriptors 1 and 2; the caller closes them."""
        writers = []
        for source in (m.Source.STDOUT, m.Source.STDERR):
            reader, writer = os.pipe()
            writers.append(writer)
            self._sources[reader] = source
            os.set_blocking(reader, False)
            self._poll.register(reader, select.POLLIN)
        return writers

    def watch(self) -> None:
        """Read whenever there is something."""
        for descriptor in self._sources:
            self._loop.add_reader(descriptor, self._read, descriptor)

    def read_all(self) -> None:
        """Read what is there now."""
        for descriptor, _ in self._poll.poll(0):
            self._read(descriptor)

    def close(self) -> None:
        """Harmless to repeat."""
        for descriptor in list(self._sources):
            self._close(descriptor)

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _READ_SIZE_BYTES)
        except BlockingIOError:
            return
        if data:
            self._on_text(self._sources[descriptor], data)
        else:
            self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        del self._sources[descriptor]
