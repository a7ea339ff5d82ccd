"""start: from nothing to a container whose agent has said hello, and ctr and docker beside it.

The three take turns, so that what else the machine does hits all alike. Ours ends with the agent's hello: from there on
it is Airflow that works. ctr's and docker's is their whole command, `python3 -ISc pass` in a container of its own.
"""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from private_daemon import start_daemon, stop_daemon, test_image
from samples import Report, progress, ratio, spread, step

from airflow_isolation import agent
from airflow_isolation.bridge.agent_socket import AgentListener
from airflow_isolation.container_spec import ContainerSpec, Mount
from airflow_isolation.oci.identifier import new_container_id

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from private_daemon import Daemon, TestImage

    from airflow_isolation.runtime.interface import ContainerRuntime

WARM_UP = 3
HELLO_SECONDS = 60.0
RUN_SECONDS = 120
PASS = ("python3", "-ISc", "pass")
OURS, CTR, DOCKER = "create → hello", "ctr run --rm", "docker run --rm"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--number", "-n", type=int, default=30, help="samples of each, after a warm-up (30)")
    parser.add_argument("--version", default="2.1", choices=["1.6", "1.7", "2.1"], help="of containerd (2.1)")


def run(options: argparse.Namespace, directory: Path, undo: ExitStack) -> Report:
    image = test_image("main")
    containerd = _daemon("containerd", directory / "c", image, undo, version=options.version)
    docker = _daemon("docker", directory / "d", image, undo)
    state_dir = directory / "state"
    runtime = undo.enter_context(containerd.connect(state_dir))
    resolved = runtime.ensure_image(image.name)

    stages: dict[str, list[float]] = defaultdict(list)
    totals: dict[str, list[float]] = {OURS: [], CTR: [], DOCKER: []}
    for turn in range(WARM_UP + options.number):
        step(f"Round {turn + 1} of {WARM_UP + options.number}")
        steps = until_hello(runtime, resolved.reference, state_dir)
        by_ctr = _timed(containerd, "ctr", "run", "--rm", image.name, f"bench-{turn}", *PASS)
        # The image's ENTRYPOINT is not run by us, and must not be by docker.
        cleared = ("--network", "none", "--entrypoint", PASS[0], image.name, *PASS[1:])
        by_docker = _timed(docker, "docker", "run", "--rm", *cleared)
        if turn < WARM_UP:
            continue
        remove = steps.pop("remove")
        totals[OURS].append(sum(steps.values()))
        totals[CTR].append(by_ctr)
        totals[DOCKER].append(by_docker)
        for name, seconds in {**steps, "remove (not counted)": remove}.items():
            stages[name].append(seconds)
    step("")
    ours, ctr, dockers = spread(totals)
    return Report(
        benchmark="start",
        series=(ours, *spread(stages, part_of=OURS), ctr, dockers),
        ratios={**ratio(ours, ctr), **ratio(ours, dockers)},
        versions={
            "containerd": containerd.version,
            "docker": docker.version,
            "airflow": version("apache-airflow"),
            "grpcio": version("grpcio"),
        },
    )


def until_hello(runtime: ContainerRuntime, image: str, state_dir: Path) -> dict[str, float]:
    """The steps of ``bridge.workload.launch`` up to the hello, each with its seconds, and then the removal."""
    id = new_container_id("task")
    directory = state_dir / "workloads" / id
    steps = {}
    clock = _Clock()
    with ExitStack() as stack:
        directory.mkdir(parents=True, mode=0o755)
        agent.copy_to(directory)
        listener = AgentListener(directory)
        stack.callback(listener.close)
        steps["directory, socket"] = clock.lap()
        runtime.create(id, _spec(image, directory))
        stack.callback(runtime.remove, id)
        steps["create"] = clock.lap()
        pending = stack.enter_context(runtime.wait(id))
        steps["wait asked"] = clock.lap()
        pid = runtime.start(id)
        steps["start"] = clock.lap()
        connection, _ = listener.accept(pid=pid, ended=pending, timeout=HELLO_SECONDS)
        stack.callback(connection.close)
        steps["hello"] = clock.lap()
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    steps["remove"] = clock.lap()
    return steps


def _spec(image: str, directory: Path) -> ContainerSpec:
    spec = ContainerSpec(image=image, argv=("python3", f"{agent.DIRECTORY}/{agent.AGENT_NAME}"), network="none")
    return replace(spec, mounts=(Mount(source=str(directory.resolve()), target=agent.DIRECTORY),))


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def _daemon(kind: str, directory: Path, image: TestImage, undo: ExitStack, *, version: str = "") -> Daemon:
    progress.print(f"Starting a private {kind} and importing {image.name}…")
    undo.callback(stop_daemon, directory)
    daemon = start_daemon(kind, directory, version=version)
    with daemon.connect(directory / "import") as runtime:
        runtime.import_image(image.archive)
    return daemon


def _timed(daemon: Daemon, *command: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        command,
        env=daemon.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=RUN_SECONDS,
        check=True,
    )
    return time.perf_counter() - began
