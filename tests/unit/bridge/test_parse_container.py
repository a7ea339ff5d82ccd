"""What is wiped between two files."""

from __future__ import annotations

import pytest

from airflow_isolation.bridge.parse_container import scratch_directories
from airflow_isolation.container_spec import ContainerSpec, Mount

OURS = ("/tmp", "/dev/shm", "/dev/mqueue", "/run")


@pytest.mark.parametrize(
    ("mounts", "scratch"),
    [
        ((), OURS),
        ((Mount(source="/data", target="/data", read_only=False),), OURS),
        # The user's own directory instead of our tmpfs: what is in it is the user's.
        ((Mount(source="/data", target="/tmp", read_only=False),), ("/dev/shm", "/dev/mqueue", "/run")),
        ((Mount(source="/data", target="/tmp/data", read_only=False),), OURS),
        ((Mount(target="/scratch", kind="tmpfs", read_only=False),), (*OURS, "/scratch")),
        ((Mount(target="/root", kind="tmpfs"),), OURS),
        ((Mount(target="/tmp", kind="tmpfs", read_only=False),), OURS),
    ],
)
def test_only_what_is_the_containers_alone_is_wiped(mounts: tuple[Mount, ...], scratch: tuple[str, ...]) -> None:
    assert scratch_directories(ContainerSpec(image="i", argv=(), mounts=mounts)) == scratch
