"""The picture of a `hack/bench tasks` report: latency, throughput, CPU time and memory of a task, by mode."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import made_ready
from task_figures import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from task_figures import TasksReport

#: What the reader is to compare stands out.
COLOURS = {"stock": "#6b7785", "fork": "#137a54", "docker-fork": "#59ad8c"}
OTHER = "#c2a06a"
QUIET = "#777777"


@dataclass(frozen=True)
class Bar:
    """A value with the least and the most that were seen, or what else its whisker shows."""

    mode: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """Bars of one unit."""

    title: str
    form: str
    bars: tuple[Bar, ...]


def panels(report: TasksReport) -> list[Panel]:
    """Those for which there are samples: the smallest size tells the latency, the largest the throughput."""
    small, large = min(report.sizes), max(report.sizes)
    found = []
    latency = tuple(
        Bar(each.mode, each.to_success.percentile(50), each.to_success.percentile(50), each.to_success.percentile(95))
        for each in report.figures(small)
        if each.to_success.seconds
    )
    found.append(Panel(f"{_tasks(small)}: queued → success,\np50 and p95", "{:.2f} s", latency))
    if large > 1:
        rates = {each.mode: each.rate.seconds for each in report.figures(large)}
        found.append(Panel(f"{_tasks(large)}:\ntasks per second", "{:.1f}", _medians(rates)))
    cpu = {each.mode: each.cpu.seconds for each in report.figures(large)}
    found.append(Panel(f"{_tasks(large)}:\nCPU seconds per task", "{:.2f} s", _medians(cpu)))
    memory = {sample.mode: (sample.beyond_idle / sample.held / MIB,) for sample in report.memory if sample.held}
    found.append(Panel("Each running task:\nmemory (PSS)", "{:.0f} MiB", _medians(memory)))
    return [panel for panel in found if panel.bars]


def _tasks(size: int) -> str:
    return "One task" if size == 1 else f"{size} mapped tasks"


def _medians(values: Mapping[str, tuple[float, ...]]) -> tuple[Bar, ...]:
    return tuple(Bar(mode, median(each), min(each), max(each)) for mode, each in values.items() if each)


def draw(report: TasksReport, directory: Path) -> None:
    """Write tasks.svg and tasks.png; the same samples give the same files."""
    made_ready.python_packages("plotting_directory")
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tasks", "font.size": 9, "font.family": "sans-serif"})
    from matplotlib import pyplot as plt

    shown, modes = panels(report), report.modes
    height = 1.1 + 0.36 * len(modes)
    figure, rows = plt.subplots(1, len(shown), figsize=(3.0 * len(shown) + 0.8, height), sharey=True, squeeze=False)
    for axes, panel in zip(rows[0], shown, strict=True):
        _draw_panel(axes, panel, modes)
    figure.text(0.01, 0.02, _caption(report), fontsize=6.5, color=QUIET)
    figure.tight_layout(rect=(0, 0.06, 1, 1), w_pad=1.5)
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / "tasks.svg", metadata={"Date": None})
    figure.savefig(directory / "tasks.png", dpi=160)
    plt.close(figure)


def _draw_panel(axes: Any, panel: Panel, modes: list[str]) -> None:
    places = {mode: len(modes) - 1 - place for place, mode in enumerate(modes)}
    for bar in panel.bars:
        y = places[bar.mode]
        axes.barh(y, bar.value, height=0.62, color=COLOURS.get(bar.mode, OTHER))
        if bar.high > bar.low:
            axes.plot([bar.low, bar.high], [y, y], color="#222222", linewidth=0.8)
        axes.annotate(
            panel.form.format(bar.value),
            (max(bar.value, bar.high), y),
            textcoords="offset points",
            xytext=(4, 0),
            va="center",
        )
    axes.set_title(panel.title, loc="left", fontsize=9)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_xticks([])
    # Room for the value behind the longest bar.
    axes.set_xlim(0, 1.35 * max(bar.high for bar in panel.bars))
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _caption(report: TasksReport) -> str:
    keys = ("cores", "processor", "kernel", "airflow", "containerd", "docker", "database", "parallelism")
    return " · ".join(f"{key}: {report.setting[key]}" for key in keys if key in report.setting)
