"""A zygote: imports Airflow once, then forks a process into a workload's container whenever a worker asks.

It runs in a container of its own, from the same image as the workloads. It is in the host's pid namespace, because a
process can only enter pid namespaces below its own. It has no volume of a user and no secret, and it runs no user code. It
has no network, with one exception: where the workloads use the host's network and share its user namespace, it has the
host's network too. Before it imports anything of the image, it becomes the workloads' user. It keeps only the
capabilities that it needs to enter a container, and no process may trace it. After its hello, the worker that started it
and the agent talk:

1. worker -> agent   {"zygote": {"user": "airflow", "drop": [], "environment": {...}, "modules": ["airflow.…"], "idle": 300.0, "age": 3600.0,
                     "forks": 5000, "memory": 500000000}} and a listening socket (idle and age in seconds, memory in bytes)
2. agent -> worker   {"ready": {"memory": 130000000}}; or {"unable": {"why": …}} and a traceback on stderr, and the agent ends

From then on any worker may ask. Each workload has a connection of its own to the listening socket:

1. worker -> zygote  {"fork": ["ipc", …, "mnt"]} and a descriptor of each of these namespaces of the container, in the order in
                     which to enter them. Nothing else: what the zygote reads, a later child could find in its memory
2. child -> worker   {"forked": {}}, from a fork of the zygote. The worker learns its pid from the kernel, and moves it into
                     the container's cgroups
3. worker -> child   {"go": {"process": {...}, "environment": {...}, "patience": 30.0, "network": true}}: the child enters the
                     container's namespaces; with ``network`` false all but the network namespace, in which it is already.
                     It forks a child, which is inside. That one forks again and ends, so the kernel makes the last child
                     a child of the container's process 1 (``process``: see entry.py; ``environment``: process 1's)
4. child -> worker   {"entered": {}}, from the last child, which now is what ``process`` describes; or {"failed": "why"}
5. worker -> child   {"go": {"environment": {...}, "purpose": "task"}} and four descriptors (requests, stdout, stderr, logs),
                     within ``patience`` seconds, after process 1 has adopted the child; the child hangs up and enters Airflow

Between 4 and 5 a child may wait for its work, in a container that was made ahead. If a connection closes before 5, its
child ends, and nothing has run.
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

#: As many as there are kinds of namespaces.
MOST_NAMESPACES = 8

#: How long a child waits for its worker's first answer, in seconds.
PATIENCE = 30.0

#: How many connections may be open that have not asked yet. A further one replaces the one that has been silent for longest.
MOST_ASKERS = 64


def become_zygote(worker: socket.socket, what: dict[str, Any], listening: int) -> NoReturn:
    """Execute this program anew as the workloads' user, so that its Python starts as theirs would.

    What it then can't import, a workload that is started fresh could not import either.
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
    """Resolve a user's name or uid, with or without a group's name or gid, as runtimes do; empty is root.

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
    """Import Airflow, then fork for each worker that asks, until a limit is reached or no worker came for a while."""
    # A process that could trace this one would have its capabilities.
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
    """The loop. It blocks only in ``poll``, so a connection that says nothing keeps no other waiting."""

    def __init__(self, listener: socket.socket, wakeups: int, limits: dict[str, Any]) -> None:
        self.listener = listener
        self.wakeups = wakeups
        self.limits = limits
        #: The connections that have not asked yet, the oldest first, and since when each is open.
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
        """Close connections that said nothing for too long: they must not keep the zygote alive."""
        end = time.monotonic() - PATIENCE
        for descriptor in [descriptor for descriptor, (_, since) in self.askers.items() if since < end]:
            self.taken(poll, descriptor).close()

    def taken(self, poll: select.poll, descriptor: int) -> socket.socket:
        """Take a connection out of the loop."""
        poll.unregister(descriptor)
        return self.askers.pop(descriptor)[0]

    def answer(self, asker: socket.socket) -> None:
        """Read the one message of a connection, and fork. If the message is wrong, say so there, and go on."""
        descriptors: list[int] = []
        try:
            message, descriptors = agent.receive_work(asker, MOST_NAMESPACES)
            if message is None:
                return  # a worker only looked whether there is a zygote: that doesn't keep it alive
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
        # Open copies of these sockets would keep other workers waiting when the zygote dies.
        for inherited in zygotes_own:
            inherited.close()
        what, _ = await_go(worker, {"forked": {}}, PATIENCE)
        if not what["network"]:
            del namespaces["net"]
        entry.enter_namespaces(namespaces.values())
        # When a process ends, the kernel looks for its children's new parent in the pid namespace of that process. So only
        # a process inside the container leaves its child to the container's process 1.
        if entry.bare_fork() or entry.bare_fork():
            os._exit(0)
        # The channels will take 0 to 3: after that, a failure must not be written to the log.
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
    """The worker does not need this child any more."""


def await_go(worker: socket.socket, message: dict[str, Any], patience: float) -> tuple[dict[str, Any], list[int]]:
    """Send ``message``, and wait for the worker's answer "go", with its content and descriptors.

    :raises WorkerGone: the worker hung up, or said nothing for ``patience`` seconds.
    """
    worker.settimeout(patience)
    worker.send(json.dumps(message).encode())
    answer, descriptors = agent.receive_work(worker)
    if answer is None or "go" not in answer:
        raise WorkerGone("the worker does not want this child any more")
    return answer["go"], descriptors
