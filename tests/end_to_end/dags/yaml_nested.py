from airflow.sdk import dag, task


@dag(schedule=None)
def yaml_nested() -> None:
    @task
    def never() -> None:
        print("user code ran")

    never()


yaml_nested()
