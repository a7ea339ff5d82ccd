"""How often a try was put off, counted on the host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from airflow_isolation.bridge.put_offs import FORGET_AFTER, count_put_off

if TYPE_CHECKING:
    from pathlib import Path


def test_each_try_has_its_own_count(tmp_path: Path) -> None:
    assert [count_put_off(tmp_path, "a") for _ in range(3)] == [0, 1, 2]
    assert count_put_off(tmp_path, "b") == 0


def test_old_ones_are_forgotten(tmp_path: Path) -> None:
    count_put_off(tmp_path, "a")
    path = tmp_path / "put-off" / "a"
    long_ago = path.stat().st_mtime - FORGET_AFTER - 1
    os.utime(path, (long_ago, long_ago))
    assert count_put_off(tmp_path, "b") == 0
    assert not path.exists()
    assert count_put_off(tmp_path, "a") == 0


def test_what_can_not_be_written_is_not_counted(tmp_path: Path) -> None:
    assert count_put_off(tmp_path / "missing", "a") is None
