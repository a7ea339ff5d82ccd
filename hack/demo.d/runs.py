"""Runs of DAGs: start them, watch them, and tell what became of every try of every task, and in which container it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from standalone import Api

STARTED = "Task runs in a container"


@dataclass(frozen=True)
class Try:
    """One try of one task. ``container`` and ``image`` are empty when it ran in none."""

    dag: str
    task: str
    number: int
    state: str
    duration: float
    container: str
    image: str
    events: tuple[str, ...]


def known_dags(api: Api) -> set[str]:
    return {dag["dag_id"] for dag in api.get("/api/v2/dags?limit=100")["dags"]}


def trigger(api: Api, dag: str) -> None:
    api.post(f"/api/v2/dags/{quote(dag)}/dagRuns", {"logical_date": None})


def dag_states(api: Api) -> dict[str, str]:
    """DAG → state of its run; a DAG without a run yet is absent."""
    runs = api.get("/api/v2/dags/~/dagRuns?limit=100")["dag_runs"]
    return {run["dag_id"]: run["state"] for run in runs}


def task_states(api: Api) -> list[str]:
    """The states of all tasks; ``none`` for one that is not scheduled yet."""
    found = api.get("/api/v2/dags/~/dagRuns/~/taskInstances?limit=100")["task_instances"]
    return [task["state"] or "none" for task in found]


def import_errors(api: Api) -> list[str]:
    found = api.get("/api/v2/importErrors?limit=100")["import_errors"]
    return [f"{error['filename']}: {error['stack_trace']}" for error in found]


def all_tries(api: Api, logs: Path) -> list[Try]:
    """Every try: DAGs by name, their tasks in the order in which they began, then mapped instances and tries."""
    tasks = api.get("/api/v2/dags/~/dagRuns/~/taskInstances?limit=100")["task_instances"]
    found = [each for task in tasks for each in _tries_of(api, task)]
    began: dict[tuple[str, str], str] = {}
    for each in sorted(found, key=lambda each: each["start_date"] or "~"):
        began.setdefault((each["dag_id"], each["task_id"]), each["start_date"] or "~")
    found.sort(
        key=lambda each: (
            each["dag_id"],
            began[each["dag_id"], each["task_id"]],
            each["map_index"],
            each["try_number"],
        )
    )
    return [_read(each, logs) for each in found]


def _tries_of(api: Api, task: dict[str, Any]) -> list[dict[str, Any]]:
    path = f"/api/v2/dags/{quote(task['dag_id'])}/dagRuns/{quote(task['dag_run_id'])}/taskInstances/{quote(task['task_id'])}"
    index = f"/{task['map_index']}" if task["map_index"] >= 0 else ""
    tries: list[dict[str, Any]] = api.get(f"{path}{index}/tries")["task_instances"]
    return tries


def _read(given: dict[str, Any], logs: Path) -> Try:
    index = given["map_index"]
    directory = logs / f"dag_id={given['dag_id']}" / f"run_id={given['dag_run_id']}" / f"task_id={given['task_id']}"
    if index >= 0:
        directory /= f"map_index={index}"
    events = tuple(_events(directory / f"attempt={given['try_number']}.log"))
    started = next((event for event in events if event.get("event") == STARTED), {})
    return Try(
        dag=given["dag_id"],
        task=f"{given['task_id']}[{index}]" if index >= 0 else given["task_id"],
        number=given["try_number"],
        state=given["state"] or "none",
        duration=given["duration"] or 0.0,
        container=str(started.get("container", "")),
        image=str(started.get("image", "")),
        events=tuple(_as_text(event) for event in events),
    )


def _events(log: Path) -> Iterator[dict[str, Any]]:
    """Airflow writes a task's log as one JSON object a line."""
    if not log.exists():
        return
    for line in log.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            event = {"event": line}
        if isinstance(event, dict):
            yield event


def _as_text(event: dict[str, Any]) -> str:
    rest = {key: value for key, value in event.items() if key in {"error", "error_detail", "exit_code", "container"}}
    return f"{event.get('level', ''):8}{event.get('event', '')}{f' {rest}' if rest else ''}"
