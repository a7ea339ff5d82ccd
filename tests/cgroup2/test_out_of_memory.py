"""Killed for memory by a real kernel: named every time, with the limit that was reached and who was killed.

Plain processes in workloads' cgroups: the kernel does not know the difference, and there can be hundreds of them.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB, ended, glutton, inside, occupied, read_programs, until, use, use_all, use_and_stay

from airflow_isolation.cgroups import (
    Limit,
    Limits,
    Memory,
    OutOfMemory,
    Workload,
    attribute,
    make_workload,
    read_statistics,
    read_victims,
    take_sample,
    usage_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.cgroups import Tree

TASK = "task_execution"
#: Small, so that hundreds of kills take no time.
SMALL = Limits(memory=Memory(max=8 * MIB, swap=0, oom_group=True))


_NUMBERS = count()


def new_id() -> str:
    """Of its own for each workload, as in life: the kernel's log remembers the earlier ones."""
    return f"oom-{next(_NUMBERS)}"


@pytest.fixture
def kernel_log() -> None:
    """The kernel tells of ten kills in five seconds, and of no more (mm/oom_kill.c): let five seconds pass."""
    time.sleep(5.5)


def run(workload: Workload, work: Callable[[], object]) -> tuple[int, OutOfMemory | None]:
    """Do work in the workload's leaf, where the runtime's processes are; its exit code and the verdict."""
    leaf = workload.cgroup.path / "container"
    leaf.mkdir(exist_ok=True)
    before = take_sample(workload.cgroup, workload.tree)
    pid = inside(leaf, work)
    code = ended(pid)
    return code, verdict(workload, before, killed=code == -signal.SIGKILL, pid=pid)


def verdict(workload: Workload, before: object, *, killed: bool, pid: int = 0, log: bool = True) -> OutOfMemory | None:
    return attribute(
        before,  # type: ignore[arg-type]
        take_sample(workload.cgroup, workload.tree),
        killed=killed,
        pid=pid,
        victims=read_victims(workload.id) if log else (),
    )


@pytest.mark.timeout(900)
def test_two_hundred_kills_in_a_row_are_all_named(tree: Tree) -> None:
    found = []
    for _ in range(200):
        workload = make_workload(tree, TASK, new_id(), SMALL)
        leaf = workload.cgroup.path / "container"
        leaf.mkdir()
        before = take_sample(workload.cgroup, tree)
        with glutton(leaf) as process:
            code = process.wait()
        told = verdict(workload, before, killed=code == -signal.SIGKILL, pid=process.pid)
        workload.remove()
        assert told is not None
        found.append(
            (code, told.fatal, told.limit, told.kills, {victim.pid for victim in told.victims} <= {process.pid})
        )
    assert found == [(-signal.SIGKILL, True, Limit.OWN, 1, True)] * 200


@pytest.mark.usefixtures("kernel_log")
def test_the_sentence_names_limit_peak_victim_and_setting(tree: Tree) -> None:
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=64 * MIB, oom_group=True)))
    _, verdict = run(workload, use_all)
    workload.remove()
    assert verdict is not None
    name, pid = verdict.victims[0].name, verdict.victims[0].pid
    assert verdict.sentence == (
        "The kernel killed this workload because memory ran out: it reached its own limit, memory = 64 MiB; its peak was "
        f"64 MiB (100 %). Killed: {name} (process {pid}). Raise resources.memory."
    )


def test_without_the_kernels_log_the_counters_are_enough(tree: Tree) -> None:
    for _ in range(20):
        workload = make_workload(tree, TASK, new_id(), SMALL)
        before = take_sample(workload.cgroup, tree)
        assert ended(inside(workload.cgroup.path, use_all)) == -signal.SIGKILL
        found = verdict(workload, before, killed=True, log=False)
        workload.remove()
        assert found is not None
        assert (found.fatal, found.limit, found.victims) == (True, Limit.OWN, ())


def test_a_kill_by_somebody_else_is_never_called_out_of_memory(tree: Tree) -> None:
    for _ in range(50):
        workload = make_workload(tree, TASK, new_id(), SMALL)
        code, verdict = run(workload, lambda: os.kill(os.getpid(), signal.SIGKILL))
        workload.remove()
        assert (code, verdict) == (-signal.SIGKILL, None)


def test_nor_is_one_that_hits_a_workload_close_to_its_limit(tree: Tree) -> None:
    """Its memory is full of what can be given back, and it has met its limit often, without any harm."""
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=32 * MIB, oom_group=True)))

    def read_and_die() -> None:
        read_programs()
        os.kill(os.getpid(), signal.SIGKILL)

    code, verdict = run(workload, read_and_die)
    events = read_statistics(workload.cgroup).memory
    workload.remove()
    assert events is not None
    assert events.events.max > 0, "the test must reach the limit"
    assert (code, verdict) == (-signal.SIGKILL, None)


@pytest.mark.usefixtures("kernel_log")
def test_all_processes_die_together_and_it_is_one_verdict(tree: Tree) -> None:
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=32 * MIB, oom_group=True)))
    leaf = workload.cgroup.path / "container"
    leaf.mkdir()
    before = take_sample(workload.cgroup, tree)
    parent = inside(leaf, signal.pause)
    child = inside(leaf, use_all)
    assert ended(child) == ended(parent) == -signal.SIGKILL
    found = verdict(workload, before, killed=True, pid=parent)
    workload.remove()
    assert found is not None
    assert (found.fatal, found.limit, found.kills) == (True, Limit.OWN, 1)
    assert [victim.pid for victim in found.victims] == [child]


def test_a_child_is_killed_and_the_workload_succeeds(tree: Tree) -> None:
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=32 * MIB, oom_group=False)))

    def survive() -> None:
        child = os.fork()
        if child == 0:
            use_all()
            os._exit(0)
        assert ended(child) == -signal.SIGKILL

    code, verdict = run(workload, survive)
    workload.remove()
    assert code == 0
    assert verdict is not None
    assert (verdict.fatal, verdict.limit, verdict.kills) == (False, Limit.OWN, 1)
    assert "killed a process of this workload because memory ran out, and the workload went on" in verdict.sentence


@pytest.mark.usefixtures("kernel_log")
def test_a_child_is_killed_for_memory_and_then_the_workload_by_somebody_else(tree: Tree) -> None:
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=32 * MIB, oom_group=False)))

    def lose_a_child() -> None:
        child = os.fork()
        if child == 0:
            use_all()
            os._exit(0)
        ended(child)
        os.kill(os.getpid(), signal.SIGKILL)

    code, verdict = run(workload, lose_a_child)
    workload.remove()
    assert code == -signal.SIGKILL
    assert verdict is not None
    assert not verdict.fatal


def test_a_limit_that_the_task_set_for_a_cgroup_of_its_own_is_no_death_of_the_task(tree: Tree) -> None:
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=64 * MIB, oom_group=True)))
    leaf = workload.cgroup.path / "container"
    leaf.mkdir()
    for directory in (workload.cgroup.path, leaf):
        (directory / "cgroup.subtree_control").write_text("+memory")
    (leaf / "main").mkdir()
    (leaf / "own").mkdir()
    (leaf / "own/memory.max").write_text(str(8 * MIB))
    before = take_sample(workload.cgroup, tree)
    main = inside(leaf / "main", signal.pause)
    assert ended(inside(leaf / "own", use_all)) == -signal.SIGKILL
    os.kill(main, signal.SIGKILL)
    ended(main)
    for log in (True, False):
        found = verdict(workload, before, killed=True, pid=main, log=log)
        assert found is not None
        assert (found.fatal, found.limit) == (False, Limit.OWN)
    workload.remove()


@pytest.mark.parametrize("log", [True, False], ids=["with the kernel's log", "from counters alone"])
def test_two_workloads_exceed_the_budget_and_the_one_that_was_killed_is_told_so(tree: Tree, log: bool) -> None:
    budget = Limits(memory=Memory(max=64 * MIB))
    one, two = (
        make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=60 * MIB, oom_group=True)), budget=budget)
        for _ in range(2)
    )
    before = {workload.id: take_sample(workload.cgroup, tree) for workload in (one, two)}
    with occupied(one.cgroup.path, use_and_stay(30)) as quiet:
        until(lambda: int((one.cgroup.path / "memory.current").read_text()) > 30 * MIB)
        greedy = inside(two.cgroup.path, use_and_stay(50))
        assert ended(greedy) == -signal.SIGKILL
        assert os.waitpid(quiet, os.WNOHANG) == (0, 0)
        found = verdict(two, before[two.id], killed=True, pid=greedy, log=log)
        assert verdict(one, before[one.id], killed=False, pid=quiet, log=log) is None
    assert found is not None
    assert (found.fatal, found.limit, found.cgroup) == (True, Limit.PURPOSE, "airflow/tests/task_execution")
    assert "together reached their budget (airflow/tests/task_execution), not its own limit of 60 MiB" in found.sentence
    assert "Raise budget_memory" in found.sentence
    one.remove()
    two.remove()


@pytest.mark.parametrize("log", [True, False], ids=["with the kernel's log", "from counters alone"])
def test_a_limit_above_our_tree_is_named(tree: Tree, log: bool) -> None:
    unit = tree.mount / "unit"
    unit.mkdir()
    (tree.mount / "cgroup.subtree_control").write_text("+memory")
    (unit / "memory.max").write_text(str(16 * MIB))
    workload = make_workload(
        replace(tree, delegated="unit", root="unit/airflow"), TASK, new_id(), Limits(memory=Memory(oom_group=True))
    )
    before = take_sample(workload.cgroup, workload.tree)
    pid = inside(workload.cgroup.path, use_all)
    assert ended(pid) == -signal.SIGKILL
    found = verdict(workload, before, killed=True, pid=pid, log=log)
    workload.remove()
    unit.rmdir()
    assert found is not None
    assert (found.limit, found.cgroup) == (Limit.OUTER, "unit")
    assert "MemoryMax=" in found.sentence


@pytest.mark.parametrize("log", [True, False], ids=["with the kernel's log", "from counters alone"])
def test_the_hosts_memory_is_used_up(tree: Tree, log: bool) -> None:
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(oom_group=True)))
    before = take_sample(workload.cgroup, tree)

    def be_chosen() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")
        # "Call oom_kill" (Documentation/admin-guide/sysrq.rst): what the kernel does when no memory is left, but without
        # the minutes of thrashing before it.
        Path("/proc/sysrq-trigger").write_text("f")
        signal.pause()

    pid = inside(workload.cgroup.path, be_chosen)
    assert ended(pid) == -signal.SIGKILL
    found = verdict(workload, before, killed=True, pid=pid, log=log)
    workload.remove()
    assert found is not None
    assert (found.fatal, found.limit, found.size) == (True, Limit.HOST, None)
    assert "the host had no memory left" in found.sentence


def test_an_earlier_kill_is_not_counted_again(tree: Tree) -> None:
    """Two tries never share a directory, but a sample is of a moment."""
    workload = make_workload(tree, TASK, new_id(), SMALL)
    run(workload, use_all)
    before = take_sample(workload.cgroup, tree)
    assert verdict(workload, before, killed=True) is None
    workload.remove()


def test_the_usage_of_a_try_is_read_after_its_end(tree: Tree) -> None:
    workload = make_workload(tree, TASK, new_id(), Limits(memory=Memory(max=64 * MIB, oom_group=True)))
    leaf = workload.cgroup.path / "container"
    leaf.mkdir()
    assert ended(inside(leaf, lambda: use(16))) == 0
    leaf.rmdir()
    usage = usage_of(read_statistics(workload.cgroup), wall=1.5)
    workload.remove()
    assert usage.memory_peak is not None
    assert usage.memory_share is not None
    assert 16 * MIB <= usage.memory_peak <= 64 * MIB
    assert 0.25 <= usage.memory_share <= 1
    assert (usage.oom_kills, usage.pids_peak, usage.memory_limit) == (0, 1, 64 * MIB)
    assert usage.cpu == pytest.approx((usage.cpu_user or 0) + (usage.cpu_system or 0), abs=0.01)
    assert usage.sentence.startswith("wall 1.5 s; CPU ")
