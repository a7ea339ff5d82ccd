"""Zygotes that die, hang or can't be, workers and containers that die: tasks are started all the same, or nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import freeze
from tests.zygote.at_work.conftest import FORMS, children, left_of_tasks, until

from airflow_isolation.bridge import process_one, started_agent
from airflow_isolation.bridge import workload as workloads
from airflow_isolation.bridge import zygote as zygotes
from airflow_isolation.bridge.prune import prune
from airflow_isolation.errors import ContainerFailed
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from tests.zygote.at_work.conftest import Task, Worker

pytestmark = pytest.mark.root

every_form = pytest.mark.parametrize("form", FORMS, indirect=True)

WAIT = "import sys; print('up', flush=True); requests.recv(1); print('on')"


def kill(pid: int) -> None:
    """As the kernel does when memory is short; and see it dead."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_dead(pid), "the death of a process")


def is_dead(pid: int) -> bool:
    """A zombie is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@every_form
def test_a_task_is_forked_and_ends_as_it_should(worker: Worker) -> None:
    running = worker.run("import os, sys; print('here', os.getuid()); sys.exit(7)")
    assert (running.start_mode, running.why_fresh) == ("fork", "")
    assert (running.finish(), running.stdout, running.stderr) == (7, "here 50000\n", "")


@every_form
@pytest.mark.parametrize("start_mode", ["fork", "fresh"])
def test_what_a_task_prints_can_be_opened_by_its_path(worker: Worker, start_mode: str) -> None:
    program = (
        "import subprocess\nsubprocess.run(['sh', '-c', 'echo first; echo second >/dev/stdout; echo err >/dev/stderr'])\n"
        "with open('/dev/stdout', 'w') as out: print('third', file=out)"
    )
    running = worker.run(program, cfg=f"start_mode = {start_mode}")
    assert (running.finish(), running.start_mode) == (0, start_mode)
    assert (running.stdout, running.stderr) == ("first\nsecond\nthird\n", "err\n")


def test_a_task_without_a_programs_directory_in_the_path_is_forked(worker: Worker) -> None:
    cfg = "\n[container_runtime_environment]\nPYTHONSAFEPATH = 1"
    running = worker.run("import sys; print(any('airflow-isolation' in path for path in sys.path))", cfg=cfg)
    assert (running.finish(), running.start_mode, running.why_fresh, running.stdout) == (0, "fork", "", "False\n")


@every_form
def test_a_zygote_that_is_killed_harms_no_running_task_and_is_replaced(worker: Worker) -> None:
    first = worker.run(WAIT)
    first.until(lambda: "up" in first.stdout)
    before = worker.zygote(worker.task())
    kill(before.pid)
    first.workload.channels.requests.send(b"x")
    assert (first.finish(), first.stdout) == (0, "up\non\n")
    second = worker.run("print('there')")
    assert (second.finish(), second.start_mode, second.stdout) == (0, "fork", "there\n")
    assert worker.zygote(worker.task()).container != before.container
    assert before.container not in [container.id for container in worker.runtime.list()]


def at_answer(monkeypatch: pytest.MonkeyPatch, awaited: str, act: Callable[[int], None]) -> None:
    """Do something when the worker has that answer, before it acts on it. ``act`` gets the pid of who gave it."""
    answer = zygotes._answer

    def answered(connection: socket.socket, expected: str) -> int:
        pid = answer(connection, expected)
        if expected == awaited:
            act(pid)
        return pid

    monkeypatch.setattr(zygotes, "_answer", answered)


@every_form
def test_work_that_is_too_large_for_one_packet_fails_in_words(worker: Worker) -> None:
    """Fresh is no way out: process 1 watches the forked child by then."""
    task = worker.task()
    assert worker.start(task).finish() == 0
    large = {**task.launch.environment, "LARGE": "x" * 1_000_000}
    with pytest.raises(ContainerFailed, match="is too large to be handed to a forked process") as failed:
        worker.start(replace(task, launch=replace(task.launch, id=new_container_id("task"), environment=large)))
    assert "must stay below 200 KB" in str(failed.value.hint)
    assert worker.run().finish() == 0


@pytest.mark.parametrize("awaited", ["forked", "entered"])
def test_a_zygote_that_is_killed_during_a_fork(worker: Worker, monkeypatch: pytest.MonkeyPatch, awaited: str) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    before = worker.zygote(task)
    at_answer(monkeypatch, awaited, lambda _: kill(before.pid))
    running = worker.run("print('there')")
    assert (running.finish(), running.stdout, running.stderr) == (0, "there\n", "")
    monkeypatch.undo()
    following = worker.run()
    assert (following.finish(), following.start_mode) == (0, "fork")


@pytest.mark.parametrize("awaited", ["forked", "entered"])
def test_a_child_that_is_killed_on_its_way(worker: Worker, monkeypatch: pytest.MonkeyPatch, awaited: str) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    before = worker.zygote(task)
    at_answer(monkeypatch, awaited, kill)
    running = worker.run("print('there')")
    assert (running.finish(), running.stdout, running.start_mode) == (0, "there\n", "fresh")
    monkeypatch.undo()
    assert worker.run().finish() == 0
    assert worker.zygote(task) == before


def test_a_zygote_that_died_before_its_container_was_made(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user namespace, which the container was to join, is gone with it."""
    task = worker.task()
    assert worker.start(task).finish() == 0
    before = worker.zygote(task)
    start = started_agent.start_agent

    def start_late(*arguments: Any, **more: Any) -> Any:
        if not is_dead(before.pid):
            kill(before.pid)
        return start(*arguments, **more)

    monkeypatch.setattr(workloads, "start_agent", start_late)
    running = worker.run("print('there')")
    assert (running.finish(), running.stdout, running.start_mode) == (0, "there\n", "fork")


@every_form
@pytest.mark.parametrize("when", ["before", "forked"])
def test_a_zygote_that_hangs_is_replaced(worker: Worker, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.setattr(zygotes, "ANSWER_TIMEOUT", 2.0)
    task = worker.task()
    assert worker.start(task).finish() == 0
    before = worker.zygote(task)
    if when == "before":
        freeze(before.pid)
    else:
        at_answer(monkeypatch, "forked", freeze)
    running = worker.run("print('there')")
    assert (running.start_mode, running.finish(), running.stdout) == ("fresh", 0, "there\n")
    assert "did not answer within 2 seconds" in running.why_fresh
    monkeypatch.undo()
    following = worker.run()
    assert (following.finish(), following.start_mode) == (0, "fork")
    assert worker.zygote(task).container != before.container
    until(lambda: not Path(f"/proc/{before.pid}").exists(), "the end of the zygote that hung")


def test_a_container_that_dies_before_it_is_entered(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    before = worker.zygote(task)
    read = process_one.read_process_one

    def read_and_kill(pid: int, **more: Any) -> Any:
        one = read(pid, **more)
        kill(pid)
        return one

    monkeypatch.setattr(zygotes, "read_process_one", read_and_kill)
    running = worker.run("print('there')")
    assert (running.finish(), running.stdout, running.start_mode) == (0, "there\n", "fresh")
    monkeypatch.undo()
    assert worker.run().finish() == 0
    assert worker.zygote(task) == before


def killed_worker(worker: Worker, task: Task, awaited: str) -> None:
    """Another, which is killed while it starts this task."""
    info = worker.runtime.info()
    places = (str(worker.state_dir), task.launch.image.reference, str(worker.bundle))
    arguments = (worker.backend, info.socket_path, info.namespace, *places, worker.form, awaited)
    program = [sys.executable, "-m", "tests.zygote.at_work.doomed", *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as doomed:
        assert doomed.stdout
        assert doomed.stdout.readline() == "now\n"
        doomed.kill()


@pytest.mark.parametrize("awaited", ["forked", "entered", "adopted", "released"])
def test_of_a_worker_that_is_killed_during_entry_nothing_stays(worker: Worker, awaited: str) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    before = worker.zygote(task)
    worker.end()
    killed_worker(worker, task, awaited)

    def no_process() -> bool:
        # Other tests' zygotes live on.
        of_tasks = (one for one in worker.runtime.list() if one.labels.get(labels.PURPOSE) != "zygote")
        return not any(container.pid for container in of_tasks)

    assert worker.zygote(task) == before
    until(no_process, "the end of what the dead worker had begun")
    until(lambda: not children(before.pid), "the end of the zygote's child")
    for directory in (worker.state_dir / "workloads").iterdir():
        os.utime(directory, (0, 0))
    prune(worker.runtime, state_dir=worker.state_dir)
    left = left_of_tasks(worker)
    assert not any(left.values()), left
    assert worker.run().finish() == 0
    assert worker.zygote(task) == before


@every_form
def test_a_zygote_whose_worker_was_killed_before_it_was_known_goes_when_the_next_one_starts(worker: Worker) -> None:
    task = worker.task()
    directory = worker.directory(task)
    with zygotes.alone_in(directory, end=time.monotonic(), make=True):
        zygotes.remove_zygote(worker.runtime, directory, state_dir=worker.state_dir)
    killed_worker(worker, task, "zygote")
    (unknown,) = directory.glob("zygote-*")
    assert not (directory / "record.json").exists()
    assert worker.start(task).finish() == 0
    assert [path.name for path in directory.glob("zygote-*")] == [worker.zygote(task).container]
    assert unknown.name not in {container.id for container in worker.runtime.list()}


def test_a_zygote_that_reached_its_end_is_replaced(worker: Worker) -> None:
    def short_lived() -> Task:
        return worker.task(cfg="zygote_max_forks = 2", environment={"AIRFLOW__TEST__A": "short"})

    first = short_lived()
    seen = []
    for _ in range(3):
        running = worker.start(short_lived(), "print('there')")
        assert (running.finish(), running.stdout) == (0, "there\n")
        seen.append(worker.zygote(first).container)
        if len(seen) == 2:
            until(lambda: not zygotes.is_alive(worker.directory(first)), "the zygote's end")
    assert seen[0] == seen[1] != seen[2]


def test_another_configuration_has_another_zygote(worker: Worker) -> None:
    task, other = worker.task(), worker.task(environment={"AIRFLOW__TEST__A": "changed"})
    assert worker.start(task).finish() == 0
    running = worker.start(other, "import os; print(os.environ['AIRFLOW__TEST__A'])")
    assert (running.finish(), running.start_mode, running.stdout) == (0, "fork", "changed\n")
    assert worker.zygote(task).container != worker.zygote(other).container
    again = worker.run("import os; print(os.environ.get('AIRFLOW__TEST__A'))")
    assert (again.finish(), again.stdout) == (0, "None\n")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("raising", "this Airflow is broken"),
        ("loud-and-raising", "broken"),
        ("exiting", "ended with exit code 9"),
        ("threaded", "threads running"),
        ("without-modules", "airflow.dag_processing.dagbag"),
    ],
)
def test_an_image_without_a_zygote_starts_fresh(worker: Worker, kind: str, why: str) -> None:
    task = worker.task(kind)
    running = worker.start(task, "print('there')")
    assert (running.start_mode, running.finish(), running.stdout) == ("fresh", 0, "there\n")
    assert why in running.why_fresh
    # It is remembered, and then tried again.
    second = worker.start(worker.task(kind))
    assert "no zygote could be started a moment ago" in second.why_fresh
    assert second.finish() == 0
    failure = worker.directory(task) / "failure"
    os.utime(failure, (0, 0))
    third = worker.start(worker.task(kind))
    assert "a moment ago" not in third.why_fresh
    assert why in third.why_fresh
    assert failure.stat().st_mtime > time.time() - 60


def test_an_image_that_hangs_while_it_is_imported(worker: Worker) -> None:
    running = worker.run("print('there')", "hanging", cfg="start_timeout = 6")
    assert (running.start_mode, running.finish(), running.stdout) == ("fresh", 0, "there\n")
    assert "Airflow was not imported" in running.why_fresh


def test_an_image_that_prints_ten_megabytes(worker: Worker) -> None:
    running = worker.run("print('there')", "loud")
    assert (running.start_mode, running.finish(), running.stdout) == ("fork", 0, "there\n")


def test_who_connects_and_says_nothing_keeps_nobody_waiting(worker: Worker) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    before = worker.zygote(task)
    with ExitStack() as silent:
        for _ in range(70):
            connection = zygotes._connected(worker.directory(task))
            assert connection is not None
            silent.enter_context(connection)
        running = worker.run("print('there')")
        assert (running.start_mode, running.finish(), running.stdout) == ("fork", 0, "there\n")
    # Nor does who speaks nonsense end it for others.
    connection = zygotes._connected(worker.directory(task))
    assert connection is not None
    with connection:
        connection.send(b"nonsense")
        assert b"could not fork" in connection.recv(65536)
    assert worker.run().finish() == 0
    assert worker.zygote(task) == before


def test_two_hundred_forks_leave_nothing_in_the_zygote(worker: Worker) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0

    def use() -> dict[str, int]:
        worker.end()
        pid = worker.zygote(task).pid
        until(lambda: not children(pid), "the end of the zygote's children")
        memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        return {"descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())), "memory": memory}

    before = use()
    directory = worker.directory(task)
    for _ in range(200):
        # Without a container, which takes longer: the zygote's part is the same.
        connection = zygotes._connected(directory)
        assert connection is not None
        with connection:
            zygotes.ask_to_fork(connection, os.getpid())
            zygotes._answer(connection, "forked")
    after = use()
    assert after["descriptors"] == before["descriptors"]
    assert after["memory"] < before["memory"] + 8 * 1024 * 1024
