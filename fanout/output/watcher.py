"""Between the client's sessions, which know what happens, and the person, who is to see it.

Sessions tell facts from their loops' threads, and telling must cost them little and never wait:
for a screen, text is only put aside. One thread of our own draws, about ten times a second while
something is open and not at all otherwise; a terminal that is slow holds up this thread alone.
Where text goes to a file or a pipe it is written at once, in the order in which it came.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from fanout.output.board import PLAIN_GLYPHS, Board, Glyphs
from fanout.output.log_lines import Entry, LogBook, Origin
from fanout.output.notebook import Cell, is_notebook
from fanout.output.streams import is_terminal, replace_streams, write_text
from fanout.output.style import Line, clean, cut_line, plain, width_of
from fanout.protocol import messages as m

if TYPE_CHECKING:
    from rich.console import Console

    from fanout.client.calls import LiveCall
    from fanout.output.screen import Screen

DRAW_INTERVAL_S = 0.1
#: Text that waits to be drawn; beyond that a slow terminal loses some, and is told how much.
PENDING_BYTES_MAX = 4 << 20
#: Text drawn at a time, so that the other threads get their turns.
DRAWN_BYTES_MAX = 256 << 10
#: Unfinished lines of containers, progress bars above all, that are shown at a time.
LIVE_ROWS_MAX = 4
#: What is told of a scheduler that is not there, if that lasts.
CONNECTING_AFTER_S = 0.3
_STOP_TIMEOUT_S = 2.0
#: Columns and rows of a notebook's cell, and of what has none.
_CELL_SIZE = (100, 24)


class _Channel(NamedTuple):
    """Where the text of one source goes."""

    stream: TextIO | None
    #: With its input's name before each line; else as it was written.
    is_labelled: bool
    #: Through the screen; else at once.
    is_drawn: bool
    #: Progress bars are rows that are rewritten; else they are bytes like others.
    is_raw: bool


class Watcher:
    """See the module's text. Everything but `tick` may be called on any thread.

    Args:
        show_progress: show how calls get on, and not only what they print.
    """

    def __init__(self, show_progress: bool) -> None:
        self._show_progress = show_progress
        self._clock = time.monotonic
        self._cell = Cell() if is_notebook() else None
        self._console: Console | None = None
        self._screen: Screen | None = None
        if self._cell is None:
            self._find_terminal()
        console = self._console
        self._has_colours = (
            console is not None and console.color_system is not None and not console.no_color
        )
        self._channels: dict[int, _Channel] = {
            m.Source.STDOUT: self._channel(sys.stdout, is_stdout=True),
            m.Source.STDERR: self._channel(sys.stderr, is_stdout=False),
        }
        self._is_unicode = self._cell is not None or (
            self._screen is not None and self._screen.is_unicode
        )
        #: What stands before and behind the name in each source's labels: drawn once for all lines.
        self._affixes: dict[int, list[str]] = {
            source: self._rendered(self._label_of("@", source)).split("@")
            for source in (m.Source.STDOUT, m.Source.STDERR)
        }
        #: Guards the board and the calls; held for moments. Reentrant: a signal handler may print.
        self._facts = threading.RLock()
        self._board = Board(Glyphs() if self._is_unicode else PLAIN_GLYPHS)
        self._maps: dict[bytes, LiveCall] = {}
        self._away_since: float | None = None
        #: What is drawn: guarded by a lock that is held as long as the terminal is slow.
        self._drawing = self._screen.lock if self._screen is not None else threading.RLock()
        self._drawn = LogBook(lambda source: False)
        #: What is written at once, under a lock of its own.
        self._writing = threading.RLock()
        self._written = LogBook(lambda source: self._channel_of(source).is_raw)
        #: With the time at which each came.
        self._pending: deque[tuple[Origin, bytes, float]] = deque()
        self._pending_size = 0
        self._lost_size = 0
        self._ended: deque[bytes] = deque()
        self._summaries: deque[Line] = deque()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._restore: Callable[[], None] = lambda: None
        if self._screen is not None:
            self._restore = replace_streams(self._screen, self._clock)

    # --- where to --------------------------------------------------------------------------------

    def _find_terminal(self) -> None:
        """Whether somebody looks, and what his terminal can do; rich is loaded only if so."""
        stream = next(filter(is_terminal, (sys.stderr, sys.stdout)), None)
        if stream is None:
            return
        from fanout.output.screen import Screen, console_on

        console = self._console = console_on(stream)
        # Rich takes a terminal without a name for one that can do everything.
        if console.is_interactive and os.environ.get("TERM"):
            self._screen = Screen(stream, console, self._before_local)

    @property
    def _can_redraw(self) -> bool:
        """Lines can be redrawn."""
        return self._screen is not None or self._cell is not None

    def _size(self) -> tuple[int, int]:
        return self._screen.size() if self._screen is not None else _CELL_SIZE

    def _channel(self, stream: TextIO | None, is_stdout: bool) -> _Channel:
        is_shown = self._cell is not None or is_terminal(stream)
        is_drawn = is_shown and self._screen is not None
        return _Channel(stream, is_shown, is_drawn, is_raw=is_stdout and not is_shown)

    def _channel_of(self, source: int) -> _Channel:
        return self._channels.get(source, self._channels[m.Source.STDERR])

    # --- facts, from the sessions -----------------------------------------------------------------

    def open_call(self, call: LiveCall, name: str) -> None:
        """A session has a new call."""
        state, now = call.state, self._clock()
        with self._facts:
            self._board.open_call(state.call_id, name, now, call.count_hint, state.is_durable)
            if call.count_hint != 1 and not state.is_durable:
                self._maps[state.call_id] = call
        self.wake()

    def close_call(self, call: LiveCall) -> None:
        """It has ended, or nobody wants it any more."""
        call_id, now = call.state.call_id, self._clock()
        with self._facts:
            if self._maps.pop(call_id, None) is not None:
                self._count(call, now)
            summary = self._board.close_call(call_id, now)
        if summary is not None:
            self._summaries.append(summary)
        if self._pending or not (self._drawn.is_empty and self._written.is_empty):
            self._ended.append(call_id)
        self.wake()

    def receive(self, message: m.Log | m.CallProgress | m.FunctionProgress) -> None:
        """The scheduler passes on what a container wrote, or how calls get on."""
        if not isinstance(message, m.Log):
            with self._facts:
                self._board.report(message)
            self.wake()
            return
        origin = Origin(message.container_id, message.source, message.call_id, message.index)
        data = bytes(message.payload)
        channel = self._channel_of(message.source)
        if channel.is_drawn:
            self._put_aside(origin, data)
        else:
            with self._writing:
                self._write_entries(self._written.feed(origin, data, self._clock()))
            if not self._written.is_empty:
                self.wake()

    def connected(self) -> None:
        """A connection is new: the scheduler says all again that it has to say."""
        with self._facts:
            self._board.forget_reports()

    def _put_aside(self, origin: Origin, data: bytes) -> None:
        with self._facts:
            if self._pending_size > PENDING_BYTES_MAX:
                self._lost_size += len(data)
            else:
                self._pending.append((origin, data, self._clock()))
                self._pending_size += len(data)
        self.wake()

    def _count(self, call: LiveCall, now: float) -> None:
        state = call.state
        self._board.count(
            state.call_id,
            state.count,
            state.received.count,
            call.failed_count,
            state.is_sealed,
            now,
        )

    # --- drawing ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to draw."""
        if self._wake.is_set():
            return
        self._wake.set()
        if self._thread is None:
            with self._facts:
                if self._thread is None and not self._stopping.is_set():
                    self._thread = threading.Thread(
                        target=self._run, name="fanout-output", daemon=True
                    )
                    self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            is_busy = True
            while is_busy and not self._stopping.wait(DRAW_INTERVAL_S):
                # Cleared first: a fact that comes during the look is seen by the next one.
                self._wake.clear()
                is_busy = self.tick() or self._wake.is_set()

    def tick(self) -> bool:
        """Bring to the screen what has changed; whether there is more to come."""
        now = self._clock()
        self._look_at_sessions(now)
        width, height = self._size()
        with self._facts:
            for call_id in self._board.map_ids:
                self._count(self._maps[call_id], now)
            lines: list[Line] = []
            plain: list[str] = []
            if self._show_progress and self._can_redraw:
                room = max(1, height - LIVE_ROWS_MAX - 3)
                lines = self._board.lines(now, width - 1, room)
            elif self._show_progress:
                plain = self._board.plain_lines(now)
            is_busy = self._board.is_busy
        with self._writing:
            self._write_entries(self._written.tick(now))
            for sentence in plain:
                write_text(sys.stderr, f"fanout: {sentence}\n")
        with self._drawing:
            above = self._drain()
            if not self._pending:
                above += self._as_text(self._drawn.tick(now))
            lines = self._live_lines(width - 1) + lines
            if self._screen is not None:
                self._screen.draw(above, lines, now)
            elif self._cell is not None:
                self._write(sys.stdout, above)
                self._cell.draw(lines)
        is_held = not (self._drawn.is_empty and self._written.is_empty)
        return is_busy or is_held or bool(self._pending) or self._away_since is not None

    def _look_at_sessions(self, now: float) -> None:
        sessions = sys.modules.get("fanout.client.sessions")
        known: list[Any] = [] if sessions is None else sessions.all_here()
        is_away = any(session.is_awaited for session in known)
        self._away_since = (self._away_since or now) if is_away else None
        text = ""
        if self._away_since is not None and now >= self._away_since + CONNECTING_AFTER_S:
            text = "connecting to the scheduler"
        with self._facts:
            self._board.connecting = text

    def _before_local(self) -> str:
        """What comes before a text that the script prints now."""
        if not self._pending and not self._summaries:
            return ""
        return self._drain()

    def _drain(self) -> str:
        """What was put aside, as text for the screen."""
        parts: list[str] = []
        size = 0
        while self._pending and size < DRAWN_BYTES_MAX:
            with self._facts:
                origin, data, came_at = self._pending.popleft()
                self._pending_size -= len(data)
            size += len(data)
            parts.append(self._as_text(self._drawn.feed(origin, data, came_at)))
        if not self._pending:
            while self._ended:
                call_id = self._ended.popleft()
                parts.append(self._as_text(self._drawn.end_call(call_id)))
                with self._writing:
                    self._write_entries(self._written.end_call(call_id))
            while self._summaries:
                parts.append(self._summary_text(self._summaries.popleft()))
        lost, self._lost_size = self._lost_size, 0
        if lost:
            parts.append(f"fanout: {lost:,} bytes were not shown, the terminal is too slow\n")
        return "".join(parts)

    def _summary_text(self, line: Line) -> str:
        """The line that a map leaves; without its last part where that does not fit."""
        if not self._show_progress or not self._can_redraw:
            return ""
        width, _ = self._size()
        line = line[:-1] if width_of(line) >= width else line
        return self._rendered(line) + "\n"

    def _live_lines(self, width: int) -> list[Line]:
        """The last state of progress bars in containers."""
        lines: list[Line] = []
        with self._writing:
            rows = self._drawn.live(LIVE_ROWS_MAX) + self._written.live(LIVE_ROWS_MAX)
        for origin, row in rows:
            if self._channel_of(origin.source).is_labelled:
                text = clean(row.decode(errors="replace"), has_colours=False).expandtabs()
                label = self._label_of(self._name(origin), origin.source)
                lines.append(cut_line([*label, (text, "")], width))
        return lines[:LIVE_ROWS_MAX]

    # --- text ------------------------------------------------------------------------------------

    def _as_text(self, entries: list[Entry]) -> str:
        return "".join(self._labelled(origin, data) for origin, data in entries)

    def _write_entries(self, entries: list[Entry]) -> None:
        for origin, data in entries:
            channel = self._channel_of(origin.source)
            if channel.is_labelled:
                self._write(channel.stream, self._labelled(origin, data))
            else:
                self._write(channel.stream, data.decode(errors="replace"))

    def _write(self, stream: TextIO | None, text: str) -> None:
        if not text:
            return
        if self._cell is not None:
            self._cell.write(stream, text)
        else:
            write_text(stream, text)

    def _labelled(self, origin: Origin, data: bytes) -> str:
        # A source that a later version adds is shown as stderr is.
        before, behind = self._affixes.get(origin.source, self._affixes[m.Source.STDERR])
        label = before + self._name(origin) + behind
        text = data.decode(errors="replace")
        lines = text.split("\n")[:-1]
        return "".join([f"{label}{clean(line, self._has_colours)}\n" for line in lines])

    def _name(self, origin: Origin) -> str:
        with self._facts:
            return self._board.label(origin.call_id, origin.input_index)

    def _label_of(self, name: str, source: int) -> Line:
        if source == m.Source.STDOUT:
            return [(name, "cyan"), (" │ " if self._is_unicode else " | ", "dim")]
        return [(name, "red"), (" ! ", "red")]

    def _rendered(self, line: Line) -> str:
        if self._console is None:
            return plain(line)
        from fanout.output.screen import rendered

        return rendered(self._console, line)

    # --- the end ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Show what is left and give the terminal back."""
        self._stopping.set()
        self._wake.set()
        self._restore()
        if not self._is_thread_gone():
            return
        with self._writing:
            self._write_entries(self._written.close())
        with self._drawing:
            above = ""
            while self._pending:
                above += self._drain()
            above += self._drain() + self._as_text(self._drawn.close())
            if self._screen is not None:
                self._screen.close(above)
            elif self._cell is not None:
                self._write(sys.stdout, above)
                self._cell.draw([])

    def _is_thread_gone(self) -> bool:
        """Wait for our thread as long as the terminal takes what it writes; one that takes nothing,
        because somebody stopped it, must not keep us here."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        before: int | None = None
        while thread.is_alive():
            written = 0 if self._screen is None else self._screen.written
            if written == before:
                return False
            before = written
            thread.join(_STOP_TIMEOUT_S)
        return True

    def abandon(self) -> None:
        """In a forked child: never draw again."""
        self._restore()
        if self._screen is not None:
            self._screen.abandon()
