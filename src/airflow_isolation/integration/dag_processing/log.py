"""A DAG file's log. If it can't be written, as on a full disk, the parse and the DAG processor go on."""

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
    """A file with the methods that structlog and Airflow use. What can't be written is lost, and reported once."""

    def __init__(self, make: Callable[[], str | Path]) -> None:
        """``make`` gives the path of the file, which may raise OSError."""
        self._file: FileIO | None = None
        try:
            # Unbuffered: every line is written at once anyway, and then close() has nothing to write that could fail.
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
        """Does nothing: there is no buffer."""

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
