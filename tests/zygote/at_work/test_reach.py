"""What a task sees and reaches of its zygote (nothing), and what a hostile image's zygote reaches of the host (nothing)."""

from __future__ import annotations

import gc
import json
import os
import secrets
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.zygote.at_work.conftest import FIRST_UID, FORMS, NAMESPACE, children, until

from airflow_isolation.bridge import zygote as zygotes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.zygote.at_work.conftest import Task, Worker

pytestmark = pytest.mark.root

#: A task that tries: signals to every number, ptrace, /proc, sockets, descriptors. Says what it could.
REACHING = """
import ctypes, json, os, socket, stat, time
libc = ctypes.CDLL(None, use_errno=True)
# The one between zygote and task has ended, and is there until the zygote's shim collects it.
end = time.monotonic() + 20
while len(seen := sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())) > 2 and time.monotonic() < end:
    time.sleep(0.01)
found = {"seen": seen}
me = os.getpid()
found["signalled"] = []
for pid in [*range(2, 70_000), ZYGOTE]:
    if pid == me:
        continue
    try:
        os.kill(pid, 9)
        found["signalled"].append(pid)
    except ProcessLookupError:
        pass
    except PermissionError:
        found["signalled"].append(-pid)
try:
    os.kill(1, 9)
except PermissionError:
    pass
found["traced"] = libc.ptrace(16, ZYGOTE, 0, 0) == 0
found["proc"] = os.path.exists("/proc/ZYGOTE")
found["reached"] = []
try:
    lines = open("/proc/net/unix").read().splitlines()[1:]
except OSError:
    lines = []
for name in {line.split(None, 7)[7] for line in lines if len(line.split(None, 7)) == 8} | {"SOCKET"}:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as one:
            try:
                one.connect("\\0" + name[1:] if name.startswith("@") else name)
                found["reached"].append(name)
            except OSError:
                pass
found["directory"] = os.listdir("/run/airflow-isolation")
found["descriptors"] = {}
for name in os.listdir("/proc/self/fd"):
    try:
        found["descriptors"][name] = os.readlink("/proc/self/fd/" + name).partition(":")[0]
    except OSError:
        pass
found["capabilities"] = [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))]
found["father"] = os.getppid()
print(json.dumps(found))
"""


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_task_reaches_nothing_of_its_zygote(worker: Worker) -> None:
    task = worker.task()
    assert worker.start(task).finish() == 0
    zygote = worker.zygote(task)
    program = REACHING.replace("ZYGOTE", str(zygote.pid)).replace("SOCKET", str(zygote.directory / "zygote.sock"))
    running = worker.start(worker.task(), program)
    found = running.json()
    assert running.start_mode == "fork"
    assert found["seen"] == [1, found["seen"][-1]]
    assert (found["signalled"], found["traced"], found["proc"], found["reached"]) == ([], False, False, [])
    assert "agent.sock" not in found["directory"]
    assert set(found["descriptors"].values()) <= {"socket", "pipe"}
    assert sorted(found["descriptors"])[:4] == ["0", "1", "2", "3"]
    assert set(found["capabilities"]) == {"0" * 16}
    assert found["father"] == 1
    assert worker.run().finish() == 0
    assert worker.zygote(task) == zygote


@pytest.mark.parametrize("form", ["host-network"], indirect=True)
def test_a_task_in_a_user_namespace_has_the_host_s_network(worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        running = worker.run(
            f"import os, socket; socket.create_connection({address!r}).close(); print(os.listdir('/sys/kernel/debug'))"
        )
        assert (running.finish(), running.start_mode, running.stdout, running.stderr) == (0, "fork", "[]\n", "")


def hostile(worker: Worker, cheat: str, **environment: str) -> Task:
    return worker.task("hostile", environment={"AIRFLOW_TEST_CHEAT": cheat, **environment})


def fork_by_hand(worker: Worker, task: Task, pid: int = 0) -> Any:
    """What a hostile zygote says when it is asked; its own words, so that a test can look at them.

    ``pid`` is of the container's process 1 that it is asked to fork into; 0 is of this process.
    """
    assert task.plan
    with zygotes.asking(worker.runtime, task.plan, state_dir=worker.state_dir) as (_, connection):
        pidfd = os.pidfd_open(pid or os.getpid())
        try:
            socket.send_fds(connection, [b'{"fork": {}}'], [pidfd])
        finally:
            os.close(pidfd)
        connection.settimeout(60)
        return json.loads(connection.recv(1024 * 1024))


@pytest.mark.parametrize(
    ("cheat", "why"),
    [
        ("nonsense", "not JSON"),
        ("deep", "not JSON"),
        ("a_list", "could not fork"),
        ("too_much", "not JSON"),
        ("hangs_up", "hung up"),
        ("descriptors", "could not fork"),
        ("forged_pid", "forging is refused"),
        ("stays_outside", "namespace"),
        ("the_zygote_itself", "namespace"),
        ("keeps_root", "not what its container asks for"),
        ("of_the_host", "forging is refused"),
    ],
)
def test_a_zygote_that_cheats_is_refused(worker: Worker, cheat: str, why: str) -> None:
    task = hostile(worker, cheat)
    running = worker.start(task, "import os; print('fresh', os.getuid())")
    before = descriptors()
    assert why in running.why_fresh
    assert (running.start_mode, running.finish(), running.stdout) == ("fresh", 0, "fresh 50000\n")
    worker.end()
    again = worker.start(hostile(worker, cheat))
    assert (again.start_mode, again.finish()) == ("fresh", 0)
    # Nothing that it sent was taken.
    assert descriptors() <= before
    worker.end()
    worker.runtime.remove(worker.zygote(task).container)
    # Of what it forked nothing lives, wherever it hid.
    until(lambda: not of_uids(task), "the end of a hostile zygote's processes")


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def of_uids(task: Task) -> list[str]:
    """The processes that run with an image's uids."""
    namespace = task.launch.spec.user_namespace
    assert namespace
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            owner = entry.stat().st_uid
        except OSError:
            continue
        if namespace.first <= owner < namespace.first + namespace.size:
            found.append(entry.name)
    return found


@pytest.fixture
def secret(worker: Worker) -> Iterator[Path]:
    """A file of the host's, and one that root alone may read."""
    path = Path("/var/tmp", f"ai-secret-{secrets.token_hex(4)}")
    path.write_text("untouched")
    path.chmod(0o600)
    yield path
    path.unlink()


@pytest.mark.parametrize("form", ["namespace", "host-network"], indirect=True)
def test_a_hostile_zygote_reaches_neither_host_nor_other_images(worker: Worker, secret: Path) -> None:
    other = worker.run("import sys; print('up', flush=True); requests.recv(1)")
    other.until(lambda: "up" in other.stdout)
    victim = other.workload.container.pid
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        found = fork_by_hand(
            worker,
            hostile(
                worker,
                "reaches_out",
                AIRFLOW_TEST_PIDS=f"{sleeper.pid} {victim} {children(victim)[0]} {worker.zygote(worker.task()).pid} 1",
                AIRFLOW_TEST_FILES=f"{secret} /etc/shadow {worker.state_dir}",
            ),
        )
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
    assert found == {"done": []}
    assert secret.read_text() == "untouched"
    other.workload.channels.requests.send(b"x")
    assert other.finish() == 0


def test_two_images_have_uids_of_their_own(worker: Worker) -> None:
    tasks = [worker.task("good"), worker.task("better")]
    uids = {}
    for task in tasks:
        running = worker.start(task, "print('up', flush=True); requests.recv(1)")
        running.until(lambda running=running: "up" in running.stdout)  # type: ignore[misc]
        uids[children(running.workload.container.pid)[0]] = task.launch.spec.user_namespace
    owners = {Path(f"/proc/{pid}").stat().st_uid - namespace.first for pid, namespace in uids.items() if namespace}
    assert owners == {50000}
    assert len({namespace.first for namespace in uids.values() if namespace}) == 2
    for running in worker.started:
        running.workload.channels.requests.send(b"x")
        assert running.finish() == 0


def test_when_no_uids_are_left_a_trusted_image_is_forked_with_privilege_and_others_start_fresh(worker: Worker) -> None:
    tight = f"uid_range = {FIRST_UID + 2**26}:65536"
    first, second = worker.task("good", cfg=tight), worker.task("better", cfg=tight)
    assert first.launch.spec.user_namespace
    assert second.launch.spec.user_namespace is None
    running = worker.start(second, "print('there')")
    assert (running.start_mode, running.finish(), running.stdout) == ("fork", 0, "there\n")
    untrusted = worker.task("better", cfg=tight, author=True)
    assert untrusted.plan is None


def test_at_the_end_nothing_is_left_but_zygotes_and_then_nothing(worker: Worker) -> None:
    assert worker.run().finish() == 0
    worker.end()
    worker.remove_zygotes()
    assert worker.runtime.list() == ()
    own = str(worker.state_dir)
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if own in line]
    assert not [path for path in Path("/sys/fs/cgroup").glob(f"*/{NAMESPACE}/*") if path.is_dir()]
    left = {str(path.relative_to(worker.state_dir)) for path in worker.state_dir.rglob("*") if path.is_file()}
    assert {path for path in left if not path.startswith(("accounts/", "fresh/"))} <= {
        "uid-ranges.json",
        "uid-ranges.lock",
    }
