"""Docker with its systemd driver on cgroup v2: slices of systemd's for us, and in them a scope for each container.

The suite runs in the guest of hack/v2 with systemd as process 1, and has that machine for itself.
"""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB, until
from tests.conftest import running

from airflow_isolation.bridge.ending import Meter
from airflow_isolation.cgroups import Limit, slice_path
from airflow_isolation.container_spec import ContainerSpec, Resources
from airflow_isolation.errors import SpecRefused
from airflow_isolation.runtime.docker import DockerRuntime
from airflow_isolation.runtime.labels import PURPOSE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import ImageArchive, ImageName

MOUNT = Path("/sys/fs/cgroup")
SECONDS = 120
LIMITS = Resources(cpus=0.5, memory=24 * MIB, pids=20)
# What process 1 of a container starts is the workload; as the agent, it outlives it.
USE_ALL = "(sleep 3; exec /bin/busybox dd if=/dev/zero of=/dev/null bs=1G count=1) & wait; exec sleep 600"


@pytest.fixture(scope="module")
def docker(image_archive: ImageArchive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRuntime]:
    with (
        running("docker", "--cgroup-driver=systemd") as daemon,
        DockerRuntime(str(daemon.socket), state_dir=tmp_path_factory.mktemp("state"), timeout=SECONDS) as runtime,
    ):
        runtime.import_image(image_archive("no-python"))
        yield runtime


@pytest.fixture
def spec(docker: DockerRuntime, image_name: ImageName) -> Iterator[ContainerSpec]:
    """Afterwards its containers are removed, and neither their scopes nor anything else may be left in the slices."""
    yield ContainerSpec(
        image=image_name("no-python"), argv=("sleep", "600"), network="none", labels={PURPOSE: "task"}, tmp_size=MIB
    )
    for container in docker.list():
        docker.remove(container.id)
    assert docker.list() == ()
    assert list(MOUNT.rglob("*.scope")) == [MOUNT / "init.scope"]
    assert systemctl("list-units", "--all", "--plain", "--no-legend", "docker-*") == ""
    assert [path for path in MOUNT.glob("*.slice/**/") if path.suffix not in (".slice", ".service")] == []


def test_a_container_is_in_a_scope_in_the_slice_of_its_purpose(docker: DockerRuntime, spec: ContainerSpec) -> None:
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    # Finer than systemd takes cpus, and the kernel memory.
    budget = Resources(cpus=4 / 3, memory=256 * MIB + 1, pids=300)
    docker.create("d1", replace(spec, resources=LIMITS, budget=budget))
    scope = scope_of(docker.start("d1"))
    level = scope.parent
    assert level == MOUNT / slice_path("airflow-task_execution.slice")
    assert scope.name.startswith("docker-")
    assert held(scope) == ["50000 100000", str(24 * MIB), "0", "20"]
    assert held(level) == ["133000 100000", str(256 * MIB), "max", "300"]
    # Written past systemd, they would be lost by this.
    systemctl("daemon-reload")
    assert held(level) == ["133000 100000", str(256 * MIB), "max", "300"]

    stats = docker.stats(["d1"])["d1"]
    assert (stats.memory_limit, stats.pids, stats.pids_limit, stats.oom_kills) == (24 * MIB, 1, 20, 0)
    assert (stats.memory_peak or 0) >= (stats.memory or 0) > 0

    docker.update("d1", Resources(cpus=1, memory=48 * MIB, pids=30))
    assert held(scope) == ["100000 100000", str(48 * MIB), "0", "30"]
    with pytest.raises(SpecRefused, match="budget_memory"):
        docker.update("d1", Resources(memory=512 * MIB))
    assert held(scope)[1] == str(48 * MIB)
    docker.remove("d1")
    assert not scope.exists()

    # The next worker's settings hold, also where they are without a limit.
    docker.create("d2", replace(spec, resources=LIMITS, budget=Resources(pids=200)))
    assert [(level / file).read_text().strip() for file in ("memory.max", "pids.max")] == ["max", "200"]
    # The controller has gone with its last limit.
    assert not (level / "cpu.max").exists()


def test_a_limit_above_the_budget_and_what_a_scope_can_not_have_are_refused(
    docker: DockerRuntime, spec: ContainerSpec
) -> None:
    with pytest.raises(SpecRefused, match="budget_memory"):
        docker.create("d1", replace(spec, resources=LIMITS, budget=Resources(memory=8 * MIB)))
    with pytest.raises(SpecRefused, match=r"memory_high can't be had.*dockerd's cgroup driver is systemd"):
        docker.create("d1", replace(spec, resources=Resources(memory_high=20 * MIB)))
    assert docker.list() == ()


@pytest.mark.parametrize(
    ("resources", "budget", "limit", "words"),
    [
        (LIMITS, None, Limit.OWN, "it reached its own limit, memory = 24 MiB; its peak was 24 MiB (100 %)"),
        (
            Resources(pids=20),
            32 * MIB,
            Limit.PURPOSE,
            r"budget (my\x2dteam.slice/my\x2dteam-x.slice/my\x2dteam-x-task_execution.slice)",
        ),
    ],
)
def test_out_of_memory_is_named_also_below_a_slice_that_was_set(
    docker: DockerRuntime, spec: ContainerSpec, *, resources: Resources, budget: int | None, limit: Limit, words: str
) -> None:
    wanted = replace(spec, resources=resources, budget=Resources(memory=budget), cgroup_parent="my-team/x")
    docker.create("d1", replace(wanted, argv=("sh", "-c", USE_ALL)))
    meter = Meter(pid := docker.start("d1"))
    meter.look()
    scope = scope_of(pid)
    assert scope.parent == MOUNT / r"my\x2dteam.slice/my\x2dteam-x.slice/my\x2dteam-x-task_execution.slice"
    until(lambda: "oom_kill 1" in (scope / "memory.events").read_text(), SECONDS)
    assert docker.stats(["d1"])["d1"].oom_kills == 1
    ending = meter.ending(-signal.SIGKILL)
    meter.close()
    assert ending.out_of_memory is not None
    assert (ending.out_of_memory.fatal, ending.out_of_memory.limit) == (True, limit)
    assert words in ending.out_of_memory.sentence
    assert ending.out_of_memory.victims[-1].name == "busybox"
    assert (ending.usage.memory_limit, ending.usage.pids_limit) == (resources.memory, 20)


def test_out_of_memory_is_named_also_when_systemd_has_removed_the_scope(
    docker: DockerRuntime, spec: ContainerSpec
) -> None:
    use_all = "sleep 3; exec /bin/busybox dd if=/dev/zero of=/dev/null bs=1G count=1"
    docker.create("d1", replace(spec, argv=("sh", "-c", use_all), resources=LIMITS))
    with docker.wait("d1") as end:
        meter = Meter(pid := docker.start("d1"))
        scope = scope_of(pid)
        assert end.result(SECONDS).code == 128 + signal.SIGKILL
    until(lambda: not scope.exists(), SECONDS)
    ending = meter.ending(-signal.SIGKILL)
    meter.close()
    assert ending.out_of_memory is not None
    assert ending.out_of_memory.sentence.startswith(
        "The kernel killed this workload because memory ran out: it reached its own limit, memory = 24 MiB. Killed: busybox"
    )


def test_a_kill_from_elsewhere_is_not_taken_for_one_for_memory(docker: DockerRuntime, spec: ContainerSpec) -> None:
    docker.create("d1", replace(spec, resources=LIMITS))
    with docker.wait("d1") as end:
        meter = Meter(pid := docker.start("d1"))
        scope = scope_of(pid)
        docker.kill("d1")
        end.result(SECONDS)
    until(lambda: not scope.exists(), SECONDS)
    assert meter.ending(-signal.SIGKILL).out_of_memory is None
    meter.close()


def scope_of(pid: int) -> Path:
    """Where the process is, in the kernel's words."""
    (line,) = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return MOUNT / line.removeprefix("0::/")


def held(cgroup: Path) -> list[str]:
    return [(cgroup / file).read_text().strip() for file in ("cpu.max", "memory.max", "memory.swap.max", "pids.max")]


def systemctl(*arguments: str) -> str:
    return subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout
