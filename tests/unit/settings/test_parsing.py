"""The keys of DAG parsing: the mode of a file, the containers of a DAG processor, and who may read what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.unit.settings.conftest import Ini

from airflow_isolation.errors import SettingError
from airflow_isolation.settings.effective import Grant, ParsePoolSettings
from airflow_isolation.settings.formats import parse_grant
from airflow_isolation.settings.policy import Policy
from airflow_isolation.settings.quantities import parse_count
from airflow_isolation.settings.resolve import check_configuration, parse_pool_settings

if TYPE_CHECKING:
    from tests.unit.settings.conftest import Bundle


def policy(text: str) -> Policy:
    return Policy.configured(Ini(f"[container_runtime_policy]\n{text}\n"))


def test_a_file_chooses_its_mode(bundle: Bundle) -> None:
    assert bundle.resolve(purpose="parse").parse_mode == "fork"
    bundle.write("container: {parse_mode: fresh}")
    assert bundle.resolve(purpose="parse").parse_mode == "fresh"


def test_the_mode_can_be_set_for_all(bundle: Bundle) -> None:
    bundle.cfg += "[scheduler_dag_parsing_container_runtime]\nparse_mode = fresh\n"
    assert bundle.resolve(purpose="parse").parse_mode == "fresh"


def test_another_mode_is_a_mistake(bundle: Bundle) -> None:
    bundle.write("container:\n  parse_mode: spoon\n")
    with pytest.raises(SettingError, match=r"line 2, container\.parse_mode: 'spoon' .* fork or fresh"):
        bundle.resolve(purpose="parse")


def test_the_pool_has_defaults() -> None:
    assert parse_pool_settings(Ini()) == ParsePoolSettings(
        parse_containers=8, parse_idle_timeout=600, parse_max_age=3600, parse_max_forks=1000
    )


def test_the_pool_is_configured_in_its_section_beside_what_overrides() -> None:
    ini = Ini("[scheduler_dag_parsing_container_runtime]\nimage = a:1\nparse_containers = 3\nparse_max_memory = 1Gi\n")
    settings = parse_pool_settings(ini)
    assert (settings.parse_containers, settings.parse_max_memory) == (3, 1 << 30)
    check_configuration("parse", "docker", configuration=ini)


@pytest.mark.parametrize(
    "text",
    [
        "[container_runtime]\nparse_containers = 3\n",
        "[container_runtime]\nimag = x\n",
        "[scheduler_dag_parsing_docker_runtime]\nmemory = much\n",
        "[container_runtime_policy]\nallowed_variables = x\n",
        "[container_runtimes]\nimage = x\n",
    ],
)
def test_a_mistake_is_found_without_a_dag(text: str) -> None:
    with pytest.raises(SettingError):
        check_configuration("parse", "docker", configuration=Ini(text))


def test_what_is_fine_without_an_image_is_fine() -> None:
    check_configuration("parse", "docker", configuration=Ini("[container_runtime]\ncpus = 1\n"))


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "1e99", "2Gi"])
def test_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "x", ":x", "x:", " : ", "a:\n"])
def test_no_grant(text: str) -> None:
    with pytest.raises(ValueError, match=r"FILE:ID|control character"):
        parse_grant(text)


def test_a_grant_ends_its_file_at_the_first_colon() -> None:
    assert parse_grant("sales/*: with:colon") == Grant("sales/*", "with:colon")


def test_without_grants_everybody_may_read_everything() -> None:
    assert policy("").permissions.may_use_variable("any/file.py", "x")
    assert policy("").permissions.may_read_connection("any/file.py", "x")
    assert policy("").parse_may_write is False


@pytest.mark.parametrize(
    ("file", "id", "may"),
    [
        ("sales/deep/a.py", "sales_db", True),
        ("sales/a.py", "warehouse", False),
        ("ops/reports.py", "warehouse", True),
        ("ops/reports.py", "sales_db", False),
        ("other/a.py", "sales_db", False),
        ("Sales/a.py", "sales_db", False),
    ],
)
def test_with_grants_what_none_gives_is_refused(file: str, id: str, may: bool) -> None:
    granted = policy("allowed_connections = sales/*:sales_*, */reports.py:warehouse")
    assert granted.permissions.may_read_connection(file, id) is may
    assert granted.permissions.may_use_variable(file, id)
