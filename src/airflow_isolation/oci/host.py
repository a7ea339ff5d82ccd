"""What the spec builder must know of the host. ``HostFacts`` is a value, ``read_host`` the one place that looks."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from airflow_isolation.oci.confinement import NOFILE_HARD

# The names of GOARCH, which image configurations and seccomp profiles use, by the kernel's names.
_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# The profiles that Docker and containerd's CRI plugin load; either confines a container well.
_APPARMOR_PROFILES = ("docker-default", "cri-containerd.apparmor.d")

# linux/capability.h
_CAP_SYS_RESOURCE = 24

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """The host, as far as a runtime-spec depends on it.

    Attributes:
        architecture: Go's name: ``amd64``, ``arm64``.
        kernel: major and minor version.
        cgroup_v2: the unified hierarchy is mounted at /sys/fs/cgroup; False on v1 and hybrid hosts.
        swap_limit: the kernel can limit swap. Where it can't, asking for it would fail.
        recursive_read_only: kernel and runtime know ``rro``. If not, a read-only bind leaves out the mounts below it.
        apparmor_profile: a loaded profile for containers; empty where AppArmor is off.
        masked_paths: paths of this host's sysfs to be masked beside the usual ones.
        open_files: the most open files that the daemon may allow a container.
        daemon_paths: sockets and directories of the container daemons in use, which no container may see.

    """

    architecture: str = "amd64"
    kernel: tuple[int, int] = (4, 18)
    cgroup_v2: bool = False
    swap_limit: bool = True
    recursive_read_only: bool = False
    apparmor_profile: str = ""
    masked_paths: tuple[str, ...] = ()
    open_files: int = NOFILE_HARD
    daemon_paths: tuple[str, ...] = ()


def read_host(
    *, daemon_pid: int = 0, daemon_paths: tuple[str, ...] = (), root: Path = Path("/"), runtime: str = "runc"
) -> HostFacts:
    """Look at this host. ``runtime`` is asked for its features (5 s at most); one that doesn't answer counts as having none.

    ``daemon_pid`` (from SO_PEERCRED) is the process whose limits the containers inherit; 0 is this process.
    Takes some 20 ms. The answer holds as long as the daemon runs: ask once.
    """
    kernel = kernel_version(platform.release())
    cgroup = root / "sys/fs/cgroup"
    cgroup_v2 = (cgroup / "cgroup.controllers").exists()
    return HostFacts(
        architecture=host_architecture(),
        kernel=kernel,
        cgroup_v2=cgroup_v2,
        swap_limit=_swap_limit(cgroup, cgroup_v2=cgroup_v2),
        recursive_read_only=kernel >= (5, 12) and runtime_features(runtime).recursive_read_only,
        apparmor_profile=_apparmor_profile(root / "sys/kernel/security/apparmor/profiles"),
        masked_paths=tuple(
            f"/{path.relative_to(root)}"
            for path in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle"))
        ),
        open_files=_open_files(root / "proc" / (str(daemon_pid) if daemon_pid else "self")),
        daemon_paths=daemon_paths,
    )


def host_architecture() -> str:
    """Go's name for this host's architecture."""
    return _GO_ARCHITECTURES.get(platform.machine(), platform.machine())


def kernel_version(release: str) -> tuple[int, int]:
    """Major and minor version of what ``uname -r`` says; (0, 0) when it can't be parsed, so that no new feature is used.

    >>> kernel_version("6.1.0-18-amd64")
    (6, 1)
    """
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _swap_limit(cgroup: Path, *, cgroup_v2: bool) -> bool:
    if not cgroup_v2:
        return (cgroup / "memory/memory.memsw.limit_in_bytes").exists()
    # The root cgroup has no limit files, so look at a child. If none has the memory controller yet, assume the usual.
    return any(cgroup.glob("*/memory.swap.max")) or not any(cgroup.glob("*/memory.max"))


def _open_files(process: Path) -> int:
    """The highest limit that ``process`` can give its children: more than its own only with CAP_SYS_RESOURCE."""
    try:
        capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", (process / "status").read_text(), re.MULTILINE)
        limit = re.search(r"^Max open files\s+\S+\s+(\d+)", (process / "limits").read_text(), re.MULTILINE)
    except OSError:
        return NOFILE_HARD
    may_raise = capabilities is not None and int(capabilities[1], 16) >> _CAP_SYS_RESOURCE & 1
    return NOFILE_HARD if may_raise or limit is None else min(NOFILE_HARD, int(limit[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeFeatures:
    """The features that an OCI runtime reports (runtime-spec, features.md)."""

    recursive_read_only: bool = False
    idmapped_mounts: bool = False


def runtime_features(runtime: str) -> RuntimeFeatures:
    """The features of a program in PATH or at a path; none when it is missing, silent for 5 s or gives no valid answer.

    The answer is remembered until the program changes.
    """
    program = shutil.which(runtime, path=f"{os.environ.get('PATH', '')}:{_SBIN}")
    if program is None:
        return RuntimeFeatures()
    try:
        status = Path(program).stat()
        return _features(program, status.st_mtime_ns, status.st_ino)
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError, TypeError):
        # Not remembered: next time it may be less busy.
        return RuntimeFeatures()


@lru_cache(maxsize=8)
def _features(program: str, _changed: int, _inode: int) -> RuntimeFeatures:
    answer = subprocess.run([program, "features"], capture_output=True, check=True, timeout=5)
    said = json.loads(answer.stdout)
    extensions = (said.get("linux") or {}).get("mountExtensions") or {}
    return RuntimeFeatures(
        recursive_read_only="rro" in (said.get("mountOptions") or ()),
        idmapped_mounts=bool((extensions.get("idmap") or {}).get("enabled")),
    )


def _apparmor_profile(profiles: Path) -> str:
    try:
        loaded = {line.partition(" ")[0] for line in profiles.read_text().splitlines()}
    except OSError:
        return ""
    return next((profile for profile in _APPARMOR_PROFILES if profile in loaded), "")
