"""Whether the kernel has killed somebody in a container for want of memory: the counter of the container's own cgroup.

Read from files, so that it never waits for a daemon. The counters: memory.oom_control of cgroup v1 (``oom_kill``, Linux
4.13 and newer), memory.events of cgroup v2.
"""

from __future__ import annotations

from pathlib import Path

_MOUNTS = Path("/proc/self/mounts")


class OomKills:
    """The counter of one container. A host that does not show it gives None, always."""

    def __init__(self, pid: int) -> None:
        """``pid``: the container's first process, in our pid namespace."""
        self._counter = _counter_of(pid)

    def count(self) -> int | None:
        """How many were killed since the container began; None when that is not known, as after its end."""
        if self._counter is None:
            return None
        try:
            for line in self._counter.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        except (OSError, ValueError):
            return None
        return None


def _counter_of(pid: int) -> Path | None:
    try:
        memberships = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        mounts = [line.split(" ") for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return None
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if "memory" in controllers.split(","):
            kind, name = "cgroup", "memory.oom_control"
        elif controllers == "":
            kind, name = "cgroup2", "memory.events"
        else:
            continue
        for _, mount_point, file_system, options, *_ in mounts:
            if file_system == kind and (kind == "cgroup2" or "memory" in options.split(",")):
                counter = Path(mount_point, path.lstrip("/"), name)
                if counter.is_file():
                    return counter
    return None
