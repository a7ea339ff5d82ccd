"""Whose processes may be killed together: those of a cgroup that a container has for itself, and never others."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups.errors import CgroupError
from airflow_isolation.cgroups.join import end_everyone_in, own_cgroup_of

if TYPE_CHECKING:
    from pathlib import Path


def test_a_process_that_is_where_this_one_is_has_no_cgroup_of_its_own() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert own_cgroup_of(child.pid) is None
    assert own_cgroup_of(os.getpid()) is None


def test_the_hosts_first_process_has_none() -> None:
    assert own_cgroup_of(1) is None


def test_a_process_that_is_gone_has_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    assert own_cgroup_of(child.pid) is None


def test_in_a_cgroup_that_is_gone_nobody_is_to_be_ended(tmp_path: Path) -> None:
    end_everyone_in(tmp_path / "gone")


def test_everyone_is_ended(tmp_path: Path) -> None:
    """A file stands for the cgroup: the kernel's would no longer list who has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ended:
        (tmp_path / "cgroup.procs").write_text(f"{ended.pid}\n")
        with pytest.raises(CgroupError, match="don't end"):
            end_everyone_in(tmp_path, seconds=0.1)
        assert ended.wait(timeout=30) == -9
