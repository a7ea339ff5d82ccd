"""Numbers and text for people. None means "not known", and becomes empty text."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def duration(seconds: float | None) -> str:
    """A duration in one unit: ``42s``, ``3m``, ``5h``, ``2d``."""
    if seconds is None:
        return ""
    span = timedelta(seconds=max(0.0, seconds))
    if span < timedelta(minutes=1):
        return f"{span.seconds}s"
    if span < timedelta(hours=1):
        return f"{span.seconds // 60}m"
    if span < timedelta(days=2):
        return f"{int(span.total_seconds()) // 3600}h"
    return f"{span.days}d"


def size(count: int | None) -> str:
    """Bytes in binary units, with three digits: ``98.2MiB``."""
    if count is None:
        return ""
    amount = float(count)
    unit = 0
    while amount >= 1000 and unit < len(_UNITS) - 1:
        amount /= 1024
        unit += 1
    return f"{amount:.3g}{_UNITS[unit]}"


def seconds(amount: float | None) -> str:
    """Processor time: ``1.52s``."""
    return "" if amount is None else f"{amount:.2f}s"


def percent(amount: float | None) -> str:
    """A share of one processor: ``87.5%``."""
    return "" if amount is None else f"{amount:.1f}%"


def printable(text: str) -> str:
    """The text without control characters. Labels and output are untrusted, and could send commands to the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str, *, indent: str = "") -> str:
    """Text of several lines for a terminal.

    All but the first are indented, so none looks like a line of the command's own.
    """
    return f"\n{indent}".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))
