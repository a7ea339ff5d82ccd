"""Process 1 of a parse container, after its hello: imports Airflow, then forks a child of itself for each file.

The conversation of agent.py goes on with

1. worker -> agent   {"serve": {"environment": {...}, "scratch": ["/tmp", "/dev/shm"]}}
2. agent -> worker   {"ready": {"memory": 130000000}} (bytes of process 1); or {"unable": {"why": …}} and a traceback on
                     stderr, and the agent ends
3. worker -> agent   {"parse": {"environment": {...}, "modules": ["airflow.providers.…"]}} and four descriptors;
                     process 1 first imports the modules, which the worker found in the file's imports: once for all files
4. agent -> worker   {"started": {}}
5. worker -> agent   {"signal": 9}, any number of times: every process but process 1 is killed
6. agent -> worker   {"exited": {"code": 0, "memory": 130000000}}, once all that the file left behind is gone;
                     then 3 again

When the connection closes, process 1 ends at once, and the kernel kills all other processes.

A file must not affect the next one. It could do so in three ways:
- It leaves processes, files or IPC objects behind. All are removed.
- It gets at process 1. That is not dumpable (no ptrace, no /proc/1/mem, no /proc/1/fd), and handles no signal of a child's.
- It changes limits or priorities of process 1, which forks inherit. They are compared, and any change ends process 1.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import sys
import time

TYPE_CHECKING = False  # as in agent.py
if TYPE_CHECKING:
    import socket
    from typing import Any

    from airflow_isolation.agent import agent, preload
else:
    import agent
    import preload

#: Seconds for removing what a file left behind; a container that takes longer is not used again.
WIPE_SECONDS = 5.0

#: Without these a child can't parse.
REQUIRED = (
    "airflow.dag_processing.processor",
    "airflow.sdk.execution_time.supervisor",
    "airflow.sdk.execution_time.task_runner",
    "airflow.serialization.serialized_objects",
)

# Of shmctl(2), msgctl(2) and semctl(2).
IPC_RMID = 0

# linux/ioprio.h, linux/sched/types.h
IOPRIO_WHO_PROCESS = 1
SCHED_ATTR_SIZE_VER1 = 56

# asm/unistd.h
SYSTEM_CALLS = {
    "x86_64": {"ioprio_get": 252, "sched_getattr": 315},
    "aarch64": {"ioprio_get": 31, "sched_getattr": 275},
}.get(os.uname().machine, {})


def serve(worker: socket.socket, what: dict[str, Any]) -> int:
    """Import Airflow, then fork a child for each file, until the worker is gone or a file's traces can't be removed."""
    os.environ.update(what["environment"])
    try:
        preload.import_airflow(worker, REQUIRED)
    except preload.Unable as error:
        agent.say(worker, {"unable": {"why": str(error)}})
        return 1
    agent.discard_standard_streams()
    agent.set_dumpable(False)
    wakeups = preload.listen_to_children_alone()
    return Server(worker, wakeups, what["scratch"]).run()


class Server:
    """Process 1 after its import: one child at a time. It blocks nowhere but in ``poll``."""

    def __init__(self, worker: socket.socket, wakeups: int, scratch: list[str]) -> None:
        self.worker = worker
        self.wakeups = wakeups
        self.scratch = [Scratch(directory) for directory in scratch]
        self.child = 0
        self.wiper = 0
        self.ended: dict[str, int] = {}
        self.wipe_until = 0.0
        self.last = False

    def run(self) -> int:
        untouched = inherited_traits()
        agent.say(self.worker, {"ready": {"memory": preload.memory()}})
        poll = select.poll()
        poll.register(self.worker, select.POLLIN)
        poll.register(self.wakeups, select.POLLIN)
        while True:
            wait = max(0, int((self.wipe_until - time.monotonic()) * 1000) + 1) if self.wiper else None
            events = dict(poll.poll(wait))
            if self.wakeups in events:
                os.read(self.wakeups, 512)
            if self.worker.fileno() in events and not self.listen():
                return 0
            if self.child and (status := agent.reap(self.child)) is not None:
                self.child = 0
                agent.end_everyone_else()
                self.ended = agent.how_it_ended(status)
                if self.last or inherited_traits() != untouched:
                    self.report()
                    return 1
                if self.clean():
                    self.report()
                else:
                    self.start_wiper()
            elif self.wiper:
                status = agent.reap(self.wiper)
                if status is None and time.monotonic() < self.wipe_until:
                    continue
                self.report()
                if status != 0:
                    return 1
                self.wiper = 0
            elif not self.child:
                agent.reap(0)

    def listen(self) -> bool:
        """Take one message; False when the worker is gone or its message can't be obeyed."""
        message, descriptors = agent.receive_work(self.worker)
        if message is None:
            return False
        if "parse" in message:
            if self.child or self.wiper:
                return False
            preload.preload(module for module in message["parse"]["modules"] if module.startswith("airflow."))
            # If the import left threads, process 1 is still forked, as stock Airflow does, but it is soon replaced.
            self.last = self.last or preload.threads() > 1
            self.child = fork_parse(message["parse"]["environment"], descriptors, self.worker)
            for descriptor in descriptors:
                os.close(descriptor)
            agent.say(self.worker, {"started": {}})
        elif "signal" in message:
            if self.wiper:
                # The file's parse has ended; what is left goes with the container.
                self.report()
                return False
            if self.child:
                agent.kill_everyone_else()
        return True

    def clean(self) -> bool:
        return all(scratch.is_clean() for scratch in self.scratch) and not ipc_objects()

    def start_wiper(self) -> None:
        self.wipe_until = time.monotonic() + WIPE_SECONDS
        self.wiper = os.fork()
        if self.wiper:
            return
        try:
            signal.set_wakeup_fd(-1)
            for scratch in self.scratch:
                scratch.wipe()
            remove_ipc_objects()
            os._exit(0 if self.clean() else 1)
        finally:
            os._exit(1)

    def report(self) -> None:
        agent.say(self.worker, {"exited": {**self.ended, "memory": preload.memory()}})


def fork_parse(environment: dict[str, str], descriptors: list[int], worker: socket.socket) -> int:
    child = os.fork()
    if child:
        return child
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        # While it is not dumpable, files in /proc/self belong to root. With oom_score_adj, the kernel kills this child when
        # memory is short, not process 1.
        agent.set_dumpable(True)
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
        spares = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in descriptors]
        for target, descriptor in enumerate(spares):
            os.dup2(descriptor, target, inheritable=target != agent.LOGS_DESCRIPTOR)
        worker.detach()
        # The child must not reach the worker's connection, nor descriptors that the import opened.
        for name in os.listdir("/proc/self/fd"):
            if int(name) > agent.LOGS_DESCRIPTOR:
                try:
                    os.close(int(name))
                except OSError:
                    pass  # the listing's own
        os.environ.update(environment)
        agent.enter_airflow("parse")
    except BaseException as error:
        os.write(2, f"The agent could not start the parse: {error!r}\n".encode())
    finally:
        os._exit(127)


def inherited_traits() -> tuple[object, ...]:
    """The attributes of this process that others of the same user may change, and that forks inherit."""
    import resource

    with open("/proc/self/mountinfo", "rb") as mounts:
        return (
            [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")],
            os.getpriority(os.PRIO_PROCESS, 0),
            os.sched_getscheduler(0),
            os.sched_getparam(0),
            os.sched_getaffinity(0),
            traits_without_a_module(),
            mounts.read(),
        )


def traits_without_a_module() -> tuple[int, bytes]:
    """This process's class of disk access; and its turns and bounds on a processor, which the module `os` does not know."""
    import ctypes

    attributes = ctypes.create_string_buffer(SCHED_ATTR_SIZE_VER1)
    if not SYSTEM_CALLS:
        return 0, attributes.raw
    call = ctypes.CDLL(None).syscall
    # What a kernel is not made with is as good as unchanged: it answers with an error each time.
    call(ctypes.c_long(SYSTEM_CALLS["sched_getattr"]), 0, attributes, SCHED_ATTR_SIZE_VER1, 0)
    return call(ctypes.c_long(SYSTEM_CALLS["ioprio_get"]), IOPRIO_WHO_PROCESS, 0), attributes.raw


class Scratch:
    """A directory that looks the same to every file: what is in it at the start is kept, what comes later is removed.

    Mount points in it are the user's volumes and are never touched. ``wipe`` needs all other processes gone.
    """

    def __init__(self, top: str) -> None:
        self.top = top
        self.directories = {top}
        self.known: set[str] = set()
        for point in mount_points():
            if point.startswith(top + "/"):
                self.known.add(point)
                while (point := os.path.dirname(point)) != top:
                    self.directories.add(point)
        self.known |= self.directories
        # Removes what the import left. What came with the image belongs to root, and stays.
        self.wipe()
        for directory, names, files in os.walk(top):
            names[:] = [name for name in names if os.path.join(directory, name) not in self.known - self.directories]
            self.directories.update(os.path.join(directory, name) for name in names)
            self.known.update(os.path.join(directory, name) for name in (*names, *files))

    def is_clean(self) -> bool:
        return not any(
            os.path.join(directory, name) not in self.known
            for directory in self.directories
            for name in entries(directory)
        )

    def wipe(self) -> None:
        """Remove as much as can be. Directories are first moved to the top: paths stay short and nothing recurses."""
        moved = 0
        remaining = list(self.directories)
        while remaining:
            directory = remaining.pop()
            for name in entries(directory):
                path = os.path.join(directory, name)
                if path in self.known:
                    continue
                try:
                    if not stat.S_ISDIR(os.lstat(path).st_mode):
                        os.unlink(path)
                        continue
                    os.chmod(path, 0o700)
                    if directory not in self.directories:
                        while os.path.lexists(target := os.path.join(self.top, f".wiped-{moved}")):
                            moved += 1
                        os.rename(path, target)
                        path = target
                    remaining.append(path)
                except OSError:
                    pass  # is_clean finds out whether it matters
            if directory not in self.directories:
                try:
                    os.rmdir(directory)
                except OSError:
                    pass


def entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def mount_points() -> list[str]:
    with open("/proc/self/mountinfo", encoding=sys.getfilesystemencoding(), errors="surrogateescape") as mounts:
        fields = [line.split(" ")[4] for line in mounts]
    # Space, tab, newline and backslash are written as three octal digits (proc_pid_mountinfo(5)).
    return [
        first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)
        for first, *rest in (field.split("\\") for field in fields)
    ]


def ipc_objects() -> list[tuple[str, int]]:
    """System V shared memory, message queues and semaphores: they outlive the processes that made them."""
    found: list[tuple[str, int]] = []
    for kind in ("shm", "msg", "sem"):
        try:
            with open(f"/proc/sysvipc/{kind}") as objects:
                found += [(kind, int(line.split()[1])) for line in objects.readlines()[1:]]
        except FileNotFoundError:  # a kernel without them
            continue
    return found


def remove_ipc_objects() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for kind, id in ipc_objects():
        if kind == "sem":
            libc.semctl(id, 0, IPC_RMID)
        else:
            getattr(libc, f"{kind}ctl")(id, IPC_RMID, None)
