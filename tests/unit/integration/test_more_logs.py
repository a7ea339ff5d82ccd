"""Log channels that a task asks for, for other programs of its own."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import TYPE_CHECKING

from airflow.sdk.execution_time import comms
from tests.unit.integration.supervised import Supervised

from airflow_isolation.integration.seams import supervision

if TYPE_CHECKING:
    import pytest


def another(task: Supervised) -> socket.socket:
    channel = task.theirs["requests"]
    channel.sendall(comms._RequestFrame(id=1, body={"type": "ResendLoggingFD"}).as_bytes())
    task.serve()
    _, (descriptor,), *_ = socket.recv_fds(channel, 4096, 1)
    return socket.socket(fileno=descriptor)


def test_what_comes_from_there_is_read_as_from_the_first_one() -> None:
    with closing(Supervised()) as task:
        with another(task) as logs:
            logs.sendall(b'{"event":"hello","logger":"airflow_isolation","positional_args":[1],"target":1}\n')
            task.serve()
        assert task.log.lines == [
            ("hello", {"logger": "task.airflow_isolation", "positional_args_": [1], "target_": 1})
        ]
        task.serve()
        assert len(task.supervisor._open_sockets) == 4  # none is left open on this side


def test_there_is_an_end_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "MORE_LOGS_LIMIT", 2)
    with closing(Supervised()) as task:
        channels = [another(task) for _ in range(2)]
        refused = task.ask(comms.ResendLoggingFD())
        assert "More than 2 channels for logs" in refused.error["detail"]["message"]
        for channel in channels:
            channel.close()
        task.serve()
        task.serve()
        another(task).close()
        task.serve()
