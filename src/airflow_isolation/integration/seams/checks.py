"""Checks, before user code can run, that Airflow is as we expect it. If not, that is an error, never stock behaviour."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

SUPPORTED_MINOR: Final = "3.3"

ROUTING: Final[Mapping[str, tuple[str, ...]]] = {
    "airflow.sdk.execution_time.coordinator": (
        "BaseCoordinator.ExecutionResult",
        "BaseCoordinator.execute_task",
        "CoordinatorManager.for_queue",
    ),
    "airflow.executors.workloads.task": ("ExecuteTask.make",),
}

SUPERVISION: Final[Mapping[str, tuple[str, ...]]] = {
    "airflow.sdk.execution_time.supervisor": (
        "ActivitySubprocess._create_log_forwarder",
        "ActivitySubprocess._deserialize_request",
        "ActivitySubprocess._get_target_loggers",
        "ActivitySubprocess._handle_request",
        "ActivitySubprocess._monitor_subprocess",
        "ActivitySubprocess._on_child_started",
        "ActivitySubprocess._on_socket_closed",
        "ActivitySubprocess._register_pipe_readers",
        "ActivitySubprocess.decoder.validate_python",
        "ActivitySubprocess.handle_requests",
        "ActivitySubprocess.final_state",
        "ActivitySubprocess.kill",
        "ActivitySubprocess._send_new_log_fd",
        "ActivitySubprocess._service_subprocess",
        "ActivitySubprocess.send_msg",
        "ProcessTracker",
        "SERVER_TERMINATED",
        "STATES_SENT_DIRECTLY",
        "_fork_main",
        "_log_to_target",
        "_remote_logging_conn",
        "_subprocess_main",
        "forward_to_log",
    ),
    "airflow.sdk.api.client": (
        "Client.task_state_store",
        "TaskInstanceOperations.heartbeat",
        "TaskInstanceOperations.reschedule",
        "TaskInstanceOperations.start",
        "TaskStateStoreOperations.get",
        "TaskStateStoreOperations.set",
    ),
    "airflow.sdk.execution_time.comms": (
        "_RequestFrame",
        "_ResponseFrame",
        "ConnectionResult",
        "DeleteVariable",
        "DeleteXCom",
        "ErrorResponse",
        "GetVariableKeys",
        "PutVariable",
        "RescheduleTask",
        "SentFDs",
        "SetXCom",
        "TriggerDagRun",
        "VariableResult",
    ),
    "airflow.sdk.exceptions": ("ErrorType.API_SERVER_ERROR", "ErrorType.PERMISSION_DENIED"),
    "airflow.sdk.configuration": ("ensure_secrets_loaded",),
    "airflow.sdk._shared.secrets_masker": (
        "SecretsMasker._adaptations",
        "SecretsMasker.add_mask",
        "SecretsMasker.min_length_to_mask",
        "SecretsMasker.replacer",
        "SecretsMasker.should_hide_value_for_key",
        "_secrets_masker",
        "should_hide_value_for_key",
    ),
    "airflow.sdk._shared.secrets_masker.secrets_masker": ("SECRETS_TO_SKIP_MASKING",),
    "airflow.sdk.log": ("upload_to_remote", "mask_secret"),
    "airflow.sdk._shared.logging.structlog": ("reconfigure_logger",),
    "airflow.sdk.observability.metrics.stats_utils": ("get_stats_factory",),
    "airflow.sdk.observability.stats": ("gauge", "incr", "initialize", "timing"),
    "airflow.dag_processing.bundles.base": ("BundleVersionLock",),
    "airflow.dag_processing.bundles.manager": ("DagBundlesManager.get_bundle",),
    "airflow.settings": ("TIMEZONE",),
    "airflow.utils.log.file_task_handler": ("FileTaskHandler",),
}

DAG_PROCESSING: Final[Mapping[str, tuple[str, ...]]] = {
    "airflow.dag_processing.manager": (
        "DagFileInfo.absolute_path",
        "DagFileInfo.normalized_file_path_for_stats",
        "DagFileInfo.presence_key",
        "DagFileProcessorManager._add_files_to_queue",
        "DagFileProcessorManager._collect_results",
        "DagFileProcessorManager._create_process",
        "DagFileProcessorManager._exit_gracefully",
        "DagFileProcessorManager._get_logger_for_dag_file",
        "DagFileProcessorManager._get_observed_filelocs",
        "DagFileProcessorManager._get_team_name",
        "DagFileProcessorManager._kill_timed_out_processors",
        "DagFileProcessorManager._service_processor_sockets",
        "DagFileProcessorManager._start_new_processes",
        "DagFileProcessorManager.before_run",
        "DagFileProcessorManager.client",
        "DagFileProcessorManager.deactivate_stale_dags",
        "DagFileProcessorManager.end",
        "DagFileProcessorManager.handle_parsing_result",
        "DagFileProcessorManager.max_runs_reached",
        "DagFileProcessorManager.persist_parsing_result",
        "DagFileProcessorManager.purge_removed_files_from_queue",
        "DagFileProcessorManager.remove_orphaned_file_stats",
        "DagFileProcessorManager.terminate",
    ),
    "airflow.dag_processing.processor": (
        "DagFileParsingResult",
        "DagFileProcessorProcess._get_target_loggers",
        "DagFileProcessorProcess._handle_request",
        "DagFileProcessorProcess._on_child_started",
        "DagFileProcessorProcess.close",
        "DagFileProcessorProcess.decoder",
        "DagFileProcessorProcess.is_ready",
        "DagFileProcessorProcess.start",
        "_parse_file_entrypoint",
    ),
    "airflow.sdk.execution_time.supervisor": (
        "ProcessTracker",
        "WatchedSubprocess._check_subprocess_exit",
        "WatchedSubprocess._on_socket_closed",
        "WatchedSubprocess._register_pipe_readers",
        "WatchedSubprocess.cleanup_sockets_after_kill",
        "WatchedSubprocess.handle_requests",
        "WatchedSubprocess.kill",
        "WatchedSubprocess.send_msg",
        "_fork_main",
        "_log_to_target",
    ),
    "airflow.sdk.execution_time.comms": ("_RequestFrame", "ErrorResponse", "GetVariableKeys", "MaskSecret"),
    "airflow.sdk.exceptions": ("ErrorType.PERMISSION_DENIED",),
    "airflow.dag_processing.bundles.base": ("BundleVersionLock",),
    "airflow.models.dag": ("DagModel.is_stale", "DagModel.has_import_errors", "DagModel.relative_fileloc"),
    "airflow.models.dagwarning": ("DagWarningType",),
    "airflow.models.db_callback_request": ("DbCallbackRequest",),
    "airflow.models.errors": ("ParseImportError.filename",),
    "airflow.serialization.serialized_objects": ("LazyDeserializedDAG",),
    "airflow.settings": ("TIMEZONE",),
    "airflow.utils.log.file_task_handler": ("FileTaskHandler",),
}

AD_HOC_RUN: Final[Mapping[str, tuple[str, ...]]] = {
    "airflow._shared.module_loading": ("import_string",),
    "airflow._shared.logging": ("configure_logging",),
    "airflow.cli.commands.task_command": ("_get_ti",),
    "airflow.executors.workloads": ("ExecuteTask.make",),
    "airflow.models.dag": ("DagModel.get_current",),
    "airflow.models.serialized_dag": ("SerializedDagModel.get_dag",),
    "airflow.models.trigger": ("Trigger.kwargs", "handle_event_submit"),
    "airflow.sdk._shared.secrets_masker": ("SecretsMasker.enable_log_masking",),
    "airflow.sdk.api.client": ("ServerResponseError",),
    "airflow.sdk.log": ("logging_processors",),
    "airflow.utils.cli": ("get_bagged_dag",),
    "airflow.sdk.execution_time.supervisor": (
        "InProcessTestSupervisor._api_client",
        "InProcessTestSupervisor.run_trigger_in_process",
    ),
}


class AirflowNotSupported(IsolationError):
    """This Airflow is not the one that we know; nothing may run."""


def check_version(version: str) -> None:
    """Check Airflow's version.

    :raises AirflowNotSupported: it is not the minor version that this release is made for.
    """
    if not version.startswith(f"{SUPPORTED_MINOR}."):
        raise AirflowNotSupported(
            f"airflow-isolation works with Airflow {SUPPORTED_MINOR}, this is {version}",
            hint="Install the matching release, or unset [core] task_execution_runtime and scheduler_dag_parsing_runtime",
        )


def check_names(expected: Mapping[str, tuple[str, ...]]) -> None:
    """Import each module and look for each dotted name in it.

    :raises AirflowNotSupported: one is missing.
    """
    for module_name, names in expected.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise _missing(module_name) from error
        _check(module, names)


def check_module(module: ModuleType) -> None:
    """Look for the names of ``ROUTING`` in a module that is just being imported.

    :raises AirflowNotSupported: one is missing.
    """
    _check(module, ROUTING[module.__name__])


def _check(module: ModuleType, names: tuple[str, ...]) -> None:
    for name in names:
        owner: object = module
        for part in name.split("."):
            if not hasattr(owner, part):
                raise _missing(f"{module.__name__}.{name}")
            owner = getattr(owner, part)


def _missing(name: str) -> AirflowNotSupported:
    return AirflowNotSupported(
        f"This Airflow has no {name}, on which airflow-isolation depends",
        hint="No user code is run. Install the airflow-isolation release that is made for this Airflow",
    )
