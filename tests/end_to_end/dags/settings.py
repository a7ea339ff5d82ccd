"""Which container a task gets, and what it finds in it."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

from airflow.sdk import dag, get_current_context, task

#: cgroup v2, and v1.
MEMORY_LIMIT = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def surroundings() -> dict[str, Any]:
    """What tells one container from another."""
    return {
        "has_cowsay": importlib.util.find_spec("cowsay") is not None,
        "from": os.environ.get("FROM", ""),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "hostname": socket.gethostname(),
        "netrc": len(netrc.read_text()) if (netrc := Path.home() / ".netrc").exists() else 0,
        "memory_limit": next((int(file.read_text()) for file in MEMORY_LIMIT if file.exists()), None),
    }


@dag(schedule=None)
def chosen() -> None:
    """settings.yaml gives patterns; executor_config is stronger."""

    @task
    def plain() -> dict[str, Any]:
        return surroundings()

    @task
    def train_first() -> dict[str, Any]:
        return surroundings()

    @task(executor_config={"container": {"image": "$closed_home", "environment": {"FROM": "executor_config"}}})
    def train_last() -> dict[str, Any]:
        return surroundings()

    @task
    def hooked() -> dict[str, Any]:
        return surroundings()

    plain()
    train_first()
    train_last()
    hooked()


@dag(schedule=None)
def probed() -> None:
    @task
    def probe() -> dict[str, Any]:
        from airflow.sdk.configuration import conf
        from probe import reality  # type: ignore[import-not-found]  # copied into the bundle by the tests

        context: Any = get_current_context()
        found: dict[str, Any] = reality(context["dag_run"].conf["needles"])
        found["configuration"] = {
            f"{section}.{option}": conf.get(section, option, fallback=None)
            for section, option in (
                ("core", "fernet_key"),
                ("database", "sql_alchemy_conn"),
                ("api_auth", "jwt_secret"),
            )
        }
        return found

    @task
    def too_much_memory() -> None:
        kept = []
        while True:
            kept.append(os.urandom(16 * 1024 * 1024))

    probe()
    too_much_memory()


chosen()
probed()
