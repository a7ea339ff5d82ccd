"""What the administrator's policy gives the tasks of a DAG file, and what is a task's own."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import structlog
from airflow.sdk.api.datamodels._generated import AssetProfile
from airflow.sdk.execution_time import comms
from tests.unit.integration.supervised import TI, Supervised

from airflow_isolation.integration.seams.masks import own_masks
from airflow_isolation.integration.seams.permitted import refused_secret, refused_to_task
from airflow_isolation.settings.effective import Grant, Permissions

FILE = "bundle/sales.py"
GIVEN = Permissions(
    allowed_connections=(Grant("bundle/*", "sales_*"),),
    allowed_variables=(Grant("bundle/*", "sales_*"),),
    allowed_triggering=(Grant("bundle/*", "report_*"),),
    allowed_triggers=(Grant("bundle/*", "airflow.providers.*"),),
    allowed_assets=(Grant("bundle/*", "sales_*"), Grant("bundle/*", "s3://sales/*")),
)
NOW = datetime.now(timezone.utc)
OTHER_TI = UUID("019a0000-0000-7000-8000-00000000ffff")
MONDAY = {"run_id": "monday", "key": "k"}


def get_xcom(**place: Any) -> comms.GetXCom:
    return comms.GetXCom(**{"dag_id": "sales", "task_id": "load", **MONDAY, **place})


def set_xcom(**place: Any) -> comms.SetXCom:
    return comms.SetXCom(**{"dag_id": "sales", "task_id": "load", "value": 1, **MONDAY, **place})


def delete_xcom(**place: Any) -> comms.DeleteXCom:
    return comms.DeleteXCom(**{"dag_id": "sales", "task_id": "load", **MONDAY, **place})


def trigger(dag_id: str) -> comms.TriggerDagRun:
    return comms.TriggerDagRun(dag_id=dag_id, run_id="r", reset_dag_run=True)


def defer(classpath: str) -> comms.DeferTask:
    return comms.DeferTask(classpath=classpath, next_method="execute_complete")


def succeed(*outlets: AssetProfile, events: list[dict[str, Any]] | None = None) -> comms.SucceedTask:
    return comms.SucceedTask(end_date=NOW, task_outlets=list(outlets), outlet_events=events)


def asset(name: str | None, uri: str | None, kind: str = "Asset") -> AssetProfile:
    return AssetProfile(name=name, uri=uri, type=kind)


def by_alias(name: str, uri: str) -> dict[str, Any]:
    return {"source_alias_name": "any", "dest_asset_key": {"name": name, "uri": uri}, "extra": {}}


def refusal(message: Any, permissions: Permissions = GIVEN, task: Any = TI) -> str:
    return refused_to_task(message, permissions, FILE, task)


ALWAYS = [
    get_xcom(),
    set_xcom(),
    set_xcom(map_index=-1),
    set_xcom(map_index=None),
    delete_xcom(),
    comms.GetDagRunState(dag_id="sales", run_id="tuesday"),
    comms.GetTICount(dag_id="sales"),
    comms.GetTaskRescheduleStartDate(ti_id=TI.id),
    comms.MaskSecret(value="x"),
    comms.GetAssetByName(name="x"),
]
GRANTED = [
    comms.GetConnection(conn_id="sales_db"),
    comms.GetVariable(key="sales_x"),
    comms.PutVariable(key="sales_x", value="1", description=None),
    comms.DeleteVariable(key="sales_x"),
    trigger("report_all"),
    comms.GetDagRunState(dag_id="report_all", run_id="r"),
    get_xcom(dag_id="report_all"),
    defer("airflow.providers.standard.triggers.temporal.TimeDeltaTrigger"),
    succeed(),
    succeed(asset("sales_daily", "s3://sales/daily"), asset("any", None, "AssetAlias")),
    succeed(asset("sales_daily", None, "AssetNameRef"), asset(None, "s3://sales/daily", "AssetUriRef")),
    succeed(events=[by_alias("sales_daily", "s3://sales/daily")]),
]
NOT_GRANTED = [
    (comms.GetConnection(conn_id="payroll"), "allowed_connections does not give 'payroll' to bundle/sales.py"),
    (comms.GetVariable(key="payroll"), "allowed_variables does not give 'payroll'"),
    (comms.PutVariable(key="payroll", value="1", description=None), "allowed_variables does not give 'payroll'"),
    (comms.DeleteVariable(key="payroll"), "allowed_variables does not give 'payroll'"),
    (comms.GetVariableKeys(), "allowed_variables is set"),
    (trigger("payroll"), "allowed_triggering does not give 'payroll'"),
    (trigger("sales"), "allowed_triggering does not give 'sales'"),
    (comms.GetDagRunState(dag_id="payroll", run_id="r"), "allowed_triggering does not give 'payroll'"),
    (comms.GetDRCount(dag_id="payroll"), "allowed_triggering does not give 'payroll'"),
    (comms.GetTaskStates(dag_id="payroll"), "allowed_triggering does not give 'payroll'"),
    (comms.GetDag(dag_id="payroll"), "allowed_triggering does not give 'payroll'"),
    (get_xcom(dag_id="payroll"), "allowed_triggering does not give 'payroll'"),
    (defer("os.system"), "allowed_triggers does not give 'os.system' to bundle/sales.py"),
    (succeed(asset("payroll", "s3://sales/daily")), "allowed_assets does not give 'payroll'"),
    (succeed(asset("sales_daily", "s3://payroll")), "allowed_assets does not give 's3://payroll'"),
    (succeed(asset("payroll", None, "AssetNameRef")), "allowed_assets does not give 'payroll'"),
    (succeed(events=[by_alias("payroll", "s3://sales/x")]), "allowed_assets does not give 'payroll'"),
    (succeed(events=[{"dest_asset_key": "payroll"}]), "allowed_assets does not give 'payroll'"),
]
NEVER = [
    *(
        (message(**place), "may change its own XComs only")
        for message in (set_xcom, delete_xcom)
        for place in ({"dag_id": "report_all"}, {"task_id": "other"}, {"run_id": "tuesday"}, {"map_index": 3})
    ),
    (comms.GetTaskRescheduleStartDate(ti_id=OTHER_TI), "not its own"),
    (comms.SetTaskStateStore(ti_id=OTHER_TI, key="k", value=1, expires_at=None), "not its own"),
    (comms.ValidateInletsAndOutlets(ti_id=OTHER_TI), "not its own"),
]


def name_of(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("message", [*ALWAYS, *GRANTED], ids=name_of)
def test_what_is_given(message: Any) -> None:
    assert refusal(message) == ""


@pytest.mark.parametrize(("message", "words"), [*NOT_GRANTED, *NEVER], ids=name_of)
def test_what_is_not_given(message: Any, words: str) -> None:
    assert words in refusal(message)


@pytest.mark.parametrize("message", [*ALWAYS, *GRANTED, *(message for message, _ in NOT_GRANTED)], ids=name_of)
def test_without_a_policy_all_is_as_in_airflow(message: Any) -> None:
    assert refusal(message, Permissions()) == ""


@pytest.mark.parametrize(("message", "words"), NEVER, ids=name_of)
def test_what_is_anothers_is_refused_without_a_policy(message: Any, words: str) -> None:
    assert words in refusal(message, Permissions())


def test_a_mapped_task_writes_the_xcoms_of_its_own_index() -> None:
    mapped = SimpleNamespace(**{**TI.model_dump(), "map_index": 3})
    assert refusal(set_xcom(map_index=3), task=mapped) == ""
    assert "load of the run monday of sales" in refusal(set_xcom(map_index=None), task=mapped)
    assert "load[4] of the run monday of sales" in refusal(set_xcom(map_index=4), task=mapped)


def test_a_parse_gets_the_same_secrets() -> None:
    assert refused_secret(comms.GetConnection(conn_id="sales_db"), GIVEN, FILE) == ""
    assert refused_secret(comms.GetConnection(conn_id="payroll"), GIVEN, FILE)


def test_a_refusal_is_an_error_for_the_task_which_goes_on() -> None:
    with closing(Supervised(permissions=GIVEN)) as task:  # without a client: nothing is asked of the server
        for _ in range(2):
            error = task.ask(comms.GetConnection(conn_id="payroll")).error
            assert error["error"] == "PERMISSION_DENIED"
            assert "allowed_connections does not give 'payroll'" in error["detail"]["message"]
        assert not task.workload.signals
        assert "Refused to this task" in task.log.lines[0][0]


def test_what_the_worker_has_is_given_by_the_policy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_PAYROLL", "postgres://u:a-secret@h/d")
    monkeypatch.setenv("AIRFLOW_CONN_SALES_DB", "postgres://u:a-secret@h/d")
    with own_masks(structlog.get_logger()), closing(Supervised(permissions=GIVEN)) as task:
        assert task.ask(comms.GetConnection(conn_id="payroll")).error
        assert task.ask(comms.GetConnection(conn_id="sales_db")).body["host"] == "h"


@pytest.mark.parametrize("uri", ["http://", "http://h", "postgres://u:p@h:1/d?a=b", '{"conn_type": "x"}'])
def test_a_connection_of_the_workers_may_have_any_of_its_fields(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SALES_DB", uri)
    with own_masks(structlog.get_logger()), closing(Supervised()) as task:
        comms.ConnectionResult.model_validate(task.ask(comms.GetConnection(conn_id="sales_db")).body)
