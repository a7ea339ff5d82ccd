"""All of Airflow's that is not public API and that we touch, and nothing else touches it (a test holds that).

checks         that what is expected is there, by name; otherwise the component stops with a sentence
routing        which coordinator runs a task; what a workload carries over the wire
supervision    Airflow's supervisor, with its child in a container
configuration  what Airflow calls sensitive, what of its options is of this host, and who holds a bundle's version
dag_processing Airflow's DAG processor, with every file parsed in a container
parse_process  the supervisor of one file's parse
parse_results  what is stored of a parse
stock_parsing  stock's ways to parse, closed
stored_dags    DAGs as the metadata database has them
console        Airflow's logging, on a terminal
ad_hoc_run     one task without scheduler and api-server, for `airflow containers test`

Written against Airflow 3.3.2. What a name is for stands beside its use.
"""
