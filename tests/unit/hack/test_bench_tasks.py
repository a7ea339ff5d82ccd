"""`hack/bench tasks`: what is reckoned from its samples, shown and kept."""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from tests.unit.hack.bench_modules import bench_module

if TYPE_CHECKING:
    from pathlib import Path

task_figures = bench_module("task_figures")
whole_airflow = bench_module("whole_airflow")
metadata = bench_module("metadata")
picture = bench_module("picture")
tasks = bench_module("tasks")

GOOD = {"state": "success", "queued": 100.0, "started": 100.5, "ended": 101.0, "released": 101.25}


def task(**values: Any) -> Any:
    return task_figures.TaskTimes(**{**GOOD, **values})


def batch(*of: Any, **values: Any) -> Any:
    given = {"mode": "stock", "size": len(of), "round": 0, "cpu_seconds": 1.0, "busy_seconds": 2.0, "elapsed": 3.0}
    return task_figures.Batch(tasks=of, **{**given, **values})


def report(*batches: Any, memory: tuple[Any, ...] = ()) -> Any:
    return task_figures.TasksReport(batches, memory, {"cores": "2"})


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_times_are_counted_from_the_queue() -> None:
    found = task_figures.figures([batch(task(), task(started=103.0, ended=104.0, released=104.5))])
    assert found.to_running.seconds == (0.5, 3.0)
    assert found.to_success.seconds == (1.0, 4.0)
    assert found.release.seconds == (0.25, 0.5)


def test_percentiles_are_samples() -> None:
    found = task_figures.figures([batch(*(task(ended=100.0 + number) for number in range(1, 101)))])
    assert [found.to_success.percentile(percent) for percent in (50, 95, 100)] == [50, 95, 100]


def test_a_slot_that_was_free_before_the_last_word_was_written_is_free_at_once() -> None:
    assert task_figures.figures([batch(task(released=100.9))]).release.seconds == (0.0,)


def test_failed_tasks_are_counted_and_their_times_are_not() -> None:
    found = task_figures.figures([batch(task(), task(state="failed", ended=100.1))])
    assert (found.number, found.failed) == (2, 1)
    assert found.to_success.seconds == (1.0,)


def test_the_rate_is_that_from_the_first_queued_to_the_last_ended() -> None:
    assert task_figures.tasks_per_second(batch(task(), task(queued=101.0, ended=104.0))) == 0.5


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(batch(task(), task(), size=1), id="one-after-another"),
        pytest.param(batch(task(), task(state="failed")), id="one-failed"),
    ],
)
def test_no_rate_where_it_would_mislead(given: Any) -> None:
    assert task_figures.tasks_per_second(given) is None


def test_cpu_seconds_are_those_of_one_task() -> None:
    found = task_figures.figures([batch(task(), task(), cpu_seconds=3.0), batch(task(), task(), cpu_seconds=5.0)])
    assert found.cpu.seconds == (1.5, 2.5)


def test_a_table_shows_the_median_round_and_the_spread() -> None:
    batches = [batch(task(), task(ended=100.0 + 2 / rate), round=rate) for rate in (2, 0.5, 1)]
    shown = printed(task_figures.table(2, [task_figures.figures(batches)]))
    assert "2 mapped tasks at once" in shown
    assert "1.00 (0.50-2.00)" in shown


def test_a_table_has_a_dash_where_nothing_was_measured() -> None:
    shown = printed(task_figures.table(1, [task_figures.figures([batch(task(state="failed"), size=1)])]))
    assert shown.splitlines()[-1].split()[:6] == ["stock", "1", "1", "-", "-", "-"]


def test_memory_is_shown_for_one_task() -> None:
    mebibyte = 1024 * 1024
    sample = task_figures.MemorySample(
        mode="fork",
        idle=100 * mebibyte,
        peak=50 * mebibyte,
        peak_size=64,
        held=8,
        beyond_idle=320 * mebibyte,
        by_role={"shim": 80 * mebibyte},
    )
    row = printed(task_figures.memory_table([sample])).splitlines()[-1]
    assert row.split() == ["fork", "100", "MiB", "50", "MiB", "64", "40", "MiB", "10", "MiB"]


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    sample = task_figures.MemorySample("stock", 1, 2, 64, 8, 3, {"shim": 1})
    kept = report(batch(task(), started={"fork": 1}), memory=(sample,))
    kept.save(tmp_path / "tasks.json")
    assert task_figures.TasksReport.from_json(json.loads((tmp_path / "tasks.json").read_text())) == kept


def test_modes_and_sizes_stay_in_their_order() -> None:
    found = report(batch(task(), mode="stock"), batch(task(), mode="fork"), batch(task(), task(), mode="stock"))
    assert (found.modes, found.sizes) == (["stock", "fork"], [1, 2])
    assert [each.mode for each in found.figures(2)] == ["stock"]


def test_tasks_that_did_not_start_as_the_mode_says_are_told() -> None:
    started = {"fork": 18, "fresh": 2}
    told = report(batch(task(), mode="docker-fork", started=started), batch(task())).surprises()
    assert told == ["docker-fork: of 20 tasks, these were not started by fork: 2 fresh"]


def test_nothing_is_told_of_tasks_that_started_as_the_mode_says() -> None:
    assert report(batch(task(), mode="fork", started={"fork": 3}), batch(task(), mode="stock")).surprises() == []


def test_a_log_tells_how_its_container_was_started() -> None:
    begins = json.dumps({"event": whole_airflow.IN_A_CONTAINER, "start_mode": "fork"})
    assert whole_airflow.start_mode(f"not JSON\n{json.dumps({'event': 'other'})}\n{begins}\n") == "fork"


def test_a_log_of_stock_airflow_tells_none() -> None:
    assert whole_airflow.start_mode('{"event": "Done"}\n') == ""


@pytest.mark.parametrize(
    "moment",
    ["1970-01-01 00:00:01.500000", datetime(1970, 1, 1, 0, 0, 1, 500000, tzinfo=timezone.utc)],
    ids=["SQLite", "PostgreSQL"],
)
def test_databases_times_are_utc(moment: Any) -> None:
    assert metadata.epoch(moment) == 1.5


def test_a_time_that_is_not_there_yet() -> None:
    assert metadata.epoch(None) is None


def test_a_picture_shows_the_latency_of_the_smallest_and_the_rate_of_the_largest() -> None:
    many = [batch(task(), task(), round=number) for number in range(3)]
    shown = picture.panels(report(batch(task(), size=1), *many))
    assert [panel.title.partition(":")[0] for panel in shown] == ["One task", "2 mapped tasks", "2 mapped tasks"]
    assert [panel.bars[0].value for panel in shown] == [1.0, 2.0, 0.5]


@pytest.mark.parametrize("kind", ["taskflow", "operator"])
@pytest.mark.parametrize("size", [1, 20])
def test_dag_files_are_python(kind: str, size: int, tmp_path: Path) -> None:
    file = tmp_path / "dag.py"
    file.write_text(tasks.dag_file(kind, size, "nothing", image="some/image:1", socket="/run/some.sock"))
    compile(file.read_text(), str(file), "exec")
    assert tasks.dag_name(kind, size, "nothing") in file.read_text()


@pytest.mark.parametrize("given", ["stock,unheard-of", ""])
def test_unknown_modes_are_refused(given: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"no mode '(unheard-of)?'; there are stock"):
        tasks.modes_of(given)
