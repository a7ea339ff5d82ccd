"""Whose a container is, by its label: anybody may have written it."""

from __future__ import annotations

import pytest

from airflow_isolation.runtime.labels import Owner


def test_an_owner_is_read_as_it_was_written() -> None:
    ours = Owner.this_process()
    assert Owner.parse(str(ours)) == ours
    assert not ours.is_gone()


@pytest.mark.parametrize(
    "label",
    [
        "",
        "1:2",
        "1@h",
        "x:2@h",
        "1:x@h",
        "1:2@",
        "-1:2@h",
        "१:2@h",
        f"{'9' * 5000}:2@h",
        f"1:{'9' * 5000}@h",
        "9999999999:2@h",
    ],
)
def test_what_nobody_of_us_wrote_is_no_owner(label: str) -> None:
    assert Owner.parse(label) is None
