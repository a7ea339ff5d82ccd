"""What is stored of a parse: Airflow's own result, made of the checked parts of a report, and compared with the database."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from airflow.dag_processing.processor import DagFileParsingResult
from airflow.models.dag import DagModel
from airflow.models.dagwarning import DagWarningType
from airflow.models.errors import ParseImportError
from airflow.serialization.serialized_objects import LazyDeserializedDAG
from airflow.utils.session import create_session
from sqlalchemy import delete, or_, select, update

from airflow_isolation.integration import workload_environment
from airflow_isolation.integration.dag_processing.links import explained
from airflow_isolation.integration.dag_processing.named_code import named_code
from airflow_isolation.integration.dag_processing.result import NotAResult, RequestedFile, believed
from airflow_isolation.settings.declarations import POLICY_SECTION

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from airflow.dag_processing.manager import DagFileInfo
    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

    from airflow_isolation.settings.effective import EffectiveSettings


def error_result(file: DagFileInfo, error: str) -> DagFileParsingResult:
    """The result of a parse that gave only this import error."""
    return DagFileParsingResult(
        fileloc=os.fspath(file.absolute_path), serialized_dags=[], import_errors={str(file.rel_path): error}
    )


def believed_result(
    file: DagFileInfo, reported: DagFileParsingResult, settings: EffectiveSettings
) -> DagFileParsingResult:
    """The result of what a container with these settings reported, checked."""
    assert file.bundle_path is not None
    loaded = [dag.last_loaded for dag in reported.serialized_dags]
    try:
        report = believed(
            RequestedFile.at(file.bundle_path, file.rel_path),
            dags=[dag.data for dag in reported.serialized_dags],
            import_errors=reported.import_errors,
            warnings=reported.warnings,
            warning_types={kind.value for kind in DagWarningType},
        )
    except (NotAResult, OSError, BadZipFile) as error:
        return error_result(file, f"What the parse reported can't be used: {error}")
    errors = _explained(file, report.import_errors, settings) if report.import_errors else {}
    dags = []
    for data, when in zip(report.dags, loaded, strict=True):
        if why := _refused(data, settings, f"{file.bundle_name}/{file.rel_path}"):
            path = data["dag"]["relative_fileloc"]
            errors[path] = f"{errors[path]}\n{why}" if path in errors else why
        else:
            dags.append(LazyDeserializedDAG(data=dict(data), last_loaded=when))
    return DagFileParsingResult(
        fileloc=os.fspath(file.absolute_path),
        serialized_dags=dags,
        import_errors=errors,
        # A warning of a DAG that is not stored breaks a foreign key, and with it the storing of the others.
        warnings=[one for one in report.warnings if one["dag_id"] in {dag.dag_id for dag in dags}],
    )


def _refused(data: Mapping[str, Any], settings: EffectiveSettings, dag_file: str) -> str:
    """Why a DAG may not have what it names imported outside of containers; empty when it may."""
    if not settings.permissions.allowed_triggers:
        return ""
    refused = sorted(path for path in named_code(data) if not settings.permissions.may_name(dag_file, path))
    if not refused:
        return ""
    return (
        f"The DAG {data['dag']['dag_id']!r} names {', '.join(refused)}, which Airflow would import outside of containers, and "
        f"[{POLICY_SECTION}] allowed_triggers does not give that to {dag_file}"
    )


def _explained(file: DagFileInfo, errors: Mapping[str, str], settings: EffectiveSettings) -> dict[str, str]:
    bundle_path, dag_file = file.bundle_path, file.absolute_path
    assert bundle_path is not None
    mounts = workload_environment.airflow_mounts(bundle_path, dag_file)
    roots = (bundle_path, *workload_environment.administrators_directories())
    return explained(errors, dag_file, roots, mounts, settings.volumes)


def without_dags_of_others(
    result: DagFileParsingResult, bundle_name: str, relative_fileloc: str, session: Session
) -> DagFileParsingResult:
    """The result without the DAGs that are active in another bundle; an import error names their owners."""
    dags = {dag.dag_id: dag for dag in result.serialized_dags}
    errors = dict(result.import_errors or {})
    for dag_id, owner in _owners(dags, bundle_name, session).items():
        said = (
            f"The DAG {dag_id!r} belongs to the bundle {owner!r}, where it is active. "
            "Choose another dag_id, or remove it there first"
        )
        path = dags.pop(dag_id).relative_fileloc or relative_fileloc
        errors[path] = f"{errors[path]}\n{said}" if path in errors else said
    return result.model_copy(update={"serialized_dags": list(dags.values()), "import_errors": errors})


def _owners(dag_ids: Collection[str], bundle_name: str, session: Session) -> dict[str, str]:
    if not dag_ids:
        return {}
    found = session.execute(
        select(DagModel.dag_id, DagModel.bundle_name).where(
            DagModel.dag_id.in_(dag_ids),
            DagModel.bundle_name.is_not(None),
            DagModel.bundle_name != bundle_name,
            ~DagModel.is_stale,
        )
    )
    return {row.dag_id: row.bundle_name for row in found}


def keep_scheduled(result: DagFileParsingResult, session: Session) -> None:
    """Keep the result's DAGs scheduled: an import error of their file would have marked them too."""
    session.execute(
        update(DagModel)
        .where(DagModel.dag_id.in_([dag.dag_id for dag in result.serialized_dags]))
        .values(is_stale=False, has_import_errors=False)
        .execution_options(synchronize_session="fetch")
    )


def clear_errors_of_members(
    bundle_name: str, relative_fileloc: str, session: Session, *, but: Collection[str] = ()
) -> None:
    """Delete import errors of an archive's members. Airflow deletes only those under the archive's own name.

    The deletion is flushed at once. Airflow's sessions have no autoflush: otherwise Airflow would find these errors, update
    them instead of storing new ones, and lose them with the later deletion.

    :param but: files whose errors stay.
    """
    session.execute(
        delete(ParseImportError)
        .where(
            ParseImportError.bundle_name == bundle_name,
            ParseImportError.filename.startswith(f"{relative_fileloc}/", autoescape=True),
            ParseImportError.filename.not_in(but),
        )
        .execution_options(synchronize_session="fetch")
    )


def has_dags(file: DagFileInfo) -> bool:
    """Whether the database knows a DAG of this file, or of a member of it."""
    path = str(file.rel_path)
    of_file: ColumnElement[bool] = or_(
        DagModel.relative_fileloc == path, DagModel.relative_fileloc.startswith(f"{path}/", autoescape=True)
    )
    with create_session() as session:
        query = select(DagModel.dag_id).where(DagModel.bundle_name == file.bundle_name, of_file).limit(1)
        return session.scalar(query) is not None
