"""Processes in cgroups: a fork each, because there are hundreds of them and this machine is slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import Tree, find_hierarchy, find_tree, list_workloads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airflow_isolation.runtime.interface import ContainerRuntime

MIB = 1024 * 1024
#: More than any limit of these tests.
FOREVER = 1024


@contextmanager
def tree_of(runtime: ContainerRuntime) -> Iterator[Tree]:
    """The tree that a runtime makes of its containers. Afterwards they are removed, and nothing of it may be left."""
    tree = find_tree(find_hierarchy(Path("/sys/fs/cgroup")), "airflow")
    yield tree
    for container in runtime.list():
        runtime.remove(container.id)
    assert list_workloads(tree) == ()
    assert not (tree.mount / "airflow").exists()


def inside(cgroup: Path, work: Callable[[], object]) -> int:
    """Start a process that does ``work`` in the cgroup; it is there when this returns. Its pid is for ``ended``."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Nothing of pytest's may run in the child.
        try:
            os.close(reader)
            (cgroup / "cgroup.procs").write_text("0")
            os.close(writer)
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001
            print(repr(error), file=sys.stderr)
            os._exit(99)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return pid


def glutton(cgroup: Path) -> subprocess.Popen[bytes]:
    """A process that uses memory in the cgroup without end; cheaper to start than a fork of this one."""
    join_and_use = 'echo 0 >"$1/cgroup.procs" && exec dd if=/dev/zero of=/dev/null bs=1G count=1'
    return subprocess.Popen(["sh", "-c", join_and_use, "sh", str(cgroup)])


def ended(pid: int) -> int:
    """The exit code, negative for a signal, as subprocess has it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def sleeping(cgroup: Path) -> Iterator[int]:
    """A process that sleeps in the cgroup until the end of the block."""
    with occupied(cgroup, signal.pause) as pid:
        yield pid


@contextmanager
def occupied(cgroup: Path, work: Callable[[], object]) -> Iterator[int]:
    """A process that does ``work`` in the cgroup and is killed at the end of the block, if it is still there."""
    pid = inside(cgroup, work)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def use(mebibytes: int) -> list[bytes]:
    """Use memory, every page of it."""
    return [bytes([number % 255 + 1]) * MIB for number in range(mebibytes)]


def use_all() -> None:
    use(FOREVER)


def use_and_stay(mebibytes: int) -> Callable[[], None]:
    def work() -> None:
        kept = use(mebibytes)
        signal.pause()
        del kept

    return work


def read_programs() -> None:
    """Fill the page cache with files of the host, whose pages can be given back; those of a tmpfs can't."""
    for path in sorted(Path("/usr/bin").iterdir()):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(65536):
                    pass


def until(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)
