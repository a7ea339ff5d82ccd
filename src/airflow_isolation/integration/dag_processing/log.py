"""A DAG file's log, which may fail: a full disk is no reason to stop a parse, or the DAG processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

    from typing_extensions import Self

log = structlog.get_logger(logger_name="airflow_isolation.dag_processing")


class ParseLog:
    """A file to write to, as far as structlog and Airflow use one. What can't be written is lost, and told once."""

    def __init__(self, make: Callable[[], str | Path]) -> None:
        """``make`` gives the path of the file, which may raise OSError."""
        self._file: FileIO | None = None
        try:
            # Every line is written at once anyway, and what lies in no buffer can't fail again when it is closed.
            self._file = Path(make()).open("ab", buffering=0)  # noqa: SIM115 - ``close`` is the caller's
        except OSError as error:
            self._lose(error)

    def write(self, data: bytes) -> int:
        if self._file is not None:
            try:
                return self._file.write(data)
            except OSError as error:
                self._lose(error)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lose(self, error: OSError) -> None:
        self.close()
        log.error("The log of a DAG file can't be written; its lines are lost", error=str(error))
