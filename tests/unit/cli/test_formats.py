from __future__ import annotations

import pytest

from airflow_isolation.integration.cli import formats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (47 * 3600, "47h"), (49 * 3600, "2d")],
)
def test_an_age_has_the_one_unit_that_matters(seconds: float, text: str) -> None:
    assert formats.duration(seconds) == text


def test_a_clock_that_went_backwards_gives_no_negative_age() -> None:
    assert formats.duration(-5) == "0s"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "0.977KiB"),
        (1024 * 1024, "1MiB"),
        (102_971_187, "98.2MiB"),
        (1 << 50, "1.02e+03TiB"),
    ],
)
def test_a_size_has_three_digits_and_a_binary_unit(count: int, text: str) -> None:
    assert formats.size(count) == text


def test_what_is_not_known_is_empty() -> None:
    assert (formats.duration(None), formats.size(None), formats.seconds(None)) == ("", "", "")


def test_control_characters_are_spelled_out() -> None:
    assert formats.printable("a\x1b[31mb\nc") == "a\\x1b[31mb\\nc"


def test_text_of_any_language_stays_as_it_is() -> None:
    assert formats.printable("umsätze 売上") == "umsätze 売上"


def test_of_several_lines_none_is_obeyed_and_none_looks_like_another() -> None:
    text = "a\x1b[2J\tb\n2026-01-01 [info] Task runs in a container\r\n"
    assert formats.printable_lines(text, indent="    ") == (
        "a\\x1b[2J    b\n    2026-01-01 [info] Task runs in a container\\r\n    "
    )
