"""A zygote: imports Airflow once, then forks a process into a workload's container for everyone who asks.

It runs in a container of its own, from the same image as the workloads, but in the host's pid namespace,
because a process can only be put into pid namespaces below its own. It has no network (but the host's, where
that is the workload's and the two have a user namespace), no volume of a user and no secret, and it runs no user code. After its hello the conversation with the worker that started it is

1. worker -> agent   {"zygote": {"user": "airflow", "environment": {...}, "modules": ["airflow.…"], "idle": 300.0, "age": 3600.0,
                     "forks": 5000, "memory": 500000000}} and a listening socket (idle and age in seconds, memory in bytes)
2. agent -> worker   {"ready": {"memory": 130000000}}, or {"unable": {"why": …}} and a traceback on stderr, and it ends

and that worker is then one of many. Each workload is a connection of its own to the listening socket:

1. worker -> zygote  {"fork": {}} and a pidfd of the container's process 1. Nothing else: what the zygote once read, a later
                     child could find in its memory
2. child -> worker   {"forked": {}}: a fork of the zygote. Which process it is, the kernel tells the worker, which moves it
                     into the container's cgroups
3. worker -> child   {"go": {"process": {...}, "environment": {...}, "patience": 30.0, "network": true}}: it enters the
                     container's namespaces, all of them or all but the ``network``, in which it is. A child of it is inside; it forks again and ends, and so the kernel gives its child to the container's
                     process 1 (``process``: entry.py; ``environment``: of that process 1)
4. child -> worker   {"entered": {}}, from that child, which by now has become what ``process`` says; or {"failed": "why"}
5. worker -> child   {"go": {"environment": {...}, "purpose": "task"}} and four descriptors (requests, stdout, stderr, logs),
                     within ``patience`` seconds, once process 1 knows whom it got; the child hangs up and enters Airflow

Between 4 and 5 a child may wait for its work, in a container that was made ahead. A connection that closes before 5
ends its child, and nothing has run.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False  # as in agent.py
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from airflow_isolation.agent import agent, entry, preload
else:
    import agent
    import entry
    import preload

#: Without these a child can't run a task.
REQUIRED = (
    "airflow.sdk.execution_time.supervisor",
    "airflow.sdk.execution_time.task_runner",
    "airflow.dag_processing.dagbag",
)

#: How long a child waits for its worker's first answer, in seconds.
PATIENCE = 30.0

#: Connections that have not asked yet; who comes after them waits in the socket's queue.
MOST_ASKERS = 64


def become_zygote(worker: socket.socket, what: dict[str, Any], listening: int) -> NoReturn:
    """Execute this program anew, so that Python finds at its start the environment that workloads have."""
    environment = {**os.environ, **what["environment"], "HOME": home_of(what["user"])}
    limits = {name: what[name] for name in ("modules", "idle", "age", "forks", "memory")}
    for descriptor in (worker.fileno(), listening):
        os.set_inheritable(descriptor, True)
    arguments = ["zygote", str(worker.fileno()), str(listening), json.dumps(limits)]
    os.execve(sys.executable, [sys.executable, agent.__file__, *arguments], environment)


def home_of(user: str) -> str:
    """The home directory in this image of a name or uid, with or without a gid; as runtimes decide it."""
    name = user.partition(":")[0]
    try:
        account = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        return "/tmp"  # noqa: S108 - the container's own tmpfs
    return account.pw_dir


def main(worker_descriptor: str, listening: str, limits: str) -> int:
    """Import Airflow, then fork for everyone who connects, until a limit is reached or nobody comes any more."""
    what = json.loads(limits)
    with socket.socket(fileno=int(worker_descriptor)) as worker:
        worker.set_inheritable(False)
        os.set_inheritable(int(listening), False)
        try:
            preload.import_airflow(worker, REQUIRED, (*preload.USUAL, *what["modules"]))
        except preload.Unable as error:
            agent.say(worker, {"unable": {"why": str(error)}})
            return 1
        agent.discard_standard_streams()
        wakeups = preload.listen_to_children_alone()
        agent.say(worker, {"ready": {"memory": preload.memory()}})
    with socket.socket(fileno=int(listening)) as listener:
        listener.setblocking(False)
        Zygote(listener, wakeups, what).run()
    return 0


class Zygote:
    """The loop. It blocks nowhere but in ``poll``: an asker that says nothing keeps nobody else waiting."""

    def __init__(self, listener: socket.socket, wakeups: int, limits: dict[str, Any]) -> None:
        self.listener = listener
        self.wakeups = wakeups
        self.limits = limits
        self.askers: dict[int, socket.socket] = {}
        self.forks = 0
        self.born = time.monotonic()
        self.last_asked = self.born

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(self.wakeups, select.POLLIN)
        while not self.is_over():
            for descriptor, _ in poll.poll(1000):
                if descriptor == self.wakeups:
                    os.read(self.wakeups, 512)
                    agent.reap(0)
                elif descriptor == self.listener.fileno():
                    self.welcome(poll)
                else:
                    poll.unregister(descriptor)
                    with self.askers.pop(descriptor) as asker:
                        self.answer(asker)

    def is_over(self) -> bool:
        now = time.monotonic()
        return (
            self.forks >= self.limits["forks"]
            or now - self.born >= self.limits["age"]
            or now - self.last_asked >= self.limits["idle"]
            or (self.forks % 16 == 0 and preload.memory() > self.limits["memory"])
        ) and not self.askers

    def welcome(self, poll: select.poll) -> None:
        if len(self.askers) >= MOST_ASKERS:
            return
        try:
            asker, _ = self.listener.accept()
        except OSError:
            return  # it is gone already
        self.askers[asker.fileno()] = asker
        poll.register(asker, select.POLLIN)

    def answer(self, asker: socket.socket) -> None:
        """Take the one message of an asker, and fork. Whatever is wrong with it, it is told, and the zygote goes on."""
        message, descriptors = agent.receive_work(asker)
        try:
            if message is None:
                return  # who only looks whether there is a zygote does not keep it alive
            self.last_asked = time.monotonic()
            (pidfd,) = descriptors
            self.forks += 1
            if not entry.bare_fork():
                become_child(asker, pidfd, (self.listener, *self.askers.values()))
        except (OSError, ValueError, KeyError) as error:
            agent.say(asker, {"failed": f"the zygote could not fork: {error!r:.500}"})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def become_child(worker: socket.socket, pidfd: int, zygotes_own: tuple[socket.socket, ...]) -> NoReturn:
    """In the fork: it must never return into the zygote's loop."""
    try:
        signal.set_wakeup_fd(-1)
        # Copies of them would keep those who ask waiting when the zygote dies.
        for inherited in zygotes_own:
            inherited.close()
        what, _ = await_go(worker, {"forked": {}}, PATIENCE)
        entry.enter_namespaces(pidfd, entry.NAMESPACES if what["network"] else entry.ALL_BUT_NETWORK)
        # The kernel looks for a new father in the pid namespace of the one that ends: only who is inside himself leaves
        # his child to the container's process 1.
        if entry.bare_fork() or os.fork():
            os._exit(0)
        # The channels will take 0 to 3: what fails after that must not be told to the log.
        worker = socket.socket(fileno=fcntl.fcntl(worker.detach(), fcntl.F_DUPFD_CLOEXEC, 10))
        entry.become(what["process"], what["environment"], keep=worker.fileno())
        work, channels = await_go(worker, {"entered": {}}, what["patience"])
        entry.take_up(work["environment"], channels)
        worker.close()
        sys.argv = [agent.__file__, "run", work["purpose"]]
        agent.enter_airflow(work["purpose"])
    except BaseException as error:
        agent.say(worker, {"failed": f"{type(error).__name__}: {error!s:.800}"})
    finally:
        os._exit(127)


class WorkerGone(Exception):
    """Nobody wants this child any more."""


def await_go(worker: socket.socket, message: dict[str, Any], patience: float) -> tuple[dict[str, Any], list[int]]:
    """Say where we are, and wait for leave to go on, with what is needed for it and descriptors.

    :raises WorkerGone: it hung up, or says nothing for ``patience`` seconds.
    """
    worker.settimeout(patience)
    worker.send(json.dumps(message).encode())
    answer, descriptors = agent.receive_work(worker)
    if answer is None or "go" not in answer:
        raise WorkerGone("the worker does not want this child any more")
    return answer["go"], descriptors
