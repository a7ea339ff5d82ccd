"""Tasks on a host with AppArmor: started fresh or forked, they are in the profile that containers have there.

The suite runs in the guest of hack/v2 with AppArmor in use, and has that machine for itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.zygote.at_work.conftest import children, short_lived_worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive
    from tests.zygote.at_work.conftest import Running, Worker

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]

#: Under the name that Docker's has, and as strict in what matters here: no mounts, nobody else's processes.
PROFILE = """
profile docker-default flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (send, receive) peer=docker-default,
  ptrace (trace, read, tracedby, readby) peer=docker-default,
  deny mount,
  deny /tmp/forbidden rw,
}
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = '. "$1"/hack/setup/all.sh; apparmor_directory'
    found = subprocess.run(["bash", "-ec", script, "-", str(ROOT)], stdout=subprocess.PIPE, text=True, check=True)
    text = tmp_path_factory.mktemp("apparmor") / "docker-default"
    text.write_text(PROFILE)
    parser = Path(found.stdout.strip(), "sbin/apparmor_parser")
    subprocess.run([parser, "--replace", "--skip-cache", text], check=True, timeout=60)
    return "docker-default (enforce)"


@pytest.fixture(scope="module")
def worker(profile: str, private_containerd: Daemon, image_archive: ImageArchive) -> Iterator[Worker]:
    with short_lived_worker(private_containerd, image_archive("no-airflow")) as worker:
        yield worker


def label(pid: int) -> str:
    return Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n")


FORBIDDEN = """
print('up', flush=True)
requests.recv(1)
try:
    open("/tmp/forbidden", "w")
    print("allowed")
except PermissionError:
    print("denied")
"""


def ended(running: Running, profile: str) -> str:
    """What a task says that is in the profile, as its process 1 is."""
    running.until(lambda: "up" in running.stdout)
    first = running.workload.container.pid
    assert label(first) == profile
    assert [label(pid) for pid in children(first)] == [profile]
    running.workload.channels.requests.send(b"x")
    assert (running.finish(), running.stderr) == (0, "")
    return running.stdout


def test_a_task_that_starts_fresh(worker: Worker, profile: str) -> None:
    running = worker.run(FORBIDDEN, cfg="start_mode = fresh")
    assert running.start_mode == "fresh"
    assert ended(running, profile) == "up\ndenied\n"
    worker.end()


def test_a_task_that_is_forked(worker: Worker, profile: str) -> None:
    running = worker.run(FORBIDDEN)
    assert (running.start_mode, running.why_fresh) == ("fork", "")
    assert ended(running, profile) == "up\ndenied\n"
    worker.end()


def test_the_next_task_takes_the_same_zygote(worker: Worker) -> None:
    """Which is in no profile: runc would have to write its name into the host's /proc, which is read-only there."""
    task = worker.task()
    before = worker.zygote(task)
    assert label(before.pid) == "unconfined"
    running = worker.start(task)
    assert (running.start_mode, running.finish()) == ("fork", 0)
    assert worker.zygote(task) == before
    worker.end()


def test_docker_s_zygote_and_what_it_forks_are_in_the_profile(
    profile: str, private_dockerd: Daemon, image_archive: ImageArchive
) -> None:
    with short_lived_worker(private_dockerd, image_archive("no-airflow"), "docker") as worker:
        running = worker.run(FORBIDDEN)
        assert (running.start_mode, running.why_fresh) == ("fork", "")
        assert label(worker.zygote(worker.task()).pid) == profile
        assert ended(running, profile) == "up\ndenied\n"
