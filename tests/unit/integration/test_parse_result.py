"""What of a parse's report is believed: nothing about other files and other DAGs."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.integration.dag_processing.result import (
    ERROR_LIMIT,
    NotAResult,
    ParseReport,
    RequestedFile,
    believed,
)

FILE = RequestedFile(path="/bundle/team/sales.py", relative_path="team/sales.py")
ARCHIVE = RequestedFile(
    path="/bundle/sales.zip", relative_path="sales.zip", members=frozenset({"one.py", "deep/two.py", "../evil.py"})
)
TYPES = ("non-existent pool",)


def report(file: RequestedFile, **reported: Any) -> ParseReport:
    nothing: dict[str, Any] = {"dags": [], "import_errors": None, "warnings": None}
    return believed(file, **{**nothing, **reported}, warning_types=TYPES)


def dag(**more: Any) -> dict[str, Any]:
    return {"__version": 3, "dag": {"dag_id": "a", "tasks": [1], **more}}


def places(file: RequestedFile, claimed: object) -> tuple[str, str]:
    (found,) = report(file, dags=[dag(fileloc=claimed, relative_fileloc=claimed)]).dags
    return found["dag"]["fileloc"], found["dag"]["relative_fileloc"]


@pytest.mark.parametrize(
    "claimed",
    [
        "/bundle/team/sales.py",
        "/etc/passwd",
        "",
        None,
        7,
        ["x"],
        "/bundle/team/sales.py/../../../etc/passwd",
        "other.py",
    ],
)
def test_a_dag_is_of_the_file_that_was_asked_for(claimed: object) -> None:
    assert places(FILE, claimed) == ("/bundle/team/sales.py", "team/sales.py")


@pytest.mark.parametrize(
    ("claimed", "inner"),
    [
        ("/bundle/sales.zip/one.py", "/one.py"),
        ("/bundle/sales.zip/deep/two.py", "/deep/two.py"),
        ("/bundle/sales.zip/three.py", ""),
        ("/bundle/sales.zip/../evil.py", ""),
        ("/bundle/sales.zip/deep/../one.py", ""),
        ("/bundle/sales.zip", ""),
        ("/etc/passwd", ""),
    ],
)
def test_a_dag_of_an_archive_is_of_a_member_that_is_in_it(claimed: str, inner: str) -> None:
    assert places(ARCHIVE, claimed) == (f"/bundle/sales.zip{inner}", f"sales.zip{inner}")


def test_everything_else_of_a_dag_is_kept_and_what_was_given_is_not_changed() -> None:
    given_dag = dag(fileloc="/etc/passwd")
    (found,) = report(FILE, dags=[given_dag]).dags
    assert found["__version"] == 3
    assert found["dag"]["tasks"] == [1]
    assert given_dag == dag(fileloc="/etc/passwd")


@pytest.mark.parametrize(
    "data", [None, [], {}, {"dag": None}, {"dag": {}}, {"dag": {"dag_id": 7}}, {"dag": {"dag_id": ""}}]
)
def test_what_is_no_dag_is_refused(data: object) -> None:
    with pytest.raises(NotAResult):
        report(FILE, dags=[data])


def test_import_errors_of_other_files_are_told_as_this_files_own() -> None:
    errors = report(FILE, import_errors={"other.py": "a", "/etc/passwd": "b", "team/sales.py": "c", 7: 8}).import_errors
    assert errors == {"team/sales.py": "a\nb\nc\n8"}


def test_import_errors_of_an_archive_are_told_of_its_members_by_their_path_in_the_bundle() -> None:
    reported = {
        "/bundle/sales.zip/one.py": "absolute, as Airflow",
        "sales.zip/deep/two.py": "relative",
        "x.zip/one.py": "other",
    }
    assert report(ARCHIVE, import_errors=reported).import_errors == {
        "sales.zip/one.py": "absolute, as Airflow",
        "sales.zip/deep/two.py": "relative",
        "sales.zip": "other",
    }


def test_import_errors_are_cut() -> None:
    errors = report(FILE, import_errors={str(number): "x" * 1000 for number in range(5000)}).import_errors
    assert len(errors["team/sales.py"]) <= ERROR_LIMIT


def test_warnings_are_of_the_reports_own_dags_and_of_known_kinds() -> None:
    good = {"dag_id": "a", "warning_type": "non-existent pool", "message": "m"}
    bad = [
        {**good, "dag_id": "b"},
        {**good, "warning_type": "x"},
        {**good, "extra": 1},
        {**good, "message": None},
        7,
        None,
    ]
    assert report(FILE, dags=[dag()], warnings=[good, *bad]).warnings == [good]


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_nothing_else_raises(data: object) -> None:
    with suppress(NotAResult):
        report(ARCHIVE, dags=[{"dag": {"dag_id": "a", "fileloc": data}}, data], warnings=[data])


def test_an_archive_is_known_by_its_content_as_airflow_does(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.py", "")
    (tmp_path / "no.zip").write_text("text")
    (tmp_path / "a.py").write_bytes((tmp_path / "a.zip").read_bytes())
    assert RequestedFile.at(tmp_path, Path("a.zip")).members == {"one.py"}
    assert RequestedFile.at(tmp_path, Path("no.zip")).members == frozenset()
    assert RequestedFile.at(tmp_path, Path("a.py")).members == frozenset()
    assert RequestedFile.at(tmp_path, Path("gone.py")).members == frozenset()
