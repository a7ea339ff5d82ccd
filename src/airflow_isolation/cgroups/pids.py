"""The pids controller: pids.max, pids.current, pids.peak, pids.events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.directory import Max, flat_keyed, limit_or_max, limit_or_none
from airflow_isolation.cgroups.errors import ValueRefused

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup

# PID_MAX_LIMIT of 64-bit Linux
MAX_PIDS = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Pids:
    """``max`` counts processes and threads together."""

    max: int | Max | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PidsStat:
    """``refused`` is how often the limit made a fork fail. ``peak`` is None before Linux 6.1."""

    current: int
    peak: int | None = None
    limit: int | None = None
    refused: int = 0


def set(cgroup: Cgroup, pids: Pids) -> None:
    """Write the limit if it is set. May be called twice. A limit below the present number ends nothing, but stops forks.

    :raises ValueRefused: out of range.
    """
    check(pids)
    if pids.max is not None:
        cgroup.write("pids.max", str(pids.max))


def check(pids: Pids) -> None:
    """Check without writing.

    :raises ValueRefused: the kernel would refuse the value, or no process could start with it.
    """
    if isinstance(pids.max, int) and not 1 <= pids.max <= MAX_PIDS:
        raise ValueRefused(f"pids is {pids.max}", hint=f"Give 1 to {MAX_PIDS}")


def limits(cgroup: Cgroup) -> Pids:
    """The limit that holds now; ``max`` is None where the controller is not enabled."""
    return Pids(max=limit_or_max(cgroup.read_if_there("pids.max")))


def stat(cgroup: Cgroup) -> PidsStat | None:
    """The counters now; None where the controller is not enabled.

    :raises CgroupGone: the cgroup has been removed.
    """
    current = limit_or_none(cgroup.read_if_there("pids.current"))
    if current is None:
        return None
    return PidsStat(
        current=current,
        peak=limit_or_none(cgroup.read_if_there("pids.peak")),
        limit=limit_or_none(cgroup.read_if_there("pids.max")),
        refused=flat_keyed(cgroup.read_if_there("pids.events") or "").get("max", 0),
    )
