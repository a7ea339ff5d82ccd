"""What a clean-up of mapped layers says when it fails. Nothing is mounted here; tests/containerd does that."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.containerd.file_lock import locked
from airflow_isolation.containerd.mapped_layers import unmap_unless

if TYPE_CHECKING:
    from pathlib import Path


def unanswered(_: int) -> bool:
    raise TimeoutError("no answer")


def test_only_for_its_lock_it_does_not_wait(tmp_path: Path) -> None:
    lock = tmp_path / "500000-abc.lock"
    lock.touch()
    with locked(lock, end=time.monotonic()):
        assert unmap_unless(unanswered, tmp_path, pid=1) == ()
    with pytest.raises(TimeoutError, match="no answer"):
        unmap_unless(unanswered, tmp_path, pid=1)
    assert lock.exists()
