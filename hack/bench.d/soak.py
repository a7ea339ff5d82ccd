"""Many tasks in a row in one worker process, and what of the host's resources there is more of at the end.

The whole way of a task but for scheduler and API server: the coordinator, Airflow's supervisor, a container, an operator
that does nothing; as in `hack/bench slot`. Looked at ten times, each time when the background work is done.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import family
import psutil
from private_daemon import Refused, test_image
from rich.table import Table
from samples import result, step
from slot import DAG, slot_held
from task_figures import MIB, setting_of
from tasks import MODES, start_daemon_with, wait_until_quiet

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

#: The first of them, of 5,000 tasks after 500, is when caches are full and pools have their size.
LOOKS = 10
DEFAULT_MODE = "fork"


@dataclass(frozen=True)
class Look:
    """What there was after so many tasks. Memory (PSS) in bytes; cgroups and mounts are those of the whole host."""

    tasks: int
    elapsed: float
    counts: Mapping[str, int]


@dataclass(frozen=True)
class SoakReport:
    """Growth between the first and the last look."""

    mode: str
    looks: Sequence[Look]
    setting: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        looks = [{"tasks": look.tasks, "elapsed": look.elapsed, **look.counts} for look in self.looks]
        return {"benchmark": "soak", "mode": self.mode, "setting": dict(self.setting), "looks": looks}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def show(self) -> None:
        first, middle, last = self.looks[0], self.looks[len(self.looks) // 2], self.looks[-1]
        result.print(f"{last.tasks} tasks in a row: {self.mode}", style="bold")
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("WHAT")
        for heading in (*(f"AFTER {look.tasks}" for look in (first, middle, last)), "GROWTH"):
            table.add_column(heading, justify="right")
        for what, before in first.counts.items():
            after = last.counts[what]
            values = (before, middle.counts[what], after)
            table.add_row(what, *(_shown(what, value) for value in values), _shown(what, after - before, sign="+"))
        result.print(table)
        result.print(f"{last.tasks / last.elapsed:.2f} tasks per second, one after another")
        for name, value in self.setting.items():
            result.print(f"{name}: {value}", style="dim", markup=False)


def _shown(what: str, number: int, *, sign: str = "") -> str:
    return f"{number / MIB:{sign}.1f} MiB" if what.startswith("memory") else f"{number:{sign}d}"


def run(options: argparse.Namespace, directory: Path, undo: ExitStack) -> SoakReport:
    chosen = list(options.modes) if len(options.modes) == 1 else [DEFAULT_MODE]
    name, mode = chosen[0], MODES[chosen[0]]
    if not mode.in_containers or not mode.backend:
        raise Refused(f"A soak needs a mode with containers of ours; {name} has none")
    family.adopt_orphans()
    undo.callback(family.end_all)
    image = test_image("main")
    daemon = start_daemon_with(image, mode.backend, directory, undo)
    state_dir = directory / f"state-{name}"
    dags = directory / "dags"
    dags.mkdir(mode=0o755)
    (dags / "bench.py").write_text(DAG)
    # Before Airflow is imported, which happens below for the first time.
    os.environ.update(
        {
            **mode.settings(daemon, image, state_dir),
            "AIRFLOW_HOME": str(directory / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        }
    )
    from airflow_isolation.integration.coordinator import ContainerCoordinator

    coordinator = ContainerCoordinator(backend=daemon.kind)  # type: ignore[arg-type]  # one of the two
    report = SoakReport(
        name, looks := [], setting_of({daemon.kind: daemon.version, "airflow": version("apache-airflow")})
    )
    interval = max(1, options.soak // LOOKS)
    elapsed = 0.0
    for number in range(1, options.soak + 1):
        began = time.monotonic()
        slot_held(coordinator)
        elapsed += time.monotonic() - began
        if number == options.soak or number % interval == 0:
            step(f"{number} of {options.soak} tasks")
            looks.append(look(number, elapsed, directory, state_dir))
            if options.json:
                report.save(options.json)
    step("")
    return report


def look(tasks: int, elapsed: float, directory: Path, state_dir: Path) -> Look:
    """Wait until it is quiet, and count."""
    wait_until_quiet()
    family.reap_orphans(known=())
    worker = psutil.Process()
    memory = family.memory()
    processes = worker.children(recursive=True)
    counts = {
        "memory of the worker": worker.memory_full_info().pss,
        **{f"memory, {role}": memory.bytes[role] for role in family.ROLES if role != "Airflow"},
        "threads of the worker": threading.active_count(),
        "descriptors of the worker": worker.num_fds(),
        "descriptors of daemon, shims, zygote": sum(_descriptors(process) for process in processes),
        "processes": len(processes),
        "cgroups of the host": _cgroups(),
        "mounts of the host": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "files in state_dir": _files(state_dir),
        "files of the daemon's state": sum(_files(place) for place in directory.glob("*/state")),
    }
    return Look(tasks, elapsed, counts)


def _descriptors(process: psutil.Process) -> int:
    try:
        return int(process.num_fds())
    except psutil.Error:
        return 0


def _cgroups() -> int:
    """In every hierarchy."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    points = [point for _, point, kind, *_ in mounts if kind in {"cgroup", "cgroup2"}]
    return sum(1 for point in points for _ in os.walk(point))


def _files(directory: Path) -> int:
    """Without the mounted root file systems of running containers."""
    number = 0
    for _, directories, files in os.walk(directory):
        directories[:] = [each for each in directories if each != "rootfs"]
        number += len(directories) + len(files)
    return number
