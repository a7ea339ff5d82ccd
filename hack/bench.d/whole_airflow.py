"""An Airflow of scheduler (with the LocalExecutor) and API server, several of which can stand ready side by side.

Those that are not measured are stopped (SIGSTOP) and cost no CPU time. DAGs are already in the database, so there is no
DAG processor, and nothing is deferred, so there is no triggerer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import family
import httpx
from metadata import Database
from private_daemon import Refused
from task_figures import TaskTimes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

START_SECONDS = 300.0
COMMAND_SECONDS = 300
POLL_SECONDS = 0.1
#: Stock Airflow holds a slot for 5 s after one task in four; a task that failed before it began never had one.
RELEASE_SECONDS = 30.0
ENDINGS = 3
#: The first line of every such log.
IN_A_CONTAINER = "Task runs in a container"
FINAL = {"success", "failed"}
JWT_SECRET = "bench-jwt-secret-0123456789abcdef0123456789abcdef0123456789abcdef"
FERNET_KEY = "ZmVybmV0LWtleS1mZXJuZXQta2V5LWZlcm5ldC1rZXk="

#: Read by the scheduler's Python at its start: notes when a worker of the executor is free again, with the task's id.
NOTE_RELEASES = """\
import os, time
import wrapt


def note(module):
    def noted(wrapped, instance, args, kwargs):
        workload = args[0] if args else kwargs["workload"]
        try:
            return wrapped(*args, **kwargs)
        finally:
            file = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(file, f"{{workload.ti.id}} {{time.time():.6f}}\\n".encode())
            os.close(file)

    wrapt.wrap_function_wrapper(module, "BaseExecutor.run_workload", noted)


wrapt.register_post_import_hook(note, "airflow.executors.base_executor")
"""

#: What differs from Airflow's defaults for all alike: what one host with one API server needs, and no extras.
SETTINGS = {
    "AIRFLOW__API__HOST": "127.0.0.1",
    "AIRFLOW__API__WORKERS": "1",
    "AIRFLOW__API_AUTH__JWT_SECRET": JWT_SECRET,
    "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
    "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
    "AIRFLOW__CORE__FERNET_KEY": FERNET_KEY,
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "1000",
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
    "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    # With many tasks on few cores the API server answers late; that is no reason to fail one.
    "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "120",
}


@dataclass(frozen=True)
class Run:
    """The tasks of a run that has ended. ``started``: how many containers of ours were started in which way."""

    tasks: tuple[TaskTimes, ...]
    started: Counter[str]


def fill(url: str, home: Path, settings: Mapping[str, str]) -> None:
    """Make Airflow's tables in an empty database and read the DAG files into it.

    :raises Refused: one of the commands failed; the end of what it printed is in the message.
    """
    home.mkdir()
    environment = _environment(home, url, settings)
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        done = subprocess.run(
            ["airflow", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise Refused(f"airflow {' '.join(command)} failed:\n{done.stdout[-3000:]}")


class Airflow:
    """One that is started when it is made, and gone after ``close``."""

    def __init__(self, home: Path, url: str, port: int, settings: Mapping[str, str]) -> None:
        home.mkdir(mode=0o755)
        self._home = home
        self._database = Database(url)
        self._notes = home / "releases"
        self._notes.touch()
        self._noted = 0
        base = f"http://127.0.0.1:{port}"
        environment = _environment(home, url, settings) | {
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__BASE_URL": base,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{base}/execution/",
        }
        (home / "python").mkdir()
        (home / "python" / "sitecustomize.py").write_text(NOTE_RELEASES.format(path=str(self._notes)))
        search = os.pathsep.join(filter(None, (str(home / "python"), environment.get("PYTHONPATH"))))
        self._client = httpx.Client(base_url=base, timeout=60, trust_env=False)
        self._processes = {
            "api-server": self._start("api-server", environment),
            "scheduler": self._start("scheduler", {**environment, "PYTHONPATH": search}, "--skip-serve-logs"),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> set[int]:
        """Of the components; everything else descends from them."""
        return {process.pid for process in self._processes.values()}

    def _start(self, component: str, environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[bytes]:
        with self._log(component).open("wb") as log:
            return subprocess.Popen(
                ["airflow", component, *arguments],
                env=dict(environment),
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the benchmark, which then ends them.
                start_new_session=True,
            )

    def _log(self, component: str) -> Path:
        return self._home / f"{component}.log"

    def wait_until_up(self) -> None:
        """:raises Refused: a component ended, or it took too long; the end of its log is in the message."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check_alive()
            with suppress(httpx.HTTPError):
                # The execution API is built with its first request: better now than with the first task.
                health = self._client.get("/api/v2/monitor/health").json()
                if health["scheduler"]["status"] == "healthy" and self._client.get("/execution/health").is_success:
                    token = self._client.get("/auth/token").raise_for_status().json()["access_token"]
                    self._client.headers["Authorization"] = f"Bearer {token}"
                    return
            time.sleep(0.5)
        raise Refused(f"Airflow did not come up in {START_SECONDS:.0f} s: {self._end_of_logs()}")

    def run(self, dag_id: str, tasks: int, *, seconds: float) -> Run:
        """Run a DAG of so many tasks to its end, however they end.

        :raises Refused: it did not end in time, or Airflow did.
        """
        run_id = self._trigger(dag_id)
        self._wait(dag_id, run_id, tasks, seconds=seconds)
        logs = self._home.glob(f"logs/dag_id={dag_id}/run_id={run_id}/**/attempt=*.log")
        return Run(self._times(dag_id, run_id), Counter(way for log in logs if (way := start_mode(log.read_text()))))

    def _trigger(self, dag_id: str) -> str:
        run_id = f"bench-{uuid.uuid4().hex[:12]}"
        self._noted = len(self._releases())
        answer = self._client.post(f"/api/v2/dags/{dag_id}/dagRuns", json={"dag_run_id": run_id, "logical_date": None})
        if not answer.is_success:
            raise Refused(f"{dag_id} can't be triggered: {answer.status_code} {answer.text[:1000]}")
        return run_id

    def _wait(self, dag_id: str, run_id: str, tasks: int, *, seconds: float) -> None:
        """Until the run has ended and its executor slots are free."""
        deadline = time.monotonic() + seconds
        turn = 0
        ended = float("inf")
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            turn += 1
            free = len(self._releases()) - self._noted >= tasks
            # The notes tell when it is worth to ask the database; a run can also end without them, or long before them.
            if free or turn % 50 == 0:
                self._check_alive()
                if self._database.run_state(dag_id, run_id) in FINAL:
                    ended = min(ended, time.monotonic())
            if (free and ended < deadline) or time.monotonic() - ended > RELEASE_SECONDS:
                return
        raise Refused(f"{dag_id} has not ended in {seconds:.0f} s: {self._end_of_logs()}")

    def _times(self, dag_id: str, run_id: str) -> tuple[TaskTimes, ...]:
        released = self._releases()
        return tuple(
            TaskTimes(
                state=instance["state"],
                queued=instance["queued"] or 0.0,
                started=instance["started"],
                ended=instance["ended"],
                released=released.get(instance["id"]),
            )
            for instance in self._database.task_instances(dag_id, run_id)
        )

    def _releases(self) -> dict[str, float]:
        lines = (line.split() for line in self._notes.read_text().splitlines())
        return {id: float(moment) for id, moment in lines}

    def _check_alive(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise Refused(f"airflow {name} ended with {process.returncode}: {self._end_of_logs()}")

    def _end_of_logs(self) -> str:
        ends = (f"--- {name}\n{self._log(name).read_text(errors='replace')[-2500:]}" for name in self._processes)
        return "\n".join(("", *ends))

    def first_failure(self) -> str:
        """The end of the log of a task that failed, for a reader who asks why."""
        for log in sorted(self._home.glob("logs/**/attempt=*.log")):
            said = log.read_text(errors="replace")
            if '"level":"error"' in said or '"level": "error"' in said:
                return said[-2000:]
        return ""

    def freeze(self) -> None:
        """May be called twice."""
        family.send(self._tree(), signal.SIGSTOP)

    def thaw(self) -> None:
        """May be called twice."""
        family.send(self._tree(), signal.SIGCONT)

    def _tree(self) -> list[int]:
        return [pid for root in self.pids for pid in family.tree(root)]

    def close(self) -> None:
        """Kill everything that descends from it. May be called twice."""
        self._client.close()
        # Again, because a process that is about to die may just have made another.
        for _ in range(ENDINGS):
            family.end(self._tree())
        for process in self._processes.values():
            process.wait(family.END_SECONDS)


def start_mode(log: str) -> str:
    """How the container of a task was started, as the coordinator notes in its log; empty when it had none of ours."""
    events = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
    return next((str(event.get("start_mode", "")) for event in events if event.get("event") == IN_A_CONTAINER), "")


def _environment(home: Path, url: str, settings: Mapping[str, str]) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW__", "AIRFLOW_HOME"))
    }
    ours = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": url,
        # As an installed package is: compiled. The checkout is kept free of it.
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(Path(os.environ.get("AIRFLOW_ISOLATION_CACHE", home.parent), "compiled")),
    }
    return {**inherited, **ours, **SETTINGS, **settings}
