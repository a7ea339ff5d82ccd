"""Pauses grow, end, and are forgotten. Time is a number here."""

from __future__ import annotations

from airflow_isolation.bridge.backoff import FIRST_SECONDS, LONGEST_SECONDS, Backoff
from airflow_isolation.errors import RuntimeUnreachable

ERROR = RuntimeUnreachable("no answer")


def longest(_: float, most: float) -> float:
    return most


def test_pauses_double_up_to_the_longest() -> None:
    backoff, now, pauses = Backoff(jitter=longest), 0.0, []
    for _ in range(9):
        pauses.append(backoff.failed("image", ERROR, now=now))
        now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_SECONDS, LONGEST_SECONDS, LONGEST_SECONDS]


def test_failures_that_were_under_way_at_once_are_one() -> None:
    backoff = Backoff(jitter=longest)
    assert backoff.failed("image", ERROR, now=10.0) == FIRST_SECONDS
    assert backoff.failed("image", ERROR, now=10.25) == 0.75
    assert backoff.failed("image", ERROR, now=11.0) == 2 * FIRST_SECONDS


def test_a_pause_holds_for_its_own_image_and_ends() -> None:
    backoff = Backoff(jitter=longest)
    backoff.failed("image", ERROR, now=0.0)
    trouble = backoff.trouble("image", now=0.5)
    assert trouble is not None
    assert trouble.error is ERROR
    assert backoff.trouble("other", now=0.5) is None
    assert backoff.trouble("image", now=FIRST_SECONDS) is None


def test_a_success_lets_it_begin_anew() -> None:
    backoff = Backoff(jitter=longest)
    backoff.failed("image", ERROR, now=0.0)
    backoff.failed("image", ERROR, now=1.0)
    backoff.succeeded("image")
    assert backoff.trouble("image", now=1.0) is None
    assert backoff.failed("image", ERROR, now=1.0) == FIRST_SECONDS


def test_jitter_never_takes_more_than_half() -> None:
    asked: list[tuple[float, float]] = []

    def least(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    assert Backoff(jitter=least).failed("image", ERROR, now=0.0) == FIRST_SECONDS / 2
    assert asked == [(FIRST_SECONDS / 2, FIRST_SECONDS)]


def test_what_nobody_asks_for_is_forgotten() -> None:
    backoff = Backoff(jitter=longest)
    for number in range(100):
        backoff.failed(number, ERROR, now=0.0)
    backoff.failed("image", ERROR, now=100 * LONGEST_SECONDS)
    assert list(backoff._troubles) == ["image"]
