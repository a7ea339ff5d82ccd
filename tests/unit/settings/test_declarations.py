"""One declaration of every key: Airflow takes it, and the documentation is made from it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
from tests.unit.settings.conftest import Ini

from airflow_isolation.errors import PolicyRefused
from airflow_isolation.integration.provider_info import get_provider_info
from airflow_isolation.settings.declarations import KEYS, POLICY_SECTION, Key, author_keys, keys_of, known_sections
from airflow_isolation.settings.effective import Origin
from airflow_isolation.settings.layers import Assignment
from airflow_isolation.settings.policy import Policy
from airflow_isolation.settings.provider_config import config_sections, provider_config

ROOT = Path(__file__).resolve().parents[3]


def policy(text: str) -> Policy:
    return Policy.configured(Ini(f"[{POLICY_SECTION}]\n{text}"))


def test_airflows_schema_takes_the_provider_info() -> None:
    airflow = find_spec("airflow")
    assert airflow is not None
    assert airflow.origin is not None
    schema = json.loads(Path(airflow.origin).with_name("provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_every_section_is_declared_and_every_option_described() -> None:
    config = provider_config()
    assert set(config) - {"core"} == {
        name for name in known_sections() if not name.endswith(("_labels", "_environment"))
    }
    assert tuple(config) == config_sections()
    for section in config.values():
        assert section["description"]
        assert section["options"]
        assert all(option["description"] for option in section["options"].values())


def test_a_default_is_declared_once() -> None:
    config = provider_config()
    assert config["container_runtime"]["options"]["network"]["default"] == "host"
    assert config["task_execution_docker_runtime"]["options"]["network"]["default"] is None


@pytest.mark.parametrize("key", [key for key in KEYS if not key.is_map], ids=lambda key: key.name)
def test_default_and_example_are_values_of_the_key(key: Key) -> None:
    assert key.example
    for text in (key.default, key.example):
        items = json.loads(text) if text.startswith("[") else text.split(",") if key.is_list else [text]
        for item in filter(None, items):
            key.parse(item.strip())


def test_the_administrators_keys_are_not_the_authors() -> None:
    authors = {key.name for key in author_keys()}
    assert authors.isdisjoint(
        {
            "seccomp_profile",
            "read_only_root",
            "allow_root",
            "cgroup_parent",
            "state_dir",
            "socket_path",
            "volume_mount_yaml",
        }
    )


#: Numbers that authors may set without a bound, and why.
UNBOUNDED = {"memory_high": "it slows the workload itself down, and takes nothing from others"}


@pytest.mark.parametrize("key", author_keys(), ids=lambda key: key.name)
def test_whatever_number_an_author_may_set_the_administrator_can_bound(key: Key) -> None:
    """A new one is bounded by a ``max_…`` in the policy, or stands in UNBOUNDED."""
    number = not key.is_map and not key.is_list and isinstance(key.parse(key.example), (int, float))
    bounds = {bound.name: bound for bound in keys_of(POLICY_SECTION)}
    assert (number and key.name not in UNBOUNDED) == (f"max_{key.name}" in bounds)
    if number and key.name not in UNBOUNDED:
        bound = bounds[f"max_{key.name}"]
        layer = {key.name: Assignment(key.parse(key.example), Origin("sales.yaml", author=True))}
        policy(f"max_{key.name} = {key.example}").check(layer)
        over = {key.name: Assignment(2 * key.parse(key.example), Origin("sales.yaml", author=True))}  # type: ignore[operator]
        with pytest.raises(PolicyRefused, match=f"max_{key.name} allows"):
            policy(f"max_{key.name} = {key.example}").check(over)
        assert bound.parse(key.example) == key.parse(key.example)


def test_the_documentation_is_made_from_the_declarations() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "hack" / "gen-settings-reference"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_provider_info_imports_little() -> None:
    program = (
        "import sys, airflow_isolation.integration.provider_info as p; p.get_provider_info();"
        "print(*sorted({'airflow', 'yaml', 'grpc', 'pydantic', 'docker', 'psutil', 'structlog'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
