"""Process 1 of a container: starts workloads, collects dead processes, passes signals on, and never outlives its worker.

Standard library only; it runs with whatever Python the image has. Agent and worker talk over one SOCK_SEQPACKET
connection, one JSON message a packet. The conversation begins with

    agent -> worker   {"hello": {"agent": 2, "python": "3.12.1", "airflow": "3.3.2", "task_sdk": "1.3.2"}}

One workload, as for a task:

1. worker -> agent   {"start": {"purpose": "task", "environment": {...}, "grace": 10.0}} and four descriptors,
                     in the order of Airflow's supervisor: requests, stdout, stderr, logs
2. worker -> agent   {"signal": 15}, any number of times
3. agent -> worker   {"exited": {"code": 0}} or {"exited": {"signal": 9}}
4. the worker hangs up, once it has read the counters of the container's cgroup, and the agent ends

The connection is the lifeline. When it closes before 3, the worker is dead: the agent sends SIGTERM, waits for the grace
period, sends SIGKILL and ends. The workload has the same uid as the agent. So the agent can't be traced: otherwise the
workload could keep it from ending.

The workload's process executes this file anew, as ``agent.py run PURPOSE``, with the descriptors as 0 (requests),
1 (stdout), 2 (stderr) and 3 (logs). So even a failing ``import airflow`` is reported in the task's log.

Instead of 1, the worker may send:

- {"adopt": {"child": 6, "grace": 10.0}}: a zygote has forked a process into this container. The agent answers
  {"adopted": {}}, and 2 follows.
- {"await": {"seconds": 60.0}}, a listening socket and the connection of a waiting child: the container was made ahead of
  its work. The worker hangs up. The next worker connects to the listening socket, and gets the child's connection with
  {"waiting": {}}. If none connects in time, the container ends.
- {"serve": …}: parse many files, one after the other; parse_server.py has what follows.
- {"zygote": …}: fork workloads into containers of their own; zygote.py has what follows.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import time

VERSION = 2
PACKET_LIMIT = 1024 * 1024
LOGS_DESCRIPTOR = 3

# linux/prctl.h
PR_SET_DUMPABLE = 4

#: How many dead processes are collected at once. With a bound, a workload can't keep process 1 busy by making ever more.
MOST_REAPED = 1000

#: How long process 1 waits, in seconds, after its last message, if the worker neither hangs up nor ends.
FAREWELL_SECONDS = 10.0

TYPE_CHECKING = False  # importing it from typing would cost every container a few milliseconds
if TYPE_CHECKING:
    import signal
    import socket
    from typing import Any, NoReturn
else:
    # Every container pays for imports here. These are the C modules below socket and the like: those import enum, re and
    # selectors too, which takes half of the time to the hello.
    import _signal as signal
    import _socket as socket

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, read from the name of its .dist-info directory.

    An import would take seconds.
    """
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
    """Talk to the worker; returns the exit code for process 1 (128+n after signal n)."""
    worker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker.connect(address)
    say(worker, {"hello": hello()})
    set_dumpable(False)
    while True:
        message, descriptors = receive_work(worker)
        if message is None:
            return 0  # the worker hung up, or is gone: nothing has been started
        code: int
        if "serve" in message:
            import parse_server  # type: ignore[import-not-found]  # it lies beside this file

            code = parse_server.serve(worker, message["serve"])
            return code
        if "zygote" in message:
            import zygote  # type: ignore[import-not-found]

            zygote.become_zygote(worker, message["zygote"], descriptors[0])
        if "adopt" in message:
            return adopt(worker, message["adopt"])
        if "start" in message:
            return run_one(worker, message["start"], descriptors)
        discard_standard_streams()
        worker.close()
        claimant = await_claim(descriptors[0], message["await"]["seconds"])
        if claimant is None:
            return 0
        worker = claimant
        pass_on(worker, descriptors[1])


def set_dumpable(dumpable: bool) -> None:
    """Set whether processes of the same uid may trace this one, and open its memory and descriptors in /proc; see prctl(2).

    An execve(2) makes a process dumpable again. May be called twice.

    :raises OSError: the kernel refused.
    """
    try:
        # The C module below ctypes takes half a millisecond to import; ctypes itself takes three.
        from _ctypes import call_function, dlopen, dlsym
    except ImportError:  # another Python than CPython
        import ctypes

        failed = ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)
    else:
        itself = dlopen(None, 0)  # type: ignore[arg-type]  # as dlopen(3) has it
        failed = call_function(dlsym(itself, "prctl"), (PR_SET_DUMPABLE, int(dumpable), 0, 0, 0))
    if failed:
        raise OSError("prctl(PR_SET_DUMPABLE) is refused")


def await_claim(listening: int, seconds: float) -> socket.socket | None:
    """Wait for the worker that takes this container over; None when none came within ``seconds``."""
    listener = socket.socket(fileno=listening)
    listener.settimeout(seconds)
    try:
        # What accept() of the module `socket` is made of; the module is not imported.
        descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
    except OSError:
        return None
    finally:
        listener.close()
    return socket.socket(fileno=descriptor)


def pass_on(worker: socket.socket, descriptor: int) -> None:
    """Send the worker the connection of the waiting child."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))
    try:
        worker.sendmsg([as_json({"waiting": {}}).encode()], [rights])
    except OSError:
        pass  # as in ``say``
    os.close(descriptor)


def receive_work(worker: socket.socket, most: int = 4) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors; None when the worker is gone."""
    try:
        packet, ancillary, _, _ = worker.recvmsg(PACKET_LIMIT, socket.CMSG_LEN(most * 4), socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None, []
    descriptors = [
        int.from_bytes(data[first : first + 4], sys.byteorder)
        for level, kind, data in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for first in range(0, len(data) - 3, 4)
    ]
    return (from_json(packet) if packet else None), descriptors


def run_one(worker: socket.socket, start: dict[str, Any], descriptors: list[int]) -> int:
    """Run one workload to its end; returns the exit code for process 1."""
    wakeups = listen_to_signals()
    child = fork_workload(start, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    discard_standard_streams()
    return see_off(child, worker, wakeups, start["grace"])


def adopt(worker: socket.socket, what: dict[str, Any]) -> int:
    """As ``run_one``, for a child that a zygote forked and the kernel made a child of this process."""
    wakeups = listen_to_signals()
    discard_standard_streams()
    say(worker, {"adopted": {}})
    return see_off(what["child"], worker, wakeups, what["grace"])


def see_off(child: int, worker: socket.socket, wakeups: int, grace: float) -> int:
    """Wait for the workload's end and report it; returns the exit code for process 1."""
    status = watch(child, worker, wakeups, grace)
    end_everyone_else()
    end = how_it_ended(status)
    say(worker, {"exited": end})
    await_farewell(worker)
    return end["code"] if "code" in end else 128 + end["signal"]


def await_farewell(worker: socket.socket) -> None:
    """Wait until the worker hangs up.

    Until then it reads the counters of the container's cgroup, which ends with this process.
    """
    deadline = time.monotonic() + FAREWELL_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        worker.settimeout(left)
        try:
            if not worker.recv(PACKET_LIMIT):
                return
        except OSError:
            return


def how_it_ended(status: int) -> dict[str, int]:
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return {"code": os.WEXITSTATUS(status)}


def say(worker: socket.socket, message: dict[str, Any]) -> None:
    try:
        worker.send(as_json(message).encode())
    except OSError:
        pass  # the worker is gone


class Plain:
    """The settings of json's C scanner that read numbers, texts, lists and dicts as the module `json` does."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def from_json(packet: bytes) -> Any:
    """Parse a worker's message.

    :raises ValueError: it is not JSON.
    """
    try:
        from _json import make_scanner
    except ImportError:  # another Python than CPython
        import json

        return json.loads(packet)
    try:
        return make_scanner(Plain())(packet.decode(), 0)[0]  # type: ignore[arg-type]  # it wants no more than these
    except StopIteration:
        raise ValueError(f"not JSON: {packet!r:.100}") from None


def as_json(value: Any) -> str:
    """JSON of dicts, texts, whole numbers and None."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(name)}: {as_json(item)}" for name, item in value.items()) + "}"
    if isinstance(value, str):
        return text_as_json(value)
    return "null" if value is None else str(int(value))


def text_as_json(text: str) -> str:
    try:
        from _json import encode_basestring_ascii
    except ImportError:
        import json

        return json.dumps(text)
    return str(encode_basestring_ascii(text))


def listen_to_signals() -> int:
    """Returns a descriptor from which the numbers of incoming signals can be read, one byte each.

    Handlers are needed because the kernel drops signals to process 1 for which it has no handler.
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
        # First move them above 3: a received descriptor may have one of the numbers 0 to 3.
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
    """Close this process's own output: user code could write to it through /proc/1/fd, and fill the host's disk."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)


def watch(child: int, worker: socket.socket, wakeups: int, grace: float) -> int:
    """Wait for the child; returns its wait status.

    Ends at the latest one grace period (seconds) after the worker is gone.
    """
    deadline: float | None = None
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    poll.register(wakeups, select.POLLIN)
    while True:
        status = reap(child)
        if status is not None:
            return status
        if deadline is not None and time.monotonic() >= deadline:
            signal_group(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        for descriptor, _ in poll.poll(wait):
            if descriptor == wakeups:
                for number in os.read(wakeups, 512):
                    if number != signal.SIGCHLD:
                        signal_group(child, number)
                continue
            message, _ = receive_work(worker)
            if message is None:
                poll.unregister(worker)
                deadline = time.monotonic() + grace
                signal_group(child, signal.SIGTERM)
            elif "signal" in message:
                signal_group(child, message["signal"])


def reap(child: int) -> int | None:
    """Collect dead processes, orphans included; returns the child's wait status when it is among them."""
    status = None
    for _ in range(MOST_REAPED):
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            status = ended
    # There may be more dead processes, and no further signal announces them.
    os.kill(os.getpid(), signal.SIGCHLD)
    return status


def signal_group(child: int, number: int) -> None:
    try:
        os.killpg(child, number)
    except (ProcessLookupError, PermissionError):
        # The child has not called setsid yet, or has moved to another group.
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass


def end_everyone_else() -> None:
    """Kill the processes that the workload left: they hold the log's sockets open, and the supervisor waits for their
    end.
    """
    kill_everyone_else()
    while os.getpid() == 1:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def kill_everyone_else() -> None:
    """kill(2) with -1 kills all but process 1. The kernel does it in one pass, in which no process can fork."""
    if os.getpid() != 1:
        return  # not process 1: in the host's pid namespace this would kill the host's processes
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass


def keep_segfaults_deadly() -> None:
    """Refuse Python handlers for SIGSEGV: after the handler, the faulting instruction would be repeated for ever.

    Airflow's importer of DAG files installs such a handler and leaves it; the process then loops instead of dying.
    """
    import signal

    install = signal.signal

    def install_unless_segfault(signalnum: Any, handler: Any) -> Any:
        return install(signalnum, signal.SIG_DFL if signalnum == signal.SIGSEGV else handler)

    signal.signal = install_unless_segfault


def refuse_sudo() -> None:
    """Refuse an operator's ``run_as_user``, for which Airflow executes sudo: no process in a container gains privilege."""
    execute = os.execvp

    def execute_unless_sudo(file: Any, args: Any) -> NoReturn:
        # Airflow sets the variable just before. Without it, user code calls sudo, which is not our concern.
        if file == "sudo" and os.environ.get("_AIRFLOW__REEXECUTED_PROCESS") == "1" and "-u" in args:
            user = args[args.index("-u") + 1]
            raise SystemExit(
                f"The operator wants to run as the user {user} (run_as_user), and its container runs as uid {os.getuid()}. "
                f"Set `run_as_user: {user}` in the container's settings instead, in executor_config or in the YAML beside "
                "the DAG file; the user must be one of the image's"
            )
        execute(file, args)

    os.execvp = execute_unless_sudo


def run(purpose: str) -> NoReturn:
    """Become the workload: Airflow's own child entry point, on descriptors 0 to 3."""
    sys.path.pop(0)  # this file's directory, from which nothing shall be imported
    keep_segfaults_deadly()
    enter_airflow(purpose)


def enter_airflow(purpose: str) -> NoReturn:
    from io import FileIO
    from socket import socket

    from airflow.sdk.execution_time.supervisor import _fork_main

    if purpose == "task":
        from airflow.sdk.execution_time.supervisor import _subprocess_main as target

        refuse_sudo()
    else:
        from airflow.dag_processing.processor import _parse_file_entrypoint as target
    # Airflow uses only the descriptors of its output, and these are pipes.
    stdout, stderr = (FileIO(number, "wb", closefd=False) for number in (1, 2))
    _fork_main(socket(fileno=0), stdout, stderr, LOGS_DESCRIPTOR, target)  # type: ignore[arg-type]


if __name__ == "__main__":
    if getattr(sys.flags, "safe_path", False):
        # PYTHONSAFEPATH (Python 3.11) leaves out this directory, where the agent's other modules are found.
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2])
    if sys.argv[1:2] == ["zygote"]:
        import zygote

        sys.exit(zygote.main(*sys.argv[2:]))
    sys.exit(converse(os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.sock")))
