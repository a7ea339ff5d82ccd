"""The cpuset controller: cpuset.cpus, cpuset.mems."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.errors import ValueRefused

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup

_LIST = re.compile(r"[0-9]{1,5}(?:-[0-9]{1,5})?(?:,[0-9]{1,5}(?:-[0-9]{1,5})?)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpuset:
    """Which processors, and which memory nodes, as in ``0-3,8``."""

    cpus: str | None = None
    mems: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CpusetStat:
    """What the cgroup really gets: the cgroups above it may allow less than it asks for."""

    cpus: frozenset[int]
    mems: frozenset[int]


def set(cgroup: Cgroup, cpuset: Cpuset) -> None:
    """Write the fields that are set. May be called twice.

    :raises ValueRefused: not a list of numbers, or processors that this host does not have.
    """
    check(cpuset)
    if cpuset.cpus is not None:
        cgroup.write("cpuset.cpus", cpuset.cpus)
    if cpuset.mems is not None:
        cgroup.write("cpuset.mems", cpuset.mems)


def check(cpuset: Cpuset) -> None:
    """Check without writing.

    :raises ValueRefused: not a list of numbers. Empty is refused too: for the kernel it means no limit.
    """
    for name, value in (("cpuset", cpuset.cpus), ("cpuset memory nodes", cpuset.mems)):
        if value is not None and not (_LIST.fullmatch(value) and _numbers_grow(value)):
            raise ValueRefused(f"{name} is {value!r}", hint="Give numbers and ranges such as 0-3,8")


def stat(cgroup: Cgroup) -> CpusetStat | None:
    """The processors and memory nodes now; None where the controller is not enabled.

    :raises CgroupGone: the cgroup has been removed.
    """
    cpus, mems = (cgroup.read_if_there(f"cpuset.{name}.effective") for name in ("cpus", "mems"))
    return None if cpus is None else CpusetStat(cpus=parse_list(cpus), mems=parse_list(mems or ""))


def parse_list(content: str) -> frozenset[int]:
    r"""Numbers in the kernel's list format.

    >>> sorted(parse_list("0-2,8\n"))
    [0, 1, 2, 8]
    """
    ranges = (part.partition("-") for part in content.strip().split(",") if part)
    return frozenset(number for first, _, last in ranges for number in range(int(first), int(last or first) + 1))


def _numbers_grow(value: str) -> bool:
    ranges = (part.partition("-") for part in value.split(","))
    return all(int(first) <= int(last or first) for first, _, last in ranges)
