"""Which processes are shims, and whose."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.processes import wait_until

from airflow_isolation.runtime.shims import Shim, shims

if TYPE_CHECKING:
    from collections.abc import Iterator

ARGUMENTS = ("-namespace", "ns-of-the-test", "-id", "task-a", "-address", "/run/of-the-test.sock")


@contextmanager
def process(program: Path, name: str, *arguments: str) -> Iterator[int]:
    with subprocess.Popen(
        [name, *arguments], executable=program, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as started:
        try:
            # exec tells its caller a moment before the new command line can be read.
            wait_until(lambda: bool(Path(f"/proc/{started.pid}/cmdline").read_bytes()), 10, "its command line")
            yield started.pid
        finally:
            started.kill()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """As a shim is: a program of that name which runs for ever, whatever its arguments are."""
    target = tmp_path / "containerd-shim-runc-v2"
    shutil.copy(shutil.which("bash") or "/bin/bash", target)
    return target


def found() -> list[Shim]:
    return [shim for shim in shims() if shim.namespace == "ns-of-the-test"]


def waiting(*arguments: str) -> tuple[str, ...]:
    return ("-c", "read -r line; :", *arguments)


def test_a_shim_says_whose_it_is(program: Path, tmp_path: Path) -> None:
    with process(program, str(program), *waiting(*ARGUMENTS)) as pid:
        (shim,) = found()
        assert (shim.pid, shim.id, shim.address) == (pid, "task-a", "/run/of-the-test.sock")
        assert shim.is_of("/run/of-the-test.sock", "ns-of-the-test")
        assert not shim.is_of("/run/of-the-test.sock", "another")
        assert not shim.is_of("/run/another.sock", "ns-of-the-test")
        link = tmp_path / "link.sock"
        link.symlink_to("/run/of-the-test.sock")
        assert shim.is_of(str(link), "ns-of-the-test")
        assert shim.end(10)
    assert found() == []
    assert shim.end(10), "gone already"


def test_a_pid_that_another_process_has_by_now_is_left_alone(program: Path) -> None:
    with process(program, str(program), *waiting(*ARGUMENTS)) as pid:
        (shim,) = found()
        earlier = Shim(pid=pid, started=shim.started - 1, id=shim.id, namespace=shim.namespace, address=shim.address)
        assert earlier.end(10)
        assert found() == [shim]
        os.kill(pid, 0)


@pytest.mark.parametrize("words", [(*ARGUMENTS, "delete"), (*ARGUMENTS, "start"), ARGUMENTS[:4]])
def test_what_a_daemon_calls_for_a_moment_is_none(program: Path, words: tuple[str, ...]) -> None:
    with process(program, str(program), *waiting(*words)):
        assert found() == []


def test_a_program_that_only_says_that_it_is_one_is_none(program: Path) -> None:
    other = program.rename(program.with_name("other"))
    with process(other, "containerd-shim-runc-v2", *waiting(*ARGUMENTS)):
        assert found() == []
