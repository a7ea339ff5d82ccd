"""Reads the counters of a task from containerd's answer: in the form of cgroup v2, or of v1 on v1 and hybrid hosts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from airflow_isolation.containerd.api import cgroups_v1_pb2, cgroups_v2_pb2
from airflow_isolation.containerd.payload import holds, unpack
from airflow_isolation.runtime.interface import Stats

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

# "No limit" is shown as the largest number that fits, which the kernel rounds in several ways.
_HOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def task_stats(data: AnyMessage) -> Stats | None:
    """The counters; None for an unknown form."""
    if holds(data, cgroups_v2_pb2.Metrics):
        v2 = unpack(data, cgroups_v2_pb2.Metrics)
        return Stats(
            cpu_seconds=v2.cpu.usage_usec / 1e6,
            memory=v2.memory.usage,
            memory_limit=_limit(v2.memory.usage_limit),
            # containerd has this counter from 2.0 on.
            memory_peak=v2.memory.max_usage or None,
            pids=v2.pids.current,
        )
    if holds(data, cgroups_v1_pb2.Metrics):
        v1 = unpack(data, cgroups_v1_pb2.Metrics)
        return Stats(
            cpu_seconds=v1.cpu.usage.total / 1e9,
            memory=v1.memory.usage.usage,
            memory_limit=_limit(v1.memory.usage.limit),
            memory_peak=v1.memory.usage.max or None,
            pids=v1.pids.current,
        )
    return None


def _limit(limit: int) -> int | None:
    return limit if 0 < limit < _HOST_MEMORY else None
