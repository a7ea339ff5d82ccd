"""The io controller: io.max, io.weight, io.stat."""

from __future__ import annotations

import os
import re
import stat as file_modes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups.directory import MAX, nested_keyed
from airflow_isolation.cgroups.errors import ControllerMissing, ValueRefused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.cgroups.directory import Cgroup
    from airflow_isolation.container_spec import DeviceRates

_NUMBERS = re.compile(r"[0-9]{1,4}:[0-9]{1,7}")
_RATES: Final = ("rbps", "wbps", "riops", "wiops")
MIN_WEIGHT, MAX_WEIGHT = 1, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Io:
    """``weight`` is 1 to 10000 against siblings; it has an effect only with the kernel's BFQ scheduler or io.cost."""

    max: tuple[DeviceRates, ...] = ()
    weight: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IoStat:
    """Bytes and operations since the cgroup was made, of all devices. What only touched the page cache is not counted."""

    bytes_read: int = 0
    bytes_written: int = 0
    reads: int = 0
    writes: int = 0


def set(cgroup: Cgroup, io: Io) -> None:
    """Write the fields that are set. May be called twice.

    :raises ValueRefused: there is no such disk, or a value is out of range.
    :raises ControllerMissing: a weight is set, and this kernel has nothing that uses it.
    """
    check(io)
    for rates in io.max:
        given = {name: getattr(rates, name) for name in _RATES}
        words = [f"{name}={value}" for name, value in given.items() if value is not None]
        if words:
            try:
                cgroup.write("io.max", " ".join([device_numbers(rates.device), *words]))
            except ValueRefused as error:
                error.hint = f"{rates.device} must be a whole disk of this host, no partition"
                raise
    if io.weight is not None:
        # With BFQ but not io.cost, the file has another name (block/bfq-cgroup.c).
        file = next((name for name in ("io.weight", "io.bfq.weight") if cgroup.has(name)), None)
        if file is None:
            raise ControllerMissing(
                f"io_weight can't be set: {cgroup.path} has no io.weight",
                hint="It needs the disk's scheduler to be bfq, or a kernel with io.cost; io_max works without",
            )
        cgroup.write(file, f"default {io.weight}")


def check(io: Io) -> None:
    """Check without writing.

    :raises ValueRefused: the kernel would refuse a value.
    """
    if io.weight is not None and not MIN_WEIGHT <= io.weight <= MAX_WEIGHT:
        raise ValueRefused(f"io_weight is {io.weight}", hint=f"Give {MIN_WEIGHT} to {MAX_WEIGHT}; 100 is usual")
    for rates in io.max:
        for name in _RATES:
            value = getattr(rates, name)
            if isinstance(value, int) and value < 1:
                raise ValueRefused(f"{name} of {rates.device} is {value}", hint=f"Give more than 0, or {MAX}")


def device_numbers(device: str) -> str:
    """``MAJOR:MINOR`` of a disk. ``device`` is its path, or ``MAJOR:MINOR`` already.

    :raises ValueRefused: there is nothing at the path, or no block device.
    """
    if _NUMBERS.fullmatch(device):
        return device
    try:
        found = Path(device).stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ValueRefused(
            f"there is no disk {device!r}: {reason}", hint="Give a path such as /dev/sda, or MAJOR:MINOR (see lsblk)"
        ) from error
    if not file_modes.S_ISBLK(found.st_mode):
        raise ValueRefused(f"{device!r} is not a disk", hint="Give a path such as /dev/sda, or MAJOR:MINOR (see lsblk)")
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def limits(cgroup: Cgroup) -> Mapping[str, Mapping[str, str]]:
    """The content of io.max, by ``MAJOR:MINOR``; empty where the controller is not enabled."""
    return nested_keyed(cgroup.read_if_there("io.max") or "")


def stat(cgroup: Cgroup) -> IoStat | None:
    """The sums of io.stat now; None where the controller is not enabled.

    :raises CgroupGone: the cgroup has been removed.
    """
    content = cgroup.read_if_there("io.stat")
    return None if content is None else parse_stat(content)


def parse_stat(content: str) -> IoStat:
    """The content of io.stat, summed up."""
    devices = nested_keyed(content).values()

    def total(key: str) -> int:
        return sum(int(device.get(key, "0")) for device in devices)

    return IoStat(bytes_read=total("rbytes"), bytes_written=total("wbytes"), reads=total("rios"), writes=total("wios"))
