"""Between SIGTERM and SIGKILL a task has its stop_grace_period, whoever has it end."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
from airflow.sdk.execution_time import supervisor
from tests.unit.integration.supervised import Supervised

TERM, KILL = signal.SIGTERM, signal.SIGKILL


def test_a_task_that_cleans_up_in_its_time_is_not_killed() -> None:
    # As when it is cleared or marked as failed, with a shorter delay of stock's than its five seconds.
    with closing(Supervised(grace=60)) as task:
        timer = threading.Timer(0.5, task.end)
        timer.start()
        task.supervisor.kill(TERM, escalation_delay=0.1, force=True)
        timer.join()
        assert task.workload.signals == [TERM]
        assert task.supervisor._exit_code == 1


@pytest.mark.parametrize("grace", [0, 0.1])
def test_a_task_that_does_not_end_is_killed(grace: float) -> None:
    with closing(Supervised(grace=grace)) as task:
        task.supervisor.kill(TERM, force=True)
        assert task.workload.signals == [TERM, KILL]
        assert task.supervisor._exit_code == -KILL


def test_when_the_worker_shuts_down_a_task_is_told_and_then_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MIN_HEARTBEAT_INTERVAL", 0.1)  # how long it waits for news of a task
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    alive = SimpleNamespace(task_instances=SimpleNamespace(heartbeat=lambda *_, **__: None))
    with closing(Supervised(alive, grace=0.2)) as task:
        task.hang_up()
        timer = threading.Timer(0.1, os.kill, (os.getpid(), TERM))
        timer.start()
        try:
            task.supervisor._monitor_subprocess()
        finally:
            timer.join()
            for number, handler in before.items():
                signal.signal(number, handler)
        assert task.workload.signals == [TERM, KILL]
        assert "has not ended within its stop_grace_period" in task.log.lines[0][0]
