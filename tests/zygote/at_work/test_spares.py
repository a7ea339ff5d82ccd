"""Containers that are made ahead of their tasks: used once, by one, or gone."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from tests.zygote.at_work.conftest import FORMS, NAMESPACE, Running, until

from airflow_isolation.bridge import backstage as backstages
from airflow_isolation.bridge import spare as spares
from airflow_isolation.bridge.abandoned import abandon, notes
from airflow_isolation.bridge.backstage import Backstage
from airflow_isolation.bridge.held import held
from airflow_isolation.bridge.prune import prune
from airflow_isolation.bridge.workload import launch
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import ContainerFailed, RuntimeUnreachable
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.connect import connect
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.zygote.at_work.conftest import Task, Worker

    from airflow_isolation.bridge.started_agent import Launch
    from airflow_isolation.runtime.interface import Container, ContainerRuntime

pytestmark = pytest.mark.root

every_form = pytest.mark.parametrize("form", FORMS, indirect=True)


def connected(worker: Worker) -> ContainerRuntime:
    return connect(
        worker.backend, socket_path=worker.runtime.info().socket_path, namespace=NAMESPACE, state_dir=worker.state_dir
    )


@pytest.fixture
def behind(worker: Worker) -> Iterator[Backstage]:
    backstage = Backstage(connected(worker), state_dir=worker.state_dir)
    yield backstage
    worker.end()
    backstage.close()


@pytest.fixture
def volume() -> Iterator[Path]:
    """A directory for a mount, which a test may replace. (pytest's own lies where only root may enter.)"""
    with tempfile.TemporaryDirectory(prefix="ai-volume-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        place = Path(directory) / "data"
        place.mkdir(mode=0o755)
        (place / "version").write_text("old")
        yield place


def run(worker: Worker, behind: Backstage, task: Task, program: str = "", *, wanted: int = 1) -> Running:
    running = Running(
        launch(
            worker.runtime,
            task.launch,
            state_dir=worker.state_dir,
            plan=task.plan,
            relabel=behind.relabel,
            replenish=partial(behind.replenish, wanted=wanted),
        )
    )
    worker.started.append(running)
    running.send(program)
    return running


def waiting(worker: Worker) -> list[Container]:
    return list(worker.runtime.list({labels.PURPOSE: "spare"}))


def records(worker: Worker) -> list[Path]:
    return sorted(worker.state_dir.glob("spares/*/*.json"))


def beside(worker: Worker, task: Task) -> Launch:
    """The launch of a task as it is beside its zygote, for which spares are made."""
    namespace = task.launch.spec.user_namespace
    assert namespace
    path = f"/proc/{worker.zygote(task).pid}/ns/user"
    assert task.plan
    spec = replace(task.launch.spec, user_namespace=replace(namespace, path=path))
    return replace(task.launch, spec=spec, zygote=task.plan.key)


@every_form
def test_a_task_takes_the_spare_that_was_made_for_it_with_its_labels(worker: Worker, behind: Backstage) -> None:
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)
    task = worker.task()
    second = run(worker, behind, task, "print('in the spare')")
    assert second.workload.container.id == spare.id
    until(lambda: not list(worker.state_dir.glob("spares/*/*.claimed")), "the task's labels")
    assert dict(worker.runtime.get(spare.id).labels) == dict(task.launch.spec.labels)
    assert spare.id in [container.id for container in worker.runtime.list({labels.PURPOSE: "task"})]
    assert (second.finish(), second.stdout, second.start_mode) == (0, "in the spare\n", "fork")
    until(lambda: len(records(worker)) == 1, "the next spare")
    assert spare.id not in [container.id for container in waiting(worker)]


def test_what_gets_its_labels_is_removed_afterwards(
    worker: Worker, behind: Backstage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    order: list[str] = []
    now = threading.Event()
    relabel, remove = behind.runtime.relabel, worker.runtime.remove

    def slowly(id: str, given: Mapping[str, str]) -> None:
        assert now.wait(60)
        relabel(id, given)
        order.append(f"labelled {id}")

    def removed(id: str) -> None:
        order.append(f"removed {id}")
        remove(id)

    monkeypatch.setattr(behind.runtime, "relabel", slowly)
    monkeypatch.setattr(worker.runtime, "remove", removed)
    second = run(worker, behind, worker.task())
    assert second.finish() == 0
    assert order == []
    threading.Timer(0.3, now.set).start()
    worker.end()
    id = second.workload.container.id
    assert order[:2] == [f"labelled {id}", f"removed {id}"]


def test_a_spare_that_can_not_be_removed_now_is_pruned(
    worker: Worker, behind: Backstage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)

    def away(_: str) -> None:
        raise RuntimeUnreachable("a daemon that is away, as this test has it")

    with monkeypatch.context() as patch:
        patch.setattr(worker.runtime, "remove", away)
        spares.discard(worker.runtime, records(worker)[0], state_dir=worker.state_dir)
    assert [container.id for container in waiting(worker)] == [spare.id]
    assert not list(worker.state_dir.glob("spares/*/*"))
    prune(worker.runtime, state_dir=worker.state_dir)
    assert waiting(worker) == []


def test_what_was_abandoned_while_it_is_claimed_is_pruned_when_its_claimant_is_late(
    worker: Worker, behind: Backstage
) -> None:
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)
    claimed = records(worker)[0].with_suffix(".claimed")
    records(worker)[0].rename(claimed)
    abandon(worker.runtime, spare.id, state_dir=worker.state_dir)
    prune(worker.runtime, state_dir=worker.state_dir)
    assert [container.id for container in waiting(worker)] == [spare.id]
    assert spare.id in notes(worker.runtime, worker.state_dir), "or nobody would look again soon"
    os.utime(claimed, (0, 0))
    prune(worker.runtime, state_dir=worker.state_dir)
    assert spare.id not in [container.id for container in worker.runtime.list()]
    prune(worker.runtime, state_dir=worker.state_dir)
    assert notes(worker.runtime, worker.state_dir) == {}


def child_of(worker: Worker, spare: Container) -> int:
    """The child that waits in a spare, as this host sees it."""
    first = worker.runtime.get(spare.id).pid
    namespace = Path(f"/proc/{first}/ns/pid").readlink()
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            is_inside = Path(f"/proc/{process.pid}/ns/pid").readlink() == namespace
            # The one between zygote and child has ended, but the zygote's shim may not have collected it yet.
            if is_inside and process.pid != first and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    (child,) = found
    return child


@every_form
def test_in_a_spare_waits_a_child_that_becomes_the_task(worker: Worker, behind: Backstage) -> None:
    environment = {"ITS_OWN": "1"}
    assert run(worker, behind, worker.task(environment=environment)).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)
    child = child_of(worker, spare)
    open_files = [str(file.readlink()) for file in Path(f"/proc/{child}/fd").iterdir()]
    assert len(open_files) == 1
    assert open_files[0].startswith("socket:")
    status = Path(f"/proc/{child}/status").read_text()
    inside = int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])
    program = "import os; print(os.getpid(), os.getppid(), os.environ['ITS_OWN'])"
    second = run(worker, behind, worker.task(environment=environment), program)
    assert second.finish() == 0
    assert second.workload.container.id == spare.id
    assert second.stdout == f"{inside} 1 1\n"


def test_a_spare_whose_child_has_died_is_forked_into_again(worker: Worker, behind: Backstage) -> None:
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)
    child = child_of(worker, spare)
    os.kill(child, signal.SIGKILL)
    until(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE, "its end")
    second = run(worker, behind, worker.task(), "print('here')")
    assert (second.finish(), second.stdout, second.start_mode) == (0, "here\n", "fork")
    assert second.workload.container.id == spare.id


def test_without_its_zygote_no_spare_is_made(worker: Worker) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    like = beside(worker, task)
    os.kill(worker.zygote(task).pid, signal.SIGKILL)
    with pytest.raises(ContainerFailed):
        spares.make_spare(worker.runtime, like, state_dir=worker.state_dir)
    assert (waiting(worker), records(worker)) == ([], [])
    assert list(worker.state_dir.glob("spares/*/*")) == []


def test_no_more_spares_are_made_than_wanted_and_none_stays(worker: Worker, behind: Backstage) -> None:
    for _ in range(4):
        assert run(worker, behind, worker.task(), wanted=2).finish() == 0
    until(lambda: len(records(worker)) == 2, "two spares")
    worker.end()
    behind.close()
    behind.close()
    assert (waiting(worker), records(worker)) == ([], [])


def test_what_is_being_made_counts_and_what_is_claimed_does_not(worker: Worker, behind: Backstage) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    like = beside(worker, task)
    behind.replenish(like, wanted=1)
    # Its socket is there first, some tenths of a second before the spare.
    until(lambda: bool(list(worker.state_dir.glob("spares/*/*.sock"))), "its beginning")
    assert spares.count_spares(worker.runtime, like, state_dir=worker.state_dir) == 1
    until(lambda: len(records(worker)) == 1, "a spare")
    assert spares.count_spares(worker.runtime, like, state_dir=worker.state_dir) == 1
    with ExitStack() as claimed:
        assert spares.claim(worker.runtime, like, state_dir=worker.state_dir, undo=claimed)
        assert spares.count_spares(worker.runtime, like, state_dir=worker.state_dir) == 0


def test_a_task_that_wants_another_container_gets_its_own(worker: Worker, behind: Backstage) -> None:
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)
    other = run(worker, behind, worker.task(cfg="tmp_size = 7Mi"))
    assert other.finish() == 0
    assert other.workload.container.id != spare.id
    assert spare.id in [container.id for container in waiting(worker)]


@every_form
def test_a_spare_from_before_its_mount_s_source_was_replaced_is_not_used_and_goes(
    worker: Worker, behind: Backstage, volume: Path
) -> None:
    def task() -> Task:
        return worker.task(volumes=[Mount(source=str(volume), target="/data")])

    assert run(worker, behind, task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)
    volume.rename(volume.with_name("before"))
    volume.mkdir(mode=0o755)
    (volume / "version").write_text("new")
    second = run(worker, behind, task(), "print(open('/data/version').read())")
    assert (second.finish(), second.stdout, second.start_mode) == (0, "new\n", "fork")
    assert spare.id not in [container.id for container in worker.runtime.list()]
    until(lambda: len(records(worker)) == 1, "the next spare")
    (spare,) = waiting(worker)
    third = run(worker, behind, task(), "print(open('/data/version').read())")
    assert (third.finish(), third.stdout) == (0, "new\n")
    assert third.workload.container.id == spare.id


def test_a_task_of_an_image_with_links_where_we_mount_is_forked(
    worker: Worker, behind: Backstage, volume: Path
) -> None:
    task = worker.task("linked", volumes=[Mount(source=str(volume), target="/data")])
    program = (
        "for path in ('/etc/resolv.conf', '/etc/hosts', '/data/version'): print(open(path).readline().split()[:2])"
    )
    running = run(worker, behind, task, program)
    assert (running.finish(), running.why_fresh, running.start_mode) == (0, "", "fork")
    assert running.stdout == "['#', 'This']\n['127.0.0.1', 'localhost']\n['old']\n"


def test_two_claims_never_get_the_same(worker: Worker, behind: Backstage) -> None:
    task = worker.task()
    assert run(worker, behind, task).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    like = beside(worker, task)
    with ExitStack() as first, ExitStack() as second:
        assert spares.claim(worker.runtime, like, state_dir=worker.state_dir, undo=first)
        assert spares.claim(worker.runtime, like, state_dir=worker.state_dir, undo=second) is None


def test_a_spare_that_has_died_is_passed_over(worker: Worker, behind: Backstage) -> None:
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: len(records(worker)) == 1, "a spare")
    (spare,) = waiting(worker)
    worker.runtime.kill(spare.id)
    until(lambda: worker.runtime.get(spare.id).state is ContainerState.STOPPED, "its end")
    second = run(worker, behind, worker.task(), "print('here')")
    assert (second.finish(), second.stdout, second.start_mode) == (0, "here\n", "fork")
    assert second.workload.container.id != spare.id
    assert spare.id not in [container.id for container in worker.runtime.list()]


def test_a_spare_that_nobody_wants_ends_and_is_removed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "SPARE_SECONDS", 1.0)
    task = worker.task()
    assert worker.start(task).finish() == 0
    record = spares.make_spare(worker.runtime, beside(worker, task), state_dir=worker.state_dir)
    until(lambda: worker.runtime.get(record.stem).state is ContainerState.STOPPED, "its end")
    os.utime(record, (time.time() - 2, time.time() - 2))
    spares.prune_spares(worker.runtime, state_dir=worker.state_dir)
    assert (waiting(worker), records(worker)) == ([], [])


def test_while_no_task_comes_nothing_is_kept_ready(
    worker: Worker, behind: Backstage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (spares, backstages):
        monkeypatch.setattr(module, "SPARE_SECONDS", 1.0)
    monkeypatch.setattr(backstages, "LOOK_EVERY", 0.2)
    assert run(worker, behind, worker.task()).finish() == 0
    until(lambda: bool(records(worker)), "a spare")
    until(lambda: not waiting(worker) and not records(worker), "its end, with no task to cause it")


def test_what_a_claimant_left_that_died_is_pruned(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "CLAIM_SECONDS", 0.0)
    task = worker.task()
    assert worker.start(task).finish() == 0
    record = spares.make_spare(worker.runtime, beside(worker, task), state_dir=worker.state_dir)
    record.rename(record.with_suffix(".claimed"))
    with held(record.with_suffix("")):
        spares.prune_spares(worker.runtime, state_dir=worker.state_dir)
        assert worker.runtime.get(record.stem).state is ContainerState.RUNNING
    spares.prune_spares(worker.runtime, state_dir=worker.state_dir)
    assert waiting(worker) == []


KILLED = """
import os, pickle, sys
from pathlib import Path
from airflow_isolation.bridge.spare import make_spare
from airflow_isolation.runtime.connect import connect
backend, socket_path, namespace, state_dir = sys.argv[1:]
with connect(backend, socket_path=socket_path, namespace=namespace, state_dir=Path(state_dir)) as runtime:
    print(make_spare(runtime, pickle.load(sys.stdin.buffer), state_dir=Path(state_dir)), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_the_spares_of_a_worker_that_was_killed_are_pruned(worker: Worker) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    like = beside(worker, task)
    # Frozen mappings can't be pickled.
    plain = replace(like, spec=replace(like.spec, env=dict(like.spec.env), labels={}))
    arguments = [worker.backend, worker.runtime.info().socket_path, NAMESPACE, str(worker.state_dir)]
    maker = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        input=pickle.dumps(plain),
        stdout=subprocess.PIPE,
        timeout=90,
        check=False,
    )
    assert maker.returncode == -signal.SIGKILL
    (record,) = records(worker)
    assert maker.stdout.decode().splitlines()[-1] == str(record)
    pruned = prune(worker.runtime, state_dir=worker.state_dir)
    assert [container.id for container in pruned.containers] == [record.stem]
    until(lambda: not list(worker.state_dir.glob("spares/*/*")), "the files' end")
