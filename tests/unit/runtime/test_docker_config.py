"""What can't be said to Docker is refused by name. What is said is compared with real containers in tests/conformance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airflow_isolation.container_spec import ContainerSpec, Mount
from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci import Account, EtcFiles, HostFacts, ImageConfig
from airflow_isolation.runtime.docker_config import container_config


def host_config(*mounts: Mount, etc: str = "/state/id") -> dict[str, Any]:
    body = container_config(
        "id",
        ContainerSpec(image="i:1", argv=("x",), mounts=mounts, network="none"),
        namespace="airflow",
        attempt="1",
        image=ImageConfig(architecture="amd64"),
        account=Account(uid=50000, gid=0, additional_gids=()),
        host=HostFacts(architecture="amd64"),
        seccomp="{}",
        etc=EtcFiles.within(Path(etc)),
    )
    found: dict[str, Any] = body["HostConfig"]
    return found


def test_a_file_of_etc_that_a_volume_brings_is_left_to_it() -> None:
    ours = ["/state/id/hostname:/etc/hostname:ro", "/state/id/hosts:/etc/hosts:ro"]
    assert host_config()["Binds"] == [*ours, "/state/id/resolv.conf:/etc/resolv.conf:ro"]
    assert host_config(Mount(target="/etc/resolv.conf", source="/srv/resolv.conf"))["Binds"] == ours
    assert host_config(Mount(target="/etc", source="/srv/etc"))["Binds"] == []


def test_a_state_directory_that_docker_can_not_mount_from_is_named() -> None:
    with pytest.raises(SpecRefused, match="/state:1/id/hostname, which has a colon") as caught:
        host_config(etc="/state:1/id")
    assert "state_dir" in caught.value.hint
