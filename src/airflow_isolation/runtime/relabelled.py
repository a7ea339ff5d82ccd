"""Changed labels of containers, in one file for each, for a daemon that can't change a container's labels."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from airflow_isolation.runtime.interface import Container


class Relabelled:
    """The files in one directory, by the containers' ids. Its truth value: whether there are any."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __bool__(self) -> bool:
        return self._directory.is_dir() and any(self._directory.iterdir())

    def write(self, id: str, labels: Mapping[str, str]) -> None:
        """Store a container's labels. May be called twice.

        :raises OSError: the file can't be written.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        written = self._directory / f".{id}"
        written.write_text(json.dumps(dict(labels)))
        written.rename(self._directory / id)

    def applied(self, container: Container) -> Container:
        """The container with the labels that it has now."""
        try:
            return replace(container, labels=json.loads((self._directory / container.id).read_bytes()))
        except (OSError, ValueError):
            return container

    def forget(self, id: str) -> None:
        """Remove a container's file. May be called twice."""
        (self._directory / id).unlink(missing_ok=True)
