"""Real containers, of containerd and runc, below directories of ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB, ended, inside, tree_of, until
from tests.conftest import running

from airflow_isolation.bridge.ending import Meter
from airflow_isolation.bridge.prune import prune
from airflow_isolation.cgroups import (
    Limit,
    Tree,
    attribute,
    list_workloads,
    make_workload,
    open_cgroup,
    read_statistics,
    read_victims,
    take_sample,
    usage_of,
)
from airflow_isolation.container_spec import ContainerSpec, DeviceRates, Resources
from airflow_isolation.errors import ContainerFailed, SpecRefused
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime.containerd import ContainerdRuntime
from airflow_isolation.runtime.interface import ContainerState, Stray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive

TASK = "task_execution"
SECONDS = 120
USE_ALL = ("/bin/busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=1G", "count=1")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    # The release whose own notice of an OOM is the least to be relied on.
    with running("containerd", "--version=1.6") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def runtime(daemon: Daemon, image_archive: ImageArchive, state_dir: Path) -> Iterator[ContainerdRuntime]:
    with ContainerdRuntime(str(daemon.socket), state_dir=state_dir, timeout=60) as runtime:
        runtime.import_image(image_archive("no-python"))
        yield runtime


@pytest.fixture
def tree(runtime: ContainerdRuntime) -> Iterator[Tree]:
    """As the runtime makes it. After a test nothing of it may be left."""
    with tree_of(runtime) as tree:
        yield tree


def seen_inside(pid: int, file: str) -> str:
    """As a program in the container reads it, to learn how much it may use."""
    return Path(f"/proc/{pid}/root/sys/fs/cgroup/{file}").read_text().strip()


def test_limits_are_in_our_directory_and_the_container_is_below_it(
    runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    resources = Resources(cpus=0.5, memory=64 * MIB, pids=50, cpu_weight=50, memory_request=24 * MIB, memory_swap=0)
    budget = Resources(memory=256 * MIB, pids=500)
    container = runtime.create("w1", replace(spec, resources=resources, budget=budget))
    runtime.start("w1")
    directory = tree.mount / tree.workload(TASK, "w1")
    files = (
        "cpu.max",
        "cpu.weight",
        "memory.max",
        "memory.high",
        "memory.low",
        "memory.swap.max",
        "memory.oom.group",
        "pids.max",
    )
    assert [(directory / file).read_text().strip() for file in files] == [
        *("50000 100000", "50", str(64 * MIB), str(60 * MIB), str(24 * MIB), "0", "1", "50")
    ]
    assert (directory.parent / "memory.max").read_text().strip() == str(256 * MIB)
    assert str(container.pid) in (directory / "container/cgroup.procs").read_text().split()
    assert [seen_inside(container.pid, file) for file in ("cpu.max", "memory.max")] == ["50000 100000", str(64 * MIB)]
    assert seen_inside(container.pid, "pids.max") == "max"
    # runc's start has returned a moment before its init, of several threads, becomes the program.
    until(lambda: runtime.stats(["w1"])["w1"].pids == 1)
    assert runtime.stats(["w1"])["w1"].memory_limit == 64 * MIB
    runtime.remove("w1")
    assert not directory.exists()


def test_limits_change_in_our_directory_while_the_container_runs(
    runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    resources, budget = Resources(cpus=0.5, memory=64 * MIB, pids=50), Resources(memory=256 * MIB)
    pid = runtime.create("w1", replace(spec, resources=resources, budget=budget)).pid
    runtime.start("w1")
    runtime.update("w1", Resources(cpus=0.25, memory=128 * MIB, pids=60, cpu_weight=50, memory_high=100 * MIB))
    directory = tree.mount / tree.workload(TASK, "w1")
    files = ("cpu.max", "cpu.weight", "memory.max", "memory.high", "memory.swap.max", "memory.oom.group", "pids.max")
    held = [(directory / file).read_text().strip() for file in files]
    assert held == ["25000 100000", "50", str(128 * MIB), str(100 * MIB), "0", "1", "60"]
    assert [seen_inside(pid, file) for file in ("cpu.max", "memory.max")] == ["25000 100000", str(128 * MIB)]
    for refused, words in [
        (Resources(memory=512 * MIB, cpus=1), "all workloads of task_execution together have"),
        (Resources(memory=4), "memory is 4 bytes"),
        (Resources(cpuset="0", pids=70), "does not have it, or the controller cpuset is not enabled"),
        (Resources(io_max=(DeviceRates(device="/dev/none", wbps=1),), pids=70), "there is no disk '/dev/none'"),
    ]:
        with pytest.raises(SpecRefused, match=words):
            runtime.update("w1", refused)
    assert [(directory / file).read_text().strip() for file in files] == held
    assert (runtime.get("w1").state, runtime.get("w1").pid) == (ContainerState.RUNNING, pid)
    runtime.remove("w1")


@pytest.mark.timeout(900)
def test_twenty_containers_in_a_row_run_out_of_memory_and_are_named(
    runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    found = []
    for number in range(20):
        id = f"oom-{number}"
        runtime.create(id, replace(spec, argv=USE_ALL, resources=Resources(memory=24 * MIB)))
        with open_cgroup(tree.mount, tree.workload(TASK, id)) as cgroup, runtime.wait(id) as end:
            before = take_sample(cgroup, tree)
            pid = runtime.start(id)
            code = end.result(SECONDS).code
            verdict = attribute(
                before,
                take_sample(cgroup, tree),
                killed=code == 128 + signal.SIGKILL,
                pid=pid,
                victims=read_victims(id),
            )
            usage = usage_of(read_statistics(cgroup), wall=1)
        runtime.remove(id)
        assert verdict is not None
        found.append((code, verdict.fatal, verdict.limit, verdict.size, verdict.victims[-1].name, usage.oom_kills))
    assert found == [(137, True, Limit.OWN, 24 * MIB, "busybox", 1)] * 20


def test_a_container_that_is_killed_from_outside_has_not_run_out_of_memory(
    runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    runtime.create("w1", replace(spec, resources=Resources(memory=24 * MIB)))
    with open_cgroup(tree.mount, tree.workload(TASK, "w1")) as cgroup, runtime.wait("w1") as end:
        before = take_sample(cgroup, tree)
        pid = runtime.start("w1")
        os.kill(pid, signal.SIGKILL)
        assert end.result(SECONDS).code == 137
        assert attribute(before, take_sample(cgroup, tree), killed=True, pid=pid, victims=read_victims("w1")) is None
    runtime.remove("w1")


def test_counters_outlive_the_container(
    daemon: Daemon, runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    """As when a shim cleans up at once: the runtime's own directory is gone, and ours still tells."""
    runtime.create("w1", replace(spec, argv=USE_ALL, resources=Resources(memory=24 * MIB)))
    with runtime.wait("w1") as end:
        runtime.start("w1")
        end.result(SECONDS)
    daemon.run("ctr", "tasks", "rm", "w1", check=False)
    directory = tree.mount / tree.workload(TASK, "w1")
    until(lambda: not (directory / "container").exists())
    with open_cgroup(tree.mount, tree.workload(TASK, "w1")) as cgroup:
        usage = usage_of(read_statistics(cgroup), wall=1)
    assert usage.oom_kills == 1
    assert usage.memory_peak is not None
    assert usage.memory_peak >= 23 * MIB
    runtime.remove("w1")


def test_the_end_of_a_workload_is_told_from_its_process_though_all_is_gone_but_our_directory(
    daemon: Daemon, runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    argv = ("sh", "-c", "sleep 3; " + " ".join(USE_ALL))
    runtime.create("w1", replace(spec, argv=argv, resources=Resources(memory=24 * MIB, pids=20)))
    with runtime.wait("w1") as end:
        meter = Meter(runtime.start("w1"))
        assert runtime.stats(["w1"])["w1"].pids_limit == 20
        assert end.result(SECONDS).code == 128 + signal.SIGKILL
    daemon.run("ctr", "tasks", "rm", "w1", check=False)
    until(lambda: not (tree.mount / tree.workload(TASK, "w1") / "container").exists())
    ending = meter.ending(-signal.SIGKILL)
    meter.close()
    runtime.remove("w1")
    assert ending.out_of_memory is not None
    assert ending.out_of_memory.fatal
    assert "it reached its own limit, memory = 24 MiB" in ending.out_of_memory.sentence
    assert ending.out_of_memory.sentence.endswith("Raise resources.memory.")
    assert (ending.usage.oom_kills, ending.usage.memory_limit, ending.usage.pids_limit) == (1, 24 * MIB, 20)
    assert (ending.usage.memory_peak or 0) >= 23 * MIB
    assert (ending.usage.pids_peak or 0) >= 1
    assert ending.usage.bytes_read is not None


def test_crun_works_below_our_directory_too(
    daemon: Daemon, runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec, state_dir: Path
) -> None:
    crun = shutil.which("crun", path=daemon.path)
    assert crun is not None
    with ContainerdRuntime(str(daemon.socket), state_dir=state_dir, runtime_binary=crun, timeout=60) as with_crun:
        with_crun.create("w1", replace(spec, argv=USE_ALL, resources=Resources(memory=24 * MIB)))
        with open_cgroup(tree.mount, tree.workload(TASK, "w1")) as cgroup, with_crun.wait("w1") as end:
            before = take_sample(cgroup, tree)
            pid = with_crun.start("w1")
            assert end.result(SECONDS).code == 137
            verdict = attribute(before, take_sample(cgroup, tree), killed=True, pid=pid, victims=read_victims("w1"))
        with_crun.remove("w1")
    assert verdict is not None
    assert (verdict.fatal, verdict.limit, verdict.size) == (True, Limit.OWN, 24 * MIB)


def test_where_processes_die_alone_the_others_live_on(
    runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    """As in a container that parses many files."""
    resources = Resources(memory=24 * MIB, oom_group=False)
    argv = ("sh", "-c", " ".join(USE_ALL) + "; exec sleep 600")
    runtime.create("w1", replace(spec, argv=argv, resources=resources))
    with open_cgroup(tree.mount, tree.workload(TASK, "w1")) as cgroup:
        before = take_sample(cgroup, tree)
        pid = runtime.start("w1")
        until(lambda: take_sample(cgroup, tree).events.oom_kill > 0, SECONDS)
        verdict = attribute(before, take_sample(cgroup, tree), killed=False, pid=pid, victims=read_victims("w1"))
    assert runtime.get("w1").state is ContainerState.RUNNING
    runtime.remove("w1")
    assert verdict is not None
    assert (verdict.fatal, verdict.kills) == (False, 1)


def test_another_worker_removes_what_a_dead_one_left(
    daemon: Daemon, runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec, state_dir: Path
) -> None:
    """It knows the directory by the container's record."""
    runtime.create("w1", spec)
    with ContainerdRuntime(str(daemon.socket), state_dir=state_dir) as other:
        other.remove("w1")
    assert list_workloads(tree) == ()


def test_prune_removes_the_directory_of_a_container_that_an_operator_took_away(
    daemon: Daemon, runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec, state_dir: Path
) -> None:
    with ContainerdRuntime(str(daemon.socket), state_dir=state_dir, timeout=60) as of_a_worker:
        of_a_worker.create("taken-away", spec)
        runtime.create("left-alone", spec)
        daemon.run("ctr", "tasks", "rm", "--force", "taken-away")
        daemon.run("ctr", "containers", "rm", "taken-away")
        assert prune(runtime, state_dir=state_dir).strays == ()  # its worker lives
        of_a_worker._placements._forget("taken-away")  # as the worker's death does
    left = (Stray(kind="cgroup", id="taken-away"),)
    assert prune(runtime, state_dir=state_dir, dry_run=True).strays == left
    assert prune(runtime, state_dir=state_dir).strays == left
    assert list_workloads(tree) == ((TASK, "left-alone"),)
    runtime.remove("left-alone")


def test_who_waits_in_a_directory_without_a_container_is_ended_and_a_living_makers_is_not(
    runtime: ContainerdRuntime, tree: Tree
) -> None:
    """As a runtime's process does whose daemon was killed."""
    left, living = (make_workload(tree, TASK, new_container_id("task")) for _ in range(2))
    waiting, working = (inside(workload.cgroup.path, signal.pause) for workload in (left, living))
    left.close()  # as its maker's death does
    found = (Stray(kind="cgroup", id=left.id),)
    assert runtime.seen_on_host() == {left.id, living.id}
    assert runtime.remove_strays(dry_run=True) == found
    assert runtime.remove_strays() == found
    assert ended(waiting) == -signal.SIGKILL
    assert list_workloads(tree) == ((TASK, living.id),)
    living.remove()
    assert ended(working) == -signal.SIGKILL


def test_a_create_that_fails_leaves_no_directory(runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec) -> None:
    # runc looks for the program when it has made the container's cgroup and file system.
    with pytest.raises(ContainerFailed, match="/no/such/program"):
        create_and_start(runtime, "w1", replace(spec, argv=("/no/such/program",)))
    runtime.remove("w1")
    assert list_workloads(tree) == ()


def create_and_start(runtime: ContainerdRuntime, id: str, spec: ContainerSpec) -> None:
    runtime.create(id, spec)
    runtime.start(id)


BUDGET = Resources(memory=32 * MIB)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resources": Resources(memory=4)}, "memory is 4 bytes"),
        ({"resources": Resources(cpus=0)}, "cpus is 0"),
        ({"resources": Resources(cpuset="0")}, "does not have the controller cpuset"),
        ({"resources": Resources(io_weight=100)}, "io_weight can't be set"),
        ({"resources": Resources(io_max=(DeviceRates(device="/dev/none", wbps=1),))}, "there is no disk '/dev/none'"),
        ({"resources": Resources(memory=64 * MIB), "budget": BUDGET}, "budget_memory"),
    ],
)
def test_what_can_not_be_is_refused_by_name_and_leaves_nothing(
    runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec, changes: dict[str, Resources], words: str
) -> None:
    with pytest.raises(SpecRefused, match=words):
        runtime.create("w1", replace(spec, **changes))  # type: ignore[arg-type]
    assert runtime.list() == ()
    assert list_workloads(tree) == ()


def test_a_running_container_is_not_in_the_way_of_the_daemons_own_view(
    daemon: Daemon, runtime: ContainerdRuntime, tree: Tree, spec: ContainerSpec
) -> None:
    runtime.create("w1", spec)
    runtime.start("w1")
    assert runtime.get("w1").state is ContainerState.RUNNING
    record = json.loads(daemon.run("ctr", "containers", "info", "w1").stdout)
    assert record["Spec"]["linux"]["cgroupsPath"] == f"/{tree.leaf(TASK, 'w1')}"
    runtime.remove("w1")
