"""What Airflow calls of this project: activation, coordinator, DAG processor, provider info and command line."""
