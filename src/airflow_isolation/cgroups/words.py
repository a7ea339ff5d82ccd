"""Quantities for people, with about three digits. Machines get exact figures."""

from __future__ import annotations


def amount(count: int | None) -> str:
    """A number of bytes with a unit.

    >>> amount(536870912), amount(10), amount(1288490189)
    ('512 MiB', '10 bytes', '1.2 GiB')
    """
    if count is None:
        return "unknown"
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 10 or size == int(size) else f"{size:.1f} {unit}"


def share(part: int | None, whole: int | None) -> str:
    """The share in percent, in brackets with a blank before; empty when there is no whole.

    >>> share(1, 2)
    ' (50 %)'
    """
    return f" ({part / whole:.0%})".replace("%", " %") if part is not None and whole else ""
