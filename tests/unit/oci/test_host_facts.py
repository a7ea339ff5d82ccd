from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_isolation.oci.host import kernel_version, read_host

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max core file size        0                    unlimited            bytes
Max open files            1024                 20000                files
"""


def write(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.1.0-18-amd64", (6, 1)),
        ("5.15.167.4-microsoft", (5, 15)),
        ("6.18-rc1", (6, 18)),
        ("odd", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_kernel_version(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


def test_cgroup_v2_is_told_by_its_controllers(tmp_path: Path) -> None:
    assert not read_host(root=tmp_path).cgroup_v2
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers")
    assert read_host(root=tmp_path).cgroup_v2


def test_a_hybrid_host_is_not_v2(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/unified/cgroup.controllers")
    assert not read_host(root=tmp_path).cgroup_v2


def test_swap_on_v1_needs_the_memsw_files(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes")
    assert not read_host(root=tmp_path).swap_limit
    write(tmp_path, "sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
    assert read_host(root=tmp_path).swap_limit


def test_swap_on_v2_is_told_by_a_child(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers")
    assert read_host(root=tmp_path).swap_limit
    write(tmp_path, "sys/fs/cgroup/system.slice/memory.max")
    assert not read_host(root=tmp_path).swap_limit
    write(tmp_path, "sys/fs/cgroup/system.slice/memory.swap.max")
    assert read_host(root=tmp_path).swap_limit


def test_the_daemon_s_limit_of_open_files_holds(tmp_path: Path) -> None:
    write(tmp_path, "proc/77/limits", LIMITS)
    write(tmp_path, "proc/77/status", "Name:\tcontainerd\nCapEff:\t000001fffeffffff\n")
    assert read_host(root=tmp_path, daemon_pid=77).open_files == 20000


def test_a_daemon_with_sys_resource_may_give_more(tmp_path: Path) -> None:
    write(tmp_path, "proc/77/limits", LIMITS)
    write(tmp_path, "proc/77/status", "Name:\tcontainerd\nCapEff:\t000001ffffffffff\n")
    assert read_host(root=tmp_path, daemon_pid=77).open_files == 524288


@pytest.mark.parametrize("limit", ["unlimited", "1073741816"])
def test_a_high_limit_is_not_passed_on(tmp_path: Path, limit: str) -> None:
    write(tmp_path, "proc/77/limits", LIMITS.replace("20000", limit))
    write(tmp_path, "proc/77/status", "CapEff:\t0000000000000000\n")
    assert read_host(root=tmp_path, daemon_pid=77).open_files == 524288


def test_thermal_throttling_is_masked_where_it_is(tmp_path: Path) -> None:
    for cpu in ("cpu0", "cpu1", "cpufreq"):
        (tmp_path / "sys/devices/system/cpu" / cpu / "thermal_throttle").mkdir(parents=True)
    assert read_host(root=tmp_path).masked_paths == (
        "/sys/devices/system/cpu/cpu0/thermal_throttle",
        "/sys/devices/system/cpu/cpu1/thermal_throttle",
    )


@pytest.mark.parametrize(
    ("loaded", "profile"),
    [
        ("snap.x (enforce)\ndocker-default (enforce)\n", "docker-default"),
        ("cri-containerd.apparmor.d (enforce)\n", "cri-containerd.apparmor.d"),
        ("docker-default-x (enforce)\n", ""),
        ("", ""),
    ],
)
def test_a_loaded_apparmor_profile_is_found(tmp_path: Path, loaded: str, profile: str) -> None:
    write(tmp_path, "sys/kernel/security/apparmor/profiles", loaded)
    assert read_host(root=tmp_path).apparmor_profile == profile


def runtime(tmp_path: Path, script: str) -> str:
    program = tmp_path / "a-runtime"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("script", "rro"),
    [
        ("""echo '{"mountOptions": ["ro", "rro"]}'""", True),
        ("""echo '{"mountOptions": ["ro"]}'""", False),
        ("""echo '{}'""", False),
        ("echo 'No help topic for features' >&2; exit 3", False),
        ("echo nonsense", False),
    ],
)
def test_recursive_read_only_is_the_runtime_s_own_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, rro: bool
) -> None:
    monkeypatch.setattr("platform.release", lambda: "6.1.0")
    assert read_host(root=tmp_path, runtime=runtime(tmp_path, script)).recursive_read_only is rro


def test_an_old_kernel_has_no_recursive_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "5.10.0")
    program = runtime(tmp_path, """echo '{"mountOptions": ["rro"]}'""")
    assert not read_host(root=tmp_path, runtime=program).recursive_read_only


def test_a_missing_runtime_has_no_features(tmp_path: Path) -> None:
    assert not read_host(root=tmp_path, runtime="no-such-runtime").recursive_read_only


@pytest.mark.parametrize(
    ("machine", "architecture"), [("x86_64", "amd64"), ("aarch64", "arm64"), ("riscv64", "riscv64")]
)
def test_architecture_has_go_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, architecture: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert read_host(root=tmp_path).architecture == architecture
