"""A node may die under running tasks, and workers wait for it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.node.conftest import SECONDS, UID, house
from tests.processes import wait_until

from airflow_isolation.errors import HostTrouble
from airflow_isolation.node.run import run_node
from airflow_isolation.node.trees import left_trees
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive
    from tests.node.conftest import House

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]


@pytest.fixture
def host(private_containerd: Daemon, image_archive: ImageArchive) -> Iterator[House]:
    """One whose node a test may hurt."""
    with house("containerd", private_containerd, image_archive("no-airflow")) as found:
        found.start_node()
        yield found


WAIT = "import os, time\nwhile not os.path.exists('%s/go'):\n    time.sleep(0.05)\nprint('done')"


def test_tasks_go_on_when_the_node_is_killed_and_started_again(host: House) -> None:
    workers = [host.work(WAIT % host.bundle, timeout=60) for _ in range(3)]
    for worker in workers:
        worker.said()
    host.kill_node()
    host.start_node()
    (host.bundle / "go").touch()
    for worker in workers:
        ended = worker.said()
        assert (ended["code"], ended["stdout"]) == (0, "done\n")
        # The counters are the container's, and the new node read them.
        assert ended["usage"]["memory_peak"] > 0
    host.wait_until_nothing_is_left()


def test_a_task_that_ends_while_there_is_no_node_ends_well(host: House) -> None:
    worker = host.work(WAIT % host.bundle, timeout=1)
    worker.said()
    host.kill_node()
    (host.bundle / "go").touch()
    ended = worker.said()
    assert (ended["code"], ended["stdout"]) == (0, "done\n")
    assert ended["usage"]["memory_peak"] is None
    worker.process.wait(SECONDS)
    host.start_node()
    host.wait_until_nothing_is_left()


def test_a_node_that_is_told_to_end_takes_its_socket_and_leaves_tasks(host: House) -> None:
    worker = host.work(WAIT % host.bundle, timeout=60)
    worker.said()
    host.end_node()
    assert not host.socket.exists()
    (host.bundle / "go").touch()
    host.start_node()
    assert worker.said()["code"] == 0
    host.wait_until_nothing_is_left()


def test_a_worker_waits_for_a_node_that_is_away(host: House) -> None:
    host.end_node()
    worker = host.work("print('at last')", timeout=60)
    later = threading.Timer(2, host.start_node)
    later.start()
    try:
        worker.said()
        assert worker.said()["stdout"] == "at last\n"
    finally:
        later.join()


def test_a_worker_does_not_wait_for_ever(host: House) -> None:
    host.end_node()
    failed = host.refused(timeout=1)
    assert failed["kind"] == "RuntimeUnreachable"
    assert "Start `airflow containers node`" in failed["failed"]


def test_a_worker_and_its_node_killed_together_leave_nothing(host: House) -> None:
    worker = host.work("import time; time.sleep(600)", hold=True)
    worker.said()
    host.kill_node()
    worker.process.kill()
    worker.process.wait()
    host.start_node()
    host.wait_until_nothing_is_left()


def test_a_node_killed_while_it_starts_tasks_gives_each_one_outcome(host: House) -> None:
    workers = [host.work("print('once')", timeout=60) for _ in range(4)]
    wait_until(lambda: bool(host.runtime.list({labels.PURPOSE: "task"})), SECONDS, "the first container")
    host.kill_node()
    host.start_node()
    outcomes = []
    for worker in workers:
        said = worker.said()
        outcomes.append(said if "failed" in said else worker.said())
    for outcome in outcomes:
        # Put off by its worker, or done; nothing in between.
        assert outcome.get("kind") == "RuntimeUnreachable" or (outcome["code"], outcome["stdout"]) == (0, "once\n")
    host.wait_until_nothing_is_left()


def test_two_nodes_for_one_socket(host: House) -> None:
    first = host.node
    with pytest.raises(AssertionError, match="Another node listens at"):
        host.start_node()
    host.node = first
    host.run("pass")


def test_a_socket_that_is_a_file_is_left_alone(host: House) -> None:
    host.end_node()
    host.socket.write_text("mine")
    with pytest.raises(AssertionError, match="is there, and is no socket"):
        host.start_node()
    host.node = None
    assert host.socket.read_text() == "mine"
    host.socket.unlink()


def test_what_a_killed_node_has_mounted_goes_with_the_next(host: House) -> None:
    host.run("pass")
    (tree,) = (host.state_dir / "trees").iterdir()
    assert f" {tree} " in Path("/proc/self/mountinfo").read_text()
    host.kill_node()
    assert left_trees(host.state_dir, daemon_pid=0, dry_run=True) == (tree,)
    host.start_node()
    assert not list((host.state_dir / "trees").iterdir())
    host.run("pass")
    assert left_trees(host.state_dir, daemon_pid=0, dry_run=True) == (), "what a living node has is not left over"


def test_without_a_node_a_prune_takes_away_what_it_had_mounted(host: House) -> None:
    host.run("pass")
    host.kill_node()
    (tree,) = left_trees(host.state_dir, daemon_pid=0)
    assert not tree.exists()
    assert (host.bundle / "sales.py").exists(), "the worker's directory itself is not touched"


def test_a_node_is_root(host: House) -> None:
    """Whoever starts it otherwise is told so."""
    host.end_node()
    pid = os.fork()
    if pid == 0:
        os.setresuid(UID, UID, UID)
        try:
            run_node(None, configuration=None, connection=None, settings=None)  # type: ignore[arg-type]
        except HostTrouble:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_socket_of_systemd_s_is_served_and_stays(host: House) -> None:
    """As a socket unit hands it over (sd_listen_fds(3)); the node says when it is ready (sd_notify(3))."""
    host.end_node()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        listener.bind(str(host.socket))
        host.socket.chmod(0o666)
        listener.listen()
        notified.bind(str(host.place / "notify"))
        notified.settimeout(SECONDS)
        host.start_node(inherited=listener, NOTIFY_SOCKET=str(host.place / "notify"))
        assert notified.recv(100) == b"READY=1"
        _, ended = host.run("print('served')")
        assert ended["stdout"] == "served\n"
        host.end_node()
        assert host.socket.exists(), "it is systemd's"
