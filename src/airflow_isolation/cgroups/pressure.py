"""Pressure stall information: cpu.pressure, memory.pressure, io.pressure (Documentation/accounting/psi.rst)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup

# kernel/sched/psi.c, psi_show
_LINE: Final = re.compile(
    r"^(?P<share>some|full) avg10=([0-9.]+) avg60=([0-9.]+) avg300=([0-9.]+) total=([0-9]+)$", re.MULTILINE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """The share of time with a wait, 0 to 100, over the last 10, 60 and 300 seconds, and the total in seconds."""

    avg10: float = 0.0
    avg60: float = 0.0
    avg300: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """``some``: at least one process had to wait for the resource. ``full``: all of them had to, at the same time."""

    some: Stall = Stall()
    full: Stall = Stall()


def stat(cgroup: Cgroup, resource: Literal["cpu", "memory", "io"]) -> Pressure | None:
    """The pressure now; None when the kernel was built without it, or started with ``psi=0`` (the file says EOPNOTSUPP).

    :raises CgroupGone: the cgroup has been removed.
    """
    content = cgroup.read_if_there(f"{resource}.pressure")
    return None if content is None else parse(content)


def parse(content: str) -> Pressure:
    """Parse a pressure file. cpu.pressure has no line ``full`` before Linux 5.13."""
    lines = {line["share"]: line for line in _LINE.finditer(content)}
    return Pressure(some=_stall(lines.get("some")), full=_stall(lines.get("full")))


def _stall(line: re.Match[str] | None) -> Stall:
    if line is None:
        return Stall()
    _, avg10, avg60, avg300, total = line.groups()
    return Stall(avg10=float(avg10), avg60=float(avg60), avg300=float(avg300), total=int(total) / 1e6)
