"""An Airflow of our own: `airflow standalone` on SQLite, in one directory and one session of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_fixed

if TYPE_CHECKING:
    from collections.abc import Mapping

START_SECONDS = 300.0
STOP_SECONDS = 20.0
CALL_SECONDS = 30.0
CALLS = 4


@dataclass(frozen=True)
class Standalone:
    """A running Airflow. ``session`` is the id of its processes' session, which is the pid of the first."""

    home: Path
    session: int
    url: str

    @property
    def log(self) -> Path:
        return self.home / "standalone.log"

    def running(self) -> bool:
        """Not reaped is not running: the first process is our child."""
        with suppress(ChildProcessError):
            os.waitpid(self.session, os.WNOHANG)
        return bool(processes_of(self.session))


class NotStarted(Exception):
    """Airflow did not come up."""


def start(home: Path, dags: Path, settings: Mapping[str, str]) -> Standalone:
    """Begin to start it over these DAGs; ``wait_until_up`` waits for it."""
    home.mkdir()
    # Copied, because user and group of a checkout, and the way to it, may be closed to the containers' users.
    shutil.copytree(dags, home / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (home / "dags", *(home / "dags").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    api, task_logs, trigger_logs = free_ports(3)
    url = f"http://127.0.0.1:{api}"
    ours = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(api),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(trigger_logs),
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(task_logs),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        # A machine that is busy with something else answers late; that is no reason to fail a task.
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
    with (home / "standalone.log").open("wb") as log:
        process = subprocess.Popen(
            ["airflow", "standalone"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home,
            env={**inherited, **ours, **settings},
            start_new_session=True,
        )
    return Standalone(home=home, session=process.pid, url=url)


def wait_until_up(airflow: Standalone) -> Api:
    """:raises NotStarted: it ended, or took too long; the end of its log is in the message."""
    api = Api(airflow.url)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and airflow.running():
        with suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            health = api.get("/api/v2/monitor/health")
            if all(health[name]["status"] == "healthy" for name in ("metadatabase", "scheduler", "dag_processor")):
                api.log_in()
                return api
        time.sleep(0.5)
    what = f"did not come up in {START_SECONDS:.0f} seconds" if airflow.running() else "ended while it started"
    raise NotStarted(f"Airflow {what}. The end of its log:\n{airflow.log.read_text(errors='replace')[-3000:]}")


def stop(session: int) -> None:
    """End all of its processes. Gone already is success."""
    # SIGINT, because on SIGTERM `airflow standalone` leaves its components running.
    send(session, signal.SIGINT, processes_of(session) & {session})
    if not _ended(session, STOP_SECONDS):
        send(session, signal.SIGKILL, processes_of(session))
        _ended(session, STOP_SECONDS)


def send(session: int, number: signal.Signals, pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                os.kill(pid, number)


def _ended(session: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while processes_of(session):
        if time.monotonic() > deadline:
            return False
        with suppress(ChildProcessError):
            os.waitpid(session, os.WNOHANG)
        time.sleep(0.05)
    return True


def processes_of(session: int) -> set[int]:
    """The living processes of a session."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return {pid for pid in pids if (fields := _living(pid)) and int(fields[3]) == session}


def identity(pid: int) -> tuple[int, int] | None:
    """(pid, start time in clock ticks since boot) of a living process."""
    fields = _living(pid)
    return (pid, int(fields[19])) if fields else None


def _living(pid: int) -> list[str] | None:
    """Fields 3 (state) and on of /proc/PID/stat (proc(5)): 6 is the session, 22 the start time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Api:
    """Airflow's public API."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._token = ""

    def log_in(self) -> None:
        # Without a user: every visitor is an admin here.
        self._token = self.get("/auth/token")["access_token"]

    @retry(
        retry=retry_if_exception_type((TimeoutError, ConnectionError, urllib.error.URLError)),
        stop=stop_after_attempt(CALLS),
        wait=wait_fixed(1),
        reraise=True,
    )
    def get(self, path: str) -> Any:
        """On a busy machine an answer may take its time, so a question is asked again."""
        return self._ask(path, None)

    def post(self, path: str, body: Any) -> Any:
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self._url + path, data=body, headers=headers)
        # Not through a proxy of the environment: this is our own loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=CALL_SECONDS) as answer:
            return json.load(answer)
