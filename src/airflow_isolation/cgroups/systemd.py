"""Limits of a slice. Its files are systemd's to write, which writes them again from what it knows: so it is told.

systemctl as root talks to systemd itself and needs no message bus. What it is told with ``--runtime`` lies in
/run/systemd/system.control and holds until the host starts anew, also while there is no such slice (systemctl(1)).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups import cpu, memory, pids
from airflow_isolation.cgroups.directory import MAX, open_cgroup
from airflow_isolation.cgroups.errors import CgroupDenied, CgroupError, CgroupGone, ValueRefused
from airflow_isolation.cgroups.limits import NO_LIMITS, Limits, check_limits, read_limits
from airflow_isolation.cgroups.slices import slice_path

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Max

#: Is there where systemd is process 1 (sd_booted(3)).
BOOTED: Final = Path("/run/systemd/system")
_SECONDS: Final = 30.0
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def check_reach() -> None:
    """Check that this process can give systemd orders.

    :raises CgroupDenied: it can't.
    """
    if os.geteuid() != 0 or not BOOTED.is_dir():
        raise CgroupDenied(
            "systemd, which manages the slices, takes orders only from the host's root",
            hint="Run the worker as root and outside of a container",
        )


def limits_of_slice(mount: Path, name: str) -> Limits:
    """The limits of cpu, memory and pids that hold for a slice; none while the slice does not exist."""
    try:
        with open_cgroup(mount, slice_path(name)) as cgroup:
            return read_limits(cgroup)
    except CgroupGone:
        return NO_LIMITS


def limit_slice(mount: Path, name: str, limits: Limits) -> None:
    """Have systemd make a slice and limit the cpus, memory and pids of all in it together. May be called twice.

    :raises ValueRefused: a limit is wrong; the error names it.
    :raises CgroupDenied: this process can't give systemd orders, or another systemd manages the slices.
    :raises CgroupError: systemctl failed; the error has its words.
    """
    check_limits(limits)
    if limits == NO_LIMITS or _holds(limits_of_slice(mount, name), limits):
        return
    check_reach()
    _systemctl("set-property", "--runtime", name, *properties(limits))
    _systemctl("start", name)
    # In a container with a systemd of its own, that one would accept the limits too, without effect on dockerd's containers.
    if not _holds(limits_of_slice(mount, name), limits):
        raise CgroupDenied(
            f"systemd was told the limits of {name}, but {mount / slice_path(name)} does not hold them",
            hint="Run the worker as root beside dockerd's own systemd, or set no budget",
        )


def properties(limits: Limits) -> tuple[str, ...]:
    """The limits in the words of systemd.resource-control(5); what is None is left out.

    >>> properties(Limits(cpu=cpu.Cpu(cpus=1.5), memory=memory.Memory(max=2**20), pids=pids.Pids(max="max")))
    ('CPUQuota=150%', 'MemoryMax=1048576', 'TasksMax=infinity')

    :raises ValueRefused: a limit that this function can't word is set.
    """
    known = Limits(
        cpu=cpu.Cpu(cpus=limits.cpu.cpus),
        memory=memory.Memory(max=limits.memory.max),
        pids=pids.Pids(max=limits.pids.max),
    )
    if limits != known:
        raise ValueRefused("of a slice only cpus, memory and pids can be limited")
    found = []
    if limits.cpu.cpus is not None:
        # Without a value: no limit. systemd writes whole percents to its files (dbus-cgroup.c), so it keeps anything finer
        # than a hundredth of a core only until it reads them again.
        found.append("CPUQuota=" + ("" if isinstance(limits.cpu.cpus, str) else f"{limits.cpu.cpus * 100:.0f}%"))
    if limits.memory.max is not None:
        found.append(f"MemoryMax={_number(limits.memory.max)}")
    if limits.pids.max is not None:
        found.append(f"TasksMax={_number(limits.pids.max)}")
    return tuple(found)


def _systemctl(*arguments: str) -> None:
    command = ["systemctl", "--no-ask-password", *arguments]
    hint = "Look at systemd's journal"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CgroupError(f"the limits of a slice can't be set: {' '.join(command)}: {error}", hint=hint) from error
    if done.returncode != 0:
        raise CgroupError(f"the limits of a slice can't be set: {' '.join(command)}: {done.stderr.strip()}", hint=hint)


def _number(limit: int | Max) -> str:
    return "infinity" if limit == MAX else str(limit)


def _holds(held: Limits, wanted: Limits) -> bool:
    """Compares as exactly as systemd keeps cpus, and the kernel memory (whole pages). A controller that is not enabled
    limits nothing.
    """
    triples = (
        (held.cpu.cpus, wanted.cpu.cpus, 0.01),
        (held.memory.max, wanted.memory.max, _PAGE),
        (held.pids.max, wanted.pids.max, 1),
    )
    return all(want is None or _same(MAX if have is None else have, want, unit) for have, want, unit in triples)


def _same(have: float | Max, want: float | Max, unit: float) -> bool:
    return have == want if MAX in (have, want) else abs(float(have) - float(want)) < unit
