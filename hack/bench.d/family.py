"""What this program and everything that it has started use of the machine, whoever their parents are by now.

Shims leave their parents on purpose, and so do daemons. As their subreaper (prctl(2)) this program is the one they fall
back to, so that all of them are found below it, and what the ended ones have used is added to what it has reaped.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Collection, Iterable

    from typing_extensions import Self

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
END_SECONDS = 10.0
DAEMONS = {"containerd", "dockerd"}
ROLES = ("Airflow", "daemon", "shim", "zygote", "process 1", "workload")


def adopt_orphans() -> None:
    """From now on every descendant whose parent ends becomes a child of this process. May be called twice."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap_orphans(known: Collection[int]) -> None:
    """Reap ended children that nobody else waits for: all but the ``known``."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in known and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def cpu_seconds() -> float:
    """CPU time of all living and all ended descendants; that of this process is left out."""
    ended = os.times()
    total = ended.children_user + ended.children_system
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def busy_seconds() -> float:
    """CPU time of the whole machine since its start, the kernel's own threads and strangers included."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


@dataclass(frozen=True)
class Memory:
    """Proportional set size (PSS, proc(5)) by role, in bytes, and how many processes of each there were."""

    bytes: Counter[str] = field(default_factory=Counter)
    processes: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.bytes.total()


def memory(excluded: Iterable[int] = ()) -> Memory:
    """Of all descendants but those below the ``excluded``."""
    found = Memory()
    parents = {}
    for process in _descendants():
        with suppress(psutil.NoSuchProcess):
            parents[process.pid] = process.ppid()
    left_out = set(excluded)
    for pid in parents:
        if _line(pid, parents) & left_out:
            continue
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            process = psutil.Process(pid)
            role, size = role_of(process), process.memory_full_info().pss
            found.bytes[role] += size
            found.processes[role] += 1
    return found


def role_of(process: psutil.Process) -> str:
    """One of ``ROLES``."""
    name = process.name()
    if name in DAEMONS:
        return "daemon"
    if name.startswith("containerd-shim") or name in {"runc", "crun"}:
        return "shim"
    number = _number_in_own_namespace(process.pid)
    if number is not None:
        return "process 1" if number == 1 else "workload"
    # A zygote lives in the host's pid namespace; its container's shim tells what it is.
    if any(parent.name().startswith("containerd-shim") for parent in process.parents()):
        return "zygote"
    return "Airflow"


def _number_in_own_namespace(pid: int) -> int | None:
    """Its pid in a container, by proc(5); None for a process of our own pid namespace."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            numbers = line.split()[1:]
            return int(numbers[-1]) if len(numbers) > 1 else None
    return None


def _descendants() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.is_running()]


def _line(pid: int, parents: dict[int, int]) -> set[int]:
    """The process and its ancestors below us."""
    line = set()
    while pid in parents and pid not in line:
        line.add(pid)
        pid = parents[pid]
    return line


def tree(pid: int) -> list[int]:
    """A process and its descendants; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [pid, *(each.pid for each in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end(pids: Iterable[int]) -> None:
    """Kill processes of this family, stopped ones too, and reap those that are ours by now. Gone already is success."""
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_SECONDS)


def end_all() -> None:
    """Kill every descendant that is left."""
    end([process.pid for process in _descendants()])


class MemoryWatch:
    """Looks at the memory again and again while the block runs; ``peak`` is the look with the largest total.

    What a look raises is raised at the end of the block.
    """

    def __init__(self, look: Callable[[], Memory], *, interval: float) -> None:
        self.peak = Memory()
        self._look = look
        self._interval = interval
        self._failure: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                self.peak = max(self.peak, self._look(), key=lambda seen: seen.total)
                self._done.wait(self._interval)
        except Exception as failure:  # noqa: BLE001  # it is raised where the block ends
            self._failure = failure


class Meter:
    """CPU seconds used between its making and ``read``."""

    def __init__(self) -> None:
        self._cpu, self._busy, self._began = cpu_seconds(), busy_seconds(), time.monotonic()

    def read(self) -> dict[str, float]:
        return {
            "cpu_seconds": cpu_seconds() - self._cpu,
            "busy_seconds": busy_seconds() - self._busy,
            "elapsed": time.monotonic() - self._began,
        }
