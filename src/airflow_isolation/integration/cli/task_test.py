"""``airflow containers test``: one task in its container, supervised from here.

What the api-server does for a task is done in this process. The DAG run is made up for the occasion and removed
afterwards, unless an existing one is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from airflow_isolation.integration.cli.backends import choose_one
from airflow_isolation.integration.cli.outcome import FAILED, OK, UsageError, command, say
from airflow_isolation.integration.connection import connect

if TYPE_CHECKING:
    from argparse import Namespace

_SUCCESS: Final = frozenset({"success", "skipped"})


@command
def test_task(arguments: Namespace) -> int:
    """0 when the task succeeded, 1 when not."""
    if arguments.run_id and arguments.logical_date_or_run_id:
        raise UsageError("A run is named twice", hint="Give a logical date or --run-id, not both")
    connection = choose_one(arguments)
    with connect(connection) as runtime:
        # The coordinator takes an unreachable daemon for passing trouble; here somebody waits for the reason.
        runtime.info()

    from airflow_isolation.integration.coordinator import ContainerCoordinator
    from airflow_isolation.integration.seams import ad_hoc_run

    coordinator = ContainerCoordinator(backend=connection.backend)
    with ad_hoc_run.prepared(
        arguments.dag_id,
        arguments.task_id,
        map_index=arguments.map_index,
        run_id=arguments.run_id,
        logical_date_or_run_id=arguments.logical_date_or_run_id,
    ) as instance:
        state = ad_hoc_run.run(coordinator, instance)
    if state in _SUCCESS:
        return OK
    say(f"The task {arguments.task_id} of the DAG {arguments.dag_id} ended as {state}.")
    return FAILED
