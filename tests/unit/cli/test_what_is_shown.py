"""From a container to what programs get of it."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from airflow_isolation.integration.cli import images
from airflow_isolation.integration.cli.inspection import record
from airflow_isolation.integration.cli.listing import row
from airflow_isolation.integration.cli.stats import Reading
from airflow_isolation.integration.cli.stats import row as stats_row
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import Container, ContainerState, ExitStatus, Progress, RuntimeInfo, Stats

if TYPE_CHECKING:
    import pytest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def test_a_tasks_row_has_seconds_bytes_and_numbers() -> None:
    container = Container(
        id="task-1",
        state=ContainerState.RUNNING,
        image="sales:1",
        created_at=NOW - timedelta(seconds=90),
        labels={
            labels.PURPOSE: "task",
            labels.DAG_ID: "sales",
            labels.RUN_ID: "manual",
            labels.TASK_ID: "load",
            labels.MAP_INDEX: "3",
            labels.TRY_NUMBER: "2",
        },
    )
    assert row("docker", container, Stats(cpu_seconds=1.23456, memory=1024), NOW) == {
        "backend": "docker",
        "container": "task-1",
        "purpose": "task",
        "dag": "sales",
        "run": "manual",
        "task": "load",
        "map_index": 3,
        "try": 2,
        "image": "sales:1",
        "state": "running",
        "age": 90.0,
        "cpu": 1.235,
        "memory": 1024,
    }


def test_a_parses_row_names_its_file_and_lacks_the_rest() -> None:
    container = Container(
        id="parse-1",
        state=ContainerState.CREATED,
        image="sales:1",
        labels={labels.PURPOSE: "parse", labels.DAG_FILE: "sales.py"},
    )
    shown = row("containerd", container, Stats(), NOW)
    assert (shown["dag"], shown["task"], shown["try"], shown["age"], shown["cpu"]) == (
        "sales.py",
        None,
        None,
        None,
        None,
    )


def test_labels_that_are_not_numbers_are_no_reason_to_fail() -> None:
    container = Container(
        id="x", state=ContainerState.UNKNOWN, image="", labels={labels.MAP_INDEX: "three", labels.TRY_NUMBER: ""}
    )
    shown = row("containerd", container, Stats(), NOW)
    assert (shown["map_index"], shown["try"]) == (None, None)


def test_an_inspected_container_tells_how_it_ended_and_whose_it_is() -> None:
    container = Container(
        id="task-1",
        state=ContainerState.STOPPED,
        image="sales:1",
        created_at=NOW,
        exit_status=ExitStatus(code=137, exited_at=NOW),
        labels={labels.OWNER: "12:345@elsewhere", "team": "sales"},
    )
    info = RuntimeInfo(backend="containerd", version="2.1", socket_path="/socket", namespace="airflow")
    shown = record(info, container, Stats())
    assert (shown["exit_code"], shown["exited_at"], shown["pid"]) == (137, "2026-01-02T03:04:05+00:00", None)
    assert shown["owner"] == {"host": "elsewhere", "pid": 12, "gone": False}
    assert shown["labels"]["team"] == "sales"


def reading(at: float, stats: Stats) -> Reading:
    container = Container(
        id="task-1",
        state=ContainerState.RUNNING,
        image="sales:1",
        labels={labels.DAG_ID: "sales", labels.TASK_ID: "load"},
    )
    return Reading("docker", container, stats, at)


def test_the_share_of_processors_is_between_two_readings() -> None:
    before = reading(10, Stats(cpu_seconds=5))
    now = reading(12, Stats(cpu_seconds=8, memory=1024, pids=2, oom_kills=1))
    assert stats_row(now, before) == {
        "backend": "docker",
        "container": "task-1",
        "dag": "sales",
        "task": "load",
        "cpu_percent": 150.0,
        "cpu_seconds": 8,
        "cpu_throttled": None,
        "memory": 1024,
        "memory_limit": None,
        "memory_peak": None,
        "oom_kills": 1,
        "pids": 2,
        "pids_limit": None,
        "bytes_read": None,
        "bytes_written": None,
        "cpu_pressure": None,
        "memory_pressure": None,
        "io_pressure": None,
    }


def test_without_an_earlier_reading_the_share_is_not_known() -> None:
    now = reading(12, Stats(cpu_seconds=8))
    assert stats_row(now, None)["cpu_percent"] is None
    assert stats_row(now, reading(12, Stats(cpu_seconds=7)))["cpu_percent"] is None
    assert stats_row(now, reading(11, Stats()))["cpu_percent"] is None


def test_what_an_archive_says_of_itself_is_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with images.shown_progress() as progress:
        progress(Progress(name="other:1", event="passed over (made for [/bold]/[red]x)", done=0, total=0))
    assert "passed over (made for [/bold]/[red]x) other:1" in capsys.readouterr().err
