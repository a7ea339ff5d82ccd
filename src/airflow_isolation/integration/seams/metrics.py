"""Sends what a try has used as Airflow metrics."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from airflow.sdk.configuration import conf
from airflow.sdk.observability import stats
from airflow.sdk.observability.metrics import stats_utils

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.cgroups import Usage

_PREFIX = "airflow_isolation.task"


def record(usage: Usage, *, tags: Mapping[str, str]) -> None:
    """Send each known value: times as timers in milliseconds, bytes and counts as gauges."""
    _initialize(os.getpid())
    seconds = {
        "wall": usage.wall,
        "cpu": usage.cpu,
        "cpu_user": usage.cpu_user,
        "cpu_system": usage.cpu_system,
        "cpu_throttled": usage.cpu_throttled,
    }
    counts = {
        "memory_peak": usage.memory_peak,
        "memory_limit": usage.memory_limit,
        "pids_peak": usage.pids_peak,
        "bytes_read": usage.bytes_read,
        "bytes_written": usage.bytes_written,
    }
    for name, value in seconds.items():
        if value is not None:
            stats.timing(f"{_PREFIX}.{name}", value * 1000, tags=dict(tags))
    for name, count in counts.items():
        if count is not None:
            stats.gauge(f"{_PREFIX}.{name}", count, tags=dict(tags))
    if usage.oom_kills:
        stats.incr(f"{_PREFIX}.oom_kills", usage.oom_kills, tags=dict(tags))


@cache
def _initialize(_pid: int) -> None:
    """Initialize metrics once for each process.

    In a worker Airflow doesn't, for the copy of the metrics API that tasks use.
    """
    stats.initialize(
        factory=stats_utils.get_stats_factory(),
        export_legacy_names=conf.getboolean("metrics", "legacy_names_on"),
    )
