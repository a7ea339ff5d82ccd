"""What makes a worker look for left-overs, without a question to the daemon."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.bridge.held import held
from airflow_isolation.bridge.left_over import looks_left_over
from airflow_isolation.bridge.zygote import alone_in, seems_dead

if TYPE_CHECKING:
    from pathlib import Path


class Host:
    """A runtime that knows cgroups alone: whatever else is asked is an error."""

    def __init__(self, *cgroups: str) -> None:
        self.cgroups = cgroups

    def seen_on_host(self) -> frozenset[str]:
        return frozenset(self.cgroups)


def suspicious(state_dir: Path, *cgroups: str) -> bool:
    host: Any = Host(*cgroups)
    return looks_left_over(host, state_dir)


def made(path: Path, *, age: float, text: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_on_a_host_without_anything_nothing_is(tmp_path: Path) -> None:
    assert not suspicious(tmp_path)


def test_a_workload_whose_worker_lives_is_not(tmp_path: Path) -> None:
    directory = made(tmp_path / "workloads/task-a", age=3600)
    with held(directory):
        assert not suspicious(tmp_path, "task-a")
    assert suspicious(tmp_path, "task-a")


def test_one_that_is_just_made_is_not(tmp_path: Path) -> None:
    made(tmp_path / "workloads/task-a", age=0)
    assert not suspicious(tmp_path)


@pytest.mark.parametrize("place", ["workloads/task-a", "spares/c-1/task-a", "zygotes/k/task-a"])
def test_a_cgroup_is_when_no_directory_of_its_name_is_there(tmp_path: Path, place: str) -> None:
    directory = made(tmp_path / place, age=0)
    assert not suspicious(tmp_path, "task-a")
    directory.rmdir()
    assert suspicious(tmp_path, "task-a")


def test_a_spare_that_waits_is_not_until_it_has_waited_too_long(tmp_path: Path) -> None:
    made(tmp_path / "spares/c-1/task-a", age=30)
    made(tmp_path / "spares/c-1/task-a.sock", age=30, text="")
    record = made(tmp_path / "spares/c-1/task-a.json", age=30, text="{}")
    assert not suspicious(tmp_path, "task-a")
    os.utime(record, (0, 0))
    assert suspicious(tmp_path, "task-a")


def test_a_spare_that_is_being_made_is_not_as_long_as_its_maker_lives(tmp_path: Path) -> None:
    directory = made(tmp_path / "spares/c-1/task-a", age=30)
    made(tmp_path / "spares/c-1/task-a.sock", age=30, text="")
    with held(directory):
        assert not suspicious(tmp_path, "task-a")
    assert suspicious(tmp_path, "task-a")


def test_a_zygote_is_when_its_process_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        made(tmp_path / "zygotes/k/record.json", age=0, text=f'{{"container": "zygote-a", "pid": {process.pid}}}')
        os.utime(tmp_path / "zygotes/k", (0, 0))
        assert not suspicious(tmp_path)
        process.kill()
    os.utime(tmp_path / "zygotes/k", (0, 0))
    with alone_in(tmp_path / "zygotes/k", end=time.monotonic()):
        assert not suspicious(tmp_path), "another is being started"
    assert suspicious(tmp_path)


def test_a_zygote_that_could_not_be_started_is_when_it_may_be_tried_again(tmp_path: Path) -> None:
    failure = made(tmp_path / "zygotes/k/failure", age=0, text="broken")
    os.utime(failure.parent, (0, 0))
    assert not suspicious(tmp_path)
    os.utime(failure, (0, 0))
    # Who looked has made its lock there.
    os.utime(failure.parent, (0, 0))
    assert suspicious(tmp_path)


def test_who_looks_does_not_bring_back_the_directory_of_a_zygote_that_was_pruned(tmp_path: Path) -> None:
    directory = tmp_path / "zygotes/k"
    assert not seems_dead(directory)
    assert not directory.parent.exists()
