"""Where a container's cgroup is.

On cgroup v2 it is below a directory of ours, which has the limits and outlives it, so that its counters can be read when
the container is gone. Elsewhere the runtime makes it alone, and writes the limits itself.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import (
    LEAF,
    NO_LIMITS,
    CgroupDenied,
    CgroupError,
    CgroupGone,
    ControllerMissing,
    Hierarchy,
    Limits,
    NotUnified,
    Tree,
    ValueRefused,
    Workload,
    budget_of,
    check_limits,
    find_hierarchy,
    find_tree,
    limits_of,
    list_workloads,
    make_workload,
    open_cgroup,
    read_statistics,
    remove_workload,
)
from airflow_isolation.container_spec import Resources
from airflow_isolation.errors import ContainerFailed, ContainerRuntimeError, SpecRefused
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.counted import stats_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import Stats

#: The level of a purpose, by the label of its containers.
LEVELS = {"task": "task_execution", "parse": "dag_parsing"}
_OTHERS = "others"
_EVERYWHERE = frozenset({"cpus", "memory", "pids", "oom_group"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """``cgroups_path`` is for the runtime-spec, and so are ``resources``; where ``tree`` is set, limits are ours to write."""

    id: str
    cgroups_path: str
    resources: Resources
    tree: Tree | None = None
    level: str = ""
    limits: Limits = NO_LIMITS
    budget: Limits = NO_LIMITS


class Placements:
    """The places of one daemon's containers in the cgroups mounted at ``mount_path``. Usable from several threads."""

    def __init__(self, mount_path: str) -> None:
        self._mount_path = Path(mount_path)
        # Locked for as long as this process lives, or until they are removed.
        self._workloads: dict[str, Workload] = {}

    def plan(self, id: str, spec: ContainerSpec, parent: str) -> Placement:
        """Decide, and make nothing.

        :raises SpecRefused: a limit that can't be, or one that needs cgroup v2 where it is not.
        """
        try:
            tree = self._tree(parent)
        except CgroupError as error:
            refuse_what_needs_v2(spec, error)
            return Placement(id=id, cgroups_path=f"/{parent}/{id}", resources=spec.resources)
        level = LEVELS.get(spec.labels.get(labels.PURPOSE, ""), _OTHERS)
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

    def make(self, placement: Placement) -> None:
        """Make and lock the directory that was planned; ``remove`` takes it away.

        :raises SpecRefused: a limit that this host can't have, or more than the budget.
        :raises ContainerFailed: with the kernel's reason.
        """
        if placement.tree is None:
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

    def remove(self, id: str, cgroups_path: str, seconds: float) -> None:
        """Remove the directory around a container's cgroup, by whomever it was made. Gone already is success.

        :raises ContainerRuntimeError: processes in it don't end within ``seconds``.
        """
        *root, level, workload, leaf = ["", "", "", *cgroups_path.strip("/").split("/")]
        if (workload, leaf) != (id, LEAF):
            return  # the runtime's own, which it removes itself
        tree = Tree(
            mount=self._mount_path, root="/".join(part for part in root if part), delegated=self._hierarchy.delegated
        )
        try:
            remove_workload(tree, level, id, seconds)
        except NotUnified:
            return  # another host's, or before a reboot
        except CgroupError as error:
            raise ContainerRuntimeError(error.message, hint=error.hint) from error
        self._forget(id)

    def stats(self, ids: frozenset[str], parent: str) -> Mapping[str, Stats]:
        """Counters of those that have a directory of ours and somebody in it, read from the kernel."""
        try:
            tree = self._tree(parent)
        except CgroupError:
            return {}
        found = {}
        for level, id in list_workloads(tree):
            if id not in ids:
                continue
            with suppress(CgroupGone), open_cgroup(tree.mount, tree.workload(level, id)) as cgroup:
                now = read_statistics(cgroup)
                if (stats := stats_of(now)) is not None:
                    found[id] = stats
        return found

    def _forget(self, id: str) -> None:
        """Unlock a directory that is gone; another process may have removed it."""
        held = self._workloads.pop(id, None)
        if held is not None:
            held.close()

    @cached_property
    def _hierarchy(self) -> Hierarchy:
        return find_hierarchy(self._mount_path)

    def _tree(self, parent: str) -> Tree:
        """:raises CgroupError: limits can't be written by us here."""
        hierarchy = self._hierarchy
        tree = find_tree(hierarchy, parent)
        if (hierarchy.mount / "cgroup.type").exists():
            raise CgroupDenied(
                f"{hierarchy.mount} is not the root of the host's cgroups, but of a cgroup namespace, and the daemon does "
                "not see it so",
                hint="Run the worker outside of a container, or in one with the host's cgroup namespace",
            )
        if os.geteuid() != 0 and not hierarchy.delegated:
            raise CgroupDenied(
                "the worker's user may not make cgroups",
                hint="Run the worker as root, or in a systemd unit with Delegate=yes",
            )
        return tree


def refuse_what_needs_v2(spec: ContainerSpec, reason: CgroupError) -> None:
    """:raises SpecRefused: naming what was asked for."""
    asked = [
        field.name
        for field in fields(Resources)
        if field.name not in _EVERYWHERE and getattr(spec.resources, field.name) not in (None, ())
    ]
    asked += [f"budget_{name}" for name in ("cpus", "memory", "pids") if getattr(spec.budget, name) is not None]
    if asked:
        raise SpecRefused(
            f"{', '.join(asked)} can't be had: it takes cgroup v2 in our own hands, and {reason.message}",
            hint=reason.hint,
        )
