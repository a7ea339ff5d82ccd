"""Process 1 of a container: starts workloads, reaps, passes signals on, and never outlives its worker.

Standard library only; it runs with whatever Python the image has. The conversation with the worker goes over
one SOCK_SEQPACKET connection, one JSON message a packet, and begins with

    agent -> worker   {"hello": {"agent": 2, "python": "3.12.1", "airflow": "3.3.2", "task_sdk": "1.3.2"}}

One workload, as for a task:

1. worker -> agent   {"start": {"purpose": "task", "environment": {...}, "grace": 10.0}} and four descriptors,
                     in the order of Airflow's supervisor: requests, stdout, stderr, logs
2. worker -> agent   {"signal": 15}, any number of times
3. agent -> worker   {"exited": {"code": 0}} or {"exited": {"signal": 9}}
4. the worker hangs up, once it has read the counters of the container's cgroup, and the agent ends

The connection is the lifeline. When it closes before 3 the worker is dead: SIGTERM, the grace period, SIGKILL, end. So that
nothing keeps this process from it, it can't be traced: what its workload runs has the same uid.

The workload's process is this file again, executed anew as ``agent.py run PURPOSE`` with the descriptors as
0 (requests), 1 (stdout), 2 (stderr) and 3 (logs), so that even a failing ``import airflow`` ends in the task's log.

What else may come in the place of 1:

- {"adopt": {"child": 6, "grace": 10.0}}: a zygote has forked a process into this container. Answered by {"adopted": {}}; then
  it goes on with 2.
- {"await": {"seconds": 60.0}}, a listening socket and the connection of a child that waits: the container was made ahead
  of its work. The worker hangs up; the one that connects to that socket is the worker from then on, and gets that
  connection with {"waiting": {}}. Who does not come in time finds the container ended.
- {"serve": …}: many files to parse, one after the other; all that follows is in parse_server.py.
- {"zygote": …}: the same for many workloads in containers of their own, in zygote.py.
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

#: So many dead processes are collected at once: a workload that never stops making them must not keep process 1 busy.
MOST_REAPED = 1000

#: How long process 1 stays after its last word, for a worker that neither listens nor ends.
FAREWELL_SECONDS = 10.0

TYPE_CHECKING = False  # importing it from typing would cost every container a few milliseconds
if TYPE_CHECKING:
    import signal
    import socket
    from typing import Any, NoReturn
else:
    # Every container pays for what is imported here. These are what the modules of their names are made of, which bring
    # enum, re and selectors with them, half of this process's life before its hello.
    import _signal as signal
    import _socket as socket

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


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
    worker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker.connect(address)
    say(worker, {"hello": hello()})
    set_dumpable(False)
    while True:
        message, descriptors = receive_work(worker)
        if message is None:
            return 0  # the worker did not want us, or is gone: nothing has been started
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
    """Whether others of the same uid may trace this process, and open its memory and descriptors in /proc; see prctl(2).

    An execve(2) makes a process dumpable again.

    :raises OSError: the kernel refused.
    """
    try:
        # What ctypes is made of, in half a millisecond; ctypes itself takes three.
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
    """The worker that wants this container; None when nobody did in time."""
    listener = socket.socket(fileno=listening)
    listener.settimeout(seconds)
    try:
        # All that there is of accept() without the module `socket`.
        descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
    except OSError:
        return None
    finally:
        listener.close()
    return socket.socket(fileno=descriptor)


def pass_on(worker: socket.socket, descriptor: int) -> None:
    """Give the worker the connection of the child that waits for it."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))
    try:
        worker.sendmsg([as_json({"waiting": {}}).encode()], [rights])
    except OSError:
        pass  # as in ``say``
    os.close(descriptor)


def receive_work(worker: socket.socket, most: int = 4) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message, which may bring descriptors; None when the worker is gone."""
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
    """Run one workload to its end, and end."""
    wakeups = listen_to_signals()
    child = fork_workload(start, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    discard_standard_streams()
    return see_off(child, worker, wakeups, start["grace"])


def adopt(worker: socket.socket, what: dict[str, Any]) -> int:
    """As ``run_one``, with a child that the kernel has given to this process."""
    wakeups = listen_to_signals()
    discard_standard_streams()
    say(worker, {"adopted": {}})
    return see_off(what["child"], worker, wakeups, what["grace"])


def see_off(child: int, worker: socket.socket, wakeups: int, grace: float) -> int:
    """Wait for the workload's end, report it, and end."""
    status = watch(child, worker, wakeups, grace)
    end_everyone_else()
    end = how_it_ended(status)
    say(worker, {"exited": end})
    await_farewell(worker)
    return end["code"] if "code" in end else 128 + end["signal"]


def await_farewell(worker: socket.socket) -> None:
    """Until the worker hangs up: with this process goes the container's cgroup, whose counters it reads until then."""
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
        pass  # the worker is gone; nobody is left to tell


class Plain:
    """How JSON is read: numbers, texts, lists and dicts, as the module `json` does it."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def from_json(packet: bytes) -> Any:
    """What a worker has said.

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
    """Collect dead processes, orphans included; gives the child's status once it is among them."""
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
    # There may be more, of which no other signal tells.
    os.kill(os.getpid(), signal.SIGCHLD)
    return status


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
    import signal

    install = signal.signal

    def install_unless_segfault(signalnum: Any, handler: Any) -> Any:
        return install(signalnum, signal.SIG_DFL if signalnum == signal.SIGSEGV else handler)

    signal.signal = install_unless_segfault


def refuse_sudo() -> None:
    """Refuse to become an operator's ``run_as_user``, for which Airflow executes sudo. Nobody gains privilege in here."""
    execute = os.execvp

    def execute_unless_sudo(file: Any, args: Any) -> NoReturn:
        # Airflow sets the variable just before; without it, it is user code that wants sudo.
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
    sys.path.pop(0)  # this file's directory, which is nobody's library
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
    # Of its output it asks for no more than the descriptors, which are pipes.
    stdout, stderr = (FileIO(number, "wb", closefd=False) for number in (1, 2))
    _fork_main(socket(fileno=0), stdout, stderr, LOGS_DESCRIPTOR, target)  # type: ignore[arg-type]


if __name__ == "__main__":
    if getattr(sys.flags, "safe_path", False):
        # PYTHONSAFEPATH (Python 3.11) leaves out what is otherwise first, where the modules of this directory are found.
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2])
    if sys.argv[1:2] == ["zygote"]:
        import zygote

        sys.exit(zygote.main(*sys.argv[2:]))
    sys.exit(converse(os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.sock")))
