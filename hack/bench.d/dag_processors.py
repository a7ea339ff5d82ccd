"""An `airflow dag-processor` of our own on SQLite, and what can be seen of its work from outside."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import struct
import subprocess
import time
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING

from private_daemon import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Self

POLL_SECONDS = 0.25
STOP_SECONDS = 60.0
MIGRATE_SECONDS = 300

#: Read by Airflow at start: notes the time of every turn of the manager's loop, eight bytes each.
NOTE_TURNS = """\
import os, struct, time
import wrapt


def note(runner):
    beat, out = runner.perform_heartbeat, os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def noted(*args, **kwargs):
        os.write(out, struct.pack("d", time.monotonic()))
        return beat(*args, **kwargs)

    runner.perform_heartbeat = noted


wrapt.register_post_import_hook(note, "airflow.jobs.dag_processor_job_runner")
"""


def migrated_database(home: Path) -> Path:
    """A database to be copied: making one takes much longer than a turn of a benchmark."""
    home.mkdir()
    subprocess.run(
        ["airflow", "db", "migrate"],
        env=_environment(home, {}),
        check=True,
        timeout=MIGRATE_SECONDS,
        capture_output=True,
    )
    return home / "airflow.db"


class DagProcessor:
    """One that reads its files again and again as fast as it can. A context manager: it ends with the block."""

    def __init__(self, home: Path, settings: Mapping[str, str], *, measure_turns: bool = False) -> None:
        self._home = home
        if measure_turns:
            (home / "config").mkdir(mode=0o755)
            (home / "config" / "airflow_local_settings.py").write_text(NOTE_TURNS.format(path=str(self._turns)))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["airflow", "dag-processor"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home,
                env=_environment(home, settings),
            )

    @property
    def _log(self) -> Path:
        return self._home / "dag-processor.log"

    @property
    def _turns(self) -> Path:
        return self._home / "turns"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_for_files(self, number: int, seconds: float) -> None:
        """:raises Refused: fewer files were parsed in time, or one of them has an error."""
        deadline = time.monotonic() + seconds
        while len(self._parsed()) < number:
            errors = self._query("select filename, stacktrace from import_error limit 1")
            if errors or self._process.poll() is not None or time.monotonic() > deadline:
                end = errors or self._log.read_text(errors="replace")[-3000:]
                raise Refused(f"{len(self._parsed())} of {number} files were parsed; then: {end}")
            time.sleep(POLL_SECONDS)

    def parses(self, seconds: float) -> list[tuple[str, float]]:
        """Every parse that ends within so many seconds from now: the DAG and its duration in seconds.

        A file's parses are more than the polling's interval apart, as all others come between.
        """
        seen, found = self._parsed(), []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            for dag, (moment, duration) in self._parsed().items():
                if seen.get(dag, ("",))[0] != moment:
                    found.append((dag, duration))
                    seen[dag] = (moment, duration)
        return found

    def alive_times(self, name: str, *, at_least: float, within: float) -> list[float]:
        """The times that the first process of a hanging file printed, once it has been silent for a second.

        :raises Refused: it did not live for ``at_least`` seconds ``within`` the time given.
        """
        deadline = time.monotonic() + within
        times: list[float] = []
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            logs = sorted((self._home / "logs").rglob(f"{name}.log"))
            printed = re.findall(r"alive (\S+) (\d+\.\d+)", "".join(log.read_text(errors="replace") for log in logs))
            times = [float(moment) for began, moment in printed if began == printed[0][0]]
            if times and times[-1] - times[0] >= at_least and time.time() - times[-1] > 1:
                return times
        raise Refused(f"{name} lived {times[-1] - times[0] if times else 0:.1f} s; see {self._log}")

    def longest_turn(self, since: float) -> float:
        moments = [moment for (moment,) in struct.iter_unpack("d", self._turns.read_bytes()) if moment >= since]
        return max((later - earlier for earlier, later in pairwise(moments)), default=0.0)

    def _parsed(self) -> dict[str, tuple[str, float]]:
        rows = self._query("select dag_id, last_parsed_time, last_parse_duration from dag")
        return {dag: (moment, duration or 0.0) for dag, moment, duration in rows}

    def _query(self, text: str) -> list[tuple[str, ...]]:
        uri = f"file:{self._home / 'airflow.db'}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=30)) as connection:
            return connection.execute(text).fetchall()


def _environment(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")}
    return {
        **inherited,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "0",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "300",
        "AIRFLOW__DAG_PROCESSOR__PRINT_STATS_INTERVAL": "0",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        **settings,
    }
