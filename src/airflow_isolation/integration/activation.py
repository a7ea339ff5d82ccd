"""Loaded by Airflow in every process through the ``airflow.policy`` entry point."""
