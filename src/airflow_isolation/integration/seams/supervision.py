"""Airflow's supervisor of a task, with the child in a container.

``ActivitySubprocess`` stays as it is: heartbeats, requests, states, retries, logs and their upload. What differs:
``bridge.launch`` made its child; its channels have limits; and descriptors tell it of the child's end. (Stock looks for
the end only when a channel has news, which can be five seconds late.)
"""

from __future__ import annotations

import base64
import json
import math
import selectors
import signal
import time
from contextlib import suppress
from functools import partial
from socket import send_fds, socketpair
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import msgspec
import structlog
from airflow.sdk.api import client as api
from airflow.sdk.configuration import ensure_secrets_loaded
from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.supervisor import (
    SERVER_TERMINATED,
    STATES_SENT_DIRECTLY,
    ActivitySubprocess,
    NeverRaised,
    ProcessTracker,
    _remote_logging_conn,
)
from airflow.sdk.log import mask_secret, upload_to_remote
from pydantic import ValidationError

from airflow_isolation.bridge.channels import PeerViolation
from airflow_isolation.errors import ContainerKilled
from airflow_isolation.integration.seams.brief_log import BriefLog, brief, first_problem
from airflow_isolation.integration.seams.channel_readers import channel_readers, log_reader
from airflow_isolation.integration.seams.permitted import denial, refused_to_task

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from airflow.sdk.api.client import Client
    from structlog.typing import FilteringBoundLogger
    from typing_extensions import Self

    from airflow_isolation.bridge.pipe import Channel
    from airflow_isolation.bridge.workload import Workload
    from airflow_isolation.settings.effective import Permissions

log = structlog.get_logger(logger_name="airflow_isolation.supervision")

#: How many programs of one task may have a log channel of their own at the same time.
MORE_LOGS_LIMIT = 64
_MORE_LOGS = "more logs"
#: Seconds in which a killed task must be gone; after that, stock reports that it isn't.
SHORTEST_ESCALATION = 0.5
#: How long an answer may wait until the task reads it, in seconds. A task that never reads would hold its worker for ever.
ANSWER_TIMEOUT = 60.0


class NeverBegan(ContainerKilled):
    """Something outside of it ended a task that had not read yet what it was to do."""


class _StillRunning(Exception):
    """The workload has not ended."""


class WorkloadTracker(ProcessTracker):
    """Makes a workload look like a process to the supervisor."""

    ProcessNotFound = NeverRaised
    TimeoutExpired = _StillRunning

    def __init__(self, workload: Workload, pid: int) -> None:
        self._workload = workload
        self._pid = pid

    @property
    def pid(self) -> int:
        return self._pid

    def send_signal(self, s: signal.Signals) -> None:
        self._workload.send_signal(signal.Signals(s))

    def wait(self, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._workload.exit_code()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise _StillRunning
            time.sleep(0.01)
        return code


class Wakeup:
    """A descriptor for the supervisor's selector that the supervisor's ``close`` leaves open."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        pass


class _Validated:
    """A decoder that returns its input, which has been decoded already."""

    def validate_python(self, message: Any) -> Any:
        return message


@attrs.define(kw_only=True)
class ContainerActivitySubprocess(ActivitySubprocess):
    """A task's supervisor whose child runs in a container."""

    #: Requests are validated before stock code gets them: it would log an invalid one whole.
    decoder: ClassVar[Any] = _Validated()

    _workload: Workload = attrs.field(repr=False)
    _what: Any = attrs.field(repr=False)
    _file: str = attrs.field(repr=False)
    _permissions: Permissions = attrs.field(repr=False)
    #: Seconds between SIGTERM and SIGKILL.
    _grace: float = attrs.field(repr=False)
    #: When a task that was told to end will be killed (time.monotonic).
    _kill_at: float | None = attrs.field(default=None, init=False)
    _ended: Callable[[str], object] = attrs.field(repr=False)

    @classmethod
    def supervise(
        cls,
        workload: Workload,
        *,
        what: Any,
        dag_rel_path: str,
        bundle_info: Any,
        client: Client,
        logger: FilteringBoundLogger | None,
        sentry_integration: str,
        subprocess_logs_to_stdout: bool,
        permissions: Permissions,
        grace: float,
        ended: Callable[[str], object],
        told_pid: int | None = None,
    ) -> Self:
        """Tell the server that the task has started, and the task what to do.

        :param permissions: what the DAG file's tasks may ask Airflow for.
        :param grace: seconds between SIGTERM and SIGKILL, whatever ends the task.
        :param ended: called with the state of the try at its end, while its log can still be written.
        :param told_pid: the pid with which the server was told already that the task runs; it accepts no other then.

        :raises Exception: the server does not want this task to run; the workload has then been killed.
        """
        channels = workload.channels
        pid = workload.container.pid if told_pid is None else told_pid
        self = cls(
            id=what.id,
            pid=pid,
            stdin=channels.requests,
            process=WorkloadTracker(workload, pid),
            process_log=logger or structlog.get_logger(logger_name="task").bind(),
            start_time=time.monotonic(),
            client=client,
            subprocess_logs_to_stdout=subprocess_logs_to_stdout,
            workload=workload,
            what=what,
            file=f"{bundle_info.name}/{dag_rel_path}",
            permissions=permissions,
            grace=grace,
            ended=ended,
        )
        try:
            self._register_pipe_readers(channels.stdout, channels.stderr, channels.requests, channels.logs, data={})
            for source in (workload.connection, workload.pending_exit):
                self.selector.register(
                    Wakeup(source.fileno()), selectors.EVENT_READ, (lambda _: False, self.selector.unregister)
                )
            self._on_child_started(
                ti=what,
                dag_rel_path=dag_rel_path,
                bundle_info=bundle_info,
                sentry_integration=sentry_integration,
            )
        except BaseException:
            self.selector.close()
            raise
        return self

    def _register_pipe_readers(
        self, stdout: Channel, stderr: Channel, requests: socket, logs: socket, *, data: dict[socket, bytes]
    ) -> None:
        del data  # what was written before the hand-over went to the container's own output
        requests.settimeout(ANSWER_TIMEOUT)
        named: dict[Any, str] = {stdout: "stdout", stderr: "stderr", logs: "logs", requests: "requests"}
        self._open_sockets.update(named)
        answers = self.handle_requests(BriefLog(log))  # type: ignore[arg-type]
        next(answers)
        readers = channel_readers(
            self._get_target_loggers(),
            "task",
            request=partial(self._asked, answers.send),
            broken=self._broken,
            identity=self._identity(),
        )
        for channel, reader in zip((stdout, stderr, logs, requests), readers, strict=True):
            self.selector.register(channel, selectors.EVENT_READ, (reader, self._on_socket_closed))

    def _identity(self) -> dict[str, Any]:
        what = self._what
        return {
            "ti_id": str(what.id),
            "dag_id": what.dag_id,
            "task_id": what.task_id,
            "run_id": what.run_id,
            "try_number": what.try_number,
            "map_index": -1 if what.map_index is None else what.map_index,
        }

    def _send_new_log_fd(self, req_id: int) -> None:
        # For another program of the task, such as one in a virtual environment. Stock limits neither what is read nor how
        # many such channels there are.
        if list(self._open_sockets.values()).count(_MORE_LOGS) >= MORE_LOGS_LIMIT:
            raise PeerViolation(f"More than {MORE_LOGS_LIMIT} channels for logs were asked for")
        theirs, ours = socketpair()
        self._open_sockets[ours] = _MORE_LOGS
        reader = log_reader(self._get_target_loggers(), "task", broken=self._broken, identity=self._identity())
        self.selector.register(ours, selectors.EVENT_READ, (reader, self._on_socket_closed))
        with theirs:
            frame = comms._ResponseFrame(id=req_id, body=comms.SentFDs(fds=[theirs.fileno()]).model_dump())  # noqa: SLF001
            send_fds(self.stdin, [frame.as_bytes()], [theirs.fileno()])

    def _asked(self, answer: Callable[[Any], None], frame: Any) -> None:
        try:
            message = ActivitySubprocess.decoder.validate_python(frame.body)
        except ValidationError as error:
            # Stock would not answer, and the task would wait for ever.
            problem = first_problem(error)
            log.warning("A task sent a request that Airflow does not know", problem=problem, body=brief(frame.body))
            refused = comms.ErrorResponse(
                error=ErrorType.API_SERVER_ERROR,
                detail={"status_code": 400, "message": f"The worker's Airflow does not know this request: {problem}"},
            )
            self.send_msg(None, request_id=frame.id, error=refused)
            return
        answer(msgspec.structs.replace(frame, body=message))

    def send_msg(self, *arguments: Any, **keywords: Any) -> None:
        try:
            super().send_msg(*arguments, **keywords)
        except TimeoutError:
            self._broken(PeerViolation(f"It did not read its answer for {ANSWER_TIMEOUT:g} seconds"))

    def _broken(self, error: Exception) -> None:
        self.process_log.error("The task broke its channel to the supervisor; killing it", error=str(error))
        self._workload.send_signal(signal.SIGKILL)

    def _monitor_subprocess(self) -> None:
        # Stock forwards with os.kill(self.pid), but an ordinary user may not signal a container's process.
        def forward(number: int, _: object) -> None:
            log.info("Passing a signal on to the task", signal=signal.Signals(number).name)
            if self._kill_at is None:
                self._kill_at = time.monotonic() + self._grace
            self._workload.send_signal(signal.Signals(number))

        signal.signal(signal.SIGTERM, forward)
        signal.signal(signal.SIGINT, forward)
        super()._monitor_subprocess()  # type: ignore[no-untyped-call]
        if why := self._workload.why_not_begun():
            # Stock would use up the try.
            raise NeverBegan(f"The task was ended before any of its code ran: {why}")
        if self._exit_code and self._reported is not None:
            self.process_log.warning(
                "The task reported its state before its process ended in this way; the reported state holds",
                state=str(getattr(self._reported, "value", self._reported)),
                exit_code=int(self._exit_code),
            )
        # Before stock uploads the log. A failure here must not keep the state from the server.
        try:
            self._ended(self.final_state)
        except Exception:
            log.exception("The end of a task could not be told in its log", container=self._workload.container.id)

    @property
    def final_state(self) -> Any:
        """As stock, but a state that the server has been told already stays: it would answer another with 409."""
        return super().final_state if self._reported is None else self._reported

    @property
    def _reported(self) -> Any:
        """The state that the task itself has reported to the server, or None."""
        return self._terminal_state if self._terminal_state in STATES_SENT_DIRECTLY - {SERVER_TERMINATED} else None

    def kill(
        self, signal_to_send: signal.Signals = signal.SIGINT, escalation_delay: float = 5.0, force: bool = False
    ) -> None:
        """As stock, but between two signals it waits for the task's own ``stop_grace_period``."""
        if signal_to_send != signal.SIGKILL:
            escalation_delay = max(self._grace, SHORTEST_ESCALATION)
        super().kill(signal_to_send, escalation_delay=escalation_delay, force=force)

    def _service_subprocess(
        self, max_wait_time: float, raise_on_timeout: bool = False, expect_signal: int | None = None
    ) -> int | None:
        if self._kill_at is not None and self._exit_code is None:
            left = self._kill_at - time.monotonic()
            if left <= 0:
                self._kill_at = None
                self.process_log.error(
                    "The worker was told to end, and the task has not ended within its stop_grace_period; killing it",
                    seconds=self._grace,
                )
                self._workload.send_signal(signal.SIGKILL)
            max_wait_time = min(max_wait_time, max(left, 0.0))
        code: int | None = super()._service_subprocess(max_wait_time, raise_on_timeout, expect_signal)
        return code

    def _check_subprocess_exit(self, raise_on_timeout: bool = False, expect_signal: int | None = None) -> int | None:
        """As stock, which takes each SIGKILL for memory that ran out; not when the end is known to be another."""
        ending = self._workload.ending if self._workload.exit_code() == -signal.SIGKILL else None
        if ending is not None and ending.from_outside:
            expect_signal = signal.SIGKILL
        code: int | None = super()._check_subprocess_exit(raise_on_timeout, expect_signal)
        return code

    def _handle_request(self, msg: Any, log: FilteringBoundLogger, req_id: int) -> None:
        if refusal := refused_to_task(msg, self._permissions, self._file, self._what):
            self.process_log.warning("Refused to this task", reason=brief(refusal))
            self.send_msg(None, request_id=req_id, error=denial(refusal))
            return
        if isinstance(msg, comms.GetConnection | comms.GetVariable):
            found = _from_worker(msg)
            if found is not None:
                # Fields at their defaults are left out, as stock does. So the types above are set explicitly.
                self.send_msg(found, request_id=req_id, exclude_unset=True, by_alias=True)
                return
        super()._handle_request(msg, log, req_id)


def _from_worker(msg: comms.GetConnection | comms.GetVariable) -> Any:
    """A connection or variable from the worker's own environment or secrets backend, or None.

    A stock task looks there itself before it asks the server. In a container it must not be able to. So the supervisor
    looks, and gives the task only what it asked for.
    """
    for backend in ensure_secrets_loaded(
        default_backends=["airflow.secrets.environment_variables.EnvironmentVariablesBackend"]
    ):
        try:
            if isinstance(msg, comms.GetVariable):
                value = backend.get_variable(key=msg.key)
                if value is not None:
                    mask_secret(value, msg.key)
                    return comms.VariableResult(key=msg.key, value=value, type="VariableResult")
            elif (connection := backend.get_connection(conn_id=msg.conn_id)) is not None:
                for secret in (connection.password, connection.extra):
                    if secret:
                        mask_secret(secret)
                return comms.ConnectionResult(
                    type="ConnectionResult",
                    conn_id=msg.conn_id,
                    conn_type=connection.conn_type,
                    # All fields, also those that are None: in Airflow's models none is optional.
                    **{
                        name: getattr(connection, name)
                        for name in ("host", "schema", "login", "password", "port", "extra")
                    },
                )
        except Exception:
            log.exception("A secrets backend of the worker failed; asking the next", backend=type(backend).__name__)
    return None


def load_certificates() -> None:
    """Load the certificates that every API client loads, with https or without; it takes 80 ms. Airflow caches them.

    Errors are ignored: the clients report them.
    """
    with suppress(AttributeError, OSError):
        api.Client._get_ssl_context_cached(api.API_SSL_CA_FILE_PATH, api.API_SSL_CERT_PATH)  # noqa: SLF001


#: Seconds of a token's life that are kept for telling the server, when a pull is stopped because the token expires.
_TOKEN_RESERVE = 30.0


def seconds_to_start(client: Client) -> float:
    """Within how many seconds the server must be told that the try starts: then its token expires.

    The token that comes with the queue is not renewed. The scheduler also gives a task up that is queued for as long.
    """
    try:
        payload = client.auth.token.split(".")[1]  # type: ignore[union-attr]
        expires = float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (AttributeError, IndexError, ValueError, KeyError, TypeError):
        return math.inf  # another kind of client, such as that of `airflow dags test`
    return max(1.0, expires - time.time() - _TOKEN_RESERVE)


def upload_logs(client: Client, logger: FilteringBoundLogger, what: Any) -> None:
    """Upload the log of a task that never started to the remote logs. Without remote logging this does nothing."""
    with _remote_logging_conn(client):
        upload_to_remote(logger, what)
