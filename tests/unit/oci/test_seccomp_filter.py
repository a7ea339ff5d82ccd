"""Profiles become programs, and the programs answer as the profile says. The real kernel is asked by tests/zygote."""

from __future__ import annotations

import ctypes
import errno
from typing import Any

import pytest
from tests.unit.oci.filter_program import (
    AARCH64,
    ALLOW,
    ERRNO,
    KILL_PROCESS,
    KILL_THREAD,
    LOG,
    TRACE,
    TRAP,
    X86,
    X86_64,
    run,
)

from airflow_isolation.oci import load_profile, resolve_profile
from airflow_isolation.oci import seccomp_filter as module
from airflow_isolation.oci.seccomp_filter import FilterUnavailable, compile_filter, filter_flags

EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
# Numbers of x86_64, where not said otherwise.
READ, SOCKET, PERSONALITY, MOUNT, SWAPON, CLONE3, MSEAL = 0, 41, 135, 165, 167, 435, 462
PIVOT_ROOT, CHROOT, KEYCTL, UNSHARE, SETNS, BPF = 155, 161, 250, 272, 308, 321
OPEN_TREE, MOVE_MOUNT, FSOPEN = 428, 429, 430
X32 = 1 << 30


def profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ERRNO", **more: Any) -> dict[str, Any]:
    return {"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": list(rules), **more}


def rule(*names: str, action: str = "SCMP_ACT_ALLOW", **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action, **more}


def where(index: int, op: str, value: int, two: int = 0) -> dict[str, Any]:
    return {"index": index, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": two}


@pytest.mark.parametrize(
    ("action", "number", "answer"),
    [
        ("ALLOW", None, ALLOW),
        ("LOG", None, LOG),
        ("ERRNO", 95, ERRNO | 95),
        ("ERRNO", None, EPERM),
        ("ERRNO", 0, ERRNO),
        ("TRACE", 7, TRACE | 7),
        ("TRACE", None, TRACE | errno.EPERM),
        ("TRAP", None, TRAP),
        ("KILL", None, KILL_THREAD),
        ("KILL_THREAD", None, KILL_THREAD),
        ("KILL_PROCESS", None, KILL_PROCESS),
    ],
)
def test_every_action(action: str, number: int | None, answer: int) -> None:
    more = {} if number is None else {"errnoRet": number}
    default = "SCMP_ACT_ALLOW" if action != "ALLOW" else "SCMP_ACT_ERRNO"
    program = compile_filter(profile(rule("read", action=f"SCMP_ACT_{action}", **more), default=default))
    assert run(program, X86_64, READ) == answer


@pytest.mark.parametrize(
    ("op", "value", "two", "allowed", "refused"),
    [
        ("EQ", 5, 0, [5], [4, 6, 5 + 2**32]),
        ("NE", 5, 0, [4, 6, 5 + 2**32], [5]),
        ("LT", 5, 0, [0, 4], [5, 2**32]),
        ("LE", 5, 0, [5], [6, 2**63]),
        ("GT", 5, 0, [6, 2**32], [5, 0]),
        ("GE", 2**32, 0, [2**32, 2**63], [2**32 - 1, 5]),
        ("MASKED_EQ", 0xFFFFFFFF, 38, [38, 38 + 2**32], [37, 39]),
        ("MASKED_EQ", 2**63, 2**63, [2**63, 2**64 - 1], [0, 2**62]),
    ],
)
def test_every_comparison(op: str, value: int, two: int, allowed: list[int], refused: list[int]) -> None:
    program = compile_filter(profile(rule("socket", args=[where(2, op, value, two)])))
    assert {run(program, X86_64, SOCKET, (0, 0, argument)) for argument in allowed} == {ALLOW}
    assert {run(program, X86_64, SOCKET, (0, 0, argument)) for argument in refused} == {EPERM}


def test_conditions_on_different_arguments_must_all_hold() -> None:
    program = compile_filter(profile(rule("socket", args=[where(0, "EQ", 1), where(1, "EQ", 2)])))
    answers = [run(program, X86_64, SOCKET, arguments) for arguments in ((1, 2), (1, 3), (0, 2))]
    assert answers == [ALLOW, EPERM, EPERM]


def test_two_conditions_on_one_argument_are_alternatives() -> None:
    program = compile_filter(profile(rule("socket", args=[where(0, "EQ", 1), where(0, "EQ", 2), where(1, "EQ", 9)])))
    answers = [run(program, X86_64, SOCKET, arguments) for arguments in ((1, 0), (2, 0), (5, 9), (5, 0))]
    assert answers == [ALLOW, ALLOW, ALLOW, EPERM]


def test_unknown_names_are_left_out() -> None:
    program = compile_filter(profile(rule("no_such_call", "read")))
    assert run(program, X86_64, READ) == ALLOW


def test_a_rule_that_says_what_is_said_anyway_is_no_mistake() -> None:
    program = compile_filter(profile(rule("mount", action="SCMP_ACT_ERRNO", errnoRet=1), rule("swapon")))
    assert (run(program, X86_64, MOUNT), run(program, X86_64, SWAPON)) == (EPERM, ALLOW)


def test_calls_newer_than_all_that_are_named_do_not_exist() -> None:
    program = compile_filter(profile(rule("read"), rule("swapon", action="SCMP_ACT_ERRNO", errnoRet=1)))
    assert [run(program, X86_64, number) for number in (MOUNT, SWAPON, SWAPON + 1, 600)] == [
        EPERM,
        EPERM,
        ENOSYS,
        ENOSYS,
    ]


def test_each_architecture_has_a_newest_call_of_its_own() -> None:
    both = profile(rule("read", "swapon"), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"])
    program = compile_filter(both)
    swapon_32 = 87
    assert [run(program, X86, number) for number in (swapon_32, swapon_32 - 1, swapon_32 + 1)] == [ALLOW, EPERM, ENOSYS]
    assert run(program, X86_64, swapon_32 + 1) == EPERM


def test_architectures_that_are_not_listed_end_the_program() -> None:
    program = compile_filter(profile(rule("read")))
    assert {run(program, architecture, READ) for architecture in (X86, AARCH64)} == {KILL_THREAD}


def test_x32_ends_the_program_unless_it_is_listed() -> None:
    program = compile_filter(profile(rule("read", "swapon")))
    assert {run(program, X86_64, X32 + number) for number in (READ, 600)} == {KILL_THREAD}
    both = compile_filter(profile(rule("read", "swapon"), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"]))
    assert [run(both, X86_64, X32 + number) for number in (READ, MOUNT, SWAPON + 1)] == [ALLOW, EPERM, ENOSYS]
    assert [run(both, X86_64, number) for number in (READ, MOUNT, SWAPON + 1)] == [ALLOW, EPERM, ENOSYS]


def test_a_permissive_profile_says_nothing_of_newer_calls() -> None:
    program = compile_filter(profile(rule("read", action="SCMP_ACT_ERRNO"), default="SCMP_ACT_ALLOW"))
    assert run(program, X86_64, 600) == ALLOW


def test_a_profile_without_rules() -> None:
    program = compile_filter(profile(defaultErrnoRet=13))
    assert {run(program, X86_64, number) for number in (READ, 600)} == {ERRNO | 13}


def default_program(*capabilities: str) -> bytes:
    loaded = load_profile("default")
    assert loaded is not None
    return compile_filter(resolve_profile(loaded, architecture="amd64", capabilities=capabilities, kernel=(6, 1)))


def test_the_default_profile_keeps_its_word() -> None:
    program = default_program()
    assert run(program, X86_64, READ) == ALLOW
    assert run(program, X86_64, MOUNT) == EPERM
    assert run(program, X86_64, CLONE3) == ENOSYS
    assert run(program, X86_64, 2000) == ENOSYS
    for family, answer in ((2, ALLOW), (38, EPERM), (40, EPERM), (38 + 2**32, EPERM), (40 + 2**63, EPERM)):
        assert run(program, X86_64, SOCKET, (family,)) == answer
    assert run(program, X86, 102) == ENOSYS  # socketcall
    assert run(program, AARCH64, 0) == KILL_THREAD
    assert run(default_program("SYS_ADMIN"), X86_64, MOUNT) == ALLOW


def zygote_program(*capabilities: str) -> bytes:
    loaded = load_profile("default", forks_into=capabilities)
    assert loaded is not None
    # What a zygote has itself must open nothing.
    own = ("SYS_ADMIN", "SYS_CHROOT", "SETUID", "SETGID", "SETPCAP", *capabilities)
    return compile_filter(resolve_profile(loaded, architecture="amd64", capabilities=own, kernel=(6, 1)))


#: First arguments that profiles know: families of sockets, flags of clone(2), personalities, commands of keyctl(2).
_FIRST = (0, 1, 2, 16, 38, 40, 0x20000, 0x10000000, 0x7E020000, 2**32 + 38, 2**64 - 1)


@pytest.mark.parametrize("capabilities", [(), ("SYS_ADMIN",), ("NET_RAW", "SYS_PTRACE")])
def test_what_a_child_may_call_its_zygote_may_and_little_else(capabilities: tuple[str, ...]) -> None:
    child, zygote = default_program(*capabilities), zygote_program(*capabilities)
    more = {
        (number, first)
        for number in range(600)
        for first in _FIRST
        if (inside := run(child, X86_64, number, (first,))) != (own := run(zygote, X86_64, number, (first,)))
        # Of two filters the kernel takes the stricter answer: a zygote's that is not "allow" would be the child's.
        and (own, inside) != (ALLOW, ALLOW)
    }
    entering = {(SETNS, first) for first in _FIRST} if "SYS_ADMIN" not in capabilities else set()
    assert more == {*entering, (KEYCTL, 1)}
    assert run(zygote, X86_64, KEYCTL, (1,)) == ALLOW


def test_a_zygote_s_own_capabilities_open_no_call() -> None:
    program = zygote_program()
    assert run(program, X86_64, SETNS) == ALLOW
    for number in (MOUNT, UNSHARE, BPF, OPEN_TREE, FSOPEN, MOVE_MOUNT, PIVOT_ROOT, CHROOT):
        assert run(program, X86_64, number) == EPERM


def test_a_program_is_the_same_every_time() -> None:
    assert default_program() == default_program()


def test_flags_follow_the_profile_and_what_the_kernel_says_of_process_1() -> None:
    logging = profile(flags=["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"])
    assert filter_flags(profile(), speculation="thread force mitigated") == 0
    assert filter_flags(logging, speculation="thread force mitigated") == 2
    assert filter_flags(profile(), speculation="vulnerable") == 4


def test_a_host_without_libseccomp_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARY", "libno-such-library.so.2")
    module._library.cache_clear()
    try:
        with pytest.raises(FilterUnavailable, match="Install libseccomp") as failure:
            compile_filter(profile())
    finally:
        module._library.cache_clear()
    assert "libno-such-library" in failure.value.message


def test_an_architecture_that_libseccomp_does_not_know() -> None:
    with pytest.raises(FilterUnavailable, match="SCMP_ARCH_VAX"):
        compile_filter(profile(architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_VAX"]))


def test_an_architecture_of_another_byte_order_is_refused() -> None:
    with pytest.raises(FilterUnavailable, match="seccomp_arch_add"):
        compile_filter(profile(architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_S390X"]))


def test_a_profile_too_long_for_the_kernel_is_refused() -> None:
    rules = [rule("socket", args=[where(0, "EQ", value), where(1, "EQ", value)]) for value in range(1500)]
    with pytest.raises(FilterUnavailable, match="4096"):
        compile_filter(profile(*rules))


def test_nothing_of_a_compilation_is_left_open() -> None:
    before = _descriptors()
    default_program()
    with pytest.raises(FilterUnavailable):
        compile_filter(profile(architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_VAX"]))
    assert _descriptors() == before


def _descriptors() -> list[int]:
    libc = ctypes.CDLL(None)
    return [number for number in range(256) if libc.fcntl(number, 1) >= 0]
