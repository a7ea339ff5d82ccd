"""What a DAG would have Airflow import outside of containers, found in what Airflow itself serializes."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.dag_processing.manager import DagFileInfo
from airflow.dag_processing.processor import DagFileParsingResult
from airflow.providers.standard.triggers.file import FileDeleteTrigger
from airflow.sdk import DAG, Asset, AssetWatcher, BaseOperator
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from airflow.serialization.serialized_objects import DagSerialization, LazyDeserializedDAG
from airflow.triggers.base import StartTriggerArgs
from tests.unit.settings.conftest import Ini

from airflow_isolation.integration.dag_processing.named_code import named_code
from airflow_isolation.integration.seams.parse_results import believed_result
from airflow_isolation.settings.effective import Grant, Permissions
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_isolation.settings.effective import EffectiveSettings

WATCHED = Asset("watched", watchers=[AssetWatcher(name="w", trigger=FileDeleteTrigger(filepath="/x"))])
FILE_TRIGGER = "airflow.providers.standard.triggers.file.FileDeleteTrigger"


class StartsDeferred(BaseOperator):
    start_from_trigger = True
    start_trigger_args = StartTriggerArgs(
        trigger_cls="team.triggers.Waits",
        trigger_kwargs={"classpath": "no.trigger"},
        next_method="execute_complete",
        next_kwargs=None,
        timeout=None,
    )

    def execute(self, context: Any) -> None: ...


def serialized(dag_id: str, *, with_trigger: bool = True, schedule: Any = None, **settings: Any) -> dict[str, Any]:
    with DAG(dag_id, schedule=schedule, **settings) as dag:
        if with_trigger:
            StartsDeferred(task_id="waits")
    found: dict[str, Any] = DagSerialization.to_dict(dag)
    return found


def test_all_that_a_dag_names_is_found() -> None:
    deadline = DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=dt.timedelta(hours=1),
        callback=AsyncCallback("team.callbacks.tell", kwargs={"path": "/data"}),
    )
    assert named_code(serialized("all", schedule=[WATCHED], deadline=deadline)) == {
        "team.triggers.Waits",
        FILE_TRIGGER,
        "team.callbacks.tell",
    }


def test_an_asset_is_found_wherever_it_stands() -> None:
    assert named_code(serialized("either", with_trigger=False, schedule=(WATCHED | Asset("b")) & Asset("c"))) == {
        FILE_TRIGGER
    }


def test_a_deadlines_own_reference_is_found() -> None:
    """Its class is imported by the scheduler."""
    reported = {"dag": {"deadline": [{"reference": {"reference_type": "Mine", "__class_path": "team.own.Mine"}}]}}
    assert named_code(reported) == {"team.own.Mine"}


def test_a_plain_dag_names_nothing() -> None:
    assert named_code(serialized("plain", with_trigger=False)) == frozenset()


def test_what_is_nested_deeply_is_read_to_its_end() -> None:
    nested: Any = {"trigger_cls": "deep.Down"}
    for _ in range(100_000):
        nested = [nested]
    assert named_code({"dag": nested}) == {"deep.Down"}


@pytest.fixture(scope="module")
def settings() -> EffectiveSettings:
    return resolve("parse", "containerd", configuration=Ini("[container_runtime]\nimage = example/airflow:1\n"))


def believe(
    settings: EffectiveSettings, dags: Sequence[dict[str, Any]], allowed: Sequence[Grant], place: Path
) -> DagFileParsingResult:
    (place / "sales.py").write_text("")
    file = DagFileInfo(rel_path=Path("sales.py"), bundle_name="sales", bundle_path=place)
    reported = DagFileParsingResult(
        fileloc=str(place / "sales.py"),
        serialized_dags=[LazyDeserializedDAG(data=dag) for dag in dags],
        import_errors={},
        warnings=[
            {"dag_id": dag["dag"]["dag_id"], "warning_type": "non-existent pool", "message": "no such pool"}
            for dag in dags
        ],
    )
    given = replace(settings, permissions=Permissions(allowed_triggers=tuple(allowed)))
    return believed_result(file, reported, given)


def test_a_dag_that_names_what_is_not_allowed_is_an_import_error(settings: EffectiveSettings, tmp_path: Path) -> None:
    dags = [serialized("waits"), serialized("plain", with_trigger=False)]
    result = believe(settings, dags, [Grant("*", "airflow.*")], tmp_path)
    assert [dag.dag_id for dag in result.serialized_dags] == ["plain"]
    assert [one["dag_id"] for one in result.warnings or ()] == ["plain"], "others refer to a DAG that is not stored"
    assert result.import_errors == {
        "sales.py": "The DAG 'waits' names team.triggers.Waits, which Airflow would import outside of containers, and "
        "[container_runtime_policy] allowed_triggers does not give that to sales/sales.py"
    }


@pytest.mark.parametrize("allowed", [(), (Grant("sales/*", "team.triggers.*"),)])
def test_a_dag_that_names_what_is_allowed_is_stored(
    settings: EffectiveSettings, tmp_path: Path, allowed: Sequence[Grant]
) -> None:
    result = believe(settings, [serialized("waits")], allowed, tmp_path)
    assert [dag.dag_id for dag in result.serialized_dags] == ["waits"]
    assert not result.import_errors
