"""Decides where a container's cgroup is, and who writes its limits.

On cgroup v2 the cgroup is below a directory that we make. That directory has the limits, and its counters can still be read
when the container is gone. Elsewhere the runtime makes the cgroup and writes the limits itself.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from airflow_isolation.cgroups import (
    LEAF,
    NO_LIMITS,
    OTHERS,
    PARSING,
    TASKS,
    CgroupDenied,
    CgroupError,
    CgroupGone,
    ControllerMissing,
    Hierarchy,
    Limits,
    NotUnified,
    SameName,
    Tree,
    ValueRefused,
    Workload,
    budget_of,
    change_limits,
    change_of,
    check_budget,
    check_limits,
    check_reach,
    find_hierarchy,
    find_tree,
    limit_slice,
    limits_of,
    limits_of_slice,
    list_workloads,
    make_workload,
    names_below,
    open_cgroup,
    read_limits,
    read_statistics,
    remove_abandoned,
    remove_workload,
    slice_below,
    slice_name,
    slice_path,
    take_over,
)
from airflow_isolation.container_spec import Resources
from airflow_isolation.errors import ContainerFailed, ContainerNotFound, ContainerRuntimeError, SpecRefused
from airflow_isolation.oci import is_container_id
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.counted import stats_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import Stats

#: The directory level of each purpose.
LEVELS = {"task": TASKS, "spare": TASKS, "parse": PARSING}
NO_RESOURCES = Resources()
_ABANDONED_SECONDS = 20.0
_EVERYWHERE = frozenset({"cpus", "memory", "pids", "cpuset", "memory_swap", "oom_group"})
#: cpu.shares. For v2, runtimes translate it, and each release does so in another way.
_ON_V1 = _EVERYWHERE | {"cpu_weight"}
_RUNTIME_PLACED_IT = CgroupError(
    "the container's cgroup is the runtime's",
    hint="Use containerd on a host with cgroup v2, and run the worker as root",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A container's place. ``cgroups_path`` and ``resources`` go into the runtime-spec. With ``tree``, we write the limits.

    ``slice``: the name of the purpose's slice, if systemd manages the cgroups.
    """

    id: str
    cgroups_path: str
    resources: Resources
    tree: Tree | None = None
    slice: str = ""
    level: str = ""
    limits: Limits = NO_LIMITS
    budget: Limits = NO_LIMITS

    @property
    def limit_files(self) -> dict[str, str]:
        """Files of our directory for programs that look for their limits, by name: the runtime's directory has no limits."""
        if self.tree is None:
            return {}
        # Runtimes expect cgroup v2 at this path, even if the worker sees it elsewhere.
        directory = f"/sys/fs/cgroup/{self.tree.workload(self.level, self.id)}"
        limits = {"memory.max": self.limits.memory.max, "cpu.max": self.limits.cpu.cpus}
        return {name: f"{directory}/{name}" for name, limit in limits.items() if limit is not None}


class Placements:
    """The places of one daemon's containers in the cgroups mounted at ``mount_path``. Several threads may use it.

    ``state_dir``: its directory ``cgroup-parents`` records below which cgroups containers have been.
    """

    def __init__(self, mount_path: str, state_dir: Path) -> None:
        self._mount_path = Path(mount_path)
        self._parents = state_dir / "cgroup-parents"
        self._remembered: set[str] = set()
        # They are locked until this process ends or they are removed.
        self._workloads: dict[str, Workload] = {}

    def plan(self, id: str, spec: ContainerSpec, parent: str) -> Placement:
        """Decide the place, but make nothing.

        :raises SpecRefused: a limit is impossible, or needs cgroup v2 on a host without it.
        """
        try:
            tree = self._tree(parent)
        except CgroupError as error:
            refuse_what_needs_v2(spec.resources, error, v1=self._hierarchy.kind != "unified", budget=spec.budget)
            return Placement(id=id, cgroups_path=f"/{parent}/{id}", resources=spec.resources)
        level = LEVELS.get(spec.labels.get(labels.PURPOSE, ""), OTHERS)
        limits = limits_of(spec.resources)
        try:
            check_limits(limits)
            self._hierarchy.require(*limits.controllers)
        except CgroupError as error:
            raise SpecRefused(error.message, hint=error.hint) from error
        return Placement(
            id=id,
            cgroups_path=f"/{tree.leaf(level, id)}",
            resources=Resources(oom_group=spec.resources.oom_group),
            tree=tree,
            level=level,
            limits=limits,
            budget=budget_of(spec.budget),
        )

    def plan_slice(self, id: str, spec: ContainerSpec, parent: str, reason: CgroupError) -> Placement:
        """As ``plan``, when systemd manages the cgroups. The purpose's level is a slice, which has the budget. In it the
        runtime has systemd make a scope, and writes its limits.

        ``reason``: why we can't make a directory around it.

        :raises SpecRefused: a limit needs a directory of ours, a budget is set and systemd can't be given orders, a limit is
            more than the budget, or ``parent`` can't be a slice.
        """
        budget = budget_of(spec.budget)
        refuse_what_needs_v2(spec.resources, reason, v1=False)
        if spec.budget != NO_RESOURCES:
            try:
                check_reach()
            except CgroupError as error:
                refuse_what_needs_v2(NO_RESOURCES, error, v1=False, budget=spec.budget)
        level = LEVELS.get(spec.labels.get(labels.PURPOSE, ""), OTHERS)
        try:
            name = slice_below(slice_name(parent), level)
        except CgroupError as error:
            raise SpecRefused(f"cgroup_parent: {error.message}", hint=error.hint) from error
        try:
            check_budget(limits_of(spec.resources), budget, level)
        except CgroupError as error:
            raise SpecRefused(error.message, hint=error.hint) from error
        return Placement(id=id, cgroups_path="", resources=spec.resources, slice=name, level=level, budget=budget)

    def make(self, placement: Placement) -> None:
        """Make and lock the planned directory; ``remove`` removes it. A slice gets its budget, which stays.

        :raises SpecRefused: this host can't have a limit, or it is more than the budget.
        :raises ContainerFailed: the kernel refused; the error has its reason.
        """
        if placement.tree is None:
            if placement.slice:
                self._limit(placement.slice, placement.budget)
            return
        try:
            workload = make_workload(
                placement.tree, placement.level, placement.id, placement.limits, budget=placement.budget
            )
        except (ValueRefused, ControllerMissing) as error:
            raise SpecRefused(error.message, hint=error.hint) from error
        except CgroupError as error:
            raise ContainerFailed(error.message, hint=error.hint) from error
        self._forget(placement.id)
        self._workloads[placement.id] = workload

    def update(self, id: str, cgroups_path: str, resources: Resources) -> bool:
        """Change the limits of a running container. False: the runtime made its cgroup, and has to change them.

        :raises SpecRefused: this host can't have a limit, it is more than the budget, or less memory than is in use.
        :raises ContainerNotFound: its directory is gone.
        :raises ContainerFailed: the kernel refused; the error has its reason.
        """
        found = self._directory(id, cgroups_path)
        if found is None:
            refuse_what_needs_v2(resources, _RUNTIME_PLACED_IT, v1=self._hierarchy.kind != "unified")
            return False
        tree, level = found
        try:
            with (
                open_cgroup(tree.mount, tree.purpose(level)) as purpose,
                open_cgroup(tree.mount, tree.workload(level, id)) as cgroup,
            ):
                change = change_of(resources, read_limits(cgroup))
                check_budget(change, read_limits(purpose), level)
                change_limits(cgroup, change)
        except (ValueRefused, ControllerMissing) as error:
            raise SpecRefused(error.message, hint=error.hint) from error
        except CgroupGone as error:
            raise ContainerNotFound(f"the container {id} is being removed: {error.message}") from error
        except CgroupError as error:
            raise ContainerFailed(error.message, hint=error.hint) from error
        return True

    def check_slice_budget(self, slice: str, resources: Resources) -> None:
        """Check a container's limits against the budget of its slice.

        :raises SpecRefused: the one container would have more than all in its slice together.
        """
        try:
            check_budget(limits_of(resources), limits_of_slice(self._mount_path, slice), slice)
        except CgroupError as error:
            raise SpecRefused(error.message, hint=error.hint) from error

    def is_ours(self, id: str, cgroups_path: str) -> bool:
        """Whether a container's cgroup is in a directory that we made."""
        return self._directory(id, cgroups_path) is not None

    def remove(self, id: str, cgroups_path: str, seconds: float) -> None:
        """Remove the directory around a container's cgroup, whichever worker made it; or the runtime's own cgroups, if it
        left them. Success if they are gone already.

        :raises ContainerRuntimeError: processes in it don't end within ``seconds``.
        """
        found = self._directory(id, cgroups_path)
        if found is None:
            self._remove_the_runtimes(id, cgroups_path, seconds)
            return
        tree, level = found
        try:
            remove_workload(tree, level, id, seconds)
        except NotUnified:
            return  # it was on another host, or before a reboot
        except CgroupError as error:
            raise ContainerRuntimeError(error.message, hint=error.hint) from error
        self._forget(id)

    def _remove_the_runtimes(self, id: str, cgroups_path: str, seconds: float) -> None:
        """Remove the runtime's cgroups. Usually it does so itself, unless it was killed while it made them."""
        parent, _, name = cgroups_path.strip("/").rpartition("/")
        if name != id or not parent or os.geteuid() != 0:
            return
        with SameName(parent, id) as left:
            try:
                left.remove(seconds)
            except CgroupError as error:
                raise ContainerRuntimeError(error.message, hint=error.hint) from error

    def parents(self, default: str) -> frozenset[str]:
        """The parent cgroups that our containers have had since the host was started, and the ``default``."""
        with suppress(OSError):
            return frozenset({default, *(unquote(path.name) for path in self._parents.iterdir())})
        return frozenset({default})

    def remember(self, parent: str) -> None:
        """Record that containers of ours are below ``parent``, so that any process finds their left-overs.

        May be called twice.

        :raises ContainerFailed: the state directory can't be written.
        """
        if parent in self._remembered:
            return
        try:
            self._parents.mkdir(parents=True, exist_ok=True)
            (self._parents / quote(parent, safe="")).touch()
        except OSError as error:
            raise ContainerFailed(f"{self._parents} can't be written: {error.strerror}") from error
        self._remembered.add(parent)

    def ids(self, parent: str) -> frozenset[str]:
        """The ids of our containers that have a cgroup below ``parent``."""
        tree = self._tree_or_none(parent)
        names = names_below(parent) if tree is None else frozenset(id for _, id in list_workloads(tree))
        return frozenset(name for name in names if is_container_id(name))

    def remove_abandoned(self, parent: str, *, dry_run: bool) -> tuple[str, ...]:
        """As ``cgroups.remove_abandoned``. Empty when there is no tree of ours.

        :raises ContainerRuntimeError: the kernel refused; the error has its reason.
        """
        tree = self._tree_or_none(parent)
        if tree is None:
            return ()
        try:
            return remove_abandoned(tree, _ABANDONED_SECONDS, dry_run=dry_run)
        except CgroupError as error:
            raise ContainerRuntimeError(error.message, hint=error.hint) from error

    def open_all(self, id: str, parent: str) -> tuple[SameName | Workload, ...]:
        """Open all cgroups that a container has now, except those that a living worker has locked.

        The caller closes each.
        """
        tree = self._tree_or_none(parent)
        if tree is None:
            found = SameName(parent, id)
            return (found,) if found else ()
        held = (take_over(tree, level, id) for level in (TASKS, PARSING, OTHERS))
        return tuple(workload for workload in held if workload is not None)

    def stats(self, ids: frozenset[str], parent: str) -> Mapping[str, Stats]:
        """Counters, read from the kernel, of the containers that have a directory of ours with processes in it."""
        tree = self._tree_or_none(parent)
        if tree is None:
            return {}
        found = {}
        for level in (TASKS, PARSING, OTHERS):
            with suppress(CgroupGone), open_cgroup(tree.mount, tree.purpose(level)) as purpose:
                for id in ids.intersection(purpose.children()):
                    with suppress(CgroupGone), purpose.child(id) as cgroup:
                        if (stats := stats_of(read_statistics(cgroup))) is not None:
                            found[id] = stats
        return found

    def _directory(self, id: str, cgroups_path: str) -> tuple[Tree, str] | None:
        """The tree and level of our directory around a container's cgroup; None when there is no such directory."""
        *root, level, workload, leaf = ["", "", "", *cgroups_path.strip("/").split("/")]
        if (workload, leaf) != (id, LEAF):
            return None
        path = "/".join(part for part in root if part)
        return Tree(mount=self._mount_path, root=path, delegated=self._hierarchy.delegated), level

    def _limit(self, slice: str, budget: Limits) -> None:
        try:
            limit_slice(self._mount_path, slice, budget)
        except ValueRefused as error:
            raise SpecRefused(error.message, hint=error.hint) from error
        except CgroupError as error:
            raise ContainerFailed(error.message, hint=error.hint) from error

    def _forget(self, id: str) -> None:
        """Unlock a directory that is gone; another process may have removed it."""
        held = self._workloads.pop(id, None)
        if held is not None:
            held.close()

    @cached_property
    def _hierarchy(self) -> Hierarchy:
        return find_hierarchy(self._mount_path)

    def _tree_or_none(self, parent: str) -> Tree | None:
        try:
            return self._tree(parent)
        except CgroupError:
            return None

    def _tree(self, parent: str) -> Tree:
        """The tree of our directories.

        :raises CgroupError: we can't write limits here.
        """
        hierarchy = self._hierarchy
        tree = find_tree(hierarchy, parent)
        if (hierarchy.mount / "cgroup.type").exists():
            raise CgroupDenied(
                f"{hierarchy.mount} is the root of a cgroup namespace, not of the host's cgroups, so the daemon sees other "
                "paths",
                hint="Run the worker outside of a container, or in one with the host's cgroup namespace",
            )
        if os.geteuid() != 0 and not hierarchy.delegated:
            raise CgroupDenied(
                "the worker's user may not make cgroups",
                hint="Run the worker as root, or in a systemd unit with Delegate=yes",
            )
        return tree


def scope_path(slice: str, docker_id: str) -> str:
    """The path, below the mount, of the cgroup that systemd makes for a container of dockerd."""
    return f"/{slice_path(slice)}/docker-{docker_id}.scope"


def check_cgroup(pid: int, cgroups_path: str) -> None:
    """Check that a process is in its cgroup.

    :raises ContainerFailed: it is in another one, where its limits have no effect (CVE-2025-47291).
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return  # a worker in a pid namespace of its own can't see the process
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory", "pids") and not path.endswith(cgroups_path):
            raise ContainerFailed(
                f"the container's process is in the cgroup {path} instead of {cgroups_path}, where no limit holds it",
                hint="Update containerd and runc",
            )


def refuse_what_needs_v2(
    resources: Resources, reason: CgroupError, *, v1: bool, budget: Resources = NO_RESOURCES
) -> None:
    """Refuse limits that need cgroup v2 in our own hands. ``v1``: the host's controllers are v1's, also on a hybrid host.

    :raises SpecRefused: such a limit is set; the error names it.
    """
    able = _ON_V1 if v1 else _EVERYWHERE
    asked = [
        field.name
        for field in fields(Resources)
        if field.name not in able and getattr(resources, field.name) not in (None, ())
    ]
    asked += [f"budget_{name}" for name in ("cpus", "memory", "pids") if getattr(budget, name) is not None]
    if asked:
        raise SpecRefused(
            f"{', '.join(asked)} can't be had: it takes cgroup v2 in our own hands, and {reason.message}",
            hint=reason.hint,
        )
