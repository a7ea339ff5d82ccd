"""Containers that can't be had: each task's log says why, and no user code runs."""

from __future__ import annotations

from typing import Any

from airflow.sdk import dag, task

#: Task ids, and what they ask for.
ASKED: dict[str, dict[str, Any]] = {
    "absent_image": {"image": "localhost/nobody/has-this:1", "image_pull_policy": "never"},
    "no_python": {"image": "$no_python"},
    "no_airflow": {"image": "$no_airflow"},
    "other_minor": {"image": "$other_minor"},
    "no_such_interpreter": {"python": "/opt/none/bin/python"},
    "not_an_interpreter": {"python": "/bin/true"},
    "mute_interpreter": {"python": "/usr/bin/yes", "start_timeout": 3},
    "missing_source": {"volumes": ["$shared/missing:/data"]},
    "symlink_source": {"volumes": ["$shared/link:/data"]},
    "forbidden_source": {"volumes": ["/etc:/data"]},
    "unknown_user": {"run_as_user": "nobody-of-that-name"},
    "root": {"run_as_user": "0"},
    "unknown_key": {"imag": "x"},
    "bad_quantity": {"resources": {"memory": "much"}},
    "wrong_type": {"volumes": {"a": "b"}},
    "forbidden_network": {"network": "sales"},
    "too_much_memory": {"resources": {"memory": "100Gi"}},
    "bad_image": {"image": "Not An Image"},
    "hook_fails": {"image": "breaks/the-hook:1"},
}


@dag(schedule=None)
def refused() -> None:
    for name, asked in ASKED.items():

        @task(task_id=name, executor_config={"container": asked})
        def never() -> None:
            print("user code ran")

        never()


refused()
