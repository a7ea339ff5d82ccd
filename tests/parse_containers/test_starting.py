"""From an image to a container that is ready, or to a sentence that says why not; and workers that die meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.parse_containers.conftest import NAMESPACE

from airflow_isolation.errors import ContainerFailed, ImageInvalid, IsolationError
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.parse_containers.conftest import Host

CHECKOUT = Path(__file__).parent.parent.parent


def refusal(host: Host, image: str, *, start_timeout: float = 120) -> IsolationError:
    """Why no container can be started; that nothing stays of it, the fixture checks."""
    with pytest.raises(IsolationError) as caught:
        host.start(image=image, start_timeout=start_timeout)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("no-python", ContainerFailed, "python3"),
        ("no-airflow", ImageInvalid, "has no Airflow"),
        ("other-minor", ImageInvalid, "has Airflow 3.2.0"),
        ("raising", ImageInvalid, "this Airflow is broken"),
        ("loud-and-raising", ImageInvalid, "broken"),
        ("threaded", ImageInvalid, "threads"),
        ("exiting", ContainerFailed, "exit code 9"),
    ],
)
def test_an_image_that_can_not_parse_is_refused_in_words(
    light_host: Host, provide: Callable[..., str], kind: str, error: type[IsolationError], words: str
) -> None:
    image = provide(light_host.daemon, kind)
    refused = refusal(light_host, image)
    assert type(refused) is error
    assert words in str(refused)
    assert image in str(refused)
    assert len(str(refused)) < 8192


def test_an_import_that_hangs_ends_with_its_time(light_host: Host, provide: Callable[..., str]) -> None:
    refused = refusal(light_host, provide(light_host.daemon, "hanging"), start_timeout=2)
    assert type(refused) is ContainerFailed
    assert "not imported" in str(refused)
    assert "start_timeout" in refused.hint


def test_an_image_whose_import_prints_a_lot_works(light_host: Host, provide: Callable[..., str]) -> None:
    container = light_host.start(image=provide(light_host.daemon, "loud"))
    assert light_host.parse(container, "print('parsed')").stdout == "parsed\n"


def test_an_import_that_needs_more_memory_than_there_is_says_so(host: Host) -> None:
    with pytest.raises(ContainerFailed, match="exit code 137 while it imported Airflow") as caught:
        host.start(limits={"memory": 48 * 1024 * 1024})
    assert "memory" in caught.value.hint


class Worker:
    """A process of its own that has a parse container."""

    def __init__(self, host: Host, image: str) -> None:
        self.host = host
        self.id = new_container_id("parse")
        file = host.write("file.py", "import os, time; print('up', flush=True); time.sleep(600)")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.parse_containers.worker"),
                *(host.backend.partition("-")[0], host.daemon.socket, NAMESPACE, host.state_dir, image),
                *(host.bundle, file, self.id),
            ],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{CHECKOUT}/src:{CHECKOUT}"},
        )

    def until_running(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            states = {container.id: container.state for container in self.host.runtime.list()}
            if states.get(self.id) is ContainerState.RUNNING:
                return
            time.sleep(0.05)
        raise AssertionError("the worker's container does not run")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        self.host.runtime.remove(self.id)
        # Its directory is what ``prune`` would remove; here the test does.
        for path in sorted(self.host.state_dir.glob("workloads/*/*")):
            path.unlink()
        for path in self.host.state_dir.glob("workloads/*"):
            path.rmdir()


@pytest.fixture
def start_worker(light_host: Host, provide: Callable[..., str]) -> Iterator[Callable[[str], Worker]]:
    made: list[Worker] = []

    def start(kind: str) -> Worker:
        made.append(Worker(light_host, provide(light_host.daemon, kind)))
        return made[-1]

    yield start
    for worker in made:
        worker.close()


def assert_it_ends(host: Host, id: str) -> None:
    with host.runtime.wait(id) as pending:
        pending.result(30)
    assert host.runtime.get(id).state is ContainerState.STOPPED


def test_a_container_goes_with_its_worker_while_a_file_is_parsed(
    light_host: Host, start_worker: Callable[[str], Worker]
) -> None:
    worker = start_worker("good")
    assert worker.process.stdout
    assert b"up\n" in worker.process.stdout  # after lines of its log
    worker.process.kill()
    assert_it_ends(light_host, worker.id)


def test_a_container_goes_with_its_worker_while_airflow_is_imported(
    light_host: Host, start_worker: Callable[[str], Worker]
) -> None:
    worker = start_worker("hanging")
    worker.until_running()
    worker.process.kill()
    assert_it_ends(light_host, worker.id)


def test_a_volume_of_the_image_is_empty_for_each_file(light_host: Host) -> None:
    container = light_host.start()
    for _ in range(2):
        parsed = light_host.parse(
            container, "import os; print(os.listdir('/spool')); open('/spool/left', 'w').close(); print('written')"
        )
        assert parsed.stdout == "[]\nwritten\n", parsed.stderr
