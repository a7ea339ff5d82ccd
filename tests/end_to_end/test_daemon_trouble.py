"""The daemon may go and come back: running tasks don't need it, and new ones wait for it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.processes import wait_until

from airflow_isolation.bridge.prune import prune
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Daemon
    from tests.end_to_end.airflow_processes import Airflow

pytestmark = pytest.mark.usefixtures("quiet")


def wait_until_none_is_made(state_dir: Path) -> None:
    """No spare container is being made: dockerd 20.10 leaves the shim of what it starts when it is killed (docs/operations.md)."""
    seen = time.monotonic()

    def settled() -> bool:
        nonlocal seen
        made = {path.stem for path in state_dir.glob("spares/*/*") if path.suffix in (".json", ".claimed")}
        if {socket.stem for socket in state_dir.glob("spares/*/*.sock")} - made:
            seen = time.monotonic()
        return time.monotonic() - seen > 2

    wait_until(settled, 60, "the spare containers that are being made")


@contextmanager
def away(daemon: Daemon, state_dir: Path) -> Iterator[None]:
    """The daemon is down meanwhile."""
    wait_until_none_is_made(state_dir)
    os.kill(daemon.pid, signal.SIGTERM)
    wait_until(lambda: daemon.pid == 0, 30, "the end of the daemon")
    try:
        yield
    finally:
        daemon.start()


def test_a_task_goes_on_when_the_daemon_is_killed_and_started_again(
    airflow: Airflow, daemon: Daemon, state_dir: Path
) -> None:
    airflow.trigger("patient", "killed", name="killed")
    airflow.wait_for_file("killed.running")
    wait_until_none_is_made(state_dir)
    daemon.restart(signal="KILL", pause=2)
    (airflow.shared / "killed.finish").touch()
    run = airflow.finished("patient", "killed")
    assert run.states == {"waits": "success"}
    assert run.tasks["waits"].said("I was told to finish")


def test_a_task_ends_well_while_the_daemon_is_away(
    airflow: Airflow, daemon: Daemon, backend: str, state_dir: Path
) -> None:
    airflow.trigger("patient", "away", name="away")
    airflow.wait_for_file("away.running")
    with away(daemon, state_dir):
        (airflow.shared / "away.finish").touch()
        run = airflow.finished("patient", "away")
        assert run.states == {"waits": "success"}
    with connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=state_dir) as runtime:
        # Its worker tries again by itself; a prune does it now.
        def cleaned_up() -> bool:
            prune(runtime, state_dir=state_dir)
            return not {container.id for container in runtime.list()} & set(run.containers)

        wait_until(cleaned_up, 60, "the clean-up")


def test_a_task_waits_for_a_daemon_that_is_away_and_uses_up_no_try(
    airflow: Airflow, daemon: Daemon, state_dir: Path
) -> None:
    with away(daemon, state_dir):
        airflow.trigger("plain", "waiting")
        wait_until(
            lambda: airflow.task_instances("plain", "waiting")[0]["state"] == "up_for_reschedule",
            120,
            "the postponement",
        )
    run = airflow.finished("plain", "waiting")
    assert run.states == {"works": "success"}
    assert run.tasks["works"].try_number == 1
    assert run.tasks["works"].said("it will be tried again and no try is used up")


def test_a_task_that_is_resumed_while_the_daemon_is_away_keeps_its_event(
    airflow: Airflow, daemon: Daemon, state_dir: Path
) -> None:
    airflow.trigger("resumed", "resumed", name="resumed")

    def state() -> str:
        return str(airflow.task_instances("resumed", "resumed")[0]["state"])

    wait_until(lambda: state() == "deferred", 120, "the deferral")
    with away(daemon, state_dir):
        (airflow.shared / "resumed.go").touch()

        def waits() -> bool:
            log = airflow.logs("resumed", "resumed", "waits").get(1, [])
            return any("it waits here" in str(event.get("event", "")) for event in log)

        wait_until(waits, 120, "the wait for the daemon")
        assert state() == "running"
    run = airflow.finished("resumed", "resumed")
    assert run.states == {"waits": "success"}
    assert run.tasks["waits"].try_number == 1
    assert run.xcoms == {"waits.return_value": ["kept over the wait", "True"]}
    assert (airflow.shared / "resumed.submitted").read_text() == "once\n"
