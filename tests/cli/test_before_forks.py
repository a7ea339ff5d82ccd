"""The process that forks the workers, with the flag set: what it has done for them, in a Python of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

LOOK = """
import json, os, sys
import airflow
import airflow.cli.commands.scheduler_command
from airflow.sdk.api.client import Client
from airflow_isolation.bridge import zygote
print(json.dumps({
    "threads": len(os.listdir("/proc/self/task")),
    "sockets": sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket") for fd in os.listdir("/proc/self/fd")
                   if os.path.lexists(f"/proc/self/fd/{fd}")),
    "certificates": Client._get_ssl_context_cached.cache_info().currsize,
    "filters": zygote._compiled.cache_info().currsize,
    "runtime": [name for name in sys.modules if name.startswith("airflow_isolation.runtime.")],
}))
"""


def look(home: Path, flag: str) -> dict[str, Any]:
    environment = {**os.environ, "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": flag}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("flag", ["containerd", "docker"])
def test_everything_is_ready_and_nothing_has_begun(tmp_path: Path, flag: str) -> None:
    found = look(tmp_path, flag)
    assert found["certificates"] == 1
    assert found["filters"] == 1
    assert f"airflow_isolation.runtime.{flag}" in found["runtime"]
    # A fork would lose the one, and share the other.
    assert found["threads"] == 1
    assert found["sockets"] == 0


def test_without_the_flag_nothing_is_done(tmp_path: Path) -> None:
    found = look(tmp_path, "")
    assert found["certificates"] == 0
    assert found["filters"] == 0
