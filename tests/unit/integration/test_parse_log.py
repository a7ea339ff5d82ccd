"""The log of a DAG file on a disk that is full, or gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from airflow_isolation.integration.dag_processing.log import ParseLog

if TYPE_CHECKING:
    from pathlib import Path


def test_lines_are_in_the_file_at_once_and_after_those_of_earlier_parses(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("earlier\n")
    with ParseLog(lambda: path) as log:
        structlog.BytesLogger(log).info(b"line")  # type: ignore[arg-type]
        assert path.read_text() == "earlier\nline\n"


def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    log = ParseLog(lambda: "/dev/full")
    logger = structlog.BytesLogger(log)  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as told:
        logger.info(b"line")
        logger.info(b"line")
    assert [entry["log_level"] for entry in told] == ["error"]
    log.close()
    log.close()


def test_a_file_that_can_not_be_made_is_told_of(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as told:
        log = ParseLog(lambda: tmp_path / "no-such-directory" / "a.log")
    assert "No such file" in told[0]["error"]
    assert log.write(b"line") == 4
