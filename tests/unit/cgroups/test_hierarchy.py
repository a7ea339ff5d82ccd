"""Which cgroups a host has, from literal /proc/self/mountinfo and /proc/self/cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_isolation.cgroups import CgroupDenied, ControllerMissing, Hierarchy, NotUnified, find_hierarchy, find_tree
from airflow_isolation.cgroups.hierarchy import delegated_part, read_hierarchy

MOUNT = Path("/sys/fs/cgroup")

UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
LEGACY = """\
25 17 0:22 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
27 25 0:24 / /sys/fs/cgroup/systemd rw,relatime shared:10 - cgroup cgroup rw,xattr,name=systemd
30 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:15 - cgroup cgroup rw,cpu,cpuacct
31 25 0:28 / /sys/fs/cgroup/memory rw,relatime shared:16 - cgroup cgroup rw,memory
"""
HYBRID = LEGACY + "26 25 0:23 / /sys/fs/cgroup/unified rw,relatime shared:11 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_OWN = "12:memory:/user.slice\n3:cpu,cpuacct:/user.slice\n1:name=systemd:/user.slice/a.service\n"


def test_cgroup_v2() -> None:
    found = read_hierarchy(UNIFIED, "0::/system.slice/airflow-worker.service\n", MOUNT)
    assert found == Hierarchy(kind="unified", mount=MOUNT, own="system.slice/airflow-worker.service")


def test_cgroup_v1() -> None:
    assert read_hierarchy(LEGACY, V1_OWN, MOUNT) == Hierarchy(kind="legacy", mount=MOUNT)


def test_a_hybrid_host() -> None:
    assert read_hierarchy(HYBRID, f"{V1_OWN}0::/user.slice/a.service\n", MOUNT).kind == "hybrid"


def test_the_v2_of_a_hybrid_host_named_by_itself() -> None:
    found = read_hierarchy(HYBRID, f"{V1_OWN}0::/user.slice/a.service\n", MOUNT / "unified")
    assert (found.kind, found.own) == ("unified", "user.slice/a.service")


def test_a_single_v1_hierarchy_named_by_itself() -> None:
    assert read_hierarchy(LEGACY, V1_OWN, MOUNT / "memory").kind == "legacy"


def test_what_is_mounted_last_counts() -> None:
    assert read_hierarchy(LEGACY + UNIFIED, "0::/\n", MOUNT).kind == "unified"


@pytest.mark.parametrize("path", ["/data", "/sys/fs", "/sys/fs/cgroup2"])
def test_not_a_mount_of_cgroups(path: str) -> None:
    assert read_hierarchy(UNIFIED, "0::/\n", Path(path)).kind == "none"


@pytest.mark.parametrize("options", ["ro,nosuid - cgroup2 cgroup2 rw", "rw,nosuid - cgroup2 cgroup2 ro"])
def test_a_read_only_mount(options: str) -> None:
    assert read_hierarchy(f"30 23 0:26 / /sys/fs/cgroup {options}\n", "0::/\n", MOUNT).read_only


def test_a_mount_that_counts_events_without_what_is_below() -> None:
    found = read_hierarchy("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,memory_localevents\n", "0::/\n", MOUNT)
    with pytest.raises(CgroupDenied, match="memory_localevents"):
        find_tree(
            Hierarchy(kind="unified", mount=MOUNT, controllers=frozenset({"memory"}), local_events=True), "airflow"
        )
    assert found.local_events


@pytest.mark.parametrize(
    ("root", "own", "expected"),
    [
        ("/", "/system.slice/worker.service", "system.slice/worker.service"),
        # A container without a cgroup namespace sees its own part of the host's.
        ("/docker/1234", "/docker/1234", ""),
        ("/docker/1234", "/docker/1234/worker", "worker"),
        # Somewhere else altogether.
        ("/docker/1234", "/docker/12345", ""),
        ("/docker/1234", "/user.slice", ""),
        ("/", "/../../user.slice", ""),
        ("/", "/system.slice/worker.service (deleted)", "system.slice/worker.service"),
    ],
)
def test_the_own_cgroup_is_told_below_the_mount(root: str, own: str, expected: str) -> None:
    mountinfo = f"30 23 0:26 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert read_hierarchy(mountinfo, f"0::{own}\n", MOUNT).own == expected


def test_a_mount_point_with_a_blank() -> None:
    mountinfo = "30 23 0:26 / /mnt/c\\040groups rw - cgroup2 cgroup2 rw\n"
    assert read_hierarchy(mountinfo, "0::/\n", Path("/mnt/c groups")).kind == "unified"


def test_the_nearest_delegated_part_upwards() -> None:
    own = "user.slice/user@1000.service/app.slice/worker.service/worker"
    marked = {"user.slice/user@1000.service", "user.slice/user@1000.service/app.slice/worker.service"}
    assert delegated_part(own, marked.__contains__) == "user.slice/user@1000.service/app.slice/worker.service"
    assert (
        delegated_part("user.slice/user@1000.service/init.scope", marked.__contains__) == "user.slice/user@1000.service"
    )
    assert delegated_part("system.slice/cron.service", marked.__contains__) == ""
    assert delegated_part("", marked.__contains__) == ""


@pytest.mark.parametrize(
    ("hierarchy", "error", "words"),
    [
        (Hierarchy(kind="legacy", mount=MOUNT), NotUnified, "are v1.*systemd.unified_cgroup_hierarchy=1"),
        (Hierarchy(kind="hybrid", mount=MOUNT), NotUnified, "are hybrid: the controllers are v1's"),
        (Hierarchy(kind="none", mount=MOUNT), NotUnified, "is not a mount of cgroups.*cgroup_mount_path"),
        (Hierarchy(kind="unified", mount=MOUNT), ControllerMissing, "does not have the controller memory, only: none"),
        (
            Hierarchy(kind="unified", mount=MOUNT, controllers=frozenset({"memory"}), read_only=True),
            CgroupDenied,
            "mounted read-only",
        ),
    ],
)
def test_what_stands_in_the_way_is_named_with_what_to_do(
    hierarchy: Hierarchy, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        find_tree(hierarchy, "airflow")


def test_the_tree_is_below_the_delegated_part() -> None:
    hierarchy = Hierarchy(
        kind="unified", mount=MOUNT, controllers=frozenset({"memory"}), delegated="system.slice/worker.service"
    )
    tree = find_tree(hierarchy, "/airflow/")
    assert tree.leaf("task_execution", "w1") == "system.slice/worker.service/airflow/task_execution/w1/container"


def test_a_host_without_proc_has_none(tmp_path: Path) -> None:
    assert find_hierarchy(MOUNT, proc=tmp_path).kind == "none"


def test_literal_files_as_find_hierarchy_reads_them(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(HYBRID)
    (tmp_path / "self/cgroup").write_text("0::/\n")
    assert find_hierarchy(MOUNT, proc=tmp_path) == Hierarchy(kind="hybrid", mount=MOUNT)
