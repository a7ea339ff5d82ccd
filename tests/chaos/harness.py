"""Workers that are given tasks, and what is killed meanwhile; in the end a row of figures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.bridge.zygote import zygote_of
from airflow_isolation.errors import IsolationError
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import ContainerState
from airflow_isolation.runtime.shims import shims

if TYPE_CHECKING:
    from random import Random

    from tests.conftest import Daemon

    from airflow_isolation.runtime.interface import Container, ContainerRuntime

#: What is killed with SIGKILL. These kill user code, or who waits for it, and so use up a try.
OF_A_TASK = ("agent", "shim", "worker")
KINDS = ("containerd", *OF_A_TASK, "zygote", "zygote-shim")
WORKERS = 4
#: A task whose worker died is tried again when its container has ended: the grace period, and a little more.
UNTIL_NEXT_TRY = 6.0
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Figures:
    """One row. Only ``injected`` may be other than 0; and ``tries`` where faults kill user code itself."""

    injected: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    stuck: int = 0
    left: dict[str, list[str]] = field(default_factory=dict)
    #: Used up though no user code had run.
    tries: int = 0

    def __str__(self) -> str:
        left = sum(map(len, self.left.values()))
        return (
            f"| {', '.join(self.injected)} | {self.injected.total()} | {self.lost} | {self.doubled} | {self.stuck} "
            f"| {left} | {self.tries} |"
        )


class Worker:
    """A process of worker.py with one task at a time, and a thread that hears what it says."""

    def __init__(self, arguments: list[str], log: Path, answers: deque[tuple[Worker, str]]) -> None:
        self.busy = ""
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
            if line.startswith("answer "):
                self._answers.append((self, line.removeprefix("answer ").strip()))
        self._answers.append((self, ""))

    def end(self, seconds: float) -> None:
        """Let it finish; killed when it doesn't."""
        with suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()
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
        arguments: list[str],
        log: Path,
        chance: Random,
    ) -> None:
        self.figures = Figures()
        self._daemon = daemon
        self._runtime = runtime
        self._state_dir = state_dir
        self._arguments = arguments
        self._log = log
        self._chance = chance
        self._answers: deque[tuple[Worker, str]] = deque()
        self._workers: list[Worker] = []

    def run(self, kinds: tuple[str, ...], tasks: int, *, witness: Path, pause: float, seconds: float) -> None:
        waiting = [(0.0, f"{number} 1") for number in range(tasks)]
        done: set[str] = set()
        ended = threading.Event()
        killing = threading.Thread(target=self._kill_now_and_then, args=(kinds, pause, ended))
        deadline = time.monotonic() + seconds
        killing.start()
        try:
            while len(done) < tasks and time.monotonic() < deadline:
                self._hire()
                for worker in [one for one in self._workers if not one.busy]:
                    ready = next((entry for entry in waiting if entry[0] <= time.monotonic()), None)
                    if ready is not None:
                        waiting.remove(ready)
                        worker.give(ready[1])
                while self._answers:
                    self._heard(*self._answers.popleft(), waiting, done, witness)
                time.sleep(0.02)
        finally:
            ended.set()
            killing.join()
        self.figures.stuck = tasks - len(done)
        self._count(witness, done)

    def _hire(self) -> None:
        while len(self._workers) < WORKERS:
            self._workers.append(Worker(self._arguments, self._log, self._answers))

    def _heard(
        self, worker: Worker, answer: str, waiting: list[tuple[float, str]], done: set[str], witness: Path
    ) -> None:
        number, trial, result = (
            answer.split() if answer else (*worker.busy.split(), "died") if worker.busy else ("",) * 3
        )
        worker.busy = ""
        if not answer:
            self._workers.remove(worker)
            worker.end(UNTIL_NEXT_TRY)
        if not number or result == "0":
            done.update({number} - {""})
            return
        now = time.monotonic()
        if result == "put-off":
            waiting.append((now + 1, f"{number} {trial}"))
            return
        if f"{number} {trial} begin" not in witness.read_text().splitlines():
            self.figures.tries += result != "died"
        waiting.append((now + UNTIL_NEXT_TRY, f"{number} {int(trial) + 1}"))

    def _count(self, witness: Path, done: set[str]) -> None:
        lines = Counter(witness.read_text().splitlines())
        ends = {line.split()[0] for line in lines if line.endswith(" end")}
        self.figures.lost = len(done - ends)
        self.figures.doubled = sum(count > 1 or line.endswith(" overlap") for line, count in lines.items())

    def _kill_now_and_then(self, kinds: tuple[str, ...], pause: float, ended: threading.Event) -> None:
        turn = 0
        while not ended.wait(pause * self._chance.uniform(0.5, 1.5)):
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
            return [worker.process.pid for worker in self._workers if worker.busy]
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

    def close(self) -> None:
        """Workers finish what they have; may be called twice."""
        while self._workers:
            self._workers.pop().end(60)


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
