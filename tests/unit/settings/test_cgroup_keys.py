"""The keys that need cgroup v2: what is accepted, what is refused in words, and what reaches the container's spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_isolation.container_spec import DeviceRates, Resources
from airflow_isolation.errors import SettingError
from airflow_isolation.settings.declarations import Place, author_keys, keys_of
from airflow_isolation.settings.quantities import (
    parse_device_rates,
    parse_processors,
    parse_swap,
    parse_weight,
)
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.settings.conftest import Bundle

MIB = 1024 * 1024
GIB = 1024 * MIB
AUTHORS = ("cpu_weight", "cpuset", "memory_request", "memory_high", "memory_swap", "io_max", "io_weight")
ADMINISTRATORS = ("budget_cpus", "budget_memory", "budget_pids")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_weight, "1", 1),
        (parse_weight, "10000", 10_000),
        (parse_processors, "0", "0"),
        (parse_processors, "0-3, 8", "0-3,8"),
        (parse_swap, "0", 0),
        (parse_swap, "512Mi", 512 * MIB),
        (parse_device_rates, "/dev/sda rbps=10Mi", DeviceRates(device="/dev/sda", rbps=10 * MIB)),
        (parse_device_rates, "8:16 wbps=1M riops=5 wiops=7", DeviceRates(device="8:16", wbps=10**6, riops=5, wiops=7)),
    ],
)
def test_what_is_accepted(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        (parse_weight, "0", "is not a weight"),
        (parse_weight, "10001", "is not a weight"),
        (parse_weight, "1.5", "is not a weight"),
        (parse_weight, "-1", "is not a weight"),
        (parse_weight, "1e999", "is not a weight"),
        (parse_processors, "", "is not a list of processors"),
        (parse_processors, "3-1", "is not a list of processors"),
        (parse_processors, "0-", "is not a list of processors"),
        (parse_processors, "all", "is not a list of processors"),
        (parse_processors, "٣", "is not a list of processors"),
        (parse_swap, "-1", "write more than 0"),
        (parse_swap, "10 potatoes", "unknown unit"),
        (parse_device_rates, "", "is not a limit for a disk"),
        (parse_device_rates, "/dev/sda", "is not a limit for a disk"),
        (parse_device_rates, "sda rbps=1Mi", "is not a limit for a disk"),
        (parse_device_rates, "/dev/sda rbps", "is not a number of bytes"),
        (parse_device_rates, "/dev/sda rbps=0", "write more than 0"),
        (parse_device_rates, "/dev/sda riops=0", "allows no operation"),
        (parse_device_rates, "/dev/sda speed=1", "is none of rbps="),
    ],
)
def test_what_is_not_is_refused_in_words(parse: Callable[[str], object], text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_authors_set_limits_and_administrators_budgets() -> None:
    keys = {key.name: key for key in author_keys()}
    assert [keys[name].document_name for name in AUTHORS] == [f"resources.{name}" for name in AUTHORS]
    assert not keys.keys() & set(ADMINISTRATORS)


@pytest.mark.parametrize("section", ["container_runtime", "task_execution_container_runtime", "containerd_runtime"])
def test_all_of_them_may_stand_in_every_section(section: str) -> None:
    declared = {key.name: key for key in keys_of(section)}
    assert declared.keys() >= {*AUTHORS, *ADMINISTRATORS}
    assert all(Place.EVERYWHERE in declared[name].places for name in (*AUTHORS, *ADMINISTRATORS))


def test_they_reach_the_containers_spec(bundle: Bundle) -> None:
    bundle.cfg += (
        "memory = 2Gi\ncpu_weight = 50\nmemory_swap = 0\nio_max = /dev/sda rbps=10Mi wiops=9, 8:16 wbps=1Mi\n"
        "budget_cpus = 12\nbudget_memory = 48Gi\nbudget_pids = 20000\n"
    )
    bundle.write(
        "container:\n"
        "  resources: {cpuset: 0-3, memory_request: 1Gi, io_weight: 200}\n"
        '  tasks: {"load": {resources: {cpuset: 0, memory_high: 1500Mi}}}\n'
    )
    spec = container_spec(bundle.resolve(), argv=["x"])
    assert spec.resources == Resources(
        memory=2 * GIB,
        pids=4096,
        cpu_weight=50,
        cpuset="0",
        memory_request=GIB,
        memory_high=1500 * MIB,
        memory_swap=0,
        io_max=(DeviceRates(device="/dev/sda", rbps=10 * MIB, wiops=9), DeviceRates(device="8:16", wbps=MIB)),
        io_weight=200,
    )
    assert spec.budget == Resources(cpus=12, memory=48 * GIB, pids=20_000)


def test_the_rates_of_disks_are_a_list_in_a_document_too(bundle: Bundle) -> None:
    bundle.cfg += "io_max = 8:0 rbps=1Mi\n"
    bundle.write('container: {resources: {io_max: ["/dev/sda wbps=10Mi", "8:16 riops=5"]}}')
    rates = (DeviceRates(device="/dev/sda", wbps=10 * MIB), DeviceRates(device="8:16", riops=5))
    assert container_spec(bundle.resolve(), argv=["x"]).resources.io_max == rates


def test_a_budget_is_not_for_authors(bundle: Bundle) -> None:
    bundle.write("container: {budget_memory: 1Gi}")
    with pytest.raises(SettingError, match="budget_memory"):
        bundle.resolve()


@pytest.mark.parametrize(
    ("purpose", "parse_mode", "together"), [("task", "fork", True), ("parse", "fork", False), ("parse", "fresh", True)]
)
def test_a_container_of_many_files_loses_only_the_one_that_needs_too_much(
    bundle: Bundle, purpose: str, parse_mode: str, together: bool
) -> None:
    bundle.cfg += f"[scheduler_dag_parsing_container_runtime]\nparse_mode = {parse_mode}\n"
    settings = bundle.resolve(purpose=purpose)
    assert container_spec(settings, argv=["x"]).resources.oom_group is together
