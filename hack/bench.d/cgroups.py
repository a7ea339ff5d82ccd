"""cgroups: a workload's directory made with five limits and removed, and the statistics of many workloads read.

In the guest of hack/v2, whose kernel has cgroup v2 with its controllers but is slow, and beside it on this host's own
kernel: with the limits where its cgroup v2 has the controllers, and where v1 holds them, the directories alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
MIB = 1024 * 1024
WARM_UP = 3

if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack

    from samples import Report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--number", "-n", type=int, default=50, help="of each, after a warm-up (50)")
    parser.add_argument("--workloads", type=int, default=200, help="whose statistics are read (200)")


def run(options: argparse.Namespace, directory: Path, undo: ExitStack) -> Report:
    """``undo`` is not needed: what is made is removed where it is made, and the guest's goes with the guest."""
    from samples import Report, progress, spread

    del undo
    progress.print("Measuring on this host…")
    host = measure(options.number, options.workloads)
    progress.print("Measuring in the guest of hack/v2…")
    results = directory / "results"
    results.mkdir()
    subprocess.run(
        [
            *(str(HERE.parent / "v2"), f"--writable={results}", sys.executable, __file__),
            *(str(results / "guest.json"), str(options.number), str(options.workloads)),
        ],
        check=True,
    )
    guest = json.loads((results / "guest.json").read_text())
    return Report(
        benchmark="cgroups",
        series=spread({f"guest: {name}": seconds for name, seconds in guest.items()})
        + spread({f"host: {name}": seconds for name, seconds in host.items()}),
        versions={"kernel of the guest": "User-mode Linux"},
    )


def measure(number: int, workloads: int) -> dict[str, list[float]]:
    """Seconds by what was measured. A bystander keeps the levels above, as on a worker that has other tasks."""
    from airflow_isolation.cgroups import (
        NO_LIMITS,
        Cpu,
        Limits,
        Memory,
        Pids,
        Tree,
        make_workload,
        open_cgroup,
        read_statistics,
    )

    mount = unified_mount()
    if mount is None:
        return {}
    five = Limits(cpu=Cpu(cpus=2, weight=200), memory=Memory(max=512 * MIB, swap=0, oom_group=True), pids=Pids(max=256))
    able = five.controllers <= set((mount / "cgroup.controllers").read_text().split())
    limits, words = (five, "with five limits") if able else (NO_LIMITS, "without limits, which v1 holds here")
    tree = Tree(mount=mount, root=f"airflow-bench-{os.getpid()}")
    found: dict[str, list[float]] = defaultdict(list)
    bystanders = []
    try:
        bystanders.append(make_workload(tree, "task_execution", "bystander", limits))
        for turn in range(WARM_UP + number):
            began = time.perf_counter()
            workload = make_workload(tree, "task_execution", f"w{turn}", limits)
            made = time.perf_counter()
            workload.remove()
            removed = time.perf_counter()
            if turn >= WARM_UP:
                found[f"set-up and removal {words}"].append(removed - began)
                found["  set-up"].append(made - began)
                found["  removal"].append(removed - made)
        bystanders += [make_workload(tree, "task_execution", f"s{one}", limits) for one in range(workloads - 1)]
        ids = [workload.id for workload in bystanders]
        for turn in range(WARM_UP + number):
            began = time.perf_counter()
            with open_cgroup(mount, tree.purpose("task_execution")) as level:
                for id in ids:
                    with level.child(id) as cgroup:
                        read_statistics(cgroup)
            if turn >= WARM_UP:
                found[f"statistics of {workloads} workloads"].append(time.perf_counter() - began)
    finally:
        for workload in bystanders:
            workload.remove()
    return dict(found)


def unified_mount() -> Path | None:
    """Where cgroup v2 is mounted; on a hybrid host it has a place of its own."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(fields.split()[4])
    return None


def main() -> None:
    """In the guest."""
    file, number, workloads = sys.argv[1:]
    Path(file).write_text(json.dumps(measure(int(number), int(workloads))))


if __name__ == "__main__":
    main()
