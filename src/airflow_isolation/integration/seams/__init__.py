"""The only package that uses names of Airflow that are not public API (a test holds that).

checks         checks that the expected names are there; otherwise the component stops with a sentence
routing        which coordinator runs a task; what a workload carries over the wire
supervision    Airflow's supervisor, with its child in a container
configuration  Airflow's sensitive options, the options that hold for this host only, and the lock on a bundle's version
dag_processing Airflow's DAG processor, with every file parsed in a container
parse_process  the supervisor of one file's parse
parse_results  what is stored of a parse
stock_parsing  closes stock Airflow's ways to parse DAG files on the host
stored_dags    DAGs as the metadata database has them
console        Airflow's logging, on a terminal
ad_hoc_run     one task without scheduler and api-server, for `airflow containers test`

Written against Airflow 3.3.2. Comments beside each use say what a name is for.
"""
