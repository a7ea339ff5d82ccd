"""Effective settings as rows: the key, the value unless it is a secret, and where it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from airflow_isolation.integration.cli.output import Column
from airflow_isolation.integration.seams.configuration import sounds_sensitive
from airflow_isolation.settings.resolve import is_default

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_isolation.settings.effective import EffectiveSettings, Row

COLUMNS: Final = (Column("key"), Column("value"), Column("origin"))


def every(settings: EffectiveSettings) -> list[dict[str, str]]:
    """All settings."""
    return _shown(settings.rows)


def chosen(settings: EffectiveSettings) -> list[dict[str, str]]:
    """The settings that somebody chose. Defaults that Airflow itself wrote into airflow.cfg are left out."""
    return _shown([row for row in settings.rows if not is_default(row)])


def _shown(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [{"key": row.key, "value": _masked(row), "origin": row.origin} for row in rows]


def _masked(row: Row) -> str:
    kind, _, name = row.key.partition(".")
    return "***" if kind == "environment" and sounds_sensitive(name) else row.value
