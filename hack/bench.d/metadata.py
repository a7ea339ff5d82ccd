"""Metadata databases for several Airflows with the same DAGs: one is filled, the others are its copies.

SQLite's lie in memory, so that it is not the disk that is compared; PostgreSQL's are made on a given server and dropped.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import made_ready
import sqlalchemy
from sqlalchemy import text

if TYPE_CHECKING:
    from contextlib import ExitStack


class Databases(Protocol):
    """Where the databases are. ``copy`` needs nobody to be connected to the original."""

    name: str

    def new(self, name: str) -> str: ...

    def copy(self, original: str, name: str) -> str: ...


class Sqlite:
    """Files in memory, removed with ``undo``."""

    name = "SQLite in memory"

    def __init__(self, directory: Path, undo: ExitStack) -> None:
        memory = Path("/dev/shm")
        self._directory = Path(tempfile.mkdtemp(prefix="ai-bench-", dir=memory if memory.is_dir() else directory))
        undo.callback(shutil.rmtree, self._directory)

    def new(self, name: str) -> str:
        return f"sqlite:///{self._directory / name}.db"

    def copy(self, original: str, name: str) -> str:
        shutil.copyfile(original.removeprefix("sqlite:///"), self._directory / f"{name}.db")
        return self.new(name)


class Postgresql:
    """Databases of our own on the server of a URL, whose user must be allowed to make some; dropped with ``undo``."""

    def __init__(self, url: str, undo: ExitStack) -> None:
        made_ready.python_packages("postgresql_drivers_directory", for_children=True)
        given = sqlalchemy.make_url(url)
        self._url = given.set(drivername="postgresql+psycopg2", database=given.database or "postgres")
        self._prefix = f"airflow_bench_{uuid.uuid4().hex[:8]}"
        self._undo = undo
        ((version,),) = self._administer("show server_version")
        self.name = f"PostgreSQL {version}"

    def new(self, name: str) -> str:
        return self._create(name, "")

    def copy(self, original: str, name: str) -> str:
        return self._create(name, f' template "{sqlalchemy.make_url(original).database}"')

    def _create(self, name: str, how: str) -> str:
        database = f"{self._prefix}_{name.replace('-', '_')}"
        self._administer(f'create database "{database}"{how}')
        self._undo.callback(self._administer, f'drop database "{database}" with (force)')
        return self._url.set(database=database).render_as_string(hide_password=False)

    def _administer(self, statement: str) -> list[Any]:
        engine = sqlalchemy.create_engine(self._url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                answer = connection.execute(text(statement))
                return list(answer) if answer.returns_rows else []
        finally:
            engine.dispose()


class Database:
    """What is read of one Airflow's database, in few short questions: SQLite's readers keep its writer waiting."""

    def __init__(self, url: str) -> None:
        self._engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)

    def run_state(self, dag_id: str, run_id: str) -> str:
        rows = self._ask("select state from dag_run where dag_id = :dag and run_id = :run", dag=dag_id, run=run_id)
        return str(rows[0][0]) if rows else "none"

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """``id`` and ``state``, and ``queued``, ``started``, ``ended`` in seconds since the epoch, None where it is not so far."""
        rows = self._ask(
            "select id, state, queued_dttm, start_date, end_date from task_instance"
            " where dag_id = :dag and run_id = :run order by map_index",
            dag=dag_id,
            run=run_id,
        )
        return [
            {
                "id": str(uuid.UUID(str(id))),
                "state": state or "none",
                "queued": epoch(queued),
                "started": epoch(started),
                "ended": epoch(ended),
            }
            for id, state, queued, started, ended in rows
        ]

    def _ask(self, question: str, **values: str) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(text(question), values))


def epoch(moment: str | datetime | None) -> float | None:
    """SQLite keeps UTC as text without a zone, PostgreSQL gives a datetime with one."""
    if moment is None:
        return None
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
