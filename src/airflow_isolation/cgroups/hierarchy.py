"""Which cgroups this host has, which one this process is in, and below which one it may make cgroups.

Sources: cgroups(7), the kernel's cgroup-v2.rst (delegation), systemd's CGROUP_DELEGATION.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from airflow_isolation.cgroups.directory import SUBTREE_CONTROL
from airflow_isolation.cgroups.errors import CgroupDenied, ControllerMissing, NotUnified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Kind = Literal["unified", "hybrid", "legacy", "none"]

# With these systemd marks what it has delegated: the first from systemd 251 on, the second for root only.
_DELEGATED = ("user.delegate", "trusted.delegate")
_OPTION_HINT = "Start the host with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """The cgroups at one mount path.

    Attributes:
        kind: ``unified`` is cgroup v2. ``legacy`` is v1, ``hybrid`` is v1 with a v2 that has few controllers or none.
        mount: where cgroup v2 is mounted.
        read_only: whether the mount is, for this process.
        local_events: mounted with memory_localevents, so that counters of events leave out the cgroups below.
        controllers: those that the cgroup at the mount offers.
        own: the cgroup of this process, below the mount.
        delegated: the part below which cgroups may be made: a delegated unit, or "" for the whole mount.

    """

    kind: Kind
    mount: Path
    read_only: bool = False
    local_events: bool = False
    controllers: frozenset[str] = frozenset()
    own: str = ""
    delegated: str = ""

    def require(self, *controllers: str) -> None:
        """Check that limits can be written here with these controllers.

        :raises NotUnified: there is no cgroup v2.
        :raises ControllerMissing: a controller is missing; the error names it.
        :raises CgroupDenied: the mount is read-only.
        """
        if self.kind == "none":
            raise NotUnified(
                f"{self.mount} is not a mount of cgroups", hint="Set cgroup_mount_path to the mount of cgroup v2"
            )
        if self.kind != "unified":
            words = {"hybrid": "hybrid: the controllers are v1's", "legacy": "v1"}[self.kind]
            raise NotUnified(f"the cgroups at {self.mount} are {words}", hint=_OPTION_HINT)
        missing = [name for name in controllers if name not in self.controllers]
        if missing:
            raise ControllerMissing(
                f"cgroup v2 at {self.mount} does not have the controller {', '.join(missing)}, only: "
                f"{', '.join(sorted(self.controllers)) or 'none'}",
                hint=f"The kernel is built without it, or cgroups of v1 hold it. {_OPTION_HINT}",
            )
        if self.read_only:
            raise CgroupDenied(
                f"cgroup v2 at {self.mount} is mounted read-only",
                hint="Mount it writable; for a container, start it with a private cgroup namespace",
            )
        if self.local_events:
            raise CgroupDenied(
                f"cgroup v2 at {self.mount} is mounted with memory_localevents, so it can't tell which workload was killed",
                hint="Mount it without this option",
            )


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/PID/mountinfo."""

    root: str
    point: str
    options: frozenset[str]
    kind: str
    super_options: frozenset[str]


def find_hierarchy(mount_path: Path = Path("/sys/fs/cgroup"), *, proc: Path = Path("/proc")) -> Hierarchy:
    """Look at this host. Nothing is written.

    A host without v2 is no error here, only in ``Hierarchy.require``: some uses don't need v2.
    """
    try:
        mountinfo = (proc / "self/mountinfo").read_text()
        own = (proc / "self/cgroup").read_text()
    except OSError:
        return Hierarchy(kind="none", mount=mount_path)
    found = read_hierarchy(mountinfo, own, mount_path)
    if found.kind != "unified":
        return found
    try:
        controllers = frozenset((found.mount / "cgroup.controllers").read_text().split())
    except OSError:
        controllers = frozenset()
    return Hierarchy(
        kind=found.kind,
        mount=found.mount,
        read_only=found.read_only,
        local_events=found.local_events,
        controllers=controllers,
        own=found.own,
        delegated=delegated_part(found.own, _is_delegated_by(found.mount)),
    )


def read_hierarchy(mountinfo: str, own: str, mount_path: Path) -> Hierarchy:
    """Parse /proc/self/mountinfo and /proc/self/cgroup (``own``); controllers and delegation are not filled in."""
    found = mounts(mountinfo)
    here = [mount for mount in found if mount.point == str(mount_path)]
    if here and here[-1].kind == "cgroup2":  # the last one covers the others
        mount = here[-1]
        return Hierarchy(
            kind="unified",
            mount=mount_path,
            read_only="ro" in mount.options | mount.super_options,
            local_events="memory_localevents" in mount.super_options,
            own=_own(own, mount.root),
        )
    below = {mount.kind for mount in found if mount.point.startswith(f"{mount_path}/")}
    if here and here[-1].kind == "cgroup":
        below.add("cgroup")
    if "cgroup" not in below:
        # No cgroups here. If v2 is mounted at a place of its own, cgroup_mount_path must name that place.
        return Hierarchy(kind="none", mount=mount_path)
    return Hierarchy(kind="hybrid" if "cgroup2" in below else "legacy", mount=mount_path)


def mounts(mountinfo: str) -> tuple[Mount, ...]:
    """The mounts, the oldest first: a later one covers an earlier one at the same point."""
    return tuple(_parse(line) for line in mountinfo.splitlines() if " - " in line)


def delegated_part(own: str, is_delegated: Callable[[str], bool]) -> str:
    """The nearest cgroup from ``own`` upwards that has been delegated; "" when none is."""
    for name in _upwards(own):
        if is_delegated(name):
            return name
    return ""


def _upwards(name: str) -> Iterable[str]:
    parts = name.split("/") if name else []
    return ("/".join(parts[:count]) for count in range(len(parts), 0, -1))


def _is_delegated_by(mount: Path) -> Callable[[str], bool]:
    root = os.geteuid() == 0

    def marked(name: str) -> bool:
        for attribute in _DELEGATED:
            try:
                if os.getxattr(mount / name, attribute) == b"1":
                    return True
            except OSError:
                continue
        return False

    def owned_up_to_here(name: str) -> bool:
        """Whether the user owns this cgroup but not the one above it: that marks a delegation to a user."""
        return _writable(mount / name) and not _writable((mount / name).parent)

    return marked if root else lambda name: marked(name) or owned_up_to_here(name)


def _writable(directory: Path) -> bool:
    return os.access(directory, os.W_OK, effective_ids=True) and os.access(
        directory / SUBTREE_CONTROL, os.W_OK, effective_ids=True
    )


def _parse(line: str) -> Mount:
    fields, _, rest = line.partition(" - ")
    _, _, _, root, point, options, *_ = fields.split()
    kind, _, super_options = rest.split()[:3]
    return Mount(
        root=_unescaped(root),
        point=_unescaped(point),
        options=frozenset(options.split(",")),
        kind=kind,
        super_options=frozenset(super_options.split(",")),
    )


def _unescaped(field: str) -> str:
    """proc(5) writes blanks and the like as octal numbers."""
    return field.encode("ascii", "backslashreplace").decode("unicode_escape") if "\\" in field else field


def _own(content: str, root: str) -> str:
    """This process's cgroup below a mount of the cgroup ``root``; "" when it is not below it."""
    for line in content.splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            path = path.removesuffix(" (deleted)")
            if root != "/":
                if path != root and not path.startswith(f"{root}/"):
                    return ""
                path = path[len(root) :]
            return "" if path.startswith("/..") else path.strip("/")
    return ""
