"""``airflow containers test``: runs one task in its container, supervised by this process.

This process also does the api-server's part. It makes a DAG run and removes it afterwards, unless an existing run is
named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from airflow_isolation.integration.cli.backends import choose_one
from airflow_isolation.integration.cli.images import have_image
from airflow_isolation.integration.cli.outcome import FAILED, OK, UsageError, command, say
from airflow_isolation.integration.cli.start_mode import start_row
from airflow_isolation.integration.seams import ad_hoc_run, stored_dags
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.hook import image_hook
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from argparse import Namespace

    from airflow_isolation.settings.effective import ConnectionSettings, EffectiveSettings

_SUCCESS: Final = frozenset({"success", "skipped"})


@command
def test_task(arguments: Namespace) -> int:
    """Run one task. Returns 0 when it succeeded, else 1."""
    if arguments.run_id and arguments.logical_date_or_run_id:
        raise UsageError("A run is named twice", hint="Give a logical date or --run-id, not both")
    connection = choose_one(arguments)
    ad_hoc_run.make_known(arguments.dag_id, arguments.task_id)
    stored = stored_dags.locate(arguments.dag_id, arguments.task_id)
    settings = _settings(connection, stored, arguments.dag_id, arguments.task_id)
    have_image(settings)
    start = start_row(settings, stored.bundle_path / stored.relative_path, stored.bundle_path)
    say(f"Start mode: {start['value']}, {start['origin']}")

    from airflow_isolation.integration.coordinator import ContainerCoordinator

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


def _settings(
    connection: ConnectionSettings, stored: stored_dags.StoredDag, dag_id: str, task_id: str
) -> EffectiveSettings:
    return resolve(
        "task",
        connection.backend,
        configuration=airflow_configuration(),
        dag_file=stored.bundle_path / stored.relative_path,
        bundle_path=stored.bundle_path,
        dag_id=dag_id,
        task_id=task_id,
        executor_config=stored.executor_config,
        hook=image_hook(),
    )
