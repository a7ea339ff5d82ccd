"""DAG files parsed in containers: what is asked for, what is believed, what is said.

request       a DAG file → what its container must be
links         symbolic links that lead out of what a container has
imports       a DAG file → the modules of Airflow that it imports
result        what a parse reported → what of it is believed
verdict       a parse that gave no result → the import error that says why
housekeeping  what earlier DAG processors left behind

The loop that uses them is ``seams/dag_processing.py``.
"""
