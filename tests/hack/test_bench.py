"""`hack/bench tasks` with a real Airflow: it ends with a table, and leaves nothing, interrupted or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from tests.conftest import HACK

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(600)


@contextmanager
def bench(place: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The smallest that there is; what it starts lies below ``place``."""
    process = subprocess.Popen(
        [HACK / "bench", "tasks", "--modes=stock", "--tasks=1", "--rounds=1", "--no-memory", *arguments],
        env={**os.environ, "AIRFLOW_ISOLATION_RUN_DIRECTORY": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        with process:
            process.terminate()


def processes_below(place: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(place):
                found.append(process)
    return found


def test_it_prints_a_table_and_keeps_the_samples(tmp_path: Path) -> None:
    place, samples = tmp_path / "place", tmp_path / "tasks.json"
    place.mkdir()
    with bench(place, f"--json={samples}") as process:
        printed, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    [row] = [line.split() for line in printed.splitlines() if line.startswith("stock")]
    assert row[1:3] == ["10", "-"]
    [batch] = json.loads(samples.read_text())["batches"]
    for task in batch["tasks"]:
        assert task["queued"] <= task["started"] <= task["ended"]
        assert task["released"] is not None
    assert batch["cpu_seconds"] > 0
    assert list(place.iterdir()) == []
    assert processes_below(place) == []


def test_interrupted_it_ends_its_airflow(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with bench(place) as process:
        assert process.stderr is not None
        assert any("Starting Airflow" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert list(place.iterdir()) == []
    assert processes_below(place) == []
