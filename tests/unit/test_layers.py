"""The house: imports point down, lower layers know no Airflow, and its private names are touched in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import airflow_isolation
from airflow_isolation import agent

PACKAGE = Path(airflow_isolation.__file__).parent
#: From the ground up; a layer may import itself and what stands before it. The same floor is one tuple.
FLOORS = (
    ("agent", "errors", "container_spec"),
    ("containerd", "oci", "cgroups"),
    ("runtime",),
    ("settings",),
    ("bridge",),
    ("integration",),
)
FREE_OF_AIRFLOW = ("agent", "errors", "container_spec", "containerd", "oci", "cgroups", "runtime", "bridge")
#: Written inside the container, by Airflow's own entry points: the other half of the seam.
IN_THE_CONTAINER = (PACKAGE / "agent" / "agent.py", PACKAGE / "agent" / "preload.py")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(layer: str) -> int:
    return next(number for number, layers in enumerate(FLOORS) if layer in layers)


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    for name in imports(path):
        if name.startswith("airflow_isolation."):
            imported = name.split(".")[1]
            if imported == layer:
                continue
            below = floor_of(imported) < floor_of(layer)
            same_ground = floor_of(imported) == floor_of(layer) == 0
            assert below or same_ground, f"{layer} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lower_layers_know_no_airflow(path: Path) -> None:
    if layer_of(path) in FREE_OF_AIRFLOW and path not in IN_THE_CONTAINER:
        assert not [name for name in imports(path) if name == "airflow" or name.startswith("airflow.")]


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


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_not_public_api_of_airflow_is_touched_in_the_seams_alone(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "integration" / "seams") or path in IN_THE_CONTAINER:
        return
    for name in imports(path):
        if name.startswith("airflow."):
            public = any(
                name == known or name.startswith(f"{known}.") or known.startswith(f"{name}.") for known in PUBLIC
            )
            assert public, f"{path.relative_to(PACKAGE)} imports {name}"


def test_the_agent_needs_the_standard_library_and_itself() -> None:
    import sys

    for file in agent.SOURCES:
        ours = {name for name in imports(file) if not name.startswith(("airflow.", "airflow_isolation.agent"))}
        assert {name.split(".")[0] for name in ours} <= {
            *sys.stdlib_module_names,
            "__future__",
            *(source.stem for source in agent.SOURCES),
        }
