"""What enters a container of the worker's configuration and files, and what does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.integration import workload_environment as environment
from airflow_isolation.integration.seams.configuration import configured_options, sensitive_options

if TYPE_CHECKING:
    from pathlib import Path


def test_what_people_set_is_forwarded_and_defaults_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__DEFAULT_TASK_RETRIES", "7")
    monkeypatch.setenv("AIRFLOW__MY_TEAM__REGION", "eu")
    options = configured_options()
    forwarded = environment.configuration_environment(options, sensitive_options())
    assert forwarded["AIRFLOW__CORE__DEFAULT_TASK_RETRIES"] == "7"
    assert forwarded["AIRFLOW__MY_TEAM__REGION"] == "eu"
    assert "AIRFLOW__CORE__DEFAULT_POOL_TASK_SLOT_COUNT" not in forwarded


@pytest.mark.parametrize(
    "variable",
    [
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
        "AIRFLOW__DATABASE__SQL_ENGINE_ENCODING",
        "AIRFLOW__CORE__FERNET_KEY",
        "AIRFLOW__API_AUTH__JWT_SECRET",
        "AIRFLOW__API__SECRET_KEY",
        "AIRFLOW__CELERY__BROKER_URL",
        "AIRFLOW__SECRETS__BACKEND",
        "AIRFLOW__SECRETS__BACKEND_KWARGS",
        "AIRFLOW__WORKERS__SECRETS_BACKEND_KWARGS",
        "AIRFLOW__MY_TEAM__DB_PASSWORD",
        "AIRFLOW__MY_TEAM__API_TOKEN",
        "AIRFLOW__CONTAINER_RUNTIME__IMAGE",
        "AIRFLOW__TASK_EXECUTION_DOCKER_RUNTIME_ENVIRONMENT__X",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL",
        "AIRFLOW__CORE__DEFAULT_IMPERSONATION",
    ],
)
def test_secrets_stay_on_the_worker(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "needle-in-the-haystack")
    forwarded = environment.configuration_environment(configured_options(), sensitive_options())
    assert "needle-in-the-haystack" not in forwarded.values()
    assert variable not in forwarded


def test_a_command_that_gives_a_secret_is_neither_run_nor_forwarded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY_CMD", f"touch {ran}")
    forwarded = environment.configuration_environment(configured_options(), sensitive_options())
    assert not [name for name in forwarded if "FERNET" in name]
    assert not ran.exists()


def test_any_bundle_is_a_local_directory_in_the_container(tmp_path: Path) -> None:
    (bundle,) = json.loads(
        environment.bundle_environment("git", tmp_path)["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"]
    )
    assert bundle["name"] == "git"
    assert bundle["classpath"].endswith("LocalDagBundle")
    assert bundle["kwargs"] == {"path": str(tmp_path)}


def test_a_directory_inside_another_is_mounted_once(tmp_path: Path) -> None:
    inner = tmp_path / "dags" / "plugins"
    inner.mkdir(parents=True)
    mounts = environment.read_only_mounts([inner, tmp_path / "dags"])
    assert [(mount.source, mount.target, mount.read_only) for mount in mounts] == [
        (str(tmp_path / "dags"), str(tmp_path / "dags"), True)
    ]


def test_a_symbolic_link_is_mounted_at_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "sha").mkdir()
    (tmp_path / "current").symlink_to("sha")
    (mount,) = environment.read_only_mounts([tmp_path / "current"])
    assert (mount.source, mount.target) == (str(tmp_path / "sha"), str(tmp_path / "current"))


def test_a_link_out_of_a_mounted_directory_gets_its_own_mount(tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "dags" / "plugins").symlink_to(tmp_path / "elsewhere")
    mounts = environment.read_only_mounts([tmp_path / "dags", tmp_path / "dags" / "plugins"])
    assert [mount.source for mount in mounts] == [str(tmp_path / "dags"), str(tmp_path / "elsewhere")]
