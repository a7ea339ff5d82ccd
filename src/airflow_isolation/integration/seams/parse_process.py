"""Airflow's supervisor of one DAG file's parse, with the child in a parse container.

``DagFileProcessorProcess`` answers requests as in stock Airflow. What differs: the child gets the four channels from us
over the agent's socket; it can't block the DAG processor's loop, which is one thread for all files; and what it sends has
limits.
"""

from __future__ import annotations

import selectors
import signal
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import structlog
from airflow.dag_processing.processor import DagFileParsingResult, DagFileProcessorProcess
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.supervisor import NeverRaised, ProcessTracker
from pydantic import ValidationError

from airflow_isolation.bridge.channels import LineAllowance, PeerViolation
from airflow_isolation.bridge.parse_container import Ended, ParseContainer, Started
from airflow_isolation.bridge.pipe import open_channels
from airflow_isolation.bridge.started_agent import NegativeSignal
from airflow_isolation.integration.dag_processing.result import NotAResult
from airflow_isolation.integration.dag_processing.verdict import UnfinishedParse, closed_to_others, verdict
from airflow_isolation.integration.seams.brief_log import VALUE_LIMIT, BriefLog, cut, first_problem
from airflow_isolation.integration.seams.channel_readers import channel_readers
from airflow_isolation.integration.seams.masks import FULL, Masks
from airflow_isolation.integration.seams.permitted import denial, refused_secret
from airflow_isolation.integration.seams.supervision import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from airflow.sdk.api.client import Client
    from structlog.typing import FilteringBoundLogger
    from typing_extensions import Self

    from airflow_isolation.bridge.pipe import Channel
    from airflow_isolation.settings.effective import EffectiveSettings
    from airflow_isolation.settings.policy import Policy

log = structlog.get_logger(logger_name="airflow_isolation.dag_processing")

#: Bytes that may wait for a child to read them. The first message has all callbacks of a file, each with its context.
OUTBOX_LIMIT = 64 * 1024 * 1024
#: How much of one parse's stdout, stderr and log together is kept. Each line costs the loop, one thread for all files, some
#: 50 µs, and the file is parsed again and again.
LINES_LIMIT = 10_000
LOG_LIMIT = 16 * 1024 * 1024
#: Seconds that a container may take to report the end after a kill, and channels to close after the end.
END_REPORT_TIMEOUT = 10.0


class _StillRunning(Exception):
    """The parse has not ended."""


def serve_channels(selector: selectors.BaseSelector, *, until: float) -> None:
    """Wait until a channel can be read or written, at most until a time of ``time.monotonic``, and call its reader."""
    for key, _ in selector.select(max(0.0, until - time.monotonic())):
        handler, on_close = key.data
        try:
            more = handler(key.fileobj)
        except BlockingIOError:
            continue
        if not more:
            on_close(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]


class Wakeups:
    """Lets threads that answer requests call the loop: the loop sends their answers, not the threads themselves."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._work: deque[Callable[[], object]] = deque()

    def fileno(self) -> int:
        return self._read.fileno()

    def call(self, work: Callable[[], object]) -> None:
        """Have the loop call ``work`` soon. May be called from any thread, also after ``close``."""
        self._work.append(work)
        with suppress(OSError):  # full: the loop wakes up anyway; closed: the loop has ended
            self._write.send(b"\0")

    def run(self, _: object = None) -> bool:
        """Called by the loop when there is something to read."""
        with suppress(BlockingIOError):
            self._read.recv(4096)
        while self._work:
            self._work.popleft()()
        return True

    def close(self) -> None:
        self._read.close()
        self._write.close()


class _Outbox:
    """Sends to a child without waiting. The ``sendall`` of a socket would wait for a child that doesn't read."""

    def __init__(self, channel: socket.socket, selector: selectors.BaseSelector, wakeups: Wakeups) -> None:
        # A descriptor of its own, so that reading and writing can be registered independently.
        self._channel = channel.dup()
        self._selector = selector
        self._wakeups = wakeups
        self._loop = threading.get_ident()
        self._pending = bytearray()
        self._lock = threading.Lock()
        self._registered = False

    def sendall(self, data: bytes) -> None:
        """Queue ``data``, and send what fits now.

        :raises PeerViolation: the child has left too much unread.
        """
        with self._lock:
            if len(self._pending) + len(data) > OUTBOX_LIMIT:
                raise PeerViolation(f"It has left {len(self._pending)} bytes of answers unread")
            self._pending += data
        if threading.get_ident() == self._loop:
            self.flush()
        else:
            self._wakeups.call(self.flush)

    def flush(self, _: object = None) -> bool:
        """Send what the channel takes now. Call it in the loop only."""
        with self._lock:
            try:
                while self._pending and self._channel.fileno() >= 0:
                    del self._pending[: self._channel.send(self._pending)]
            except BlockingIOError:
                pass
            except OSError:
                self._pending.clear()  # the child is gone; ``_has_ended`` handles its end
            waiting = bool(self._pending) and self._channel.fileno() >= 0
        if waiting and not self._registered:
            self._selector.register(self._channel, selectors.EVENT_WRITE, (self.flush, self._selector.unregister))
        elif self._registered and not waiting:
            self._selector.unregister(self._channel)
        self._registered = waiting
        return True

    def close(self) -> None:
        """May be called twice."""
        if self._registered:
            self._selector.unregister(self._channel)
            self._registered = False
        self._channel.close()


class _ParseTracker(ProcessTracker):
    """Makes a parse in a container look like a process to the supervisor."""

    ProcessNotFound = NeverRaised
    TimeoutExpired = _StillRunning

    def __init__(self, container: ParseContainer) -> None:
        self._container = container
        self.code: int | None = None

    @property
    def pid(self) -> int:
        return self._container.container.pid

    def send_signal(self, s: signal.Signals) -> None:
        del s  # always SIGKILL: user code may ignore every other signal
        self._container.kill()

    def wait(self, timeout: float | None) -> int:
        del timeout  # ``_hear`` learns of the end; nothing may wait here
        if self.code is None:
            raise _StillRunning
        return self.code


@attrs.define(kw_only=True)
class ContainerDagFileProcessorProcess(DagFileProcessorProcess):
    """The parse of one DAG file, or the run of its callbacks, in a container that no other file uses meanwhile."""

    #: Called with the container as soon as the parse has ended, and with whether it can be used again.
    _give_back: Callable[[ParseContainer, bool], object] = attrs.field(repr=False)
    _container: ParseContainer = attrs.field(repr=False)
    _policy: Policy = attrs.field(repr=False)
    _outbox: _Outbox = attrs.field(repr=False)
    _tracker: _ParseTracker = attrs.field(repr=False)
    bundle_path: Path = attrs.field()
    #: The callback requests that it was started for.
    callbacks: Sequence[Any] = attrs.field(repr=False)
    #: Whether the container began with the file.
    started: bool = attrs.field(default=False, init=False)
    ended: Ended | None = attrs.field(default=None, init=False)
    #: The timeout in seconds for which it was killed.
    timed_out: float | None = attrs.field(default=None, init=False)
    #: How it broke the protocol of its channels.
    violation: str = attrs.field(default="", init=False)
    _ended_at: float = attrs.field(default=0.0, init=False)
    _killed_at: float | None = attrs.field(default=None, init=False)
    _asking: bool = attrs.field(default=False, init=False)
    _masks: Masks = attrs.field(init=False, repr=False)
    _news: Wakeup | None = attrs.field(default=None, init=False, repr=False)

    @_masks.default
    def _own_masks(self) -> Masks:
        return Masks(full=lambda: self.process_log.warning(FULL))

    @classmethod
    def begin(
        cls,
        container: ParseContainer,
        *,
        wakeups: Wakeups,
        selector: selectors.BaseSelector,
        path: str,
        bundle_path: Path,
        bundle_name: str,
        callbacks: Sequence[Any],
        client: Client,
        logger: FilteringBoundLogger,
        modules: Sequence[str] = (),
        **more: Any,
    ) -> Self:
        """Hand a file over to a container. Never blocks.

        :param modules: modules of Airflow that the container imports once, for all files.
        :param more: further fields of Airflow's DagFileProcessorProcess.
        :raises ContainerFailed: the container is gone. Nothing has begun, and the caller still has to remove the container.
        """
        ours, theirs = open_channels()
        try:
            container.parse(environment={}, descriptors=theirs.in_order(), modules=modules)
        except BaseException:
            ours.close()
            raise
        finally:
            # An open copy here would prevent end-of-file.
            theirs.close()
        for end in ours.in_order():
            end.setblocking(False)
        tracker = _ParseTracker(container)
        outbox = _Outbox(ours.requests, selector, wakeups)
        self = cls(
            pid=container.container.pid,
            stdin=outbox,  # type: ignore[arg-type]  # Airflow asks no more of it than sendall and close
            outbox=outbox,
            process=tracker,
            tracker=tracker,
            process_log=logger,
            start_time=time.monotonic(),
            selector=selector,
            client=client,
            bundle_name=bundle_name,
            bundle_path=bundle_path,
            container=container,
            callbacks=callbacks,
            **more,
        )
        self.had_callbacks = bool(callbacks)
        self._register_pipe_readers(ours.stdout, ours.stderr, ours.requests, ours.logs, data={})
        self._news = Wakeup(container.fileno())
        selector.register(self._news, selectors.EVENT_READ, (self._hear, lambda _: None))
        self._on_child_started(list(callbacks), path, bundle_path, bundle_name)
        return self

    @classmethod
    def start(cls, **_: Any) -> Self:
        """Stock's method, which would fork this process. Not allowed."""
        raise NotImplementedError("a parse in a container begins with `begin`")

    # --- what is heard from the child

    def _register_pipe_readers(
        self,
        stdout: Channel,
        stderr: Channel,
        requests: socket.socket,
        logs: socket.socket,
        *,
        data: dict[socket.socket, bytes],
    ) -> None:
        del data  # nothing is written before the hand-over
        named: dict[Any, str] = {stdout: "stdout", stderr: "stderr", logs: "logs", requests: "requests"}
        self._open_sockets.update(named)
        readers = channel_readers(
            self._get_target_loggers(),
            "dag_processor",
            request=self._asked,
            broken=self._broken,
            allowance=LineAllowance(LINES_LIMIT, LOG_LIMIT, spent=self._said_too_much),
            hide=self._masks.hide,
        )
        for channel, reader in zip((stdout, stderr, logs, requests), readers, strict=True):
            self.selector.register(channel, selectors.EVENT_READ, (reader, self._on_socket_closed))

    def _hear(self, _: object) -> bool:
        while self.ended is None and (news := self._container.news()) is not None:
            if isinstance(news, Started):
                self.started = True
                self.start_time = time.monotonic()
            else:
                self._has_ended(news)
        return True

    def _has_ended(self, end: Ended) -> None:
        self.ended = end
        self._ended_at = time.monotonic()
        self._tracker.code = end.code
        # Unregister first: the pool may close the descriptor, and its number may then be given to another file.
        if self._news is not None:
            self.selector.unregister(self._news)
        self._give_back(self._container, not end.gone)

    def _broken(self, error: Exception) -> None:
        self.violation = str(error)
        self.process_log.error(
            "The file broke its channel to the DAG processor; its parse is stopped", error=str(error)
        )
        self.kill()

    def _said_too_much(self) -> None:
        self.process_log.warning(
            "This parse has logged and printed more than is kept; the rest is left out",
            lines=LINES_LIMIT,
            bytes=LOG_LIMIT,
        )

    # --- requests

    def _asked(self, frame: Any) -> None:
        """Handle a request; runs in the loop. If it may have to wait for a secrets backend, a thread answers it."""
        try:
            message = self.decoder.validate_python(frame.body)
        except (ValidationError, NotAResult) as error:
            raise PeerViolation(
                f"It sent a request that Airflow does not know: {_problem(error)}",
                hint="User code must not write to descriptor 0",
            ) from None
        if isinstance(message, DagFileParsingResult | comms.MaskSecret):
            self._handle_request(message, log, frame.id)
            return
        if self._asking:
            # Airflow's own client waits for each answer.
            raise PeerViolation("It asked again before it had its answer")
        self._asking = True
        threading.Thread(target=self._answer, args=(frame,), name="answer-dag-file", daemon=True).start()

    def _answer(self, frame: Any) -> None:
        # Stock's generator turns every error into an answer.
        answers = self.handle_requests(BriefLog(log))  # type: ignore[arg-type]
        next(answers)
        answers.send(frame)
        answers.close()

    def send_msg(self, *arguments: Any, **keywords: Any) -> None:
        # Reset first: the child may ask again as soon as it reads the answer.
        self._asking = False
        super().send_msg(*arguments, **keywords)

    def _handle_request(self, msg: Any, log: FilteringBoundLogger, req_id: int) -> None:
        if isinstance(msg, comms.MaskSecret):
            self._masks.add(msg.value, msg.name)
            self.send_msg(None, request_id=req_id)
            return
        refusal = self._refusal(msg)
        if not refusal:
            super()._handle_request(msg, log, req_id)
            return
        self.process_log.warning("Refused to a DAG file", reason=refusal)
        self.send_msg(None, request_id=req_id, error=denial(refusal))

    def _refusal(self, msg: Any) -> str:
        """Why a request is refused; empty when it is allowed."""
        file = f"{self.bundle_name}/{self.dag_file_rel_path}"
        match msg:
            case comms.PutVariable() | comms.DeleteVariable() if not (
                self._policy.parse_may_write or self.had_callbacks
            ):
                return (
                    f"{file} may not change the Variable {msg.key!r} while it is parsed: what a DAG file does there, "
                    "it does at every parse. The administrator can set parse_may_write in [container_runtime_policy]"
                )
        return refused_secret(msg, self._policy.permissions, file)

    # --- the end

    def kill(self, *_: Any, **__: Any) -> None:
        """Send SIGKILL to the parse and all that it started.

        Never blocks; the loop learns of the end. May be called twice.
        """
        if self.ended is None and self._killed_at is None:
            self._killed_at = time.monotonic()
            self._container.kill()

    def kill_if_late(self, timeout: float) -> bool:
        """Kill the parse if it takes longer than ``timeout`` seconds. True when it was killed by this call."""
        now = time.monotonic()
        if self.ended is not None:
            return False
        if self._killed_at is not None:
            if now > self._killed_at + END_REPORT_TIMEOUT:
                self._give_up()
            return False
        if now <= self.start_time + timeout:
            return False
        self.timed_out = timeout
        self.kill()
        return True

    def next_deadline(self, timeout: float) -> float:
        """When ``kill_if_late`` should be called again at the latest (time.monotonic)."""
        if self.ended is not None:
            return self._ended_at + END_REPORT_TIMEOUT
        return self.start_time + timeout if self._killed_at is None else self._killed_at + END_REPORT_TIMEOUT

    @property
    def is_ready(self) -> bool:
        """Whether the parse has ended and all its output has been read."""
        if self.ended is None:
            return False
        self._check_subprocess_exit(expect_signal=signal.SIGKILL if self._killed_at is not None else None)
        return not self._open_sockets or time.monotonic() > self._ended_at + END_REPORT_TIMEOUT

    def close(self) -> None:
        """Release everything, whether the parse has ended or not. May be called twice."""
        if self.ended is None:
            self.kill()
            self._give_up()
        self._outbox.close()
        super().close()  # type: ignore[no-untyped-call]

    def _give_up(self) -> None:
        self._has_ended(Ended(code=NegativeSignal(-signal.SIGKILL), gone=True))


def why_no_result(process: ContainerDagFileProcessorProcess, settings: EffectiveSettings) -> str:
    """The import error for a parse that has ended without a result."""
    assert process.ended is not None
    return verdict(
        UnfinishedParse(
            code=process.ended.code,
            image=settings.image,
            memory=settings.resources.memory,
            out_of_memory=process.ended.out_of_memory,
            timeout=process.timed_out,
            violation=process.violation,
            closed=closed_to_others(process.bundle_path, Path(process.dag_file_rel_path)),
        )
    )


def _problem(error: ValidationError | NotAResult) -> str:
    return first_problem(error) if isinstance(error, ValidationError) else cut(str(error), VALUE_LIMIT)
