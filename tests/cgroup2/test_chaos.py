"""Processes 1, shims and workers are killed where cgroups are ours: each task is done once, and no directory stays."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from tests.chaos.harness import OF_A_TASK, chaos_on

if TYPE_CHECKING:
    from tests.conftest import Daemon, ImageArchive

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]


def test_each_task_is_done_once_and_nothing_stays(private_containerd: Daemon, image_archive: ImageArchive) -> None:
    with chaos_on(private_containerd, image_archive("no-airflow"), chance=Random(28325)) as chaos:
        chaos.run(OF_A_TASK, 6, pause=1.0, most=len(OF_A_TASK), workers=2)
        chaos.look_for_left()
        print(chaos.figures)
        chaos.assert_all_is_well()
