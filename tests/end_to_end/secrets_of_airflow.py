"""What a worker knows and a container may not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.end_to_end.airflow_processes import Airflow


def secrets_of(airflow: Airflow) -> list[str]:
    """What no container may see."""
    return [
        airflow.environment["AIRFLOW__CORE__FERNET_KEY"],
        airflow.environment["AIRFLOW__API_AUTH__JWT_SECRET"],
        airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"],
        "metadata-of-the-test",
        "secret-of-the-worker",
        "AIRFLOW_CONN_",
        "AIRFLOW_VAR_",
        "eyJhbGciOi",  # how every JWT begins
    ]
