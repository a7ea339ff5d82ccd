"""A state directory without room, and containers that are killed before their work: the host's trouble, and nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.zygote.at_work.conftest import NAMESPACE, Running, left_of_tasks, until
from tests.zygote.at_work.test_death import is_dead

from airflow_isolation.bridge import workload as workloads
from airflow_isolation.bridge.prune import prune
from airflow_isolation.bridge.workload import launch
from airflow_isolation.errors import ContainerKilled, HostTrouble
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.zygote.at_work.conftest import Worker

pytestmark = pytest.mark.root

both = pytest.mark.parametrize("form", ["namespace", "docker"], indirect=True)
every_start = pytest.mark.parametrize("cfg", ["start_mode = fresh", ""], ids=["fresh", "forked"])


@contextmanager
def small(worker: Worker) -> Iterator[Worker]:
    """The same worker, with a state directory on a file system of its own."""
    place = worker.bundle.parent / "small"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", place], check=True)
    runtime = connect(
        worker.backend, socket_path=worker.runtime.info().socket_path, namespace=NAMESPACE, state_dir=place
    )
    try:
        yield replace(worker, runtime=runtime, state_dir=place, started=[])
    finally:
        runtime.close()
        subprocess.run(["umount", place], check=True)


@both
@every_start
def test_a_full_state_directory_is_named_and_nothing_stays(worker: Worker, cfg: str) -> None:
    with small(worker) as cramped:
        with pytest.raises(HostTrouble, match="No space left") as failed:
            cramped.run(cfg=cfg)
        assert str(cramped.state_dir) in str(failed.value)
        assert "Make room" in failed.value.hint
        left = left_of_tasks(cramped)
        assert not any(left.values()), left


@both
@every_start
def test_a_state_directory_that_is_read_only_is_named(worker: Worker, cfg: str) -> None:
    with small(worker) as cramped:
        subprocess.run(["mount", "-o", "remount,ro", cramped.state_dir], check=True)
        with pytest.raises(HostTrouble, match="Read-only file system") as failed:
            cramped.run(cfg=cfg)
        assert "state_dir" in failed.value.hint


def shim_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


victims = pytest.mark.parametrize("victim", ["process 1", "shim"])


def end(pid: int, victim: str) -> None:
    os.kill(shim_of(pid) if victim == "shim" else pid, signal.SIGKILL)
    # The daemon ends what has lost its shim.
    until(lambda: is_dead(pid), "the end of process 1")


def fails_and_leaves_nothing(worker: Worker) -> None:
    """Without its shim a container can't be removed at once: the note of it has the next prune do it."""
    with pytest.raises(ContainerKilled):
        worker.run(cfg="start_mode = fresh")

    def nothing_is_left() -> bool:
        prune(worker.runtime, state_dir=worker.state_dir)
        return not any(left_of_tasks(worker).values())

    until(nothing_is_left, "the clean-up")


@victims
def test_a_container_that_is_killed_before_it_starts(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """On containerd alone: dockerd has no process before it starts one."""
    start = worker.runtime.start

    def started(id: str) -> int:
        end(worker.runtime.get(id).pid, victim)
        return start(id)

    monkeypatch.setattr(worker.runtime, "start", started)
    fails_and_leaves_nothing(worker)


@both
@victims
def test_a_container_that_is_killed_before_it_speaks(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    start = worker.runtime.start

    def started(id: str) -> int:
        pid = start(id)
        end(pid, victim)
        return pid

    monkeypatch.setattr(worker.runtime, "start", started)
    fails_and_leaves_nothing(worker)


@both
def test_who_kills_it_before_it_speaks_is_told_where_the_daemon_remembers_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = worker.runtime.start

    def started(id: str) -> int:
        pid = start(id)
        worker.runtime.kill(id)
        return pid

    monkeypatch.setattr(worker.runtime, "start", started)
    with pytest.raises(ContainerKilled) as failed:
        worker.run(cfg="start_mode = fresh")
    assert ("asked the daemon to send it SIGKILL" in failed.value.hint) == (worker.form == "docker")


@both
@victims
def test_a_container_that_is_killed_before_its_work(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    meter = workloads._meter

    def metered(agent: Any, undo: Any) -> Any:
        end(agent.container.pid, victim)
        return meter(agent, undo)

    monkeypatch.setattr(workloads, "_meter", metered)
    fails_and_leaves_nothing(worker)


@both
@victims
def test_a_container_that_is_killed_while_its_task_runs_is_told_from_one_without_memory(
    worker: Worker, victim: str
) -> None:
    running = worker.run("print('up', flush=True); requests.recv(1)")
    running.until(lambda: "up" in running.stdout)
    end(running.workload.container.pid, victim)
    assert running.finish() != 0
    ending = running.workload.ending
    assert ending
    assert "was ended from outside" in ending.from_outside
    assert "asked the daemon" not in ending.from_outside
    assert why_not_begun(running) == ""
    # dockerd may have taken the cgroup away before anybody reads it.
    gone = worker.form == "docker" and "since its cgroup is gone" in ending.from_outside
    assert gone or "not by a memory limit" in ending.from_outside
    worker.end()
    until(
        lambda: bool(prune(worker.runtime, state_dir=worker.state_dir)) and not any(left_of_tasks(worker).values()),
        "the clean-up",
    )


def why_not_begun(running: Running) -> str:
    """What is known once it has ended, and its supervisor has read all that came of it."""
    assert running.finish() != 0
    with suppress(ConnectionResetError):
        while running.workload.channels.requests.recv(65536):
            pass
    return running.workload.why_not_begun()


def cleaned_up(worker: Worker) -> None:
    """Without its shim a container can't be removed at once."""
    worker.end()

    def nothing_left() -> bool:
        prune(worker.runtime, state_dir=worker.state_dir)
        return not any(left_of_tasks(worker).values())

    until(nothing_left, "the clean-up")


@both
@victims
def test_of_a_task_that_is_killed_while_it_imports_airflow_it_is_known_that_it_has_not_begun(
    worker: Worker, victim: str
) -> None:
    running = worker.run("print('begun')", "raising", environment={"GATE": str(worker.bundle / "never")})
    assert running.start_mode == "fresh"
    end(running.workload.container.pid, victim)
    assert "was ended from outside" in why_not_begun(running)
    assert running.stdout == ""
    cleaned_up(worker)


@both
def test_of_a_task_whose_process_is_killed_while_it_imports_airflow_too(worker: Worker) -> None:
    """Process 1 lives, and says by which signal it ended; in there nobody sends one."""
    running = worker.run("print('begun')", "raising", environment={"GATE": str(worker.bundle / "never")})
    pid = running.workload.container.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(lambda: bool(children.read_text()), "the task's process")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert "sent signal SIGKILL" in why_not_begun(running)


@both
def test_what_its_worker_kills_before_it_begins_is_its_workers_doing(worker: Worker) -> None:
    running = worker.run("print('begun')", "raising", environment={"GATE": str(worker.bundle / "never")})
    running.workload.send_signal(signal.SIGTERM)
    assert why_not_begun(running) == ""


@both
@victims
def test_of_a_task_that_is_killed_before_it_is_told_what_to_do_that_is_known_however_it_started(
    worker: Worker, victim: str
) -> None:
    task = worker.task()
    running = Running(launch(worker.runtime, task.launch, state_dir=worker.state_dir, plan=task.plan))
    worker.started.append(running)
    assert running.start_mode == "fork"
    end(running.workload.container.pid, victim)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        running.send("print('begun')")
    assert "was ended from outside" in why_not_begun(running)
    cleaned_up(worker)


@both
def test_who_kills_through_the_daemon_is_told_where_that_remembers_it(worker: Worker) -> None:
    running = worker.run("print('up', flush=True); requests.recv(1)")
    running.until(lambda: "up" in running.stdout)
    worker.runtime.kill(running.workload.container.id, signal.SIGKILL, everyone=True)
    assert running.finish() == -signal.SIGKILL
    ending = running.workload.ending
    assert ending
    assert "was ended from outside" in ending.from_outside
    assert ("asked the daemon to send it SIGKILL" in ending.from_outside) == (worker.form == "docker")
    assert why_not_begun(running) == ""


@both
def test_what_the_worker_kills_itself_was_not_killed_from_outside(worker: Worker) -> None:
    running = worker.run("print('up', flush=True); requests.recv(1)")
    running.until(lambda: "up" in running.stdout)
    running.workload.send_signal(signal.SIGKILL)
    assert running.finish() == -signal.SIGKILL
    assert running.workload.ending
    assert running.workload.ending.from_outside == ""


@both
def test_a_task_that_kills_itself_was_not_killed_from_outside(worker: Worker) -> None:
    running = worker.run("import os; os.kill(os.getpid(), 9)")
    assert running.finish() == -signal.SIGKILL
    assert running.workload.ending
    assert running.workload.ending.from_outside == ""
