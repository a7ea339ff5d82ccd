"""The DAG file that a command names, and the bundle that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from airflow_isolation.integration.cli.outcome import UsageError
from airflow_isolation.integration.seams.configuration import local_bundles


class DagFile(NamedTuple):
    """A DAG file. In no local bundle, its ``bundle_name`` is empty and ``bundle_path`` is its own directory."""

    path: Path
    bundle_name: str
    bundle_path: Path

    @property
    def relative_path(self) -> Path:
        return self.path.relative_to(self.bundle_path)


def locate(named: str) -> DagFile:
    """Find a file by its path, from the working directory or in a bundle.

    :raises UsageError: there is no such file.
    """
    file = Path(named)
    bundles = local_bundles()
    for candidate in (file.absolute(), *(path / file for path in bundles.values())):
        if candidate.is_file():
            for name, path in bundles.items():
                if candidate.is_relative_to(path):
                    return DagFile(candidate, name, path)
            return DagFile(candidate, "", candidate.parent)
    looked = ", ".join(map(str, (Path.cwd(), *bundles.values())))
    raise UsageError(f"There is no DAG file {file}, seen from {looked}", hint="Give its path")
