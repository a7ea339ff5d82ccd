"""Quantities in Kubernetes' and Docker's notations, as text, into numbers.

Bytes: a number and a unit. Small letters are Docker's and powers of 1024 (``512m``, ``2g``); capital letters are
Kubernetes' and powers of 1000 (``512M``, ``2G``); with an i they are powers of 1024 (``512Mi``, ``2Gi``). A trailing
b or B is allowed (``512mb``, ``512MB``, ``512MiB``). A small m is a thousandth in Kubernetes, which is useless for
bytes; here it is Docker's.

Cores: a number (``2``, ``0.5``) or thousandths (``500m``). Durations: a number of seconds, or one with a unit
(``500ms``, ``10s``, ``5m``, ``1h``). Counts are whole numbers.

Every function raises ValueError with a sentence that names the text and what would be right.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from airflow_isolation.container_spec import DeviceRates

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

# Docker refuses less, and no process can run in less.
MIN_MEMORY: Final = 6 * MIB
MIN_TMPFS: Final = 64 * KIB
MAX_BYTES: Final = 1024 * TIB
# One hundredth of a core is the least that the kernel's quota (1 ms of 100 ms) and Docker take.
MIN_CPUS: Final = 0.01
# The largest CONFIG_NR_CPUS of Linux.
MAX_CPUS: Final = 8192
# An agent, a task and a few threads; below this the task can't even begin.
MIN_PIDS: Final = 16
# PID_MAX_LIMIT of 64-bit Linux.
MAX_PIDS: Final = 4 * 1024 * 1024
MAX_COUNT: Final = 1_000_000
MAX_SECONDS: Final = 7 * 86400
# cpu.weight and io.weight of cgroup v2.
MIN_WEIGHT: Final = 1
MAX_WEIGHT: Final = 10_000
_DEVICE_NUMBERS: Final = re.compile(r"[0-9]{1,4}:[0-9]{1,7}")

_POWER: Final = {letter: power for power, letter in enumerate(("", "k", "m", "g", "t", "p"))}
_SECONDS: Final = {"": Decimal(1), "ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_NUMBER: Final = re.compile(
    r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*([A-Za-z]*)\s*", re.ASCII
)
_BYTE_UNIT: Final = re.compile(r"([kmgtp]?)b?|(?:([KMGTP])(i?))?B?")
_LONGEST: Final = 64


def parse_memory(text: str) -> int:
    """A memory limit in bytes.

    >>> parse_memory("1.5Gi")
    1610612736
    """
    return _bytes(text, least=MIN_MEMORY, what="limit for memory")


def parse_swap(text: str) -> int:
    """How much swap, in bytes, which may be 0."""
    return 0 if text.strip() == "0" else _bytes(text, least=KIB, what="limit for swap")


def parse_weight(text: str) -> int:
    """A share against others, as cgroup v2 has it: 1 to 10000, of which 100 is usual."""
    number = _whole(text, "a weight such as 100")
    if not MIN_WEIGHT <= number <= MAX_WEIGHT:
        raise ValueError(f"{text!r} is not a weight; write {MIN_WEIGHT} to {MAX_WEIGHT}, where 100 is usual")
    return number


def parse_processors(text: str) -> str:
    """A list of processors such as ``0-3,8``, in the kernel's notation and without blanks."""
    ranges = [part.partition("-") for part in text.replace(" ", "").split(",")]
    if not all(
        first.isascii()
        and first.isdigit()
        and (not dash or (last.isascii() and last.isdigit() and int(first) <= int(last)))
        for first, dash, last in ranges
    ):
        raise ValueError(f"{text!r} is not a list of processors; write numbers and ranges such as 0-3,8")
    return ",".join(f"{first}{dash}{last}" for first, dash, last in ranges)


def parse_device_rates(text: str) -> DeviceRates:
    """Limits for one disk: ``DEVICE KEY=NUMBER…`` with rbps, wbps (bytes a second), riops, wiops (operations a second).

    >>> parse_device_rates("/dev/sda wbps=10Mi riops=100")
    DeviceRates(device='/dev/sda', rbps=None, wbps=10485760, riops=100, wiops=None)
    """
    device, *words = text.split() or [""]
    example = "write the disk and its limits, such as /dev/sda rbps=50Mi wiops=200"
    if not words or not (device.startswith("/dev/") or _DEVICE_NUMBERS.fullmatch(device)):
        raise ValueError(f"{text!r} is not a limit for a disk; {example}")
    rates: dict[str, int] = {}
    for word in words:
        key, _, number = word.partition("=")
        if key in {"rbps", "wbps"}:
            rates[key] = _bytes(number, least=KIB, what="number of bytes a second")
        elif key in {"riops", "wiops"}:
            rates[key] = _whole(number, "a number of operations a second such as 200")
            if rates[key] < 1:
                raise ValueError(f"{word!r} allows no operation at all; write more than 0")
        else:
            raise ValueError(f"{word!r} is none of rbps=, wbps=, riops= and wiops=; {example}")
    return DeviceRates(device=device, **rates)


def parse_tmpfs_size(text: str) -> int:
    """The size of a tmpfs in bytes."""
    return _bytes(text, least=MIN_TMPFS, what="size")


def parse_cpus(text: str) -> float:
    """Cores.

    >>> parse_cpus("500m")
    0.5
    """
    number, unit = _split(text, "a number of cores such as 2, 0.5 or 500m")
    if unit == "m":
        number /= 1000
    elif unit:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; cores are written 2, 0.5 or 500m (thousandths)")
    if number <= 0:
        raise ValueError(f"{text!r} is not a limit for cores; write more than 0, or leave the key out for no limit")
    if not MIN_CPUS <= number <= MAX_CPUS:
        raise ValueError(f"{text!r} cores is outside of what Linux can limit ({MIN_CPUS} to {MAX_CPUS})")
    return float(number)


def parse_pids(text: str) -> int:
    """How many processes and threads may exist at a time."""
    number = _whole(text, "a number of processes such as 256")
    if not MIN_PIDS <= number <= MAX_PIDS:
        raise ValueError(f"{text!r} is not a usable limit for processes and threads; write {MIN_PIDS} to {MAX_PIDS}")
    return number


def parse_count(text: str) -> int:
    """A number of things, at least 1."""
    number = _whole(text, "a number such as 8")
    if not 1 <= number <= MAX_COUNT:
        raise ValueError(f"{text!r} is not a usable number; write 1 to {MAX_COUNT}")
    return number


def parse_natural(text: str) -> int:
    """A whole number from 0 on."""
    number = text.strip()
    if not (number.isascii() and number.isdecimal()):
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def parse_duration(text: str) -> float:
    """A duration of more than 0, in seconds.

    >>> parse_duration("5m")
    300.0
    """
    seconds = parse_grace_period(text)
    if seconds == 0:
        raise ValueError(f"{text!r} is no time at all; write more than 0")
    return seconds


def parse_grace_period(text: str) -> float:
    """A duration in seconds, which may be 0."""
    number, unit = _split(text, "a duration such as 10, 10s or 5m")
    if unit not in _SECONDS:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; durations are written 10, 500ms, 10s, 5m or 1h")
    seconds = number * _SECONDS[unit]
    if seconds < 0:
        raise ValueError(f"{text!r} is a negative duration")
    if seconds > MAX_SECONDS:
        raise ValueError(f"{text!r} is longer than 7 days")
    return float(seconds)


def format_bytes(count: int) -> str:
    """For people, exact.

    >>> format_bytes(1610612736), format_bytes(2 * GIB), format_bytes(10)
    ('1536 MiB', '2 GiB', '10 bytes')
    """
    for size, unit in ((1024 * TIB, "PiB"), (TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= size and count % size == 0:
            return f"{count // size} {unit}"
    return f"{count} bytes"


def _bytes(text: str, *, least: int, what: str) -> int:
    number, unit = _split(text, "a number of bytes such as 512m, 2Gi or 2G")
    factor = _byte_factor(text, unit)
    count = number * factor
    if count <= 0:
        raise ValueError(f"{text!r} is not a {what}; write more than 0")
    if count < least:
        likely = f". Did you mean {number.normalize():f}Gi?" if not unit and number < KIB else ""
        raise ValueError(f"{text!r} is below the smallest usable {what}, {format_bytes(least)}{likely}")
    if count > MAX_BYTES:
        raise ValueError(f"{text!r} is more than any machine has; the largest {what} is {format_bytes(MAX_BYTES)}")
    return int(count)


def _byte_factor(text: str, unit: str) -> int:
    matched = _BYTE_UNIT.fullmatch(unit)
    if matched is None:
        suggestion = unit[:1].upper() + "i" if unit[:1].lower() in _POWER and len(unit) <= 3 else ""
        raise ValueError(
            f"{text!r} has the unknown unit {unit!r}"
            + (f"; did you mean {suggestion}?" if suggestion else "; bytes are written 512m, 512Mi, 2g, 2Gi or 2G")
        )
    small, capital, binary = matched.groups()
    if small or not capital:
        return int(1024 ** _POWER[small or ""])
    return int((1024 if binary else 1000) ** _POWER[capital.lower()])


def _split(text: str, expected: str) -> tuple[Decimal, str]:
    matched = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if matched is None:
        shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
        raise ValueError(f"{shown!r} is not {expected}")
    return Decimal(matched.group(1)), matched.group(2)


def _whole(text: str, expected: str) -> int:
    number, unit = _split(text, expected)
    # The bound comes first: int() of 1e999 would build a number of a thousand digits.
    if unit or abs(number) > 10**18 or number != int(number):
        raise ValueError(f"{text!r} is not {expected}")
    return int(number)
