from airflow.sdk import dag, task


@dag(schedule=None)
def yaml_unknown_key() -> None:
    @task
    def never() -> None:
        print("user code ran")

    never()


yaml_unknown_key()
