"""parse: DAG files in parse containers, in a container for each file, and in stock Airflow's forks.

Throughput: dag-processors of each kind take turns over the same files with the same two slots; each has read every file
once before it is measured. What is counted is what they wrote into the database. One file: the duration that Airflow
itself notes, with one slot and nothing else to do. Then what happens at a file that hangs, and how long the manager's
loop takes for a turn while an image is imported and while the daemon is frozen.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import defaultdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from dag_processors import DagProcessor, migrated_database
from private_daemon import Refused, start_daemon, stop_daemon, test_image
from samples import Report, Series, progress, spread, step

if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack
    from pathlib import Path

    from private_daemon import Daemon, TestImage

STOCK, WARM, FRESH = "stock", "parse containers", "a container for each file"
SLOTS = 2
HANG_TIMEOUT = 5
FREEZE_SECONDS = 8.0
START_SECONDS = 300.0

DAG = """\
from airflow.sdk import dag, task


@dag(schedule=None)
def bench_{number}():
    @task
    def first():
        return 1

    @task
    def second(value):
        return value + 1

    @task
    def third(value):
        print(value)

    third(second(first()))


bench_{number}()
"""

HANG = """\
import time

# airflow.sdk DAG: the words by which the manager finds DAG files
began = time.time()
while True:
    print("alive", began, time.time(), flush=True)
    time.sleep(0.005)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=int, default=100, help="DAG files of three tasks (100)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each kind (2)")
    parser.add_argument("--seconds", type=float, default=45.0, help="measured in each turn (45)")
    parser.add_argument("--backend", default="containerd", choices=["containerd", "docker"])


def run(options: argparse.Namespace, directory: Path, undo: ExitStack) -> Report:
    image = test_image("main")
    progress.print(f"Starting a private {options.backend} and importing {image.name}…")
    undo.callback(stop_daemon, directory / "d")
    daemon = start_daemon(options.backend, directory / "d")
    with daemon.connect(directory / "state") as runtime:
        runtime.import_image(image.archive)
    bench = _Bench(directory, daemon, image, migrated_database(directory / "template"))

    many, one = bench.folder("many", options.files), bench.folder("one", 1)
    rates: dict[str, list[float]] = defaultdict(list)
    single: dict[str, list[float]] = defaultdict(list)
    for turn in range(options.rounds):
        for kind in (STOCK, WARM, FRESH):
            step(f"Round {turn + 1} of {options.rounds}: {kind}")
            # A container for each file is so much slower that waiting for all of them once would take the day.
            first = 2 if kind == FRESH else options.files
            with bench.dag_processor(kind, many, slots=SLOTS) as processor:
                processor.wait_for_files(first, START_SECONDS)
                rates[kind].append(60 * len(processor.parses(options.seconds)) / options.seconds)
            with bench.dag_processor(kind, one, slots=1) as processor:
                processor.wait_for_files(1, START_SECONDS)
                found = processor.parses(options.seconds / 2)
                single[kind] += [seconds for name, seconds in found if name == "bench_0"]
    step("A file that hangs")
    late = {kind: [bench.kill_lateness(kind) for _ in range(options.rounds)] for kind in (STOCK, WARM)}
    step("The manager's loop")
    turns = bench.longest_turns(many)
    step("")
    middle = {kind: sorted(found)[len(found) // 2] for kind, found in rates.items()}
    return Report(
        benchmark="parse",
        series=(
            *spread({f"one file, {kind}": found for kind, found in single.items()}),
            *spread(
                {
                    f"a hung file, from its first line to its last, beyond its timeout, {kind}": found
                    for kind, found in late.items()
                }
            ),
            *(Series(f"longest turn of the loop, {when}", (seconds,)) for when, seconds in turns.items()),
        ),
        ratios={
            **{f"files a minute, {kind}": each for kind, found in rates.items() for each in [sum(found) / len(found)]},
            **{f"files a minute, {kind} / {STOCK}": middle[kind] / middle[STOCK] for kind in (WARM, FRESH)},
            f"one file, {WARM} / {STOCK}": _median(single[WARM]) / _median(single[STOCK]),
        },
        versions={options.backend: daemon.version, "airflow": version("apache-airflow"), "files": str(options.files)},
    )


class _Bench:
    def __init__(self, directory: Path, daemon: Daemon, image: TestImage, database: Path) -> None:
        self._directory = directory
        self._daemon = daemon
        self._image = image
        self._database = database
        self._runs = 0

    def folder(self, name: str, files: int) -> Path:
        folder = self._directory / name
        folder.mkdir(mode=0o755)
        for number in range(files):
            (folder / f"bench_{number}.py").write_text(DAG.format(number=number))
        return folder

    def dag_processor(
        self, kind: str, folder: Path, *, slots: int, timeout: int = 50, measure_turns: bool = False
    ) -> DagProcessor:
        self._runs += 1
        home = self._directory / f"airflow-{self._runs}"
        home.mkdir(mode=0o755)
        shutil.copyfile(self._database, home / "airflow.db")
        settings = {
            "AIRFLOW__CORE__DAGS_FOLDER": str(folder),
            "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": str(slots),
            "AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": str(timeout),
        }
        if kind != STOCK:
            settings |= {
                "AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": self._daemon.kind,
                f"AIRFLOW__{self._daemon.kind.upper()}_RUNTIME__SOCKET_PATH": self._daemon.socket,
                "AIRFLOW__CONTAINER_RUNTIME__IMAGE": self._image.name,
                "AIRFLOW__CONTAINER_RUNTIME__IMAGE_PULL_POLICY": "never",
                "AIRFLOW__CONTAINER_RUNTIME__NETWORK": "none",
                "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(self._directory / "state"),
                "AIRFLOW__CONTAINER_RUNTIME__PARSE_MODE": "fresh" if kind == FRESH else "fork",
            }
        return DagProcessor(home, settings, measure_turns=measure_turns)

    def kill_lateness(self, kind: str) -> float:
        """Seconds beyond the timeout from a hung file's first line to its last, as it noted them in its log.

        The timeout counts from the start of its process, some 50 ms before the first line.
        """
        folder = self._directory / f"hanging-{self._runs}"
        folder.mkdir(mode=0o755)
        (folder / "hanging.py").write_text(HANG)
        with self.dag_processor(kind, folder, slots=1, timeout=HANG_TIMEOUT) as processor:
            alive = processor.alive_times("hanging.py", at_least=HANG_TIMEOUT - 0.5, within=START_SECONDS)
        return max(0.0, alive[-1] - alive[0] - HANG_TIMEOUT)

    def longest_turns(self, folder: Path) -> dict[str, float]:
        """Seconds between two heartbeats of the loop, its wait for news of up to a second included."""
        found = {}
        with self.dag_processor(WARM, folder, slots=SLOTS, measure_turns=True) as processor:
            processor.wait_for_files(1, START_SECONDS)
            for when, disturb in (("undisturbed", _wait), ("an image is imported", self._import)):
                began = time.monotonic()
                disturb()
                found[when] = processor.longest_turn(began)
            began = time.monotonic()
            os.kill(self._daemon.pid, signal.SIGSTOP)
            try:
                time.sleep(FREEZE_SECONDS)
            finally:
                os.kill(self._daemon.pid, signal.SIGCONT)
            found["the daemon is frozen"] = processor.longest_turn(began)
        return found

    def _import(self) -> None:
        with self._daemon.connect(self._directory / "state") as runtime:
            runtime.import_image(test_image("extra").archive)


def _wait() -> None:
    time.sleep(FREEZE_SECONDS)


def _median(values: list[float]) -> float:
    if not values:
        raise Refused("Nothing was parsed in the measured time")
    return sorted(values)[len(values) // 2]
