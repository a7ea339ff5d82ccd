"""What user code may ask Airflow for: the administrator's policy decides, and a task may write only its own XComs.

Airflow's API server gives every task all connections and Variables, and lets it write XComs of any other task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time import comms

from airflow_isolation.settings.declarations import POLICY_SECTION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_isolation.settings.effective import Permissions


def refused_secret(message: Any, permissions: Permissions, file: str) -> str:
    """Why a DAG file (``BUNDLE/PATH``) may not read or change a connection or Variable; empty when it may."""
    match message:
        case comms.GetConnection() if not permissions.may_read_connection(file, message.conn_id):
            return _not_given("allowed_connections", message.conn_id, file)
        case comms.GetVariable() | comms.PutVariable() | comms.DeleteVariable() if not permissions.may_use_variable(
            file, message.key
        ):
            return _not_given("allowed_variables", message.key, file)
        case comms.GetVariableKeys() if permissions.allowed_variables:
            return f"[{POLICY_SECTION}] allowed_variables is set, so {file} may not list the keys of all"
    return ""


def refused_to_task(message: Any, permissions: Permissions, file: str, task: Any) -> str:
    """Why a request of a task is refused; empty when it is allowed.

    :param file: its DAG file as ``BUNDLE/PATH``.
    :param task: its task instance.
    """
    if refusal := refused_secret(message, permissions, file):
        return refusal
    ti_id = getattr(message, "ti_id", None)
    if ti_id is not None and ti_id != task.id:
        return f"A task may not ask for the task instance {ti_id}, which is not its own"
    if isinstance(message, comms.SetXCom | comms.DeleteXCom) and _place(message) != _place(task):
        return f"A task may change its own XComs only, and {message.key!r} is one of {_words(message)}"
    if refusal := _refused_elsewhere(message, permissions, file):
        return refusal
    dag_id = getattr(message, "dag_id", None)
    own = dag_id == task.dag_id and not isinstance(message, comms.TriggerDagRun)
    if dag_id is not None and not own and not permissions.may_trigger(file, dag_id):
        return _not_given("allowed_triggering", dag_id, file)
    return ""


def _refused_elsewhere(message: Any, permissions: Permissions, file: str) -> str:
    """What a state of the task would have Airflow do outside of its container."""
    match message:
        case comms.DeferTask() if not permissions.may_name(file, message.classpath):
            return _not_given("allowed_triggers", message.classpath, file)
        case comms.SucceedTask() if permissions.allowed_assets:
            told = next((one for one in _assets(message) if not permissions.may_update(file, one)), None)
            if told is not None:
                return _not_given("allowed_assets", told, file)
    return ""


def _assets(message: comms.SucceedTask) -> Iterator[str]:
    """The names and URIs of the assets that a task says it has updated; also those behind an alias, which are made anew."""
    for outlet in message.task_outlets or ():
        # An alias is none by itself. Which assets it stands for is in the events.
        if outlet.type != "AssetAlias":
            yield from (told for told in (outlet.name, outlet.uri) if told)
    for event in message.outlet_events or ():
        key = event.get("dest_asset_key")
        yield from (str(told) for told in (key.values() if isinstance(key, dict) else (key,)) if told)


def denial(refusal: str) -> comms.ErrorResponse:
    """The answer to a refused request. In the user's code it becomes an exception with these words."""
    return comms.ErrorResponse(error=ErrorType.PERMISSION_DENIED, detail={"status_code": 403, "message": refusal})


def _not_given(key: str, id: str, file: str) -> str:
    return f"[{POLICY_SECTION}] {key} does not give {id!r} to {file}"


def _place(of: Any) -> tuple[str, str, str, int]:
    return (of.dag_id, of.run_id, of.task_id, -1 if of.map_index is None else of.map_index)


def _words(message: Any) -> str:
    dag_id, run_id, task_id, map_index = _place(message)
    return f"the task {task_id}{f'[{map_index}]' if map_index >= 0 else ''} of the run {run_id} of {dag_id}"
