"""hack/setup/adopt.py: what a command leaves behind is named and ended, wherever it hides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.processes import wait_until

ADOPT = Path(__file__).resolve().parent.parent.parent / "hack" / "setup" / "adopt.py"


def command(report: Path, script: str) -> list[str]:
    return [sys.executable, str(ADOPT), str(report), "sh", "-c", script]


def test_what_has_its_own_session_and_no_environment_is_named_and_ended(tmp_path: Path) -> None:
    report = tmp_path / "left"
    hides = "setsid env -i sh -c 'sleep 600 & sleep 600'"
    done = subprocess.run(command(report, f"{hides} & sleep 0.5; exit 3"), timeout=60, check=False)
    assert done.returncode == 3
    lines = [line.split(" ", 1) for line in report.read_text().splitlines()]
    assert sum(words == "sleep 600" for _, words in lines) == 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid, _ in lines), 30, "their end")


@pytest.mark.parametrize("script", ["true", "setsid sleep 1 &", "exec sh -c 'kill -KILL $$'"])
def test_a_command_that_leaves_nothing_is_reported_by_its_exit_code_alone(tmp_path: Path, script: str) -> None:
    report = tmp_path / "left"
    done = subprocess.run(command(report, script), timeout=60, check=False)
    assert done.returncode == (137 if "KILL" in script else 0)
    assert not report.exists()


def test_ctrl_c_lets_the_command_undo_what_it_did(tmp_path: Path) -> None:
    ready, undone = tmp_path / "ready", tmp_path / "undone"
    script = f"trap 'touch {undone}; exit 130' INT; touch {ready}; while :; do sleep 0.1; done"
    process = subprocess.Popen(command(tmp_path / "left", script), start_new_session=True)
    wait_until(ready.exists, 60, "its start")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert undone.exists()
