"""The progress of an import or a pull."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """``name`` is a blob's digest, a snapshot or an image; ``done`` of ``total`` bytes, 0 while not known."""

    name: str
    event: str
    done: int = 0
    total: int = 0


Report = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """Drop the progress."""
