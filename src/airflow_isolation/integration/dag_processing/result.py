"""Checks a parse's report. It comes from a process that ran user code, so it may claim anything.

Each DAG names its file (``fileloc``). Airflow reads that file on the DAG processor's host and stores its content. Airflow
also marks the DAGs of files that have import errors. So DAGs and import errors are forced to the file that was parsed, or
to a member of it when it is a zip archive. Warnings are kept only for DAGs of the report itself.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

#: How many characters of an import error are kept; a traceback of Airflow's default depth has some hundred.
ERROR_LIMIT = 100_000
#: How many import errors of one file or archive are kept.
ERRORS_LIMIT = 1000


class NotAResult(ValueError):
    """The report does not have the form of a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedFile:
    """The file that was to be parsed.

    Attributes:
        path: absolute, on this host and in the container alike.
        relative_path: in its bundle.
        members: if it is an archive, the names in it.
    """

    path: str
    relative_path: str
    members: frozenset[str] = frozenset()

    @classmethod
    def at(cls, bundle_path: Path, relative_path: Path) -> RequestedFile:
        """The file; an archive is opened for its names. As for Airflow, an archive is a zip of any name but ``….py``."""
        path = bundle_path / relative_path
        members: frozenset[str] = frozenset()
        if path.suffix != ".py" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = frozenset(archive.namelist())
        return cls(path=str(path), relative_path=str(relative_path), members=members)

    def member(self, claimed: object) -> str:
        """The archive's member that ``claimed``, a path (absolute or in the bundle), names; empty when it names none."""
        if isinstance(claimed, str):
            for prefix in (f"{self.path}/", f"{self.relative_path}/"):
                name = claimed.removeprefix(prefix)
                if name != claimed and name in self.members and _stays_inside(name):
                    return name
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseReport:
    """A parse's report: serialized DAGs, import errors by relative path, warnings as Airflow sends them."""

    dags: Sequence[Mapping[str, Any]]
    import_errors: Mapping[str, str]
    warnings: Sequence[Mapping[str, str]]


def believed(
    file: RequestedFile,
    *,
    dags: Iterable[Any],
    import_errors: Mapping[Any, Any] | None,
    warnings: Iterable[Any] | None,
    warning_types: Collection[str],
) -> ParseReport:
    """The part of the report that is about this file, as a new value of checked parts only.

    :param warning_types: the types that Airflow knows.
    :raises NotAResult: Airflow could not store a DAG in this form.
    """
    accepted = [_dag(file, dag) for dag in dags]
    dag_ids = {dag["dag"]["dag_id"] for dag in accepted}
    return ParseReport(
        dags=accepted,
        import_errors=_import_errors(file, import_errors or {}),
        warnings=[warning for warning in warnings or () if _is_warning(warning, dag_ids, warning_types)],
    )


def _dag(file: RequestedFile, data: Any) -> dict[str, Any]:
    match data:
        case {"dag": {"dag_id": str(dag_id)} as dag} if dag_id:
            member = file.member(dag.get("fileloc"))
            inner = f"/{member}" if member else ""
            return {
                **data,
                "dag": {**dag, "fileloc": file.path + inner, "relative_fileloc": file.relative_path + inner},
            }
    raise NotAResult("it reported a DAG that is not one")


def _import_errors(file: RequestedFile, reported: Mapping[Any, Any]) -> dict[str, str]:
    errors: dict[str, str] = {}
    for claimed, text in list(reported.items())[:ERRORS_LIMIT]:
        member = file.member(claimed)
        key = f"{file.relative_path}/{member}" if member else file.relative_path
        said = str(text)[:ERROR_LIMIT]
        errors[key] = f"{errors[key]}\n{said}"[:ERROR_LIMIT] if key in errors else said
    return errors


def _is_warning(warning: Any, dag_ids: set[str], types: Collection[str]) -> bool:
    match warning:
        case {"dag_id": str(dag_id), "warning_type": str(kind), "message": str(), **others}:
            return dag_id in dag_ids and kind in types and not others
    return False


def _stays_inside(name: str) -> bool:
    """Whether a member's name stays in the archive: it may be anything, such as ``../../etc/passwd``."""
    return not name.startswith("/") and ".." not in name.split("/")
