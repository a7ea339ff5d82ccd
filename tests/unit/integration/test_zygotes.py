"""Who may share a zygote: whatever is in it when Python starts and Airflow is imported must be equal, nothing else need be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.settings.conftest import Ini

from airflow_isolation.bridge.start_mode import StartDecision
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.container_spec import Mount, Resources, UserNamespace
from airflow_isolation.integration import zygotes
from airflow_isolation.integration.zygotes import zygote_plan
from airflow_isolation.runtime.interface import Image
from airflow_isolation.settings.resolve import resolve
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from airflow_isolation.bridge.zygote import ZygotePlan

NAMESPACE = UserNamespace(first=100_000)


@pytest.fixture(autouse=True)
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the local settings and plugins are."""
    monkeypatch.setattr(zygotes, "administrators_directories", lambda: [tmp_path / "config"])
    (tmp_path / "config").mkdir()
    (tmp_path / "config/airflow_local_settings.py").write_text("A = 1")
    return tmp_path / "config"


def plan(
    cfg: str = "",
    *,
    backend: Any = "containerd",
    digest: str = "sha256:a",
    namespace: UserNamespace | None = NAMESPACE,
    python: str = "python3",
    environment: Mapping[str, str] | None = None,
    **changes: Any,
) -> ZygotePlan:
    settings = resolve("task", backend, configuration=Ini(f"[container_runtime]\nimage = i:1\n{cfg}"))
    spec = replace(container_spec(settings, argv=(), labels={"io.airflow.purpose": "task"}), **changes)
    launch = Launch(
        id="task-a",
        spec=replace(spec, user_namespace=namespace),
        image=Image(reference="i:1", digest=digest, user="airflow"),
        purpose="task",
        environment={"AIRFLOW__CORE__X": "1", "OF_THE_TASK": "1"},
        airflow="3.3.2",
        python=python,
    )
    decision = StartDecision(mode="fork", why="", user_namespace=namespace)
    return zygote_plan(settings, launch, decision, environment={"AIRFLOW__CORE__X": "1", **(environment or {})})


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "sha256:b"},
        {"backend": "docker"},
        {"python": "/opt/python"},
        {"environment": {"AIRFLOW__CORE__X": "2"}},
        {"environment": {"AIRFLOW__CORE__Y": "1"}},
        {"namespace": None},
        {"namespace": UserNamespace(first=200_000)},
        {"user": "50001:0"},
        {"capabilities": frozenset({"NET_RAW"})},
        {"env": {"PYTHONPATH": "/more"}},
        {"env": {"LD_PRELOAD": "/more.so"}},
        {"timezone": "Europe/Berlin"},
    ],
    ids=str,
)
def test_what_an_import_may_see_makes_another_zygote(other: dict[str, Any]) -> None:
    assert plan(**other).key != plan().key


@pytest.mark.parametrize(
    "other",
    [
        {"env": {"REGION": "eu"}},
        {"resources": Resources(memory=10**9)},
        {"mounts": (Mount(source="/srv", target="/srv"),)},
        {"hostname": "named"},
        {"stop_grace_period": 3.0},
        {"labels": {"team": "sales"}},
        {"working_dir": "/opt"},
    ],
    ids=str,
)
def test_what_only_the_task_sees_does_not(other: dict[str, Any]) -> None:
    assert plan(**other).key == plan().key


@pytest.mark.parametrize("namespace", [None, NAMESPACE])
def test_the_host_s_network_makes_another_zygote_in_a_user_namespace(namespace: UserNamespace | None) -> None:
    with_it, without = plan(namespace=namespace, network="host"), plan(namespace=namespace, network="none")
    assert without.launch.spec.network == "none"
    assert with_it.launch.spec.network == ("host" if namespace else "none")
    assert (with_it.key == without.key) == (namespace is None)


@pytest.mark.parametrize("namespace", [None, NAMESPACE])
def test_a_zygote_may_read_all_of_its_image_only_where_that_is_worth_nothing_on_the_host(
    namespace: UserNamespace | None,
) -> None:
    capabilities = plan(namespace=namespace).launch.spec.capabilities
    assert ("DAC_READ_SEARCH" in capabilities) == (namespace is not None)


def test_changed_local_settings_make_another_zygote(directories: Path) -> None:
    before = plan().key
    assert plan().key == before
    (directories / "airflow_local_settings.py").write_text("A = 22")
    changed = plan().key
    assert changed != before
    (directories / "plugin.py").touch()
    assert plan().key != changed


def test_a_zygote_has_nothing_of_a_user(directories: Path) -> None:
    made = plan(
        "zygote_memory = 512Mi",
        env={"REGION": "eu", "AIRFLOW_VAR_X": "1"},
        mounts=(Mount(source="/srv", target="/srv", read_only=False),),
        network="none",
        labels={"io.airflow.purpose": "task", "io.airflow.owner": "1:1@h"},
        read_only_root=False,
        resources=Resources(cpus=0.1, memory=10**7),
    )
    spec = made.launch.spec
    assert dict(spec.env) == {"AIRFLOW_VAR_X": "1"}
    assert [mount.target for mount in spec.mounts if mount.kind == "bind"] == [str(directories)]
    assert all(mount.read_only for mount in spec.mounts if mount.kind == "bind")
    assert (spec.network, spec.read_only_root, spec.pid_namespace) == ("none", True, "host")
    assert dict(spec.labels) == {"io.airflow.purpose": "zygote"}
    assert spec.resources == Resources(memory=512 * 1024 * 1024, pids=1024)
    assert made.launch.environment == {"AIRFLOW__CORE__X": "1"}
    assert made.memory == 256 * 1024 * 1024
