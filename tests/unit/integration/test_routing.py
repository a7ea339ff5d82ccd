"""Which coordinator a queue gets, and what a workload carries. Airflow's own classes, unchanged but for the wrap."""

from __future__ import annotations

import importlib
import json
import uuid
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.integration.seams import checks, routing

if TYPE_CHECKING:
    from collections.abc import Iterator


class Ours:
    """Stands for the container coordinator."""


@pytest.fixture
def coordinators() -> Iterator[Any]:
    module = importlib.import_module("airflow.sdk.execution_time.coordinator")
    stock = module.CoordinatorManager.for_queue
    yield module
    module.CoordinatorManager.for_queue = stock


@pytest.fixture
def workloads() -> Iterator[Any]:
    module = importlib.import_module("airflow.executors.workloads.task")
    stock = module.ExecuteTask.__dict__["make"]
    yield module
    module.ExecuteTask.make = stock


def manager(module: Any) -> Any:
    return module.CoordinatorManager(
        coordinator_specs={"java": module._CoordinatorSpec(classpath="builtins.object")},
        queue_to_coordinator={"java": "java"},
    )


def test_every_queue_is_ours_but_the_ones_that_are_mapped(coordinators: Any) -> None:
    routing.route_every_queue(coordinators, Ours)
    chosen = manager(coordinators)
    assert isinstance(chosen.for_queue("default"), Ours)
    assert chosen.for_queue("gpu") is chosen.for_queue("default")
    assert type(chosen.for_queue("java")) is object


def test_without_the_wrap_airflow_is_stock(coordinators: Any) -> None:
    assert type(manager(coordinators).for_queue("default")).__name__ == "_PythonCoordinator"


def test_an_airflow_without_the_names_is_refused() -> None:
    empty = ModuleType("airflow.sdk.execution_time.coordinator")
    with pytest.raises(checks.AirflowNotSupported, match="BaseCoordinator"):
        routing.route_every_queue(empty, Ours)


def test_this_airflow_has_every_name_that_is_touched() -> None:
    checks.check_names(checks.ROUTING)
    checks.check_names(checks.SUPERVISION)


def test_another_minor_is_refused() -> None:
    checks.check_version("3.3.9")
    with pytest.raises(checks.AirflowNotSupported, match=r"this is 3\.4\.0"):
        checks.check_version("3.4.0")


def task_instance(executor_config: object) -> Any:
    return SimpleNamespace(
        id=uuid.uuid4(),
        task_id="t",
        dag_id="d",
        run_id="r",
        try_number=1,
        map_index=-1,
        dag_version_id=uuid.uuid4(),
        hostname=None,
        context_carrier={"traceparent": "00-0-0-00"},
        queue="default",
        pool_slots=1,
        priority_weight=1,
        external_executor_id=None,
        executor_config=executor_config,
    )


def make(workloads: Any, executor_config: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("airflow.utils.helpers.log_filename_template_renderer", lambda: lambda ti: "log")
    monkeypatch.setattr(workloads.ExecuteTask, "generate_token", staticmethod(lambda *_: "token"))
    bundle = workloads.BundleInfo(name="b", version=None)
    return workloads.ExecuteTask.make(task_instance(executor_config), dag_rel_path=Path("d.py"), bundle_info=bundle)


def test_executor_config_survives_the_wire(workloads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    routing.carry_executor_config(workloads)
    ours = {"container": {"image": "team:1", "environment": {"ü": "ö"}}}
    sent = make(workloads, {**ours, "pod_override": "kubernetes'"}, monkeypatch).model_dump_json()
    assert "pod_override" not in sent
    received = workloads.ExecuteTask.model_validate_json(sent).ti
    assert received.executor_config is None
    assert routing.executor_config_of(received) == ours
    # The task sees the trace's carrier and nothing of ours.
    assert received.context_carrier == {"traceparent": "00-0-0-00"}


def test_a_task_without_container_settings_carries_nothing(workloads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    routing.carry_executor_config(workloads)
    for config in (None, {}, {"pod_override": 1}):
        workload = make(workloads, config, monkeypatch)
        assert routing.CARRIER_KEY not in json.loads(workload.model_dump_json())["ti"]["context_carrier"]
        assert routing.executor_config_of(workload.ti) == {}


@pytest.mark.parametrize("config", [7, "container", ["container"]])
def test_an_executor_config_that_is_no_map_holds_nothing_of_ours(config: object) -> None:
    assert routing.executor_config_of(task_instance(config)) == {}


def test_under_the_local_executor_it_arrives_by_itself() -> None:
    what = task_instance({"docker": {"network": "none"}, "other": 1})
    assert routing.executor_config_of(what) == {"docker": {"network": "none"}}
