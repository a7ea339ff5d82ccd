"""What authors and administrators write: whatever it is, an error of ours comes out, or nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import yaml
from hypothesis import strategies as st
from tests.unit.fuzz.inputs import ANYTHING, SCALARS, almost, damaged, fuzzed

from airflow_isolation.errors import IsolationError, SettingError, SpecRefused
from airflow_isolation.oci import resolve_account
from airflow_isolation.oci.seccomp import parse_profile, resolve_profile
from airflow_isolation.oci.seccomp_filter import compile_filter
from airflow_isolation.settings.dag_metadata import executor_config_metadata, read_dag_metadata

if TYPE_CHECKING:
    from pathlib import Path

METADATA = {
    "container": {
        "image": "registry.example/team/sales:1.4",
        "volumes": ["/data/sales:/data:ro"],
        "environment": {"REGION": "eu"},
        "resources": {"cpus": 2, "memory": "2Gi", "pids": 256},
        "network": "none",
        "start_timeout": 30,
    },
    "docker": {"hostname": "sales"},
}
WITH_TASKS = {**METADATA, "containerd": {"tasks": {"train_*": {"image": "a", "resources": {"memory": "8Gi"}}}}}
YAML_TEXT = (
    "container: &all\n  image: 'a:1'\n  volumes:\n    - /a:/b:rw\n  resources: {cpus: 0.5, memory: 1Gi}\n"
    '  tasks:\n    "x*":\n      <<: *all\n      image: !!str b\ndocker: {hostname: |\n    h\n  }\n'
)


def dumped(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=False).encode("utf-8", "surrogatepass")


@fuzzed(almost(WITH_TASKS).map(dumped) | damaged(dumped(WITH_TASKS)) | damaged(YAML_TEXT.encode()), examples=100)
def test_the_yaml_beside_a_dag(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sales.yaml").write_bytes(content)
    with suppress(SettingError):
        read_dag_metadata(tmp_path / "sales.py", tmp_path)


@fuzzed(almost(METADATA) | SCALARS | ANYTHING, examples=150)
def test_an_executor_config(config: Any) -> None:
    with suppress(SettingError):
        executor_config_metadata(config)


PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
    "syscalls": [
        {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 38,
            "args": [{"index": 0, "value": 38, "valueTwo": 0, "op": "SCMP_CMP_NE"}],
            "includes": {"caps": ["CAP_KILL"], "arches": ["amd64"], "minKernel": "4.8"},
            "excludes": {"caps": ["CAP_CHOWN"]},
            "comment": "a comment",
        },
    ],
}


@fuzzed(almost(PROFILE).map(lambda profile: json.dumps(profile).encode()) | damaged(json.dumps(PROFILE).encode()))
def test_a_seccomp_profile(content: bytes) -> None:
    try:
        profile = parse_profile(content, source="own.json")
    except SpecRefused:
        return
    with suppress(IsolationError):
        compile_filter(resolve_profile(profile, architecture="amd64", capabilities={"KILL"}, kernel=(6, 1)))


PASSWD = "root:x:0:0:root:/root:/bin/sh\nme:x:1000:100:Me:/home/me:/bin/sh\n"
GROUP = "root:x:0:\nusers:x:100:me\nmore:x:2000:me,you\n"
USERS = st.sampled_from(("", "me", "1000", "me:more", "0", "1000:more", "you", ":", "me:")) | st.text(max_size=10)


def text(content: bytes) -> str:
    return content.decode(errors="surrogateescape")


@fuzzed(USERS, damaged(PASSWD.encode()).map(text), damaged(GROUP.encode()).map(text), examples=100)
def test_account_files_of_an_image(user: str, passwd: str, group: str) -> None:
    with suppress(SpecRefused):
        account = resolve_account(user, passwd=passwd, group=group)
        assert account.uid > 0
        assert account.gid in account.additional_gids
