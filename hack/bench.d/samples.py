"""Series of measured times: how they are summed up, printed and kept. No benchmark asserts anything."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: The table is the result; everything else is progress.
result = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
progress = Console(stderr=True, highlight=False, soft_wrap=True)


def step(text: str) -> None:
    """Progress that overwrites itself; a log file is spared it."""
    if progress.is_terminal:
        progress.print(f"\r\x1b[K{text}", end="", markup=False)


@dataclass(frozen=True)
class Series:
    """What was measured, and every sample in seconds. ``part_of`` names the series that this one is a stage of."""

    name: str
    seconds: tuple[float, ...]
    part_of: str = ""

    def percentile(self, percent: float) -> float:
        """By nearest rank: always one of the samples."""
        ranked = sorted(self.seconds)
        return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


@dataclass(frozen=True)
class Report:
    """The outcome of one benchmark. ``ratios``: what was compared → the quotient of the medians."""

    benchmark: str
    series: tuple[Series, ...]
    ratios: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": dict(self.versions),
            "ratios": dict(self.ratios),
            "series": {
                each.name: {"p50": each.percentile(50), "p95": each.percentile(95), "seconds": list(each.seconds)}
                for each in self.series
            },
        }

    def show(self) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("WHAT", overflow="fold")
        for heading in ("N", "P50", "P95", "MIN", "MAX"):
            table.add_column(heading, justify="right")
        for each in self.series:
            row = (each.percentile(50), each.percentile(95), min(each.seconds), max(each.seconds))
            name = f"  {each.name}" if each.part_of else each.name
            table.add_row(name, str(len(each.seconds)), *map(milliseconds, row), style="dim" if each.part_of else "")
        result.print(table)
        for name, ratio in self.ratios.items():
            result.print(f"{name}: {ratio:.2f}")
        for name, version in {**machine(), **self.versions}.items():
            result.print(f"{name}: {version}", style="dim")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


def ratio(above: Series, below: Series) -> dict[str, float]:
    """How many times as long the median of ``above`` is."""
    return {f"{above.name} / {below.name}": above.percentile(50) / below.percentile(50)}


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def machine() -> dict[str, str]:
    """What the numbers depend on. The load is there so that a reader can tell a quiet machine from a busy one."""
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def spread(series: Mapping[str, Sequence[float]], *, part_of: str = "") -> tuple[Series, ...]:
    return tuple(Series(name, tuple(seconds), part_of) for name, seconds in series.items())
