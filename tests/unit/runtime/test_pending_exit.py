"""The thread behind a wait, with a question that a test answers: breaks of the connection come when asked for."""

from __future__ import annotations

import queue
import select
import threading
from pathlib import Path

import pytest

from airflow_isolation.errors import ContainerFailed, ContainerNotFound, IsolationError, RuntimeUnreachable
from airflow_isolation.runtime.interface import ExitStatus
from airflow_isolation.runtime.pending_exit import UNKNOWN_EXIT, ExitQuestion, WatchedExit


class ScriptedQuestion(ExitQuestion):
    """Stands for a daemon; answers and errors are put into ``script``."""

    def __init__(self, *script: ExitStatus | IsolationError) -> None:
        self.script: queue.Queue[ExitStatus | IsolationError] = queue.Queue()
        for step in script:
            self.script.put(step)
        self.prepared = 0
        self.closed = False

    def prepare(self) -> None:
        self.prepared += 1

    def answer(self) -> ExitStatus:
        step = self.script.get(timeout=20)
        if isinstance(step, IsolationError):
            raise step
        return step

    def cancel(self) -> None:
        self.script.put(RuntimeUnreachable("cut off"))

    def close(self) -> None:
        self.closed = True


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_question_is_asked_again_after_each_break() -> None:
    question = ScriptedQuestion(RuntimeUnreachable("one"), RuntimeUnreachable("two"), ExitStatus(code=3))
    with WatchedExit("a", question).begin() as pending:
        assert pending.result(20).code == 3
        assert select.select([pending], [], [], 20)[0]
    assert question.prepared == 3
    assert question.closed


def test_what_is_gone_after_a_break_has_an_unknown_status() -> None:
    with WatchedExit("a", ScriptedQuestion(RuntimeUnreachable("one"), ContainerNotFound("a"))).begin() as pending:
        assert pending.result(20) == ExitStatus(code=UNKNOWN_EXIT)


def test_another_error_ends_the_wait_with_it() -> None:
    with WatchedExit("a", ScriptedQuestion(ContainerFailed("broken"))).begin() as pending:
        with pytest.raises(ContainerFailed, match="broken"):
            pending.result(20)
        assert select.select([pending], [], [], 20)[0]


def test_close_leaves_no_thread_and_no_descriptor() -> None:
    before = (threading.active_count(), descriptors())
    pending = WatchedExit("a", ScriptedQuestion()).begin()
    pending.close()
    pending.close()
    assert (threading.active_count(), descriptors()) == before
    with pytest.raises(ValueError, match="closed"):
        pending.result(0)


def test_a_question_that_can_not_be_asked_leaves_nothing() -> None:
    class Refused(ScriptedQuestion):
        def prepare(self) -> None:
            raise ContainerNotFound("a")

    before = descriptors()
    question = Refused()
    with pytest.raises(ContainerNotFound):
        WatchedExit("a", question).begin()
    assert descriptors() == before
    assert question.closed
