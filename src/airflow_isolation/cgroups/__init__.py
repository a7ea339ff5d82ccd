"""cgroup v2, explicit: one module for each controller, the tree of the workloads' cgroups, and what the counters say.

    hierarchy = find_hierarchy(Path("/sys/fs/cgroup"))
    tree = find_tree(hierarchy, "airflow")                       # raises NotUnified on a v1 or hybrid host
    workload = make_workload(tree, "task_execution", id, limits)  # directory, limits, lock
    before = take_sample(workload.cgroup, tree)
    ...                                                          # the runtime works in workload.leaf
    usage = usage_of(read_statistics(workload.cgroup), wall=seconds)
    verdict = attribute(before, take_sample(workload.cgroup, tree), killed=True, victims=read_victims(id))
    workload.remove()

Never imports airflow.
"""

from airflow_isolation.cgroups.by_name import SameName, names_below, places_of
from airflow_isolation.cgroups.counters import Counters, counters_at, counters_of_process
from airflow_isolation.cgroups.cpu import Cpu, CpuStat
from airflow_isolation.cgroups.cpuset import Cpuset, CpusetStat
from airflow_isolation.cgroups.directory import MAX, Cgroup, Max, open_cgroup
from airflow_isolation.cgroups.errors import (
    CgroupBusy,
    CgroupDenied,
    CgroupError,
    CgroupGone,
    ControllerMissing,
    NotUnified,
    ValueRefused,
)
from airflow_isolation.cgroups.hierarchy import Hierarchy, find_hierarchy
from airflow_isolation.cgroups.io import Io, IoStat
from airflow_isolation.cgroups.kernel_log import Victim, read_victims
from airflow_isolation.cgroups.limits import (
    NO_LIMITS,
    Limits,
    budget_of,
    change_limits,
    change_of,
    check_limits,
    limits_of,
    read_limits,
    set_limits,
)
from airflow_isolation.cgroups.memory import Memory, MemoryEvents, MemoryStat, throttle_from
from airflow_isolation.cgroups.mounted import UNIFIED, CgroupMounts, find_mounts, paths_of_process
from airflow_isolation.cgroups.out_of_memory import Limit, MemorySample, OutOfMemory, attribute, take_sample
from airflow_isolation.cgroups.pids import Pids, PidsStat
from airflow_isolation.cgroups.pressure import Pressure, Stall
from airflow_isolation.cgroups.slices import slice_below, slice_name, slice_path
from airflow_isolation.cgroups.statistics import PressureStat, Statistics, read_statistics
from airflow_isolation.cgroups.systemd import check_reach, limit_slice, limits_of_slice
from airflow_isolation.cgroups.tree import (
    LEAF,
    OTHERS,
    PARSING,
    TASKS,
    Tree,
    Workload,
    check_budget,
    find_tree,
    list_workloads,
    make_workload,
    remove_abandoned,
    remove_workload,
    take_over,
)
from airflow_isolation.cgroups.usage import Usage, usage_of

__all__ = [
    "LEAF",
    "MAX",
    "NO_LIMITS",
    "OTHERS",
    "PARSING",
    "TASKS",
    "UNIFIED",
    "Cgroup",
    "CgroupBusy",
    "CgroupDenied",
    "CgroupError",
    "CgroupGone",
    "CgroupMounts",
    "ControllerMissing",
    "Counters",
    "Cpu",
    "CpuStat",
    "Cpuset",
    "CpusetStat",
    "Hierarchy",
    "Io",
    "IoStat",
    "Limit",
    "Limits",
    "Max",
    "Memory",
    "MemoryEvents",
    "MemorySample",
    "MemoryStat",
    "NotUnified",
    "OutOfMemory",
    "Pids",
    "PidsStat",
    "Pressure",
    "PressureStat",
    "SameName",
    "Stall",
    "Statistics",
    "Tree",
    "Usage",
    "ValueRefused",
    "Victim",
    "Workload",
    "attribute",
    "budget_of",
    "change_limits",
    "change_of",
    "check_budget",
    "check_limits",
    "check_reach",
    "counters_at",
    "counters_of_process",
    "find_hierarchy",
    "find_mounts",
    "find_tree",
    "limit_slice",
    "limits_of",
    "limits_of_slice",
    "list_workloads",
    "make_workload",
    "names_below",
    "open_cgroup",
    "paths_of_process",
    "places_of",
    "read_limits",
    "read_statistics",
    "read_victims",
    "remove_abandoned",
    "remove_workload",
    "set_limits",
    "slice_below",
    "slice_name",
    "slice_path",
    "take_over",
    "take_sample",
    "throttle_from",
    "usage_of",
]
