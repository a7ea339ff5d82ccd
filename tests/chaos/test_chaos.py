"""Somebody is killed now and then while tasks run: each is done once, and nothing stays on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.chaos.harness import chaos_on

if TYPE_CHECKING:
    from random import Random

    from tests.conftest import Daemon, ImageArchive

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]


def test_each_task_is_done_once_and_nothing_stays(
    *,
    fragile_daemon: Daemon,
    runtime_binary: str,
    faults: tuple[str, ...],
    tasks: int,
    chance: Random,
    image_archive: ImageArchive,
) -> None:
    archive = image_archive("no-airflow")
    with chaos_on(fragile_daemon, archive, chance=chance, runtime_binary=runtime_binary) as chaos:
        chaos.run(faults, tasks)
        chaos.look_for_left()
        print(chaos.figures)
        chaos.assert_all_is_well()
