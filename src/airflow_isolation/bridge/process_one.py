"""Reads from the host's kernel what a container's process 1 is: a process that is forked into the container must be the
same.

It is read, not computed from the settings, because image, daemon, runtime and kernel all decide a part of it. Two things
can't be read: the seccomp filter (see ``oci/seccomp_filter.py``), and the session keyring, which is private. Sources:
proc(5), getrlimit(2), capabilities(7).
"""

from __future__ import annotations

import base64
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.errors import ContainerFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

INFINITY = -1

# The names of /proc/PID/limits, in the words of getrlimit(2).
_RLIMITS = {
    "Max cpu time": "RLIMIT_CPU",
    "Max file size": "RLIMIT_FSIZE",
    "Max data size": "RLIMIT_DATA",
    "Max stack size": "RLIMIT_STACK",
    "Max core file size": "RLIMIT_CORE",
    "Max resident set": "RLIMIT_RSS",
    "Max processes": "RLIMIT_NPROC",
    "Max open files": "RLIMIT_NOFILE",
    "Max locked memory": "RLIMIT_MEMLOCK",
    "Max address space": "RLIMIT_AS",
    "Max file locks": "RLIMIT_LOCKS",
    "Max pending signals": "RLIMIT_SIGPENDING",
    "Max msgqueue size": "RLIMIT_MSGQUEUE",
    "Max nice priority": "RLIMIT_NICE",
    "Max realtime priority": "RLIMIT_RTPRIO",
    "Max realtime timeout": "RLIMIT_RTTIME",
}

# On a kernel without AppArmor these files belong to another security module, or give EINVAL.
_APPARMOR_ENABLED = "sys/module/apparmor/parameters/enabled"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The five sets of capabilities, each with a bit for each capability's number."""

    bounding: int
    effective: int
    permitted: int
    inheritable: int
    ambient: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOne:
    """A process as the kernel sees it. Ids are those of the container's user namespace.

    Attributes:
        rlimits: soft and hard limit by the name of getrlimit(2); -1 is infinity.
        apparmor: its AppArmor profile; empty for none.
        speculation: the kernel's word for its speculative store bypass, which a filter may have switched off.
        environment: the environment with which it was executed, in that order.

    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: Capabilities
    no_new_privileges: bool
    rlimits: Mapping[str, tuple[int, int]]
    umask: int
    oom_score_adj: int
    apparmor: str
    working_directory: str
    seccomp_mode: int
    speculation: str
    environment: Mapping[str, str]

    def as_message(self, *, seccomp: bytes, seccomp_flags: int) -> dict[str, Any]:
        """PROCESS for ``agent/entry.py``, as JSON data. ``seccomp`` is the filter's program; empty for none.

        :raises ContainerFailed: process 1 has a filter and none was given, or the reverse.
        """
        if bool(seccomp) != bool(self.seccomp_mode):
            raise ContainerFailed(
                f"The container's process 1 has seccomp mode {self.seccomp_mode}, but the filter for its workload has"
                f" {len(seccomp)} bytes",
                hint="Set start_mode = fresh where the daemon gives containers a filter of its own",
            )
        return {
            "uid": self.uid,
            "gid": self.gid,
            "groups": list(self.groups),
            "capabilities": asdict(self.capabilities),
            "no_new_privileges": self.no_new_privileges,
            "rlimits": {name: list(limits) for name, limits in self.rlimits.items()},
            "umask": self.umask,
            "oom_score_adj": self.oom_score_adj,
            "apparmor": self.apparmor,
            "working_directory": self.working_directory,
            "seccomp": base64.b64encode(seccomp).decode(),
            "seccomp_flags": seccomp_flags,
        }

    def differences(self, other: ProcessOne) -> dict[str, tuple[object, object]]:
        """The attributes, by name, in which another process differs. The environment is not compared: the kernel only
        knows the one with which a process was executed.
        """
        return {
            name: (ours, theirs)
            for name in (field.name for field in fields(self) if field.name != "environment")
            if (ours := getattr(self, name)) != (theirs := getattr(other, name))
        }


def read_process_one(pid: int, *, uid_base: int = 0, root: Path = Path("/proc")) -> ProcessOne:
    """Read process ``pid``, which must be the first process of another pid namespace.

    Args:
        pid: in this process's pid namespace.
        uid_base: where the uids and gids of the container's user namespace begin here; 0 without one.
        root: a procfs.

    :raises ContainerFailed: it is gone, another process has its number now, it is not process 1 of a container, or its ids
        are below ``uid_base``.
    """
    return _read(pid, uid_base=uid_base, root=root, must_be_first=True)


def read_process(pid: int, *, uid_base: int = 0, root: Path = Path("/proc")) -> ProcessOne:
    """As ``read_process_one``, for any process, such as one that should now be the same as process 1.

    :raises ContainerFailed: it is gone, another process has its number now, or its ids are below ``uid_base``.
    """
    return _read(pid, uid_base=uid_base, root=root, must_be_first=False)


def _read(pid: int, *, uid_base: int, root: Path, must_be_first: bool) -> ProcessOne:
    try:
        # All is read through this one open directory: if the process ends and its number is given to another, it is empty.
        directory = os.open(root / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _gone(pid, error) from error
    try:
        born = _start_time(directory)
        process = _process(directory, pid, uid_base, root, must_be_first=must_be_first)
        if _start_time(directory) != born:
            raise _gone(pid, "another process has its number now")
    except OSError as error:
        raise _gone(pid, error) from error
    except (KeyError, ValueError, IndexError) as error:
        raise ContainerFailed(f"What the kernel says of process {pid} can't be understood: {error!r}") from error
    finally:
        os.close(directory)
    return process


def _process(directory: int, pid: int, uid_base: int, root: Path, *, must_be_first: bool) -> ProcessOne:
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in _lines(directory, "status"))}
    if must_be_first and (status["NSpid"].split()[-1] != "1" or len(status["NSpid"].split()) < 2):
        raise ContainerFailed(f"Process {pid} is not the first process of a container: NSpid is {status['NSpid']!r}")
    if status["State"].startswith(("Z", "X")):
        raise _gone(pid, "it has ended")

    def inside(id: str) -> int:
        if int(id) < uid_base:
            raise ContainerFailed(f"Process {pid} has the id {id}, but those of its user namespace begin at {uid_base}")
        return int(id) - uid_base

    uids, gids = status["Uid"].split(), status["Gid"].split()
    if len({*uids}) != 1 or len({*gids}) != 1:
        raise ContainerFailed(f"Process {pid} changes its user just now: uids {uids}, gids {gids}")
    return ProcessOne(
        uid=inside(uids[0]),
        gid=inside(gids[0]),
        groups=tuple(inside(group) for group in status["Groups"].split()),
        capabilities=Capabilities(
            bounding=int(status["CapBnd"], 16),
            effective=int(status["CapEff"], 16),
            permitted=int(status["CapPrm"], 16),
            inheritable=int(status["CapInh"], 16),
            ambient=int(status["CapAmb"], 16),
        ),
        no_new_privileges=status["NoNewPrivs"] == "1",
        rlimits=_limits(_lines(directory, "limits")),
        umask=int(status["Umask"], 8),
        oom_score_adj=int(_text(directory, "oom_score_adj")),
        apparmor=_apparmor(directory, root),
        working_directory=_link(directory, "cwd"),
        seccomp_mode=int(status["Seccomp"]),
        # Linux 4.17
        speculation=status.get("Speculation_Store_Bypass", ""),
        environment=_environment(_bytes(directory, "environ")),
    )


def _limits(lines: list[str]) -> dict[str, tuple[int, int]]:
    limits = {}
    for line in lines[1:]:
        # 25 characters for the name, two columns of 20 for the limits, and the unit.
        name, values = line[:25].strip(), line[25:].split()
        if name in _RLIMITS:
            soft, hard = (INFINITY if value == "unlimited" else int(value) for value in values[:2])
            limits[_RLIMITS[name]] = (soft, hard)
    if missing := set(_RLIMITS.values()) - set(limits):
        raise ValueError(f"no {', '.join(sorted(missing))}")
    return limits


def _apparmor(directory: int, root: Path) -> str:
    try:
        if (root.parent / _APPARMOR_ENABLED).read_text().strip() != "Y":
            return ""
    except OSError:
        return ""
    try:
        label = _text(directory, "attr/apparmor/current")  # Linux 5.8, whatever other security modules there are
    except FileNotFoundError:
        label = _text(directory, "attr/current")
    label = label.rstrip("\0\n")
    name, mode, _ = label.rpartition(" (")
    profile = name if mode else label
    return "" if profile == "unconfined" else profile


def _environment(content: bytes) -> dict[str, str]:
    environment: dict[str, str] = {}
    for entry in content.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if equals and name:
            # If a name stands twice, getenv(3) finds the first.
            environment.setdefault(os.fsdecode(name), os.fsdecode(value))
    return environment


def _start_time(directory: int) -> str:
    # The name, in parentheses, may hold anything, even parentheses; starttime is the 20th field after it.
    return _text(directory, "stat").rpartition(")")[2].split()[19]


def _lines(directory: int, name: str) -> list[str]:
    return _text(directory, name).splitlines()


def _text(directory: int, name: str) -> str:
    return _bytes(directory, name).decode(errors="surrogateescape")


def _bytes(directory: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _link(directory: int, name: str) -> str:
    return os.readlink(name, dir_fd=directory)


def _gone(pid: int, why: object) -> ContainerFailed:
    return ContainerFailed(f"The container's process 1, {pid} on this host, can't be read any more: {why}")
