"""Airflow's supervisor of a task, with the child in a container.

``ActivitySubprocess`` stays as it is: heartbeats, requests, states, retries, logs and their upload. What differs is
that its child was made by ``bridge.launch``, that its channels have limits, and that it learns of the child's end
from descriptors (stock looks for it only when a channel has news, which can be five seconds late).
"""

from __future__ import annotations

import base64
import enum
import json
import logging
import math
import selectors
import signal
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import msgspec
import structlog
from airflow.sdk._shared.logging.structlog import reconfigure_logger
from airflow.sdk.api import client as api
from airflow.sdk.configuration import conf, ensure_secrets_loaded
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.supervisor import (
    ActivitySubprocess,
    NeverRaised,
    ProcessTracker,
    _log_to_target,
    _remote_logging_conn,
)
from airflow.sdk.log import mask_secret, upload_to_remote
from structlog.processors import CallsiteParameterAdder

from airflow_isolation.bridge.channels import FrameReader, LineReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from socket import socket

    from airflow.sdk.api.client import Client
    from structlog.typing import FilteringBoundLogger
    from typing_extensions import Self

    from airflow_isolation.bridge.channels import LineAllowance
    from airflow_isolation.bridge.workload import Workload

log = structlog.get_logger(logger_name="airflow_isolation.supervision")

#: Keywords of the logging call itself: as keys of an event they would be given twice, which stops a stock supervisor.
_RESERVED = frozenset({"target", "level", "msg", "event", "self"})


_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
    "critical": logging.CRITICAL,
}


class _StillRunning(Exception):
    """The workload has not ended."""


class WorkloadTracker(ProcessTracker):
    """A workload as the supervisor wants to see a process."""

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
    """A descriptor for a supervisor's selector that the supervisor may not close."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        pass


@attrs.define(kw_only=True)
class ContainerActivitySubprocess(ActivitySubprocess):
    """A task's supervisor whose child runs in a container."""

    _workload: Workload = attrs.field(repr=False)
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
        ended: Callable[[str], object],
        told_pid: int | None = None,
    ) -> Self:
        """Tell the server that the task has started and the task what to do.

        :param ended: gets the state of the try at its end, while its log can still be written.
        :param told_pid: with which the server has been told already that the task runs; it takes no other then.

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
        self, stdout: socket, stderr: socket, requests: socket, logs: socket, *, data: dict[socket, bytes]
    ) -> None:
        del data  # what was said before the hand-over went to the container's own output
        self._open_sockets.update({stdout: "stdout", stderr: "stderr", logs: "logs", requests: "requests"})
        answers = self.handle_requests(log)
        next(answers)
        readers = channel_readers(self._get_target_loggers(), "task", request=answers.send, broken=self._broken)
        for channel, reader in zip((stdout, stderr, logs, requests), readers, strict=True):
            self.selector.register(channel, selectors.EVENT_READ, (reader, self._on_socket_closed))

    def _broken(self, error: Exception) -> None:
        self.process_log.error("The task broke its channel to the supervisor; killing it", error=str(error))
        self._workload.send_signal(signal.SIGKILL)

    def _monitor_subprocess(self) -> None:
        # Stock forwards with os.kill(self.pid), which an ordinary user may not do to a container's process.
        def forward(number: int, _: object) -> None:
            log.info("Passing a signal on to the task", signal=signal.Signals(number).name)
            self._workload.send_signal(signal.Signals(number))

        signal.signal(signal.SIGTERM, forward)
        signal.signal(signal.SIGINT, forward)
        super()._monitor_subprocess()  # type: ignore[no-untyped-call]
        # Before stock sends the log away. Trouble here must not keep the state from the server.
        try:
            self._ended(self.final_state)
        except Exception:
            log.exception("The end of a task could not be told in its log", container=self._workload.container.id)

    def _handle_request(self, msg: Any, log: FilteringBoundLogger, req_id: int) -> None:
        if isinstance(msg, comms.GetConnection | comms.GetVariable):
            found = _from_worker(msg)
            if found is not None:
                # What is at its default is left out, as stock does; so the types above are set, not left to it.
                self.send_msg(found, request_id=req_id, exclude_unset=True, by_alias=True)
                return
        super()._handle_request(msg, log, req_id)


def channel_readers(
    loggers: Iterable[FilteringBoundLogger],
    name: str,
    *,
    request: Callable[[Any], None],
    broken: Callable[[Exception], object],
    allowance: LineAllowance | None = None,
) -> tuple[Callable[[socket], bool], ...]:
    """What reads stdout, stderr, logs and requests of a workload, in this order, from a channel that is readable.

    Each answers whether it wants more. What the peer breaks ends the peer, not the supervisor, which has a state to
    report and a log to upload: ``broken`` is called, and the channel is done with.

    :param name: the first word of the loggers' names in the log: ``task`` or ``dag_processor``.
    :param request: gets each request frame.
    :param allowance: what may be said in all; without one, there is no end to it.
    """
    # The workload filters by level itself; these print whatever they are given.
    targets = tuple(
        reconfigure_logger(target, CallsiteParameterAdder, level_override=logging.NOTSET) for target in loggers
    )
    decoder = msgspec.msgpack.Decoder(comms._RequestFrame)  # noqa: SLF001 - the frame has no public name

    def guarded(read: Callable[[socket], bool]) -> Callable[[socket], bool]:
        def reader(channel: socket) -> bool:
            try:
                return read(channel)
            except BlockingIOError:
                # Airflow drains what is left in non-blocking channels until they raise this.
                raise
            except (BrokenPipeError, ConnectionResetError):
                return False
            except Exception as error:  # noqa: BLE001 - whatever undecodable bytes can raise
                broken(error)
                return False

        return reader

    lines = partial(LineReader, allowance=allowance)
    return tuple(
        guarded(reader)
        for reader in (
            lines(partial(_log_text, targets, f"{name}.stdout", logging.INFO)),
            lines(partial(_log_text, targets, f"{name}.stderr", logging.ERROR)),
            lines(partial(_log_event, targets)),
            FrameReader(lambda body: request(decoder.decode(body))),
        )
    )


def _from_worker(msg: comms.GetConnection | comms.GetVariable) -> Any:
    """A connection or variable of the worker's own environment or secrets backend, or None.

    A stock task looks there before it asks the server. In a container it can't, and must not be able to: the
    supervisor looks for it, and hands over what was asked for and nothing else.
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
                    **{
                        name: value
                        for name in ("host", "schema", "login", "password", "port", "extra")
                        if (value := getattr(connection, name)) is not None
                    },
                )
        except Exception:
            log.exception("A secrets backend of the worker failed; asking the next", backend=type(backend).__name__)
    return None


def _log_text(loggers: Iterable[FilteringBoundLogger], name: str, level: int, line: bytes) -> None:
    for target in loggers:
        _log_to_target(target, level, line.rstrip().decode(errors="replace"), logger=name)


def _log_event(loggers: Iterable[FilteringBoundLogger], line: bytes) -> None:
    """A line of the structured log channel. Anything may stand in it; nothing in it may raise."""
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        event = None
    if not isinstance(event, dict):
        _log_text(loggers, "task.log", logging.WARNING, line)
        return
    level = _LEVELS.get(str(event.pop("level", "info")).lower(), logging.INFO)
    message = str(event.pop("event", ""))
    if "timestamp" in event:
        with suppress(msgspec.ValidationError):
            event["timestamp"] = msgspec.convert(event["timestamp"], datetime)
    if exception := event.pop("exception", None):
        event["error_detail"] = exception
    safe = {f"{key}_" if key in _RESERVED else key: value for key, value in event.items()}
    for target in loggers:
        _log_to_target(target, level, message, **safe)


def load_certificates() -> None:
    """Load what every API client trusts, in 80 ms, whether its server is reached by https or not. Airflow keeps it.

    Whatever is wrong with them, or with this attempt, is told by the clients.
    """
    with suppress(AttributeError, OSError):
        api.Client._get_ssl_context_cached(api.API_SSL_CA_FILE_PATH, api.API_SSL_CERT_PATH)  # noqa: SLF001


#: Of a token's life, in seconds, what is left for telling the server when a pull was broken off for it.
_TOKEN_RESERVE = 30.0

#: Between two signs of life of a try that waits, in seconds: the server takes one without for dead after 300.
_SIGN_OF_LIFE = 10.0


class PutOff(enum.Enum):
    """What happens to a try that the infrastructure kept from starting."""

    RESCHEDULED = enum.auto()
    WAITS_HERE = enum.auto()
    USED_UP = enum.auto()


def put_off(client: Client, what: Any, *, pid: int, before: int | None, waited: int = 0) -> PutOff:
    """Have the scheduler start this try again later, because the infrastructure failed before any user code ran.

    Like a DAG file that is not there yet, at most ``[workers] missing_dag_retries`` times; no try is used up. When those are
    used up, the executor's report fails the try. One that is resumed after a deferral must wait here: rescheduled, it would
    lose its event, and begin anew.

    :param pid: what the server is told for the task's process, now and when it starts.
    :param before: how often it was put off before; None when only the server's number of all reschedules is known.
    :param waited: how often it has waited here before.
    """
    context = client.task_instances.start(what.id, pid, datetime.now(tz=timezone.utc))
    times = context.task_reschedule_count or 0
    if before is not None:
        times = min(times, before)
    if max(times, waited) >= conf.getint("workers", "missing_dag_retries", fallback=3):
        return PutOff.USED_UP
    if context.next_method:
        return PutOff.WAITS_HERE
    now = datetime.now(tz=timezone.utc)
    delay = timedelta(seconds=put_off_delay())
    client.task_instances.reschedule(what.id, comms.RescheduleTask(reschedule_date=now + delay, end_date=now))
    return PutOff.RESCHEDULED


def put_off_delay() -> int:
    """In seconds."""
    return int(conf.getint("workers", "missing_dag_retry_delay", fallback=60))


def wait_alive(client: Client, what: Any, *, pid: int, seconds: float) -> None:
    """Wait, and tell the server that the task lives, which also renews the token.

    :raises Exception: the server does not want this task to run any more.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _SIGN_OF_LIFE))
        client.task_instances.heartbeat(what.id, pid)


def seconds_to_start(client: Client) -> float:
    """How long a try may take until the server must be told that it starts: its token is good for no longer.

    The token that comes with the queue is not renewed, and the scheduler gives up on a task that is queued for as long.
    """
    try:
        payload = client.auth.token.split(".")[1]  # type: ignore[union-attr]
        expires = float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (AttributeError, IndexError, ValueError, KeyError, TypeError):
        return math.inf  # another kind of client, such as that of `airflow dags test`
    return max(1.0, expires - time.time() - _TOKEN_RESERVE)


def upload_logs(client: Client, logger: FilteringBoundLogger, what: Any) -> None:
    """Send the log of a task that never started to where remote logs go; without remote logging this does nothing."""
    with _remote_logging_conn(client):
        upload_to_remote(logger, what)
