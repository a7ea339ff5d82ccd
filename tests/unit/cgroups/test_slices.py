"""The names of slices, and the paths that systemd makes of them; literal examples of systemd.slice(5)."""

from __future__ import annotations

import pytest

from airflow_isolation.cgroups import ValueRefused, slice_name, slice_path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("airflow", "airflow.slice"),
        ("/airflow/task_execution/", "airflow-task_execution.slice"),
        ("my-team/a b", "my\\x2dteam-a\\x20b.slice"),
        ("späße", "sp\\xc3\\xa4\\xc3\\x9fe.slice"),
        ("a-b.slice", "a-b.slice"),
        ("a.slice/a-b.slice", "a-b.slice"),
    ],
)
def test_a_path_becomes_the_name_of_a_slice(path: str, name: str) -> None:
    assert slice_name(path) == name


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("airflow.slice", "airflow.slice"),
        ("a-b.slice", "a.slice/a-b.slice"),
        ("a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice"),
        ("my\\x2dteam-x.slice", "my\\x2dteam.slice/my\\x2dteam-x.slice"),
    ],
)
def test_a_slice_is_below_those_that_its_name_begins_with(name: str, path: str) -> None:
    assert slice_path(name) == path


@pytest.mark.parametrize("path", ["", "/", ".", "../x", "b.slice/a-b.slice", "x/a.slice"])
def test_what_can_not_be_a_slice_is_refused(path: str) -> None:
    with pytest.raises(ValueRefused):
        slice_name(path)


@pytest.mark.parametrize("name", ["", ".slice", "a", "-.slice", "a--b.slice", "-a.slice", "a-.slice", "a/b.slice"])
def test_what_is_not_the_name_of_a_slice_is_refused(name: str) -> None:
    with pytest.raises(ValueRefused, match="is not the name of a slice"):
        slice_path(name)
