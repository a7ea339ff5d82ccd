"""Each row of the table, in a container of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.hostile import rows
from tests.hostile.conftest import KINDS, UNGUARDED
from tests.hostile.inside import TRIED

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.conftest import Kind, Report
    from tests.hostile.rows import Promise, Row

    Reports = Callable[[Kind], Report]

pytestmark = pytest.mark.root


def name_of(value: object) -> str:
    return str(getattr(value, "words", getattr(value, "name", value)))


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("promise", rows.PROMISES, ids=name_of)
def test_nothing_gets_through(reports: Reports, kind: Kind, promise: Promise) -> None:
    said = reports(kind).said
    tried = [row for row in promise.rows if not (row.of_tasks and kind.start == "parse")]
    assert {row.name: said[row.name] for row in tried if said[row.name] not in row.may_see(kind)} == {}


@pytest.mark.parametrize("kind", UNGUARDED, ids=name_of)
@pytest.mark.parametrize("row", [row for row in rows.ROWS if row.control == rows.UNGUARDED], ids=name_of)
def test_without_the_guard_the_row_would_fail(reports: Reports, kind: Kind, row: Row) -> None:
    assert reports(kind).said[row.name] not in row.right


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_the_same_attempt_succeeds_where_nothing_guards(reports: Reports, kind: Kind) -> None:
    said = reports(kind).said
    controls = {row.control for row in rows.ROWS} - {"", rows.UNGUARDED}
    assert len(controls) > 20
    assert {name: said[name] for name in controls if said[name] != "done"} == {}


def test_every_attempt_has_its_row() -> None:
    names = [row.name for row in rows.ROWS]
    controls = {row.control for row in rows.ROWS}
    assert len(names) == len(set(names))
    assert set(TRIED) - set(names) - controls == {"take a descriptor of its own child"}
    assert set(names) <= set(TRIED)
