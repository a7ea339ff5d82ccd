"""list: `airflow containers list` over many containers, and the bare `airflow version` beside it.

What the command costs beyond the start of Airflow's command line is the difference of the two.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from importlib.metadata import version
from typing import TYPE_CHECKING

from private_daemon import start_daemon, stop_daemon, test_image
from samples import Report, progress, spread, step

from airflow_isolation.container_spec import ContainerSpec
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from contextlib import ExitStack
    from pathlib import Path

WARM_UP = 1
RUN_SECONDS = 120
LIST, VERSION = "airflow containers list", "airflow version"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--number", "-n", type=int, default=10, help="samples of each, after a warm-up (10)")
    parser.add_argument("--containers", type=int, default=200, help="how many run (200)")
    parser.add_argument("--backend", default="containerd", choices=["containerd", "docker"])


def run(options: argparse.Namespace, directory: Path, undo: ExitStack) -> Report:
    image = test_image("main")
    progress.print(f"Starting a private {options.backend} and importing {image.name}…")
    undo.callback(stop_daemon, directory / "d")
    daemon = start_daemon(options.backend, directory / "d")
    with daemon.connect(directory / "state") as runtime:
        runtime.import_image(image.archive)
        reference = runtime.ensure_image(image.name).reference
        for number in range(options.containers):
            step(f"Starting container {number + 1} of {options.containers}")
            id = new_container_id("task")
            spec = ContainerSpec(image=reference, argv=("sleep", "infinity"), network="none", labels=_labels(number))
            runtime.create(id, spec)
            runtime.start(id)
        step("")
        environment = {
            **os.environ,
            # As an installed package is: compiled. The checkout is kept free of it.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(directory / "compiled"),
            "AIRFLOW_HOME": str(directory / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": options.backend,
            f"AIRFLOW__{options.backend.upper()}_RUNTIME__SOCKET_PATH": daemon.socket,
            "AIRFLOW__CONTAINER_RUNTIME__IMAGE": image.name,
            "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(directory / "state"),
        }
        taken: dict[str, list[float]] = {LIST: [], VERSION: []}
        for turn in range(WARM_UP + options.number):
            step(f"Round {turn + 1} of {WARM_UP + options.number}")
            for command, seconds in taken.items():
                began = time.perf_counter()
                lines = _run(command, environment)
                if turn >= WARM_UP:
                    seconds.append(time.perf_counter() - began)
                if command == LIST and len(lines) < options.containers:
                    raise RuntimeError(f"{LIST} showed {len(lines)} lines for {options.containers} containers")
        step("")
    listed, bare = spread(taken)
    beyond = spread({f"{LIST} beyond {VERSION}": [a - b for a, b in zip(listed.seconds, bare.seconds, strict=True)]})
    return Report(
        benchmark="list",
        series=(listed, bare, *beyond),
        versions={options.backend: daemon.version, "airflow": version("apache-airflow")},
    )


def _run(command: str, environment: Mapping[str, str]) -> list[str]:
    done = subprocess.run(
        command.split(),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=RUN_SECONDS,
        check=True,
    )
    return done.stdout.splitlines()


def _labels(number: int) -> dict[str, str]:
    return {
        labels.PURPOSE: "task",
        labels.DAG_ID: f"dag_{number % 20}",
        labels.TASK_ID: f"task_{number}",
        labels.RUN_ID: "manual__2026-01-01T00:00:00+00:00",
        labels.MAP_INDEX: "-1",
        labels.TRY_NUMBER: "1",
        labels.TI_ID: str(uuid.uuid4()),
        labels.BUNDLE: "dags-folder",
        labels.DAG_FILE: f"dag_{number % 20}.py",
        labels.OWNER: str(labels.Owner.this_process()),
    }
