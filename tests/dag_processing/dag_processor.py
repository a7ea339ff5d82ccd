"""A real `airflow dag-processor` on a SQLite database of its own, the files that it parses, and what it stores."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from tests.airflow_home import database_directory, environment_of_its_own
from tests.processes import end_sessions, run_to_end, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

HEALTHY = """
from airflow.sdk import DAG, task

with DAG({dag_id!r}, schedule=None):

    @task
    def works(): ...

    works()
"""

#: A file is noticed within a second of its being written, and parsed again only when it changes.
QUICK = {
    "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "60",
    "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "0",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "0",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
    "AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": "6",
    "AIRFLOW__DAG_PROCESSOR__STALE_DAG_THRESHOLD": "5",
    "AIRFLOW__SCHEDULER__PARSING_CLEANUP_INTERVAL": "2",
}


@dataclass
class Database:
    """The metadata database, as the API server would read it."""

    path: Path

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, values)]

    def write(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            connection.execute(statement, values)

    def dag(self, dag_id: str) -> dict[str, Any] | None:
        found = self.rows("select * from dag where dag_id = ?", dag_id)
        return found[0] if found else None

    def serialized(self) -> dict[str, dict[str, Any]]:
        """dag_id to its latest serialized form, with ``dag_hash`` beside ``data``."""
        rows = self.rows("select dag_id, dag_hash, data from serialized_dag order by created_at")
        return {row["dag_id"]: {**row, "data": json.loads(row["data"])} for row in rows}

    def import_errors(self) -> dict[str, str]:
        return {
            row["filename"]: row["stacktrace"] for row in self.rows("select filename, stacktrace from import_error")
        }


@dataclass
class DagProcessor:
    """A dag-processor and its bundle. ``write`` and ``remove`` change the bundle; the rest tells what came of it."""

    home: Path
    environment: Mapping[str, str]
    database: Database
    process: subprocess.Popen[bytes] | None = None
    number: int = field(default=0)

    @property
    def dags(self) -> Path:
        return self.home / "dags"

    def start(self, *arguments: str, **environment: str) -> None:
        with (self.home / "dag-processor.out").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "airflow", "dag-processor", *arguments],
                env={**self.environment, **environment},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run an ``airflow`` command to its end."""
        return run_to_end(
            [sys.executable, "-m", "airflow", *arguments],
            {**self.environment, **environment},
            timeout=240,
            directory=self.home,
        )

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            end_sessions([self.process.pid])
            self.process.wait(10)

    @property
    def output(self) -> str:
        return (self.home / "dag-processor.out").read_text(errors="replace")

    def assert_alive(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, self.output[-5000:]

    # --- the bundle

    def write(self, name: str, text: str | bytes, *, bundle: str = "dags") -> Path:
        """At once, as tools that deploy do: a file that is read half is a syntax error."""
        path = self.home / bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(text if isinstance(text, bytes) else text.encode())
        new.replace(path)
        return path

    def write_healthy(self) -> str:
        """Another healthy file; its DAG's id."""
        self.number += 1
        dag_id = f"healthy_{self.number}"
        self.write(f"{dag_id}.py", HEALTHY.format(dag_id=dag_id))
        return dag_id

    def write_yaml(self, name: str, settings: str, text: str) -> None:
        """A DAG file with DAG metadata beside it, which is there first."""
        self.write(f"{name}.yaml", settings)
        self.write(f"{name}.py", text)

    def touch(self, name: str) -> None:
        """Have a file parsed again."""
        os.utime(self.dags / name)

    def python(self, program: str, *arguments: str, flag: str = "") -> str:
        """Run a program in this Airflow."""
        environment = {**self.environment, "AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": flag}
        command = [sys.executable, "-c", program, *arguments]
        done = run_to_end(command, environment, timeout=120, directory=self.home)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # --- what came of it

    def wait(self, condition: Any, what: str, timeout: float = 60) -> None:
        def met() -> bool:
            self.assert_alive()
            return bool(condition())

        try:
            wait_until(met, timeout, what)
        except AssertionError as error:
            errors = self.database.import_errors()
            raise AssertionError(f"{error}; import errors: {errors}; it printed {self.output[-3000:]}") from None

    def wait_for_dag(self, dag_id: str, timeout: float = 60) -> dict[str, Any]:
        """The DAG, once it is stored and active."""
        self.wait(lambda: (self.database.dag(dag_id) or {"is_stale": 1})["is_stale"] == 0, f"the DAG {dag_id}", timeout)
        found = self.database.dag(dag_id)
        assert found is not None
        return found

    def wait_for_error(self, name: str, timeout: float = 60) -> str:
        """The import error of a file, once it is there."""
        self.wait(lambda: name in self.database.import_errors(), f"the import error of {name}", timeout)
        return self.database.import_errors()[name]

    def assert_parses_on(self) -> None:
        """It still parses, and is taken for healthy."""
        self.wait_for_dag(self.write_healthy())
        (job,) = self.database.rows("select max(latest_heartbeat) at from job where job_type = 'DagProcessorJob'")
        at = datetime.fromisoformat(job["at"]).replace(tzinfo=timezone.utc)
        assert (datetime.now(tz=timezone.utc) - at).total_seconds() < 30, "the heartbeat has stopped"

    def log(self, name: str) -> list[dict[str, Any]]:
        """The events of a file's parses of today."""
        events = []
        for file in (self.home / "logs" / "dag_processor").glob(f"*/*/{name}.log"):
            if not file.parent.parent.is_symlink():
                events += [json.loads(line) for line in file.read_text(errors="replace").splitlines() if line]
        return events

    def times_parsed(self, name: str) -> int:
        return sum(event["event"] == "DAG file is parsed in a container" for event in self.log(name))


@contextmanager
def dag_processor(
    home: Path, options: Mapping[str, str], *arguments: str, start: bool = True
) -> Iterator[DagProcessor]:
    """``airflow db migrate``, then a dag-processor, which is gone when the block ends.

    :param options: environment variables; nothing of ours is inherited.
    """
    (home / "dags").mkdir(parents=True, exist_ok=True)
    with database_directory(home) as directory:
        database = Database(directory / "metadata-of-the-test.db")
        environment = {**environment_of_its_own(home, database.path), **QUICK, **options}
        processor = DagProcessor(home, environment, database)
        try:
            migration = processor.run("db", "migrate")
            assert migration.returncode == 0, migration.stderr
            if start:
                processor.start(*arguments)
            yield processor
        finally:
            if processor.process is not None and processor.process.poll() is None:
                processor.stop()
