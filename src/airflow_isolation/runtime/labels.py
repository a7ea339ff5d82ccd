"""The labels that say what a container is for and which process owns it. Nothing about a container is kept elsewhere."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

PREFIX = "io.airflow."
PURPOSE = PREFIX + "purpose"
DAG_ID = PREFIX + "dag_id"
TASK_ID = PREFIX + "task_id"
RUN_ID = PREFIX + "run_id"
MAP_INDEX = PREFIX + "map_index"
TRY_NUMBER = PREFIX + "try_number"
TI_ID = PREFIX + "ti_id"
BUNDLE = PREFIX + "bundle"
DAG_FILE = PREFIX + "dag_file"
OWNER = PREFIX + "owner"
# The uid of the worker for which a node has made the container.
CLIENT = PREFIX + "client"
# What a node counts it for, while it runs.
DEMAND = PREFIX + "demand"
# A zygote has no owner, because all workers share it. This label names its directory.
DIRECTORY = PREFIX + "directory"
# Docker has no namespaces: this label stands for one.
NAMESPACE = PREFIX + "namespace"

# A pid has 32 bits, ticks have 64. Longer numbers are not converted: for very long ones Python raises an error of its own.
_OWNER = re.compile(r"([0-9]{1,9}):([0-9]{1,19})@(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that is responsible for a container. While it lives, no other process removes the container.

    ``started`` is the process's start time in clock ticks since boot (proc(5), stat field 22). It tells the owner from a
    later process with the same pid.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def this_process(cls) -> Owner:
        return cls.of_process(os.getpid())

    @classmethod
    def of_process(cls, pid: int) -> Owner:
        """Of a process in our pid namespace; one that has ended is gone."""
        return cls(socket.gethostname(), pid, _start_ticks(pid))

    @classmethod
    def parse(cls, label: str) -> Owner | None:
        """None when the label was not written by us."""
        found = _OWNER.fullmatch(label)
        return cls(found[3], int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        return f"{self.pid}:{self.started}@{self.host}"

    def is_gone(self) -> bool:
        """Whether the owner is dead. False when that can't be known, as for an owner on another host."""
        if self.host != socket.gethostname():
            return False
        return not psutil.pid_exists(self.pid) or _start_ticks(self.pid) != self.started


def _start_ticks(pid: int) -> int:
    # psutil gives seconds since the epoch, which change with the wall clock. The kernel's ticks don't.
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # The command's name is in parentheses and may hold anything, so fields are counted from its end.
    return int(stat.rpartition(b")")[2].split()[19])
