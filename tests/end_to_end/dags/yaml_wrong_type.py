from airflow.sdk import dag, task


@dag(schedule=None)
def yaml_wrong_type() -> None:
    @task
    def never() -> None:
        print("user code ran")

    never()


yaml_wrong_type()
