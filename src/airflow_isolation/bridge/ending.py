"""What a workload had used when it ended, and whether the kernel killed it because memory ran out."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import MemorySample, Usage, attribute, counters_of_process, read_victims, usage_of
from airflow_isolation.cgroups.out_of_memory import NOTHING_YET, Limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.cgroups import OutOfMemory, Statistics

#: They come of no fault of a process. As long as Airflow is imported, nobody in the container sends one.
_SENT = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a workload ended.

    Attributes:
        code: the exit code, or minus the number of the signal that ended its main process.
        usage: of all processes of its container.
        out_of_memory: None when the kernel killed none of them for memory, or this host does not tell.
        from_outside: a sentence when something outside of the container ended it, other than this worker; else empty.

    """

    code: int
    usage: Usage
    out_of_memory: OutOfMemory | None = None
    from_outside: str = ""

    @property
    def not_its_own_doing(self) -> str:
        """What ended a workload that had not begun, in words; empty when it was its own limit, or its own program.

        >>> Ending(code=-15, usage=Usage(wall=1)).not_its_own_doing
        'Somebody outside of the container sent signal SIGTERM to its main process'
        >>> Ending(code=-11, usage=Usage(wall=1)).not_its_own_doing
        ''
        """
        killing = self.out_of_memory
        if killing is not None and (killing.fatal or killing.limit is Limit.OWN):
            return "" if killing.limit is Limit.OWN else killing.sentence
        if self.from_outside:
            return self.from_outside
        if -self.code in _SENT:
            return f"Somebody outside of the container sent {self.how} to its main process"
        return ""

    @property
    def how(self) -> str:
        """In words.

        >>> Ending(code=-9, usage=Usage(wall=1)).how
        'signal SIGKILL'
        """
        if self.code >= 0:
            return f"exit code {self.code}"
        number = -int(self.code)
        # Real-time signals have no names.
        return f"signal {signal.Signals(number).name if number in set(signal.Signals) else number}"


class Meter:
    """Follows the counters of one container from its start to its end. ``close`` releases its descriptors."""

    def __init__(self, pid: int) -> None:
        """``pid``: the container's first process, in our pid namespace."""
        self._began = time.monotonic()
        self._pid = pid
        self._main = 0
        self._counters = counters_of_process(pid)
        self._statistics: Statistics | None = None
        # The levels above count other workloads too, so their values at the start are noted.
        self._before = self._counters.memory_sample() or NOTHING_YET
        self._sample: MemorySample | None = None

    def look(self) -> None:
        """Note the workload's main process. To be called while it runs: afterwards it can't be found any more."""
        if not self._main:
            self._main = _first_child(self._pid)

    def read(self) -> None:
        """Read the counters; if the cgroup is gone, the last reading stays."""
        self._statistics = self._counters.read() or self._statistics
        self._sample = self._counters.memory_sample() or self._sample

    def ending(self, code: int, *, by_others: bool = False, who: Callable[[], str] = str) -> Ending:
        """How the workload ended, by its exit ``code`` and the last reading. To be called after its end.

        :param by_others: process 1 ended without a message, and this worker has not killed it.
        :param who: gives who killed it, as far as that is known.
        """
        wall = time.monotonic() - self._began
        self.read()
        out_of_memory = self._out_of_memory(killed=code == -signal.SIGKILL)
        ending = Ending(
            code=code,
            usage=usage_of(self._statistics, wall=wall) if self._statistics else Usage(wall=wall),
            out_of_memory=out_of_memory,
        )
        if not by_others or out_of_memory is not None:
            return ending
        return replace(ending, from_outside=self._from_outside(ending.how, who()))

    def close(self) -> None:
        """May be called twice."""
        self._counters.close()

    def _from_outside(self, how: str, who: str) -> str:
        # Process 1 gets no signals from inside that it does not handle, not even SIGKILL (kernel/signal.c).
        memory = (
            "and whether the kernel did it because memory ran out can't be known any more, since its cgroup is gone"
            if self._sample is None
            else "not by a memory limit, since its cgroup counts no such kill"
        )
        who = who or (
            "Somebody killed it or its shim, with the daemon's own tools or kill(1): look at the logs of daemon and host"
        )
        return f"The container was ended from outside ({how} of its first process), {memory}. {who}"

    def _out_of_memory(self, *, killed: bool) -> OutOfMemory | None:
        if self._sample is None or not self._sample.events.oom_kill:
            return None
        return attribute(
            self._before, self._sample, killed=killed, pid=self._main, victims=read_victims(self._counters.name)
        )


def _first_child(pid: int) -> int:
    """The oldest living child, 0 without any. Orphans that process 1 adopts come after it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return int(children[0]) if children else 0
