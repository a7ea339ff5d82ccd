"""Every controller's files, set and read back on a real kernel; and what the kernel says no to."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB, ended, inside, occupied, read_programs, sleeping, until, use, use_and_stay

from airflow_isolation.cgroups import (
    MAX,
    CgroupGone,
    ControllerMissing,
    Cpu,
    Cpuset,
    Io,
    Limits,
    Memory,
    Pids,
    ValueRefused,
    Workload,
    make_workload,
    open_cgroup,
    read_statistics,
    set_limits,
)
from airflow_isolation.cgroups import cpu as cpu_controller
from airflow_isolation.cgroups import cpuset as cpuset_controller
from airflow_isolation.cgroups import io as io_controller
from airflow_isolation.cgroups import memory as memory_controller
from airflow_isolation.cgroups import pids as pids_controller
from airflow_isolation.cgroups import pressure as pressure_controller
from airflow_isolation.container_spec import DeviceRates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_isolation.cgroups import Cgroup, Tree

TASK = "task_execution"


@pytest.fixture
def workload(tree: Tree) -> Iterator[Workload]:
    workload = make_workload(tree, TASK, "w1")
    yield workload
    workload.remove()


@pytest.fixture
def cgroup(workload: Workload) -> Cgroup:
    return workload.cgroup


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A block device, made of a file."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(16 * MIB))
    done = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True)
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def content(cgroup: Cgroup, file: str) -> str:
    return (cgroup.path / file).read_text().strip()


def test_cpu_limit_weight_and_burst_are_set_and_read_back(cgroup: Cgroup) -> None:
    cpu_controller.set(cgroup, Cpu(cpus=1.5, weight=250, burst=0.05))
    assert content(cgroup, "cpu.max") == "150000 100000"
    assert content(cgroup, "cpu.weight") == "250"
    assert content(cgroup, "cpu.max.burst") == "50000"
    assert cpu_controller.stat(cgroup).limit == 1.5


def test_a_cpu_limit_is_taken_away_again(cgroup: Cgroup) -> None:
    cpu_controller.set(cgroup, Cpu(cpus=0.5))
    cpu_controller.set(cgroup, Cpu(cpus=MAX))
    assert cpu_controller.stat(cgroup).limit is None


def test_what_is_not_set_is_left_as_it_is(cgroup: Cgroup) -> None:
    set_limits(cgroup, Limits(cpu=Cpu(cpus=2), memory=Memory(max=64 * MIB), pids=Pids(max=100)))
    set_limits(cgroup, Limits(pids=Pids(max=50)))
    now = read_statistics(cgroup)
    assert now.memory is not None
    assert now.pids is not None
    assert (now.cpu.limit, now.memory.limit, now.pids.limit) == (2, 64 * MIB, 50)


def test_processor_time_is_counted_by_user_and_system_and_the_wait_for_the_limit(cgroup: Cgroup) -> None:
    cpu_controller.set(cgroup, Cpu(cpus=0.1))

    def work() -> None:
        until_then = time.monotonic() + 0.5
        while time.monotonic() < until_then:
            pass

    assert ended(inside(cgroup.path, work)) == 0
    now = cpu_controller.stat(cgroup)
    assert now.usage > 0
    assert now.user + now.system == pytest.approx(now.usage, abs=0.01)
    assert now.throttled > 0
    assert now.periods_throttled > 0


@pytest.mark.parametrize("cpus", [0, -1, 0.001, 1e12, float("nan"), float("inf")])
def test_a_number_of_cores_that_can_not_be_is_refused_by_name(cgroup: Cgroup, cpus: float) -> None:
    with pytest.raises(ValueRefused, match="cpus is"):
        cpu_controller.set(cgroup, Cpu(cpus=cpus))
    assert content(cgroup, "cpu.max") == "max 100000"


def test_the_kernels_own_refusal_names_file_value_and_reason(cgroup: Cgroup) -> None:
    # Longer than the quota.
    with pytest.raises(
        ValueRefused, match=r"can't write '200000' to /sys/fs/cgroup/.*/cpu.max.burst: Invalid argument"
    ):
        cpu_controller.set(cgroup, Cpu(cpus=0.5, burst=0.2))


def test_memory_is_set_and_read_back(cgroup: Cgroup) -> None:
    memory = Memory(max=64 * MIB, high=60 * MIB, low=8 * MIB, swap=0, oom_group=True)
    memory_controller.set(cgroup, memory)
    files = ("memory.max", "memory.high", "memory.low", "memory.swap.max", "memory.oom.group")
    assert [content(cgroup, file) for file in files] == [str(64 * MIB), str(60 * MIB), str(8 * MIB), "0", "1"]
    now = memory_controller.stat(cgroup)
    assert now is not None
    assert (now.limit, now.high) == (64 * MIB, 60 * MIB)


def test_the_peak_outlives_the_process(cgroup: Cgroup) -> None:
    assert ended(inside(cgroup.path, lambda: use(20))) == 0
    now = memory_controller.stat(cgroup)
    assert now is not None
    assert now.peak is not None
    assert now.current < 20 * MIB <= now.peak < 60 * MIB


def test_a_limit_below_what_is_in_use_is_refused_and_nobody_is_killed(cgroup: Cgroup) -> None:
    memory_controller.set(cgroup, Memory(max=128 * MIB))
    with occupied(cgroup.path, use_and_stay(40)) as pid:
        until(lambda: int(content(cgroup, "memory.current")) >= 40 * MIB)
        with pytest.raises(ValueRefused, match=r"less than the \d+ bytes that \S+ has in use"):
            memory_controller.set(cgroup, Memory(max=16 * MIB))
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    assert content(cgroup, "memory.max") == str(128 * MIB)
    assert content(cgroup, "memory.high") == "max"
    now = memory_controller.stat(cgroup)
    assert now is not None
    assert now.events.oom_kill == 0


def test_a_limit_below_what_can_be_reclaimed_is_taken(cgroup: Cgroup) -> None:
    """The page cache of a file is in use, but the kernel gives it back when asked."""

    memory_controller.set(cgroup, Memory(max=256 * MIB))
    assert ended(inside(cgroup.path, read_programs)) == 0
    before = memory_controller.stat(cgroup)
    assert before is not None
    assert before.current > 32 * MIB, "the test needs a page cache"
    memory_controller.set(cgroup, Memory(max=16 * MIB))
    assert content(cgroup, "memory.max") == str(16 * MIB)


@pytest.mark.parametrize("memory", [4, 0, -1, 4096])
def test_a_memory_in_which_nothing_can_live_is_refused_by_name(cgroup: Cgroup, memory: int) -> None:
    with pytest.raises(ValueRefused, match=f"memory is {memory} bytes"):
        memory_controller.set(cgroup, Memory(max=memory))
    assert content(cgroup, "memory.max") == "max"


def test_pids_are_limited_and_the_refused_forks_counted(cgroup: Cgroup) -> None:
    pids_controller.set(cgroup, Pids(max=1))

    def fork() -> None:
        try:
            os.fork()
        except BlockingIOError:
            os._exit(11)

    assert ended(inside(cgroup.path, fork)) == 11
    now = pids_controller.stat(cgroup)
    assert now is not None
    assert (now.limit, now.peak, now.refused, now.current) == (1, 1, 1, 0)


def test_a_limit_of_processes_below_the_present_number_ends_nobody(cgroup: Cgroup) -> None:
    with sleeping(cgroup.path) as first, sleeping(cgroup.path) as second:
        pids_controller.set(cgroup, Pids(max=1))
        assert os.waitpid(first, os.WNOHANG) == os.waitpid(second, os.WNOHANG) == (0, 0)
        now = pids_controller.stat(cgroup)
        assert now is not None
        assert now.current == 2


def test_io_is_limited_for_each_disk_and_counted(cgroup: Cgroup, disk: str) -> None:
    io_controller.set(cgroup, Io(max=(DeviceRates(device=disk, wbps=100 * MIB, riops=1000),)))
    numbers = io_controller.device_numbers(disk)
    assert io_controller.limits(cgroup)[numbers] == {
        "rbps": "max",
        "wbps": str(100 * MIB),
        "riops": "1000",
        "wiops": "max",
    }

    def write_and_read() -> None:
        descriptor = os.open(disk, os.O_RDWR)
        os.write(descriptor, b"x" * MIB)
        os.fsync(descriptor)
        # Elsewhere than in the page cache, and without reading ahead.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(descriptor, MIB, 2 * MIB)) == MIB

    assert ended(inside(cgroup.path, write_and_read)) == 0
    now = read_statistics(cgroup).io
    assert now is not None
    assert (now.bytes_read, now.bytes_written) == (MIB, MIB)
    assert min(now.reads, now.writes) > 0


def test_an_io_limit_is_taken_away_again(cgroup: Cgroup, disk: str) -> None:
    io_controller.set(cgroup, Io(max=(DeviceRates(device=disk, wbps=MIB),)))
    io_controller.set(cgroup, Io(max=(DeviceRates(device=disk, wbps=MAX),)))
    assert io_controller.limits(cgroup) == {}


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("/dev/there-is-none", "there is no disk '/dev/there-is-none': No such file or directory"),
        ("/dev/null", "'/dev/null' is not a disk"),
        ("250:250", "can't write '250:250 wbps=1' to .*/io.max: No such device.*whole disk of this host"),
    ],
)
def test_a_disk_that_is_not_there_is_named(cgroup: Cgroup, device: str, words: str) -> None:
    with pytest.raises(ValueRefused, match=words):
        io_controller.set(cgroup, Io(max=(DeviceRates(device=device, wbps=1),)))


def test_a_weight_for_io_that_nothing_in_this_kernel_heeds_is_refused(cgroup: Cgroup) -> None:
    with pytest.raises(ControllerMissing, match="io_weight can't be set"):
        io_controller.set(cgroup, Io(weight=200))


def test_a_controller_that_this_kernel_lacks_is_named(cgroup: Cgroup) -> None:
    with pytest.raises(ControllerMissing, match=r"cpuset\.cpus: .* controller cpuset is not enabled"):
        cpuset_controller.set(cgroup, Cpuset(cpus="0"))
    assert cpuset_controller.stat(cgroup) is None


def test_pressure_that_this_kernel_does_not_measure_is_none(cgroup: Cgroup) -> None:
    assert pressure_controller.stat(cgroup, "memory") is None
    assert read_statistics(cgroup).pressure.cpu is None


def test_a_cgroup_that_has_been_removed_is_gone_and_nothing_else(tree: Tree) -> None:
    workload = make_workload(tree, TASK, "w2")
    with open_cgroup(tree.mount, workload.cgroup.name) as cgroup:
        workload.remove()
        with pytest.raises(CgroupGone):
            read_statistics(cgroup)
        with pytest.raises(CgroupGone):
            set_limits(cgroup, Limits(memory=Memory(max=64 * MIB)))
        with pytest.raises(CgroupGone):
            cgroup.make_child("child")
    with pytest.raises(CgroupGone, match="there is no cgroup"):
        open_cgroup(tree.mount, cgroup.name)
