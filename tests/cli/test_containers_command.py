"""``airflow containers …`` against a real containerd."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.bridge.uid_ranges import configured_range
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Airflow, MakeContainer
    from tests.conftest import ImageArchive, ImageName

    from airflow_isolation.runtime.containerd import ContainerdRuntime

pytestmark = pytest.mark.root

THIS_WORKER = labels.Owner.this_process()


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_an_empty_list_is_words_for_people_and_a_list_for_programs(airflow: Airflow) -> None:
    done = airflow("containers", "list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "No container is running" in done.stderr
    assert rows(airflow("containers", "list", "--output", "json")) == []


def test_list_shows_what_has_not_ended_and_all_the_rest(
    airflow: Airflow, make_container: MakeContainer, runtime: ContainerdRuntime
) -> None:
    running = make_container(THIS_WORKER, started=True, dag_id="sales", task_id="load", map_index="-1", try_number="2")
    created = make_container(THIS_WORKER, dag_id="sales", task_id="fail")
    ended = make_container(THIS_WORKER, started=True, dag_id="other")
    with runtime.wait(ended.id) as exit_of_ended:
        runtime.kill(ended.id)
        exit_of_ended.result(timeout=30)

    listed = rows(airflow("containers", "list", "--output", "json"))
    assert [(row["container"], row["state"]) for row in listed] == [(running.id, "running"), (created.id, "created")]
    assert (listed[0]["dag"], listed[0]["task"], listed[0]["try"]) == ("sales", "load", 2)
    assert listed[0]["memory"] > 0

    everything = rows(airflow("containers", "list", "--all", "--output", "json"))
    assert [row["container"] for row in everything] == [running.id, created.id, ended.id]

    filtered = airflow("containers", "list", "--all", "--dag-id", "sales", "--task-id", "fail", "--output", "plain")
    assert created.id in filtered.stdout
    assert running.id not in filtered.stdout

    table = airflow("containers", "list").stdout.splitlines()
    header = [name.strip() for name in table[0].split("|")]
    assert header == [
        "container",
        "purpose",
        "dag",
        "run",
        "task",
        "map_index",
        "try",
        "image",
        "state",
        "age",
        "cpu",
        "memory",
    ]
    assert len(table) == 4


def test_stats_are_shown_once_where_nobody_watches(airflow: Airflow, make_container: MakeContainer) -> None:
    assert rows(airflow("containers", "stats", "--output", "json")) == []
    container = make_container(THIS_WORKER, started=True, dag_id="sales", task_id="load")
    make_container(THIS_WORKER, dag_id="sales")
    (shown,) = rows(airflow("containers", "stats", "--output", "json"))
    assert (shown["container"], shown["dag"], shown["task"]) == (container.id, "sales", "load")
    assert shown["cpu_percent"] >= 0
    assert shown["cpu_seconds"] > 0
    assert 0 < shown["memory"] <= shown["memory_peak"]
    assert (shown["memory_limit"], shown["oom_kills"], shown["pids"]) == (None, 0, 1)

    table = airflow("containers", "stats", "--no-stream", container.id).stdout.splitlines()
    assert [name.strip() for name in table[0].split("|")][:4] == ["container", "dag", "task", "cpu_percent"]
    assert len(table) == 3

    unknown = airflow("containers", "stats", "nope")
    assert unknown.returncode == 1
    assert "'nope'" in unknown.stderr


def test_stats_on_a_terminal_go_on_until_ctrl_c(environment: dict[str, str], make_container: MakeContainer) -> None:
    container = make_container(THIS_WORKER, started=True)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "airflow", "containers", "stats"],
        env={**environment, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(theirs)
        seen = b""
        while seen.count(container.id.encode()) < 2:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode, said) == (0, b"")


def test_stats_on_a_terminal_end_with_the_containers_that_were_named(
    environment: dict[str, str], make_container: MakeContainer, runtime: ContainerdRuntime
) -> None:
    container = make_container(THIS_WORKER, started=True)
    make_container(THIS_WORKER, started=True)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "airflow", "containers", "stats", container.id],
        env={**environment, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(theirs)
        seen = b""
        while b"cpu_percent" not in seen:
            seen += os.read(ours, 65536)
        runtime.kill(container.id)
        with suppress(OSError):  # how a terminal says that nobody has it open any more
            while os.read(ours, 65536):
                pass
        _, said = process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode, said) == (0, b"")


def test_one_container_is_inspected_read_and_killed_by_the_beginning_of_its_id(
    airflow: Airflow, make_container: MakeContainer, runtime: ContainerdRuntime
) -> None:
    container = make_container(THIS_WORKER, started=True, dag_id="sales")
    other = make_container(THIS_WORKER)
    ambiguous = airflow("containers", "inspect", "task-")
    assert (ambiguous.returncode, ambiguous.stdout) == (1, "")
    assert container.id in ambiguous.stderr
    assert other.id in ambiguous.stderr
    unknown = airflow("containers", "logs", "nope")
    assert unknown.returncode == 1
    assert "'nope'" in unknown.stderr
    assert "Traceback" not in unknown.stderr

    beginning = container.id[
        : 1 + next(i for i, (a, b) in enumerate(zip(container.id, other.id, strict=True)) if a != b)
    ]
    inspected = json.loads(airflow("containers", "inspect", beginning, "--output", "json").stdout)
    assert inspected["container"] == container.id
    assert inspected["labels"]["io.airflow.dag_id"] == "sales"
    assert inspected["stats"]["memory_peak"] > 0
    assert inspected["stats"]["oom_kills"] == 0
    assert inspected["owner"] == {"host": THIS_WORKER.host, "pid": THIS_WORKER.pid, "gone": False}

    deadline = time.monotonic() + 30
    while b"two" not in runtime.output(container.id) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert airflow("containers", "logs", beginning).stdout == "one\ntwo\n"
    assert airflow("containers", "logs", beginning, "--tail", "1").stdout == "two\n"

    with runtime.wait(container.id) as pending:
        killed = airflow("containers", "kill", beginning, "--signal", "KILL")
        assert (killed.returncode, killed.stdout) == (0, f"Sent SIGKILL to the container {container.id}.\n")
        assert pending.result(timeout=30).code == 128 + 9
    again = airflow("containers", "kill", beginning)
    assert (again.returncode, again.stdout) == (0, f"The container {container.id} has ended already.\n")


def test_prune_removes_what_a_dead_worker_left_and_nothing_else(
    airflow: Airflow, make_container: MakeContainer, runtime: ContainerdRuntime, dead_owner: labels.Owner
) -> None:
    left = make_container(dead_owner)
    elsewhere = make_container(labels.Owner("another-host", dead_owner.pid, dead_owner.started))
    owned = make_container(THIS_WORKER)

    looked = airflow("containers", "prune", "--dry-run")
    assert (looked.returncode, looked.stdout) == (0, f"would be removed: container {left.id}\n")
    assert len(runtime.list()) == 3

    pruned = airflow("containers", "prune")
    assert (pruned.returncode, pruned.stdout) == (0, f"removed: container {left.id}\n")
    assert {container.id for container in runtime.list()} == {elsewhere.id, owned.id}

    assert airflow("containers", "prune").stdout == "Nothing is left over from dead workers.\n"


def test_a_reader_that_goes_away_is_no_error(environment: dict[str, str], make_container: MakeContainer) -> None:
    make_container(THIS_WORKER)
    process = subprocess.Popen(
        [sys.executable, "-m", "airflow", "containers", "list"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=120), said) == (0, b"")


def test_images_come_and_go(
    airflow: Airflow, runtime: ContainerdRuntime, image_archive: ImageArchive, image_name: ImageName
) -> None:
    name = "registry.example/tools/shell:1"
    imported = airflow("containers", "images", "import", str(image_archive("no-python")), "--name", name)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.startswith(f"{name} sha256:")
    assert "importing sha256:" in imported.stderr
    listed = rows(airflow("containers", "images", "list", "--output", "json"))
    assert [row["size"] > 0 for row in listed if row["image"] == name] == [True]
    removed = airflow("containers", "images", "remove", name)
    assert removed.returncode == 0, removed.stderr
    again = airflow("containers", "images", "remove", name)
    assert again.returncode == 1
    assert name in again.stderr
    assert name not in [image.reference for image in runtime.list_images()]


def test_what_is_not_an_archive_is_told_in_words(airflow: Airflow) -> None:
    done = airflow("containers", "images", "import", "/etc/passwd")
    assert (done.returncode, done.stdout) == (1, "")
    assert "/etc/passwd is not a tar archive" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_that_is_not_there_is_told_in_words(airflow: Airflow) -> None:
    done = airflow("containers", "list", "--docker")
    assert (done.returncode, done.stdout) == (1, "")
    assert "docker can't be reached: there is no socket" in done.stderr


def test_both_daemons_at_once_are_wrong_usage(airflow: Airflow) -> None:
    assert airflow("containers", "list", "--docker", "--containerd").returncode == 2


def test_config_says_where_every_setting_was_written(airflow: Airflow, environment: dict[str, str]) -> None:
    arguments = ("containers", "config", "--dag-file", "sales.py", "--task-id", "fail", "--output", "json")
    settings = {row["key"]: (row["value"], row["origin"]) for row in rows(airflow(*arguments))}
    metadata = f"{environment['AIRFLOW_HOME']}/dags/sales.yaml"
    assert settings["network"] == ("none", "environment variable AIRFLOW__CONTAINER_RUNTIME__NETWORK")
    assert settings["environment.team"] == ("sales", f"{metadata}:3")
    assert settings["environment.api_password"] == ("***", f"{metadata}:3")
    assert settings["memory"] == (str(600 * 1024**2), f"{metadata}:5")
    assert settings["start"][0] == "fork"
    free = configured_range(None)
    assert free is not None
    assert settings["start"][1] == f"in a user namespace of the image's own, from the uids {free}"


@pytest.mark.parametrize(
    ("variable", "value", "start", "why"),
    [
        ("START_MODE", "fresh", "fresh", "start_mode says so"),
        ("UID_RANGE", "none", "fork", "with privilege on the host, for a trusted image: uid_range is none"),
        ("UID_RANGE", "900000:65536", "fork", "in a user namespace of the image's own, from the uids 900000:65536"),
    ],
)
def test_config_says_how_a_task_would_be_started_and_why(
    airflow: Airflow, state_dir: Path, variable: str, value: str, *, start: str, why: str
) -> None:
    before = sorted((state_dir / "state").rglob("uid-ranges*"))
    done = airflow("containers", "config", "--output", "json", **{f"AIRFLOW__CONTAINER_RUNTIME__{variable}": value})
    assert {"key": "start", "value": start, "origin": why} in rows(done)
    # To ask gives nothing away.
    assert sorted((state_dir / "state").rglob("uid-ranges*")) == before


def test_config_for_parsing_knows_no_start_mode(airflow: Airflow) -> None:
    assert "start" not in [
        row["key"] for row in rows(airflow("containers", "config", "--purpose", "parse", "-o", "json"))
    ]


def test_a_mistake_in_the_metadata_names_file_and_line(
    airflow: Airflow, environment: dict[str, str], state_dir: Any
) -> None:
    dag_file = state_dir / "wrong.py"
    dag_file.touch()
    (state_dir / "wrong.yaml").write_text("container:\n  imgae: x\n")
    done = airflow("containers", "config", "--dag-file", str(dag_file))
    assert done.returncode == 1
    assert f"{state_dir}/wrong.yaml, line 2, container.imgae: unknown key 'imgae'" in done.stderr


@pytest.mark.usefixtures("database", "main_image")
def test_one_task_runs_without_scheduler_and_leaves_nothing(airflow: Airflow, runtime: ContainerdRuntime) -> None:
    done = airflow("containers", "test", "sales", "load")
    assert done.returncode == 0, done.stderr
    assert "Start mode: fork, in a user namespace of the image's own" in done.stderr
    assert "Task runs in a container" in done.stdout
    assert " in eu" in done.stdout
    (zygote,) = runtime.list()

    # What is left is the zygote, of which everybody knows, and which is no left-over until it has ended.
    (shown,) = rows(airflow("containers", "list", "--purpose", "zygote", "--output", "json"))
    assert (shown["container"], shown["purpose"], shown["state"]) == (zygote.id, "zygote", "running")
    assert airflow("containers", "prune").stdout == "Nothing is left over from dead workers.\n"
    killed = airflow("containers", "kill", zygote.id, "--signal", "KILL")
    assert killed.stdout == f"Sent SIGKILL to the container {zygote.id}.\n"
    with runtime.wait(zygote.id) as pending:
        pending.result(timeout=30)
    assert f"removed: container {zygote.id}\n" in airflow("containers", "prune").stdout
    assert runtime.list() == ()
    # Airflow's own command may print warnings first.
    assert airflow("dags", "list-runs", "sales", "--output", "json").stdout.splitlines()[-1] == "[]"


@pytest.mark.usefixtures("database", "main_image")
def test_a_task_that_fails_is_exit_code_1(airflow: Airflow) -> None:
    done = airflow("containers", "test", "sales", "fail", "--containerd")
    assert done.returncode == 1
    assert "on purpose" in done.stdout
    assert "ended as failed" in done.stderr


@pytest.mark.usefixtures("database", "main_image")
def test_a_task_that_had_succeeded_when_it_was_killed_is_exit_code_0(airflow: Airflow) -> None:
    done = airflow("containers", "test", "sales", "dies_late")
    assert done.returncode == 0, done.stderr
    assert "the reported state holds" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.usefixtures("database", "main_image")
def test_config_knows_a_stored_tasks_executor_config(airflow: Airflow) -> None:
    airflow("dags", "reserialize")
    arguments = ("containers", "config", "--dag-id", "sales", "--task-id", "load", "--output", "json")
    settings = {row["key"]: (row["value"], row["origin"]) for row in rows(airflow(*arguments))}
    assert settings["environment.REGION"] == ("eu", "executor_config")


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nope", "load"), "no DAG 'nope'"),
        (("sales", "nope"), "no task 'nope'"),
        (("sales", "load", "--run-id", "nope"), "'nope' not found"),
    ],
)
def test_what_can_not_be_tested_is_told_in_words(
    airflow: Airflow, main_image: str, arguments: tuple[str, ...], words: str
) -> None:
    done = airflow("containers", "test", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_database_the_command_that_makes_one_is_named(airflow: Airflow, tmp_path: Any) -> None:
    home = str(tmp_path)
    done = airflow("containers", "test", "sales", "load", AIRFLOW_HOME=home)
    assert done.returncode == 1
    assert "airflow db migrate" in done.stderr
    assert "Traceback" not in done.stderr


def test_states_are_words_of_the_runtime_interface() -> None:
    # list's colours go by them
    from airflow_isolation.integration.cli.listing import _STATE_STYLES

    assert set(_STATE_STYLES) == {state.value for state in ContainerState}
