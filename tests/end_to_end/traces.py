"""What a container could leave behind: in the daemon, on the host, in the state directory."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon


def traces(daemon: Daemon, state_dir: Path, cgroup_parent: str) -> dict[str, list[str]]:
    """Everything there is now, by kind; all lists are empty when nothing is left."""
    directory = str(daemon.directory)
    # dockerd mounts its own data root, and keeps the host's network at hand once a container has had it.
    own = (f"{directory}/root", f"{directory}/exec/netns/default")
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if directory in line]
    return {
        **(_docker(daemon) if daemon.kind == "docker" else _containerd(daemon)),
        "mounts": sorted(mount for mount in mounts if mount not in own),
        "cgroups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{cgroup_parent}/*") if path.is_dir())
        + sorted(_cgroups_of_v2(Path("/sys/fs/cgroup", cgroup_parent))),
        "shims": _shims(directory),
        "state directory": sorted(
            f"{parent.name}/{entry.name}"
            for parent in (state_dir / "workloads", *(state_dir / "containers").glob("*"))
            if parent.is_dir()
            for entry in parent.iterdir()
        ),
        "sockets and fifos": [
            path
            for place in (state_dir, daemon.directory / "state", daemon.directory / "exec")
            for path in _special_files(place)
            if daemon.kind != "docker" or place == state_dir
        ],
    }


def of_containers(found: dict[str, list[str]], ids: set[str]) -> dict[str, list[str]]:
    """Those traces that bear one of these ids: what others are running now does not count."""
    return {kind: left for kind, entries in found.items() if (left := [e for e in entries if any(i in e for i in ids)])}


def household(daemon: Daemon, state_dir: Path) -> set[str]:
    """What is meant to be there while no task runs, in the daemon's words: zygotes, and containers for the next tasks."""
    names = {json.loads(record.read_bytes())["container"] for record in state_dir.glob("zygotes/*/record.json")}
    # Those that are being made, too: whether any stays is seen when their makers have ended.
    names |= {path.stem for path in state_dir.glob("spares/*/*") if path.suffix != ".claimed"}
    if daemon.kind != "docker":
        return {*names, f"{state_dir}/zygotes/", f"{state_dir}/roots/"}
    ids = [id for name, id in (line.split() for line in _docker(daemon)["containers"]) if name in names]
    merged = "{{.GraphDriver.Data.MergedDir}}"
    # One that has gone meanwhile is no error.
    places = daemon.run("docker", "inspect", "--format", merged, *ids, check=False).stdout.split() if ids else []
    return {*names, *ids, *places, f"{state_dir}/zygotes/"}


def all_but(found: dict[str, list[str]], ids: set[str]) -> dict[str, list[str]]:
    """The traces that bear none of these ids."""
    return {
        kind: left for kind, entries in found.items() if (left := [e for e in entries if not any(i in e for i in ids)])
    }


def _containerd(daemon: Daemon) -> dict[str, list[str]]:
    snapshots = daemon.run("ctr", "snapshots", "list").stdout.splitlines()[1:]
    return {
        "containers": daemon.run("ctr", "containers", "list", "--quiet").stdout.split(),
        "tasks": daemon.run("ctr", "tasks", "list", "--quiet").stdout.split(),
        "leases": daemon.run("ctr", "leases", "list", "--quiet").stdout.split(),
        "snapshots": sorted(line.split()[0] for line in snapshots if not line.rstrip().endswith("Committed")),
    }


def _docker(daemon: Daemon) -> dict[str, list[str]]:
    listed = daemon.run("docker", "ps", "--all", "--no-trunc", "--format", "{{.Names}} {{.ID}}").stdout
    return {
        "containers": listed.splitlines(),
        "volumes": daemon.run("docker", "volume", "ls", "--quiet").stdout.split(),
    }


def _shims(directory: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdecimal() else ""
            if "containerd-shim" in command and directory in command:
                found.append(command.replace("\0", " ").strip())
    return sorted(found)


def _cgroups_of_v2(parent: Path) -> Iterator[str]:
    """Those of containers, and those of purposes which have none."""
    for purpose in parent.glob("*"):
        with suppress(FileNotFoundError, NotADirectoryError):
            below = [entry.path for entry in os.scandir(purpose) if entry.is_dir()]
            yield from below or [str(purpose)]


def _special_files(directory: Path) -> list[str]:
    found = []
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                mode = Path(parent, name).lstat().st_mode
                if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
                    found.append(str(Path(parent, name)))
    return sorted(found)


def running_commands() -> list[str]:
    """The command line of every process of the host."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal():
                found.append((entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip())
    return found
