"""Airflow's DAG processor, with every file parsed in a container.

Airflow's loop is one thread for all files. It stays as it is: bundles, discovery, queue, storing results, callbacks from
the database. What differs is the part between the queue and the result:

    queue → request (settings, image, container: by the pool's threads) → slot (a container's child) → checked result

A file that waits for its container is in neither queue nor slot; it comes back when the container is ready. When a daemon,
a registry or an image fails, the file is put off and nothing changes in the database: its DAGs stay as they are.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn, cast

import attrs
import structlog
from airflow import __version__ as airflow_version
from airflow._shared.observability.metrics import stats
from airflow.configuration import conf
from airflow.dag_processing.bundles.base import BundleVersionLock
from airflow.dag_processing.manager import DagFileInfo, DagFileProcessorManager
from airflow.models.db_callback_request import DbCallbackRequest
from airflow.sdk.log import init_log_file, logging_processors
from airflow.utils.helpers import prune_dict
from airflow.utils.session import create_session
from uuid6 import uuid7

from airflow_isolation.bridge.parse_pool import Failed, ParsePool, ParseRequest, Ready
from airflow_isolation.errors import ContainerFailed, IsolationError
from airflow_isolation.integration.connection import connect
from airflow_isolation.integration.dag_processing.housekeeping import Housekeeping
from airflow_isolation.integration.dag_processing.imports import imported_airflow_modules
from airflow_isolation.integration.dag_processing.log import ParseLog
from airflow_isolation.integration.dag_processing.request import parse_request_for
from airflow_isolation.integration.seams.parse_process import (
    ContainerDagFileProcessorProcess,
    Wakeups,
    serve_channels,
    why_no_result,
)
from airflow_isolation.integration.seams.parse_results import (
    believed_result,
    clear_errors_of_members,
    error_result,
    has_dags,
    keep_scheduled,
    without_dags_of_others,
)
from airflow_isolation.integration.seams.supervision import Wakeup
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.policy import Policy
from airflow_isolation.settings.resolve import dag_parsing_backend, parse_pool_settings, resolve_connection

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from typing import BinaryIO, Literal

    from airflow.dag_processing.processor import DagFileParsingResult
    from sqlalchemy.orm import Session
    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import Backend, EffectiveSettings

log = structlog.get_logger(logger_name="airflow_isolation.dag_processing")

NOT_PARSED = "airflow_isolation.dag_not_parsed"
#: Seconds. A request that has waited so long for its answer while a slot was free no longer holds the next request back.
PATIENCE = 1.0
#: When containers end during the same file so often in a row, the file is taken for the cause.
BLAMED_AFTER = 3
#: How long a file waits after its container ended during its parse, in seconds; doubled each time.
RETRY_AFTER_LOSS = 2.0
#: How long a file waits after an unexpected failure with its result or settings, in seconds.
RETRY_AFTER_FAILURE = 60.0
#: How long all containers may take to be gone when the DAG processor ends, in seconds.
CLOSE_TIMEOUT = 10.0
#: With ``--num-runs``: after so many failed attempts a file is given up.
TRIES = 3
#: The longest wait of one turn of the loop, in seconds, as in stock Airflow.
LONGEST_WAIT = 1.0


def configured_backend() -> Backend:
    """The backend that [core] scheduler_dag_parsing_runtime names.

    :raises IsolationError: it is empty or wrong.
    """
    backend = dag_parsing_backend(airflow_configuration())
    if backend is None:
        raise IsolationError(
            "[core] scheduler_dag_parsing_runtime is empty, so DAG files are not parsed in containers",
            hint="Set it to containerd or docker",
        )
    return backend


@attrs.define
class _Asked:
    """A file that waits for its container."""

    settings: EffectiveSettings
    since: float = attrs.field(factory=time.monotonic)


@attrs.frozen
class _Unstarted:
    """Stands in for a process in ``handle_parsing_result``, for a file that no process parsed."""

    parsing_result: DagFileParsingResult
    start_time: float = attrs.field(factory=time.monotonic)
    had_callbacks: bool = False


@attrs.define(kw_only=True)
class ContainerDagFileProcessorManager(DagFileProcessorManager):
    """The DAG processor's loop. The constructor starts nothing, because the process may still fork to become a daemon."""

    _backend: Backend = attrs.field(factory=configured_backend)
    _processors: dict[DagFileInfo, ContainerDagFileProcessorProcess] = attrs.field(  # type: ignore[assignment]
        factory=dict, init=False
    )
    _configuration: Configuration = attrs.field(factory=airflow_configuration, init=False, repr=False)
    _policy: Policy = attrs.field(
        default=attrs.Factory(lambda self: Policy.configured(self._configuration), takes_self=True), init=False
    )
    _pool: ParsePool = attrs.field(init=False, repr=False)
    _wakeups: Wakeups = attrs.field(init=False, repr=False)
    _housekeeping: Housekeeping = attrs.field(init=False, repr=False)
    _ready: deque[Ready] = attrs.field(factory=deque, init=False)
    _asked: dict[DagFileInfo, _Asked] = attrs.field(factory=dict, init=False)
    #: Files that wait after a failure, and until when (time.monotonic).
    _put_off: dict[DagFileInfo, float] = attrs.field(factory=dict, init=False)
    #: Files that are not tried again (``--num-runs``), and why.
    given_up: dict[DagFileInfo, IsolationError] = attrs.field(factory=dict, init=False)
    _tries: dict[DagFileInfo, int] = attrs.field(factory=dict, init=False)
    #: How often in a row a container ended during a file's parse.
    _losses: dict[DagFileInfo, int] = attrs.field(factory=dict, init=False)
    #: The last import error that was shown for a file that is not in the database yet.
    _shown: dict[DagFileInfo, str] = attrs.field(factory=dict, init=False)
    #: Versions of bundles that callbacks need. They are locked here: the lock is a file of this host, and a child can't
    #: hold it.
    _version_locks: dict[DagFileInfo, ExitStack] = attrs.field(factory=dict, init=False)
    _settings: dict[DagFileInfo, EffectiveSettings] = attrs.field(factory=dict, init=False)
    _slot_free_since: float | None = attrs.field(default=None, init=False)
    _last_tick: float = attrs.field(default=0.0, init=False)

    # --- beginning and end

    def before_run(self) -> None:
        super().before_run()
        settings = parse_pool_settings(self._configuration)
        self._pool = ParsePool(
            open_runtime=connect,
            airflow=airflow_version,
            at_most=settings.parse_containers,
            per_key=self._parallelism,
            idle_timeout=settings.parse_idle_timeout,
            max_age=settings.parse_max_age,
            max_forks=settings.parse_max_forks,
            max_memory=settings.parse_max_memory,
        )
        self._wakeups = Wakeups()
        self.selector.register(Wakeup(self._pool.fileno()), selectors.EVENT_READ, (self._take, lambda _: None))
        self.selector.register(
            Wakeup(self._wakeups.fileno()), selectors.EVENT_READ, (self._wakeups.run, lambda _: None)
        )
        self._housekeeping = Housekeeping(resolve_connection(self._backend, configuration=self._configuration))
        self._housekeeping.start()
        # The first request builds the in-process API. That takes seconds, which would stop the loop later, so do it now.
        self.client.variables.get("airflow-isolation: the first question")
        self.log.info("DAG files are parsed in containers (%s)", self._backend)

    def _exit_gracefully(self, signum: int, frame: Any) -> NoReturn:
        # Stock ends all parses here, in the signal handler. The signal may have interrupted code that holds a lock of ours,
        # so we don't: the job's runner does it later.
        del frame
        self.log.info("Exiting gracefully upon receiving signal %s", signum)
        sys.exit(os.EX_OK)

    def terminate(self) -> None:
        """End all parses at once; ``end`` waits for it. May be called twice."""
        for processor in self._processors.values():
            processor.kill(signal.SIGKILL)

    def end(self) -> None:
        """Remove every container, in parallel. May be called twice, and before ``before_run``."""
        for processor in self._processors.values():
            processor.close()
        self._processors.clear()
        if hasattr(self, "_housekeeping"):
            self._housekeeping.stop()
            self._pool.close(CLOSE_TIMEOUT)
            self._wakeups.close()
        for lock in self._version_locks.values():
            lock.close()
        self._version_locks.clear()
        self._store_callbacks()

    def _store_callbacks(self) -> None:
        """Put callbacks that were taken from the database and could not be run back, for the next DAG processor."""
        requests = [request for requests in self._callback_to_execute.values() for request in requests]
        self._callback_to_execute.clear()
        if not requests:
            return
        try:
            with create_session() as session:
                session.add_all(DbCallbackRequest(priority_weight=1, callback=request) for request in requests)
        except Exception:
            self.log.exception("%s callbacks that did not run could not be put back", len(requests))

    # --- from the queue to a container

    def _create_process(self, dag_file: DagFileInfo) -> NoReturn:
        raise NotImplementedError(f"{dag_file}: files are parsed in containers, which start by way of the pool")

    def _start_new_processes(self) -> None:
        now = time.monotonic()
        if now >= self._last_tick + 1:
            self._last_tick = now
            self._pool.tick()
        self._bring_back(now)
        self._begin_ready()
        self._slot_free_since = None if len(self._processors) >= self._parallelism else (self._slot_free_since or now)
        while self._file_queue and self._may_ask(now):
            file, _ = self._file_queue.popitem(last=False)
            if file not in self._processors and file not in self._asked:
                self._ask(file)
        stats.gauge("dag_processing.file_path_queue_size", len(self._file_queue))

    def _begin_ready(self) -> None:
        self._take()
        while len(self._processors) < self._parallelism and self._ready:
            self._begin(self._ready.popleft())

    def _may_ask(self, now: float) -> bool:
        """Whether to ask for a container for the next file. Not for all files at once, so that the first are parsed first.

        At most twice as many files as slots are asked for, so that the next containers get ready while files are parsed. A
        file that waits although a slot is free (its image is being pulled) doesn't count.
        """
        free_since = self._slot_free_since
        waiting = sum(
            1 for asked in self._asked.values() if free_since is None or now < max(asked.since, free_since) + PATIENCE
        )
        return len(self._processors) + waiting < 2 * self._parallelism

    def _ask(self, file: DagFileInfo) -> None:
        if file.bundle_version and file not in self._version_locks:
            self._version_locks[file] = ExitStack()
            self._version_locks[file].enter_context(
                BundleVersionLock(bundle_name=file.bundle_name, bundle_version=file.bundle_version)  # type: ignore[no-untyped-call]
            )
        try:
            wanted = self._request(file)
        except IsolationError as error:
            self._refused(file, error)
        except Exception as error:
            # The file vanished, or the hook raised something unexpected: only this file fails, and the loop goes on.
            self.log.exception("The settings of %s could not be found", file)
            self._not_started(
                file, IsolationError(f"Its settings could not be found: {error!r}"), retry_in=RETRY_AFTER_FAILURE
            )
        else:
            self._asked[file] = _Asked(wanted.settings)
            self._pool.request(wanted)

    def _request(self, file: DagFileInfo) -> ParseRequest:
        assert file.bundle_path is not None
        return parse_request_for(
            file,
            backend=self._backend,
            bundle_name=file.bundle_name,
            bundle_path=file.bundle_path,
            relative_path=file.rel_path,
            configuration=self._configuration,
        )

    def _take(self, _: object = None) -> bool:
        for answer in self._pool.take():
            if isinstance(answer, Ready):
                self._ready.append(answer)
            else:
                self._failed(answer)
        return True

    def _begin(self, ready: Ready) -> None:
        file, container = cast("DagFileInfo", ready.file), ready.container
        asked = self._asked.pop(file, None)
        if asked is None:  # it was deleted meanwhile
            self._pool.give_back(container, reusable=True)
            return
        assert file.bundle_path is not None
        callbacks = self._callback_to_execute.pop(file, [])
        logger, logger_filehandle = self._get_logger_for_dag_file(file)
        try:
            processor = ContainerDagFileProcessorProcess.begin(
                container,
                id=uuid7(),
                wakeups=self._wakeups,
                selector=self.selector,
                give_back=lambda container, reusable: self._pool.give_back(container, reusable=reusable),
                policy=self._policy,
                path=os.fspath(file.absolute_path),
                bundle_path=file.bundle_path,
                bundle_name=file.bundle_name,
                dag_file_rel_path=str(file.rel_path),
                callbacks=callbacks,
                logger=logger,
                logger_filehandle=logger_filehandle,
                modules=self._modules(file),
                subprocess_logs_to_stdout=conf.get("logging", "dag_processor_log_target") == "stdout",
                client=self.client,
            )
        except ContainerFailed as error:
            logger_filehandle.close()
            self._pool.give_back(container, reusable=False)
            self._put_back(file, callbacks)
            self._lost(file, error)
            return
        logger.info(
            "DAG file is parsed in a container",
            container=container.container.id,
            image=asked.settings.image,
            digest=container.image.digest,
            runtime=asked.settings.backend,
        )
        self._processors[file] = processor
        self._settings[file] = asked.settings
        stats.incr("dag_processing.processes", tags=self._tags(file, action="start"))

    def _modules(self, file: DagFileInfo) -> tuple[str, ...]:
        wanted = conf.getboolean("dag_processor", "parsing_pre_import_modules", fallback=True)
        return imported_airflow_modules(file.absolute_path) if wanted else ()

    def _get_logger_for_dag_file(self, dag_file: DagFileInfo) -> tuple[FilteringBoundLogger, ParseLog]:
        # As stock does, but on a full disk only lines are lost; the parse and the DAG processor go on.
        handle = ParseLog(lambda: init_log_file(self._render_log_filename(dag_file)))
        logger = structlog.wrap_logger(
            structlog.BytesLogger(cast("BinaryIO", handle)),
            processors=logging_processors(json_output=True),
            logger_name="processor",
        )
        return logger.bind(), handle

    def _put_back(self, file: DagFileInfo, callbacks: Iterable[Any]) -> None:
        if callbacks := list(callbacks):
            self._callback_to_execute[file] = [*callbacks, *self._callback_to_execute.pop(file, [])]

    def _tags(self, file: DagFileInfo, **more: str) -> dict[str, Any]:
        return prune_dict(  # type: ignore[no-any-return]
            {
                "file_path": file.normalized_file_path_for_stats,
                "team_name": self._get_team_name(file.bundle_name),
                **more,
            }
        )

    # --- files that can't be parsed now, or not at all

    def _failed(self, answer: Failed) -> None:
        file = cast("DagFileInfo", answer.file)
        if self._asked.pop(file, None) is None:  # it was deleted meanwhile
            return
        if answer.definite:
            self._refused(file, answer.error)
        else:
            self._not_started(file, answer.error, retry_in=answer.retry_in)

    def _refused(self, file: DagFileInfo, error: IsolationError) -> None:
        """For a mistake that another try won't mend: show it as an import error, where the author looks."""
        self._log_to_file(file, "The DAG file can't be parsed in a container", error)
        if file.bundle_version:
            # Only callbacks have a version. A mistake in an old version says nothing about the present file.
            dropped = self._callback_to_execute.pop(file, [])
            self.log.error("%s callbacks of %s can't be run: %s", len(dropped), file, error)
            self._let_go(file)
            return
        self._show(file, str(error))

    def _not_started(self, file: DagFileInfo, error: IsolationError, *, retry_in: float) -> None:
        """The infrastructure failed: what the database has of the file stays, and the file is tried again.

        If the database has no DAG of the file, the error is shown: the author may have misspelt the image's name.
        """
        self._log_to_file(file, "The DAG file could not be parsed in a container; it will be tried again", error)
        self.log.warning("%s could not be parsed; again in %.0f seconds: %s", file.rel_path, retry_in, error)
        stats.incr(NOT_PARSED, tags=self._tags(file, bundle_name=file.bundle_name, reason=type(error).__name__))
        self._put_off[file] = time.monotonic() + retry_in
        if not file.bundle_version and self._shown.get(file) != str(error) and not has_dags(file):
            self._shown[file] = str(error)
            self._show(file, f"{error}. It will be tried again", count=False)
        if self.max_runs != -1:
            self._tries[file] = self._tries.get(file, 0) + 1
            if self._tries[file] >= TRIES:
                self.log.error("%s is given up after %s tries", file.rel_path, TRIES)
                self.given_up[file] = error
                del self._put_off[file]

    def _lost(self, file: DagFileInfo, error: IsolationError) -> None:
        """The container ended before the file was parsed, or during its parse."""
        losses = self._losses[file] = self._losses.get(file, 0) + 1
        self._not_started(file, error, retry_in=RETRY_AFTER_LOSS * 2 ** (losses - 1))

    def _log_to_file(self, file: DagFileInfo, message: str, error: IsolationError) -> None:
        logger, logger_filehandle = self._get_logger_for_dag_file(file)
        with logger_filehandle:
            logger.error(message, error=str(error))

    def _show(self, file: DagFileInfo, error: str, *, count: bool = True) -> None:
        """Store an import error for a file that no process parsed.

        :param count: whether it counts as a parse, so that the file waits for its next turn.
        """
        before = self._file_stats[file]
        unstarted = _Unstarted(error_result(file, error))
        self.handle_parsing_result(file, cast("ContainerDagFileProcessorProcess", unstarted))
        if not count:
            self._file_stats[file] = before

    def _bring_back(self, now: float) -> None:
        for file in [file for file, until in self._put_off.items() if until <= now]:
            del self._put_off[file]
            # A look into the bundle doesn't find files with a version, so they must be queued again here.
            self._add_files_to_queue([file], mode="front" if file in self._callback_to_execute else "back")

    def _add_files_to_queue(self, files: list[DagFileInfo], *, mode: Literal["front", "back", "frontprio"]) -> None:
        elsewhere = self._asked.keys() | self._put_off.keys() | self.given_up.keys()
        here = [file for file in files if file not in elsewhere]
        super()._add_files_to_queue(here, mode=mode)

    def _let_go(self, file: DagFileInfo) -> None:
        """Forget a file that has been dealt with."""
        self._settings.pop(file, None)
        if file.bundle_version:
            # Airflow finds statistics by path only, and would take a callback's for those of the present file.
            self._file_stats.pop(file, None)
        if lock := self._version_locks.pop(file, None):
            lock.close()

    # --- while files are parsed

    def _service_processor_sockets(self, timeout: float | None = LONGEST_WAIT) -> None:
        end = time.monotonic() + min(timeout or 0.0, LONGEST_WAIT)
        while True:
            deadlines = (p.next_deadline(self.processor_timeout) for p in self._processors.values())
            serve_channels(self.selector, until=min((end, *deadlines)))
            # Begin here too, not only at the loop's head: the queries to the database take time in between.
            self._kill_timed_out_processors()
            if time.monotonic() >= end or any(p.is_ready for p in self._processors.values()) or self._can_begin():
                return

    def _can_begin(self) -> bool:
        return bool(self._ready) and len(self._processors) < self._parallelism

    def _kill_timed_out_processors(self) -> None:
        for file, processor in self._processors.items():
            if processor.kill_if_late(self.processor_timeout):
                self.log.error("%s took longer than %s seconds and is stopped", file, self.processor_timeout)
                stats.decr("dag_processing.processes", tags=self._tags(file, action="timeout"))
                stats.incr("dag_processing.processor_timeouts", tags=self._tags(file))

    def _collect_results(self) -> None:
        ready = [file for file, processor in self._processors.items() if processor.is_ready]
        finished = [(file, self._processors.pop(file)) for file in ready]
        if finished:
            # The next files are parsed while the results of these are stored.
            self._begin_ready()
        for file, processor in finished:
            try:
                self._finish(file, processor)
            except Exception:
                # This file's result is broken, or the database failed while it was stored. The other files go on.
                self.log.exception("The result of %s could not be dealt with", file)
                self._put_off[file] = time.monotonic() + RETRY_AFTER_FAILURE
            finally:
                processor.close()
                self._let_go(file)

    def _finish(self, file: DagFileInfo, processor: ContainerDagFileProcessorProcess) -> None:
        end = processor.ended
        assert end is not None
        if processor.parsing_result is None and end.gone and self._was_lost(file, processor):
            return
        for known in (self._losses, self._shown, self._tries):
            known.pop(file, None)
        if processor.parsing_result is not None:
            processor.parsing_result = believed_result(file, processor.parsing_result, self._settings[file])
        elif not processor.had_callbacks or end.code != 0:
            error = why_no_result(processor, self._settings[file])
            processor.process_log.error("The DAG file gave no result", error=error)
            if not processor.had_callbacks:
                processor.parsing_result = error_result(file, error)
        self.handle_parsing_result(file, processor)

    def _was_lost(self, file: DagFileInfo, processor: ContainerDagFileProcessorProcess) -> bool:
        """Whether the container ended for a reason other than the file: then the file is tried again."""
        end = processor.ended
        assert end is not None
        if processor.timed_out is not None or processor.violation or (processor.started and end.out_of_memory):
            return False
        if processor.started and self._losses.get(file, 0) >= BLAMED_AFTER - 1:
            return False
        if not processor.started:
            self._put_back(file, processor.callbacks)
        elif processor.had_callbacks:
            # The callbacks may have run, and must not run twice.
            processor.process_log.error("The container ended while callbacks were run")
            return False
        self._lost(file, ContainerFailed("Its container ended while the file was parsed"))
        return True

    def persist_parsing_result(
        self,
        *,
        bundle_name: str,
        parsing_result: DagFileParsingResult,
        relative_fileloc: str | None,
        session: Session,
        **more: Any,
    ) -> None:
        """Store a result, without the DAGs that belong to another bundle."""
        assert relative_fileloc is not None
        try:
            stored = without_dags_of_others(parsing_result, bundle_name, relative_fileloc, session)
            if not relative_fileloc.endswith(".py"):
                clear_errors_of_members(bundle_name, relative_fileloc, session, but=stored.import_errors or ())
            super().persist_parsing_result(
                bundle_name=bundle_name,
                parsing_result=stored,
                relative_fileloc=relative_fileloc,
                session=session,
                **more,
            )
            if stored.import_errors and not parsing_result.import_errors:
                keep_scheduled(stored, session)
        except Exception:
            # The caller logs the error and goes on with the same session. Without a rollback its commit would fail.
            session.rollback()
            raise

    def _get_observed_filelocs(self, present: set[DagFileInfo]) -> set[str]:
        # For an archive Airflow lists only the members. Errors that are stored for the archive itself (a refused image, a
        # timeout) would look like those of a deleted file, each time it looks for files.
        return super()._get_observed_filelocs(present) | {str(file.rel_path) for file in present}

    # --- what is not parsed now is neither finished nor gone

    def max_runs_reached(self) -> bool:
        if self.max_runs == -1 or self._num_run < self.max_runs:
            return False
        if self._asked or self._put_off or self._file_queue or self._processors:
            return False
        return all(
            known.run_count >= self.max_runs or file in self.given_up for file, known in self._file_stats.items()
        )

    def deactivate_stale_dags(self, last_parsed: dict[DagFileInfo, datetime | None], **more: Any) -> None:
        here = {file: at for file, at in last_parsed.items() if file not in self._asked and file not in self._put_off}
        super().deactivate_stale_dags(last_parsed=here, **more)

    def purge_removed_files_from_queue(self, present: set[DagFileInfo]) -> None:
        super().purge_removed_files_from_queue(present=present)
        keys = {file.presence_key for file in present}
        for file in [file for file in (*self._asked, *self._put_off) if file.presence_key not in keys]:
            self._put_off.pop(file, None)
            if self._asked.pop(file, None):
                self._pool.cancel(file)
            self._let_go(file)

    def remove_orphaned_file_stats(self, present: set[DagFileInfo]) -> None:
        super().remove_orphaned_file_stats(present=present)
        keys = {file.presence_key for file in present}
        for known in (self._losses, self._shown):
            for file in [file for file in known if file.presence_key not in keys]:
                del known[file]
