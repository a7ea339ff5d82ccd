"""What one workload masks is masked for it alone, and costs little."""

from __future__ import annotations

import re
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from airflow.sdk._shared.secrets_masker import _secrets_masker, redact
from airflow.sdk.execution_time import comms
from airflow.sdk.log import mask_secret
from tests.unit.integration.supervised import Supervised

from airflow_isolation.integration.seams import masks
from airflow_isolation.integration.seams.masks import Masks, own_masks

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def masker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    masker: Any = _secrets_masker()
    monkeypatch.setattr(masker, "sensitive_variables_fields", ["password"])
    monkeypatch.setattr(masker, "replacer", None)
    before = None, set(masker.patterns)
    yield masker
    assert (masker.replacer, masker.patterns) == before


def new(**arguments: Any) -> Masks:
    return Masks(full=lambda: None, **arguments)


def test_what_a_task_masks_is_masked_until_it_ends() -> None:
    with own_masks(structlog.get_logger()):
        mask_secret("a-secret-word")
        assert redact({"event": "it is a-secret-word"}) == {"event": "it is ***"}
    assert redact("it is a-secret-word") == "it is a-secret-word"


def test_a_failing_task_leaves_no_masks() -> None:
    def fail() -> None:
        with own_masks(structlog.get_logger()):
            mask_secret("a-secret-word")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert redact("a-secret-word") == "a-secret-word"


def test_what_was_masked_before_stays_masked(masker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masker, "replacer", re.compile("of-the-worker"))
    with own_masks(structlog.get_logger()):
        assert redact("of-the-worker") == "***"
        mask_secret("a-secret-word")
        assert redact("of-the-worker a-secret-word") == "*** ***"
    assert redact("of-the-worker a-secret-word") == "*** a-secret-word"
    monkeypatch.setattr(masker, "replacer", None)


def test_a_request_of_a_task_masks() -> None:
    with closing(Supervised()) as task, own_masks(structlog.get_logger()):
        assert not task.ask(comms.MaskSecret(value={"password": ["a-secret-word"]})).error
        assert redact("a-secret-word") == "***"


def test_no_word_makes_a_pattern_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(re, "compile", lambda *_: pytest.fail("compiled"))
    with own_masks(structlog.get_logger()):
        for number in range(400):
            mask_secret(f"word-number-{number}")
        assert redact("word-number-17 word-number-399") == "*** ***"


def test_airflows_rules_hold() -> None:
    words = new()
    words.add(["abc", "airflow", "", 5, None, ("in-a-tuple",), {"login": "a-login", "Password": "a-password"}])
    assert words.hide("abc airflow in-a-tuple a-login a-password") == "abc airflow *** a-login ***"


def test_a_word_may_be_a_part_of_another() -> None:
    words = new()
    words.add(["secret", "secret-word"])
    assert words.hide("secret-word secret") == "*** ***"


def test_words_are_hidden_wherever_they_stand() -> None:
    words = new()
    words.add("a-secret-word")
    value = {"a-secret-word": ["x a-secret-word", {"n": 5, "t": None}]}
    assert words.hide(value) == {"***": ["x ***", {"n": 5, "t": None}]}


@pytest.mark.parametrize(("limit", "value"), [("WORDS_LIMIT", 3), ("CHARACTERS_LIMIT", 30)])
def test_there_is_an_end_to_words_and_it_is_told_once(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(masks, limit, value)
    with structlog.testing.capture_logs() as logs, own_masks(structlog.get_logger()):
        for number in range(10):
            mask_secret(f"word-no-{number}")
        mask_secret([f"word-no-{number}" for number in range(10)])
        assert redact("word-no-0 word-no-9") == "*** word-no-9"
    assert [entry["event"] for entry in logs] == [masks.FULL]
