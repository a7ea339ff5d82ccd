"""The tree of workloads: made level by level, shared by workers, and taken away again whatever is in it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from subprocess import run
from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB, ended, inside, occupied, sleeping, until

from airflow_isolation.cgroups import (
    CgroupBusy,
    CgroupDenied,
    CgroupError,
    CgroupGone,
    ControllerMissing,
    Cpu,
    Cpuset,
    Hierarchy,
    Io,
    Limits,
    Memory,
    NotUnified,
    Pids,
    Tree,
    ValueRefused,
    find_hierarchy,
    find_tree,
    kernel,
    list_workloads,
    make_workload,
    open_cgroup,
    processes,
    remove_abandoned,
    remove_workload,
)
from airflow_isolation.container_spec import DeviceRates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TASK, PARSE = "task_execution", "dag_parsing"
ALL = Limits(cpu=Cpu(cpus=2, weight=200), memory=Memory(max=64 * MIB, swap=0, oom_group=True), pids=Pids(max=100))


def controllers(directory: Path) -> set[str]:
    return set((directory / "cgroup.controllers").read_text().split())


def test_this_kernel_has_cgroup_v2_as_a_whole(hierarchy: Hierarchy) -> None:
    assert hierarchy.kind == "unified"
    assert hierarchy.controllers == {"cpu", "io", "memory", "pids"}
    assert not hierarchy.read_only
    hierarchy.require("cpu", "memory", "pids", "io")


def test_a_controller_that_the_kernel_lacks_is_named(hierarchy: Hierarchy) -> None:
    with pytest.raises(ControllerMissing, match="does not have the controller cpuset, only: cpu, io, memory, pids"):
        hierarchy.require("memory", "cpuset")


def test_each_level_hands_down_the_controllers_and_the_limits_are_in_the_workloads_directory(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1", ALL)
    assert workload.cgroup.path == tree.mount / "airflow/tests/task_execution/w1"
    assert controllers(workload.cgroup.path) == {"cpu", "io", "memory", "pids"}
    files = ("cpu.max", "cpu.weight", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max")
    assert [(workload.cgroup.path / file).read_text().strip() for file in files] == [
        *("200000 100000", "200", str(64 * MIB), "0", "1", "100")
    ]
    workload.remove()


def test_the_levels_above_go_with_the_last_workload(tree: Tree) -> None:
    task, parse = make_workload(tree, TASK, "w1"), make_workload(tree, PARSE, "w2")
    assert list_workloads(tree) == ((PARSE, "w2"), (TASK, "w1"))
    task.remove()
    assert not (tree.mount / tree.purpose(TASK)).exists()
    assert (tree.mount / tree.purpose(PARSE)).exists()
    parse.remove()
    assert not (tree.mount / "airflow").exists()


def test_removing_twice_is_no_error(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    workload.remove()
    workload.remove()
    remove_workload(tree, TASK, "w1")


def test_a_directory_that_somebody_else_has_removed_is_no_error(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    workload.cgroup.path.rmdir()
    workload.remove()


def test_an_id_of_a_living_workload_is_refused(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    with pytest.raises(CgroupBusy, match="belongs to another process"):
        make_workload(tree, TASK, "w1")
    assert list_workloads(tree) == ((TASK, "w1"),)
    workload.remove()


@pytest.mark.parametrize("id", ["..", ".", "", "a/b", "a\0b", "a\nb"])
def test_an_id_that_is_no_name_of_a_cgroup_is_refused(tree: Tree, id: str) -> None:
    with pytest.raises(ValueRefused, match="is not the name of a cgroup"):
        make_workload(tree, TASK, id)


def test_a_workload_whose_limits_are_refused_is_not_left_behind(tree: Tree) -> None:
    with pytest.raises(ControllerMissing, match="cpuset"):
        make_workload(tree, TASK, "w1", Limits(cpuset=Cpuset(cpus="0")))
    with pytest.raises(ValueRefused):
        make_workload(tree, TASK, "w1", Limits(cpu=Cpu(cpus=1, burst=10)))


def test_everything_in_it_is_killed(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    pid = inside(workload.cgroup.path, signal.pause)
    workload.remove()
    assert ended(pid) == -signal.SIGKILL


def test_frozen_processes_are_killed_too(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    pid = inside(workload.cgroup.path, signal.pause)
    processes.freeze(workload.cgroup)
    until(lambda: processes.is_frozen(workload.cgroup))
    workload.remove()
    assert ended(pid) == -signal.SIGKILL


def test_a_frozen_process_goes_on_when_it_is_let_go(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    with sleeping(workload.cgroup.path):
        processes.freeze(workload.cgroup)
        until(lambda: processes.is_frozen(workload.cgroup))
        processes.freeze(workload.cgroup, frozen=False)
        until(lambda: not processes.is_frozen(workload.cgroup))
    workload.remove()


def test_cgroups_that_a_task_has_made_are_removed_with_their_processes(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    pids = []
    for name in ("container/init", "container/service/a/b/c", "container/service/d", "other"):
        below = workload.cgroup.path / name
        below.mkdir(parents=True)
        pids.append(inside(below, signal.pause))
    workload.remove()
    assert [ended(pid) for pid in pids] == [-signal.SIGKILL] * 4


def test_a_task_that_keeps_making_cgroups_and_processes_is_removed(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")

    def multiply() -> None:
        number = 0
        while True:
            number += 1
            below = workload.cgroup.path / f"n{number % 50}"
            below.mkdir(exist_ok=True)
            if os.fork() == 0:
                (below / "cgroup.procs").write_text("0")
                signal.pause()

    pid = inside(workload.cgroup.path, multiply)
    until(lambda: len(workload.cgroup.children()) > 20)
    workload.remove(30)
    assert ended(pid) == -signal.SIGKILL


def test_kernels_without_cgroup_kill_are_served_too(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Linux before 5.14: the file is there under another name, so to speak."""
    workload = make_workload(tree, TASK, "w1")
    below = workload.cgroup.path / "container"
    below.mkdir()
    pids = [inside(directory, signal.pause) for directory in (below, below, workload.cgroup.path)]
    write = type(workload.cgroup).write

    def without_kill(cgroup: object, file: str, value: str) -> None:
        write(cgroup, "cgroup.no-such-file" if file == "cgroup.kill" else file, value)  # type: ignore[arg-type]

    monkeypatch.setattr(type(workload.cgroup), "write", without_kill)
    workload.remove()
    assert [ended(pid) for pid in pids] == [-signal.SIGKILL] * 3


def test_processes_that_do_not_end_are_named_and_the_workload_is_still_there(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = make_workload(tree, TASK, "w1")
    with sleeping(workload.cgroup.path) as pid:
        with monkeypatch.context() as patched:
            # A stand-in for a process that is stuck in the kernel.
            patched.setattr(processes, "kill_all", lambda _: None)
            with pytest.raises(CgroupBusy, match=f"do not end: {pid}"):
                workload.remove(0.1)
        assert list_workloads(tree) == ((TASK, "w1"),)
    workload.remove()


def test_what_a_dead_worker_left_is_removed_and_a_living_ones_is_not(tree: Tree) -> None:
    def die() -> None:
        workload = make_workload(tree, TASK, "dead", ALL)
        inside(workload.cgroup.path, signal.pause)
        os._exit(0)

    living = make_workload(tree, TASK, "living")
    assert ended(inside(tree.mount, die)) == 0
    assert set(list_workloads(tree)) == {(TASK, "dead"), (TASK, "living")}
    # Its container may be another worker's by now.
    assert remove_abandoned(tree) == ()
    with open_cgroup(tree.mount, tree.workload(TASK, "dead")) as cgroup:
        processes.kill_all(cgroup)
        processes.wait_until_empty(cgroup, 10)
    assert remove_abandoned(tree, dry_run=True) == remove_abandoned(tree) == ("dead",)
    assert list_workloads(tree) == ((TASK, "living"),)
    assert remove_abandoned(tree) == ()
    living.remove()


def test_a_child_of_a_worker_does_not_keep_what_the_worker_left(tree: Tree) -> None:
    """A fork has the parent's descriptors, and a lock is the descriptor's."""

    def die() -> None:
        make_workload(tree, TASK, "dead")
        if os.fork():
            os._exit(0)
        signal.pause()

    nest = tree.mount / "nest"
    nest.mkdir()
    assert ended(inside(nest, die)) == 0
    with open_cgroup(tree.mount, "nest") as cgroup:
        assert len(processes.members(cgroup)) == 1
        until(lambda: remove_abandoned(tree) == ("dead",))
        processes.kill_all(cgroup)
        processes.wait_until_empty(cgroup, 10)
    nest.rmdir()


def test_an_id_that_a_dead_worker_left_can_be_used_again(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    workload.close()
    again = make_workload(tree, TASK, "w1")
    again.remove()


def test_many_workers_at_the_same_time_do_not_disturb_each_other(tree: Tree) -> None:
    """Each takes the levels away with its last workload, under the others' hands, and left-overs are looked for."""

    def work(number: int) -> None:
        for turn in range(15):
            workload = make_workload(tree, TASK, f"w{number}-{turn}", ALL)
            assert (workload.cgroup.path / "pids.max").read_text() == "100\n"
            remove_abandoned(tree)
            workload.remove()

    pids = [inside(tree.mount, lambda number=number: work(number)) for number in range(6)]  # type: ignore[misc]
    assert [ended(pid) for pid in pids] == [0] * 6


def test_the_purpose_has_its_budget(tree: Tree) -> None:
    budget = Limits(cpu=Cpu(cpus=4), memory=Memory(max=256 * MIB), pids=Pids(max=1000))
    workload = make_workload(tree, TASK, "w1", ALL, budget=budget)
    purpose = tree.mount / tree.purpose(TASK)
    files = ("cpu.max", "memory.max", "pids.max")
    assert [(purpose / file).read_text().strip() for file in files] == ["400000 100000", str(256 * MIB), "1000"]
    other = make_workload(tree, TASK, "w2", budget=replace(budget, pids=Pids(max=500)))
    assert (purpose / "pids.max").read_text().strip() == "500"
    other.remove()
    workload.remove()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            Limits(memory=Memory(max=32 * MIB)),
            "memory is .* bytes, but all workloads of task_execution .*budget_memory",
        ),
        (Limits(cpu=Cpu(cpus=1.5)), "cpus is 2 cores, but all workloads of task_execution together have 1.5"),
        (Limits(pids=Pids(max=50)), "pids is 100 processes"),
    ],
)
def test_a_budget_smaller_than_a_workloads_limit_is_refused(tree: Tree, budget: Limits, words: str) -> None:
    with pytest.raises(ValueRefused, match=words):
        make_workload(tree, TASK, "w1", ALL, budget=budget)


def test_an_inner_node_with_processes_of_others_is_named_and_they_are_left_alone(tree: Tree) -> None:
    busy = tree.mount / "busy"
    busy.mkdir()
    with sleeping(busy) as pid:
        with pytest.raises(
            CgroupBusy, match=r"'\+memory' to /sys/fs/cgroup/busy/cgroup\.subtree_control.*DelegateSubgroup"
        ):
            make_workload(replace(tree, delegated="busy", root="busy/airflow"), TASK, "w1")
        assert processes.members(open_cgroup(tree.mount, "busy")) == (pid,)
    until(lambda: not (busy / "cgroup.procs").read_text())
    assert list(busy.glob("airflow")) == []
    busy.rmdir()


@pytest.fixture
def delegated_unit(tree: Tree) -> Iterator[Path]:
    """As systemd makes it for a unit with Delegate=yes."""
    (tree.mount / "cgroup.subtree_control").write_text("+cpu +memory +pids +io")
    unit = tree.mount / "system.slice/worker.service"
    unit.mkdir(parents=True)
    (unit.parent / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    os.setxattr(unit, "trusted.delegate", b"1")
    yield unit
    for name in ("worker.service/worker", "worker.service/airflow", "worker.service", ""):
        directory = unit.parent / name
        if directory.exists():
            directory.rmdir()


def test_in_a_delegated_unit_the_tree_is_below_it_and_the_worker_moves_out_of_the_way(
    tree: Tree, delegated_unit: Path
) -> None:
    def worker() -> None:
        found = find_hierarchy(tree.mount)
        assert (found.own, found.delegated) == ("system.slice/worker.service", "system.slice/worker.service")
        workload = make_workload(find_tree(found, "airflow"), TASK, "w1", ALL)
        assert workload.leaf == "system.slice/worker.service/airflow/task_execution/w1/container"
        assert (workload.cgroup.path / "memory.max").read_text().strip() == str(64 * MIB)
        # From its new place it finds the same.
        again = find_hierarchy(tree.mount)
        assert (again.own, again.delegated) == ("system.slice/worker.service/worker", "system.slice/worker.service")
        workload.remove()

    assert ended(inside(delegated_unit, worker)) == 0


def test_a_controller_that_is_not_handed_down_to_the_unit_is_named(tree: Tree, delegated_unit: Path) -> None:
    unit = replace(tree, delegated="system.slice/worker.service", root="system.slice/worker.service/airflow")
    with pytest.raises(ControllerMissing, match=r"worker\.service does not have the controller io"):
        make_workload(unit, TASK, "w1", Limits(io=Io(max=(DeviceRates(device="7:0", wbps=1),))))


def test_a_user_has_what_is_delegated_to_it_and_nothing_else(tree: Tree) -> None:
    slice_ = tree.mount / "user.slice"
    service = slice_ / "user@1000.service"
    (tree.mount / "cgroup.subtree_control").write_text("+cpu +memory +pids +io")
    service.mkdir(parents=True)
    (slice_ / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    (service / "app").mkdir()
    # As systemd does for a user's manager.
    for path in (service, service / "app"):
        os.chown(path, 1000, 1000)
        for file in ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
            os.chown(path / file, 1000, 1000)

    def worker() -> None:
        os.setgid(1000)
        os.setuid(1000)
        found = find_hierarchy(tree.mount)
        assert found.delegated == "user.slice/user@1000.service"
        workload = make_workload(find_tree(found, "airflow"), TASK, "w1", ALL)
        assert (workload.cgroup.path / "pids.max").read_text().strip() == "100"
        workload.remove()
        with pytest.raises(CgroupDenied, match=r"Permission denied.*Delegate=yes"):
            make_workload(tree, TASK, "w1", ALL)

    pid = inside(service / "app", worker)
    assert ended(pid) == 0
    for directory in (service / "app", service, slice_):
        directory.rmdir()


def test_a_read_only_mount_is_refused(tmp_path: Path) -> None:
    run(["mount", "-t", "cgroup2", "-o", "ro", "cgroup2", str(tmp_path)], check=True)
    try:
        run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
        found = find_hierarchy(tmp_path)
        assert found.kind == "unified"
        with pytest.raises(CgroupDenied, match="mounted read-only"):
            find_tree(found, "airflow")
        with open_cgroup(tmp_path) as cgroup, pytest.raises(CgroupDenied, match="Read-only file system"):
            cgroup.make_child("airflow")
    finally:
        run(["umount", str(tmp_path)], check=True)


def test_a_directory_that_is_no_cgroup_mount_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotUnified, match="is not a mount of cgroups"):
        find_tree(find_hierarchy(tmp_path), "airflow")
    with pytest.raises(NotUnified, match="is not in a cgroup v2 file system"):
        open_cgroup(tmp_path)


@pytest.mark.parametrize("open_beneath", [kernel.open_directory_beneath, kernel.open_step_by_step])
def test_no_path_leads_out_of_the_mount(open_beneath: object, tmp_path: Path) -> None:
    assert callable(open_beneath)
    (tmp_path / "inside/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "inside/link").symlink_to("deep")
    (tmp_path / "file").write_text("")
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        descriptor = open_beneath(root, "inside/deep")
        assert os.path.samestat(os.fstat(descriptor), (tmp_path / "inside/deep").stat())
        os.close(descriptor)
        for path in ("..", "inside/../..", "/etc", "link", "inside/link", "file", "none"):
            with pytest.raises(OSError, match=r"\[Errno"):
                open_beneath(root, path)
    finally:
        os.close(root)


def test_a_mount_on_the_way_is_not_entered(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    run(["mount", "-t", "tmpfs", "tmpfs", str(workload.cgroup.path)], check=True)
    try:
        with pytest.raises(CgroupError, match="Invalid cross-device link"):
            open_cgroup(tree.mount, workload.cgroup.name)
    finally:
        run(["umount", str(workload.cgroup.path)], check=True)
    workload.remove()


def test_a_process_is_put_into_a_cgroup_and_found_there(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w1")
    assert not processes.is_populated(workload.cgroup)
    with occupied(tree.mount, signal.pause) as pid:
        processes.move(workload.cgroup, pid)
        assert processes.members(workload.cgroup) == (pid,)
        assert processes.is_populated(workload.cgroup)
    with pytest.raises(CgroupError, match="No such process"):
        processes.move(workload.cgroup, pid)
    workload.remove()
    with pytest.raises(CgroupGone):
        processes.members(open_cgroup(tree.mount, workload.cgroup.name))
