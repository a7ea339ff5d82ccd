"""tasks: whole Airflows that run the same trivial task: stock, in containers of ours, and by DockerOperator.

Each mode has an Airflow of its own (scheduler with the LocalExecutor, API server), and they take turns; those whose turn
it is not are stopped and cost nothing. Times are those of the task instances in the metadata database. Memory is looked
at in runs of its own, because looking costs more than the tasks do.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import family
from metadata import Postgresql, Sqlite
from private_daemon import Refused, start_daemon, stop_daemon, test_image
from samples import progress, step
from task_figures import Batch, MemorySample, TasksReport, setting_of
from whole_airflow import Airflow, fill

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack

    from metadata import Databases
    from private_daemon import Daemon, TestImage

#: How many tasks are run one after another in each round.
SINGLES = 10
HELD, HOLD_SECONDS = 8, 25
WARM_UP_SECONDS = 180.0
QUIET_SECONDS, QUIET_SHARE, QUIET_LOOK = 15.0, 0.25, 0.5
MEMORY_INTERVAL = 0.5
#: A container that imports Airflow anew takes seconds of CPU time: more tasks than that are run in the first round only.
FRESH_AT_MOST = 20
NOTHING, HOLD = "nothing", "hold"

TASKFLOW = """\
import time

from airflow.sdk import dag, task


@task
def nothing(index):
    return 1


@task
def hold(index):
    time.sleep({seconds})
    return 1


@dag(schedule=None)
def {dag_id}():
    {task}{call}


{dag_id}()
"""

# The same image; what its interpreter prints becomes the XCom, as the other's return value does.
OPERATOR = """\
from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk import dag

COMMANDS = {{"nothing": ["print(1)"], "hold": ["import time; time.sleep({seconds}); print(1)"]}}
KEYWORDS = dict(
    task_id="{task}",
    image="{image}",
    docker_url="unix://{socket}",
    entrypoint=["python3", "-ISc"],
    command=COMMANDS["{task}"],
    network_mode="none",
    mount_tmp_dir=False,
    auto_remove="force",
)


@dag(schedule=None)
def {dag_id}():
    DockerOperator{call}


{dag_id}()
"""


@dataclass(frozen=True)
class Mode:
    """A way to run tasks; modes of one ``backend`` differ in settings alone. ``kind`` of DAG: taskflow or operator."""

    backend: str = ""
    kind: str = "taskflow"
    in_containers: bool = True
    start_mode: str = ""

    def settings(self, daemon: Daemon | None, image: TestImage, state_dir: Path) -> dict[str, str]:
        if daemon is None or not self.in_containers:
            return {}
        state_dir.mkdir(mode=0o711)
        return {
            "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": daemon.kind,
            f"AIRFLOW__{daemon.kind.upper()}_RUNTIME__SOCKET_PATH": daemon.socket,
            "AIRFLOW__CONTAINER_RUNTIME__IMAGE": image.name,
            "AIRFLOW__CONTAINER_RUNTIME__IMAGE_PULL_POLICY": "never",
            "AIRFLOW__CONTAINER_RUNTIME__NETWORK": "none",
            "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(state_dir),
            "AIRFLOW__CONTAINER_RUNTIME__START_MODE": self.start_mode,
        }


MODES = {
    "stock": Mode(),
    "fork": Mode("containerd", start_mode="fork"),
    "fresh": Mode("containerd", start_mode="fresh"),
    "docker-fork": Mode("docker", start_mode="fork"),
    "docker-fresh": Mode("docker", start_mode="fresh"),
    "docker-operator": Mode("docker", kind="operator", in_containers=False),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--modes",
        type=modes_of,
        default=modes_of("stock,fork,fresh,docker-fork,docker-operator"),
        help=f"of {', '.join(MODES)} (all but docker-fresh)",
    )
    parser.add_argument("--tasks", type=_sizes, default=_sizes("1,20,200"), help="sizes of the runs (1,20,200)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each mode (3)")
    parser.add_argument("--parallelism", type=int, default=32, help="of the executor (32)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs in which memory is looked at")
    parser.add_argument(
        "--postgresql",
        metavar="URL",
        help="a server on which databases may be made, or `private` for one of our own; SQLite when not given",
    )
    parser.add_argument("--picture", type=Path, metavar="DIRECTORY", help="draw tasks.svg and tasks.png there")
    parser.add_argument(
        "--from", dest="samples", type=Path, metavar="FILE", help="measure nothing: read this --json file"
    )
    parser.add_argument("--soak", type=int, metavar="NUMBER", help="instead, so many tasks in a row, and what grows")


def run(options: argparse.Namespace, directory: Path, undo: ExitStack) -> object:
    """:returns: a report that can be shown and saved."""
    if options.soak:
        import soak

        return soak.run(options, directory, undo)
    if options.samples:
        report = TasksReport.from_json(json.loads(options.samples.read_text()))
    else:
        report = _Bench(options, directory, undo).report()
    if options.picture:
        import picture

        picture.draw(report, options.picture)
    return report


class _Bench:
    def __init__(self, options: argparse.Namespace, directory: Path, undo: ExitStack) -> None:
        self._options = options
        self._directory = directory
        self._undo = undo
        self._image = test_image("main")
        self._daemons: dict[str, Daemon] = {}
        self._airflows: dict[str, Airflow] = {}
        self._batches: list[Batch] = []
        self._memory: list[MemorySample] = []
        self._setting: dict[str, str] = {}

    def report(self) -> TasksReport:
        family.adopt_orphans()
        self._undo.callback(family.end_all)
        modes: Mapping[str, Mode] = self._options.modes
        for backend in dict.fromkeys(mode.backend for mode in modes.values() if mode.backend):
            self._daemons[backend] = start_daemon_with(self._image, backend, self._directory, self._undo)
        databases = self._databases()
        self._setting = setting_of(
            {
                **{daemon.kind: daemon.version for daemon in self._daemons.values()},
                "airflow": version("apache-airflow"),
                "database": databases.name,
                "parallelism": str(self._options.parallelism),
                "turns": "each mode has an Airflow of its own; those whose turn it is not are stopped (SIGSTOP)",
            }
        )
        self._start_airflows(databases)
        for turn in range(self._options.rounds):
            for name in modes:
                self._turn(name, turn)
        if not self._options.no_memory:
            for name in modes:
                step(f"Memory: {name}")
                self._look_at_memory(name)
        step("")
        return self._found()

    def _databases(self) -> Databases:
        if self._options.postgresql == "private":
            import postgresql

            return Postgresql(postgresql.start(self._directory / "postgresql", self._undo), self._undo)
        if self._options.postgresql:
            return Postgresql(self._options.postgresql, self._undo)
        return Sqlite(self._directory, self._undo)

    def _start_airflows(self, databases: Databases) -> None:
        common = {
            "AIRFLOW__CORE__DAGS_FOLDER": str(self._write_dags()),
            "AIRFLOW__CORE__PARALLELISM": str(self._options.parallelism),
        }
        progress.print("Making Airflow's database…")
        original = databases.new("original")
        fill(original, self._directory / "airflow-original", common)
        for name, mode in self._options.modes.items():
            progress.print(f"Starting Airflow: {name}…")
            settings = mode.settings(self._daemons.get(mode.backend), self._image, self._directory / f"state-{name}")
            airflow = Airflow(
                self._directory / f"airflow-{name}",
                databases.copy(original, name),
                free_port(),
                {**common, **settings},
            )
            self._airflows[name] = self._undo.enter_context(airflow)
            airflow.wait_until_up()
            self._warm_up(name)
            airflow.freeze()

    def _write_dags(self) -> Path:
        """One file for each kind of task and each size: a task reads its whole file, and is to find nothing else in it."""
        dags = self._directory / "dags"
        dags.mkdir(mode=0o755)
        modes = self._options.modes.values()
        docker = self._daemons.get("docker")
        for kind in {mode.kind for mode in modes}:
            for size, task in self._shapes():
                (dags / f"{dag_name(kind, size, task)}.py").write_text(
                    dag_file(kind, size, task, image=self._image.name, socket=docker.socket if docker else "")
                )
        return dags

    def _shapes(self) -> list[tuple[int, str]]:
        sizes = dict.fromkeys((1, *self._options.tasks, self._peak_size))
        return [*((size, NOTHING) for size in sizes), (self._held, HOLD)]

    @property
    def _held(self) -> int:
        return min(HELD, int(self._options.parallelism))

    @property
    def _peak_size(self) -> int:
        """Twice as many as run at once: every slot has been used."""
        return 2 * int(self._options.parallelism)

    def _turn(self, name: str, turn: int) -> None:
        airflow = self._airflows[name]
        airflow.thaw()
        self._warm_up(name)
        for size in self._options.tasks:
            if turn > 0 and size > FRESH_AT_MOST and self._options.modes[name].start_mode == "fresh":
                continue
            step(f"Round {turn + 1} of {self._options.rounds}: {name}, {size} tasks")
            meter = family.Meter()
            runs = [
                airflow.run(self._dag(name, size), size, seconds=_patience(size))
                for _ in range(SINGLES if size == 1 else 1)
            ]
            wait_until_quiet()
            batch = Batch(
                mode=name,
                size=size,
                round=turn,
                tasks=tuple(task for run in runs for task in run.tasks),
                started=dict(sum((run.started for run in runs), Counter())),
                **meter.read(),
            )
            self._batches.append(batch)
            if any(task.state != "success" for task in batch.tasks):
                progress.print(f"{name}: a task failed. The end of its log:\n{airflow.first_failure()}", markup=False)
            self._tidy()
        airflow.freeze()

    def _look_at_memory(self, name: str) -> None:
        airflow = self._airflows[name]
        airflow.thaw()
        self._warm_up(name)
        others = {pid for other in self._airflows.values() if other is not airflow for pid in other.pids}

        def look() -> family.Memory:
            return family.memory(excluded=others)

        idle = look()
        with family.MemoryWatch(look, interval=MEMORY_INTERVAL) as watch:
            airflow.run(self._dag(name, self._peak_size), self._peak_size, seconds=_patience(self._peak_size))
        wait_until_quiet()
        # By now every slot has run a task, and what its process has grown by is not the next task's.
        before = look()
        with family.MemoryWatch(look, interval=MEMORY_INTERVAL) as held:
            airflow.run(self._dag(name, self._held, HOLD), self._held, seconds=_patience(self._held))
        self._memory.append(
            MemorySample(
                mode=name,
                idle=idle.total,
                peak=watch.peak.total - idle.total,
                peak_size=self._peak_size,
                held=self._held,
                beyond_idle=held.peak.total - before.total,
                by_role={role: held.peak.bytes[role] - before.bytes[role] for role in family.ROLES},
            )
        )
        self._tidy()
        airflow.freeze()

    def _warm_up(self, name: str) -> None:
        """After a stop, clocks run late and caches are cold; and a turn begins when nothing of the last is left.

        Meanwhile an idle zygote may have ended, and tasks start fresh until there is another.
        """
        wanted = self._options.modes[name].start_mode
        deadline = time.monotonic() + WARM_UP_SECONDS
        while True:
            run = self._airflows[name].run(self._dag(name, 1), 1, seconds=_patience(1))
            if {task.state for task in run.tasks} != {"success"}:
                raise Refused(
                    f"{name}: a first task failed. The end of its log:\n{self._airflows[name].first_failure()}"
                )
            wait_until_quiet()
            if set(run.started) <= {wanted} or time.monotonic() > deadline:
                return

    def _dag(self, name: str, size: int, task: str = NOTHING) -> str:
        return dag_name(self._options.modes[name].kind, size, task)

    def _tidy(self) -> None:
        family.reap_orphans({pid for airflow in self._airflows.values() for pid in airflow.pids})
        # What has been measured is kept, whatever happens to the rest of a long run.
        if self._options.json:
            self._found().save(self._options.json)

    def _found(self) -> TasksReport:
        return TasksReport(tuple(self._batches), tuple(self._memory), self._setting)


def start_daemon_with(image: TestImage, backend: str, directory: Path, undo: ExitStack) -> Daemon:
    """A private daemon that has the image; ``undo`` gets its end."""
    progress.print(f"Starting a private {backend} and importing {image.name}…")
    undo.callback(stop_daemon, directory / backend)
    daemon = start_daemon(backend, directory / backend)
    with daemon.connect(directory / "import") as runtime:
        runtime.import_image(image.archive)
    return daemon


def wait_until_quiet() -> None:
    """Until what was begun in the background has ended: until little CPU time is used, or for ``QUIET_SECONDS``."""
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        meter = family.Meter()
        time.sleep(QUIET_LOOK)
        if meter.read()["cpu_seconds"] < QUIET_SHARE * QUIET_LOOK:
            return


def dag_name(kind: str, size: int, task: str) -> str:
    return f"{kind}_{task}_{size}"


def dag_file(kind: str, size: int, task: str, *, image: str, socket: str) -> str:
    """A DAG of so many instances of one task."""
    return (TASKFLOW if kind == "taskflow" else OPERATOR).format(
        dag_id=dag_name(kind, size, task),
        task=task,
        call=_call(kind, size),
        seconds=HOLD_SECONDS,
        image=image,
        socket=socket,
    )


def _call(kind: str, size: int) -> str:
    if kind == "taskflow":
        return "(0)" if size == 1 else f".expand(index=list(range({size})))"
    if size == 1:
        return "(**KEYWORDS)"
    return f'.partial(**KEYWORDS).expand(environment=[{{"INDEX": str(index)}} for index in range({size})])'


def _patience(tasks: int) -> float:
    """Seconds after which something is wrong."""
    return 180 + 15.0 * tasks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def modes_of(text: str) -> dict[str, Mode]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in MODES]:
        raise argparse.ArgumentTypeError(
            f"there is no mode {', '.join(map(repr, unknown))}; there are {', '.join(MODES)}"
        )
    return {name: MODES[name] for name in names}


def _sizes(text: str) -> list[int]:
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers of tasks; write some from 1 on, such as 1,20")
    return sizes
