"""A supervisor of a task whose container is made up, with the task's ends of the four channels."""

from __future__ import annotations

import select
import signal
import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import structlog
from airflow.sdk.api.datamodels._generated import TaskInstance
from airflow.sdk.execution_time import comms

from airflow_isolation.bridge.started_agent import NegativeSignal
from airflow_isolation.integration.seams.supervision import ContainerActivitySubprocess, WorkloadTracker
from airflow_isolation.settings.effective import Permissions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.bridge.ending import Ending

TI = TaskInstance(
    id=UUID("019a0000-0000-7000-8000-000000000001"),
    dag_id="sales",
    task_id="load",
    run_id="monday",
    try_number=1,
    map_index=-1,
    dag_version_id=UUID("019a0000-0000-7000-8000-000000000002"),
)


NO_BOUNDS = Permissions()


class Recorder:
    """What comes into a task's log, by whatever logger that is made of this one."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.logger = structlog.wrap_logger(None, processors=[self._keep])

    def _keep(self, _: Any, __: str, values: Any) -> Any:
        values.pop("__level_override", None)  # Airflow's loggers take it out themselves
        self.lines.append((values.pop("event"), values))
        raise structlog.DropEvent


class FakeWorkload:
    """A workload that ends by SIGKILL, or when ``cleaned_up`` is set. No container is behind it."""

    def __init__(self) -> None:
        self.container = SimpleNamespace(id="task-1", pid=4711)
        self.signals: list[signal.Signals] = []
        self.code: int | None = None
        self.cleaned_up = threading.Event()
        self.not_begun = ""
        self.ending: Ending | None = None

    def why_not_begun(self) -> str:
        return self.not_begun

    def send_signal(self, number: signal.Signals) -> None:
        self.signals.append(number)
        if number == signal.SIGKILL:
            self.code = NegativeSignal(-number)

    def exit_code(self) -> int | None:
        if self.cleaned_up.is_set() and self.code is None:
            self.code = 1
        return self.code


def supervisor(
    workload: Any,
    channels: Mapping[str, Any],
    log: Recorder,
    *,
    client: Any = None,
    permissions: Permissions = NO_BOUNDS,
    grace: float = 10.0,
) -> ContainerActivitySubprocess:
    """One of a workload that has been told already what to do. Without a client nothing can be asked of the server."""
    pid = workload.container.pid
    made = ContainerActivitySubprocess(
        id=TI.id,
        pid=pid,
        stdin=channels["requests"],
        process=WorkloadTracker(workload, pid),
        process_log=log.logger,
        client=client,
        workload=workload,
        what=TI,
        file="bundle/sales.py",
        permissions=permissions,
        grace=grace,
        ended=lambda _: None,
    )
    made.ti = TI  # type: ignore[assignment]
    made._register_pipe_readers(**channels, data={})
    return made


class Supervised:
    """A supervised task, from both sides."""

    def __init__(self, client: Any = None, permissions: Permissions = NO_BOUNDS, grace: float = 10.0) -> None:
        pairs = {name: socket.socketpair() for name in ("stdout", "stderr", "requests", "logs")}
        self.ours = {name: pair[0] for name, pair in pairs.items()}
        self.theirs = {name: pair[1] for name, pair in pairs.items()}
        for end in self.theirs.values():
            end.settimeout(10)
        self.log = Recorder()
        self.workload = FakeWorkload()
        self.supervisor = supervisor(
            self.workload, self.ours, self.log, client=client, permissions=permissions, grace=grace
        )

    def ask(self, request: Any) -> Any:
        """Send a request as a task does, let the supervisor answer, and give the answer."""
        body = request if isinstance(request, dict) else request.model_dump()
        channel = self.theirs["requests"]
        channel.sendall(comms._RequestFrame(id=1, body=body).as_bytes())
        for _ in range(100):
            self.serve()
            if select.select([channel], [], [], 0)[0]:
                length = int.from_bytes(channel.recv(4), "big")
                return msgspec.msgpack.decode(channel.recv(length), type=comms._ResponseFrame)
        raise AssertionError("no answer")

    def serve(self) -> None:
        """One turn of the supervisor's loop."""
        self.supervisor._service_subprocess(1)

    def hang_up(self) -> None:
        """The task's ends are closed, as when it has ended or closed them."""
        for end in self.theirs.values():
            end.close()

    def end(self) -> None:
        self.workload.cleaned_up.set()
        self.hang_up()

    def close(self) -> None:
        self.supervisor.selector.close()
        for end in (*self.ours.values(), *self.theirs.values()):
            end.close()
