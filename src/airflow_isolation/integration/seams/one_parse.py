"""Parses one DAG file on request, as the DAG processor would, and stores nothing."""

from __future__ import annotations

import io
import selectors
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from airflow import __version__ as airflow_version
from airflow.configuration import conf
from airflow.dag_processing.manager import DagFileInfo
from airflow.serialization.enums import Encoding
from airflow.serialization.serialized_objects import LazyDeserializedDAG
from uuid6 import uuid7

from airflow_isolation.bridge.parse_pool import Failed, ParsePool, Ready
from airflow_isolation.errors import ContainerFailed
from airflow_isolation.integration.connection import connect
from airflow_isolation.integration.seams import checks
from airflow_isolation.integration.seams.parse_process import (
    ContainerDagFileProcessorProcess,
    Wakeups,
    serve_channels,
    why_no_result,
)
from airflow_isolation.integration.seams.parse_results import believed_result, error_result
from airflow_isolation.integration.seams.supervision import Wakeup
from airflow_isolation.settings.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from airflow.sdk.api.client import Client
    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.bridge.parse_pool import ParseRequest
    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import Backend

#: How long the container may take to be gone afterwards, in seconds.
CLOSE_TIMEOUT = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OneParse:
    """The result of a parse. ``preparing`` (until the container was ready) and ``parsing`` (from then on) are seconds."""

    container: str
    digest: str
    dags: tuple[Mapping[str, Any], ...]
    import_errors: Mapping[str, str]
    warnings: tuple[Mapping[str, str], ...]
    preparing: float
    parsing: float


def parse_once(
    request: ParseRequest,
    *,
    bundle_name: str,
    bundle_path: Path,
    relative_path: Path,
    configuration: Configuration,
    logger: FilteringBoundLogger,
) -> OneParse:
    """Parse one file in a container of its own, which is gone afterwards; blocks. Nothing is stored.

    Variables and Connections that the file asks for are looked up where the DAG processor would look.

    :param logger: gets what the file logs and prints.
    :raises IsolationError: it could not be parsed, for a reason other than the file.
    """
    checks.check_names(checks.DAG_PROCESSING)
    settings = request.settings
    began = time.monotonic()
    with ExitStack() as undo:
        selector = undo.enter_context(selectors.DefaultSelector())
        pool = ParsePool(
            open_runtime=connect,
            airflow=airflow_version,
            at_most=1,
            per_key=1,
            idle_timeout=CLOSE_TIMEOUT,
            max_age=float("inf"),
            max_forks=1,
            max_memory=None,
        )
        undo.callback(pool.close, CLOSE_TIMEOUT)
        wakeups = Wakeups()
        undo.callback(wakeups.close)
        selector.register(Wakeup(wakeups.fileno()), selectors.EVENT_READ, (wakeups.run, lambda _: None))
        ready = _container(pool, request)
        prepared = time.monotonic()
        process = ContainerDagFileProcessorProcess.begin(
            ready.container,
            id=uuid7(),
            wakeups=wakeups,
            selector=selector,
            give_back=lambda *_: None,
            policy=Policy.configured(configuration),
            path=str(bundle_path / relative_path),
            bundle_path=bundle_path,
            bundle_name=bundle_name,
            dag_file_rel_path=str(relative_path),
            callbacks=(),
            logger=logger,
            logger_filehandle=io.BytesIO(),  # there is no file to close
            client=cast("Client", _Client(settings.backend)),
        )
        undo.callback(process.close)
        timeout = conf.getfloat("dag_processor", "dag_file_processor_timeout")
        while not process.is_ready:
            serve_channels(selector, until=process.next_deadline(timeout))
            process.kill_if_late(timeout)
        if not process.started:
            raise ContainerFailed(f"The container {ready.container.container.id} ended before the file had its turn")
        file = DagFileInfo(rel_path=relative_path, bundle_name=bundle_name, bundle_path=bundle_path)
        if process.parsing_result is None:
            result = error_result(file, why_no_result(process, settings))
        else:
            result = believed_result(file, process.parsing_result, settings)
        return OneParse(
            container=ready.container.container.id,
            digest=ready.container.image.digest,
            dags=tuple(dag.data for dag in result.serialized_dags),
            import_errors=result.import_errors or {},
            warnings=tuple(result.warnings or ()),
            preparing=prepared - began,
            parsing=time.monotonic() - prepared,
        )


def summary(dag: Mapping[str, Any]) -> dict[str, Any]:
    """The main facts of a serialized DAG, for people. None of its code is run."""
    lazy = LazyDeserializedDAG(data=dict(dag))
    try:
        tasks = [task[Encoding.VAR]["task_id"] for task in dag["dag"]["tasks"]]
        digest = lazy.hash
    except (KeyError, TypeError) as error:
        raise ContainerFailed(
            f"The DAG {dag['dag']['dag_id']!r} has no form that Airflow could store: {error!r}"
        ) from None
    return {"dag_id": lazy.dag_id, "tasks": tasks, "tags": sorted(dag["dag"].get("tags") or ()), "dag_hash": digest}


def _container(pool: ParsePool, request: ParseRequest) -> Ready:
    settings = request.settings
    deadline = time.monotonic() + settings.image_pull_timeout + settings.start_timeout
    pool.request(request)
    with selectors.DefaultSelector() as selector:
        selector.register(pool.fileno(), selectors.EVENT_READ)
        while (remaining := deadline - time.monotonic()) > 0:
            selector.select(remaining)
            for answer in pool.take():
                if isinstance(answer, Failed):
                    raise answer.error
                return answer
    raise ContainerFailed(f"No container of {settings.image} was ready in time")


class _Client:
    """Airflow's in-process API, built only when a file makes a request: that takes seconds, and a database."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    @cached_property
    def _client(self) -> Any:
        from airflow_isolation.integration.seams.dag_processing import ContainerDagFileProcessorManager

        return ContainerDagFileProcessorManager(max_runs=1, backend=self._backend).client
