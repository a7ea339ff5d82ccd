"""Parses every file of the bundles once, in containers, and stores the results: a DAG processor that ends.

Callbacks are left to the real DAG processor. If the infrastructure keeps a file from being parsed, it is given up after a
few tries; what is stored of it stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import attrs
from airflow.models.errors import ParseImportError
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_isolation.integration.seams import checks
from airflow_isolation.integration.seams.dag_processing import ContainerDagFileProcessorManager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Literal

    from airflow.dag_processing.manager import DagFileInfo

    from airflow_isolation.settings.effective import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserialized:
    """The outcome. ``import_errors``: file → error. ``not_parsed``: file → why the infrastructure failed."""

    files: int
    import_errors: Mapping[str, str]
    not_parsed: Mapping[str, str]

    @property
    def parsed(self) -> int:
        return self.files - len(self.not_parsed)


def parse_everything_once(
    backend: Backend, bundle_names: list[str] | None, *, progress: Callable[[int, int], None]
) -> Reserialized:
    """Parse all files. Blocks until all is done; SIGINT and SIGTERM end it, and every container with it.

    :param bundle_names: None for all bundles.
    :param progress: called once a second or so with the number of files done, and of all.
    """
    checks.check_names(checks.DAG_PROCESSING)
    once = _Once(max_runs=1, bundle_names_to_parse=bundle_names or [], backend=backend)
    once.heartbeat = lambda: progress(once.done(), len(once.known))
    try:
        once.run()  # type: ignore[no-untyped-call]
    finally:
        once.terminate()
        once.end()
    progress(once.done(), len(once.known))
    return Reserialized(
        files=len(once.known),
        import_errors=_import_errors({file.bundle_name for file in once.known}),
        not_parsed={str(file.rel_path): str(error) for file, error in once.given_up.items()},
    )


@attrs.define(kw_only=True)
class _Once(ContainerDagFileProcessorManager):
    known: set[DagFileInfo] = attrs.field(factory=set, init=False)

    def done(self) -> int:
        return sum(1 for file in self.known if file in self.given_up or self._file_stats[file].run_count)

    def fetch_callbacks(self) -> list[Any]:
        return []

    def _refresh_dag_bundles(self, known_files: dict[str, set[DagFileInfo]]) -> None:
        super()._refresh_dag_bundles(known_files=known_files)
        self.known = set().union(*known_files.values())

    def _add_files_to_queue(self, files: list[DagFileInfo], *, mode: Literal["front", "back", "frontprio"]) -> None:
        open_ones = [file for file in files if not self._file_stats[file].run_count]
        super()._add_files_to_queue(open_ones, mode=mode)

    def max_runs_reached(self) -> bool:
        return self.done() == len(self.known)


def _import_errors(bundle_names: set[str]) -> dict[str, str]:
    with create_session() as session:
        rows = session.execute(
            select(ParseImportError.filename, ParseImportError.stacktrace).where(
                ParseImportError.bundle_name.in_(bundle_names)
            )
        )
        return {str(row.filename): str(row.stacktrace) for row in rows}
