"""What a procfs says of a process, from files as the kernel writes them."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge.process_one import Capabilities, ProcessOne, read_process, read_process_one
from airflow_isolation.errors import ContainerFailed

if TYPE_CHECKING:
    from pathlib import Path

PID = 4711
STATUS = """\
Name:\tpython3
Umask:\t0027
State:\tS (sleeping)
Pid:\t4711
NSpid:\t4711\t1
Uid:\t150000\t150000\t150000\t150000
Gid:\t100000\t100000\t100000\t100000
Groups:\t100000 100070\x20
SigIgn:\t0000000001001000
CapInh:\t0000000000000000
CapPrm:\t0000000000000400
CapEff:\t0000000000000400
CapBnd:\t00000000a80425fb
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t1
Speculation_Store_Bypass:\tthread force mitigated
"""
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max file size             unlimited            unlimited            bytes     
Max data size             unlimited            unlimited            bytes     
Max stack size            8388608              unlimited            bytes     
Max core file size        0                    0                    bytes     
Max resident set          unlimited            unlimited            bytes     
Max processes             96365                96365                processes 
Max open files            1024                 524288               files     
Max locked memory         8388608              8388608              bytes     
Max address space         unlimited            unlimited            bytes     
Max file locks            unlimited            unlimited            locks     
Max pending signals       96365                96365                signals   
Max msgqueue size         819200               819200               bytes     
Max nice priority         0                    0                    
Max realtime priority     0                    0                    
Max realtime timeout      unlimited            unlimited            us        
"""  # noqa: W291 -- the kernel's own
STAT = "4711 (a (b) c) S 1 4711 4711 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 {} 1000 200 18446744073709551615\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A procfs with one process, in a directory that stands for /."""
    directory = tmp_path / "proc" / str(PID)
    directory.mkdir(parents=True)
    (directory / "status").write_text(STATUS)
    (directory / "limits").write_text(LIMITS)
    (directory / "stat").write_text(STAT.format(12345))
    (directory / "oom_score_adj").write_text("100\n")
    (directory / "environ").write_bytes(b"PATH=/usr/bin\0EMPTY=\0EQUALS=a=b\0\xff=\xfe\0PATH=/second\0nothing\0")
    (directory / "cwd").symlink_to("/opt/air flow")
    (directory / "attr").mkdir()
    (directory / "attr" / "current").write_text("unconfined\n")
    return tmp_path / "proc"


def read(proc: Path) -> ProcessOne:
    return read_process_one(PID, uid_base=100000, root=proc)


def change(proc: Path, name: str, old: str, new: str) -> None:
    file = proc / str(PID) / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def with_apparmor(proc: Path, label: str) -> None:
    enabled = proc.parent / "sys/module/apparmor/parameters/enabled"
    enabled.parent.mkdir(parents=True)
    enabled.write_text("Y\n")
    (proc / str(PID) / "attr" / "current").write_text(label)


def test_ids_are_those_of_the_user_namespace(proc: Path) -> None:
    one = read(proc)
    assert (one.uid, one.gid, one.groups) == (50000, 0, (0, 70))


def test_ids_below_the_namespaces_first_are_refused(proc: Path) -> None:
    with pytest.raises(ContainerFailed, match="begin at 200000"):
        read_process_one(PID, uid_base=200000, root=proc)


def test_status_limits_and_the_rest(proc: Path) -> None:
    one = read(proc)
    assert one.capabilities == Capabilities(
        bounding=0xA80425FB, effective=0x400, permitted=0x400, inheritable=0, ambient=0
    )
    assert one.no_new_privileges
    assert one.umask == 0o027
    assert one.oom_score_adj == 100
    assert one.seccomp_mode == 2
    assert one.speculation == "thread force mitigated"
    assert one.working_directory == "/opt/air flow"
    assert len(one.rlimits) == 16
    assert one.rlimits["RLIMIT_NOFILE"] == (1024, 524288)
    assert one.rlimits["RLIMIT_STACK"] == (8388608, -1)
    assert one.rlimits["RLIMIT_RTPRIO"] == (0, 0)


def test_the_environment_is_in_order_and_of_equal_names_the_first_counts(proc: Path) -> None:
    assert list(read(proc).environment.items()) == [
        ("PATH", "/usr/bin"),
        ("EMPTY", ""),
        ("EQUALS", "a=b"),
        ("\udcff", "\udcfe"),
    ]


@pytest.mark.parametrize(
    ("label", "profile"),
    [
        ("docker-default (enforce)\n", "docker-default"),
        ("cri-containerd.apparmor.d (complain)\n", "cri-containerd.apparmor.d"),
        ("with (two) (enforce)\0", "with (two)"),
        ("unconfined\n", ""),
        ("", ""),
    ],
)
def test_apparmor_says_profile_and_mode(proc: Path, label: str, profile: str) -> None:
    with_apparmor(proc, label)
    assert read(proc).apparmor == profile


@pytest.mark.parametrize("enabled", ["N\n", None])
def test_where_apparmor_is_off_its_files_are_not_read(proc: Path, enabled: str | None) -> None:
    """A kernel that has it and does not use it shows them, and answers EINVAL."""
    with_apparmor(proc, "kernel")
    (proc / str(PID) / "attr" / "apparmor" / "current").mkdir(parents=True)
    switch = proc.parent / "sys/module/apparmor/parameters/enabled"
    switch.write_text(enabled) if enabled else switch.unlink()
    assert read(proc).apparmor == ""


def test_apparmors_own_file_comes_before_the_one_that_modules_share(proc: Path) -> None:
    with_apparmor(proc, "system_u:system_r:container_t:s0:c1,c2")
    (proc / str(PID) / "attr" / "apparmor").mkdir()
    (proc / str(PID) / "attr" / "apparmor" / "current").write_text("mine (enforce)\n")
    assert read(proc).apparmor == "mine"


def test_the_label_of_another_security_module_is_no_profile(proc: Path) -> None:
    (proc / str(PID) / "attr" / "current").write_text("system_u:system_r:container_t:s0:c1,c2")
    assert read(proc).apparmor == ""


def test_a_process_that_is_gone(proc: Path) -> None:
    with pytest.raises(ContainerFailed, match="4712"):
        read_process_one(4712, root=proc)


def test_a_zombie_is_gone(proc: Path) -> None:
    change(proc, "status", "S (sleeping)", "Z (zombie)")
    with pytest.raises(ContainerFailed, match="it has ended"):
        read(proc)


def test_another_process_under_the_same_number(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    births = iter(["12345", "12399"])
    monkeypatch.setattr("airflow_isolation.bridge.process_one._start_time", lambda _: next(births))
    with pytest.raises(ContainerFailed, match="another process has its number"):
        read(proc)


@pytest.mark.parametrize("numbers", ["4711", "1", "4711\t7", "4711\t1\t3"])
def test_a_process_that_is_not_the_first_of_a_container(proc: Path, numbers: str) -> None:
    change(proc, "status", "4711\t1\n", f"{numbers}\n")
    with pytest.raises(ContainerFailed, match="not the first process"):
        read(proc)


def test_any_process_can_be_compared_with_it(proc: Path) -> None:
    one = read(proc)
    change(proc, "status", "4711\t1\n", "4711\t7\n")
    (proc / str(PID) / "environ").write_bytes(b"OTHER=1\0")
    same = read_process(PID, uid_base=100000, root=proc)
    assert one.differences(same) == {}
    (proc / str(PID) / "oom_score_adj").write_text("-5\n")
    assert one.differences(read_process(PID, uid_base=100000, root=proc)) == {"oom_score_adj": (100, -5)}


def test_ids_that_change_just_now_are_not_taken(proc: Path) -> None:
    change(proc, "status", "Uid:\t150000", "Uid:\t100000")
    with pytest.raises(ContainerFailed, match="changes its user"):
        read(proc)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("status", "NoNewPrivs", "Other"), ("limits", "Max open files", "Max other    "), ("status", "0027", "none")],
)
def test_what_can_t_be_understood_is_said(proc: Path, name: str, old: str, new: str) -> None:
    change(proc, name, old, new)
    with pytest.raises(ContainerFailed, match="can't be understood"):
        read(proc)


def test_the_message_for_the_forked_process(proc: Path) -> None:
    message = read(proc).as_message(seccomp=b"\x06\0\0\0\0\0\xff\x7f", seccomp_flags=4)
    assert base64.b64decode(message.pop("seccomp")) == b"\x06\0\0\0\0\0\xff\x7f"
    assert message.pop("rlimits")["RLIMIT_CORE"] == [0, 0]
    assert message == {
        "uid": 50000,
        "gid": 0,
        "groups": [0, 70],
        "capabilities": {"bounding": 0xA80425FB, "effective": 1024, "permitted": 1024, "inheritable": 0, "ambient": 0},
        "no_new_privileges": True,
        "umask": 0o027,
        "oom_score_adj": 100,
        "apparmor": "",
        "working_directory": "/opt/air flow",
        "seccomp_flags": 4,
    }


@pytest.mark.parametrize(("mode", "program"), [(2, b""), (0, b"12345678")])
def test_a_filter_on_one_side_alone_is_refused(proc: Path, mode: int, program: bytes) -> None:
    with pytest.raises(ContainerFailed, match="seccomp mode"):
        replace(read(proc), seccomp_mode=mode).as_message(seccomp=program, seccomp_flags=0)
