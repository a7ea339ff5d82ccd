"""Docker on cgroup v2, with its cgroupfs driver: its containers below directories of ours, beside containerd's."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB, tree_of, until
from tests.conftest import running

from airflow_isolation.bridge.ending import Meter
from airflow_isolation.cgroups import Limit, Tree, list_workloads, places_of
from airflow_isolation.container_spec import ContainerSpec, Resources
from airflow_isolation.errors import ContainerFailed, SpecRefused
from airflow_isolation.runtime.containerd import ContainerdRuntime
from airflow_isolation.runtime.docker import DockerRuntime
from airflow_isolation.runtime.interface import ContainerState
from airflow_isolation.runtime.shims import shims

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive

    from airflow_isolation.bridge.ending import Ending
    from airflow_isolation.runtime.interface import ContainerRuntime, Stats

TASK = "task_execution"
SECONDS = 120
USE_ALL = "/bin/busybox dd if=/dev/zero of=/dev/null bs=1G count=1"
LIMITS = Resources(cpus=0.5, memory=24 * MIB, pids=20, cpu_weight=50)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running("docker") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def docker(
    daemon: Daemon, image_archive: ImageArchive, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DockerRuntime]:
    with DockerRuntime(str(daemon.socket), state_dir=tmp_path_factory.mktemp("state"), timeout=120) as runtime:
        runtime.import_image(image_archive("no-python"))
        yield runtime


@pytest.fixture
def tree(docker: DockerRuntime) -> Iterator[Tree]:
    """As the runtime makes it. After a test nothing of it may be left."""
    with tree_of(docker) as tree:
        yield tree


def test_limits_are_in_our_directory_and_change_there(docker: DockerRuntime, tree: Tree, spec: ContainerSpec) -> None:
    budget = Resources(memory=256 * MIB)
    docker.create("d1", replace(spec, resources=replace(LIMITS, memory_high=20 * MIB), budget=budget))
    pid = docker.start("d1")
    directory = tree.mount / tree.workload(TASK, "d1")
    files = ("cpu.max", "cpu.weight", "memory.max", "memory.high", "memory.oom.group", "pids.max")
    held = [(directory / file).read_text().strip() for file in files]
    assert held == ["50000 100000", "50", str(24 * MIB), str(20 * MIB), "1", "20"]
    assert (directory.parent / "memory.max").read_text().strip() == str(256 * MIB)
    (leaf,) = (path for path in directory.iterdir() if path.is_dir())
    assert str(pid) in (leaf / "cgroup.procs").read_text().split()
    assert docker.stats(["d1"])["d1"].memory_limit == 24 * MIB

    docker.update("d1", Resources(memory=48 * MIB, memory_high=40 * MIB, pids=30))
    assert docker.stats(["d1"])["d1"].pids_limit == 30
    assert (directory / "memory.max").read_text().strip() == str(48 * MIB)
    with pytest.raises(SpecRefused, match="budget_memory"):
        docker.update("d1", Resources(memory=512 * MIB))
    docker.remove("d1")
    assert not directory.exists()


def test_out_of_memory_is_named(docker: DockerRuntime, tree: Tree, spec: ContainerSpec) -> None:
    ending = run(docker, "d1", replace(spec, argv=("sh", "-c", f"sleep 3; {USE_ALL}"), resources=LIMITS))
    assert ending.code == -signal.SIGKILL
    assert ending.out_of_memory is not None
    assert (ending.out_of_memory.fatal, ending.out_of_memory.limit) == (True, Limit.OWN)
    assert ending.out_of_memory.victims[-1].name == "busybox"
    assert "it reached its own limit, memory = 24 MiB" in ending.out_of_memory.sentence
    assert (ending.usage.oom_kills, ending.usage.memory_limit, ending.usage.pids_limit) == (1, 24 * MIB, 20)
    assert (ending.usage.memory_peak or 0) >= 23 * MIB


def test_docker_and_containerd_count_the_same(
    docker: DockerRuntime, tree: Tree, spec: ContainerSpec, image_archive: ImageArchive, tmp_path: Path
) -> None:
    # In a tmpfs, where it is memory of the container and no cache that may go.
    work = "/bin/busybox dd if=/dev/zero of=/dev/shm/held bs=1M count=12; exec sleep 600"
    wanted = replace(spec, argv=("sh", "-c", work), resources=LIMITS)
    by_docker = counted(docker, wanted)
    with (
        running("containerd", "--version=1.6") as daemon,
        ContainerdRuntime(str(daemon.socket), state_dir=tmp_path, timeout=60) as containerd,
    ):
        containerd.import_image(image_archive("no-python"))
        by_containerd = counted(containerd, wanted)
    # The runtimes' own first steps are in the peak.
    assert by_docker.memory == pytest.approx(by_containerd.memory, rel=0.1)
    assert by_docker.memory_peak == pytest.approx(by_containerd.memory_peak, abs=8 * MIB)
    same = ("memory_limit", "oom_kills", "pids", "pids_limit")
    assert [getattr(by_docker, name) for name in same] == [getattr(by_containerd, name) for name in same]
    assert known(by_docker) == known(by_containerd)


def test_a_create_that_fails_leaves_no_directory(docker: DockerRuntime, tree: Tree, spec: ContainerSpec) -> None:
    docker.create("d1", replace(spec, argv=("/no/such/program",), resources=LIMITS))
    with pytest.raises(ContainerFailed, match="/no/such/program"):
        docker.start("d1")
    docker.remove("d1")
    assert list_workloads(tree) == ()
    with pytest.raises(SpecRefused, match="budget_memory"):
        docker.create("d1", replace(spec, resources=LIMITS, budget=Resources(memory=8 * MIB)))
    assert docker.list() == ()


def test_what_dockerd_has_forgotten_goes_with_its_container(
    docker: DockerRuntime, daemon: Daemon, tree: Tree, spec: ContainerSpec
) -> None:
    docker.create("d1", spec)
    pid = docker.start("d1")
    (shim,) = [shim for shim in shims() if shim.address.startswith(str(daemon.directory))]
    os.kill(daemon.pid, signal.SIGKILL)
    # As it stands there when dockerd is killed between the start and its writing that down.
    record = daemon.directory / "root/containers" / shim.id / "config.v2.json"
    content = json.loads(record.read_bytes())
    content["State"] |= {"Running": False, "Pid": 0, "StartedAt": "0001-01-01T00:00:00Z"}
    record.write_text(json.dumps(content))
    daemon.start()
    assert docker.get("d1").state is ContainerState.CREATED
    assert Path(f"/proc/{pid}").exists()
    assert shim in shims()
    docker.remove("d1")
    assert shim not in shims()
    assert places_of([shim.id]) == frozenset()
    until(lambda: not Path(f"/proc/{pid}").exists())


def run(runtime: ContainerRuntime, id: str, spec: ContainerSpec) -> Ending:
    runtime.create(id, spec)
    with runtime.wait(id) as end:
        meter = Meter(runtime.start(id))
        code = end.result(SECONDS).code
    ending = meter.ending(128 - code if code > 128 else code)
    meter.close()
    runtime.remove(id)
    return ending


def counted(runtime: ContainerRuntime, spec: ContainerSpec) -> Stats:
    """What is counted once the container holds its memory and does nothing more."""
    runtime.create("same", spec)
    runtime.start("same")

    def now() -> Stats:
        return runtime.stats(["same"])["same"]

    until(lambda: (now().memory or 0) >= 12 * MIB, SECONDS)
    # The last page is there; the program that wrote it may not yet be gone.
    until(lambda: now().pids == 1, SECONDS)
    stats = now()
    runtime.remove("same")
    return stats


def known(stats: Stats) -> set[str]:
    return {field.name for field in fields(stats) if getattr(stats, field.name) is not None}
