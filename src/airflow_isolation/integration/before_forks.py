"""What every worker would do with its first task, done once in the process that forks them (scheduler, Celery, Edge)."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow_isolation.bridge.zygote import compile_default_filter
from airflow_isolation.errors import IsolationError
from airflow_isolation.integration.local_settings import local_settings_digest
from airflow_isolation.integration.seams import supervision

if TYPE_CHECKING:
    from airflow_isolation.settings.effective import Backend

#: Airflow imports this with its first log.
_IMPORTED_LATE = "airflow.sdk._shared.logging.factory"

#: gRPC imports these with its first channel.
_IMPORTED_BY_CHANNELS = ("grpc._channel", "grpc._interceptor")


def prepare_workers(backend: Backend) -> None:
    """Import, load and compile; nothing is connected, and no thread is started, which a fork would lose."""
    importlib.import_module(f"airflow_isolation.runtime.{backend}")
    for module in (_IMPORTED_LATE, *(_IMPORTED_BY_CHANNELS if backend == "containerd" else ())):
        with suppress(ImportError):
            importlib.import_module(module)
    supervision.load_certificates()
    local_settings_digest()
    # A task without it says so.
    with suppress(IsolationError):
        compile_default_filter()
