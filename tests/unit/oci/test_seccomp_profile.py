from __future__ import annotations

import ctypes
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci.confinement import CAPABILITIES
from airflow_isolation.oci.seccomp import docker_profile, load_profile, parse_profile, resolve_profile

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

# System calls that came after libseccomp 2.5.4 (kernel 5.17), the oldest that we test with; it passes them over.
YOUNGER = {
    *("cachestat", "fchmodat2", "map_shadow_stack", "futex_wake", "futex_wait", "futex_requeue", "mseal", "uretprobe"),
    *("lsm_get_self_attr", "lsm_list_modules", "lsm_set_self_attr", "statmount", "listmount", "open_tree_attr"),
    *("getxattrat", "setxattrat", "listxattrat", "removexattrat"),
}
ALLOW = "SCMP_ACT_ALLOW"


def default() -> Mapping[str, Any]:
    profile = load_profile("default")
    assert profile is not None
    return profile


def resolved(
    *, architecture: str = "amd64", capabilities: Collection[str] = (), kernel: tuple[int, int] = (6, 1)
) -> dict[str, Any]:
    return resolve_profile(default(), architecture=architecture, capabilities=capabilities, kernel=kernel)


def allowed(profile: Mapping[str, Any], name: str, *arguments: int) -> bool:
    """What a filter of these rules does with a call: libseccomp's own way of reading them."""
    for rule in profile["syscalls"]:
        if name in rule["names"] and all(matches(condition, arguments) for condition in rule.get("args", ())):
            return bool(rule["action"] == ALLOW)
    return bool(profile["defaultAction"] == ALLOW)


def matches(condition: Mapping[str, Any], arguments: tuple[int, ...]) -> bool:
    argument: int = arguments[condition["index"]]
    value: int = condition["value"]
    if condition["op"] == "SCMP_CMP_MASKED_EQ":
        return argument & value == int(condition["valueTwo"])
    assert condition["op"] == "SCMP_CMP_EQ"
    return argument == value


def test_every_name_is_a_system_call() -> None:
    libseccomp = ctypes.CDLL("libseccomp.so.2")
    names = {name for rule in default()["syscalls"] for name in rule["names"]}
    unknown = {name for name in names if libseccomp.seccomp_syscall_resolve_name(name.encode()) == -1}
    assert unknown <= YOUNGER
    assert names >= YOUNGER


def test_no_name_stands_twice_in_a_rule() -> None:
    for rule in default()["syscalls"]:
        assert len(rule["names"]) == len(set(rule["names"]))


def test_unconditional_names_stand_in_one_rule_only() -> None:
    names = [
        name
        for rule in default()["syscalls"]
        if not rule.get("args") and not rule.get("includes") and not rule.get("excludes")
        for name in rule["names"]
    ]
    assert len(names) == len(set(names))


def test_every_capability_that_a_rule_names_exists() -> None:
    for rule in default()["syscalls"]:
        for condition in (rule.get("includes", {}), rule.get("excludes", {})):
            assert {name.removeprefix("CAP_") for name in condition.get("caps", ())} <= CAPABILITIES


def test_what_is_not_named_is_denied() -> None:
    assert resolved()["defaultAction"] == "SCMP_ACT_ERRNO"


@pytest.mark.parametrize(
    "name",
    [
        *("read", "openat", "execve", "mmap", "futex", "getrandom", "epoll_wait", "sendmsg", "recvmsg", "rseq"),
        *("pidfd_open", "memfd_create", "sched_setaffinity", "statx", "close_range", "shmget", "mq_open", "prlimit64"),
        *("wait4", "vfork", "socketpair", "ioctl", "fcntl", "setsid", "landlock_create_ruleset", "copy_file_range"),
    ],
)
def test_ordinary_programs_run(name: str) -> None:
    assert allowed(resolved(), name)


@pytest.mark.parametrize(
    "name",
    [
        *("io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "keyctl", "add_key", "request_key"),
        *("mount", "umount2", "unshare", "setns", "pivot_root", "bpf", "perf_event_open", "open_by_handle_at"),
        *("init_module", "kexec_load", "reboot", "swapon", "acct", "settimeofday", "chroot", "syslog", "kcmp"),
        *("iopl", "ioperm", "vm86", "uselib", "ustat", "nfsservctl", "quotactl", "mbind", "fsopen", "move_mount"),
        *("socketcall", "sethostname", "pidfd_getfd", "statmount", "fanotify_init", "lookup_dcookie", "vhangup"),
    ],
)
def test_without_capabilities_it_is_denied(name: str) -> None:
    assert not allowed(resolved(), name)


@pytest.mark.parametrize("name", ["io_uring_setup", "userfaultfd", "keyctl", "add_key", "request_key", "socketcall"])
def test_no_capability_brings_it_back(name: str) -> None:
    assert not allowed(resolved(capabilities=CAPABILITIES), name)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *(
            ("SYS_ADMIN", name)
            for name in ("mount", "unshare", "setns", "bpf", "clone3", "pivot_root", "perf_event_open")
        ),
        *(("SYS_TIME", "clock_settime"), ("SYS_CHROOT", "chroot"), ("SYS_BOOT", "reboot"), ("BPF", "bpf")),
        *(("SYS_PTRACE", "kcmp"), ("SYS_MODULE", "init_module"), ("SYS_NICE", "mbind"), ("SYSLOG", "syslog")),
        *(("SYS_PACCT", "acct"), ("SYS_RAWIO", "iopl"), ("PERFMON", "perf_event_open"), ("SYS_TTY_CONFIG", "vhangup")),
        ("DAC_READ_SEARCH", "open_by_handle_at"),
    ],
)
def test_a_capability_brings_its_calls(capability: str, name: str) -> None:
    assert allowed(resolved(capabilities={capability}), name)
    # Older kernels know BPF and PERFMON only as parts of SYS_ADMIN, so two calls come with either.
    assert not allowed(resolved(capabilities=CAPABILITIES - {capability, "SYS_ADMIN", "BPF", "PERFMON"}), name)


@pytest.mark.parametrize("family", [38, 40, 38 + 2**32, 40 + 2**32, 40 + 2**63, 46, 255, 2**31])
def test_these_sockets_are_denied(family: int) -> None:
    assert not allowed(resolved(), "socket", family)


@pytest.mark.parametrize("family", [number for number in range(46) if number not in {38, 40}])
def test_every_other_family_s_sockets_are_there(family: int) -> None:
    assert allowed(resolved(), "socket", family)


@given(st.integers(0, 2**64 - 1))
def test_what_the_kernel_would_take_for_a_blocked_family_is_blocked(register: int) -> None:
    for family in (38, 40):
        assert not allowed(resolved(), "socket", register & ~0xFFFFFFFF | family)


@pytest.mark.parametrize("flag", [0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000])
def test_clone_can_t_make_a_namespace(flag: int) -> None:
    sigchld = 17
    assert not allowed(resolved(), "clone", flag | sigchld)
    assert allowed(resolved(capabilities={"SYS_ADMIN"}), "clone", flag | sigchld)


def test_clone_makes_processes_and_threads() -> None:
    fork, thread = 0x01200011, 0x003D0F00
    assert allowed(resolved(), "clone", fork)
    assert allowed(resolved(), "clone", thread)


def test_clone3_says_that_it_does_not_exist() -> None:
    (rule,) = [rule for rule in resolved()["syscalls"] if "clone3" in rule["names"]]
    assert rule == {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}


@pytest.mark.parametrize(("persona", "may"), [(0, True), (8, True), (0xFFFFFFFF, True), (0x0040000, False)])
def test_address_randomisation_stays_on(persona: int, may: bool) -> None:
    assert allowed(resolved(), "personality", persona) is may


@pytest.mark.parametrize(("kernel", "may"), [((4, 7), False), ((4, 8), True), ((5, 0), True), ((6, 18), True)])
def test_ptrace_from_kernel_4_8_on(kernel: tuple[int, int], may: bool) -> None:
    assert allowed(resolved(kernel=kernel), "ptrace") is may


@pytest.mark.parametrize(
    ("architecture", "architectures", "own"),
    [
        ("amd64", ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "arch_prctl"),
        ("arm64", ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"], "sync_file_range2"),
    ],
)
def test_architectures(architecture: str, architectures: list[str], own: str) -> None:
    assert resolved(architecture=architecture)["architectures"] == architectures
    assert allowed(resolved(architecture=architecture), own)
    others = {"amd64", "arm64"} - {architecture}
    assert not any(allowed(resolved(architecture=other), own) for other in others)


def test_an_architecture_without_rules_is_refused() -> None:
    with pytest.raises(SpecRefused, match="no rules for the architecture riscv64"):
        resolved(architecture="riscv64")


def test_docker_is_not_given_what_has_no_rules_for_its_machine(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    with pytest.raises(SpecRefused, match="no rules for the architecture arm64"):
        docker_profile(str(tmp_path / "own.json"), **{**HERE, "architecture": "arm64"})


def test_a_profile_that_names_no_architecture_is_for_the_machine_s_own() -> None:
    profile = {name: value for name, value in OWN.items() if name != "architectures"}
    assert resolve_profile(profile, **HERE)["architectures"] == ["SCMP_ARCH_X86_64"]


def test_the_result_holds_nothing_but_the_runtime_spec_s_keys() -> None:
    profile = resolved(capabilities=CAPABILITIES)
    assert set(profile) == {"defaultAction", "architectures", "syscalls"}
    for rule in profile["syscalls"]:
        assert set(rule) <= {"names", "action", "errnoRet", "args"}


def test_the_shared_profile_is_not_touched_by_its_users() -> None:
    before = json.dumps(default())
    profile = resolved()
    profile["syscalls"][0]["names"].clear()
    profile["architectures"].clear()
    for rule in profile["syscalls"]:
        for argument in rule.get("args", ()):
            argument.clear()
    assert json.dumps(default()) == before


def test_docker_gets_our_profile_as_it_is() -> None:
    ours = json.loads(resources.files("airflow_isolation.oci").joinpath("seccomp.json").read_bytes())
    assert json.loads(docker_profile("default", **HERE)) == ours


def test_unconfined() -> None:
    assert load_profile("unconfined") is None
    assert docker_profile("unconfined", **HERE) == "unconfined"


HERE: Any = {"architecture": "amd64", "capabilities": (), "kernel": (6, 1)}

OWN = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "architectures": ["SCMP_ARCH_X86_64"],
    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
    "syscalls": [
        {
            "names": ["read"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_LT"}],
            "comment": "why",
            "includes": {},
            "excludes": None,
        }
    ],
}


def test_a_profile_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    profile = load_profile(str(tmp_path / "own.json"))
    assert profile == OWN
    assert json.loads(docker_profile(str(tmp_path / "own.json"), **HERE)) == OWN
    assert resolve_profile(OWN, architecture="amd64", capabilities=(), kernel=(6, 1)) == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {
                "names": ["read"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_LT"}],
            }
        ],
    }


def conditional(**conditions: Any) -> dict[str, Any]:
    rule = {"names": ["reboot"], "action": ALLOW, **conditions}
    return {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [rule]}


@pytest.mark.parametrize(
    ("conditions", "applies"),
    [
        ({"includes": {"caps": ["CAP_KILL"]}}, True),
        ({"includes": {"caps": ["CAP_KILL", "CAP_CHOWN"]}}, False),
        ({"excludes": {"caps": ["CAP_CHOWN", "CAP_KILL"]}}, False),
        ({"excludes": {"caps": ["CAP_CHOWN"]}}, True),
        ({"includes": {"arches": ["arm64", "amd64"]}}, True),
        ({"includes": {"arches": ["arm64"]}}, False),
        ({"excludes": {"arches": ["amd64"]}}, False),
        ({"includes": {"minKernel": "6.1"}}, True),
        ({"includes": {"minKernel": "6.10"}}, False),
        ({"excludes": {"minKernel": "5.9"}}, False),
        ({"excludes": {"minKernel": "6.2"}}, True),
        ({"includes": {"caps": ["CAP_KILL"]}, "excludes": {"arches": ["amd64"]}}, False),
    ],
)
def test_conditions(conditions: dict[str, Any], applies: bool) -> None:
    profile = parse_profile(json.dumps(conditional(**conditions)).encode(), source="own.json")
    result = resolve_profile(profile, architecture="amd64", capabilities={"KILL"}, kernel=(6, 1))
    assert bool(result["syscalls"]) is applies


LESS = {"index": 0, "value": 1, "op": "SCMP_CMP_LT"}
READ = {"names": ["read"], "action": ALLOW}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"defaultAction": "ALLOW"}, "defaultAction is 'ALLOW'"),
        ({"defaultAction": None}, "defaultAction is None"),
        ({"defaultErrnoRet": "EPERM"}, "defaultErrnoRet"),
        ({"archMap": [{"architecture": "SCMP_ARCH_X86_64"}]}, "both archMap and architectures"),
        ({"architectures": None, "archMap": ["SCMP_ARCH_X86_64"]}, r"archMap\[0\] is not an object"),
        ({"architectures": "SCMP_ARCH_X86_64"}, "architectures is not a list"),
        ({"architectures": ["x86_64"]}, r"architectures\[0\] is 'x86_64', not an architecture"),
        ({"architectures": None, "archMap": [{"architecture": ["x"]}]}, r"archMap\[0\]\.architecture is \['x'\], not"),
        (
            {"architectures": None, "archMap": [{"architecture": "SCMP_ARCH_X86", "subArchitectures": [{}]}]},
            r"archMap\[0\]\.subArchitectures\[0\] is \{\}, not an architecture",
        ),
        ({"flags": [1]}, r"flags\[0\] is 1, not a flag"),
        ({"flags": ["LOG"]}, r"flags\[0\] is 'LOG', not a flag"),
        ({"listenerPath": "/run/x"}, "listenerPath is set, but this project runs no listener"),
        ({"defaultAction": ["x"]}, r"defaultAction is \['x'\]"),
        ({"defaultAction": {}}, r"defaultAction is \{\}"),
        ({"defaultErrnoRet": True}, "defaultErrnoRet is True, not a number"),
        ({"syscalls": [{"names": ["read"], "action": {"a": 1}}]}, r"syscalls\[0\]\.action is \{'a': 1\}"),
        ({"syscalls": [READ, {"names": "read", "action": ALLOW}]}, r"syscalls\[1\]\.names is not a list"),
        (
            {"syscalls": [{"names": ["read", "\ud800"], "action": ALLOW}]},
            r"names\[1\] is '.ud800', not a system call's",
        ),
        ({"syscalls": [{"names": ["read\0x"], "action": ALLOW}]}, r"names\[0\] is 'read.x00x', not a system call's"),
        ({"syscalls": [{"names": [["read"]], "action": ALLOW}]}, r"names\[0\] is \['read'\], not a system call's"),
        ({"syscalls": [{**READ, "name": "read"}]}, r"syscalls\[0\]\.name is the old form"),
        ({"syscalls": [{**READ, "comment": ["x"]}]}, r"syscalls\[0\]\.comment is not text"),
        ({"syscalls": [{**READ, "args": [{**LESS, "op": ["x"]}]}]}, r"syscalls\[0\]\.args\[0\]\.op is \['x'\]"),
        ({"syscalls": [{**READ, "args": [LESS, {**LESS, "value": -1}]}]}, r"args\[1\]\.value is -1, not a number"),
        ({"syscalls": [{**READ, "args": [{**LESS, "valueTwo": "1"}]}]}, r"args\[0\]\.valueTwo is '1', not a number"),
        ({"syscalls": [{**READ, "includes": {"caps": ["KILL"]}}]}, r"includes\.caps\[0\] is 'KILL', not a capability"),
        ({"syscalls": [{**READ, "excludes": {"arches": [["a"]]}}]}, r"excludes\.arches\[0\] is \['a'\], not an arch"),
        (
            {"syscalls": [{**READ, "excludes": {"minKernel": ["4.8"]}}]},
            r"excludes\.minKernel is \['4.8'\], not a version",
        ),
        ({"syscalls": [{**READ, "names": ["read"] * 200, "args": [LESS] * 51}]}, "syscalls is 10200 rules"),
        ({"syscalls": {}}, "syscalls is not a list"),
        ({"syscalls": None}, "syscalls is not a list"),
        ({"syscalls": ["read"]}, r"syscalls\[0\] is not an object"),
        ({"syscalls": [{"name": "read", "action": ALLOW}]}, r"syscalls\[0\]\.name is the old form"),
        ({"syscalls": [{"names": [], "action": ALLOW}]}, "names is not"),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}, "action is 'SCMP_ACT_NOTIFY'"),
        ({"syscalls": [{"names": ["read"], "action": ALLOW, "errnoRet": 5000}]}, "errnoRet"),
        ({"syscalls": [{"names": ["read"], "action": ALLOW, "args": [{"index": 6}]}]}, "args"),
        ({"syscalls": [{"names": ["read"], "action": ALLOW, "args": {}}]}, "args"),
        ({"syscalls": [{"names": ["read"], "action": ALLOW, "includes": {"cap": []}}]}, "includes is not made"),
        ({"syscalls": [{"names": ["read"], "action": ALLOW, "excludes": []}]}, None),
        (
            {"syscalls": [{"names": ["read"], "action": ALLOW, "includes": {"caps": "CAP_KILL"}}]},
            r"includes\.caps is not a list",
        ),
        ({"syscalls": [{"names": ["read"], "action": ALLOW, "includes": {"minKernel": "new"}}]}, "minKernel"),
        ({"syscalls": [{"names": ["read"], "action": ALLOW, "includes": {"minKernel": 4.8}}]}, "minKernel"),
    ],
)
def test_a_fault_in_a_profile_is_named(change: dict[str, Any], words: str | None) -> None:
    content = json.dumps({**OWN, **change}).encode()
    if words is None:
        assert parse_profile(content, source="own.json")
        return
    with pytest.raises(SpecRefused, match=f"own.json is not one in Docker's form: .*{words}"):
        parse_profile(content, source="own.json")


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000])
def test_a_profile_that_is_not_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(SpecRefused, match=r"own\.json is not JSON"):
        load_profile(str(tmp_path / "own.json"))


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecRefused, match=r"missing\.json can't be read: No such file"):
        load_profile(str(tmp_path / "missing.json"))


def test_a_profile_above_the_limit(tmp_path: Path) -> None:
    (tmp_path / "big.json").write_bytes(b" " * (1024 * 1024 + 1))
    with pytest.raises(SpecRefused, match="larger than 1048576 bytes"):
        load_profile(str(tmp_path / "big.json"))


@pytest.mark.parametrize("seccomp", ["", "Default", "profile.json", "runtime/default"])
def test_another_word_is_refused_with_those_that_are_known(seccomp: str) -> None:
    with pytest.raises(SpecRefused, match="Write default, unconfined, or the absolute path"):
        load_profile(seccomp)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 50) | st.text(max_size=3) | st.just("SCMP_ACT_ALLOW"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["names", "action", "args", "includes", "caps", "minKernel"]), inner, max_size=5
        )
    ),
    max_leaves=10,
)


@given(JSON, JSON, JSON)
def test_what_passes_the_check_can_be_resolved(rules: Any, arch_map: Any, architectures: Any) -> None:
    document = {"defaultAction": ALLOW, "syscalls": rules, "archMap": arch_map, "architectures": architectures}
    try:
        profile = parse_profile(json.dumps(document).encode(), source="own.json")
        resolved = resolve_profile(profile, architecture="amd64", capabilities=(), kernel=(6, 1))
    except SpecRefused:
        return
    assert resolved["architectures"] == ["SCMP_ARCH_X86_64"], "the one that is meant when none is named"
    assert not arch_map
    assert not architectures
