"""Does once, in the process that forks the workers (scheduler, Celery, Edge), what each worker would do for its first
task.
"""

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

#: Modules that Airflow imports for its first log.
_IMPORTED_LATE = "airflow.sdk._shared.logging.factory"

#: Modules that gRPC imports for its first channel.
_IMPORTED_BY_CHANNELS = ("grpc._channel", "grpc._interceptor")


def prepare_workers(backend: Backend) -> None:
    """Import, load and compile. Nothing is connected and no thread started, because a fork would lose both."""
    importlib.import_module(f"airflow_isolation.runtime.{backend}")
    for module in (_IMPORTED_LATE, *(_IMPORTED_BY_CHANNELS if backend == "containerd" else ())):
        with suppress(ImportError):
            importlib.import_module(module)
    supervision.load_certificates()
    local_settings_digest()
    # If it fails here, the task reports it.
    with suppress(IsolationError):
        compile_default_filter()
