from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci.identifier import check_identifier, new_container_id

SEGMENT = st.text("abcXYZ019", min_size=1, max_size=6)


@given(st.lists(SEGMENT, min_size=1, max_size=8), st.sampled_from("._-"))
def test_segments_with_single_separators_are_an_identifier(segments: list[str], separator: str) -> None:
    identifier = separator.join(segments)
    assert check_identifier(identifier) == identifier


@given(st.text(max_size=90))
def test_whatever_is_accepted_is_safe_in_a_path_and_in_containerd(text: str) -> None:
    try:
        accepted = check_identifier(text)
    except SpecRefused:
        return
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,76}", accepted)
    assert not re.search(r"[._-]{2}", accepted)
    assert accepted[0].isalnum()
    assert accepted[-1].isalnum()


@pytest.mark.parametrize("text", ["", "a__b", "a-", "-a", "a/b", "..", "a.", "ä", "a\n", "a b", "a" * 77, "a:b"])
def test_what_containerd_refuses_is_refused_before(text: str) -> None:
    with pytest.raises(SpecRefused, match="can't be a container's id"):
        check_identifier(text)


def test_seventy_six_characters_are_the_most() -> None:
    assert check_identifier("a" * 76)


def test_a_new_id_is_its_purpose_and_26_digits() -> None:
    assert re.fullmatch(r"task-[0-9a-hjkmnp-tv-z]{26}", new_container_id("task"))


def test_new_ids_differ() -> None:
    assert len({new_container_id("parse") for _ in range(1000)}) == 1000


def test_new_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0, 1, 31, 32, 1_700_000_000_000, 1_700_000_000_001, 2**48]
    made = []
    for milliseconds in times:
        monkeypatch.setattr("time.time_ns", lambda now=milliseconds: now * 1_000_000)
        made.append(new_container_id("task"))
    assert made == sorted(made)


def test_a_purpose_that_breaks_the_rule_is_refused() -> None:
    with pytest.raises(SpecRefused):
        new_container_id("task_")
