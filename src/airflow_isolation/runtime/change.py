"""What both backends share to change limits of a running container, when the runtime (not this project) sets the limits."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_isolation.errors import ContainerFailed, SpecRefused
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_isolation.container_spec import Resources
    from airflow_isolation.runtime.interface import Container, Stats

# libcontainer's words (cgroups/fs/memory.go, fs2/memory.go) and crun's for the kernel's EBUSY.
_IN_USE = ("unable to set memory limit", "memory.limit_in_bytes", "memory.max")


def check_not_ended(container: Container) -> None:
    """Check that the container has not ended.

    :raises ContainerFailed: it has, so a limit makes no sense.
    """
    if container.state is ContainerState.STOPPED:
        raise ContainerFailed(f"the limits of the container {container.id} can't be changed: it has ended")


def check_in_use(id: str, resources: Resources, stats: Stats | None) -> None:
    """Check a memory limit against the memory in use. On cgroup v2 the kernel would kill processes to meet a lower limit.

    :raises SpecRefused: the limit is less than the memory in use.
    """
    if resources.memory is not None and stats is not None and (stats.memory or 0) > resources.memory:
        raise less_than_in_use(id, resources.memory, f"the {stats.memory} bytes that it has in use")


@contextmanager
def limits_refused(id: str, resources: Resources) -> Iterator[None]:
    """Translate a runtime's error in this block. On cgroup v1 the kernel refuses a limit below the memory in use.

    :raises SpecRefused: the limit is less than the memory in use.
    """
    try:
        yield
    except ContainerFailed as error:
        if resources.memory is not None and any(words in error.message for words in _IN_USE):
            raise less_than_in_use(id, resources.memory, f"it has in use: {error.message}") from error
        raise


def less_than_in_use(id: str, limit: int, reason: str) -> SpecRefused:
    return SpecRefused(f"memory {limit} bytes for the container {id} is less than {reason}", hint="Give more")
