"""The tree of cgroups that holds the workloads: who makes its directories, and who removes them.

    <mount>/<delegated part>/<parent>/      one for all workloads of the host
      task_execution/  dag_parsing/         one for each purpose, with its budget
        <id>/                               one for each workload: limits are written and counters read here
          container/                        the runtime's own

Several workers share the tree without talking to each other. The first worker makes the upper levels, and they go with
the last workload. The process that makes a workload's directory locks it (flock) for as long as the process lives. So an
unlocked directory was left by a dead worker. Once no process is in it, any worker may remove it.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import processes
from airflow_isolation.cgroups.directory import SUBTREE_CONTROL, Cgroup, open_cgroup
from airflow_isolation.cgroups.errors import CgroupBusy, CgroupError, CgroupGone, ControllerMissing, ValueRefused
from airflow_isolation.cgroups.limits import NO_LIMITS, Limits, check_limits, set_limits
from airflow_isolation.cgroups.slices import SUFFIX

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.cgroups.hierarchy import Hierarchy

#: The runtime's directory in a workload's.
LEAF = "container"
#: The levels below the root: one for each purpose.
TASKS, PARSING, OTHERS = LEVELS = ("task_execution", "dag_parsing", "others")
#: All controllers that give limits or counters. The first ones can't be handed down by a cgroup with processes in it, so
#: the attempt fails; with the others it would become the root of a threaded subtree.
CONTROLLERS = ("memory", "io", "cpu", "pids", "cpuset")
#: Where a delegated unit's own processes are moved: they may not stay in a cgroup that hands controllers down.
WORKER = "worker"

# Several attempts, because another worker may meanwhile remove an empty level, or look for left-overs.
_TRIES = 50
_PAUSE_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """``root`` is the directory for all workloads, below ``mount``. ``delegated`` is its first part, which we don't make."""

    mount: Path
    root: str
    delegated: str = ""

    def purpose(self, purpose: str) -> str:
        return f"{self.root}/{purpose}"

    def workload(self, purpose: str, id: str) -> str:
        return f"{self.root}/{purpose}/{id}"

    def leaf(self, purpose: str, id: str) -> str:
        """The runtime's directory: ``linux.cgroupsPath`` without its leading slash."""
        return f"{self.root}/{purpose}/{id}/{LEAF}"


def directory_around(leaf: str) -> tuple[str, str] | None:
    """The tree's root and the workload's directory, given the runtime's cgroup; None when that isn't in a tree of ours.

    containerd uses the name that we give it, dockerd an id of its own. In a slice of ours, the runtime's cgroup itself is
    the workload's directory.

    >>> directory_around("airflow/task_execution/w1/container")
    ('airflow', 'airflow/task_execution/w1')
    >>> directory_around("airflow.slice/airflow-task_execution.slice/docker-1f.scope")
    ('airflow.slice', 'airflow.slice/airflow-task_execution.slice/docker-1f.scope')
    """
    parts = leaf.split("/")
    if len(parts) > 2 and parts[-2].endswith(SUFFIX) and parts[-2].removesuffix(SUFFIX).rpartition("-")[2] in LEVELS:
        return "/".join(parts[:-2]), leaf
    if len(parts) < 4 or not (parts[-1] == LEAF or parts[-3] in LEVELS):
        return None
    return "/".join(parts[:-3]), "/".join(parts[:-1])


def find_tree(hierarchy: Hierarchy, parent: str) -> Tree:
    """The tree below ``parent``, in the part of the hierarchy that is delegated to us.

    :raises CgroupError: as ``Hierarchy.require``, such as NotUnified without cgroup v2.
    """
    hierarchy.require("memory")
    root = "/".join(part for part in (hierarchy.delegated, parent.strip("/")) if part)
    return Tree(mount=hierarchy.mount, root=root, delegated=hierarchy.delegated)


class Workload:
    """One workload's directory, made and locked; ``remove`` kills everything in it and removes it."""

    def __init__(self, tree: Tree, purpose: str, id: str, cgroup: Cgroup) -> None:
        self.tree = tree
        self.purpose = purpose
        self.id = id
        self.cgroup = cgroup
        _LOCKED.add(self)

    def __repr__(self) -> str:
        return f"Workload({str(self.cgroup.path)!r})"

    @property
    def leaf(self) -> str:
        return self.tree.leaf(self.purpose, self.id)

    def remove(self, seconds: float = 10.0) -> None:
        """Kill what is in it, remove it and the levels that are then empty, and unlock it. May be called twice.

        :raises CgroupBusy: its processes don't end within ``seconds``; the directory stays locked.
        """
        remove_workload(self.tree, self.purpose, self.id, seconds)
        self.close()

    def close(self) -> None:
        """Unlock it, and leave its removal to ``remove_abandoned``. May be called twice."""
        self.cgroup.close()
        _LOCKED.discard(self)


_LOCKED: set[Workload] = set()


def _unlock_in_child() -> None:
    """Close the locks in a forked child: a lock lasts until the last copy of its descriptor is closed, and the worker may
    die.
    """
    for workload in list(_LOCKED):
        workload.close()


os.register_at_fork(after_in_child=_unlock_in_child)


def make_workload(
    tree: Tree, purpose: str, id: str, limits: Limits = NO_LIMITS, *, budget: Limits = NO_LIMITS
) -> Workload:
    """Make a workload's directory with its limits, and the levels that are missing above it. Failure removes it again.

    ``budget`` is written for the purpose each time, so the settings of the last worker hold.

    :raises ValueRefused: a limit is wrong (the error names it), or more than the budget.
    :raises CgroupBusy: another process has a workload of this id, or processes are in an inner directory.
    :raises ControllerMissing: a limit needs a controller that is not handed down to us.
    :raises CgroupDenied: this process may not make the tree.
    """
    check_limits(limits)
    check_budget(limits, budget, purpose)
    with ExitStack() as undo:
        undo.callback(_remove_empty_levels, tree, purpose)
        for _ in range(_TRIES):
            with suppress(CgroupGone):
                cgroup = _made_and_locked(tree, purpose, id, required=limits.controllers, budget=budget)
                break
            time.sleep(_PAUSE_SECONDS)
        else:
            raise CgroupBusy(f"{tree.mount / tree.workload(purpose, id)} is removed again and again while it is made")
        workload = Workload(tree, purpose, id, cgroup)
        undo.callback(workload.remove)
        set_limits(cgroup, limits)
        undo.pop_all()
    return workload


def check_budget(limits: Limits, budget: Limits, purpose: str) -> None:
    """Check a workload's limits against the budget of its purpose.

    :raises ValueRefused: the one workload could use more than all of the purpose together.
    """
    pairs = (
        ("memory", limits.memory.max, budget.memory.max, "bytes"),
        ("cpus", limits.cpu.cpus, budget.cpu.cpus, "cores"),
        ("pids", limits.pids.max, budget.pids.max, "processes"),
    )
    for name, one, together, unit in pairs:
        if isinstance(one, int | float) and isinstance(together, int | float) and one > together:
            raise ValueRefused(
                f"{name} is {one:g} {unit}, but all workloads of {purpose} together have {together:g}"
                if isinstance(one, float)
                else f"{name} is {one} {unit}, but all workloads of {purpose} together have {together}",
                hint=f"Lower {name}, or raise budget_{name}",
            )


def remove_workload(tree: Tree, purpose: str, id: str, seconds: float = 10.0) -> None:
    """Kill what is in a workload's directory and remove it, with the cgroups that the workload made in it. Empty levels
    above it are removed too. Success if it is gone already; may be called twice, also at the same time.

    :raises CgroupBusy: its processes don't end within ``seconds``.
    """
    with suppress(CgroupGone), open_cgroup(tree.mount, tree.purpose(purpose)) as above:
        _remove_whole(above, id, time.monotonic() + seconds)
    _remove_empty_levels(tree, purpose)


def list_workloads(tree: Tree) -> tuple[tuple[str, str], ...]:
    """Purpose and id of every workload's directory."""
    found = []
    with suppress(CgroupGone), open_cgroup(tree.mount, tree.root) as root:
        for purpose in root.children():
            with suppress(CgroupGone), root.child(purpose) as level:
                found += [(purpose, id) for id in level.children()]
    return tuple(found)


def take_over(tree: Tree, purpose: str, id: str) -> Workload | None:
    """Lock the directory of a workload whose maker is dead. None when the maker lives, or the directory is gone."""
    with suppress(CgroupGone), ExitStack() as undo:
        cgroup = undo.enter_context(open_cgroup(tree.mount, tree.workload(purpose, id)))
        if not _lock(cgroup):
            return None
        with open_cgroup(tree.mount, tree.workload(purpose, id)) as now:
            if not os.path.sameopenfile(now.fileno(), cgroup.fileno()):
                return None
        undo.pop_all()
        return Workload(tree, purpose, id, cgroup)
    return None


def remove_abandoned(tree: Tree, seconds: float = 10.0, *, dry_run: bool = False) -> tuple[str, ...]:
    """Remove directories that dead workers left and that hold no process; return their ids. ``dry_run`` only returns them.

    A directory with processes is kept: its container may belong to another worker by now, and goes with that container.

    :raises CgroupBusy: a process came in meanwhile and does not end within ``seconds``; the rest has been removed.
    """
    deadline = time.monotonic() + seconds
    removed, busy = [], None
    for purpose, id in list_workloads(tree):
        try:
            with open_cgroup(tree.mount, tree.workload(purpose, id)) as cgroup:
                if processes.is_populated(cgroup) or not _lock(cgroup):
                    continue
                if not dry_run:
                    remove_workload(tree, purpose, id, max(0.0, deadline - time.monotonic()))
                removed.append(id)
        except CgroupGone:
            continue
        except CgroupBusy as error:
            busy = error
    if busy is not None:
        raise busy
    return tuple(removed)


def _made_and_locked(tree: Tree, purpose: str, id: str, *, required: frozenset[str], budget: Limits) -> Cgroup:
    """One attempt of ``make_workload``.

    :raises CgroupGone: another worker removed the directory, or a level above it, meanwhile.
    """
    with _level(tree, purpose, required | budget.controllers) as level:
        if budget != NO_LIMITS:
            set_limits(level, budget)
        made = level.make_child(id)
        cgroup = level.child(id)
        try:
            if not _lock(cgroup):
                if made:
                    raise CgroupGone(f"{cgroup.path} is taken for a left-over")
                raise CgroupBusy(
                    f"{cgroup.path} belongs to another process", hint="Each workload needs an id of its own"
                )
            # From now on the lock keeps it. But it may have been removed before, and another one made in its place.
            with level.child(id) as now:
                if not os.path.sameopenfile(now.fileno(), cgroup.fileno()):
                    raise CgroupGone(f"{cgroup.path} has been removed")
        except BaseException:
            cgroup.close()
            raise
        return cgroup


def _level(tree: Tree, purpose: str, required: frozenset[str]) -> Cgroup:
    """The purpose's directory, made if need be, with controllers enabled for what is below it."""
    cgroup = open_cgroup(tree.mount, tree.delegated)
    try:
        _hand_down(cgroup, required)
        for name in _below(tree, purpose):
            cgroup.make_child(name)
            following = cgroup.child(name)
            cgroup.close()
            cgroup = following
            _hand_down(cgroup, required)
    except BaseException:
        cgroup.close()
        raise
    return cgroup


def _below(tree: Tree, purpose: str) -> list[str]:
    return tree.purpose(purpose)[len(tree.delegated) :].strip("/").split("/")


def _hand_down(cgroup: Cgroup, required: frozenset[str]) -> None:
    """Enable the controllers for the cgroups below this one: those that are required, and the others if possible."""
    available = set(cgroup.read("cgroup.controllers").split())
    missing = required - available
    if missing:
        raise ControllerMissing(
            f"{cgroup.path} does not have the controller {', '.join(sorted(missing))}, only: "
            f"{', '.join(sorted(available)) or 'none'}",
            hint="In a systemd unit, set Delegate=yes; the kernel may also be built without it",
        )
    enabled = set(cgroup.read(SUBTREE_CONTROL).split())
    for name in CONTROLLERS:
        if name in available and name not in enabled:
            # One at a time: a kernel that refuses one (cpu, when there are realtime processes) refuses the whole line.
            try:
                _enable(cgroup, name)
            except CgroupGone:
                raise
            except CgroupError:
                if name in required or name == "memory":
                    raise


def _enable(cgroup: Cgroup, controller: str) -> None:
    try:
        cgroup.write(SUBTREE_CONTROL, f"+{controller}")
    except CgroupBusy:
        if not _is_own_unit(cgroup):
            raise
        _vacate(cgroup)
        cgroup.write(SUBTREE_CONTROL, f"+{controller}")


def _is_own_unit(cgroup: Cgroup) -> bool:
    """Whether this process is directly in it: then it is a delegated unit of ours, in which we may move processes."""
    return os.getpid() in processes.members(cgroup)


def _vacate(cgroup: Cgroup) -> None:
    """Move the processes of a delegated unit one level down, as systemd's DelegateSubgroup= does from 254 on."""
    cgroup.make_child(WORKER)
    with cgroup.child(WORKER) as worker:
        for _ in range(_TRIES):
            here = processes.members(cgroup)
            if not here:
                return
            for pid in here:
                # It may have ended meanwhile. A process that can't be moved for another reason just stays.
                with suppress(CgroupError):
                    processes.move(worker, pid)


def _lock(cgroup: Cgroup) -> bool:
    try:
        fcntl.flock(cgroup.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_whole(above: Cgroup, name: str, deadline: float) -> None:
    def remove() -> None:
        with above.child(name) as cgroup:
            processes.kill_all(cgroup)
            processes.wait_until_empty(cgroup, max(0.0, deadline - time.monotonic()))
            cgroup.remove_below()
        above.remove_child(name)

    processes.remove_when_free(remove, deadline)


def _remove_empty_levels(tree: Tree, purpose: str) -> None:
    names = _below(tree, purpose)
    for depth in range(len(names), 0, -1):
        above = "/".join(part for part in (tree.delegated, *names[: depth - 1]) if part)
        try:
            with open_cgroup(tree.mount, above) as level:
                level.remove_child(names[depth - 1])
        except CgroupGone:
            continue
        except CgroupError:
            return
