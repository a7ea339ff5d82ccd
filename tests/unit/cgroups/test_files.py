"""Every controller on literal files of the kernel: what it makes of them, and what it writes.

A directory stands in for a cgroup: what the kernel's own files do is held by tests/cgroup2. Pressure and cpuset are here
only, because the kernel of that suite has neither.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups import (
    MAX,
    Cgroup,
    CgroupBusy,
    CgroupDenied,
    CgroupError,
    CgroupGone,
    ControllerMissing,
    Cpu,
    Cpuset,
    CpusetStat,
    Io,
    Limits,
    Memory,
    Pids,
    Pressure,
    PressureStat,
    Stall,
    ValueRefused,
    check_limits,
    read_statistics,
    set_limits,
    throttle_from,
)
from airflow_isolation.cgroups import cpu as cpu_controller
from airflow_isolation.cgroups import cpuset as cpuset_controller
from airflow_isolation.cgroups import io as io_controller
from airflow_isolation.cgroups import memory as memory_controller
from airflow_isolation.cgroups import pids as pids_controller
from airflow_isolation.cgroups import pressure as pressure_controller
from airflow_isolation.cgroups.directory import SUBTREE_CONTROL
from airflow_isolation.container_spec import DeviceRates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1024 * 1024
CPU_STAT = """\
usage_usec 12500000
user_usec 9000000
system_usec 3500000
nr_periods 120
nr_throttled 30
throttled_usec 1750000
nr_bursts 0
burst_usec 0
"""
MEMORY_EVENTS = "low 0\nhigh 12\nmax 34\noom 2\noom_kill 3\noom_group_kill 1\n"
IO_STAT = """\
8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0
253:1 rbytes=1024 wbytes=0 rios=1 wios=0 dbytes=0 dios=0
"""
PRESSURE = """\
some avg10=1.50 avg60=0.75 avg300=0.10 total=2500000
full avg10=0.50 avg60=0.25 avg300=0.05 total=1250000
"""


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Cgroup]:
    (tmp_path / "cgroup.procs").write_text("")
    with Cgroup(tmp_path.parent, tmp_path.name, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)) as cgroup:
        yield cgroup


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    def put(**files: str) -> None:
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_text(content)

    return put


def written(cgroup: Cgroup) -> dict[str, str]:
    return {path.name: path.read_text() for path in cgroup.path.iterdir() if path.name != "cgroup.procs"}


def test_cpu_stat(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(cpu__stat=CPU_STAT, cpu__max="150000 100000\n")
    assert cpu_controller.stat(cgroup) == cpu_controller.CpuStat(
        usage=12.5, user=9.0, system=3.5, throttled=1.75, periods=120, periods_throttled=30, limit=1.5
    )


def test_cpu_stat_without_the_controller_has_the_times_alone(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(cpu__stat="usage_usec 100\nuser_usec 60\nsystem_usec 40\n")
    assert cpu_controller.stat(cgroup) == cpu_controller.CpuStat(usage=1e-4, user=6e-5, system=4e-5)


def test_memory_stat(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(
        memory__current="1048576\n",
        memory__peak="2097152\n",
        memory__max="max\n",
        memory__high="4194304\n",
        memory__swap__current="0\n",
        memory__events=MEMORY_EVENTS,
    )
    now = memory_controller.stat(cgroup)
    assert now == memory_controller.MemoryStat(
        current=MIB,
        peak=2 * MIB,
        limit=None,
        high=4 * MIB,
        swap=0,
        events=memory_controller.MemoryEvents(high=12, max=34, oom=2, oom_kill=3, oom_group_kill=1),
    )


def test_memory_stat_of_an_older_kernel_has_no_peak_and_no_group_kills(
    cgroup: Cgroup, put: Callable[..., None]
) -> None:
    put(memory__current="1\n", memory__max="max\n", memory__high="max\n", memory__events="oom 1\noom_kill 1\n")
    now = memory_controller.stat(cgroup)
    assert now is not None
    assert (now.peak, now.swap, now.events.oom_group_kill, now.events.kills) == (None, None, None, 1)


@pytest.mark.parametrize(
    ("content", "kills"),
    [
        ("oom_kill 0\noom_group_kill 0\n", 0),
        ("oom_kill 2\noom_group_kill 0\n", 2),
        # One group of three processes, the first of which was counted twice.
        ("oom_kill 4\noom_group_kill 1\n", 1),
        ("oom_kill 2\n", 2),
    ],
)
def test_a_group_counts_as_one_kill(content: str, kills: int) -> None:
    assert memory_controller.parse_events(content).kills == kills


def test_pids_stat(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(pids__current="4\n", pids__peak="9\n", pids__max="100\n", pids__events="max 7\n")
    assert pids_controller.stat(cgroup) == pids_controller.PidsStat(current=4, peak=9, limit=100, refused=7)


def test_io_stat_is_summed_up_over_devices(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(io__stat=IO_STAT)
    assert io_controller.stat(cgroup) == io_controller.IoStat(bytes_read=5120, bytes_written=8192, reads=2, writes=2)


def test_a_device_without_counters_yet(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(io__stat="8:0 \n7:0\n")
    assert io_controller.stat(cgroup) == io_controller.IoStat()


def test_pressure(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(memory__pressure=PRESSURE)
    assert pressure_controller.stat(cgroup, "memory") == Pressure(
        some=Stall(avg10=1.5, avg60=0.75, avg300=0.1, total=2.5),
        full=Stall(avg10=0.5, avg60=0.25, avg300=0.05, total=1.25),
    )


def test_pressure_of_the_processor_before_linux_5_13_has_no_full() -> None:
    assert pressure_controller.parse(PRESSURE.splitlines()[0]).full == Stall()


def test_pressure_that_is_switched_off_is_none(cgroup: Cgroup) -> None:
    # With psi=0 reading says EOPNOTSUPP; a kernel without it has no such file.
    error = cgroup.failure(OSError(errno.EOPNOTSUPP, "Operation not supported"), "read it", file="io.pressure")
    assert isinstance(error, ControllerMissing)
    assert pressure_controller.stat(cgroup, "io") is None


def test_cpuset_stat_is_what_is_granted_in_the_end(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(cpuset__cpus__effective="0-3,8\n", cpuset__mems__effective="0\n")
    assert cpuset_controller.stat(cgroup) == CpusetStat(cpus=frozenset({0, 1, 2, 3, 8}), mems=frozenset({0}))


def test_cpuset_is_written(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(cpuset__cpus="", cpuset__mems="")
    cpuset_controller.set(cgroup, Cpuset(cpus="0-3,8", mems="0"))
    assert written(cgroup) == {"cpuset.cpus": "0-3,8", "cpuset.mems": "0"}


@pytest.mark.parametrize("value", ["", "a", "0-", "-1", "3-1", "0,", "0 1", "0;1", "999999", "0-3\n"])
def test_a_list_of_processors_that_is_none_is_refused(cgroup: Cgroup, value: str) -> None:
    with pytest.raises(ValueRefused, match="cpuset is"):
        cpuset_controller.set(cgroup, Cpuset(cpus=value))


def test_all_limits_as_they_are_written(cgroup: Cgroup, put: Callable[..., None]) -> None:
    names = ("cpu.max", "cpu.weight", "cpu.max.burst", "memory.high", "memory.low", "memory.swap.max")
    for name in (*names, "memory.oom.group", "pids.max", "io.max", "io.weight"):
        (cgroup.path / name).write_text("")
    put(memory__max="max\n", memory__current="0\n")
    rates = DeviceRates(device="8:0", rbps=MIB, wiops=MAX)
    memory = Memory(max=64 * MIB, high=60 * MIB, low=MIB, swap=0, oom_group=False)
    set_limits(
        cgroup,
        Limits(
            cpu=Cpu(cpus=0.5, weight=50, burst=0.01), memory=memory, pids=Pids(max=9), io=Io(max=(rates,), weight=200)
        ),
    )
    found = written(cgroup)
    assert found.pop("memory.max").startswith("67108864")
    assert found.pop("memory.current") == "0\n"
    assert found == {
        "cpu.max": "50000 100000",
        "cpu.weight": "50",
        "cpu.max.burst": "10000",
        "memory.high": str(60 * MIB),
        "memory.low": str(MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "0",
        "pids.max": "9",
        "io.max": "8:0 rbps=1048576 wiops=max",
        "io.weight": "default 200",
    }


def test_with_the_bfq_scheduler_the_weight_has_another_file(cgroup: Cgroup, put: Callable[..., None]) -> None:
    put(io__bfq__weight="")
    io_controller.set(cgroup, Io(weight=300))
    assert written(cgroup) == {"io.bfq.weight": "default 300"}


def test_nothing_is_written_when_nothing_is_set(cgroup: Cgroup) -> None:
    set_limits(cgroup, Limits())
    assert written(cgroup) == {}
    assert Limits().controllers == frozenset()


def test_no_swap_needs_no_file_where_the_kernel_counts_none_but_some_swap_does(cgroup: Cgroup) -> None:
    memory_controller.set(cgroup, Memory(swap=0))
    with pytest.raises(ControllerMissing, match=r"memory\.swap\.max"):
        memory_controller.set(cgroup, Memory(swap=MIB))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(cpu=Cpu(weight=0)), "cpu_weight is 0"),
        (Limits(cpu=Cpu(weight=10_001)), "cpu_weight is 10001"),
        (Limits(cpu=Cpu(burst=-1)), "the burst is -1 s"),
        (Limits(memory=Memory(max=4)), "memory is 4 bytes"),
        (Limits(memory=Memory(high=-1)), "memory_high is -1 bytes"),
        (Limits(memory=Memory(max=64 * MIB, high=65 * MIB)), "memory_high is .* bytes, and memory only"),
        (Limits(memory=Memory(max=64 * MIB, low=65 * MIB)), "memory_request is .* bytes, and memory only"),
        (Limits(memory=Memory(swap=-1)), "memory_swap is -1 bytes"),
        (Limits(pids=Pids(max=0)), "pids is 0"),
        (Limits(pids=Pids(max=10**12)), "pids is 1000000000000"),
        (Limits(io=Io(weight=0)), "io_weight is 0"),
        (Limits(io=Io(max=(DeviceRates(device="8:0", rbps=0),))), "rbps of 8:0 is 0"),
    ],
)
def test_a_value_that_can_not_be_is_refused_before_anything_is_written(limits: Limits, words: str) -> None:
    with pytest.raises(ValueRefused, match=words):
        check_limits(limits)


def test_the_controllers_that_limits_need() -> None:
    assert Limits(cpu=Cpu(weight=1), memory=Memory(oom_group=True)).controllers == {"cpu", "memory"}


@pytest.mark.parametrize(
    ("limit", "requested", "expected"),
    [
        # request + 0.9 · (limit - request)
        (1000 * MIB, 500 * MIB, 950 * MIB),
        (1000 * MIB, 0, 900 * MIB),
        (10 * MIB + 4096, MIB, (MIB + (9 * MIB + 4096) * 9 // 10) // 4096 * 4096),
        (1000 * MIB, 1000 * MIB, None),
        (1000 * MIB, None, None),
        (None, 500 * MIB, None),
    ],
)
def test_the_memory_from_which_on_a_workload_is_slowed_down(
    limit: int | None, requested: int | None, expected: int | None
) -> None:
    assert throttle_from(limit=limit, request=requested) == expected


def test_statistics_without_any_controller_have_the_processor_time_alone(
    cgroup: Cgroup, put: Callable[..., None]
) -> None:
    put(cpu__stat="usage_usec 0\nuser_usec 0\nsystem_usec 0\n")
    now = read_statistics(cgroup)
    assert (now.memory, now.pids, now.io, now.pressure) == (None, None, None, PressureStat())


@pytest.mark.parametrize(
    ("code", "file", "kind", "words"),
    [
        (errno.EINVAL, "cpu.max", ValueRefused, "Invalid argument"),
        (errno.ERANGE, "cpu.weight", ValueRefused, "Numerical result out of range"),
        (errno.EACCES, "cpu.max", CgroupDenied, "Delegate=yes"),
        (errno.EROFS, "cpu.max", CgroupDenied, "the mount is read-only"),
        (errno.EBUSY, SUBTREE_CONTROL, CgroupBusy, "DelegateSubgroup=worker"),
        (errno.EOPNOTSUPP, SUBTREE_CONTROL, CgroupBusy, "DelegateSubgroup=worker"),
        (errno.ENOENT, SUBTREE_CONTROL, ControllerMissing, "not handed down"),
        (errno.ENOENT, "io.max", ControllerMissing, "the controller io is not enabled"),
        (errno.ENODEV, "io.max", ValueRefused, "No such device"),
        (errno.EBUSY, "", CgroupBusy, "busy"),
        (errno.EIO, "cpu.max", CgroupError, "Input/output error"),
    ],
)
def test_each_reason_of_the_kernel_has_its_error(
    cgroup: Cgroup, code: int, file: str, kind: type[CgroupError], words: str
) -> None:
    error = cgroup.failure(OSError(code, os.strerror(code)), "write '1' to a file", file=file)
    assert type(error) is kind
    assert words in str(error)
    assert str(error).startswith("can't write '1' to a file: ")


def test_a_file_that_is_not_there_in_a_cgroup_that_is_not_there_means_gone(tmp_path: Path) -> None:
    with Cgroup(tmp_path, "", os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)) as cgroup:
        with pytest.raises(CgroupGone):
            cgroup.read("cpu.max")
        with pytest.raises(CgroupGone):
            cgroup.write("cpu.max", "max")


def test_a_long_file_is_read_to_its_end(cgroup: Cgroup, put: Callable[..., None]) -> None:
    content = "".join(f"{pid}\n" for pid in range(50_000))
    put(cgroup__procs=content)
    assert cgroup.read("cgroup.procs") == content


def test_a_symbolic_link_is_not_followed(cgroup: Cgroup) -> None:
    (cgroup.path / "cpu.max").symlink_to("/etc/hostname")
    with pytest.raises(CgroupError, match="Too many levels of symbolic links"):
        cgroup.read("cpu.max")


def test_a_closed_cgroup_may_be_closed_again(cgroup: Cgroup) -> None:
    cgroup.close()
    cgroup.close()
    assert repr(cgroup).startswith("Cgroup('/")


@pytest.mark.parametrize(("device", "numbers"), [("8:0", "8:0"), ("253:16", "253:16")])
def test_the_numbers_of_a_disk_may_be_given(device: str, numbers: str) -> None:
    assert io_controller.device_numbers(device) == numbers


@pytest.mark.parametrize("device", ["/dev/null", "/dev/none", "sda", "8:0:0", "8", "", "a\0b"])
def test_what_is_no_disk_is_refused(device: str) -> None:
    with pytest.raises(ValueRefused, match="disk"):
        io_controller.device_numbers(device)


def test_a_block_device_that_is_there_has_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for /dev/sda, which not every machine has."""
    import stat

    result = os.stat_result([stat.S_IFBLK | 0o660, 0, 0, 1, 0, 0, 0, 0, 0, 0])

    class Found:
        st_mode = result.st_mode
        st_rdev = os.makedev(8, 16)

    monkeypatch.setattr(Path, "stat", lambda _: Found())
    assert io_controller.device_numbers("/dev/sdb") == "8:16"
