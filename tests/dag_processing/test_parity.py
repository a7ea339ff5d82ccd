"""The same files, parsed by stock Airflow and in containers: what is stored is the same."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.dag_processing.conftest import LOCAL_SETTINGS, PLUGIN
from tests.dag_processing.dag_processor import HEALTHY, dag_processor
from tests.dag_processing.test_bad_files import archive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.dag_processing.dag_processor import DagProcessor

pytestmark = pytest.mark.on("containerd")

FILES: dict[str, str | bytes] = {
    "policy.py": HEALTHY.format(dag_id="seen_by_policy"),
    "refused.py": HEALTHY.format(dag_id="refused_by_the_policy"),
    "timetable.py": "from airflow.sdk import DAG\nfrom plugin_of_the_test import TimetableOfThePlugin\n"
    "dag = DAG('of_the_plugin', schedule=TimetableOfThePlugin())\n",
    "broken.py": "from airflow.sdk import DAG\nraise LookupError('of the author')\n",
    "syntax.py": "from airflow.sdk import DAG\ndef broken(:\n",
    "ignored.py": HEALTHY.format(dag_id="ignored"),
    ".airflowignore": "ignored.py\n",
    "deeper/nested.py": HEALTHY.format(dag_id="nested"),
    "no_dags.py": "print('airflow', 'dag')\n",
    "zipped.zip": archive(
        {"one.py": HEALTHY.format(dag_id="zipped_one"), "two.py": HEALTHY.format(dag_id="zipped_two")}
    ),
    "five_o_clock.py": "from airflow.sdk import DAG\ndag = DAG('five_o_clock', schedule='0 5 * * *')\n",
    "varies.py": "import random\nfrom airflow.sdk import DAG\ndag = DAG('varies', schedule=None, description='x')\n",
}


LOG_CONFIG = """
import copy, os
from airflow.config_templates.airflow_local_settings import DEFAULT_LOGGING_CONFIG

LOGGING_CONFIG = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
LOGGING_CONFIG["handlers"]["audit"] = {
    "class": "logging.FileHandler", "filename": os.path.join(os.environ["AIRFLOW_HOME"], "audit.log")
}
"""


class Both:
    """What stock stored, then what we stored over it."""

    def __init__(self, processor: DagProcessor) -> None:
        runs = []
        for flag in ({"AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": ""}, {}):
            done = processor.run("dag-processor", "--num-runs", "1", **flag)
            assert done.returncode == 0, done.stderr[-3000:]
            runs.append(stored(processor))
        self.stock, self.ours = runs
        self.versions = processor.database.rows("select dag_id, count(*) n from dag_version group by 1 having n > 1")


def stored(processor: DagProcessor) -> dict[str, Any]:
    database = processor.database
    return {
        "serialized": database.serialized(),
        "dags": database.rows(
            "select dag_id, is_stale, has_import_errors, fileloc, relative_fileloc, bundle_name, timetable_summary,"
            " timetable_description, description, owners, max_active_tasks from dag order by dag_id"
        ),
        "tags": database.rows("select * from dag_tag order by dag_id, name"),
        "code": database.rows("select dag_id, fileloc, source_code from dag_code order by dag_id"),
        "errors": database.import_errors(),
        "warnings": database.rows("select dag_id, warning_type, message from dag_warning order by 1, 2"),
    }


@pytest.fixture(scope="module")
def both(place: Path, options: dict[str, str]) -> Iterator[Both]:
    home = place / "parity-home"
    (home / "config").mkdir(parents=True)
    (home / "plugins").mkdir()
    (home / "config" / "airflow_local_settings.py").write_text(LOCAL_SETTINGS)
    (home / "plugins" / "plugin_of_the_test.py").write_text(PLUGIN)
    (home / "config" / "log_config.py").write_text(LOG_CONFIG)
    parity = {
        **{name: value for name, value in options.items() if "BUNDLE_CONFIG_LIST" not in name},
        "AIRFLOW__CORE__LOAD_EXAMPLES": "True",
        "AIRFLOW__CORE__DEFAULT_TASK_RETRIES": "3",
        "AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS": "log_config.LOGGING_CONFIG",
        "TZ": "Europe/Berlin",
        "AIRFLOW__CORE__DEFAULT_TIMEZONE": "system",
        "AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": "50",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "300",
    }
    with dag_processor(home, parity, start=False) as processor:
        for name, content in FILES.items():
            processor.write(name, content)
        yield Both(processor)


def test_the_same_dags_with_the_same_hash(both: Both) -> None:
    stock, ours = both.stock["serialized"], both.ours["serialized"]
    assert stock.keys() == ours.keys()
    assert len(stock) > 100
    different = {dag_id for dag_id in stock if stock[dag_id]["dag_hash"] != ours[dag_id]["dag_hash"]}
    # These ask for an interpreter by its path (sys.executable), which is the image's own.
    assert all(sys.executable in json.dumps(stock[dag_id]["data"]) for dag_id in different)
    assert len(different) < 6


def test_switching_makes_no_new_versions(both: Both) -> None:
    assert both.versions == []


@pytest.mark.parametrize("what", ["dags", "tags", "code", "warnings", "errors"])
def test_what_else_is_stored_is_the_same(both: Both, what: str) -> None:
    assert both.ours[what] == both.stock[what]
    assert both.stock[what] or what == "warnings"


def test_a_schedule_is_of_the_time_zone_of_the_dag_processor(both: Both) -> None:
    timetable = both.ours["serialized"]["five_o_clock"]["data"]["dag"]["timetable"]
    assert timetable == both.stock["serialized"]["five_o_clock"]["data"]["dag"]["timetable"]
    assert timetable["__var"]["timezone"] == "Europe/Berlin"


def test_policies_and_plugins_hold(both: Both) -> None:
    assert {"dag_id": "seen_by_policy", "name": "seen-by-the-policy"} in both.ours["tags"]
    assert "the policy does not want it" in both.ours["errors"]["refused.py"]
    assert "of_the_plugin" in both.ours["serialized"]
    assert {"ignored", "refused_by_the_policy"}.isdisjoint(both.ours["serialized"])


@pytest.mark.on("containerd", "docker")
def test_a_file_that_somebody_asks_for_is_parsed_again_at_once(processor: DagProcessor) -> None:
    dag_id = processor.write_healthy()
    processor.wait_for_dag(dag_id)
    parsed = processor.times_parsed(f"{dag_id}.py")
    processor.database.write(
        "insert into dag_priority_parsing_request values (?, ?, ?)", dag_id, "dags-folder", f"{dag_id}.py"
    )
    processor.wait(lambda: processor.times_parsed(f"{dag_id}.py") > parsed, "the parse that was asked for")
    processor.wait(lambda: not processor.database.rows("select * from dag_priority_parsing_request"), "its being taken")


@pytest.mark.on("containerd", "docker")
def test_the_dags_of_a_deleted_file_become_stale(processor: DagProcessor) -> None:
    dag_id = processor.write_healthy()
    processor.wait_for_dag(dag_id)
    (processor.dags / f"{dag_id}.py").unlink()
    processor.wait(lambda: (processor.database.dag(dag_id) or {})["is_stale"], "the DAG's becoming stale")


@pytest.mark.on("containerd", "docker")
def test_the_parse_of_a_deleted_file_is_ended(processor: DagProcessor) -> None:
    processor.write("deleted.py", "import time\nfrom airflow.sdk import DAG\ntime.sleep(3600)\n")
    processor.wait(lambda: processor.times_parsed("deleted.py"), "the beginning of the parse")
    (processor.dags / "deleted.py").unlink()
    processor.assert_parses_on()
    assert "deleted.py" not in processor.database.import_errors()
