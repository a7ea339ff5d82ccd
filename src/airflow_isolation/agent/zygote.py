"""A zygote: imports Airflow once, then forks a process into a workload's container for everyone who asks.

It runs in a container of its own, from the same image as the workloads, but in the host's pid namespace,
because a process can only be put into pid namespaces below its own. It has no network (but the host's, where
that is the workload's and the two have a user namespace), no volume of a user and no secret, and it runs no user code.
Before it imports anything of the image it becomes the workloads' user, with the capabilities that entering a container
takes and no other, and nobody may trace it. After its hello the conversation with the worker that started it is

1. worker -> agent   {"zygote": {"user": "airflow", "drop": [], "environment": {...}, "modules": ["airflow.…"], "idle": 300.0, "age": 3600.0,
                     "forks": 5000, "memory": 500000000}} and a listening socket (idle and age in seconds, memory in bytes)
2. agent -> worker   {"ready": {"memory": 130000000}}, or {"unable": {"why": …}} and a traceback on stderr, and it ends

and that worker is then one of many. Each workload is a connection of its own to the listening socket:

1. worker -> zygote  {"fork": ["ipc", …, "mnt"]} and the container's namespaces of these kinds, a descriptor each, in the order
                     in which they are entered. Nothing else: what the zygote once read, a later child could find in its memory
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
import grp
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

#: There are no more kinds of namespaces.
MOST_NAMESPACES = 8

#: How long a child waits for its worker's first answer, in seconds.
PATIENCE = 30.0

#: Connections that have not asked yet; who comes after them takes the place of the one that has been silent for longest.
MOST_ASKERS = 64


def become_zygote(worker: socket.socket, what: dict[str, Any], listening: int) -> NoReturn:
    """Execute this program anew as the workloads' user, so that Python finds at its start what theirs would.

    What it could not import as that user, a workload that is started fresh could not either.
    """
    account = account_of(what["user"])
    environment = {**os.environ, **what["environment"], "HOME": account.home}
    limits = {name: what[name] for name in ("modules", "idle", "age", "forks", "memory")}
    for descriptor in (worker.fileno(), listening):
        os.set_inheritable(descriptor, True)
    arguments = ["zygote", str(worker.fileno()), str(listening), json.dumps(limits)]
    entry.take_user(account.uid, account.gid, account.groups, drop=what["drop"])
    os.execve(sys.executable, [sys.executable, agent.__file__, *arguments], environment)


class Account:
    """A user as this image knows it: numbers, and the home directory."""

    def __init__(self, uid: int, gid: int, groups: list[int], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


def account_of(user: str) -> Account:
    """A user's name or uid, with or without a group's name or gid; empty is root. As runtimes decide it.

    :raises KeyError: a name that the image does not know.
    """
    name, _, group = user.partition(":")
    try:
        known = pwd.getpwuid(int(name or 0)) if (name or "0").isdecimal() else pwd.getpwnam(name)
    except KeyError:
        if not name.isdecimal():
            raise
        uid, gid, groups, home = int(name), 0, [], "/tmp"  # noqa: S108 - the container's own tmpfs
    else:
        uid, gid, home = known.pw_uid, known.pw_gid, known.pw_dir
        groups = os.getgrouplist(known.pw_name, gid)
    if group:
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        groups = []
    return Account(uid, gid, [gid, *(one for one in groups if one != gid)], home)


def main(worker_descriptor: str, listening: str, limits: str) -> int:
    """Import Airflow, then fork for everyone who connects, until a limit is reached or nobody comes any more."""
    # Its capabilities would be those of whoever could trace it.
    entry.prctl(entry.PR_SET_DUMPABLE, 0)
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
        #: Who has connected and not asked yet, the oldest first; and since when.
        self.askers: dict[int, tuple[socket.socket, float]] = {}
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
                    with self.taken(poll, descriptor) as asker:
                        self.answer(asker)
            self.forget_silent(poll)

    def is_over(self) -> bool:
        now = time.monotonic()
        return (
            self.forks >= self.limits["forks"]
            or now - self.born >= self.limits["age"]
            or now - self.last_asked >= self.limits["idle"]
            or (self.forks % 16 == 0 and preload.memory() > self.limits["memory"])
        ) and not self.askers

    def welcome(self, poll: select.poll) -> None:
        try:
            asker, _ = self.listener.accept()
        except OSError:
            return  # it is gone already
        if len(self.askers) >= MOST_ASKERS:
            self.taken(poll, next(iter(self.askers))).close()
        self.askers[asker.fileno()] = (asker, time.monotonic())
        poll.register(asker, select.POLLIN)

    def forget_silent(self, poll: select.poll) -> None:
        """Who connects and says nothing must not keep the zygote alive."""
        end = time.monotonic() - PATIENCE
        for descriptor in [descriptor for descriptor, (_, since) in self.askers.items() if since < end]:
            self.taken(poll, descriptor).close()

    def taken(self, poll: select.poll, descriptor: int) -> socket.socket:
        """An asker, who is not listened to any more."""
        poll.unregister(descriptor)
        return self.askers.pop(descriptor)[0]

    def answer(self, asker: socket.socket) -> None:
        """Take the one message of an asker, and fork. Whatever is wrong with it, it is told, and the zygote goes on."""
        descriptors: list[int] = []
        try:
            message, descriptors = agent.receive_work(asker, MOST_NAMESPACES)
            if message is None:
                return  # who only looks whether there is a zygote does not keep it alive
            self.last_asked = time.monotonic()
            namespaces = dict(zip(message["fork"], descriptors, strict=True))
            self.forks += 1
            if not entry.bare_fork():
                become_child(asker, namespaces, (self.listener, *(one for one, _ in self.askers.values())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            agent.say(asker, {"failed": f"the zygote could not fork: {error!r:.500}"})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def become_child(worker: socket.socket, namespaces: dict[str, int], zygotes_own: tuple[socket.socket, ...]) -> NoReturn:
    """In the fork: it must never return into the zygote's loop."""
    try:
        signal.set_wakeup_fd(-1)
        # Copies of them would keep those who ask waiting when the zygote dies.
        for inherited in zygotes_own:
            inherited.close()
        what, _ = await_go(worker, {"forked": {}}, PATIENCE)
        if not what["network"]:
            del namespaces["net"]
        entry.enter_namespaces(namespaces.values())
        # The kernel looks for a new father in the pid namespace of the one that ends: only who is inside himself leaves
        # his child to the container's process 1.
        if entry.bare_fork() or entry.bare_fork():
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
