from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.settings import quantities
from airflow_isolation.settings.quantities import (
    MAX_BYTES,
    MIN_MEMORY,
    format_bytes,
    parse_cpus,
    parse_duration,
    parse_grace_period,
    parse_memory,
    parse_pids,
    parse_tmpfs_size,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512m", 512 * 2**20),
        ("512mb", 512 * 2**20),
        ("2g", 2 * 2**30),
        ("10240k", 10240 * 2**10),
        ("10485760b", 10485760),
        ("512M", 512 * 10**6),
        ("512MB", 512 * 10**6),
        ("2G", 2 * 10**9),
        ("512Mi", 512 * 2**20),
        ("2Gi", 2 * 2**30),
        ("2GiB", 2 * 2**30),
        ("1.5Gi", 3 * 2**29),
        ("1e9", 10**9),
        ("536870912", 536870912),
        (" 2 Gi ", 2 * 2**30),
        ("1Ti", 2**40),
    ],
)
def test_bytes_in_the_notations_of_docker_and_kubernetes(text: str, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4", "Did you mean 4Gi?"),
        ("1024", "below the smallest usable limit for memory, 6 MiB"),
        ("4m", "6 MiB"),
        ("0", "more than 0"),
        ("-1", "more than 0"),
        ("2Gb", "did you mean Gi?"),
        ("2gi", "did you mean Gi?"),
        ("2X", "unknown unit 'X'"),
        ("5i", "unknown unit 'i'"),
        ("5iB", "unknown unit 'iB'"),
        ("2Pi", "1 PiB"),
        ("1e999", "1 PiB"),
        ("nan", "not a number of bytes"),
        ("inf", "not a number of bytes"),
        ("true", "not a number of bytes"),
        ("", "not a number of bytes"),
        ("2Gi 3Gi", "not a number of bytes"),
        ("٣Gi", "not a number of bytes"),
        ("9" * 65, "…"),
    ],
)
def test_memory_that_can_not_be_meant_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).") as caught:
        parse_memory(text)
    assert reason in str(caught.value)


def test_a_plain_large_number_below_the_limit_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match="smallest") as caught:
        parse_memory("1000000")
    assert "Did you mean" not in str(caught.value)


@given(st.integers(MIN_MEMORY, MAX_BYTES))
def test_bytes_are_exact(count: int) -> None:
    assert parse_memory(str(count)) == count


@given(st.text(max_size=80))
def test_any_text_is_a_number_in_range_or_refused(text: str) -> None:
    for parse, least, most in (
        (parse_memory, MIN_MEMORY, MAX_BYTES),
        (parse_cpus, quantities.MIN_CPUS, quantities.MAX_CPUS),
        (parse_pids, quantities.MIN_PIDS, quantities.MAX_PIDS),
        (parse_grace_period, 0, quantities.MAX_SECONDS),
    ):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert least <= value <= most


def test_a_tmpfs_may_be_smaller_than_a_memory_limit() -> None:
    assert parse_tmpfs_size("1m") == 2**20


@pytest.mark.parametrize(("text", "cores"), [("500m", 0.5), ("2", 2.0), ("1.5", 1.5), ("0.5", 0.5), (".25", 0.25)])
def test_cores(text: str, cores: float) -> None:
    assert parse_cpus(text) == cores


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "no limit"),
        ("-2", "no limit"),
        ("1000000000000", "outside"),
        ("1m", "outside"),
        ("2 cores", "unknown unit"),
        ("nan", "not a number of cores"),
        ("True", "not a number of cores"),
    ],
)
def test_cores_that_can_not_be_meant_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_cpus(text)


def test_a_count_is_whole() -> None:
    assert parse_pids("256") == 256
    for text in ("2.5", "0", "3", "-1", "256k", "1e30", "true"):
        with pytest.raises(ValueError, match=r"256|16 to"):
            parse_pids(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10), ("10s", 10), ("5m", 300), ("500ms", 0.5), ("1h", 3600), ("1.5", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["-1", "1d", "8e5", "200h", "soon"])
def test_durations_that_can_not_be_meant_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"negative|unknown unit|7 days|not a duration"):
        parse_duration(text)


def test_only_a_grace_period_may_be_zero() -> None:
    assert parse_grace_period("0") == 0
    with pytest.raises(ValueError, match="no time at all"):
        parse_duration("0")


def test_bytes_are_shown_exactly() -> None:
    assert format_bytes(3 * 2**29) == "1536 MiB"
    assert format_bytes(2**30 + 1) == "1073741825 bytes"
