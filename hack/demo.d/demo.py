"""The demonstration itself: hack/demo has made everything ready and runs this in the virtual environment."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from airflow_isolation.errors import IsolationError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "setup"))

import private_daemon  # noqa: E402
import runs  # noqa: E402
import standalone  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runs import Try
    from standalone import Api, Standalone

    from airflow_isolation.runtime.interface import Progress

READ_SECONDS = 240.0
RUN_SECONDS = 600.0
RECORD = "demo.json"
PREFIX = "ai-demo-"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: How each DAG is to end.
EXPECTED = {
    "taskflow": "success",
    "own_image": "success",
    "own_dependency": "success",
    "failing": "failed",
    "memory": "failed",
}
OUT_OF_MEMORY = "it reached its own limit, memory = 512 MiB"
COLOURS = {"success": "green", "failed": "red", "up_for_retry": "yellow"}

#: The table is the result; everything else is progress.
result = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
progress = Console(stderr=True, highlight=False, soft_wrap=True)


def run(backend: str, directory: Path, record: Record, undo: ExitStack) -> bool:
    """Whether all DAGs ended as they should. What it starts is left to ``undo``."""
    began = time.monotonic()
    images = [private_daemon.test_image(kind) for kind in ("main", "extra")]
    progress.print(f"Starting a private {backend} in {directory}…")
    undo.callback(private_daemon.stop_daemon, directory / "daemon")
    daemon = private_daemon.start_daemon(backend, directory / "daemon")
    # Before Airflow, whose DAG processor would begin with telling that the images are not there.
    for image in images:
        _import(daemon, directory / "state", image)
    progress.print("Starting Airflow…")
    settings = _settings(daemon, directory / "state", images[0].name)
    airflow = standalone.start(directory / "airflow", HERE / "dags", settings)
    undo.callback(standalone.stop, airflow.session)
    record.airflow = standalone.identity(airflow.session)
    record.write(directory)
    with progress.status("Waiting for Airflow…"):
        api = standalone.wait_until_up(airflow)
    progress.print(f"Airflow's UI is at {airflow.url}, where every visitor is an admin. Logs: {airflow.home}/logs")
    _trigger_dags(api)
    states = _wait_for_dags(api)
    found = runs.all_tries(api, airflow.home / "logs")
    _print_table(found)
    problems = list(_problems(states, found))
    for problem in problems:
        progress.print(problem, style="red", markup=False)
    if problems:
        _print_logs(found, airflow)
    else:
        result.print(
            f"All {len(EXPECTED)} DAGs ended as they should: {len(found)} tries in {len(found)} containers on {backend} "
            f"{daemon.version}, {time.monotonic() - began:.0f} s in all."
        )
    return not problems


def _settings(daemon: private_daemon.Daemon, state_dir: Path, image: str) -> dict[str, str]:
    """What an administrator would write into airflow.cfg."""
    return {
        "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": daemon.kind,
        "AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": daemon.kind,
        f"AIRFLOW__{daemon.kind.upper()}_RUNTIME__SOCKET_PATH": daemon.socket,
        "AIRFLOW__CONTAINER_RUNTIME__IMAGE": image,
        "AIRFLOW__CONTAINER_RUNTIME__IMAGE_PULL_POLICY": "never",
        "AIRFLOW__CONTAINER_RUNTIME__NETWORK": "none",
        "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(state_dir),
    }


def _import(daemon: private_daemon.Daemon, state_dir: Path, image: private_daemon.TestImage) -> None:
    line = f"Importing {image.name}…"
    if not progress.is_terminal:
        progress.print(line)
    with progress.status(line) as status, daemon.connect(state_dir) as runtime:
        runtime.import_image(image.archive, progress=lambda step: status.update(_importing(image.name, step)))


def _importing(name: str, step: Progress) -> str:
    return f"Importing {name}: {step.event} {step.done / 1e6:.0f} of {step.total / 1e6:.0f} MB…"


def _trigger_dags(api: Api) -> None:
    """Start a run of each DAG, as soon as Airflow has read its file."""
    deadline = time.monotonic() + READ_SECONDS
    waiting = set(EXPECTED)
    with progress.status("Waiting for the DAG files to be read…"):
        while waiting:
            for dag in waiting & runs.known_dags(api):
                runs.trigger(api, dag)
                waiting.discard(dag)
            if errors := runs.import_errors(api):
                raise private_daemon.Refused("\n".join(("Airflow could not read a DAG file.", *errors)))
            if time.monotonic() > deadline:
                raise private_daemon.Refused(
                    f"Airflow has not read {', '.join(waiting)} in {READ_SECONDS:.0f} seconds."
                )
            time.sleep(0.5)


def _wait_for_dags(api: Api) -> dict[str, str]:
    """The states of the runs, once all have ended; what has not ended in time is left as it is."""
    deadline = time.monotonic() + RUN_SECONDS
    last = ""
    with progress.status("Waiting for the DAGs…") as status:
        while True:
            states = runs.dag_states(api)
            line = _progress_line(states, runs.task_states(api))
            if line != last:
                status.update(line)
                if not progress.is_terminal:
                    progress.print(line)
                last = line
            if all(states.get(dag) in {"success", "failed"} for dag in EXPECTED) or time.monotonic() > deadline:
                return states
            time.sleep(1)


def _progress_line(dags: dict[str, str], tasks: list[str]) -> str:
    counted = ", ".join(f"{tasks.count(state)} {state}" for state in sorted(set(tasks)))
    ended = sum(dags.get(dag) in {"success", "failed"} for dag in EXPECTED)
    return f"DAGs ended: {ended} of {len(EXPECTED)}. Tasks: {counted or 'none yet'}"


def _print_table(found: list[Try]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("DAG", "TASK", "TRY", "CONTAINER", "IMAGE", "STATE"):
        table.add_column(heading, overflow="fold")
    table.add_column("DURATION", justify="right")
    for each in found:
        style = COLOURS.get(each.state, "")
        state = f"[{style}]{each.state}[/]" if style else each.state
        duration = f"{each.duration:.1f} s"
        # The square brackets of a mapped task are no markup.
        task = each.task.replace("[", r"\[")
        table.add_row(each.dag, task, str(each.number), each.container or "-", each.image or "-", state, duration)
    result.print(table)


def _problems(states: dict[str, str], found: list[Try]) -> Iterator[str]:
    for dag, expected in EXPECTED.items():
        if (state := states.get(dag, "not started")) != expected:
            yield f"The DAG {dag} should have ended as {expected}, and is: {state}."
    for each in found:
        if not each.container:
            yield f"Task {each.task} of {each.dag}, try {each.number}, ran in no container."
    if len({each.container for each in found}) != len(found):
        yield "Two tries shared a container."
    failing = [each for each in found if each.dag == "failing"]
    if [each.number for each in failing] != [1, 2]:
        yield f"The failing task should have had two tries, and had {len(failing)}."
    elif not any("on_failure_callback ran" in event for event in failing[-1].events):
        yield "The failing task's on_failure_callback did not run in its container."
    over = [event for each in found if each.dag == "memory" for event in each.events]
    if not any(OUT_OF_MEMORY in event and "Raise resources.memory." in event for event in over):
        yield "The log of the task that went over its memory does not say so."
    if not any("Task ended with signal SIGKILL: wall" in event for event in over):
        yield "The log of the task that went over its memory does not say what it had used."


def _print_logs(found: list[Try], airflow: Standalone) -> None:
    for each in found:
        progress.print(f"--- {each.dag}.{each.task}, try {each.number}: {each.state}", markup=False)
        progress.print("\n".join(each.events[-40:]), markup=False)
    progress.print(f"--- the end of {airflow.log}", markup=False)
    progress.print(airflow.log.read_text(errors="replace")[-4000:], markup=False)


# --- what stays with --keep, and how it goes -------------------------------------------------------------------------


@dataclass
class Record:
    """What ``hack/demo --down`` needs to know: a process is (pid, start time), so that a reused pid is not taken for it."""

    demo: tuple[int, int] | None
    airflow: tuple[int, int] | None = None

    def write(self, directory: Path) -> None:
        (directory / RECORD).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, directory: Path) -> Record:
        try:
            values = json.loads((directory / RECORD).read_text())
        except FileNotFoundError:
            return cls(demo=None)
        return cls(**{name: tuple(value) if value else None for name, value in values.items()})


def demonstrate(backend: str, *, keep: bool) -> int:
    with ExitStack() as undo:
        directory = private_daemon.new_directory(PREFIX)
        undo.callback(shutil.rmtree, directory)
        record = Record(demo=standalone.identity(os.getpid()))
        record.write(directory)
        try:
            well = run(backend, directory, record, undo)
        finally:
            # A second Ctrl-C must not interrupt the cleaning.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            if not keep:
                progress.print("Cleaning up…")
        if keep:
            record.demo = None
            record.write(directory)
            undo.pop_all()
            result.print("Everything is left running; hack/demo --down ends it.")
    return 0 if well else 1


def down() -> None:
    """End every demonstration that was kept, or whose process was killed; those that still run are left alone."""
    for directory in private_daemon.directories(PREFIX):
        record = Record.read(directory)
        if record.demo and standalone.identity(record.demo[0]) == record.demo:
            progress.print(f"{directory} belongs to a demonstration that still runs; it is left alone.")
            continue
        if record.airflow and standalone.identity(record.airflow[0]) == record.airflow:
            standalone.stop(record.airflow[0])
        private_daemon.stop_daemon(directory / "daemon")
        shutil.rmtree(directory)
        progress.print(f"Removed {directory}.")


def stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/demo")
    parser.add_argument("--backend", choices=["containerd", "docker"], default="containerd")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--down", action="store_true")
    options = parser.parse_args()
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        if options.down:
            down()
            return 0
        return demonstrate(options.backend, keep=options.keep)
    except (private_daemon.Refused, standalone.NotStarted, IsolationError) as error:
        progress.print(str(error), style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
