"""Process 1 of a container: starts workloads, reaps, passes signals on, and never outlives its worker.

Standard library only; it runs with whatever Python the image has. The conversation with the worker goes over
one SOCK_SEQPACKET connection, one JSON message a packet, and begins with

    agent -> worker   {"hello": {"agent": 1, "python": "3.12.1", "airflow": "3.3.2", "task_sdk": "1.3.2"}}

One workload, as for a task:

1. worker -> agent   {"start": {"purpose": "task", "environment": {...}, "grace": 10.0}} and four descriptors,
                     in the order of Airflow's supervisor: requests, stdout, stderr, logs
2. worker -> agent   {"signal": 15}, any number of times
3. agent -> worker   {"exited": {"code": 0}} or {"exited": {"signal": 9}}

The connection is the lifeline. When it closes before 3 the worker is dead: SIGTERM, the grace period, SIGKILL, end.

The workload's process is this file again, executed anew as ``agent.py run PURPOSE`` with the descriptors as
0 (requests), 1 (stdout), 2 (stderr) and 3 (logs), so that even a failing ``import airflow`` ends in the task's log.

Many files to parse, one after the other, each in a fork of process 1, which has imported Airflow:

1. worker -> agent   {"serve": {"environment": {...}, "scratch": ["/tmp", "/dev/shm"]}}
2. agent -> worker   {"ready": {"memory": 130000000}} (bytes of process 1), or it ends with a traceback on stderr
3. worker -> agent   {"parse": {"environment": {...}, "modules": ["airflow.providers.…"]}} and four descriptors;
                     process 1 first imports the modules, which the file is said to use, for this file and all others
4. agent -> worker   {"started": {}}
5. worker -> agent   {"signal": 9}, any number of times: every process but process 1 is killed
6. agent -> worker   {"exited": {"code": 0, "memory": 130000000}}, once all that the file left behind is gone;
                     then 3 again

When the connection closes, process 1 ends at once, and the kernel kills everybody else.
What a file could do to the next one: leave processes, files or IPC objects behind (all are removed), get at process 1
(it is not dumpable: no ptrace, no /proc/1/mem, no /proc/1/fd; it has no handler that a signal could reach), or change
limits and priorities of process 1, which forks inherit (they are compared; any change ends process 1).
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import select
import selectors
import signal
import socket
import stat
import sys
import time

VERSION = 1
PACKET_LIMIT = 1024 * 1024
LOGS_DESCRIPTOR = 3

#: Seconds for removing what a file left behind; a container that takes longer is not used again.
WIPE_SECONDS = 5.0

#: Without these a child can't parse.
REQUIRED = (
    "airflow.dag_processing.processor",
    "airflow.sdk.execution_time.supervisor",
    "airflow.sdk.execution_time.task_runner",
    "airflow.serialization.serialized_objects",
)

#: What nearly every parse imports while it runs, 0.1 s of CPU; in process 1 it costs once. Not every image has all.
USUAL = (
    "airflow.models.serialized_dag",
    "airflow.providers.standard.operators.bash",
    "airflow.providers.standard.operators.empty",
    "airflow.providers.standard.operators.python",
    "airflow.providers.standard.operators.trigger_dagrun",
    "airflow.providers.standard.sensors.external_task",
)

# prctl(2) and the IPC_RMID of shmctl(2), msgctl(2) and semctl(2).
PR_SET_DUMPABLE = 4
IPC_RMID = 0

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

TYPE_CHECKING = False  # importing it from typing would cost every container a few milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, from its .dist-info directory's name; importing it would cost seconds."""
    prefix = distribution.lower() + "-"
    for directory in sys.path:
        try:
            names = os.listdir(directory or ".")
        except OSError:  # a zip archive or a directory that does not exist
            continue
        for name in names:
            if name.lower().startswith(prefix) and name.endswith(".dist-info"):
                return name[len(prefix) : -len(".dist-info")]
    return None


def hello() -> dict[str, Any]:
    return {
        "agent": VERSION,
        "python": ".".join(map(str, sys.version_info[:3])),
        "airflow": installed_version("apache_airflow_core"),
        "task_sdk": installed_version("apache_airflow_task_sdk"),
    }


def converse(address: str) -> int:
    """Talk to the worker; gives the exit code for process 1 (128+n after signal n)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as worker:
        worker.connect(address)
        worker.send(json.dumps({"hello": hello()}).encode())
        message, descriptors = receive_work(worker)
        if message is None:
            return 0  # the worker did not want us, or is gone: nothing has been started
        if "serve" in message:
            return serve(worker, message["serve"])
        return run_one(worker, message["start"], descriptors)


def receive_work(worker: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message, which may bring descriptors; None when the worker is gone."""
    try:
        packet, descriptors, _, _ = socket.recv_fds(worker, PACKET_LIMIT, 4)
    except OSError:
        return None, []
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # recv_fds drops its flags argument, MSG_CMSG_CLOEXEC with it
    return (json.loads(packet) if packet else None), descriptors


def run_one(worker: socket.socket, start: dict[str, Any], descriptors: list[int]) -> int:
    """Run one workload to its end, and end."""
    wakeups = listen_to_signals()
    child = fork_workload(start, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    discard_standard_streams()
    status = watch(child, worker, wakeups, start["grace"])
    end_everyone_else()
    end = how_it_ended(status)
    say(worker, {"exited": end})
    return end["code"] if "code" in end else 128 + end["signal"]


def how_it_ended(status: int) -> dict[str, int]:
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return {"code": os.WEXITSTATUS(status)}


def say(worker: socket.socket, message: dict[str, Any]) -> None:
    try:
        worker.send(json.dumps(message).encode())
    except OSError:
        pass  # the worker is gone; nobody is left to tell


def listen_to_signals() -> int:
    """Signal numbers can be read, a byte each, from the descriptor that this returns.

    Handlers are needed because the kernel drops signals to process 1 that it has no handler for.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *PASSED_ON):
        signal.signal(number, lambda *_: None)
    return reader


def fork_workload(start: dict[str, Any], descriptors: list[int]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        # Out of the way of 0 to 3 first: a received descriptor may have one of these numbers.
        spares = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in descriptors]
        for number, descriptor in enumerate(spares):
            os.dup2(descriptor, number)
        environment = {**os.environ, **start["environment"]}
        os.execve(sys.executable, [sys.executable, __file__, "run", start["purpose"]], environment)
    except BaseException as error:
        os.write(2, f"The agent could not start the workload with {sys.executable}: {error!r}\n".encode())
    finally:
        os._exit(127)


def discard_standard_streams() -> None:
    """From here on nothing is said outside the task's log; user code must not fill the host's disk through /proc/1/fd."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)


def watch(child: int, worker: socket.socket, wakeups: int, grace: float) -> int:
    """Wait for the child; gives its wait status. Ends at the latest one grace period after the worker is gone."""
    deadline: float | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(worker, selectors.EVENT_READ)
        selector.register(wakeups, selectors.EVENT_READ)
        while True:
            status = reap(child)
            if status is not None:
                return status
            if deadline is not None and time.monotonic() >= deadline:
                signal_group(child, signal.SIGKILL)
                return os.waitpid(child, 0)[1]
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            for key, _ in selector.select(wait):
                if key.fd == wakeups:
                    for number in os.read(wakeups, 512):
                        if number != signal.SIGCHLD:
                            signal_group(child, number)
                    continue
                message = receive(worker)
                if message is None:
                    selector.unregister(worker)
                    deadline = time.monotonic() + grace
                    signal_group(child, signal.SIGTERM)
                elif "signal" in message:
                    signal_group(child, message["signal"])


def receive(worker: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the worker is gone."""
    try:
        packet = worker.recv(PACKET_LIMIT)
    except OSError:
        return None
    message: dict[str, Any] | None = json.loads(packet) if packet else None
    return message


def reap(child: int) -> int | None:
    """Collect every dead process, orphans included; gives the child's status once it is among them."""
    status = None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            status = ended


def signal_group(child: int, number: int) -> None:
    try:
        os.killpg(child, number)
    except (ProcessLookupError, PermissionError):
        # The child has not called setsid yet, or has gone into another group.
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass


def end_everyone_else() -> None:
    """Kill what the workload left behind: its processes hold the log's sockets open, and the supervisor waits for those."""
    kill_everyone_else()
    while os.getpid() == 1:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def kill_everyone_else() -> None:
    """The kernel does it in one pass, in which nobody can fork: kill(2) with -1 spares process 1 alone."""
    if os.getpid() != 1:
        return  # in somebody else's pid namespace "everyone" would be the host
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass


def keep_segfaults_deadly() -> None:
    """Refuse handlers written in Python for SIGSEGV: the faulting instruction would be repeated for ever.

    Airflow's importer of DAG files installs such a handler and leaves it; the process then spins instead of dying.
    """
    install = signal.signal

    def install_unless_segfault(signalnum: Any, handler: Any) -> Any:
        return install(signalnum, signal.SIG_DFL if signalnum == signal.SIGSEGV else handler)

    signal.signal = install_unless_segfault


def run(purpose: str) -> NoReturn:
    """Become the workload: Airflow's own child entry point, on descriptors 0 to 3."""
    sys.path.pop(0)  # this file's directory, which is nobody's library
    keep_segfaults_deadly()
    enter_airflow(purpose)


def enter_airflow(purpose: str) -> NoReturn:
    from airflow.sdk.execution_time.supervisor import _fork_main

    if purpose == "task":
        from airflow.sdk.execution_time.supervisor import _subprocess_main as target
    else:
        from airflow.dag_processing.processor import _parse_file_entrypoint as target
    requests, stdout, stderr = (socket.socket(fileno=number) for number in range(3))
    _fork_main(requests, stdout, stderr, LOGS_DESCRIPTOR, target)


def serve(worker: socket.socket, what: dict[str, Any]) -> int:
    """Import Airflow, then fork a child for each file, until the worker is gone or a file has done lasting harm."""
    os.environ.update(what["environment"])
    end_with_worker(worker)
    try:
        import_airflow()
    except BaseException as error:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os.write(2, f"agent: image can't import Airflow: {error!r:.1000}\n".encode())
        return 1
    if threads() > 1:
        os.write(2, f"agent: importing Airflow left {threads()} threads running, which can't be forked\n".encode())
        return 1
    stop_ending_with_worker(worker)
    sys.stdout.flush()
    sys.stderr.flush()
    discard_standard_streams()
    set_dumpable(False)
    wakeups = listen_to_children_alone()
    return Server(worker, wakeups, what["scratch"]).run()


def import_airflow() -> None:
    """Everything that a child would import for itself, in a process of one thread."""
    from importlib import import_module

    sys.path.pop(0)  # this file's directory, which is nobody's library
    keep_segfaults_deadly()
    for module in REQUIRED:
        import_module(module)
    try:
        from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime
    except ImportError:
        pass  # the children look for it themselves
    else:
        runtime: Any = ProvidersManagerTaskRuntime
        runtime().initialize_providers_taskflow_decorator()
    preload(USUAL)
    sdk = import_module("airflow.sdk")
    for name in sdk.__all__:
        # Its names are imported when they are first asked for.
        try:
            getattr(sdk, name)
        except Exception:  # noqa: S110 - a provider that the image lacks
            pass
    gc.collect()
    gc.freeze()


def preload(modules: Iterable[str]) -> None:
    """Import what children will need; whose import fails, fails again in the child that needs it, and is told there."""
    from importlib import import_module

    for module in modules:
        if module not in sys.modules:
            try:
                import_module(module)
            except (Exception, SystemExit):  # noqa: S110 - see above
                pass


def end_with_worker(worker: socket.socket) -> None:
    """End when the worker does, even while an import hangs: the kernel sends SIGIO when the connection closes."""

    def look(*_: object) -> None:
        poll = select.poll()
        poll.register(worker, select.POLLHUP)
        if poll.poll(0):
            os._exit(1)

    signal.signal(signal.SIGIO, look)
    signal.siginterrupt(signal.SIGIO, False)
    fcntl.fcntl(worker, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(worker, fcntl.F_SETFL, fcntl.fcntl(worker, fcntl.F_GETFL) | os.O_ASYNC)
    look()


def stop_ending_with_worker(worker: socket.socket) -> None:
    fcntl.fcntl(worker, fcntl.F_SETFL, fcntl.fcntl(worker, fcntl.F_GETFL) & ~os.O_ASYNC)


def listen_to_children_alone() -> int:
    """As ``listen_to_signals``, but no other signal has a handler, Python's own for SIGINT included.

    The kernel then drops them: files can't reach process 1 with any signal.
    """
    wakeups = listen_to_signals()
    for number in signal.valid_signals() - {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    return wakeups


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
        say(self.worker, {"ready": {"memory": memory()}})
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
            if self.child and (status := reap(self.child)) is not None:
                self.child = 0
                end_everyone_else()
                self.ended = how_it_ended(status)
                if self.last or inherited_traits() != untouched:
                    self.report()
                    return 1
                if self.clean():
                    self.report()
                else:
                    self.start_wiper()
            elif self.wiper:
                status = reap(self.wiper)
                if status is None and time.monotonic() < self.wipe_until:
                    continue
                self.report()
                if status != 0:
                    return 1
                self.wiper = 0
            elif not self.child:
                reap(0)

    def listen(self) -> bool:
        """Take one message; False when there will be no more, or none that can be obeyed."""
        message, descriptors = receive_work(self.worker)
        if message is None:
            return False
        if "parse" in message:
            if self.child or self.wiper:
                return False
            preload(module for module in message["parse"]["modules"] if module.startswith("airflow."))
            # What has threads is forked as stock Airflow does, but not for long.
            self.last = self.last or threads() > 1
            self.child = fork_parse(message["parse"]["environment"], descriptors, self.worker)
            for descriptor in descriptors:
                os.close(descriptor)
            say(self.worker, {"started": {}})
        elif "signal" in message:
            if self.wiper:
                # The file has ended; what is left to remove goes with the container.
                self.report()
                return False
            if self.child:
                kill_everyone_else()
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
        say(self.worker, {"exited": {**self.ended, "memory": memory()}})


def fork_parse(environment: dict[str, str], descriptors: list[int], worker: socket.socket) -> int:
    child = os.fork()
    if child:
        return child
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        # Files in /proc/self belong to root while it is not dumpable. The kernel's choice, when memory is short, is this
        # child, not process 1.
        set_dumpable(True)
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
        spares = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in descriptors]
        for target, descriptor in enumerate(spares):
            os.dup2(descriptor, target, inheritable=target != LOGS_DESCRIPTOR)
        worker.detach()
        # The worker's connection must not be reachable, nor what the import may have opened.
        for name in os.listdir("/proc/self/fd"):
            if int(name) > LOGS_DESCRIPTOR:
                try:
                    os.close(int(name))
                except OSError:
                    pass  # the listing's own
        os.environ.update(environment)
        enter_airflow("parse")
    except BaseException as error:
        os.write(2, f"The agent could not start the parse: {error!r}\n".encode())
    finally:
        os._exit(127)


def set_dumpable(dumpable: bool) -> None:
    """Whether other processes of the same user may trace this one, and look into its memory and descriptors."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def inherited_traits() -> tuple[object, ...]:
    """What another process of the same user may change of this one, and a fork then inherits."""
    import resource

    with open("/proc/self/mountinfo", "rb") as mounts:
        return (
            [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")],
            os.getpriority(os.PRIO_PROCESS, 0),
            os.sched_getscheduler(0),
            os.sched_getparam(0),
            os.sched_getaffinity(0),
            mounts.read(),
        )


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def memory() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as counters:
        return int(counters.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Scratch:
    """A directory that every file finds as the first one did: what is in it now is kept, what comes later is wiped.

    Mount points in it are the user's volumes and are never touched. Other processes must be gone while it works.
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
        # Of what is there, the import's own goes; what came with the image belongs to root and can't.
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
                    pass  # whether it matters, is_clean tells
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2])
    sys.exit(converse(os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.sock")))
