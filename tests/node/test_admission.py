"""A host on which not all tasks fit at a time."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from tests.node.conftest import house

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive
    from tests.node.conftest import House

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

SLEEP = "import time; time.sleep(600)"
HALF = {"resources": {"memory": "256Mi"}}
ROOM = "capacity_memory = 512Mi\nadmission_timeout = 5m\n"


@pytest.fixture
def small_host(private_containerd: Daemon, image_archive: ImageArchive) -> Iterator[House]:
    with house("containerd", private_containerd, image_archive("no-airflow")) as found:
        found.start_node(settings=ROOM)
        yield found
        found.end_workers()
        found.wait_until_nothing_is_left()


def test_a_task_waits_until_another_has_ended(small_host: House) -> None:
    first, second = (small_host.work(SLEEP, hold=True, written=HALF) for _ in range(2))
    ids = {worker.said()["id"] for worker in (first, second)}
    third = small_host.work("print('at last')", written=HALF, waits=True)
    assert third.said()["waits"].startswith("256 MiB. Of this host's 512 MiB running tasks (2) have 512 MiB")
    first.tell(f"signal {int(signal.SIGTERM)}")
    assert first.said()["code"] == -signal.SIGTERM
    assert third.said()["id"] not in ids
    assert third.said()["stdout"] == "at last\n"


def test_a_killed_worker_makes_room_while_it_runs_and_while_it_waits(small_host: House) -> None:
    running = small_host.work(SLEEP, hold=True, written={"resources": {"memory": "512Mi"}})
    running.said()
    waiting = small_host.work(SLEEP, written=HALF, waits=True)
    waiting.said()
    waiting.process.kill()
    running.process.kill()
    _, ended = small_host.run("print('room')", written={"resources": {"memory": "512Mi"}})
    assert ended["stdout"] == "room\n"


def test_what_never_fits_is_refused_and_what_waits_too_long_is_put_off(small_host: House) -> None:
    refused = small_host.refused(written={"resources": {"memory": "1Gi"}})
    assert refused["kind"] == "SpecRefused"
    assert "asks for 1 GiB, and this host has 512 MiB for all tasks" in refused["failed"]
    small_host.work(SLEEP, hold=True, written={"resources": {"memory": "512Mi"}}).said()
    put_off = small_host.refused(written=HALF, changed={"pull_timeout": 0.5})
    assert put_off["kind"] == "HostTrouble"
    assert "no room for the task within" in put_off["failed"]


def test_a_request_is_counted_on_every_host(small_host: House) -> None:
    """Also where the kernel can't spare the memory."""
    written = {"resources": {"memory": "400Mi", "memory_request": "64Mi"}}
    workers = [small_host.work(SLEEP, hold=True, written=written) for _ in range(3)]
    assert len({worker.said()["id"] for worker in workers}) == len(workers)


def test_the_next_node_counts_what_runs(small_host: House) -> None:
    running = small_host.work(SLEEP, hold=True, written={"resources": {"memory": "512Mi"}})
    running.said()
    small_host.kill_node()
    small_host.start_node(settings=ROOM)
    waiting = small_host.work("print('at last')", written=HALF, waits=True)
    assert "running tasks (1) have 512 MiB" in waiting.said()["waits"]
    os.kill(running.process.pid, signal.SIGKILL)
    # It is told again, every half a minute, until the node has seen the end.
    while "waits" in waiting.said():
        pass
    assert waiting.said()["stdout"] == "at last\n"
