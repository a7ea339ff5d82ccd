#!/usr/bin/env python3
"""Runs a command, and names and ends the processes that it leaves behind.

    hack/setup/adopt.py FILE COMMAND…

Orphans of the command become children of this process (PR_SET_CHILD_SUBREAPER), whatever session, group, name or
environment they gave themselves. Those that are still there some seconds after the command are written to FILE, a line
each, and killed. The exit code is the command's. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
#: What is ending anyway may take so long, and what was killed too.
SETTLE_SECONDS = 5.0


def main() -> int:
    report, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit(f"hack/setup/adopt.py: PR_SET_CHILD_SUBREAPER: {os.strerror(ctypes.get_errno())}")
    process = subprocess.Popen(command)
    # Ctrl-C is the whole group's: the command undoes what it did, and is waited for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(process.pid, number))
    status = reap_until(process.pid)
    if left := gone_within(SETTLE_SECONDS):
        Path(report).write_text("".join(f"{pid} {words(pid)}\n" for pid in left))
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        gone_within(SETTLE_SECONDS)
    return status if status >= 0 else 128 - status


def reap_until(wanted: int) -> int:
    """Collect orphans as they end, which nobody else does; gives the exit code of the one that is waited for."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == wanted:
            return os.waitstatus_to_exitcode(status)


def gone_within(seconds: float) -> list[int]:
    """The processes that are still below this one after so long, or as soon as there are none."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = below(os.getpid())
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.1)


def below(ancestor: int) -> list[int]:
    """Every descendant that lives."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    found, generation = [], {ancestor}
    while generation := {pid for pid, parent in parents.items() if parent in generation}:
        found += sorted(generation)
    return found


def words(pid: int) -> str:
    with suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


if __name__ == "__main__":
    sys.exit(main())
