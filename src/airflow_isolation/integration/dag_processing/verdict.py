"""A parse that ended without a result: the import error that says why. Stock Airflow shows nothing."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from airflow_isolation.settings.quantities import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedParse:
    """How a parse ended that gave no result.

    Attributes:
        code: the exit code of its process, or minus the signal's number.
        image: as the settings name it.
        memory: the container's limit in bytes, if it has one.
        out_of_memory: whether the kernel killed somebody there for want of memory; None if it can't be known.
        timeout: seconds, when it was killed for taking longer.
        violation: what it did to its channels, when it was killed for that.
    """

    code: int
    image: str
    memory: int | None = None
    out_of_memory: bool | None = None
    timeout: float | None = None
    violation: str = ""


def verdict(end: UnfinishedParse) -> str:
    """The import error, one sentence or two."""
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
        return f"The parse was killed in a container of {end.image}, {likely}for want of memory; {limit}"
    if end.code < 0:
        return f"The parse was killed by {_signal_name(-end.code)} in a container of {end.image}"
    return (
        f"The parse ended with exit code {end.code} and no result in a container of {end.image}. "
        "Does the file, or something that it imports, end the process (os._exit)?"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
