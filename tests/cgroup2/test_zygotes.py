"""Forked into containers on cgroup v2: the child is in the container's cgroup before it runs, and nothing stays."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.zygote.at_work.conftest import NAMESPACE, Running, children, short_lived_worker, until

from airflow_isolation.bridge.backstage import Backstage
from airflow_isolation.bridge.workload import launch
from airflow_isolation.cgroups import Limit
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive
    from tests.zygote.at_work.conftest import Task, Worker

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def worker(private_containerd: Daemon, image_archive: ImageArchive) -> Iterator[Worker]:
    with short_lived_worker(private_containerd, image_archive("no-airflow")) as worker:
        yield worker
    assert not list(Path("/sys/fs/cgroup").rglob("task-*"))
    assert not list(Path("/sys/fs/cgroup").rglob("zygote-*"))


def cgroup_of(pid: int) -> str:
    (line,) = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return line


def forked(worker: Worker, task: Task, program: str) -> Running:
    running = worker.start(task, program)
    assert (running.start_mode, running.why_fresh) == ("fork", "")
    return running


def test_a_task_is_forked_into_its_container_s_cgroup(worker: Worker) -> None:
    running = forked(
        worker, worker.task(cfg="memory = 100Mi"), "print('up', flush=True); requests.recv(1); raise SystemExit(7)"
    )
    running.until(lambda: "up" in running.stdout)
    first = running.workload.container.pid
    (child,) = children(first)
    assert cgroup_of(child) == cgroup_of(first)
    assert running.workload.container.id in cgroup_of(child)
    cgroup = Path("/sys/fs/cgroup" + cgroup_of(first).partition("::")[2]).parent
    assert (cgroup / "memory.max").read_text() == f"{100 * 2**20}\n"
    running.workload.channels.requests.send(b"x")
    assert running.finish() == 7
    worker.end()
    assert not cgroup.exists()


def test_of_a_forked_task_that_is_killed_for_memory_the_limit_is_named(worker: Worker) -> None:
    running = forked(worker, worker.task(cfg="memory = 60Mi"), "eaten = bytearray(200_000_000)")
    assert running.finish() == -9
    assert running.workload.ending is not None
    verdict = running.workload.ending.out_of_memory
    assert verdict is not None
    assert (verdict.fatal, verdict.limit, verdict.size) == (True, Limit.OWN, 60 * 2**20)
    worker.end()


def test_a_spare_waits_in_its_own_cgroup_and_becomes_the_next_task(worker: Worker) -> None:
    behind = Backstage(
        connect(
            "containerd", socket_path=worker.runtime.info().socket_path, namespace=NAMESPACE, state_dir=worker.state_dir
        ),
        state_dir=worker.state_dir,
    )

    def run(program: str) -> Running:
        task = worker.task()
        replenish = partial(behind.replenish, wanted=1)
        running = Running(
            launch(worker.runtime, task.launch, state_dir=worker.state_dir, plan=task.plan, replenish=replenish)
        )
        worker.started.append(running)
        running.send(program)
        return running

    try:
        assert run("").finish() == 0
        until(lambda: len(list(worker.state_dir.glob("spares/*/*.json"))) == 1, "a spare")
        (record,) = worker.state_dir.glob("spares/*/*.json")
        second = run("print('in the spare')")
        assert (second.workload.container.id, second.start_mode) == (record.stem, "fork")
        assert (second.finish(), second.stdout) == (0, "in the spare\n")
        worker.end()
    finally:
        behind.close()
    assert list(worker.state_dir.glob("spares/*/*")) == []


def test_with_the_host_s_network_a_task_sees_its_own_cgroup_in_the_host_s_sys(
    private_containerd: Daemon, image_archive: ImageArchive
) -> None:
    with short_lived_worker(private_containerd, image_archive("no-airflow"), "host-network") as worker:
        program = "print(open('/proc/self/cgroup').read(), open('/sys/fs/cgroup/memory.max').read(), end='')"
        running = forked(worker, worker.task(cfg="memory = 100Mi"), program)
        assert (running.finish(), running.stdout) == (0, f"0::/\n {100 * 2**20}\n")


def test_tasks_are_forked_into_crun_s_containers_too(private_containerd: Daemon, image_archive: ImageArchive) -> None:
    crun = shutil.which("crun", path=private_containerd.path)
    assert crun is not None
    with short_lived_worker(private_containerd, image_archive("no-airflow"), runtime_binary=crun) as worker:
        running = forked(worker, worker.task(), "print('there')")
        assert (running.finish(), running.stdout) == (0, "there\n")
