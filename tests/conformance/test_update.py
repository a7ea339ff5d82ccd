"""update: limits of a running container change, on real daemons; what can't be is refused in words and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance.test_lifecycle import wait_for_output

from airflow_isolation.cgroups import counters_of_process, find_hierarchy, paths_of_process
from airflow_isolation.container_spec import Resources
from airflow_isolation.errors import ContainerFailed, ContainerNotFound, SpecRefused
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from tests.conformance.conftest import Host

MIB = 1024 * 1024
ON_V2 = find_hierarchy().kind == "unified"
HOLDS_MEMORY = "import time; x = b'x' * 100_000_000; print('ready', flush=True); time.sleep(600)"


def limits(host: Host, id: str) -> tuple[float | None, int | None, int | None]:
    """Cores, bytes and processes, as the kernel has them."""
    with counters_of_process(host.runtime.get(id).pid) as counters:
        now = counters.read()
    assert now is not None
    assert now.memory is not None
    assert now.pids is not None
    return now.cpu.limit, now.memory.limit, now.pids.limit


def test_limits_change_while_the_container_runs(host: Host) -> None:
    id = host.start(resources=Resources(cpus=1, memory=128 * MIB, pids=50))
    pid = host.runtime.get(id).pid
    assert limits(host, id) == (1, 128 * MIB, 50)
    host.runtime.update(id, Resources(cpus=0.5, memory=256 * MIB, pids=60))
    assert limits(host, id) == (0.5, 256 * MIB, 60)
    host.runtime.update(id, Resources(cpus=0.5, memory=64 * MIB, pids=20))
    assert limits(host, id) == (0.5, 64 * MIB, 20)
    assert host.runtime.get(id).pid == pid


def test_what_is_not_named_stays(host: Host) -> None:
    id = host.start(resources=Resources(cpus=1, memory=128 * MIB, pids=50))
    for change in (Resources(memory=256 * MIB), Resources(memory=256 * MIB), Resources(pids=60), Resources(cpus=2)):
        host.runtime.update(id, change)
    assert limits(host, id) == (2, 256 * MIB, 60)


def test_a_container_that_had_no_limits_gets_some(host: Host) -> None:
    id = host.start()
    host.runtime.update(id, Resources(cpus=1, memory=128 * MIB, pids=50))
    assert limits(host, id) == (1, 128 * MIB, 50)


def test_limits_change_before_the_start_too(host: Host) -> None:
    id = host.create("sleep", "600", resources=Resources(memory=128 * MIB))
    host.runtime.update(id, Resources(memory=64 * MIB))
    host.runtime.start(id)
    assert limits(host, id)[1] == 64 * MIB


def test_a_limit_below_what_is_in_use_is_refused_and_ends_nobody(host: Host) -> None:
    id = host.start("python3", "-c", HOLDS_MEMORY, resources=Resources(cpus=1, memory=256 * MIB))
    wait_for_output(host, id, b"ready")
    with pytest.raises(SpecRefused, match=rf"memory {32 * MIB} bytes .*is less than .* in use"):
        host.runtime.update(id, Resources(memory=32 * MIB))
    assert host.runtime.get(id).state is ContainerState.RUNNING
    assert limits(host, id)[:2] == (1, 256 * MIB)


def files(host: Host, id: str) -> list[str]:
    """What the kernel holds of weight, processors, and swap."""
    paths = paths_of_process(host.runtime.get(id).pid)
    if ON_V2:
        directory = Path(f"/sys/fs/cgroup{paths['']}").parent  # around the runtime's own
        wanted = [directory / file for file in ("cpu.weight", "cpuset.cpus", "memory.swap.max")]
    else:
        of_v1 = (("cpu", "cpu.shares"), ("cpuset", "cpuset.cpus"), ("memory", "memory.memsw.limit_in_bytes"))
        wanted = [Path(f"/sys/fs/cgroup/{controller}{paths[controller]}/{file}") for controller, file in of_v1]
    return [file.read_text().strip() for file in wanted]


def test_weight_processors_and_swap_are_in_the_kernel_and_change(host: Host) -> None:
    id = host.start(resources=Resources(memory=128 * MIB, memory_swap=64 * MIB, cpu_weight=50, cpuset="0"))
    assert files(host, id) == (["50", "0", str(64 * MIB)] if ON_V2 else ["512", "0", str(192 * MIB)])
    host.runtime.update(id, Resources(memory=256 * MIB, memory_swap=128 * MIB, cpu_weight=200, cpuset="0"))
    assert files(host, id) == (["200", "0", str(128 * MIB)] if ON_V2 else ["2048", "0", str(384 * MIB)])


#: With v2 they can be had; tests/cgroup2 has them.
REFUSED_ON_V1 = [
    (Resources(memory_swap=MIB), "memory_swap is set without memory"),
    (Resources(memory_high=MIB, io_weight=100), "memory_high, io_weight can't be had: it takes cgroup v2"),
]


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(memory=4), "memory is 4 bytes"),
        (Resources(cpus=0), "cpus is 0"),
        (Resources(pids=0), "pids is 0"),
        *([] if ON_V2 else REFUSED_ON_V1),
    ],
)
def test_what_can_not_be_is_refused_by_name(host: Host, resources: Resources, words: str) -> None:
    id = host.start(resources=Resources(cpus=1, memory=128 * MIB, pids=50))
    with pytest.raises(SpecRefused, match=words):
        host.runtime.update(id, resources)
    assert limits(host, id) == (1, 128 * MIB, 50)


def test_what_is_not_there_or_has_ended_has_no_limits_to_change(host: Host) -> None:
    with pytest.raises(ContainerNotFound):
        host.runtime.update("nobody", Resources(memory=64 * MIB))
    id = host.create("true")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    with pytest.raises(ContainerFailed, match=f"{id} can't be changed: it has ended"):
        host.runtime.update(id, Resources(memory=64 * MIB))
