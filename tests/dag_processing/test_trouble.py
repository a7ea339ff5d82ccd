"""Trouble of the infrastructure is not the DAGs': they stay as they are, and what could not be done is done later."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest
from tests.conftest import freeze
from tests.dag_processing.dag_processor import HEALTHY, dag_processor
from tests.processes import wait_until

from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Daemon
    from tests.dag_processing.dag_processor import DagProcessor

    from airflow_isolation.runtime.interface import ContainerRuntime

#: More than the stale_dag_threshold and the parsing_cleanup_interval of these tests together.
UNTIL_STALE = 9
TRIED_AGAIN = "The DAG file could not be parsed in a container; it will be tried again"
CALLBACK = """
import sys
from airflow.callbacks.callback_requests import DagCallbackRequest
from airflow.models.db_callback_request import DbCallbackRequest
from airflow.utils.session import create_session

bundle, version, file, dag_id = sys.argv[1:]
request = DagCallbackRequest(
    filepath=file, dag_id=dag_id, run_id="r", bundle_name=bundle, bundle_version=version or None, msg="of the test"
)
with create_session() as session:
    session.add(DbCallbackRequest(priority_weight=1, callback=request))
"""
CALLS_BACK = """
from airflow.sdk import DAG

def call(context):
    print("called back", context["reason"], {mark!r})

dag = DAG({dag_id!r}, schedule=None, on_failure_callback=call)
"""


@contextmanager
def away(daemon: Daemon) -> Iterator[None]:
    """The daemon is dead meanwhile."""
    os.kill(daemon.pid, signal.SIGKILL)
    wait_until(lambda: daemon.pid == 0, 30, "the end of the daemon")
    try:
        yield
    finally:
        daemon.start()


@contextmanager
def frozen(daemon: Daemon) -> Iterator[None]:
    """The daemon takes calls and answers none meanwhile."""
    pid = daemon.pid
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def heartbeat_age(processor: DagProcessor) -> float:
    (job,) = processor.database.rows("select max(latest_heartbeat) at from job where job_type = 'DagProcessorJob'")
    at = datetime.fromisoformat(job["at"]).replace(tzinfo=timezone.utc)
    return (datetime.now(tz=timezone.utc) - at).total_seconds()


def put_off(processor: DagProcessor, name: str) -> bool:
    return any(event["event"] == TRIED_AGAIN for event in processor.log(name))


def called_back(processor: DagProcessor, name: str, mark: str) -> int:
    return sum(event["event"] == f"called back of the test {mark}" for event in processor.log(name))


def assert_untouched(processor: DagProcessor, dag_id: str) -> None:
    dag = processor.database.dag(dag_id)
    assert dag is not None
    assert (dag["is_stale"], dag["has_import_errors"]) == (0, 0)
    assert f"{dag_id}.py" not in processor.database.import_errors()


def test_nothing_is_unscheduled_while_the_daemon_is_away(processor: DagProcessor, daemon: Daemon) -> None:
    known = processor.write_healthy()
    processor.wait_for_dag(known)
    parsed = processor.times_parsed(f"{known}.py")
    with away(daemon):
        new = processor.write_healthy()
        processor.touch(f"{known}.py")
        assert "It will be tried again" in processor.wait_for_error(f"{new}.py")
        processor.wait(lambda: put_off(processor, f"{known}.py"), "the postponement")
        time.sleep(UNTIL_STALE)
        assert_untouched(processor, known)
        assert heartbeat_age(processor) < 15
    processor.wait_for_dag(new, timeout=150)
    processor.wait(lambda: f"{new}.py" not in processor.database.import_errors(), "the end of the import error")
    processor.wait(lambda: processor.times_parsed(f"{known}.py") > parsed, "the parse that was put off", 150)


def test_the_loop_goes_on_while_the_daemon_hangs(processor: DagProcessor, daemon: Daemon) -> None:
    known = processor.write_healthy()
    processor.wait_for_dag(known)
    parsed = processor.times_parsed(f"{known}.py")
    with frozen(daemon):
        processor.touch(f"{known}.py")
        turns = processor.output.count("Refreshing bundle")
        time.sleep(UNTIL_STALE)
        assert processor.output.count("Refreshing bundle") > turns + 3
        assert heartbeat_age(processor) < 15
        assert_untouched(processor, known)
    processor.wait(lambda: processor.times_parsed(f"{known}.py") > parsed, "the parse that was put off", 150)


def test_a_parse_that_runs_needs_no_daemon(processor: DagProcessor, daemon: Daemon) -> None:
    processor.write("patient.py", f"import time\ntime.sleep(4)\n{HEALTHY.format(dag_id='patient')}")
    processor.wait(lambda: processor.times_parsed("patient.py"), "the beginning of the parse")
    with away(daemon):
        processor.wait_for_dag("patient")


def test_an_image_that_is_not_to_be_had_unschedules_nothing(processor: DagProcessor) -> None:
    known = processor.write_healthy()
    processor.wait_for_dag(known)
    settings = "container: {image: 'localhost/nobody/has-this:1', image_pull_policy: never}"
    processor.write_yaml(known, settings, HEALTHY.format(dag_id=known))
    processor.write_yaml("misspelt", settings, HEALTHY.format(dag_id="misspelt"))
    assert "localhost/nobody/has-this:1" in processor.wait_for_error("misspelt.py")
    processor.wait(lambda: put_off(processor, f"{known}.py"), "the postponement")
    time.sleep(UNTIL_STALE)
    assert_untouched(processor, known)
    (processor.dags / "misspelt.yaml").unlink()
    processor.wait_for_dag("misspelt", timeout=120)
    processor.wait(lambda: "misspelt.py" not in processor.database.import_errors(), "the end of the import error")
    (processor.dags / f"{known}.yaml").unlink()


def test_callbacks_run_and_those_that_can_not_run_now_run_later(processor: DagProcessor, daemon: Daemon) -> None:
    processor.write("calls_back.py", CALLS_BACK.format(dag_id="calls_back", mark="here"))
    processor.wait_for_dag("calls_back")
    processor.python(CALLBACK, "dags-folder", "", "calls_back.py", "calls_back")
    processor.wait(lambda: called_back(processor, "calls_back.py", "here") == 1, "the callback")
    with away(daemon):
        processor.python(CALLBACK, "dags-folder", "", "calls_back.py", "calls_back")
        processor.wait(lambda: put_off(processor, "calls_back.py"), "the postponement")
        assert processor.database.rows("select * from callback") == []
    processor.wait(lambda: called_back(processor, "calls_back.py", "here") == 2, "the callback that was put off", 150)
    assert_untouched(processor, "calls_back")


def test_a_callback_runs_in_the_version_of_its_bundle(processor: DagProcessor) -> None:
    for version in ("2", "3"):
        text = CALLS_BACK.format(dag_id="of_a_version", mark=f"version {version}")
        processor.write(f"{version}/of_a_version.py", text, bundle="versions")
    (processor.home / "versions" / "current").write_text("3")
    processor.wait_for_dag("of_a_version")
    processor.python(CALLBACK, "versioned", "2", "of_a_version.py", "of_a_version")
    processor.wait(lambda: called_back(processor, "of_a_version.py", "version 2") == 1, "the callback")
    assert called_back(processor, "of_a_version.py", "version 3") == 0
    # What the child can't hold, because its host's files are out of its reach.
    assert [path.name for path in (processor.home / "bundles" / "_tracking" / "versioned").iterdir()] == ["2"]
    parsed = processor.times_parsed("of_a_version.py")
    time.sleep(3)
    assert processor.times_parsed("of_a_version.py") == parsed


@contextmanager
def runtime_of(backend: str, daemon: Daemon, state_dir: Path) -> Iterator[ContainerRuntime]:
    with connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=state_dir) as runtime:
        yield runtime


def containers_of(processor: DagProcessor, name: str) -> list[str]:
    return [event["container"] for event in processor.log(name) if "container" in event]


def test_a_file_whose_container_is_killed_is_parsed_again_and_blamed_only_when_it_happens_always(
    processor: DagProcessor, backend: str, daemon: Daemon, state_dir: Path
) -> None:
    # While the gate is there, a parse goes on until its container is killed, on a busy host too.
    gate = processor.write("unlucky.gate", "")
    waits = "import pathlib, time\nwhile pathlib.Path(__file__).with_suffix('.gate').exists():\n    time.sleep(0.05)\n"
    processor.write("unlucky.py", waits + HEALTHY.format(dag_id="unlucky"))
    with runtime_of(backend, daemon, state_dir) as runtime:
        processor.wait(lambda: processor.times_parsed("unlucky.py") == 1, "the first parse")
        runtime.kill(containers_of(processor, "unlucky.py")[-1])
        gate.unlink()
        processor.wait_for_dag("unlucky")
        assert processor.times_parsed("unlucky.py") == 2
        processor.write("unlucky.gate", "")
        processor.touch("unlucky.py")
        for number in (3, 4, 5):
            assert_untouched(processor, "unlucky")
            processor.wait(lambda n=number: processor.times_parsed("unlucky.py") == n, "the next parse")
            runtime.kill(containers_of(processor, "unlucky.py")[-1])
    assert "killed by SIGKILL" in processor.wait_for_error("unlucky.py")
    gate.unlink()
    processor.assert_parses_on()


def test_what_a_killed_dag_processor_left_is_removed_by_the_next(
    options: dict[str, str], place: Path, backend: str, daemon: Daemon, state_dir: Path
) -> None:
    home = place / f"{backend}-killed-home"
    own = {name: value for name, value in options.items() if "DAG_PROCESSOR" not in name}
    with dag_processor(home, own) as killed, runtime_of(backend, daemon, state_dir) as runtime:
        killed.write_healthy()
        killed.wait_for_dag("healthy_1", timeout=120)
        (left,) = containers_of(killed, "healthy_1.py")
        assert killed.process is not None
        killed.process.kill()
        killed.process.wait(10)
        assert left in {container.id for container in runtime.list()}
        # A directory that is younger than a minute may be of somebody who is about to hold it.
        os.utime(state_dir / "workloads" / left, (0, 0))
        killed.start()
        killed.wait(lambda: left not in {container.id for container in runtime.list()}, "the clean-up", 120)
        killed.wait(lambda: not (state_dir / "workloads" / left).exists(), "the directory's removal")


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=755", "tmpfs", str(directory)], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, timeout=30)
        directory.rmdir()


@pytest.mark.on("containerd")
def test_nothing_is_unscheduled_while_the_disk_is_full(options: dict[str, str], place: Path, daemon: Daemon) -> None:
    assert daemon.pid
    own = {name: value for name, value in options.items() if "DAG_PROCESSOR" not in name}
    # Each parse then makes what lies on that disk.
    own |= {"AIRFLOW__CONTAINER_RUNTIME__PARSE_MODE": "fresh"}
    own |= {"AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(place / "small-disk")}
    with small_disk(place / "small-disk"), dag_processor(place / "small-disk-home", own) as processor:
        known = processor.write_healthy()
        processor.wait_for_dag(known, timeout=120)
        parsed = processor.times_parsed(f"{known}.py")
        # What the first parse has there goes after its result has come; the next would find room in its place.
        places = [*(place / "small-disk").glob("workloads"), *(place / "small-disk").glob("containers/*")]
        processor.wait(lambda: not any(any(directory.iterdir()) for directory in places), "the first parse's removal")
        filler = place / "small-disk" / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        processor.touch(f"{known}.py")
        processor.wait(lambda: put_off(processor, f"{known}.py"), "the postponement")
        assert any("No space left on device" in str(event) for event in processor.log(f"{known}.py"))
        time.sleep(UNTIL_STALE)
        assert_untouched(processor, known)
        filler.unlink()
        processor.wait(lambda: processor.times_parsed(f"{known}.py") > parsed, "the parse that was put off", 150)
        assert_untouched(processor, known)
        assert processor.stop() == 0
