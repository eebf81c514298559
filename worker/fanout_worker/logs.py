"""How much a container may print."""

from __future__ import annotations

#: Sustained, and at once after a quiet second, for each container.
LOG_RATE_BYTES = 1 << 20


class LogMeter:
    """Lets `LOG_RATE_BYTES` a second pass and counts the rest, so that one container that prints
    in a loop costs neither the network nor anybody's terminal. Times are given, not asked for."""

    def __init__(self, now: float) -> None:
        self._allowed = float(LOG_RATE_BYTES)
        self._at = now
        self._dropped = 0

    def admits(self, size_bytes: int, now: float) -> bool:
        """Whether this much may pass; if not it is counted as dropped."""
        self._allowed = min(LOG_RATE_BYTES, self._allowed + (now - self._at) * LOG_RATE_BYTES)
        self._at = now
        if size_bytes > self._allowed:
            self._dropped += size_bytes
            return False
        self._allowed -= size_bytes
        return True

    def take_notice(self) -> bytes:
        """A line that says what was dropped since the last one; empty if nothing was."""
        dropped, self._dropped = self._dropped, 0
        if not dropped:
            return b""
        return (
            f"[fanout: {dropped} bytes of output were dropped here; "
            f"a container may print {LOG_RATE_BYTES} bytes a second]\n"
        ).encode()
