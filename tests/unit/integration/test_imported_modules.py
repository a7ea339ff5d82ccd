"""What a DAG file imports of Airflow, found without trusting the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.integration.dag_processing.imports import MOST, imported_airflow_modules

if TYPE_CHECKING:
    from pathlib import Path


def modules(tmp_path: Path, text: str | bytes, name: str = "a.py") -> tuple[str, ...]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return imported_airflow_modules(path)


def test_every_form_of_import(tmp_path: Path) -> None:
    text = (
        "import airflow\nimport airflow.sdk as s\nfrom airflow.providers.http.hooks.http import HttpHook\n"
        "if x:\n    from  airflow.models import (\n Variable)\nimport os, json\nfrom airflow.sdk import DAG\n"
        "from airflow_other.x import y\n# from airflow.no import x\n"
    )
    assert modules(tmp_path, text) == ("airflow.sdk", "airflow.providers.http.hooks.http", "airflow.models")


def test_bad_files_give_nothing_and_hurt_nobody(tmp_path: Path) -> None:
    assert modules(tmp_path, "(" * 1_000_000) == ()
    assert modules(tmp_path, b"\xff\xfe\0" * 100) == ()
    assert modules(tmp_path, "import airflow.x\n", "a.zip") == ()
    assert imported_airflow_modules(tmp_path / "gone.py") == ()
    assert imported_airflow_modules(tmp_path) == ()


def test_there_is_a_limit(tmp_path: Path) -> None:
    assert len(modules(tmp_path, "".join(f"import airflow.m{n}\n" for n in range(1000)))) == MOST
    assert modules(tmp_path, f"import airflow.{'x' * 300}\n") == ()
