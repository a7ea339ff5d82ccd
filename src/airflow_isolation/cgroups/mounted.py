"""Where this process sees the cgroups of the host, whichever it has: v2, v1, or some controllers of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups.hierarchy import mounts

if TYPE_CHECKING:
    from collections.abc import Mapping

#: How /proc/PID/cgroup calls v2.
UNIFIED: Final = ""
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount of cgroups; ``root`` is the cgroup that is seen at ``point``."""

    point: Path
    root: str

    def name(self, path: str) -> str | None:
        """A cgroup's name below ``point``; None where it can't be seen there, and for ``point`` itself, which is more."""
        root = self.root.rstrip("/")
        if not path.startswith(f"{root}/") or "/../" in f"{path}/":
            return None
        return path[len(root) :].strip("/") or None


@dataclass(frozen=True, slots=True)
class CgroupMounts:
    """The mounts by the controllers of v1 and the names of its named hierarchies, and that of v2 under the name ``""``."""

    by_controller: Mapping[str, Mounted] = field(default_factory=dict)

    @property
    def hierarchies(self) -> tuple[Mounted, ...]:
        """Each once: controllers that are mounted together are one hierarchy."""
        return tuple(dict.fromkeys(self.by_controller.values()))


def find_mounts(proc: Path = PROC) -> CgroupMounts:
    """Look at this host. No cgroups at all is no error."""
    try:
        mountinfo = (proc / "self/mountinfo").read_text()
    except OSError:
        return CgroupMounts()
    found: dict[str, Mounted] = {}
    # Every container of the host has a mount here, and this is read for every task.
    for mount in mounts("\n".join(line for line in mountinfo.splitlines() if " - cgroup" in line)):
        place = Mounted(Path(mount.point), mount.root)
        # What is neither controller nor name, such as rw, names one of the same mounts, and nobody asks for it.
        for name in (UNIFIED,) if mount.kind == "cgroup2" else mount.super_options:
            # Of several places that which shows the most; the later one may cover the earlier.
            if name not in found or len(mount.root) <= len(found[name].root):
                found[name] = place
    return CgroupMounts(found)


@cache
def host_mounts() -> CgroupMounts:
    """``find_mounts``, once: a host's mounts of cgroups don't change."""
    return find_mounts()


def paths_of_process(pid: int, *, proc: Path = PROC) -> Mapping[str, str]:
    """The cgroups of a process by controller, that of v2 under the name ``""``; empty when the process is gone."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines() if pid > 0 else []
    except OSError:
        return {}
    fields = [line.removesuffix(" (deleted)").split(":", 2) for line in lines]
    return {controller: path for _, controllers, path in fields for controller in controllers.split(",")}
