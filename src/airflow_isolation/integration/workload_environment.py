"""Which parts of Airflow's configuration and files a workload gets, and which it never gets.

It gets the component's effective configuration as environment variables, the bundle read-only at its own absolute
path, ``$AIRFLOW_HOME/config`` (airflow_local_settings) and the plugins folder. It never gets options that Airflow or
a provider declares sensitive, options whose names sound sensitive (password, token, …), the database, the secrets backends
or our own sections.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import structlog

from airflow_isolation.container_spec import Mount
from airflow_isolation.integration.seams.configuration import (
    configured_options,
    handlers_of_this_host,
    sensitive_options,
    sounds_sensitive,
    system_timezone,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger(logger_name="airflow_isolation.workload_environment")

#: No option of these sections enters a container.
PRIVATE_SECTIONS: Final = frozenset({"database", "secrets", "api_auth", "celery", "celery_broker_transport_options"})

#: Single options that stay on the worker, because they make sense only there; ``bundle_environment`` replaces the bundle's.
PRIVATE_OPTIONS: Final = frozenset(
    {
        # The container runs as this user; inside, Airflow would execute sudo.
        ("core", "default_impersonation"),
        ("core", "sql_alchemy_conn"),
        ("core", "task_execution_runtime"),
        ("core", "scheduler_dag_parsing_runtime"),
        ("core", "execution_api_server_url"),
        # The edge worker sets a function of its own provider, which the image may lack.
        ("core", "hostname_callable"),
        ("dag_processor", "dag_bundle_config_list"),
        ("dag_processor", "dag_bundle_storage_path"),
        ("logging", "remote_logging"),
        ("logging", "remote_log_conn_id"),
        ("logging", "base_log_folder"),
        ("logging", "dag_processor_child_process_log_directory"),
        ("sdk", "coordinators"),
        ("sdk", "queue_to_coordinator"),
        ("workers", "secrets_backend"),
        ("workers", "secrets_backend_kwargs"),
    }
)

_OUR_SECTIONS: Final = ("container_runtime", "containerd_runtime", "docker_runtime")

_LOGGING_CONFIG: Final = "AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS"
_DEFAULT_TIMEZONE: Final = "AIRFLOW__CORE__DEFAULT_TIMEZONE"

#: A writable place in every container (the tmpfs on /tmp) for what Airflow wants to write at import.
_SCRATCH: Final = "/tmp/.airflow"  # noqa: S108 - of the container, not of the host


def is_private(section: str, option: str, sensitive: set[tuple[str, str]]) -> bool:
    """Whether an option stays on the worker."""
    section, option = section.lower(), option.lower()
    if section in PRIVATE_SECTIONS or (section, option) in PRIVATE_OPTIONS or (section, option) in sensitive:
        return True
    return sounds_sensitive(option) or any(name in section for name in _OUR_SECTIONS)


def configuration_environment(
    options: Mapping[str, Mapping[str, str]], sensitive: set[tuple[str, str]]
) -> dict[str, str]:
    """AIRFLOW__SECTION__OPTION for each option that is set and may enter a container."""
    return {
        f"AIRFLOW__{section.upper().replace('.', '_')}__{option.upper()}": value
        for section, values in options.items()
        for option, value in values.items()
        if not is_private(section, option, sensitive)
    }


@functools.cache
def forwarded_environment() -> Mapping[str, str]:
    """The part of the environment that is the same for every workload of this process."""
    from airflow.configuration import AIRFLOW_HOME

    return {
        **_of_this_host(configuration_environment(configured_options(), sensitive_options())),
        "AIRFLOW_HOME": AIRFLOW_HOME,
        # An empty file, so that Airflow does not write a default one, with newly made secrets.
        "AIRFLOW_CONFIG": os.devnull,
        # Skips the set-up of the database's engine (settings.initialize): no workload may use the database.
        "PYTHON_OPERATORS_VIRTUAL_ENV_MODE": "1",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": f"{_SCRATCH}/logs",
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH": f"{_SCRATCH}/bundles",
    }


def _of_this_host(environment: dict[str, str]) -> dict[str, str]:
    """Replace values that would mean something else in a container by what they mean on this host."""
    if environment.get(_DEFAULT_TIMEZONE) == "system" and (name := system_timezone()):
        # An image's time zone is usually UTC. That would move the schedules of all DAGs without a time zone of their own.
        environment[_DEFAULT_TIMEZONE] = name
    if environment.get(_LOGGING_CONFIG) and (handlers := handlers_of_this_host()):
        # A log file that a container lacks, or can't write, would fail every import of Airflow.
        log.warning(
            "[logging] logging_config_class has handlers of this host, so containers use Airflow's default logging",
            handlers=handlers,
        )
        del environment[_LOGGING_CONFIG]
    return environment


def bundle_environment(name: str, path: Path) -> dict[str, str]:
    """Options that make any kind of bundle a local directory in the container."""
    bundle = {
        "name": name,
        "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
        "kwargs": {"path": str(path)},
    }
    return {"AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps([bundle])}


def administrators_directories() -> list[Path]:
    """The directories of the local settings and the plugins, as far as they exist."""
    from airflow.configuration import AIRFLOW_HOME, conf

    wanted = [Path(AIRFLOW_HOME, "config"), Path(conf.get("core", "plugins_folder"))]
    return [path.absolute() for path in wanted if path.is_dir()]


def shared_mounts() -> tuple[Mount, ...]:
    """The local settings and the plugins, which are the same for every task of this worker, read-only."""
    return read_only_mounts(administrators_directories())


def airflow_mounts(bundle_path: Path, dag_file: Path) -> tuple[Mount, ...]:
    """The bundle, the local settings and the plugins, each where it is on the worker, read-only."""
    wanted = [bundle_path, *administrators_directories()]
    if not dag_file.is_relative_to(bundle_path):
        # `airflow dags test` names example DAGs by their absolute path.
        wanted.append(dag_file.parent)
    return read_only_mounts([path.absolute() for path in wanted if path.is_dir()])


def read_only_mounts(directories: list[Path]) -> tuple[Mount, ...]:
    """Mounts of each directory at its own path, outer ones first. A directory that really lies in another needs no mount."""
    mounts: dict[str, Mount] = {}
    for directory in sorted(set(directories)):
        source = directory.resolve()
        if any(
            directory.is_relative_to(outer.target) and source == Path(outer.source, directory.relative_to(outer.target))
            for outer in mounts.values()
        ):
            continue
        mounts[str(directory)] = Mount(source=str(source), target=str(directory))
    home = _hidden_home(mounts)
    return (*([home] if home else []), *mounts.values())


def _hidden_home(mounts: Mapping[str, Mount]) -> Mount | None:
    """A mount over /root, if something is mounted below it: images close /root to other users (0700)."""
    if any(PurePosixPath("/root") in PurePosixPath(target).parents for target in mounts):
        return Mount(target="/root", kind="tmpfs", size=1024 * 1024, mode=0o755)
    return None
