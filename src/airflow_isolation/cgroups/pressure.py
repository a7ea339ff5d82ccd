"""Pressure stall information: cpu.pressure, memory.pressure, io.pressure (Documentation/accounting/psi.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from airflow_isolation.cgroups.directory import nested_keyed

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """The share of time, 0 to 100, over the last 10, 60 and 300 seconds, and the seconds altogether."""

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
    """None where the kernel was built without it, or started with ``psi=0``: then the file says EOPNOTSUPP.

    :raises CgroupGone: the cgroup has been removed.
    """
    content = cgroup.read_if_there(f"{resource}.pressure")
    return None if content is None else parse(content)


def parse(content: str) -> Pressure:
    """The content of such a file. cpu.pressure has no line ``full`` before Linux 5.13."""
    lines = nested_keyed(content)
    return Pressure(some=_stall(lines.get("some", {})), full=_stall(lines.get("full", {})))


def _stall(values: dict[str, str]) -> Stall:
    return Stall(
        avg10=float(values.get("avg10", "0")),
        avg60=float(values.get("avg60", "0")),
        avg300=float(values.get("avg300", "0")),
        total=int(values.get("total", "0")) / 1e6,
    )
