"""What happened in a simulated world, and of it what concerns one input.

A seed that runs well keeps nothing but its faults. One that failed is run again (the same seed does
the same) with every frame kept, and the story of the input at which it failed is told: the frames
that name it, its leases, its containers, and the faults meanwhile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from typing import Any

from fanout.protocol import messages as m

FAULTS_MAX = 400
TEXT_MAX = 100


class Broken(AssertionError):
    """A promise is broken; of one input, or of one call where no input is known."""

    def __init__(self, text: str, call_id: bytes = b"", index: int = -1) -> None:
        super().__init__(text)
        self.call_id = call_id
        self.index = index


class Story:
    """Faults, and if it `is_told` all frames."""

    def __init__(self, is_told: bool) -> None:
        self.is_told = is_told
        self.faults: deque[tuple[float, str]] = deque(maxlen=None if is_told else FAULTS_MAX)
        self.frames: list[tuple[float, str, str, m.Message]] = []

    def say(self, now: float, text: str) -> None:
        self.faults.append((now, text))

    def frame(self, now: float, name: str, way: str, message: m.Message) -> None:
        if self.is_told:
            self.frames.append((now, name, way, message))

    def lines(self, call_id: bytes = b"", index: int = -1) -> list[str]:
        """The story; of one call or input, if given."""
        told = [(when, text) for when, text in self.faults]
        filter_ = _Concern(call_id, index)
        for _, _, _, message in self.frames:
            filter_.learn(message)
        for when, name, way, message in self.frames:
            if filter_.concerns(message):
                told.append((when, f"{name} {way} scheduler: {describe(message)}"))
        return [f"{when:12.4f}  {text}" for when, text in sorted(told, key=lambda line: line[0])]


class _Concern:
    """Which frames have to do with an input: by its call, its leases and its containers."""

    def __init__(self, call_id: bytes, index: int) -> None:
        self.call_id = call_id
        self.index = index
        self.leases: set[int] = set()
        self.containers: set[int] = set()

    def learn(self, message: m.Message) -> None:
        if isinstance(message, m.Lease) and self._is_in(message):
            self.leases.add(message.lease_id)
            self.containers.add(message.container_id)

    def concerns(self, message: m.Message) -> bool:
        if isinstance(message, m.Relay):
            return self.concerns(m.decode(message.header, bytes(message.payload)))
        if isinstance(message, m.Heartbeat):
            return False
        if not self.call_id:
            return True
        if isinstance(message, m.WorkerReady | m.WorkerAccepted):
            return True
        if hasattr(message, "call_id"):
            return self._is_in(message)
        if self.call_id in getattr(message, "call_ids", ()):
            return True
        return (
            getattr(message, "lease_id", None) in self.leases
            or getattr(message, "container_id", None) in self.containers
        )

    def _is_in(self, message: Any) -> bool:
        """A frame of the call: whether it speaks of the input, or of no input in particular."""
        if message.call_id != self.call_id:
            return False
        if self.index < 0:
            return True
        index = getattr(message, "index", None)
        if index is not None:
            return bool(index == self.index)
        start = getattr(message, "start", None)
        if start is None:
            return True
        size = getattr(message, "statuses", None)
        count = len(size) if size is not None else len(getattr(message, "lengths", b"")) // 4
        return bool(start <= self.index < start + count)


def describe(message: m.Message) -> str:
    """A frame in one line; long fields are cut."""
    if isinstance(message, m.Relay):
        return "relay " + describe(m.decode(message.header, bytes(message.payload)))
    parts = []
    for each in fields(message):  # type: ignore[arg-type]
        value = getattr(message, each.name)
        if each.name == "lengths":
            parts.append(f"count={len(value) // 4}")
        elif isinstance(value, bytes | memoryview):
            raw = bytes(value)
            is_id = each.name.endswith("_id")
            parts.append(f"{each.name}={raw.hex()[:6] if is_id else repr(raw[:24])}")
        elif value not in ([], {}, "", None, False):
            parts.append(f"{each.name}={str(value)[:TEXT_MAX]}")
    return f"{type(message).__name__}({', '.join(parts)})"
