"""What Airflow does for an operator's run_as_user, which is to execute sudo."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.agent import agent

if TYPE_CHECKING:
    from collections.abc import Sequence

AIRFLOWS = ["sudo", "-E", "-H", "-u", "bob", "/usr/bin/python3", "-c", "main()"]


def execute(arguments: list[str]) -> Any:
    """As user code does; in this test it may return."""
    function: Any = os.execvp
    return function(arguments[0], arguments)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """What would have been executed."""
    executed: list[Sequence[str]] = []
    monkeypatch.setattr(os, "execvp", lambda _, arguments: executed.append(arguments))
    agent.refuse_sudo()
    return executed


def test_a_task_that_is_to_become_somebody_else_ends_in_words(
    executed: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_AIRFLOW__REEXECUTED_PROCESS", "1")
    with pytest.raises(SystemExit, match="Set `run_as_user: bob` in the container's settings instead"):
        execute(AIRFLOWS)
    assert not executed


@pytest.mark.parametrize("arguments", [["sudo", "true"], ["bash", "-c", "true"]])
def test_what_user_code_executes_is_its_own_business(
    executed: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.delenv("_AIRFLOW__REEXECUTED_PROCESS", raising=False)
    execute(arguments)
    assert executed == [arguments]
