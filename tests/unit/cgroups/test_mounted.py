"""Where cgroups are mounted, on literal lines of /proc/self/mountinfo."""

from __future__ import annotations

from pathlib import Path

from airflow_isolation.cgroups.mounted import UNIFIED, CgroupMounts, Mounted, find_mounts

MOUNTS = """\
31 1 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro
32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 31 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
35 31 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
90 1 0:30 /docker/1f /run/other/memory rw - cgroup cgroup rw,memory
"""
CPU, MEMORY, SYSTEMD, V2 = (
    Mounted(Path("/sys/fs/cgroup", name), "/") for name in ("cpu", "memory", "systemd", "unified")
)


def mounts_of(proc: Path, mountinfo: str) -> CgroupMounts:
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(mountinfo)
    return find_mounts(proc)


def test_of_a_hierarchy_that_is_mounted_twice_the_mount_that_shows_more_is_taken(tmp_path: Path) -> None:
    found = mounts_of(tmp_path, MOUNTS).by_controller
    wanted = {"cpu": CPU, "cpuacct": CPU, "memory": MEMORY, "name=systemd": SYSTEMD, UNIFIED: V2}
    assert {name: found[name] for name in wanted} == wanted


def test_a_hierarchy_of_several_controllers_is_one(tmp_path: Path) -> None:
    assert sorted(mounts_of(tmp_path, MOUNTS).hierarchies, key=str) == [CPU, MEMORY, SYSTEMD, V2]


def test_a_host_without_cgroups_has_no_mounts_of_them(tmp_path: Path) -> None:
    assert find_mounts(tmp_path).hierarchies == ()
