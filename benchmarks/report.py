"""Medians, ratios and bars, as a table for people and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20
#: What the project holds itself to.
MAP_RATIO_MIN = 0.20
CALL_RATIO_MAX = 2.0
TAIL_RATIO_MAX = 5.0
COLD_START_S_MAX = 1.0
WARM_START_S_MAX = 0.2
IMPORT_S_MAX = 0.1
MEMORY_GROWTH_MIB_MAX = 8.0


@dataclass
class Series:
    """One figure of one engine, a value a round; None where the engine has no such thing."""

    values: list[float | None] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        known = [value for value in self.values if value is not None]
        return statistics.median(known) if known else None


def ratio(ours: Series, theirs: Series) -> float | None:
    """Median of the ratios round by round, so that a slow moment of the machine hits both."""
    pairs = zip(ours.values, theirs.values, strict=True)
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    return statistics.median(ratios) if ratios else None


@dataclass
class Bar:
    """A limit, what was measured, and whether it is met."""

    name: str
    value: float
    limit: float
    unit: str
    is_minimum: bool = False

    @property
    def is_met(self) -> bool:
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.is_minimum else "<="
        verdict = "pass" if self.is_met else "FAIL"
        return (
            f"  {verdict}  {self.name:<66} {self.value:8.2f} {self.unit:<3} {sign} {self.limit:g}"
        )


@dataclass
class Report:
    """Everything that was measured. `series` is keyed by figure, then by engine."""

    series: dict[str, dict[str, Series]] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    #: What went wrong; the other figures stand.
    failures: list[str] = field(default_factory=list)
    #: (engine, figure) of what failed while the rounds ran.
    failed: set[tuple[str, str]] = field(default_factory=set)

    def add(self, figure: str, engine: str, value: float | None) -> None:
        self.series.setdefault(figure, {}).setdefault(engine, Series()).values.append(value)

    def require(self, name: str, value: float | None, limit: float, unit: str = "x") -> None:
        if value is not None:
            self.bars.append(Bar(name, value, limit, unit))

    def require_at_least(self, name: str, value: float | None, limit: float) -> None:
        if value is not None:
            self.bars.append(Bar(name, value, limit, "x", is_minimum=True))

    def ratio_to(self, engine: str, figure: str) -> float | None:
        by_engine = self.series.get(figure, {})
        if "fanout" not in by_engine or engine not in by_engine:
            return None
        return ratio(by_engine["fanout"], by_engine[engine])

    def table(self, figure: str) -> Iterable[str]:
        """A line for each engine: the median, and fanout's value divided by the engine's."""
        yield f"\n{figure}"
        for engine, series in self.series[figure].items():
            if series.median is None:
                yield f"  {engine:<17} {'-':>14}"
                continue
            value = f"{series.median:,.0f}" if series.median >= 100 else f"{series.median:.1f}"
            times = self.ratio_to(engine, figure)
            beside = f"   fanout is {times:.2f} x" if times and engine != "fanout" else ""
            yield f"  {engine:<17} {value:>14}{beside}"

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "figures": {
                figure: {
                    engine: {
                        "median": series.median,
                        "values": series.values,
                        "fanout_is": self.ratio_to(engine, figure),
                    }
                    for engine, series in by_engine.items()
                }
                for figure, by_engine in self.series.items()
            },
            "bars": [{**vars(bar), "is_met": bar.is_met} for bar in self.bars],
            "details": self.details,
            "failures": self.failures,
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
    }
