"""Words the import error for a parse that ended without a result. Stock Airflow shows none."""

from __future__ import annotations

import signal
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from airflow_isolation.settings.quantities import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

#: The exit code of Airflow's child when Airflow's own code raises (task-sdk's supervisor, ``_fork_main``).
LAST_CHANCE: Final = 126


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedParse:
    """The end of a parse that gave no result.

    Attributes:
        code: the exit code of its process, or minus the signal's number.
        image: as the settings name it.
        memory: the container's limit in bytes, if it has one.
        out_of_memory: whether the kernel killed a process there because memory ran out; None if it can't be known.
        timeout: seconds; set when it was killed for taking longer.
        violation: what it did to its channels; set when it was killed for that.
        closed: the first path, of the bundle's directories down to the file, that other users may not read.
    """

    code: int
    image: str
    memory: int | None = None
    out_of_memory: bool | None = None
    timeout: float | None = None
    violation: str = ""
    closed: Path | None = None


def verdict(end: UnfinishedParse) -> str:
    """The import error, in one or two sentences."""
    if end.violation:
        return f"The parse in a container of {end.image} was stopped. {end.violation}"
    if end.timeout is not None:
        return (
            f"The parse took longer than {end.timeout:g} seconds in a container of {end.image} and was stopped. "
            "What takes long belongs into a task; the limit is [dag_processor] dag_file_processor_timeout"
        )
    if end.out_of_memory or (end.out_of_memory is None and end.code == -signal.SIGKILL):
        likely = "" if end.out_of_memory else "most likely "
        limit = (
            f"the limit is {format_bytes(end.memory)} (resources.memory)"
            if end.memory
            else "no limit is set (resources.memory), so the host or the cgroup above had no more"
        )
        return f"The parse was killed in a container of {end.image}, {likely}because memory ran out; {limit}"
    if end.code < 0:
        return f"The parse was killed by {_signal_name(-end.code)} in a container of {end.image}"
    if end.code == LAST_CHANCE:
        failed = (
            f"Airflow itself could not parse the file in a container of {end.image}; the file's log has the traceback"
        )
        if end.closed is None:
            return failed
        return (
            f"{failed}. {end.closed} is closed to others on this host (mode {_mode(end.closed)}), and so to the container's "
            "user. Open it, or set run_as_user to its owner. Airflow makes bundles with its umask, which is 077 for "
            "what it starts as a daemon (-D) unless [core] daemon_umask says another"
        )
    return (
        f"The parse ended with exit code {end.code} and no result in a container of {end.image}. "
        "Does the file, or something that it imports, end the process (os._exit)?"
    )


def closed_to_others(bundle_path: Path, relative_path: Path) -> Path | None:
    """The first path from the bundle down to the file that another user may not enter or read; None when all are open."""
    way = [bundle_path.joinpath(*relative_path.parts[:count]) for count in range(len(relative_path.parts) + 1)]
    for path in way:
        try:
            mode = path.stat().st_mode
        except OSError:
            return None  # it has gone, or the worker itself may not look at it
        if not mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH):
            return path
    return None


def _mode(path: Path) -> str:
    try:
        return f"{stat.S_IMODE(path.stat().st_mode):o}"
    except OSError:
        return "unknown"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
