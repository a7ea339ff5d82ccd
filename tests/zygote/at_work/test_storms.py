"""Zygotes that are slow, or killed while many want them: tasks wait for the next one instead of importing Airflow each."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.zygote.at_work.conftest import FORMS, until

from airflow_isolation.bridge import workload as workloads
from airflow_isolation.bridge import zygote as zygotes
from airflow_isolation.bridge.fresh_slot import await_slot
from airflow_isolation.bridge.prune import prune

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.zygote.at_work.conftest import Running, Task, Worker

    from airflow_isolation.bridge.zygote import Zygote

pytestmark = pytest.mark.root

every_form = pytest.mark.parametrize("form", FORMS, indirect=True)

MANY = 6


@contextmanager
def many(
    worker: Worker, kind: str = "slow", *, tasks: int = MANY, environment: dict[str, str] | None = None
) -> Iterator[list[Running]]:
    """So many tasks, MANY at a time, that all want one zygote; at the end of the block all have ended well."""
    wanted = [worker.task(kind, environment=environment) for _ in range(tasks)]
    ended: list[Running] = []

    def run(task: Task) -> None:
        running = worker.start(task, "print('there')")
        assert (running.finish(), running.stdout) == (0, "there\n")
        ended.append(running)

    with ThreadPoolExecutor(MANY) as pool:
        under_way = [pool.submit(run, task) for task in wanted]
        yield ended
        for one in under_way:
            one.result()
    assert len(ended) == tasks


def modes(ended: list[Running]) -> dict[str, int]:
    return {mode: sum(running.start_mode == mode for running in ended) for mode in ("fork", "fresh")}


def next_zygote(worker: Worker, task: Task, *, but: set[str], listens: bool) -> Zygote:
    """The first that is none of these, as soon as its process is known, or when it ``listens``."""
    found: list[Zygote] = []

    def known() -> bool:
        try:
            zygote = worker.zygote(task)
        except (OSError, ValueError):
            return False
        if zygote.container not in but and (not listens or zygotes.is_alive(zygote.directory)):
            found.append(zygote)
        return bool(found)

    until(known, "the next zygote")
    but.add(found[0].container)
    return found[0]


def shim_of(zygote: Zygote) -> int:
    return int(Path(f"/proc/{zygote.pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@every_form
def test_who_comes_while_a_zygote_imports_waits_for_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when that takes longer than a zygote may take for an answer."""
    monkeypatch.setattr(zygotes, "ANSWER_TIMEOUT", 1.0)
    with many(worker) as ended:
        pass
    assert modes(ended) == {"fork": MANY, "fresh": 0}
    task = worker.task("slow")
    assert [path.name for path in worker.directory(task).glob("zygote-*")] == [worker.zygote(task).container]


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("victim", ["zygote", "shim"])
def test_zygotes_that_are_killed_make_no_storm_of_fresh_starts(worker: Worker, victim: str, listens: bool) -> None:
    environment = {"AIRFLOW__TEST__A": f"{victim} {listens}"}
    task = worker.task("slow", environment=environment)
    seen: set[str] = set()
    kills = 2
    with many(worker, tasks=3 * MANY, environment=environment) as ended:
        for _ in range(kills):
            zygote = next_zygote(worker, task, but=seen, listens=listens)
            kill(zygote.pid if victim == "zygote" else shim_of(zygote))
        next_zygote(worker, task, but=seen, listens=True)
    assert modes(ended)["fresh"] <= kills
    assert not (worker.directory(task) / "failure").exists()
    living = worker.zygote(task).container

    def only_one_is_left() -> bool:
        prune(worker.runtime, state_dir=worker.state_dir)
        return {container.id for container in worker.runtime.list()} & seen == {living}

    until(only_one_is_left, "the clean-up")


def test_an_image_whose_zygotes_are_always_killed_is_tried_a_few_times_for_all(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = zygotes._start

    def counted(*arguments: object) -> None:
        started.append(threading.current_thread().name)
        start(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(zygotes, "_start", counted)
    with many(worker, "killed") as ended:
        pass
    assert modes(ended) == {"fork": 0, "fresh": MANY}
    assert len(started) == zygotes.MOST_KILLS
    assert all("ended with exit code 137" in running.why_fresh for running in ended)


def test_only_who_has_seen_a_few_zygotes_killed_starts_fresh(worker: Worker) -> None:
    """All that start are killed until one workload has had enough; the others are forked from the next."""
    environment = {"AIRFLOW__TEST__A": "a few"}
    task = worker.task("slow", environment=environment)
    seen: set[str] = set()
    with many(worker, environment=environment) as ended:
        for _ in range(zygotes.START_TRIES):
            kill(next_zygote(worker, task, but=seen, listens=False).pid)
    assert modes(ended) == {"fork": MANY - 1, "fresh": 1}
    assert not (worker.directory(task) / "failure").exists()
    assert not (worker.directory(task) / "kills").exists()


def test_a_workload_that_could_not_be_forked_has_its_slot_until_airflow_is_imported(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "await_slot", partial(await_slot, slots=1))
    gate = worker.bundle / "gate"
    running = worker.run("print('there')", "raising", environment={"GATE": str(gate)})
    assert running.start_mode == "fresh"

    def free() -> bool:
        assert running.workload.exit_code() in (None, 0)
        slot = await_slot(worker.state_dir, end=0, slots=1, unless=lambda: True)
        if slot is not None:
            slot.close()
        return slot is not None

    assert not free()
    gate.touch()
    until(free, "the slot")
    assert (running.finish(), running.stdout) == (0, "there\n")
    gate.unlink()
