"""What Airflow's own parser holds, as a Configuration."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.errors import SettingError
from airflow_isolation.settings.resolve import dag_parsing_backend, resolve, resolve_connection, task_execution_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.settings.airflow_configuration import AirflowConfiguration

CFG = """
[core]
task_execution_runtime = containerd
[container_runtime]
image = registry.example/team/airflow:3.3.2
state_dir = $STATE/x
capabilities =
    KILL
    NET_ADMIN
[container_runtime_environment]
Region = 50%% of $STATE
[container_runtime_labels]
Team = sales
"""


@pytest.fixture
def configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], AirflowConfiguration]:
    # Importing Airflow makes directories in its home, and an airflow.cfg unless there is one; an empty one does.
    if "AIRFLOW_HOME" not in os.environ:
        monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
    if "AIRFLOW_CONFIG" not in os.environ:
        monkeypatch.setenv("AIRFLOW_CONFIG", os.devnull)
    monkeypatch.setenv("STATE", "/run/state")
    for variable in [name for name in os.environ if name.startswith("AIRFLOW__")]:
        monkeypatch.delenv(variable)
    from airflow.configuration import AirflowConfigParser

    from airflow_isolation.settings.airflow_configuration import AirflowConfiguration

    def read(text: str = CFG) -> AirflowConfiguration:
        parser: Any = AirflowConfigParser()
        parser.read_string(text)
        return AirflowConfiguration(parser)

    return read


def test_the_file_is_read_by_airflows_rules(configuration: Callable[..., AirflowConfiguration]) -> None:
    settings = resolve("task", "containerd", configuration=configuration())
    assert settings.image == "registry.example/team/airflow:3.3.2"
    assert str(settings.connection.state_dir) == "/run/state/x"
    assert settings.capabilities == {"KILL", "NET_ADMIN"}


def test_labels_keep_their_case_variables_get_capitals_and_neither_is_expanded(
    configuration: Callable[..., AirflowConfiguration],
) -> None:
    settings = resolve("task", "containerd", configuration=configuration())
    assert settings.environment == {"REGION": "50% of $STATE"}
    assert settings.labels == {"Team": "sales"}


def test_environment_variables_are_stronger_and_are_the_origin(
    configuration: Callable[..., AirflowConfiguration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CONTAINER_RUNTIME__IMAGE", "sales:1")
    monkeypatch.setenv("AIRFLOW__TASK_EXECUTION_CONTAINERD_RUNTIME__MEMORY", "1Gi")
    monkeypatch.setenv("AIRFLOW__CONTAINER_RUNTIME_ENVIRONMENT__REGION", "eu")
    monkeypatch.setenv("AIRFLOW__CONTAINER_RUNTIME_ENVIRONMENT___X__Y", "z")
    monkeypatch.setenv("AIRFLOW__CONTAINER_RUNTIME_LABELS__APP", "airflow_task")
    settings = resolve("task", "containerd", configuration=configuration())
    assert settings.image == "sales:1"
    assert settings.resources.memory == 2**30
    assert settings.environment == {"REGION": "eu", "_X__Y": "z"}
    assert settings.labels == {"Team": "sales", "app": "airflow_task"}
    assert str(settings.origins["image"]) == "environment variable AIRFLOW__CONTAINER_RUNTIME__IMAGE"


def test_an_unknown_environment_variable_of_ours_is_refused(
    configuration: Callable[..., AirflowConfiguration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CONTAINER_RUNTIME__IMGAE", "sales:1")
    with pytest.raises(SettingError, match="AIRFLOW__CONTAINER_RUNTIME__IMGAE, imgae: unknown key"):
        resolve_connection("docker", configuration=configuration())


def test_a_section_that_only_the_environment_misspells_is_refused(
    configuration: Callable[..., AirflowConfiguration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CONTAINER_RUNTIME_POLICIES__MAX_CPUS", "1")
    with pytest.raises(SettingError, match="not read by anything"):
        resolve_connection("docker", configuration=configuration())


def test_sections_of_teams_and_other_variables_are_not_ours(
    configuration: Callable[..., AirflowConfiguration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__TEAM_A___CELERY__BROKER_URL", "x")
    monkeypatch.setenv("AIRFLOW__", "x")
    monkeypatch.setenv("AIRFLOW__CORE", "x")
    assert resolve_connection("docker", configuration=configuration()).namespace == "airflow"


def test_the_flags(configuration: Callable[..., AirflowConfiguration], monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_execution_backend(configuration()) == "containerd"
    assert dag_parsing_backend(configuration()) is None
    monkeypatch.setenv("AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME", "podman")
    with pytest.raises(SettingError, match="environment variable AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME"):
        dag_parsing_backend(configuration())


@pytest.mark.parametrize("section", ["container_runtime", "container_runtime_environment"])
def test_a_lonely_percent_sign_is_told(configuration: Callable[..., AirflowConfiguration], section: str) -> None:
    with pytest.raises(SettingError, match="a percent sign is written %%") as caught:
        resolve("task", "docker", configuration=configuration(f"[{section}]\nhostname = 50%\n"))
    assert caught.value.source == f"[{section}] in airflow.cfg"


def test_keys_with_capitals_are_told(configuration: Callable[..., AirflowConfiguration]) -> None:
    with pytest.raises(SettingError, match="Keys are written in small letters: socket_path"):
        resolve_connection("docker", configuration=configuration("[docker_runtime]\nSOCKET_PATH = /x\n"))


def test_the_default_section_is_not_ours(configuration: Callable[..., AirflowConfiguration]) -> None:
    text = "[DEFAULT]\nother = 1\n[docker_runtime]\nnamespace = team\n"
    assert resolve_connection("docker", configuration=configuration(text)).namespace == "team"


def test_airflow_itself_knows_our_options_and_defaults(configuration: Callable[..., AirflowConfiguration]) -> None:
    configuration()
    from airflow.configuration import conf

    assert conf.get("containerd_runtime", "socket_path") == "/run/containerd/containerd.sock"
    assert conf.get("core", "task_execution_runtime") == ""
    assert conf.getint("core", "parallelism") > 0
