"""Whose left-overs are removed, and whose never. A fake runtime, because owners die and daemons refuse at will here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.bridge.abandoned import abandon
from airflow_isolation.bridge.held import held
from airflow_isolation.bridge.prune import prune, prune_when_due
from airflow_isolation.bridge.zygote import alone_in
from airflow_isolation.errors import ContainerRuntimeError, RuntimeUnreachable
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import Container, ContainerState, Stray

if TYPE_CHECKING:
    from collections.abc import Iterator


class FakeRuntime:
    """Holds containers, and says no to the removal of some."""

    def __init__(
        self,
        *containers: Container,
        stubborn: str = "",
        cgroups: tuple[str, ...] = (),
        roots: tuple[Path, ...] = (),
    ) -> None:
        self.containers = {container.id: container for container in containers}
        self.stubborn = stubborn
        self.cgroups = cgroups
        self.roots = roots
        self.asked = 0

    def list(self) -> tuple[Container, ...]:
        self.asked += 1
        return tuple(self.containers.values())

    def remove(self, id: str) -> None:
        if id == self.stubborn:
            raise RuntimeUnreachable("no answer")
        self.containers.pop(id, None)

    def remove_strays(self, *, dry_run: bool = False) -> tuple[Stray, ...]:
        if self.stubborn == "cgroups":
            raise ContainerRuntimeError("its processes don't end")
        found, self.cgroups = self.cgroups, self.cgroups if dry_run else ()
        return tuple(Stray(kind="cgroup", id=id) for id in found)

    def seen_on_host(self) -> frozenset[str]:
        return frozenset(self.cgroups)

    def remove_unused_roots(self, *, dry_run: bool = False) -> tuple[Path, ...]:
        if self.stubborn == "roots":
            raise ContainerRuntimeError("device or resource busy")
        found, self.roots = self.roots, self.roots if dry_run else ()
        return found


def container(id: str, owner: str) -> Container:
    return Container(id=id, state=ContainerState.STOPPED, image="i", labels={labels.OWNER: owner})


LIVING = labels.Owner.this_process()
DEAD = replace(LIVING, started=LIVING.started + 1)  # the pid is in use again, by somebody else
ELSEWHERE = replace(DEAD, host="another-host")


def pruned(runtime: Any, state_dir: Path, **options: bool) -> list[str]:
    return [one.id for one in prune(runtime, state_dir=state_dir, **options).containers]


def test_only_containers_of_dead_owners_of_this_host_go(tmp_path: Path) -> None:
    runtime = FakeRuntime(
        container("dead", str(DEAD)),
        container("living", str(LIVING)),
        container("elsewhere", str(ELSEWHERE)),
        container("nobody", "not an owner"),
    )
    assert pruned(runtime, tmp_path) == ["dead"]
    assert sorted(runtime.containers) == ["elsewhere", "living", "nobody"]


def test_a_dry_run_removes_nothing(tmp_path: Path) -> None:
    runtime = FakeRuntime(container("dead", str(DEAD)))
    assert pruned(runtime, tmp_path, dry_run=True) == ["dead"]
    assert "dead" in runtime.containers


def test_a_cgroup_without_a_container_goes_too(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime(container("dead", str(DEAD)), cgroups=("dead", "task-a"))
    left = (Stray(kind="cgroup", id="task-a"),)
    assert prune(runtime, state_dir=tmp_path, dry_run=True).strays == left
    assert runtime.cgroups == ("dead", "task-a")
    assert prune(runtime, state_dir=tmp_path).strays == left
    assert runtime.cgroups == ()


def test_what_is_mounted_for_nobody_goes_too(tmp_path: Path) -> None:
    place = tmp_path / "roots/700000-abc"
    runtime: Any = FakeRuntime(container("dead", str(DEAD)), roots=(place,))
    assert prune(runtime, state_dir=tmp_path, dry_run=True).directories == (place,)
    assert runtime.roots == (place,)
    assert prune(runtime, state_dir=tmp_path).directories == (place,)
    assert runtime.roots == ()


def test_a_mount_that_stays_is_no_reason_to_fail(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime(container("dead", str(DEAD)), stubborn="roots")
    assert pruned(runtime, tmp_path) == ["dead"]


def test_a_cgroup_that_can_not_be_removed_is_no_reason_to_fail(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime(container("dead", str(DEAD)), stubborn="cgroups")
    assert pruned(runtime, tmp_path) == ["dead"]


def test_what_cannot_be_removed_is_left_for_the_next_time(tmp_path: Path) -> None:
    runtime = FakeRuntime(container("a", str(DEAD)), container("b", str(DEAD)), stubborn="a")
    assert pruned(runtime, tmp_path) == ["b"]
    runtime.stubborn = ""
    assert pruned(runtime, tmp_path) == ["a"]


def test_a_living_owner_may_give_a_container_up(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime(container("given-up", str(LIVING)), container("kept", str(LIVING)), stubborn="given-up")
    abandon(runtime, "given-up", state_dir=tmp_path)
    assert pruned(runtime, tmp_path) == []
    runtime.stubborn = ""
    assert pruned(runtime, tmp_path) == ["given-up"]
    assert list(runtime.containers) == ["kept"]
    # The note is gone with it.
    assert not list((tmp_path / "abandoned").glob("*/*"))


def test_an_abandoned_container_makes_pruning_due_at_once(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime(container("given-up", str(LIVING)))
    prune_when_due(runtime, state_dir=tmp_path)
    abandon(runtime, "given-up", state_dir=tmp_path)
    prune_when_due(runtime, state_dir=tmp_path)
    assert not runtime.containers


def test_pruning_is_not_due_again_so_soon(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime()
    prune_when_due(runtime, state_dir=tmp_path)
    runtime.containers["dead"] = container("dead", str(DEAD))
    prune_when_due(runtime, state_dir=tmp_path)
    assert "dead" in runtime.containers
    prune_when_due(runtime, state_dir=tmp_path, every=0)
    assert not runtime.containers


def test_pruning_is_due_when_something_looks_left_over(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime()
    prune_when_due(runtime, state_dir=tmp_path)
    runtime.cgroups = ("task-a",)
    prune_when_due(runtime, state_dir=tmp_path)
    assert runtime.cgroups == ()
    runtime.cgroups = ("task-b",)
    prune_when_due(runtime, state_dir=tmp_path)
    assert runtime.cgroups == ("task-b",), "somebody has looked a moment ago"
    os.utime(tmp_path / "looked", (0, 0))
    prune_when_due(runtime, state_dir=tmp_path)
    assert runtime.cgroups == ()


def test_who_sees_nothing_suspicious_does_not_ask_the_daemon(tmp_path: Path) -> None:
    runtime: Any = FakeRuntime()
    prune_when_due(runtime, state_dir=tmp_path)
    asked = runtime.asked
    prune_when_due(runtime, state_dir=tmp_path)
    assert runtime.asked == asked


def test_what_a_dead_worker_left_running_has_its_grace_period(tmp_path: Path) -> None:
    """Unless it has been there for as long as it takes until pruning is due anyway."""
    running = replace(container("running", str(DEAD)), state=ContainerState.RUNNING)
    made = replace(container("made", str(DEAD)), state=ContainerState.CREATED)
    runtime: Any = FakeRuntime()
    prune_when_due(runtime, state_dir=tmp_path)
    runtime.containers = {one.id: one for one in (running, made, container("ended", str(DEAD)))}
    runtime.cgroups = ("running",)
    prune_when_due(runtime, state_dir=tmp_path)
    assert list(runtime.containers) == ["running"]
    assert pruned(runtime, tmp_path) == ["running"]


def workload_directory(state_dir: Path, id: str, *, age: float) -> Path:
    directory = state_dir / "workloads" / id
    directory.mkdir(parents=True)
    then = directory.stat().st_mtime - age
    os.utime(directory, (then, then))
    return directory


def test_a_directory_goes_when_its_worker_was_killed(tmp_path: Path) -> None:
    directory = workload_directory(tmp_path, "task-a", age=3600)
    holder = (
        f"import sys, time; from pathlib import Path; from airflow_isolation.bridge.held import held\n"
        f"with held(Path({str(directory)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout
        assert worker.stdout.readline() == "held\n"
        assert not prune(FakeRuntime(), state_dir=tmp_path).directories  # type: ignore[arg-type]
        worker.kill()
    assert prune(FakeRuntime(), state_dir=tmp_path).directories == (directory,)  # type: ignore[arg-type]
    assert not directory.exists()


@pytest.mark.parametrize(("age", "goes"), [(0, False), (3600, True)])
def test_a_directory_that_was_made_this_moment_is_left_alone(tmp_path: Path, age: float, goes: bool) -> None:
    directory = workload_directory(tmp_path, "task-a", age=age)
    prune(FakeRuntime(), state_dir=tmp_path)  # type: ignore[arg-type]
    assert directory.exists() is not goes


def test_a_held_directory_is_let_go_afterwards(tmp_path: Path) -> None:
    directory = workload_directory(tmp_path, "task-a", age=3600)
    with held(directory):
        assert not prune(FakeRuntime(), state_dir=tmp_path).directories  # type: ignore[arg-type]
    assert prune(FakeRuntime(), state_dir=tmp_path).directories  # type: ignore[arg-type]


class Zygote:
    """What a zygote's worker makes of it: a directory, a record, a socket, a container."""

    def __init__(self, state_dir: Path, key: str) -> None:
        self.directory = state_dir / "zygotes" / key
        self.directory.mkdir(parents=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.directory / "zygote.sock"))
        self.listener.listen(1)
        (self.directory / "record.json").write_text(f'{{"container": "zygote-{key}", "pid": 1}}')
        (self.directory / "lock").touch()
        (self.directory / f"zygote-{key}").mkdir()
        self.container = Container(
            id=f"zygote-{key}",
            state=ContainerState.RUNNING,
            image="i",
            labels={labels.PURPOSE: "zygote", labels.DIRECTORY: str(self.directory)},
        )
        self.age(3600)

    def age(self, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(self.directory, (then, then))


@pytest.fixture
def short() -> Iterator[Path]:
    """A state directory in which sockets may lie."""
    with tempfile.TemporaryDirectory(prefix="ai-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def zygote(short: Path) -> Iterator[Zygote]:
    zygote = Zygote(short, "a")
    with zygote.listener:
        yield zygote


def everything_pruned(runtime: Any, state_dir: Path, **options: bool) -> tuple[list[str], list[str]]:
    found = prune(runtime, state_dir=state_dir, **options)
    return [one.id for one in found.containers], [directory.name for directory in found.directories]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_living_zygote_belongs_to_all(short: Path, zygote: Zygote, *, dry_run: bool) -> None:
    runtime: Any = FakeRuntime(zygote.container)
    assert everything_pruned(runtime, short, dry_run=dry_run) == ([], [])
    assert everything_pruned(runtime, short / "of-another-worker", dry_run=dry_run) == ([], [])
    assert sorted(path.name for path in zygote.directory.iterdir()) == [
        "lock",
        "record.json",
        "zygote-a",
        "zygote.sock",
    ]


def test_a_zygote_that_has_ended_goes_with_its_directory(short: Path, zygote: Zygote) -> None:
    zygote.listener.close()
    runtime: Any = FakeRuntime(replace(zygote.container, state=ContainerState.STOPPED))
    assert everything_pruned(runtime, short, dry_run=True) == (["zygote-a"], ["a"])
    assert zygote.directory.exists()
    zygote.age(3600)
    assert everything_pruned(runtime, short) == (["zygote-a"], ["a"])
    assert not runtime.containers
    assert not zygote.directory.exists()


def test_a_zygote_to_which_nobody_can_connect_goes(short: Path, zygote: Zygote) -> None:
    zygote.listener.close()
    runtime: Any = FakeRuntime(zygote.container)
    assert everything_pruned(runtime, short)[0] == ["zygote-a"]


def test_a_zygote_whose_directory_is_gone_goes(short: Path, zygote: Zygote) -> None:
    shutil.rmtree(zygote.directory)
    runtime: Any = FakeRuntime(zygote.container)
    assert everything_pruned(runtime, short) == (["zygote-a"], [])


def test_a_zygote_that_another_has_replaced_goes_alone(short: Path, zygote: Zygote) -> None:
    older = replace(zygote.container, id="zygote-older")
    runtime: Any = FakeRuntime(older, zygote.container)
    assert everything_pruned(runtime, short) == (["zygote-older"], [])
    assert zygote.directory.exists()


def test_a_zygote_that_is_being_started_is_left_alone(short: Path, zygote: Zygote) -> None:
    zygote.listener.close()
    runtime: Any = FakeRuntime(zygote.container)
    with alone_in(zygote.directory, end=time.monotonic()):
        zygote.age(3600)
        assert everything_pruned(runtime, short) == ([], [])
    zygote.age(3600)
    assert everything_pruned(runtime, short) == (["zygote-a"], ["a"])


def test_a_container_that_only_says_that_it_is_a_zygote_is_nobodys_business(short: Path) -> None:
    foreign = Container(id="z", state=ContainerState.STOPPED, image="i", labels={labels.PURPOSE: "zygote"})
    runtime: Any = FakeRuntime(foreign)
    assert everything_pruned(runtime, short) == ([], [])


@pytest.mark.parametrize(("age", "failed", "goes"), [(0, 3600, False), (3600, 3600, True), (3600, 0, False)])
def test_a_directory_without_a_zygote_goes_when_it_is_old_and_no_failure_is_remembered(
    short: Path, age: float, failed: float, *, goes: bool
) -> None:
    directory = short / "zygotes" / "b"
    directory.mkdir(parents=True)
    (directory / "failure").write_text("broken")
    (directory / "lock").touch()
    now = time.time()
    os.utime(directory / "failure", (now - failed, now - failed))
    os.utime(directory, (now - age, now - age))
    runtime: Any = FakeRuntime()
    assert everything_pruned(runtime, short)[1] == (["b"] if goes else [])
    assert directory.exists() is not goes


def test_who_waited_for_a_directory_that_was_pruned_makes_it_again(short: Path) -> None:
    directory = short / "zygotes" / "c"
    waiting = (
        "import sys, time; from pathlib import Path; from airflow_isolation.bridge.zygote import alone_in\n"
        f"directory = Path({str(directory)!r})\n"
        "print('waits', flush=True)\n"
        "with alone_in(directory, end=time.monotonic() + 60, make=True): print((directory / 'lock').exists(), flush=True)"
    )
    with alone_in(directory, end=time.monotonic(), make=True):
        process = subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.2)  # it is about to wait, or does; either way it has the lock of a directory that is there
        shutil.rmtree(directory)
    with process:
        assert process.stdout.readline() == "True\n"
