"""Computes when something that failed may be tried again: later each time, and not everything at the same moment."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from airflow_isolation.errors import IsolationError

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """The last failure, how long it holds (on the caller's clock), and how many came before it without a success."""

    error: IsolationError
    until: float
    failures: int


class Backoff:
    """The failures and their pauses. Pure: the caller passes the time."""

    def __init__(self, *, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._jitter = jitter
        self._troubles: dict[Hashable, Trouble] = {}

    def failed(self, what: Hashable, error: IsolationError, *, now: float) -> float:
        """Note a failure; returns the seconds to wait. Several attempts that ran at the same time count as one failure."""
        last = self._troubles.get(what)
        if last is not None and now < last.until:
            return last.until - now
        failures = last.failures + 1 if last else 0
        pause = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(failures, 16))
        # Never less than half, so that the pauses still grow.
        pause = self._jitter(pause / 2, pause)
        self._troubles[what] = Trouble(error, now + pause, failures)
        # What nobody has asked for in a long time is forgotten: tags and keys come and go.
        for old in [key for key, trouble in self._troubles.items() if now > trouble.until + 10 * LONGEST_SECONDS]:
            del self._troubles[old]
        return pause

    def succeeded(self, what: Hashable) -> None:
        self._troubles.pop(what, None)

    def trouble(self, what: Hashable, *, now: float) -> Trouble | None:
        """The failure whose pause is not over yet; None when there is none."""
        trouble = self._troubles.get(what)
        return trouble if trouble is not None and now < trouble.until else None
