"""What is wiped between two files, and where the kernel counts those that it killed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge import oom
from airflow_isolation.bridge.oom import OomKills
from airflow_isolation.bridge.parse_container import scratch_directories
from airflow_isolation.container_spec import ContainerSpec, Mount

if TYPE_CHECKING:
    from pathlib import Path

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


def test_the_host_tells_of_this_process_whatever_cgroup_it_has() -> None:
    count = OomKills(os.getpid()).count()
    assert count is None or count >= 0


def test_a_process_that_is_gone_is_not_known() -> None:
    assert OomKills(2**22 + 1).count() is None


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        ("memory.events", "low 0\noom 1\noom_kill 2\noom_group_kill 0\n", 2),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", None),
        ("memory.events", "oom_kill many\n", None),
    ],
)
def test_both_cgroup_versions_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, count: int | None
) -> None:
    (tmp_path / file).write_text(text)
    monkeypatch.setattr(oom, "_counter_of", lambda _: tmp_path / file)
    kills = OomKills(1)
    assert kills.count() == count
    (tmp_path / file).unlink()
    assert kills.count() is None
