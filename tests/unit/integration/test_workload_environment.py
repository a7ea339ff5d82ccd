"""What enters a container of the worker's configuration and files, and what does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pendulum
import pytest

from airflow_isolation.integration import workload_environment as environment
from airflow_isolation.integration.seams.configuration import configured_options, sensitive_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


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


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mapping[str, str]]]:
    """What a process with these variables forwards."""

    def of(**variables: str) -> Mapping[str, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        environment.forwarded_environment.cache_clear()
        return environment.forwarded_environment()

    yield of
    environment.forwarded_environment.cache_clear()


@pytest.mark.parametrize(
    ("configured", "here", "there"),
    [
        ("system", "Europe/Berlin", "Europe/Berlin"),
        ("Asia/Tokyo", "Europe/Berlin", "Asia/Tokyo"),
        ("system", "", "system"),
    ],
)
def test_the_system_s_time_zone_is_the_worker_s(
    *, forwarded: Any, monkeypatch: pytest.MonkeyPatch, configured: str, here: str, there: str
) -> None:
    with Path("/usr/share/zoneinfo/Etc/UTC").open("rb") as file:
        nameless = pendulum.Timezone.from_file(file)
    # Airflow asks once in a process.
    monkeypatch.setattr("airflow.settings.TIMEZONE", pendulum.timezone(here) if here else nameless)
    found = forwarded(AIRFLOW__CORE__DEFAULT_TIMEZONE=configured)
    assert found["AIRFLOW__CORE__DEFAULT_TIMEZONE"] == there


def test_a_default_time_zone_that_nobody_set_is_not_forwarded(forwarded: Any) -> None:
    assert "AIRFLOW__CORE__DEFAULT_TIMEZONE" not in forwarded()


class OfTheTest(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler that writes to a stream, as somebody may have in a module of his own."""


LOGGING: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("handler", "stays"),
    [
        ({"class": "logging.FileHandler", "filename": "audit.log"}, True),
        ({"class": "logging.handlers.RotatingFileHandler", "filename": "audit.log"}, True),
        ({"class": "logging.handlers.SysLogHandler", "address": "/dev/log"}, True),
        ({"()": "logging.NullHandler"}, True),
        ({"class": "logging.StreamHandler"}, False),
        ({"class": "logging.NullHandler"}, False),
        ({"class": f"{__name__}.OfTheTest"}, False),
        ({"class": "airflow.utils.log.file_task_handler.FileTaskHandler"}, False),
    ],
    ids=str,
)
def test_a_logging_configuration_that_writes_to_this_host_stays_here(
    *, forwarded: Any, monkeypatch: pytest.MonkeyPatch, handler: dict[str, str], stays: bool
) -> None:
    monkeypatch.setitem(LOGGING, "handlers", {"audit": handler})
    found = forwarded(AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS=f"{__name__}.LOGGING")
    assert ("AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS" in found) is not stays


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
