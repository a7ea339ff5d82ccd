"""Workers that are given tasks, and what is killed meanwhile; in the end a row of figures. Other suites use it, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.airflow_home import own_cgroup_parent, short_directory
from tests.end_to_end.traces import all_but, household, traces
from tests.zygote.at_work import stand_ins

from airflow_isolation.bridge.prune import prune
from airflow_isolation.bridge.zygote import remove_zygote, zygote_of
from airflow_isolation.errors import IsolationError
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.connect import connect
from airflow_isolation.runtime.interface import ContainerState
from airflow_isolation.runtime.shims import shims

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.conftest import Daemon

    from airflow_isolation.runtime.interface import Container, ContainerRuntime

#: What is killed with SIGKILL. These kill user code, or who waits for it, and so use up a try.
OF_A_TASK = ("agent", "shim", "worker")
KINDS = ("containerd", *OF_A_TASK, "zygote", "zygote-shim")
#: Within the grace period, which these tasks have 2 seconds of, and 30 seconds nothing may be left.
LEFT_AFTER = 32.0
#: A task whose worker died is tried again when its container has ended: the grace period, and a little more.
UNTIL_NEXT_TRY = 6.0
#: So many workers of one task are killed: the last tasks would have no time between two kills on a slow host.
MOST_HITS = 3
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Figures:
    """One row. Only ``injected`` may be other than 0; and ``tries`` where faults kill user code itself."""

    injected: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    stuck: int = 0
    left: dict[str, list[str]] = field(default_factory=dict)
    #: Lost by dockerd itself, when it is killed: mounts of layers that it was making.
    of_dockerd: set[str] = field(default_factory=set)
    #: Used up though no user code had run.
    tries: int = 0
    #: Of the tasks that were done: those that were not forked; and the seconds from the first to the last.
    fresh: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        left = sum(map(len, self.left.values()))
        return (
            "\n| fault | injected | lost | doubled | stuck | left after grace + 30 s | tries used up before user code |"
            "\n|---|---|---|---|---|---|---|"
            f"\n| {', '.join(self.injected)} | {self.injected.total()} | {self.lost} | {self.doubled} | {self.stuck} "
            f"| {left} | {self.tries} |\n{self.fresh} started fresh; {self.seconds:.0f} seconds;"
            f" {len(self.of_dockerd)} mounts lost by dockerd"
        )


class Worker:
    """A process of worker.py with one task at a time, and a thread that hears what it says."""

    def __init__(self, arguments: list[str], log: Path, answers: deque[tuple[Worker, str]]) -> None:
        self.busy = ""
        #: Before, it has nothing that a kill could hit: on a slow host nothing would ever be done.
        self.ready = False
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.worker", *arguments],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._answers = answers
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()

    def give(self, task: str) -> None:
        self.busy = task
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{task}\n")
            self.process.stdin.flush()

    def _hear(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            # The log comes the same way.
            self.ready = self.ready or line == "ready\n"
            if line.startswith("answer "):
                self._answers.append((self, line.removeprefix("answer ").strip()))
        self._answers.append((self, ""))

    def dismiss(self) -> None:
        """It finishes what it has."""
        with suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()

    def end(self, seconds: float) -> None:
        """Let it finish; killed when it doesn't."""
        self.dismiss()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(seconds)
        self._hearing.join(seconds)
        if self.process.stdout:
            self.process.stdout.close()


class Chaos:
    """``run`` has all tasks done while somebody is killed now and then."""

    def __init__(
        self,
        *,
        daemon: Daemon,
        runtime: ContainerRuntime,
        state_dir: Path,
        cgroup_parent: str,
        arguments: list[str],
        witness: Path,
        log: Path,
        chance: Random,
    ) -> None:
        self.figures = Figures()
        self._daemon = daemon
        self._runtime = runtime
        self._state_dir = state_dir
        self._cgroup_parent = cgroup_parent
        self._arguments = arguments
        self._witness = witness
        self._log = log
        self._chance = chance
        self._answers: deque[tuple[Worker, str]] = deque()
        self._workers: list[Worker] = []
        self._wanted = 0

    def run(
        self,
        kinds: tuple[str, ...],
        tasks: int,
        *,
        pause: float = 3.0,
        most: int = sys.maxsize,
        workers: int = 4,
        rate: float = 1000.0,
    ) -> None:
        """Each ``pause`` seconds, more or less, one of ``kinds`` is killed, in turn; ``most`` so many in all.

        ``rate``: so many tasks come in a second, where ``workers`` have time for them.
        """
        self._wanted = workers
        began = time.monotonic()
        waiting = [(began + number / rate, f"{number} 1") for number in range(tasks)]
        done: set[str] = set()
        ended = threading.Event()
        killing = threading.Thread(target=self._kill_now_and_then, args=(kinds, pause, most, ended))
        deadline = began + 300 + 5 * tasks
        killing.start()
        try:
            while len(done) < tasks and time.monotonic() < deadline:
                self._hire()
                for worker in [one for one in self._workers if one.ready and not one.busy]:
                    ready = next((entry for entry in waiting if entry[0] <= time.monotonic()), None)
                    if ready is not None:
                        waiting.remove(ready)
                        worker.give(ready[1])
                while self._answers:
                    self._heard(*self._answers.popleft(), waiting, done)
                time.sleep(0.02)
        finally:
            self.figures.seconds = time.monotonic() - began
            ended.set()
            killing.join()
        self.figures.stuck = tasks - len(done)
        self._count(done)

    def look_for_left(self) -> None:
        """The workers live, and make and remove things: what is seen at both ends of that time has stayed."""

        def left() -> dict[str, list[str]]:
            return all_but(self._traces(), household(self._daemon, self._state_dir))

        first, deadline = left(), time.monotonic() + LEFT_AFTER
        while first and time.monotonic() < deadline:
            time.sleep(1)
            now = left()
            first = {kind: both for kind, had in first.items() if (both := [e for e in had if e in now.get(kind, ())])}
        self.figures.left = first

    def _traces(self) -> dict[str, list[str]]:
        """But for the layer below a container's own, in which dockerd makes a few empty files before it tells the id.

        A dockerd that is killed meanwhile leaves it mounted, in no container's name, and does not unmount it later.
        """
        found = traces(self._daemon, self._state_dir, self._cgroup_parent)
        lost = (
            {mount for mount in found["mounts"] if mount.endswith("-init/merged")} if self._dockerd_is_killed else set()
        )
        self.figures.of_dockerd |= lost
        return {**found, "mounts": [mount for mount in found["mounts"] if mount not in lost]}

    @property
    def _dockerd_is_killed(self) -> bool:
        return self._daemon.kind == "docker" and self.figures.injected["containerd"] > 0

    def assert_all_is_well(self) -> None:
        """Nobody killed is a failure as well."""
        said = self._log.read_text(errors="replace")[-6000:]
        figures = self.figures
        assert figures.injected.total() > 0
        assert (figures.lost, figures.doubled, figures.stuck, figures.left) == (0, 0, 0, {}), said
        assert figures.tries == 0 or set(figures.injected).intersection(OF_A_TASK), said

    def _hire(self) -> None:
        while len(self._workers) < self._wanted:
            self._workers.append(Worker(self._arguments, self._log, self._answers))

    def _heard(self, worker: Worker, answer: str, waiting: list[tuple[float, str]], done: set[str]) -> None:
        number, trial, result, mode = (
            answer.split() if answer else (*worker.busy.split(), "died", "") if worker.busy else ("",) * 4
        )
        worker.busy = ""
        if not answer:
            self._workers.remove(worker)
            worker.end(UNTIL_NEXT_TRY)
        if not number or result == "0":
            self.figures.fresh += mode == "fresh"
            done.update({number} - {""})
            return
        now = time.monotonic()
        if result == "put-off":
            waiting.append((now + 1, f"{number} {trial}"))
            return
        if f"{number} {trial} begin" not in self._witness.read_text().splitlines():
            self.figures.tries += result != "died"
        waiting.append((now + UNTIL_NEXT_TRY, f"{number} {int(trial) + 1}"))

    def _count(self, done: set[str]) -> None:
        lines = Counter(self._witness.read_text().splitlines())
        ends = {line.split()[0] for line in lines if line.endswith(" end")}
        self.figures.lost = len(done - ends)
        self.figures.doubled = sum(count > 1 or line.endswith(" overlap") for line, count in lines.items())

    def _kill_now_and_then(self, kinds: tuple[str, ...], pause: float, most: int, ended: threading.Event) -> None:
        turn = 0
        while kinds and self.figures.injected.total() < most and not ended.wait(pause * self._chance.uniform(0.5, 1.5)):
            kind = kinds[turn % len(kinds)]
            turn += 1
            with suppress(IsolationError):
                self.figures.injected[kind] += self._kill(kind)

    def _kill(self, kind: str) -> bool:
        if kind == "containerd":
            os.kill(self._daemon.pid, signal.SIGKILL)
            time.sleep(self._chance.uniform(1, 3))
            self._daemon.start()
            return True
        victims = sorted(self._victims(kind))
        if not victims:
            return False
        with suppress(ProcessLookupError):
            os.kill(self._chance.choice(victims), signal.SIGKILL)
            return True
        return False

    def _victims(self, kind: str) -> list[int]:
        if kind == "worker":
            return [one.process.pid for one in self._workers if one.busy and int(one.busy.split()[1]) <= MOST_HITS]
        zygotes = {zygote_of(directory) for directory in (self._state_dir / "zygotes").glob("*")}
        if kind in ("shim", "zygote-shim"):
            if self._daemon.kind == "docker":
                pids = [
                    self._runtime.get(one.id).pid
                    for one in self._containers()
                    if (one.id in zygotes) is (kind != "shim")
                ]
                return [parent for pid in pids if pid and (parent := _parent(pid)) > 1]
            own = [shim for shim in shims() if shim.is_of(str(self._daemon.socket), "airflow")]
            return [shim.pid for shim in own if (shim.id in zygotes) is (kind == "zygote-shim")]
        found = [one for one in self._containers() if (one.id in zygotes) is (kind == "zygote")]
        return [pid for one in found if (pid := one.pid or self._runtime.get(one.id).pid)]

    def _containers(self) -> list[Container]:
        return [
            one
            for one in self._runtime.list()
            if one.state is ContainerState.RUNNING and one.labels.get(labels.PURPOSE) in ("task", "spare", "zygote")
        ]

    def end(self) -> None:
        """Workers finish what they have, then zygotes and the spares of killed workers go, and with them all that there is."""
        for worker in self._workers:
            worker.dismiss()
        while self._workers:
            self._workers.pop().end(60)
        for record in self._state_dir.glob("spares/*/*.json"):
            os.utime(record, (0, 0))  # as if they had waited for long
        for directory in self._state_dir.glob("zygotes/*"):
            remove_zygote(self._runtime, directory, state_dir=self._state_dir)
        deadline = time.monotonic() + LEFT_AFTER
        while True:
            prune(self._runtime, state_dir=self._state_dir)
            left = {kind: entries for kind, entries in self._traces().items() if entries}
            if not left:
                return
            assert time.monotonic() < deadline, left
            time.sleep(1)


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@contextmanager
def chaos_on(
    daemon: Daemon, archive: Path, *, chance: Random, image: str = "good", runtime_binary: str = ""
) -> Iterator[Chaos]:
    """Workers of a daemon, with a place of their own; ``archive`` is of an image without Airflow.

    With a ``runtime_binary``, which can map the ids of volumes, tasks are in a user namespace, otherwise privileged zygotes
    fork them.
    """
    form = "docker" if daemon.kind == "docker" else "idmapped" if runtime_binary else "privilege"
    with ExitStack() as undo:
        place = undo.enter_context(short_directory("ai-chaos-"))
        parent = undo.enter_context(own_cgroup_parent("ai-chaos-"))
        bundle, shared, state_dir = place / "dags", place / "shared", place / "s"
        bundle.mkdir(mode=0o755)
        shared.mkdir()
        shared.chmod(0o777)
        witness = shared / "witness"
        witness.touch()
        witness.chmod(0o666)
        address = str(daemon.socket)
        runtime = undo.enter_context(
            connect(daemon.kind, socket_path=address, namespace="airflow", state_dir=state_dir)
        )
        runtime.import_image(stand_ins.stand_in(archive, place / "image.tar", image))
        places = (str(state_dir), stand_ins.reference(image), str(bundle), str(shared), parent)
        chaos = Chaos(
            daemon=daemon,
            runtime=runtime,
            state_dir=state_dir,
            cgroup_parent=parent,
            arguments=[form, runtime_binary, address, *places],
            witness=witness,
            log=place / "workers.log",
            chance=chance,
        )
        undo.callback(chaos.end)
        yield chaos
