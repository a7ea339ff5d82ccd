from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from airflow_isolation.integration.cli.formats import size
from airflow_isolation.integration.cli.output import Column, print_record, print_rows

ROWS: list[dict[str, Any]] = [
    {"name": "short", "bytes": 2048, "hidden": True},
    {"name": "売上", "bytes": None, "hidden": False},
]
COLUMNS = (Column("name"), Column("bytes", size))


def test_a_table_is_aligned_by_what_a_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, COLUMNS, "table", nothing="")
    assert capsys.readouterr().out.splitlines() == [
        "name  | bytes",
        "======+======",
        "short | 2KiB",
        "売上  | -",
    ]


def test_a_plain_table_has_no_rules(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, COLUMNS, "plain", nothing="")
    assert capsys.readouterr().out.splitlines() == ["name   bytes", "short  2KiB", "売上   -"]


def test_a_long_cell_is_neither_cut_nor_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"name": "x" * 500, "bytes": 1}], COLUMNS, "plain", nothing="")
    assert "x" * 500 in capsys.readouterr().out.splitlines()[1]


def test_programs_get_numbers_and_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, COLUMNS, "json", nothing="")
    assert json.loads(capsys.readouterr().out) == ROWS
    print_rows(ROWS, COLUMNS, "yaml", nothing="")
    assert yaml.safe_load(capsys.readouterr().out) == ROWS


@pytest.mark.parametrize("output", ["table", "plain"])
def test_no_rows_are_words_on_stderr_for_people(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([], COLUMNS, output, nothing="Nothing is here.")
    assert capsys.readouterr() == ("", "Nothing is here.\n")


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_no_rows_are_an_empty_list_for_programs(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([], COLUMNS, output, nothing="Nothing is here.")
    assert capsys.readouterr() == ("[]\n", "")


def test_a_cell_can_not_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"name": "a\x1b]0;title\x07", "bytes": 1}], COLUMNS, "table", nothing="")
    assert "\x1b" not in capsys.readouterr().out


def test_colours_are_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"name": "x"}], (Column("name", style=lambda _: "green"),), "table", nothing="")
    assert "\x1b" not in capsys.readouterr().out


def test_a_record_has_dotted_keys_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    print_record({"id": "one", "labels": {"team": "sales"}, "owner": None}, "plain")
    assert capsys.readouterr().out.splitlines() == [
        "key          value",
        "id           one",
        "labels.team  sales",
        "owner        -",
    ]
