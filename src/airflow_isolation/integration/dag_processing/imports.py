"""Which modules of Airflow a DAG file imports, found by a search through its lines.

Stock Airflow parses the file into a syntax tree for this, in the DAG processor. A file can crash that process by deep
nesting, which exhausts the C stack. A search through lines can't be crashed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

#: How many bytes are searched, and how many names are returned at most.
LOOKED_AT: Final = 256 * 1024
MOST: Final = 64
_IMPORT: Final = re.compile(rb"^[ \t]*(?:from|import)[ \t]+(airflow(?:\.[A-Za-z_][A-Za-z0-9_]*)+)", re.MULTILINE)


def imported_airflow_modules(dag_file: Path) -> tuple[str, ...]:
    """Names such as ``airflow.providers.http.hooks.http``; none for an archive, or for what can't be read."""
    if dag_file.suffix != ".py":
        return ()
    try:
        with dag_file.open("rb") as file:
            text = file.read(LOOKED_AT)
    except OSError:
        return ()
    names = dict.fromkeys(found.group(1).decode() for found in _IMPORT.finditer(text))
    return tuple(name for name in names if len(name) < 256)[:MOST]
