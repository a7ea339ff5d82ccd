"""Somebody is killed now and then while tasks run: each is done once, and nothing stays on the host."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from tests.airflow_home import own_cgroup_parent, short_directory
from tests.chaos.harness import OF_A_TASK, Chaos
from tests.end_to_end.traces import all_but, household, traces
from tests.zygote.at_work import stand_ins

from airflow_isolation.runtime import labels
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from random import Random

    from tests.conftest import ImageArchive, StartDaemon

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]

#: Within the grace period, which these tasks have 2 seconds of, and 30 seconds nothing may be left.
LEFT_AFTER = 32.0
TABLE = "\n| fault | injected | lost | doubled | stuck | left after grace + 30 s | tries used up before user code |\n|---|---|---|---|---|---|---|"


def test_each_task_is_done_once_and_nothing_stays(
    *,
    backend: str,
    faults: tuple[str, ...],
    tasks: int,
    chance: Random,
    start_containerd: StartDaemon,
    start_dockerd: StartDaemon,
    image_archive: ImageArchive,
) -> None:
    daemon = start_dockerd() if backend == "docker" else start_containerd()
    with ExitStack() as undo:
        place = undo.enter_context(short_directory("ai-chaos-"))
        parent = undo.enter_context(own_cgroup_parent("ai-chaos-"))
        bundle, shared, state_dir = place / "dags", place / "shared", place / "s"
        bundle.mkdir(mode=0o755)
        shared.mkdir()
        shared.chmod(0o777)
        witness = shared / "witness"
        witness.touch()
        witness.chmod(0o666)
        runtime = undo.enter_context(
            connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=state_dir)
        )
        runtime.import_image(stand_ins.stand_in(image_archive("no-airflow"), place / "good.tar", "good"))
        arguments = [backend, str(daemon.socket), str(state_dir), stand_ins.reference("good"), str(bundle)]
        log = place / "workers.log"
        chaos = Chaos(
            daemon=daemon,
            runtime=runtime,
            state_dir=state_dir,
            arguments=[*arguments, str(shared), parent],
            log=log,
            chance=chance,
        )
        undo.callback(chaos.close)
        chaos.run(faults, tasks, witness=witness, pause=3.0, seconds=300 + 5 * tasks)

        def left() -> dict[str, list[str]]:
            return all_but(traces(daemon, state_dir, parent), household(daemon, state_dir))

        # Its workers live; what is seen at both ends of that time has stayed.
        first, deadline = left(), time.monotonic() + LEFT_AFTER
        while first and time.monotonic() < deadline:
            time.sleep(1)
            now = left()
            first = {kind: both for kind, had in first.items() if (both := [e for e in had if e in now.get(kind, ())])}
        chaos.figures.left = first
        print(TABLE, chaos.figures, sep="\n")
        said = log.read_text(errors="replace")[-6000:]
        chaos.close()
        for container in runtime.list({labels.PURPOSE: "zygote"}):
            runtime.remove(container.id)
        figures = chaos.figures
        assert figures.injected.total() > 0
        assert (figures.lost, figures.doubled, figures.stuck, figures.left) == (0, 0, 0, {}), said
        assert figures.tries == 0 or set(faults).intersection(OF_A_TASK), said
