"""What one try has used: for the line at the end of its log, for metrics, and for choosing limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.words import amount, share

if TYPE_CHECKING:
    from airflow_isolation.cgroups.statistics import Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Seconds, bytes and counts of all processes of a workload. None means that this host doesn't count it.

    Every field is a number, so metrics and JSON can use ``dataclasses.asdict`` as it is.
    """

    wall: float
    cpu: float | None = None
    cpu_user: float | None = None
    cpu_system: float | None = None
    cpu_throttled: float | None = None
    memory_peak: int | None = None
    memory_limit: int | None = None
    oom_kills: int | None = None
    pids_peak: int | None = None
    pids_limit: int | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None

    @property
    def memory_share(self) -> float | None:
        """The peak as a share of the limit, 0 to 1; None without a limit."""
        return self.memory_peak / self.memory_limit if self.memory_peak is not None and self.memory_limit else None

    @property
    def sentence(self) -> str:
        """One line for the task log; what is not known is left out.

        >>> print(Usage(wall=12, cpu=3.5, cpu_user=3, cpu_system=0.5, cpu_throttled=0,
        ...     memory_peak=2**28, memory_limit=2**29, oom_kills=0, pids_peak=7).sentence)
        wall 12.0 s; CPU 3.5 s (user 3.0 s, system 0.5 s, throttled 0.0 s); memory peak 256 MiB of 512 MiB (50 %); OOM kills 0; processes peak 7
        """
        parts = [f"wall {self.wall:.1f} s"]
        if self.cpu is not None:
            kinds = {"user": self.cpu_user, "system": self.cpu_system, "throttled": self.cpu_throttled}
            known = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in kinds.items() if seconds is not None)
            parts.append(f"CPU {self.cpu:.1f} s" + (f" ({known})" if known else ""))
        if self.memory_peak is not None:
            limit = f" of {amount(self.memory_limit)}" if self.memory_limit else ""
            parts.append(f"memory peak {amount(self.memory_peak)}{limit}{share(self.memory_peak, self.memory_limit)}")
        if self.oom_kills is not None:
            parts.append(f"OOM kills {self.oom_kills}")
        if self.pids_peak is not None:
            parts.append(f"processes peak {self.pids_peak}" + (f" of {self.pids_limit}" if self.pids_limit else ""))
        if self.bytes_read is not None and self.bytes_written is not None:
            parts.append(f"read {amount(self.bytes_read)}, wrote {amount(self.bytes_written)}")
        return "; ".join(parts)


def usage_of(statistics: Statistics, *, wall: float) -> Usage:
    """The usage by the counters of a workload's own cgroup, which began at 0 when it was made."""
    memory, pids, io = statistics.memory, statistics.pids, statistics.io
    return Usage(
        wall=wall,
        cpu=statistics.cpu.usage,
        cpu_user=statistics.cpu.user,
        cpu_system=statistics.cpu.system,
        cpu_throttled=statistics.cpu.throttled,
        memory_peak=memory.peak if memory else None,
        memory_limit=memory.limit if memory else None,
        oom_kills=memory.events.kills if memory else None,
        pids_peak=pids.peak if pids else None,
        pids_limit=pids.limit if pids else None,
        bytes_read=io.bytes_read if io else None,
        bytes_written=io.bytes_written if io else None,
    )
