"""A tree of its own for each test, on this kernel's cgroup v2.

The suite runs in the guest of hack/v2: there cgroup v2 has its controllers, and nobody else is on the machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB

from airflow_isolation.cgroups import Hierarchy, Tree, find_hierarchy, find_tree, list_workloads
from airflow_isolation.container_spec import ContainerSpec
from airflow_isolation.runtime.labels import PURPOSE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import ImageName


@pytest.fixture(scope="session")
def hierarchy() -> Hierarchy:
    return find_hierarchy(Path("/sys/fs/cgroup"))


@pytest.fixture
def tree(hierarchy: Hierarchy) -> Iterator[Tree]:
    """Empty at first. It goes with its last workload, so at the end it must be gone."""
    tree = find_tree(hierarchy, "airflow/tests")
    yield tree
    assert list_workloads(tree) == ()
    assert not (tree.mount / "airflow").exists()


@pytest.fixture
def spec(image_name: ImageName) -> ContainerSpec:
    return ContainerSpec(
        image=image_name("no-python"), argv=("sleep", "600"), network="none", labels={PURPOSE: "task"}, tmp_size=MIB
    )
