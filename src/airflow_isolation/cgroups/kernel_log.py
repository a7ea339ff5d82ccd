"""Which processes the kernel has killed for memory, from its log (/dev/kmsg; Documentation/ABI/testing/dev-kmsg)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

KERNEL_LOG = Path("/dev/kmsg")
# A record is one read(2) and has no more than this (kernel/printk, CONSOLE_EXT_LOG_MAX).
_RECORD = 8192
# The log is a ring buffer. If it is written faster than it is read, reading would never end, so it stops here.
_MOST_RECORDS = 200_000

# mm/oom_kill.c, dump_oom_summary, and mm/memcontrol.c, mem_cgroup_print_oom_context
_SUMMARY = re.compile(
    r"oom-kill:constraint=\w+,.*?"
    r"(?:global_oom|oom_memcg=(?P<limit>\S*?)),task_memcg=(?P<cgroup>\S*?),task=(?P<name>.*),pid=(?P<pid>\d+),uid=\d+"
)

# The escapes for unprintable bytes and the backslash, which names of slices contain (kernel/printk, msg_print_ext_body).
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A process that the kernel chose to kill for memory.

    ``cgroup`` is where it was; ``limit`` is the cgroup whose limit was reached, None when the host's memory was used up.
    Both are absolute paths in the kernel's own cgroup namespace. With ``memory.oom.group`` others died with it.
    """

    name: str
    pid: int
    cgroup: str
    limit: str | None


def read_victims(cgroup: str, log: Path = KERNEL_LOG) -> tuple[Victim, ...]:
    """The victims in the cgroup whose last component is ``cgroup``, and below it, oldest first.

    Empty when the log can't be read: only root may, and a container does not have it. Old records may be lost, and the
    kernel logs at most ten kills in five seconds (mm/oom_kill.c, oom_rs); its counters miss none.
    """
    return tuple(victim for victim in parse_victims(_records(log)) if cgroup in victim.cgroup.split("/"))


def parse_victims(records: Iterable[str]) -> Iterator[Victim]:
    """Parse the kernel's one-line summaries; other records are skipped."""
    for record in records:
        found = _SUMMARY.search(record)
        if found:
            yield Victim(
                name=found["name"].strip(),
                pid=int(found["pid"]),
                cgroup=_unescaped(found["cgroup"]),
                limit=found["limit"] and _unescaped(found["limit"]),
            )


def _unescaped(path: str) -> str:
    return _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), path.encode()).decode(errors="replace")


def _records(log: Path) -> Iterator[str]:
    try:
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for _ in range(_MOST_RECORDS):
            try:
                record = os.read(descriptor, _RECORD)
            except BrokenPipeError:
                continue  # EPIPE: the next records have been overwritten; the next read goes on after the gap
            except OSError:
                return  # EAGAIN: that was all; EINVAL: a record that does not fit
            if not record:
                return
            # PRIORITY,NUMBER,MICROSECONDS,FLAGS;TEXT
            yield record.decode(errors="replace").partition(";")[2]
    finally:
        os.close(descriptor)
