"""The house: imports point down, lower layers know no Airflow, and its private names are touched in one place."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import airflow_isolation
from airflow_isolation import agent

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(airflow_isolation.__file__).parent
#: From the ground up; a layer may import itself and what stands before it. The same floor is one tuple.
FLOORS = (
    ("agent", "errors", "container_spec"),
    ("containerd", "oci", "cgroups"),
    ("runtime",),
    ("settings",),
    ("bridge",),
    ("node",),
    ("integration",),
)
FREE_OF_AIRFLOW = ("agent", "errors", "container_spec", "containerd", "oci", "cgroups", "runtime", "bridge", "node")
#: Written inside the container, by Airflow's own entry points: the other half of the seam.
IN_THE_CONTAINER = (PACKAGE / "agent" / "agent.py", PACKAGE / "agent" / "preload.py")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(layer: str) -> int:
    return next(number for number, layers in enumerate(FLOORS) if layer in layers)


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]


@cache
def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def refused(is_refused: Callable[[Path, str], bool]) -> list[str]:
    """What all modules together import and should not, in words."""
    return [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules()
        for name in sorted(imports(path))
        if is_refused(path, name)
    ]


def test_all_modules_are_looked_at() -> None:
    assert {layer_of(path) for path in modules()} == {layer for floor in FLOORS for layer in floor}


def points_up(path: Path, name: str) -> bool:
    if not name.startswith("airflow_isolation."):
        return False
    own, imported = layer_of(path), name.split(".")[1]
    same_ground = floor_of(imported) == floor_of(own) == 0
    return own != imported and not same_ground and floor_of(imported) >= floor_of(own)


def test_imports_point_down() -> None:
    assert refused(points_up) == []
    assert points_up(PACKAGE / "oci" / "spec.py", "airflow_isolation.runtime.docker")
    assert points_up(PACKAGE / "oci" / "spec.py", "airflow_isolation.cgroups")


def knows_airflow(path: Path, name: str) -> bool:
    below = layer_of(path) in FREE_OF_AIRFLOW and path not in IN_THE_CONTAINER
    return below and (name == "airflow" or name.startswith("airflow."))


def test_lower_layers_know_no_airflow() -> None:
    assert refused(knows_airflow) == []
    assert knows_airflow(PACKAGE / "bridge" / "spare.py", "airflow.models")


#: Public API of Airflow: documented for authors of providers, executors and plug-ins.
PUBLIC = (
    "airflow.__version__",
    "airflow.cli.cli_config",
    "airflow.cli.simple_table",
    "airflow.configuration",
    "airflow.sdk.api.client",
    "airflow.sdk.execution_time.coordinator.BaseCoordinator",
    "airflow.exceptions",
)


def is_private(path: Path, name: str) -> bool:
    if path.is_relative_to(PACKAGE / "integration" / "seams") or path in IN_THE_CONTAINER:
        return False
    return name.startswith("airflow.") and not any(
        name == known or name.startswith(f"{known}.") or known.startswith(f"{name}.") for known in PUBLIC
    )


def test_what_is_not_public_api_of_airflow_is_touched_in_the_seams_alone() -> None:
    assert refused(is_private) == []
    assert is_private(PACKAGE / "integration" / "routing.py", "airflow.sdk.execution_time.supervisor")


def test_the_agent_needs_the_standard_library_and_itself() -> None:
    import sys

    for file in agent.SOURCES:
        ours = {name for name in imports(file) if not name.startswith(("airflow.", "airflow_isolation.agent"))}
        assert {name.split(".")[0] for name in ours} <= {
            *sys.stdlib_module_names,
            "__future__",
            *(source.stem for source in agent.SOURCES),
        }
