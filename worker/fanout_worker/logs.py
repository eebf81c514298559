"""What containers print on its way to the scheduler: how much of it passes, and in what pieces."""

from __future__ import annotations

from collections.abc import Callable

#: Sustained, and at once after a quiet second, for each container.
LOG_RATE_BYTES = 1 << 20
#: Once text is dropped it is dropped until this much may pass again, so that what passes are
#: passages and not single lines with a notice before each.
RESUME_BYTES = LOG_RATE_BYTES // 4
#: Notices a second of what was dropped, where inputs end quickly and each would have one.
NOTICE_RATE = 8
#: A notice is told by then, where nothing follows upon what was dropped. In a flood text passes
#: again before that, and its notice with it.
NOTICE_DELAY_S = 2 * RESUME_BYTES / LOG_RATE_BYTES

#: Text that follows upon text of the same input so quickly is passed on together with more of it.
JOIN_DELAY_S = 0.02
JOIN_SIZE_BYTES_MAX = 64 << 10

#: Who has written: source, call id, index.
Writer = tuple[int, bytes, int]


class LogMeter:
    """Lets `LOG_RATE_BYTES` a second pass and counts the rest, so that one container that prints
    in a loop costs neither the network nor anybody's terminal. Times are given, not asked for."""

    def __init__(self, now: float) -> None:
        self._allowed = float(LOG_RATE_BYTES)
        self._at = now
        self._is_dropping = False
        self._dropped = 0
        self._notices = float(NOTICE_RATE)
        self._noticed_at = now

    @property
    def has_dropped(self) -> bool:
        """There is something to say in a notice."""
        return self._dropped > 0

    def admits(self, size_bytes: int, now: float) -> bool:
        """Whether this much may pass; if not it is counted as dropped."""
        self._allowed = min(LOG_RATE_BYTES, self._allowed + (now - self._at) * LOG_RATE_BYTES)
        self._at = now
        needed = max(size_bytes, RESUME_BYTES) if self._is_dropping else size_bytes
        self._is_dropping = needed > self._allowed
        if self._is_dropping:
            self._dropped += size_bytes
            return False
        self._allowed -= size_bytes
        return True

    def take_notice(self, now: float, is_due: bool) -> bytes:
        """A line that says what was dropped since the last one; empty if nothing was.

        Args:
            is_due: also when there were many notices just now.
        """
        if not self._dropped:
            return b""
        self._notices = min(NOTICE_RATE, self._notices + (now - self._noticed_at) * NOTICE_RATE)
        self._noticed_at = now
        if not is_due and self._notices < 1:
            return b""
        self._notices = max(0.0, self._notices - 1)
        dropped, self._dropped = self._dropped, 0
        return (
            f"[fanout: {dropped} bytes of output were dropped here; "
            f"a container may print {LOG_RATE_BYTES} bytes a second]\n"
        ).encode()


class LogJoiner:
    """Joins what one input prints line by line, so that a container that prints a hundred thousand
    short lines a second is one for the scheduler and the client that sends fifty pieces of text.
    A line after a quiet moment is not held back. Times are given, not asked for.

    Args:
        emit: gets a writer and its text. What one input has printed, on either stream, comes in
            its order; inputs that run at once come one after the other.
    """

    def __init__(self, emit: Callable[[Writer, bytes], None]) -> None:
        self._emit = emit
        #: By call id and index: the stream, and what was printed on it.
        self._held: dict[tuple[bytes, int], tuple[int, list[bytes]]] = {}
        self._size_bytes = 0
        self._emitted_at = -JOIN_DELAY_S

    def add(self, writer: Writer, data: bytes, now: float) -> float | None:
        """Pass text on, now or later; gives the time at which to `release` it if it is held."""
        source, call_id, index = writer
        held = self._held.get((call_id, index))
        if held is not None and held[0] != source:
            self._pass(call_id, index)
            held = None
        if held is None:
            self._held[call_id, index] = source, [data]
        else:
            held[1].append(data)
        self._size_bytes += len(data)
        due = self._emitted_at + JOIN_DELAY_S
        if now >= due or self._size_bytes >= JOIN_SIZE_BYTES_MAX:
            self.release(now)
            return None
        return due

    def release(self, now: float) -> None:
        """Pass on what is held. Due before anything else of the container is passed on."""
        if self._held:
            self._emitted_at = now
            for call_id, index in list(self._held):
                self._pass(call_id, index)

    def _pass(self, call_id: bytes, index: int) -> None:
        source, parts = self._held.pop((call_id, index))
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._size_bytes -= len(data)
        self._emit((source, call_id, index), data)
