"""How the calls of this process get on: numbers in, lines out.

Three kinds of calls are told apart by who knows their numbers. Of a map the client itself does: it
gets a bar. Single calls have nothing to show but how many there are: those of one function share a
line. Spawned calls, and those that containers make, are known from the scheduler: those of one
function share a line, too.

Sans-IO: times are given, in seconds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

from fanout.output.style import Line, Span, cells, cut, cut_line, width_of
from fanout.protocol import messages as m

#: A call that is over before this leaves no trace on the screen.
SHOWN_AFTER_S = 0.3
#: A map of at least this length leaves a line when it ends.
SUMMARY_AFTER_S = 1.0
#: Single calls that follow each other within this time are counted together.
PAUSE_S = 2.0
#: Where no screen can be redrawn a line is written as often.
PLAIN_INTERVAL_S = 30.0
#: The rate is that of the last seconds.
RATE_WINDOW_S = 10.0
RATE_SAMPLE_S = 0.5
#: Lines of bars at most, and bars of one function before they become one line.
LINES_MAX = 10
BARS_OF_ONE_MAX = 4
NAME_WIDTH_MAX = 24
BAR_WIDTH_MIN, BAR_WIDTH_MAX = 8, 40
#: Calls that have ended, whose text may still come.
ENDED_LABELS_MAX = 1024


class Glyphs(NamedTuple):
    """What bars are made of; a terminal without Unicode gets the plain ones. Rich's own bar shows
    nothing of what is still to do where there are no colours."""

    full: str = "━"
    empty: str = "─"
    done: str = "✓"
    failed: str = "✗"
    stopped: str = "■"
    spinner: str = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


PLAIN_GLYPHS = Glyphs("#", ".", "done:", "failed:", "stopped:", "|/-\\")


class _Label(NamedTuple):
    name: str
    #: The how-manieth call of its function this is.
    number: int
    is_single: bool


class _Map:
    """A call with many inputs that this process waits for."""

    def __init__(self, label: _Label, opened_at: float, total: int | None) -> None:
        self.label = label
        self.opened_at = opened_at
        #: When a line of it is due where only lines can be written.
        self.plain_at = opened_at + PLAIN_INTERVAL_S
        self.total = total
        self.added = self.done = self.failed = 0
        self.is_sealed = False
        #: (time, how many were done), one for each moment of the last while.
        self.samples: deque[tuple[float, int]] = deque()

    def count(self, added: int, done: int, failed: int, is_sealed: bool, now: float) -> None:
        self.added, self.done, self.failed = added, done, failed
        self.is_sealed = is_sealed
        if is_sealed:
            self.total = added
        samples = self.samples
        if not samples or now >= samples[-1][0] + RATE_SAMPLE_S:
            samples.append((now, done))
            while samples[0][0] < now - RATE_WINDOW_S and len(samples) > 2:
                samples.popleft()

    def rate(self, now: float) -> float:
        """Inputs a second: of the last while, or if nothing happened in it, of all the time."""
        if self.samples:
            then, before = self.samples[0]
            if self.done > before and now - then >= RATE_SAMPLE_S:
                return (self.done - before) / (now - then)
        return self.done / max(now - self.opened_at, 1e-3)


class _Singles:
    """The single calls of one function since it last had none for a while."""

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.opened: set[bytes] = set()
        self.done = 0
        self.idle_since = 0.0


class Board:
    """See the module's text.

    Args:
        glyphs: what its lines are drawn with.
    """

    def __init__(self, glyphs: Glyphs) -> None:
        self._glyphs = glyphs
        self._maps: dict[bytes, _Map] = {}
        self._singles: dict[str, _Singles] = {}
        #: Open calls that only the scheduler knows, and of those that ended how many inputs.
        self._others: dict[bytes, m.CallProgress] = {}
        self._ended_others: dict[tuple[str, bool], int] = {}
        #: What the scheduler says of the calls that this process knows, too.
        self._reports: dict[bytes, m.CallProgress] = {}
        self._functions: dict[bytes, m.FunctionProgress] = {}
        self._labels: dict[bytes, _Label] = {}
        self._ended_labels: OrderedDict[bytes, _Label] = OrderedDict()
        self._numbers: dict[str, int] = {}
        #: Why there is nothing to see yet; "" when connected.
        self.connecting = ""

    # --- what happens ----------------------------------------------------------------------------

    def open_call(
        self, call_id: bytes, name: str, now: float, total: int | None, is_durable: bool
    ) -> None:
        """A call begins.

        Args:
            call_id: its id.
            name: of its function.
            now: the time.
            total: how many inputs it will have, if that is known; with 1 it is a single call.
            is_durable: it is spawned.
        """
        label = self._name(call_id, name, total == 1)
        if is_durable:
            # It is open here only until it is stored, and then the scheduler knows more of it.
            return
        if label.is_single:
            singles = self._singles.get(name)
            if singles is None or (not singles.opened and now > singles.idle_since + PAUSE_S):
                singles = self._singles[name] = _Singles(now)
            singles.opened.add(call_id)
        else:
            self._maps[call_id] = _Map(label, now, total)

    def count(
        self, call_id: bytes, added: int, done: int, failed: int, is_sealed: bool, now: float
    ) -> None:
        """The numbers of a map: inputs so far, those with an output, those with an error."""
        if (view := self._maps.get(call_id)) is not None:
            view.count(added, done, failed, is_sealed, now)

    def close_call(self, call_id: bytes, now: float) -> Line | None:
        """A call has ended; gives the line that it leaves, if it was long enough to be seen."""
        label = self._labels.pop(call_id, None)
        if label is not None:
            self._keep_label(call_id, label)
            if label.is_single and (singles := self._singles.get(label.name)) is not None:
                singles.done += call_id in singles.opened
                singles.opened.discard(call_id)
                singles.idle_since = now
        self._reports.pop(call_id, None)
        view = self._maps.pop(call_id, None)
        if view is None or (now - view.opened_at < SUMMARY_AFTER_S):
            return None
        return self._summary(view, now)

    def report(self, message: m.CallProgress | m.FunctionProgress) -> None:
        """The scheduler says how a call or a function gets on."""
        if isinstance(message, m.FunctionProgress):
            self._functions[message.function_id] = message
            if not message.running and not message.starting:
                del self._functions[message.function_id]
            return
        call_id = message.call_id
        if not message.is_durable and not message.is_nested:
            if call_id in self._labels:
                self._reports[call_id] = message
            return
        if call_id not in self._labels and call_id not in self._ended_labels:
            is_single = message.is_sealed and message.input_count == 1
            self._keep_label(call_id, self._name(call_id, message.name, is_single))
            del self._labels[call_id]
        if message.is_over:
            self._others.pop(call_id, None)
            key = (message.name, message.is_nested)
            ended = self._ended_others.get(key, 0)
            self._ended_others[key] = ended + max(message.input_count, message.finished_count)
        else:
            self._others[call_id] = message

    def forget_reports(self) -> None:
        """What the scheduler said is not true any more."""
        self._reports.clear()
        self._functions.clear()
        self._others.clear()

    def _name(self, call_id: bytes, name: str, is_single: bool) -> _Label:
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        label = self._labels[call_id] = _Label(name, number, is_single)
        return label

    def _keep_label(self, call_id: bytes, label: _Label) -> None:
        self._ended_labels[call_id] = label
        if len(self._ended_labels) > ENDED_LABELS_MAX:
            self._ended_labels.popitem(last=False)

    # --- what is asked ---------------------------------------------------------------------------

    @property
    def map_ids(self) -> list[bytes]:
        """The maps whose numbers are wanted; of very many, the first."""
        return [call_id for call_id, _ in zip(self._maps, range(16 * LINES_MAX), strict=False)]

    @property
    def is_busy(self) -> bool:
        """Something is open, or is about to be."""
        return bool(
            self.connecting
            or self._maps
            or self._others
            or any(singles.opened for singles in self._singles.values())
        )

    def label(self, call_id: bytes, index: int) -> str:
        """Which input wrote something: `f`, `f#2` for a second call, `f[7]` for one of many."""
        if not any(call_id):
            # Of no input: a hook that runs behind the last one.
            return "exit"
        label = self._labels.get(call_id) or self._ended_labels.get(call_id)
        if label is None:
            return f"call {call_id.hex()[:8]}[{index}]"
        number = f"#{label.number}" if label.number > 1 else ""
        return f"{label.name}{number}" + ("" if label.is_single else f"[{index}]")

    def lines(self, now: float, width: int, height: int) -> list[Line]:
        """What to draw now: at most `height` lines of at most `width` columns."""
        rows = self._rows(now)
        status = self._status(now) if rows or self.connecting else None
        room = max(1, min(LINES_MAX, height - (status is not None)))
        rest = len(rows) - room + 1 if len(rows) > room else 0
        rows = rows[: room - 1] if rest else rows
        names = [cells(row.name) for row in rows]
        column = min(max(names, default=0), NAME_WIDTH_MAX, max(8, width // 3))
        drawn = [row.draw(width, column, self._glyphs) for row in rows]
        if rest:
            drawn.append(cut_line([(f"and {rest:,} more", "dim")], width))
        if status is not None and height > len(drawn):
            drawn.append(cut_line(status, width))
        return drawn

    def plain_lines(self, now: float) -> list[str]:
        """A sentence for each map of which nothing was written for a while."""
        written = []
        for view in self._maps.values():
            if now >= view.plain_at:
                view.plain_at = now + PLAIN_INTERVAL_S
                written.append(self._map_row(view, view.label.name, now).sentence())
        return written

    # --- rows ------------------------------------------------------------------------------------

    def _rows(self, now: float) -> list[_Row]:
        rows: list[_Row] = []
        of_one: dict[str, list[tuple[bytes, _Map]]] = {}
        for call_id, view in self._maps.items():
            if now >= view.opened_at + SHOWN_AFTER_S:
                of_one.setdefault(view.label.name, []).append((call_id, view))
        for name, views in of_one.items():
            if len(views) > BARS_OF_ONE_MAX:
                rows.append(self._merged_row(name, [view for _, view in views], now))
                continue
            for call_id, view in views:
                number = f"#{view.label.number}" if self._numbers[name] > 1 else ""
                rows.append(self._map_row(view, name + number, now, self._reports.get(call_id)))
        for name, singles in self._singles.items():
            if singles.opened and now >= singles.began_at + SHOWN_AFTER_S:
                rows.append(self._singles_row(name, singles, now))
        rows += self._other_rows()
        return rows

    def _map_row(
        self, view: _Map, name: str, now: float, report: m.CallProgress | None = None
    ) -> _Row:
        rate = view.rate(now)
        row = _Row(name, view.done, view.total, view.failed)
        if report is not None:
            row.running = report.running
            row.waits_for = "" if report.running or report.starting else report.waits_for
        if view.done:
            row.rate = rate
            if view.total is not None and rate > 0:
                row.left_s = (view.total - view.done) / rate
        else:
            row.elapsed_s = now - view.opened_at
        return row

    def _merged_row(self, name: str, views: list[_Map], now: float) -> _Row:
        """Many maps of one function."""
        totals = [view.total for view in views]
        total = None if None in totals else sum(filter(None, totals))
        row = _Row(
            name,
            sum(view.done for view in views),
            total,
            sum(view.failed for view in views),
            note=f"{len(views):,} calls",
        )
        row.running = self._running_of(name)
        row.rate = sum(view.rate(now) for view in views if view.done)
        if total is not None and row.rate > 0:
            row.left_s = (total - row.done) / row.rate
        return row

    def _singles_row(self, name: str, singles: _Singles, now: float) -> _Row:
        count = len(singles.opened)
        if count == 1 and not singles.done:
            row = _Row(name)
            row.is_single = True
            row.elapsed_s = now - singles.began_at
            report = self._reports.get(next(iter(singles.opened)))
            if report is not None:
                row.running = report.running
                row.waits_for = "" if report.running or report.starting else report.waits_for
            return row
        row = _Row(name, singles.done)
        row.unit = "calls "
        row.open_count = count
        row.running = self._running_of(name)
        row.rate = singles.done / max(now - singles.began_at, 1e-3)
        return row

    def _other_rows(self) -> Iterable[_Row]:
        groups: dict[tuple[str, bool], list[m.CallProgress]] = {}
        for report in self._others.values():
            groups.setdefault((report.name, report.is_nested), []).append(report)
        if not self.is_busy:
            self._ended_others.clear()
        for (name, is_nested), reports in groups.items():
            ended = self._ended_others.get((name, is_nested), 0)
            total = ended + sum(report.input_count for report in reports)
            row = _Row(
                name,
                ended + sum(report.finished_count for report in reports),
                total if all(report.is_sealed for report in reports) else None,
                note="nested" if is_nested else "spawned",
            )
            row.running = sum(report.running for report in reports)
            waiting = [report.waits_for for report in reports if report.waits_for]
            if not row.running and waiting and not any(report.starting for report in reports):
                row.waits_for = waiting[0]
            yield row

    def _running_of(self, name: str) -> int:
        return sum(seen.running for seen in self._functions.values() if seen.name == name)

    def _status(self, now: float) -> Line | None:
        """The last line: what everything else waits for."""
        glyphs = self._glyphs
        frame = glyphs.spinner[int(now * 10) % len(glyphs.spinner)]
        if self.connecting:
            return [(frame, "cyan"), (f" {self.connecting}", "")]
        starting = {s.name: 0 for s in self._functions.values() if s.starting}
        for seen in self._functions.values():
            if seen.starting:
                starting[seen.name] += seen.starting
        if not starting:
            return None
        count = sum(starting.values())
        noun = "a container" if count == 1 else f"{count} containers"
        return [(frame, "cyan"), (f" starting {noun} of {', '.join(starting)}", "")]

    def _summary(self, view: _Map, now: float) -> Line:
        """The line that a map leaves."""
        number = f"#{view.label.number}" if self._numbers[view.label.name] > 1 else ""
        line: Line = []
        elapsed = now - view.opened_at
        if view.total is None or not view.is_sealed or view.done < view.total:
            of = f" of {view.total:,}" if view.total is not None else ""
            line = [(self._glyphs.stopped, "yellow"), (f" {view.label.name}{number}", "bold")]
            line.append((f"  stopped after {view.done:,}{of}", ""))
        else:
            glyph = self._glyphs.failed if view.failed else self._glyphs.done
            line = [(glyph, "red" if view.failed else "green")]
            line += [(f" {view.label.name}{number}", "bold"), (f"  {view.done:,} inputs", "")]
        if view.failed:
            line.append((f"  {view.failed:,} failed", "red"))
        speed = f", {_rate(view.done / elapsed)}/s" if view.done else ""
        return [*line, (f"  in {duration(elapsed)}{speed}", "dim")]


class _Row:
    """One line of the board, before it is known how much room there is."""

    def __init__(
        self,
        name: str,
        done: int = 0,
        total: int | None = None,
        failed: int = 0,
        note: str = "",
    ) -> None:
        self.name = name
        self.done = done
        self.total = total
        self.failed = failed
        self.note = note
        #: What is counted, if not inputs.
        self.unit = ""
        self.running = 0
        self.open_count = 0
        self.rate = 0.0
        self.left_s: float | None = None
        self.elapsed_s: float | None = None
        self.waits_for = ""
        #: There is only one input: whether it runs, and for how long, is all there is to say.
        self.is_single = False

    def sentence(self) -> str:
        """The row where only lines can be written."""
        facts = ["".join(text for text, _ in spans) for _, spans in self._facts()]
        return f"{self.name}: {', '.join(facts)}"

    def draw(self, width: int, name_width: int, glyphs: Glyphs) -> Line:
        """The row in at most `width` columns; the least important facts go first."""
        name = cut(self.name, name_width)
        line: Line = [(name + " " * (name_width - cells(name)), "bold")]
        facts = self._facts()
        while len(facts) > 1 and name_width + _width_of(facts) > width:
            facts.remove(max(facts, key=lambda fact: fact[0]))
        room = width - name_width - _width_of(facts) - 2
        if self.total and room >= BAR_WIDTH_MIN:
            bar = min(room, BAR_WIDTH_MAX)
            full = bar * min(self.done, self.total) // self.total
            line += [("  ", ""), (glyphs.full * full, "green")]
            line.append((glyphs.empty * (bar - full), "dim"))
        for _, spans in facts:
            line += [("  ", ""), *spans]
        return cut_line(line, width)

    def _facts(self) -> list[tuple[int, list[Span]]]:
        """(what goes first where room is short, spans), in the order in which they stand."""
        facts: list[tuple[int, list[Span]]] = []
        if not self.is_single:
            of = f"/{self.total:,}" if self.total is not None else f" {self.unit}done"
            facts.append((0, [(f"{self.done:,}{of}", "")]))
        if self.note:
            facts.append((6, [(self.note, "dim")]))
        if self.failed:
            facts.append((1, [(f"{self.failed:,} failed", "red")]))
        if self.open_count:
            facts.append((4, [(f"{self.open_count:,} open", "")]))
        if self.running:
            facts.append((3, [("running" if self.is_single else f"{self.running:,} running", "")]))
        if self.waits_for:
            facts.append((2, [(f"waits for {self.waits_for}", "yellow")]))
        if self.rate:
            facts.append((5, [(f"{_rate(self.rate)}/s", "dim")]))
        if self.left_s is not None:
            facts.append((2, [(f"{duration(self.left_s)} left", "dim")]))
        if self.elapsed_s is not None:
            facts.append((2, [(duration(self.elapsed_s), "dim")]))
        return facts


def _width_of(facts: list[tuple[int, list[Span]]]) -> int:
    return sum(2 + width_of(spans) for _, spans in facts)


def duration(seconds: float) -> str:
    """`8 s`, `2:05`, `1:02:05`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
