"""Samples of `hack/bench tasks` and what is reckoned from them: percentiles, rates, and the table of one size."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from samples import Series, machine, result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True)
class TaskTimes:
    """One task instance; times are seconds since the epoch. ``released``: its executor took up something else again."""

    state: str
    queued: float
    started: float | None
    ended: float | None
    released: float | None


@dataclass(frozen=True)
class Batch:
    """Tasks that were run together by one mode; ``size`` 1 means one after another.

    Attributes:
        cpu_seconds: of scheduler, API server, workers, daemon, shims and containers.
        busy_seconds: of the whole machine in the same time, with the kernel's threads and whatever else ran on it.
        elapsed: from the first trigger until all was quiet again; the two above are of this time.
        started: how many of them were started in which way, as their logs tell; of containers of ours only.

    """

    mode: str
    size: int
    round: int
    tasks: tuple[TaskTimes, ...]
    cpu_seconds: float
    busy_seconds: float
    elapsed: float
    started: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MemorySample:
    """Bytes beyond those of the idle Airflow: at the peak of a large run, and with ``held`` tasks that do nothing."""

    mode: str
    idle: int
    peak: int
    peak_size: int
    held: int
    beyond_idle: int
    by_role: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """One mode at one size; a missing one is None. Times in seconds, ``cpu`` for each task."""

    mode: str
    number: int
    failed: int
    to_running: Series
    to_success: Series
    release: Series
    rate: Series
    cpu: Series


def figures(batches: Sequence[Batch]) -> Figures:
    """:param batches: of one mode and size, at least one."""
    tasks = [task for batch in batches for task in batch.tasks]
    good = [task for task in tasks if task.state == "success"]
    return Figures(
        mode=batches[0].mode,
        number=len(tasks),
        failed=len(tasks) - len(good),
        to_running=_series("queued → running", [task.started - task.queued for task in good if task.started]),
        to_success=_series("queued → success", [task.ended - task.queued for task in good if task.ended]),
        release=_series(
            "success → slot free",
            [max(0.0, task.released - task.ended) for task in good if task.released and task.ended],
        ),
        rate=_series("tasks per second", [rate for batch in batches if (rate := tasks_per_second(batch))]),
        cpu=_series("CPU seconds per task", [batch.cpu_seconds / len(batch.tasks) for batch in batches if batch.tasks]),
    )


def tasks_per_second(batch: Batch) -> float | None:
    """From the first queued to the last ended; None for tasks that did not run together, or where one failed."""
    ends = [task.ended for task in batch.tasks if task.state == "success" and task.ended]
    if batch.size == 1 or len(ends) < len(batch.tasks):
        return None
    return len(ends) / (max(ends) - min(task.queued for task in batch.tasks))


def _series(name: str, values: Sequence[float]) -> Series:
    return Series(name, tuple(values))


@dataclass(frozen=True)
class TasksReport:
    """What `hack/bench tasks` has found: raw samples, from which everything else is reckoned when it is shown."""

    batches: tuple[Batch, ...]
    memory: tuple[MemorySample, ...]
    setting: Mapping[str, str]

    @property
    def sizes(self) -> list[int]:
        return list(dict.fromkeys(batch.size for batch in self.batches))

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(batch.mode for batch in self.batches))

    def figures(self, size: int) -> list[Figures]:
        """Of every mode that ran this size, in the order in which they were asked for."""
        of_size = [batch for batch in self.batches if batch.size == size]
        groups = ([batch for batch in of_size if batch.mode == mode] for mode in self.modes)
        return [figures(group) for group in groups if group]

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": "tasks",
            "setting": dict(self.setting),
            "batches": [asdict(batch) for batch in self.batches],
            "memory": [asdict(sample) for sample in self.memory],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TasksReport:
        return cls(
            batches=tuple(
                Batch(**{**each, "tasks": tuple(TaskTimes(**task) for task in each["tasks"])})
                for each in document["batches"]
            ),
            memory=tuple(MemorySample(**each) for each in document["memory"]),
            setting=document["setting"],
        )

    def surprises(self) -> list[str]:
        """Sentences on modes whose tasks were not started as the mode says; their numbers are of something else."""
        found = []
        for mode in self.modes:
            started = sum((Counter(batch.started) for batch in self.batches if batch.mode == mode), Counter())
            wanted = mode.rpartition("-")[2]
            others = {way: number for way, number in started.items() if way != wanted}
            if others:
                counted = ", ".join(f"{number} {way}" for way, number in others.items())
                found.append(f"{mode}: of {started.total()} tasks, these were not started by {wanted}: {counted}")
        return found

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def show(self) -> None:
        for size in self.sizes:
            result.print(table(size, self.figures(size)))
            result.print()
        if self.memory:
            result.print(memory_table(self.memory))
            result.print()
        for sentence in self.surprises():
            result.print(sentence, style="red", markup=False)
        for name, value in self.setting.items():
            result.print(f"{name}: {value}", style="dim", markup=False)


def setting_of(versions: Mapping[str, str]) -> dict[str, str]:
    """The machine and what else the numbers depend on."""
    return {**machine(), **versions}


def table(size: int, rows: Sequence[Figures]) -> Table:
    """The times are those of single tasks; rate and CPU are medians of rounds, with the least and the most behind."""
    title = "One task after another" if size == 1 else f"{size} mapped tasks at once"
    made = _table(title, ("MODE",))
    for heading in ("TASKS", "FAILED"):
        made.add_column(heading, justify="right")
    for what in ("QUEUED→RUNNING", "QUEUED→SUCCESS"):
        made.add_column(f"{what}\nP50", justify="right")
        made.add_column("\nP95", justify="right")
        made.add_column("\nMAX", justify="right")
    made.add_column("SLOT FREE\nP95", justify="right")
    made.add_column("TASKS/S", justify="right")
    made.add_column("CPU S/TASK", justify="right")
    for row in rows:
        made.add_row(
            row.mode,
            str(row.number),
            str(row.failed) if row.failed else "-",
            *_times(row.to_running),
            *_times(row.to_success),
            _percentile(row.release, 95),
            _spread(row.rate),
            _spread(row.cpu),
        )
    return made


def memory_table(samples: Sequence[MemorySample]) -> Table:
    made = _table("Memory (PSS) beyond the idle Airflow's", ("MODE",))
    roles = list(dict.fromkeys(role for sample in samples for role in sample.by_role))
    for heading in ("IDLE", "PEAK", "TASKS", "EACH RUNNING TASK", *(f"OF IT {role.upper()}" for role in roles)):
        made.add_column(heading, justify="right")
    for sample in samples:
        made.add_row(
            sample.mode,
            _mebibytes(sample.idle),
            _mebibytes(sample.peak),
            str(sample.peak_size),
            _mebibytes(sample.beyond_idle / sample.held) if sample.held else "-",
            *(_mebibytes(sample.by_role.get(role, 0) / max(1, sample.held)) for role in roles),
        )
    return made


def _table(title: str, columns: Sequence[str]) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column)
    return made


def _times(series: Series) -> tuple[str, str, str]:
    return _percentile(series, 50), _percentile(series, 95), _percentile(series, 100)


def _percentile(series: Series, percent: float) -> str:
    return _if_any(series, lambda: f"{series.percentile(percent):.3f} s")


def _spread(series: Series) -> str:
    least, most = (min(series.seconds), max(series.seconds)) if series.seconds else (0, 0)
    return _if_any(series, lambda: f"{median(series.seconds):.2f} ({least:.2f}-{most:.2f})")


def _if_any(series: Series, text: Callable[[], str]) -> str:
    return text() if series.seconds else "-"


def _mebibytes(number: float) -> str:
    return f"{number / MIB:.0f} MiB"
