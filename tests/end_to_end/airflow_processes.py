"""A whole Airflow of our own: its processes, its REST API, its log files."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import httpx
from tests.airflow_home import database_directory, environment_of_its_own
from tests.processes import end_sessions, run_to_end, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DAGS = Path(__file__).parent / "dags"
PROBE = Path(__file__).parent.parent / "probe" / "probe.py"
JWT_SECRET = "end-to-end-jwt-secret-that-no-container-may-see-0123456789abcdef0123456789"
COMPONENTS = ("api-server", "dag-processor", "triggerer --skip-serve-logs")
SCHEDULER = "scheduler --skip-serve-logs"
FINAL_RUN_STATES = {"success", "failed"}
START_SECONDS = 240.0
STOP_SECONDS = 10.0

#: Quick answers rather than low load; nothing here changes what a task does.
QUICK = {
    "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
    "AIRFLOW__CORE__PARALLELISM": "3",
    "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "16",
    "AIRFLOW__API_AUTH__JWT_SECRET": JWT_SECRET,
    "AIRFLOW__API__WORKERS": "1",
    "AIRFLOW__API__HOST": "127.0.0.1",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "3600",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
    "AIRFLOW__WORKERS__MISSING_DAG_RETRY_DELAY": "2",
    "AIRFLOW__WORKERS__MISSING_DAG_RETRIES": "30",
}


@dataclass(frozen=True)
class Task:
    """One task instance, as the API shows it, with the log of its last try."""

    state: str
    try_number: int
    details: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]

    def said(self, text: str) -> bool:
        return any(text in str(event.get("event", "")) for event in self.events)

    @property
    def text(self) -> str:
        """The log, an event a line."""
        return "\n".join(json.dumps(event, ensure_ascii=False) for event in self.events)

    @property
    def containers(self) -> list[str]:
        return [str(event["container"]) for event in self.events if "container" in event and "digest" in event]


@dataclass(frozen=True)
class Run:
    """A DAG run that has ended. Mapped tasks are named ``task[index]``."""

    dag_id: str
    run_id: str
    state: str
    tasks: Mapping[str, Task]
    containers: Sequence[str]
    xcoms: Mapping[str, Any]

    @property
    def states(self) -> dict[str, str]:
        return {name: task.state for name, task in self.tasks.items()}


@dataclass
class Airflow:
    """A running Airflow. ``backend`` is ``stock`` when the flag is empty."""

    backend: str
    home: Path
    environment: Mapping[str, str]
    shared: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    user: Sequence[str] = ()
    triggered: set[tuple[str, str]] = field(default_factory=set)
    _client: httpx.Client | None = None

    # --- processes

    def command(self, *arguments: str) -> list[str]:
        return [*self.user, sys.executable, "-m", "airflow", *arguments]

    def start(self, component: str) -> None:
        """Start one component; its output goes to a file of its first word's name."""
        name, *arguments = component.split()
        with (self.home / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                self.command(name, *arguments),
                env=dict(self.environment),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run an ``airflow`` command to its end."""
        return run_to_end(
            self.command(*arguments), {**self.environment, **environment}, timeout=300, directory=self.home
        )

    def stop(self) -> None:
        """End every process that was started here; what they left in their sessions is killed."""
        if self._client is not None:
            self._client.close()
        for name, process in self.processes.items():
            # A scheduler that is asked politely waits for its tasks; a test that failed may have left one running.
            process.send_signal(signal.SIGTERM if name != "scheduler" else signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS)
        end_sessions(process.pid for process in self.processes.values())

    def assert_alive(self) -> None:
        for name, process in self.processes.items():
            assert process.poll() is None, f"airflow {name} ended: {self.output(name)[-3000:]}"

    def output(self, name: str) -> str:
        """What a component printed."""
        return (self.home / f"{name}.out").read_text(errors="replace")

    # --- REST

    @property
    def client(self) -> httpx.Client:
        if self._client is None:
            base = f"http://127.0.0.1:{self.environment['AIRFLOW__API__PORT']}"
            client = httpx.Client(base_url=base, timeout=60, trust_env=False)
            token = client.get("/auth/token").raise_for_status().json()["access_token"]
            client.headers["Authorization"] = f"Bearer {token}"
            self._client = client
        return self._client

    def call(self, method: str, path: str, **keywords: Any) -> Any:
        for _ in range(5):
            answer = self.client.request(method, f"/api/v2{path}", **keywords)
            # SQLite has one writer, and those who wait for it give up after some seconds.
            if answer.status_code != 500 or "Database error" not in answer.text:
                break
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:2000]}"
        return answer.json() if answer.content else None

    def wait_for_dag(self, dag_id: str, timeout: float = 300) -> None:
        """Until the DAG has been parsed."""
        known = lambda: bool(self.client.get(f"/api/v2/dags/{dag_id}").is_success)  # noqa: E731
        wait_until(known, timeout, f"the DAG {dag_id}; import errors: {self.call('GET', '/importErrors')}")

    def trigger(self, dag_id: str, run_id: str = "once", **conf: Any) -> None:
        """Begin a run."""
        self.call("POST", f"/dags/{dag_id}/dagRuns", json={"dag_run_id": run_id, "logical_date": None, "conf": conf})
        self.triggered.add((dag_id, run_id))

    def run_state(self, dag_id: str, run_id: str = "once") -> str:
        self.assert_alive()
        return str(self.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def task_instances(self, dag_id: str, run_id: str = "once") -> list[dict[str, Any]]:
        found = self.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", params={"limit": 100})
        return list(found["task_instances"])

    def finished(self, dag_id: str, run_id: str = "once", *, timeout: float = 240) -> Run:
        """The run, once it has ended."""
        wait_until(lambda: self.run_state(dag_id, run_id) in FINAL_RUN_STATES, timeout, f"the end of {dag_id} {run_id}")
        tasks, containers = {}, []
        for instance in self.task_instances(dag_id, run_id):
            name, index = instance["task_id"], instance["map_index"]
            tries = self.logs(dag_id, run_id, name, index)
            events = tries[max(tries)] if tries else []
            task = Task(instance["state"] or "none", instance["try_number"], instance, events)
            tasks[name if index < 0 else f"{name}[{index}]"] = task
            containers += [id for log in tries.values() for id in Task("", 0, {}, log).containers]
        return Run(dag_id, run_id, self.run_state(dag_id, run_id), tasks, containers, self.xcoms(dag_id, run_id))

    def xcoms(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """``task[index].key`` to value."""
        prefix = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        found = {}
        for entry in self.call("GET", f"{prefix}/~/xcomEntries", params={"limit": 100})["xcom_entries"]:
            task, index, key = entry["task_id"], entry["map_index"], entry["key"]
            value = self.call("GET", f"{prefix}/{task}/xcomEntries/{key}", params={"map_index": index})["value"]
            found[f"{task if index < 0 else f'{task}[{index}]'}.{key}"] = value
        return found

    def log_file(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, *, attempt: int = 1) -> Path:
        mapped = [f"map_index={map_index}"] if map_index >= 0 else []
        parts = (f"dag_id={dag_id}", f"run_id={run_id}", f"task_id={task_id}", *mapped, f"attempt={attempt}.log")
        return self.home.joinpath("logs", *parts)

    def logs(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[int, list[dict[str, Any]]]:
        """The events of each try."""
        found = {}
        directory = self.log_file(dag_id, run_id, task_id, map_index).parent
        for file in directory.glob("attempt=*.log"):  # beside attempt=1.log.trigger.1.log, of the triggerer
            if not file.stem.rpartition("=")[2].isdecimal():
                continue
            lines = file.read_text(errors="replace").splitlines()
            found[int(file.stem.partition("=")[2])] = [json.loads(line) for line in lines if line]
        return found

    # --- waiting

    def wait_until_quiet(self, timeout: float = 400) -> None:
        """Until every run that was triggered here has ended."""
        for dag_id, run_id in self.triggered:
            wait_until(
                lambda run=(dag_id, run_id): self.run_state(*run) in FINAL_RUN_STATES,  # type: ignore[misc]
                timeout,
                f"the end of {dag_id} {run_id}",
            )

    def wait_for_file(self, name: str, timeout: float = 60) -> Path:
        """A file that a task writes to the shared volume."""
        wait_until((self.shared / name).exists, timeout, f"the file {name} of a task")
        return self.shared / name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def copy_dags(target: Path, words: Mapping[str, str], source: Path = DAGS) -> None:
    """Fill ``$name`` in DAG files and their YAML: image names and paths differ from run to run."""
    target.mkdir(parents=True)
    for file in sorted(source.glob("*.*")):
        (target / file.name).write_text(Template(file.read_text()).safe_substitute(words))
    (target / "probe.py").write_text(PROBE.read_text())
    (target / ".airflowignore").write_text("probe.py\n")


@contextmanager
def running_airflow(
    backend: str,
    home: Path,
    *,
    shared: Path,
    options: Mapping[str, str],
    user: Sequence[str] = (),
    edge: bool = False,
) -> Iterator[Airflow]:
    """``airflow db migrate``, then each component but the scheduler; all of them are gone when the block ends.

    ``airflow.start(SCHEDULER)`` is the caller's: runs that are triggered before don't fight with it for SQLite.

    :param options: environment variables; nothing of ours is inherited.
    :param user: a command that runs the rest of its command line as somebody else.
    :param edge: the API server also serves edge workers.
    """
    port = free_port()
    options = {
        **QUICK,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        **({"AIRFLOW__EDGE__API_URL": f"http://127.0.0.1:{port}/edge_worker/v1/rpcapi"} if edge else {}),
        **options,
    }
    with ExitStack() as stack:
        database = stack.enter_context(database_directory(home)) / "metadata-of-the-test.db"
        environment = {**environment_of_its_own(home, database), **options}
        airflow = Airflow(backend, home, environment, shared, user=user)
        migration = airflow.run("db", "migrate")
        assert migration.returncode == 0, migration.stderr
        stack.callback(airflow.stop)
        for component in COMPONENTS:
            airflow.start(component)
        wait_until(lambda: _answers(airflow), START_SECONDS, "the API server")
        yield airflow


def _answers(airflow: Airflow) -> bool:
    airflow.assert_alive()
    try:
        # The first request for the execution API has it built, seconds of CPU time during which the API server answers
        # nobody and whoever is in the middle of a transaction keeps SQLite locked: better now than with the first task.
        return bool(airflow.client.get("/execution/health", timeout=START_SECONDS).is_success)
    except httpx.HTTPError:
        return False
