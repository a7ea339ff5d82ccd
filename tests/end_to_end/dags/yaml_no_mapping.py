from airflow.sdk import dag, task


@dag(schedule=None)
def yaml_no_mapping() -> None:
    @task
    def never() -> None:
        print("user code ran")

    never()


yaml_no_mapping()
