"""Run every Airflow task and every DAG parse in a container of its own, on containerd or Docker."""

__version__ = "0.1.0"
