"""Parts of the DAG processor that parses files in containers.

request       a DAG file → the container that it needs
links         symbolic links that lead to files that the container does not have
imports       a DAG file → the modules of Airflow that it imports
result        a parse's report → the part that can be believed
verdict       a parse that gave no result → the import error that says why
housekeeping  what earlier DAG processors left behind

The loop that uses them is ``seams/dag_processing.py``.
"""
