"""Zygotes that are killed again and again do not make every task import Airflow for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.chaos.harness import chaos_on

if TYPE_CHECKING:
    from random import Random

    from tests.conftest import ImageArchive, StartDaemon

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]


def test_of_many_tasks_no_more_start_fresh_than_zygotes_are_killed(
    chance: Random, start_containerd: StartDaemon, image_archive: ImageArchive
) -> None:
    """An import takes two seconds here, and tasks come two a second. The figures are printed, with those of a run without kills."""
    tasks, kills = 120, 12
    daemon, archive = start_containerd(), image_archive("no-airflow")
    with chaos_on(daemon, archive, chance=chance, image="long-import") as chaos:
        chaos.run((), tasks, workers=8, rate=2.0)
        calm = chaos.figures
        assert (calm.lost, calm.stuck, calm.fresh) == (0, 0, 0)
    with chaos_on(daemon, archive, chance=chance, image="long-import") as chaos:
        chaos.run(("zygote",), tasks, pause=60 / (kills + 1), most=kills, workers=8, rate=2.0)
        chaos.look_for_left()
        print(chaos.figures, f"{calm.seconds:.0f} without", sep="; ")
        chaos.assert_all_is_well()
        assert chaos.figures.fresh <= chaos.figures.injected.total()
