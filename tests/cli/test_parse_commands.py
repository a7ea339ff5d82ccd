"""``airflow containers parse|reserialize|dag-processor``, and stock commands that are closed, against a real containerd."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.cli.conftest import Airflow

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("main_image")]

FLAG = {"AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": "containerd"}


@pytest.fixture
def dags(environment: dict[str, str]) -> Iterator[Path]:
    """The DAG folder; what a test adds to it is gone afterwards."""
    folder = Path(environment["AIRFLOW_HOME"], "dags")
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


def parsed(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def stored(environment: dict[str, str], query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(Path(environment["AIRFLOW_HOME"], "airflow.db"))) as connection:
        return connection.execute(query).fetchall()


def test_parse_shows_what_a_file_gives_and_where_its_settings_come_from(airflow: Airflow) -> None:
    done = airflow("containers", "parse", "sales.py", "--runtime", "containerd", "--output", "json")
    assert done.returncode == 0, done.stderr
    document = parsed(done)
    (dag,) = document["dags"]
    assert (dag["dag_id"], dag["tasks"]) == ("sales", ["load", "fail", "dies_late"])
    assert document["import_errors"] == {}
    origins = {row["key"]: row["origin"] for row in document["settings"]}
    assert "sales.yaml" in origins["environment.team"]
    assert "hush" not in done.stdout


def test_parse_lists_the_settings_that_somebody_chose(airflow: Airflow, environment: dict[str, str]) -> None:
    done = airflow("containers", "parse", "sales.py", "--containerd")
    assert done.returncode == 0, done.stderr
    shown = {line.split(" ", 1)[0] for line in done.stdout.partition("\nkey ")[2].splitlines()[1:]}
    assert shown >= {"image", "network", "socket_path", "environment.team"}
    # Airflow spells them out in the airflow.cfg that it made.
    assert "\npids = 4096\n" in Path(environment["AIRFLOW_HOME"], "airflow.cfg").read_text()
    assert not shown & {"pids", "start_timeout", "run_as_user", "snapshotter"}
    assert "hush" not in done.stdout


def test_a_file_with_an_error_is_exit_code_1_and_its_output_goes_to_stderr(airflow: Airflow, dags: Path) -> None:
    (dags / "wrong.py").write_text("# airflow DAG\nprint('before the end')\n1 / 0\n")
    done = airflow("containers", "parse", str(dags / "wrong.py"), "--containerd")
    assert done.returncode == 1
    assert "Import error in wrong.py" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "before the end" in done.stderr
    assert "before the end" not in done.stdout


def test_a_file_outside_of_every_bundle_is_parsed_too(airflow: Airflow, state_dir: Path) -> None:
    file = state_dir / "alone" / "alone.py"
    file.parent.mkdir()
    file.write_text("from airflow.sdk import DAG\ndag = DAG('alone', schedule=None)\n")
    done = airflow("containers", "parse", str(file), "--containerd", "--output", "json")
    assert done.returncode == 0, done.stderr
    assert [dag["dag_id"] for dag in parsed(done)["dags"]] == ["alone"]


def test_a_mistake_beside_the_file_names_file_and_line(airflow: Airflow, dags: Path) -> None:
    (dags / "mistaken.py").write_text("# airflow DAG\n")
    (dags / "mistaken.yaml").write_text("container:\n  imgae: some/image:1\n")
    done = airflow("containers", "parse", "mistaken.py", "--containerd")
    assert done.returncode == 1
    assert "mistaken.yaml, line 2" in done.stderr


def test_a_file_that_is_not_there_is_wrong_usage(airflow: Airflow) -> None:
    done = airflow("containers", "parse", "nowhere.py", "--containerd")
    assert done.returncode == 2
    assert "nowhere.py" in done.stderr


def test_a_file_that_ends_its_process_is_an_import_error(airflow: Airflow, dags: Path) -> None:
    (dags / "ends.py").write_text("# airflow DAG\nimport os\nos._exit(3)\n")
    done = airflow("containers", "parse", "ends.py", "--containerd", "--output", "json")
    assert done.returncode == 1
    assert "exit code 3" in str(parsed(done)["import_errors"])


@pytest.mark.usefixtures("database")
def test_reserialize_stores_what_is_well_and_names_what_is_not(
    airflow: Airflow, environment: dict[str, str], dags: Path
) -> None:
    (dags / "wrong.py").write_text("# airflow DAG\n1 / 0\n")
    done = airflow("containers", "reserialize", "--containerd")
    assert done.returncode == 1, done.stderr
    assert "Parsed 2 of 2 files, 1 with import errors." in done.stdout
    assert "Import error in wrong.py: ZeroDivisionError" in done.stderr
    assert ("sales",) in stored(environment, "select dag_id from serialized_dag")


@pytest.mark.usefixtures("database")
def test_reserialize_without_a_daemon_ends_and_leaves_the_database_as_it_is(
    airflow: Airflow, environment: dict[str, str], tmp_path: Path
) -> None:
    assert airflow("containers", "reserialize", "--containerd").returncode in (0, 1)
    before = stored(environment, "select dag_id, is_stale from dag")
    nowhere = {"AIRFLOW__CONTAINERD_RUNTIME__SOCKET_PATH": str(tmp_path / "no.sock")}
    done = airflow("containers", "reserialize", "--containerd", **nowhere)
    assert done.returncode == 1
    assert "Not parsed, and left as it was: sales.py" in done.stderr
    assert stored(environment, "select dag_id, is_stale from dag") == before
    assert ("sales", 0) in before


@pytest.mark.usefixtures("database")
def test_a_number_of_runs_ends_while_the_daemon_is_away(airflow: Airflow, tmp_path: Path) -> None:
    nowhere = {"AIRFLOW__CONTAINERD_RUNTIME__SOCKET_PATH": str(tmp_path / "no.sock")}
    done = airflow("containers", "dag-processor", "--containerd", "--num-runs", "2", **nowhere)
    assert done.returncode == 0, done.stderr
    assert "sales.py is given up after 3 tries" in done.stdout + done.stderr


@pytest.mark.usefixtures("database")
def test_the_explicit_dag_processor_parses_in_containers_without_the_flag(
    airflow: Airflow, environment: dict[str, str]
) -> None:
    done = airflow("containers", "dag-processor", "--containerd", "--num-runs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = Path(environment["AIRFLOW_HOME"], "logs", "dag_processor").rglob("sales.py.log")
    assert any("DAG file is parsed in a container" in log.read_text() for log in logs)


def test_the_explicit_dag_processor_without_a_runtime_is_wrong_usage(airflow: Airflow) -> None:
    done = airflow("containers", "dag-processor", "--num-runs", "1")
    assert done.returncode == 2
    assert "scheduler_dag_parsing_runtime" in done.stderr


@pytest.mark.parametrize(
    ("command", "instead"), [("reserialize", "airflow containers reserialize"), ("report", "airflow containers parse")]
)
def test_commands_that_would_parse_on_the_host_are_closed_while_the_flag_is_set(
    airflow: Airflow, command: str, instead: str
) -> None:
    done = airflow("dags", command, **FLAG)
    assert done.returncode == 1
    assert instead in done.stderr
