"""Processes of tests: each with a session of its own, of which nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

END_SECONDS = 10.0


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"Waited {timeout:g} seconds in vain for {what}"
        time.sleep(0.25)


def run_to_end(
    command: Sequence[str], environment: Mapping[str, str], *, timeout: float, directory: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; what it has started and not ended is killed, also when it takes longer than ``timeout`` seconds.

    ``subprocess.run`` would then kill the command alone, and an executor's idle workers would live on.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            end_sessions([process.pid])
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def end_sessions(leaders: Iterable[int]) -> None:
    """Kill every process in the sessions that these processes began, whether they live or not."""
    sessions = frozenset(leaders)
    deadline = time.monotonic() + END_SECONDS
    # Again and again: one that was not seen may have been born meanwhile.
    while members := [pid for pid in _processes() if _session(pid) in sessions]:
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"The processes {members} don't end"
        time.sleep(0.02)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _session(pid: int) -> int:
    """0 for one that has gone, or that has ended and only waits for its parent to notice."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] == "Z" else int(fields[3])
