from airflow.sdk import dag, task


@dag(schedule=None)
def yaml_bad_quantity() -> None:
    @task
    def never() -> None:
        print("user code ran")

    never()


yaml_bad_quantity()
