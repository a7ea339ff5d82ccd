"""A process forked into a container is what one started in it is: both observe themselves, and nothing may differ."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.zygote.conftest import EXCHANGE, PLACE

from airflow_isolation.bridge.process_one import read_process
from airflow_isolation.container_spec import UserNamespace

if TYPE_CHECKING:
    from tests.zygote.conftest import Host

OBSERVE = f"{PLACE}/observe.py"
CALLS = f"{PLACE}/calls.py"

#: What is any two processes' own.
OF_ANY_PROCESS = ("/probe/pid", "/probe/processes/", "/probe/descriptors/", "/random", "/keyrings/serial")

#: Some of every kind of action, where calls.py looks: the kernel's own answer, errors, a signal, an end.
PROFILE = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
    "syscalls": [
        {"names": ["swapon", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
        {"names": ["swapoff"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["acct"], "action": "SCMP_ACT_KILL_PROCESS"},
        {"names": ["quotactl"], "action": "SCMP_ACT_KILL"},
        {"names": ["vhangup"], "action": "SCMP_ACT_TRAP"},
        {"names": ["reboot"], "action": "SCMP_ACT_LOG"},
        {"names": ["chroot"], "action": "SCMP_ACT_TRACE", "errnoRet": 7},
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 97,
            "args": [
                {"index": 0, "op": "SCMP_CMP_GE", "value": 30},
                {"index": 1, "op": "SCMP_CMP_EQ", "value": 2},
            ],
        },
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 61,
            "args": [
                {"index": 0, "op": "SCMP_CMP_EQ", "value": 8},
                {"index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 131072, "valueTwo": 131072},
            ],
        },
    ],
}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: found for name, part in value.items() for key, found in flat(part, f"{path}/{name}").items()}
    return {path: value}


def differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    ones, others = flat(one), flat(other)
    return {
        key: (ones.get(key), others.get(key))
        for key in {**ones, **others}
        if ones.get(key) != others.get(key) and not key.startswith(OF_ANY_PROCESS)
    }


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="default"),
        pytest.param({"no_new_privileges": False}, id="new privileges"),
        pytest.param({"user": "4711:4712"}, id="unknown user"),
        pytest.param({"user": "root", "allow_root": True}, id="root without capabilities"),
        pytest.param(
            {
                "user": "root",
                "allow_root": True,
                "capabilities": frozenset({"CHOWN", "NET_BIND_SERVICE", "SYS_PTRACE"}),
            },
            id="root with capabilities",
        ),
        pytest.param(
            {"capabilities": frozenset({"SETUID", "SETPCAP"}), "no_new_privileges": False},
            id="capabilities for no root",
        ),
        pytest.param({"seccomp": "unconfined"}, id="unconfined"),
        pytest.param({"seccomp": "unconfined", "no_new_privileges": False}, id="unconfined, new privileges"),
        pytest.param(
            {
                "working_dir": "/var/lib",
                "env": {"TMPDIR": "/dev/shm", "GREETING": "gr\xfc\xdfe\nyou"},
                "timezone": "Asia/Tokyo",
            },
            id="environment",
        ),
        pytest.param({"network": "host"}, id="network of the host"),
        pytest.param({"user_namespace": UserNamespace(first=700000)}, id="user namespace"),
        pytest.param(
            {"user_namespace": UserNamespace(first=700000), "network": "host"}, id="user namespace, network of the host"
        ),
        pytest.param(
            {
                "user_namespace": UserNamespace(first=700000),
                "user": "root",
                "allow_root": True,
                "capabilities": frozenset({"CHOWN"}),
                "no_new_privileges": False,
            },
            id="user namespace, root with capabilities, new privileges",
        ),
    ],
)
def test_a_forked_process_is_what_a_started_one_is(host: Host, changes: dict[str, Any]) -> None:
    running = host.workload(OBSERVE, **changes)
    fresh = running.fresh()
    assert fresh["leads its session"]
    assert fresh["parent"] == 1
    assert differences(fresh, running.forked(OBSERVE)) == {}


#: What the filters are known to answer: the comparison sees them.
DEFAULT_ANSWERS = {
    "/calls/165": "EPERM",
    "/calls/435": "ENOSYS",
    "/calls/599": "ENOSYS",
    "/calls/x32 39": "ended with -31",
    "/calls/32-bit 102": "ENOSYS",
    "/calls with arguments/socket 38 0x100000000 5": "EPERM",
    "/calls with arguments/socket 40 0x8000000000000000 1": "EPERM",
    "/calls with arguments/clone 0x10000000": "EPERM",
}
ADMINISTRATORS_ANSWERS = {
    **DEFAULT_ANSWERS,
    "/calls/165": "EFAULT",
    "/calls/435": "E2BIG",
    "/calls with arguments/clone 0x10000000": "ok",
}
PROFILES_ANSWERS = {
    "/calls/167": "ENOTSUP",
    "/calls/163": "ended with -31",
    "/calls/179": "ended with -31",
    "/calls/153": "ended with -31",
    "/calls/161": "ENOSYS",
    "/calls with arguments/socket 31 0x0 2": "EAFNOSUPPORT",
    "/calls with arguments/personality 0x8": "ENODATA",
    "/calls with arguments/personality 0x20000": "ENODATA",
}


@pytest.mark.parametrize(
    ("changes", "answers"),
    [
        pytest.param({}, DEFAULT_ANSWERS, id="default"),
        pytest.param(
            {"user": "root", "allow_root": True, "capabilities": frozenset({"SYS_ADMIN"}), "no_new_privileges": False},
            ADMINISTRATORS_ANSWERS,
            id="administrator",
        ),
        pytest.param({"seccomp": PROFILE}, PROFILES_ANSWERS, id="every action"),
        pytest.param(
            {"seccomp": PROFILE, "no_new_privileges": False}, PROFILES_ANSWERS, id="every action, new privileges"
        ),
    ],
)
def test_every_system_call_answers_as_it_does_to_a_started_process(
    host: Host, changes: dict[str, Any], answers: dict[str, str], readable: Path
) -> None:
    if "seccomp" in changes:
        (readable / "profile.json").write_text(json.dumps(changes["seccomp"]))
        changes = {**changes, "seccomp": str(readable / "profile.json")}
    running = host.workload(CALLS, **changes)
    fresh = running.fresh()
    assert {name: flat(fresh)[name] for name in answers} == answers
    assert differences(fresh, running.forked(CALLS)) == {}


@pytest.mark.parametrize("user_namespace", [None, UserNamespace(first=700000)], ids=["host", "own"])
def test_the_host_sees_no_difference_either(host: Host, user_namespace: UserNamespace | None) -> None:
    running = host.workload(user_namespace=user_namespace)
    became = running.exchange / "became"
    with running.fork(source=f"import time; open({f'{EXCHANGE}/became'!r}, 'w'); time.sleep(60)"):
        running.until(became.exists)
        forked = running.forked_pid()
        seen = read_process(forked, uid_base=running.first_id)
        os.kill(forked, signal.SIGKILL)
    assert running.process_one.differences(seen) == {}


def test_the_session_keyring_is_the_containers_by_name_or_one_of_its_own(host: Host) -> None:
    running = host.workload(OBSERVE, seccomp="unconfined")
    containers = running.fresh()["keyrings"]
    by_name = running.forked(OBSERVE, process={"keyring": f"_ses.{running.id}"})["keyrings"]
    own = running.forked(OBSERVE)["keyrings"]
    assert by_name["serial"] == containers["serial"]
    assert own["serial"] != containers["serial"]


def test_nothing_of_the_zygote_is_left(host: Host) -> None:
    running = host.workload()
    source = "import json, os; print(json.dumps([sorted(os.environ), os.listdir('/proc/self/fd'), os.getcwd()]))"
    environment, descriptors, _ = running.forked(source=source, environment={"ONLY": "this"})
    assert environment == ["ONLY"]
    assert len(descriptors) == 5  # four channels, and the listing's own


def test_two_forks_draw_nothing_alike(host: Host) -> None:
    running = host.workload()
    one, other = (running.forked(OBSERVE)["random"] for _ in range(2))
    assert set(one).isdisjoint(other)


@pytest.mark.parametrize(
    ("process", "words"),
    [
        ({"apparmor": "no-such-profile"}, "AppArmor profile no-such-profile"),
        ({"working_directory": "/no/such"}, "working directory /no/such"),
        ({"seccomp": "AAAA"}, "seccomp filter"),
        ({"seccomp": "/////w=="}, "seccomp filter"),
        ({"rlimits": {"RLIMIT_NOFILE": [2, 1]}}, "RLIMIT_NOFILE"),
        ({"rlimits": {"RLIMIT_NO_SUCH": [1, 1]}}, "RLIMIT_NO_SUCH"),
        ({"oom_score_adj": 100000}, "oom_score_adj"),
        ({"uid": -5}, "uid"),
        ({"groups": [-5]}, "groups"),
        ({"capabilities": {}}, "bounding"),
        (
            {"capabilities": {"bounding": 1 << 63, "effective": 0, "permitted": 0, "inheritable": 0, "ambient": 0}},
            "dropping the bounding set",
        ),
        (
            {"capabilities": {"bounding": 0, "effective": 1, "permitted": 0, "inheritable": 0, "ambient": 0}},
            "setting capabilities",
        ),
    ],
)
def test_nothing_runs_in_a_process_that_could_not_become_the_containers(
    host: Host, process: dict[str, Any], words: str
) -> None:
    running = host.workload()
    source = f"open({f'{EXCHANGE}/ran'!r}, 'w')"
    with running.fork(source=source, process=process) as driver:
        output, errors = driver.communicate(timeout=30)
    assert output == b""
    assert b"EntryFailed" in errors
    assert words in errors.decode()
    assert not (running.exchange / "ran").exists()


def test_no_process_enters_a_pid_namespace_beside_its_own() -> None:
    """So a zygote can't have one of its own: runc makes those of all containers beside each other."""
    siblings = [subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "60"]) for _ in range(2)]
    try:
        first, second = (pid_namespace_of_child(one.pid) for one in siblings)
        with first.open() as own, second.open() as other:
            program = "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True); "
            program += "print(*((libc.setns(int(one), 0), ctypes.get_errno()) for one in sys.argv[1:]))"
            command = [
                "nsenter",
                f"--pid={first}",
                sys.executable,
                "-c",
                program,
                str(own.fileno()),
                str(other.fileno()),
            ]
            done = subprocess.run(
                command, pass_fds=(own.fileno(), other.fileno()), capture_output=True, text=True, check=True, timeout=60
            )
        assert done.stdout == f"(0, 0) (-1, {errno.EINVAL})\n"
    finally:
        for one in siblings:
            one.kill()
            one.wait()


def pid_namespace_of_child(pid: int) -> Path:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 30
    while not children.read_text().split():
        assert time.monotonic() < deadline, "there is no child"
        time.sleep(0.01)
    return Path(f"/proc/{children.read_text().split()[0]}/ns/pid")
