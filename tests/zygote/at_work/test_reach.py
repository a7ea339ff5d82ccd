"""What a hostile image's zygote reaches of the host, and what is in one with privilege: nothing. Tasks: tests/hostile."""

from __future__ import annotations

import gc
import json
import os
import secrets
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.zygote.at_work.conftest import FIRST_UID, FORMS, NAMESPACE, children, until

from airflow_isolation.bridge import zygote as zygotes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.zygote.at_work.conftest import Task, Worker

pytestmark = pytest.mark.root


@pytest.mark.parametrize("form", ["host-network"], indirect=True)
def test_a_task_in_a_user_namespace_has_the_host_s_network(worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        running = worker.run(
            f"import os, socket; socket.create_connection({address!r}).close(); print(os.listdir('/sys/kernel/debug'))"
        )
        assert (running.finish(), running.start_mode, running.stdout, running.stderr) == (0, "fork", "[]\n", "")


#: A task that tells what its image's hooks saw, and what its own threads may do.
OF_THE_HOOKS = """
import airflow, json, os
threads = [open(f"/proc/self/task/{thread}/status").read() for thread in os.listdir("/proc/self/task")]
held = {line.split()[1] for text in threads for line in text.splitlines() if line.startswith(("CapPrm", "CapEff", "CapBnd"))}
print(json.dumps([os.getpid(), len(threads), sorted(held), airflow.seen]))
"""


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_hooks_of_the_image_s_libraries_run_after_a_fork_as_the_task_and_without_any_capability(worker: Worker) -> None:
    running = worker.run(OF_THE_HOOKS, "hooked")
    pid, threads, held, seen = running.json()
    assert running.start_mode == "fork", running.why_fresh
    none = "0" * 16
    assert seen == [["before", pid, 50000, none], ["after_in_child", pid, 50000, none]]
    assert (threads, held) == (2, [none])


def hostile(worker: Worker, cheat: str, **environment: str) -> Task:
    return worker.task("hostile", environment={"AIRFLOW_TEST_CHEAT": cheat, **environment})


def fork_by_hand(worker: Worker, task: Task, pid: int = 0) -> Any:
    """What a hostile zygote says when it is asked; its own words, so that a test can look at them.

    ``pid`` is of the container's process 1 that it is asked to fork into; 0 is of this process.
    """
    assert task.plan
    with zygotes.asking(worker.runtime, task.plan, state_dir=worker.state_dir) as (_, connection):
        zygotes.ask_to_fork(connection, pid or os.getpid())
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
                AIRFLOW_TEST_FILES=f"{secret} {worker.state_dir}",
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
    assert {path for path in left if not path.startswith(("accounts/", "cgroup-parents/", "fresh/"))} <= {
        "uid-ranges.json",
        "uid-ranges.lock",
    }


def of_the_host(pid: int) -> bool:
    """Whether a process has a capability that counts on the host."""
    status = Path(f"/proc/{pid}/status").read_text()
    held = next(line for line in status.splitlines() if line.startswith("CapPrm:")).split()[1]
    return int(held, 16) != 0 and Path(f"/proc/{pid}/ns/user").readlink() == Path("/proc/self/ns/user").readlink()


def of_containers(worker: Worker) -> list[int]:
    """The processes of the worker's containers, zygotes included."""
    found = []
    waiting = [worker.runtime.get(container.id).pid for container in worker.runtime.list()]
    while waiting:
        found.append(waiting.pop())
        waiting += children(found[-1])
    return found


def all_that_is_in(pid: int) -> bytes:
    """What /proc says of a process: its environment, arguments, mounts, mapped files, descriptors, directories, memory."""
    place = Path(f"/proc/{pid}")
    said = [(place / name).read_bytes() for name in ("environ", "cmdline", "mountinfo", "maps", "comm")]
    said += [str((place / name).readlink()).encode() for name in ("cwd", "root", "exe")]
    for descriptor in (place / "fd").iterdir():
        with suppress(OSError):
            said.append(str(descriptor.readlink()).encode())
    with (place / "mem").open("rb", buffering=0) as memory:
        for line in (place / "maps").read_text().splitlines():
            addresses, access, *_ = line.split()
            first, last = (int(address, 16) for address in addresses.split("-"))
            if access.startswith("rw"):
                with suppress(OSError):  # what is not to be read, such as a device's
                    memory.seek(first)
                    said.append(memory.read(last - first))
    return b"\0".join(said)


@pytest.mark.parametrize("form", ["privilege", "docker"], indirect=True)
def test_nothing_that_an_author_wrote_is_in_a_process_with_privilege(worker: Worker, tmp_path: Path) -> None:
    mark = f"mark{secrets.token_hex(8)}"
    source = Path("/var/tmp", mark)
    source.mkdir(mode=0o755)
    try:
        policy = f"\n[container_runtime_policy]\nallowed_mount_sources = {source}\n"
        of_the_task: dict[str, Any] = {
            "environment": {f"OWN_{mark}": mark},
            "working_dir": "/opt",
            "hostname": mark[:20],
            "labels": {"author": mark},
            "volumes": [f"{source}:/{mark}:ro"],
        }
        for written, mode in (
            (of_the_task, "fork"),
            ({**of_the_task, "environment": {"PYTHONPATH": f"/opt/stand-in:/{mark}"}}, "fresh"),
            ({**of_the_task, "environment": {"AIRFLOW__CORE__X_CMD": f"echo {mark}"}}, "fresh"),
            ({**of_the_task, "python": "/usr/bin/python3"}, "fresh"),
            ({**of_the_task, "timezone": "Europe/Berlin"}, "fresh"),
        ):
            task = worker.task(cfg=policy, written=written)
            running = worker.start(task, "print('up', flush=True); requests.recv(1)")
            running.until(lambda running=running: "up" in running.stdout)  # type: ignore[misc]
            assert running.start_mode == mode, running.why_fresh
        privileged = [pid for pid in of_containers(worker) if of_the_host(pid)]
        zygote = worker.zygote(worker.task()).pid
        # Those of other tests' images live on.
        zygotes = {json.loads(one.read_bytes())["pid"] for one in worker.state_dir.glob("zygotes/*/record.json")}
        assert zygote in privileged
        assert zygotes.issuperset(privileged)
        assert mark.encode() in all_that_is_in(worker.started[0].workload.container.pid)
        for pid in privileged:
            assert mark.encode() not in all_that_is_in(pid)
        for running in worker.started:
            running.workload.channels.requests.send(b"x")
            assert running.finish() == 0
    finally:
        worker.end()
        source.rmdir()


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_zygote_is_confined(worker: Worker) -> None:
    assert worker.run().finish() == 0
    task = worker.task()
    pid = worker.zygote(task).pid
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    namespace = task.launch.spec.user_namespace
    first = namespace.first if namespace else 0
    assert status["Uid"].split() == [str(first + 50000)] * 4
    names = {8: "SETPCAP", 7: "SETUID", 6: "SETGID", 18: "SYS_CHROOT", 21: "SYS_ADMIN"}
    held = sum(1 << number for number in names)
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {held}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    # Not dumpable: nobody of its uid can open what it has.
    assert Path(f"/proc/{pid}/mem").stat().st_uid in {0, first}


@pytest.mark.parametrize("form", ["privilege", "docker"], indirect=True)
def test_a_zygote_with_privilege_finds_no_process_of_others(worker: Worker) -> None:
    task = worker.task("looking")
    seen = dict(worker.start(task, "import airflow, json; print(json.dumps(airflow.seen))").json())
    assert worker.zygote(task).pid in seen
    assert set(seen.values()) == {50000}
    (of_the_host,) = [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == "/proc"
    ]
    assert "hidepid" not in of_the_host
