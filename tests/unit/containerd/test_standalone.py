"""The containerd client could be published alone: it imports nothing of the rest of the project, and never Airflow."""

from __future__ import annotations

import ast
from pathlib import Path

import airflow_isolation.containerd

PACKAGE = Path(airflow_isolation.containerd.__file__).parent


def test_imports_stay_inside() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 30
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, module
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] != "airflow", module
                if name.partition(".")[0] == "airflow_isolation":
                    assert name == "airflow_isolation.containerd" or name.startswith("airflow_isolation.containerd."), (
                        module
                    )


def test_reader_of_mounted_images_is_a_program_of_the_standard_library() -> None:
    tree = ast.parse((PACKAGE / "read_mounted.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"base64", "ctypes", "errno", "json", "os", "stat", "sys"}
