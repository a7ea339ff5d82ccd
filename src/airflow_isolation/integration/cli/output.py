"""Rows on stdout: as text for people, or as json and yaml for programs.

A table looks like Airflow's own, but its lines are never wrapped or cut, so that ids can be copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from airflow_isolation.integration.cli.formats import printable
from airflow_isolation.integration.cli.outcome import say, write_line

Row = Mapping[str, Any]

#: The text of a cell without a value, so that every line has every column.
NOTHING: Final = "-"


class Column(NamedTuple):
    """A column of a table: which value of a row it shows, how as text, and in which colour on a terminal."""

    name: str
    text: Callable[[Any], str] = str
    style: Callable[[Any], str] = lambda _: ""


def print_rows(rows: Sequence[Row], columns: Sequence[Column], output: str, *, nothing: str) -> None:
    """Print rows in one of Airflow's formats. Programs get every value of a row, people only the ``columns``.

    :param nothing: the sentence for people, on stderr, when there are no rows.
    """
    if output == "json":
        write_line(json.dumps([dict(row) for row in rows], indent=2))
    elif output == "yaml":
        write_line(_yaml([dict(row) for row in rows]))
    elif not rows:
        say(nothing)
    else:
        _print_aligned(rows, columns, ruled=output == "table")


def print_record(record: Row, output: str) -> None:
    """Print one record: names and values below each other, or a document for programs."""
    if output == "json":
        write_line(json.dumps(dict(record), indent=2))
    elif output == "yaml":
        write_line(_yaml(dict(record)))
    else:
        columns = (Column("key"), Column("value"))
        rows = [{"key": key, "value": value} for key, value in flat(record)]
        _print_aligned(rows, columns, ruled=output == "table")


def flat(record: Row, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested maps as one list, with dotted keys."""
    pairs: list[tuple[str, Any]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _yaml(data: Any) -> str:
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).rstrip("\n")


def aligned(rows: Sequence[Row], columns: Sequence[Column], *, ruled: bool) -> Text:
    """A table as text with colours. It must not be wrapped."""
    cells = [[_cell(row[column.name], column) for column in columns] for row in rows]
    names = [column.name for column in columns]
    widths = [max(map(cell_len, texts)) for texts in zip(names, *cells, strict=True)]
    between, after = (" | ", "=+=") if ruled else ("  ", "")
    lines = [Text(_line(names, widths, between), style="bold" if ruled else "")]
    if ruled:
        lines.append(Text(after.join("=" * width for width in widths)))
    for row, texts in zip(rows, cells, strict=True):
        line = Text(_line(texts, widths, between))
        start = 0
        for column, text, width in zip(columns, texts, widths, strict=True):
            if style := column.style(row[column.name]):
                line.stylize(style, start, start + len(text))
            start += len(text) + width - cell_len(text) + len(between)
        lines.append(line)
    whole = Text("\n").join(lines)
    whole.no_wrap, whole.overflow = True, "crop"
    return whole


def _print_aligned(rows: Sequence[Row], columns: Sequence[Column], *, ruled: bool) -> None:
    text = aligned(rows, columns, ruled=ruled)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        text.no_wrap, text.overflow = None, None  # soft_wrap prints whole lines, however long
        console.print(text)
    else:
        write_line(text.plain)


def _cell(value: Any, column: Column) -> str:
    return printable("" if value is None else column.text(value)) or NOTHING


def _line(texts: Sequence[str], widths: Sequence[int], between: str) -> str:
    padded = (text + " " * (width - cell_len(text)) for text, width in zip(texts, widths, strict=True))
    return between.join(padded).rstrip()
