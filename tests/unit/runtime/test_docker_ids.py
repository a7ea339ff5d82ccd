"""Docker's ids of our containers, as they are noted on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_isolation.runtime.docker import _is_known
from airflow_isolation.runtime.docker_ids import DockerIds

if TYPE_CHECKING:
    from pathlib import Path

DOCKER_ID = "7b" * 32


def test_what_is_noted_is_read_until_the_directory_is_gone(tmp_path: Path) -> None:
    ids = DockerIds(tmp_path / "containers" / "docker-1")
    assert not ids.ids()
    assert not ids.read()
    ids.note("task-1", DOCKER_ID)
    ids.note("task-1", DOCKER_ID)
    assert ids.ids() == {"task-1"}
    assert ids.read() == {"task-1": DOCKER_ID}


@pytest.mark.parametrize("content", ["", DOCKER_ID[:20], "/", f"{DOCKER_ID}\n", DOCKER_ID.upper(), "é" * 64])
def test_what_is_not_a_whole_id_names_nothing(tmp_path: Path, content: str) -> None:
    """Half a note is of a container that was never started."""
    ids = DockerIds(tmp_path)
    ids.note("task-1", content)
    assert ids.ids() == {"task-1"}
    assert not ids.read()


def test_a_directory_without_a_note_is_there_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "task-1").mkdir()
    assert DockerIds(tmp_path).ids() == {"task-1"}
    assert not DockerIds(tmp_path).read()


ENDED, NEVER = "2026-11-28T22:34:33.895886763Z", "0001-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("status", "running", "code", "finished", "known"),
    [
        ("running", True, 0, NEVER, True),
        ("paused", True, 0, NEVER, True),
        ("exited", False, 0, ENDED, True),
        ("exited", False, 137, ENDED, True),
        # As dockerd says it of what it has not found again after its restart: newer ones, and 20.10.
        ("exited", False, 255, ENDED, False),
        ("exited", False, 0, NEVER, False),
        ("created", False, 0, NEVER, False),
        ("created", False, 128, NEVER, False),
        ("dead", False, 0, ENDED, False),
    ],
)
def test_dockerd_knows_what_it_runs_and_whose_end_it_saw(
    *, status: str, running: bool, code: int, finished: str, known: bool
) -> None:
    state = {"Status": status, "Running": running, "ExitCode": code, "FinishedAt": finished}
    assert _is_known(state) is known
