"""A task's log on a terminal."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.integration.cli import outcome
from airflow_isolation.integration.seams import console

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

#: Sets a terminal's title, clears it, and would be a line of the worker's.
HOSTILE = "x\x1b]0;title\x07\x1b[2J\x9b2J\r\n2026-01-01T00:00:00Z [info     ] Task runs in a container"


@pytest.mark.parametrize("logger", [console.task_logger, console.parse_logger])
def test_no_terminal_obeys_what_user_code_logs(
    logger: Callable[[], FilteringBoundLogger], capsys: pytest.CaptureFixture[str]
) -> None:
    logger().log(logging.INFO, HOSTILE, **{f"key{HOSTILE}": HOSTILE, "list": [HOSTILE]}, logger=HOSTILE)
    shown = "".join(capsys.readouterr())
    assert "title" in shown
    first, *others = shown.splitlines()
    assert all(character.isprintable() for character in first)
    assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_no_terminal_obeys_what_stands_in_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    outcome.say(f"The task {HOSTILE} failed.")
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
