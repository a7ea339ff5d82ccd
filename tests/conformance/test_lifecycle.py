"""create, wait, start, kill, remove, get, list, stats, output: what the interface promises, on real daemons."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance.conftest import IMAGE, NAMESPACE

from airflow_isolation.cgroups import CgroupMounts
from airflow_isolation.container_spec import MIB, Mount, Resources
from airflow_isolation.errors import (
    ContainerExists,
    ContainerFailed,
    ContainerNotFound,
    ImageNotFound,
    IsolationError,
    SpecRefused,
)
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime.counted import CgroupFiles
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from tests.conformance.conftest import Host

    from airflow_isolation.runtime.interface import ContainerRuntime

IGNORE_TERM = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"

# A worker that starts a container and dies.
STARTS_ONE = """
import json, os, sys
from pathlib import Path
from airflow_isolation.container_spec import ContainerSpec
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime.connect import connect

kind, socket, namespace, state_dir, image, program = sys.argv[1:]
runtime = connect(kind, socket_path=socket, namespace=namespace, state_dir=Path(state_dir))
id = new_container_id("test")
runtime.create(id, ContainerSpec(image=image, argv=("python3", "-c", program), network="none"))
runtime.start(id)
print(id, flush=True)
os._exit(0)
"""


def wait_for_output(host: Host, id: str, text: bytes) -> None:
    deadline = time.monotonic() + 20
    while text not in host.runtime.output(id):
        assert time.monotonic() < deadline, host.runtime.output(id)
        time.sleep(0.02)


def test_info_names_the_daemon(host: Host) -> None:
    info = host.runtime.info()
    assert (info.backend, info.namespace) == (host.backend.partition("-")[0], NAMESPACE)
    assert info.socket_path == str(host.daemon.socket)
    assert info.version.startswith(host.backend.partition("-")[2] or "20.")


def test_a_container_runs_and_its_exit_code_arrives(host: Host) -> None:
    status, output = host.run("python3", "-c", "import sys; print('hello'); sys.exit(7)")
    assert (status.code, output) == (7, "hello\n")
    assert status.exited_at is not None
    assert datetime.now(timezone.utc) - status.exited_at < timedelta(minutes=5)


def test_stdout_and_stderr_both_arrive_in_the_output(host: Host) -> None:
    _, output = host.run("bash", "-c", "echo to stdout; echo to stderr >&2")
    assert sorted(output.splitlines()) == ["to stderr", "to stdout"]


def test_output_is_limited_to_the_last_bytes(host: Host) -> None:
    id = host.create("python3", "-c", "print('x' * 100_000 + 'the end', end='')")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    assert host.runtime.output(id, limit=10) == b"xxxthe end"
    assert len(host.runtime.output(id)) == 65536


def test_a_new_container_has_written_nothing(host: Host) -> None:
    assert host.runtime.output(host.create()) == b""


def test_a_flood_of_output_is_bounded_on_disk_and_its_end_is_kept(host: Host) -> None:
    flood = "import sys\nfor _ in range(100): sys.stdout.write('x' * 1048576)\nprint('the end')"
    id = host.create("python3", "-c", flood)
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        largest = 0
        while True:
            with suppress(TimeoutError):
                assert pending.result(0.05).code == 0
                break
            largest = max(largest, bytes_of_output(host, id))
    # dockerd stops reading soon after the end, and may miss the last of such a flood.
    wait_for_output(host, id, b"xxx" if host.backend == "docker" else b"xxxthe end\n")
    assert max(largest, bytes_of_output(host, id)) <= 3 * MIB


def bytes_of_output(host: Host, id: str) -> int:
    """What a container's output takes on the disk, in the daemon's files or in ours."""
    if host.backend != "docker":
        (files,) = (host.state_dir / "containers").glob(f"*/{id}")
        return sum(path.stat().st_size for path in files.iterdir())
    whole = host.daemon.run("docker", "inspect", "--format", "{{.Id}}", id).stdout.strip()
    logs = (host.daemon.directory / "root" / "containers" / whole / "local-logs").iterdir()
    return sum(path.stat().st_size for path in logs)


def test_the_output_of_a_container_can_be_read_by_another_process_while_it_runs(host: Host) -> None:
    id = host.start("bash", "-c", "echo ready; exec sleep 600")
    wait_for_output(host, id, b"ready")
    with host.connect() as another:
        assert another.output(id) == b"ready\n"


def test_a_container_whose_worker_no_longer_reads_its_output_is_removed_all_the_same(host: Host) -> None:
    flood = "while True: print('x' * 65536, flush=True)"
    arguments = (host.backend.partition("-")[0], host.daemon.socket, NAMESPACE, host.state_dir, IMAGE, flood)
    begun = subprocess.run(
        [sys.executable, "-c", STARTS_ONE, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60
    )
    id = begun.stdout.strip()
    assert host.runtime.get(id).state is ContainerState.RUNNING
    host.runtime.remove(id)


def test_a_created_container_is_there_and_does_not_run(host: Host) -> None:
    created = host.runtime.get(host.create(labels={"io.airflow.dag_id": "sales"}))
    assert created.state is ContainerState.CREATED
    assert created.exit_status is None
    assert dict(created.labels) == {"io.airflow.dag_id": "sales"}
    assert created.created_at is not None


def test_create_gives_what_get_gives(host: Host) -> None:
    id = new_container_id("test")
    host.made.append(id)
    assert host.runtime.create(id, host.spec()) == host.runtime.get(id)


def test_start_gives_the_pid_on_the_host(host: Host) -> None:
    id = host.create("sleep", "600")
    pid = host.runtime.start(id)
    assert Path(f"/proc/{pid}/stat").exists()
    assert Path(f"/proc/{pid}/ns/pid").stat().st_ino != Path("/proc/self/ns/pid").stat().st_ino
    running = host.runtime.get(id)
    assert (running.state, running.pid) == (ContainerState.RUNNING, pid)


def test_an_ended_container_keeps_its_exit_status(host: Host) -> None:
    id = host.create("bash", "-c", "exit 3")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    ended = host.runtime.get(id)
    assert (ended.state, ended.pid) == (ContainerState.STOPPED, 0)
    assert ended.exit_status is not None
    assert ended.exit_status.code == 3


def test_the_wait_becomes_readable_with_the_end_and_not_before(host: Host) -> None:
    id = host.create("sleep", "600")
    with host.runtime.wait(id) as pending:
        assert not select.select([pending], [], [], 0)[0]
        host.runtime.start(id)
        assert not select.select([pending], [], [], 0.5)[0]
        with pytest.raises(TimeoutError):
            pending.result(0)
        host.runtime.kill(id)
        assert select.select([pending], [], [], 20)[0]
        assert pending.result(0).code == 128 + signal.SIGKILL
        assert pending.result(0).code == 128 + signal.SIGKILL


def test_a_short_life_is_not_missed(host: Host) -> None:
    for _ in range(5):
        assert host.run("true")[0].code == 0


def test_a_wait_after_the_end_answers(host: Host) -> None:
    id = host.create("bash", "-c", "exit 4")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    with host.runtime.wait(id) as late:
        assert late.result(20).code == 4


def test_many_may_wait_for_one_container(host: Host) -> None:
    id = host.create("bash", "-c", "exit 5")
    with host.runtime.wait(id) as one, host.runtime.wait(id) as other:
        host.runtime.start(id)
        assert (one.result(60).code, other.result(60).code) == (5, 5)


def test_a_wait_may_be_closed_before_the_end_and_twice(host: Host) -> None:
    id = host.start("sleep", "600")
    pending = host.runtime.wait(id)
    assert f"wait-{id}" in {thread.name for thread in threading.enumerate()}
    pending.close()
    pending.close()
    # By name, because gRPC's own threads come and go as they like.
    assert f"wait-{id}" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ValueError, match="closed"):
        pending.fileno()


def _threads_and_descriptors() -> tuple[int, int]:
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def test_a_hundred_waits_leave_no_thread_and_no_descriptor(host: Host) -> None:
    id = host.start("sleep", "600")
    host.runtime.wait(id).close()
    before = _threads_and_descriptors()
    for _ in range(100):
        host.runtime.wait(id).close()
    # gRPC's own thread for pending calls takes a moment to notice that there are none.
    deadline = time.monotonic() + 20
    while (after := _threads_and_descriptors()) > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after <= before


def test_a_removal_ends_the_wait(host: Host) -> None:
    id = host.start("sleep", "600")
    with host.runtime.wait(id) as pending:
        host.runtime.remove(id)
        assert pending.result(20).code == 137


def test_a_removal_before_the_start_ends_the_wait(host: Host) -> None:
    id = host.create("sleep", "600")
    with host.runtime.wait(id) as pending:
        host.runtime.remove(id)
        pending.result(20)


def test_a_container_starts_once(host: Host) -> None:
    id = host.start("sleep", "600")
    with pytest.raises(ContainerFailed):
        host.runtime.start(id)


def test_an_ended_container_does_not_start_again(host: Host) -> None:
    id = host.create("true")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    with pytest.raises(ContainerFailed):
        host.runtime.start(id)


def test_signals_arrive_and_their_exit_code_is_128_and_the_number(host: Host) -> None:
    id = host.create(
        "python3",
        "-c",
        "import signal, time; signal.signal(15, lambda *_: exit(9)); print('ready', flush=True); time.sleep(600)",
    )
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        wait_for_output(host, id, b"ready")
        host.runtime.kill(id, signal.SIGTERM)
        assert pending.result(20).code == 9


def test_kill_without_a_signal_is_sigkill(host: Host) -> None:
    id = host.create("python3", "-c", IGNORE_TERM)
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        wait_for_output(host, id, b"ready")
        host.runtime.kill(id, signal.SIGTERM)
        with pytest.raises(TimeoutError):
            pending.result(0.3)
        host.runtime.kill(id)
        assert pending.result(20).code == 137


def test_signals_that_the_daemon_was_asked_for_are_known_where_it_remembers_them(host: Host) -> None:
    id, other = host.start("python3", "-c", IGNORE_TERM), host.start()
    wait_for_output(host, id, b"ready")
    for number in (signal.SIGTERM, signal.SIGKILL):
        host.runtime.kill(id, number)
    remembered = (signal.SIGTERM, signal.SIGKILL) if host.backend == "docker" else ()
    assert host.runtime.signals_asked_for(id) == remembered
    assert host.runtime.signals_asked_for(other) == ()
    host.runtime.remove(id)
    assert host.runtime.signals_asked_for(id)[:2] == remembered
    assert host.runtime.signals_asked_for("test-nobody") == ()


def test_killing_twice_or_after_the_end_or_nobody_is_success(host: Host) -> None:
    id = host.create("sleep", "600")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        host.runtime.kill(id)
        host.runtime.kill(id)
        pending.result(20)
    host.runtime.kill(id)
    host.runtime.kill(id, signal.SIGTERM, everyone=True)
    host.runtime.kill("nobody")


def test_a_signal_to_everyone_reaches_grandchildren(host: Host) -> None:
    child = "import signal, time; signal.signal(15, lambda *_: (print('child ended', flush=True), exit(0))); print('child ready', flush=True); time.sleep(600)"
    parent = f"import subprocess, signal, time; signal.signal(15, signal.SIG_IGN); subprocess.Popen(['python3', '-c', {child!r}]); time.sleep(600)"
    id = host.start("python3", "-c", parent)
    wait_for_output(host, id, b"child ready")
    host.runtime.kill(id, signal.SIGTERM, everyone=True)
    wait_for_output(host, id, b"child ended")
    assert host.runtime.get(id).state is ContainerState.RUNNING


def test_the_end_of_the_first_process_is_the_end_of_all(host: Host) -> None:
    id = host.start("bash", "-c", "setsid sleep 4711 & setsid sleep 4711 & sleep 600")
    pid = host.runtime.get(id).pid
    inside = Path(f"/proc/{pid}/ns/pid").stat().st_ino
    with host.runtime.wait(id) as pending:
        host.runtime.kill(id)
        pending.result(20)
    deadline = time.monotonic() + 10
    while any(_pid_namespace(entry.name) == inside for entry in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _pid_namespace(pid: str) -> int:
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except OSError:
        return 0


@pytest.mark.parametrize("state", ["created", "running", "ended", "never there"])
def test_remove_may_be_called_in_every_state_and_twice(host: Host, state: str) -> None:
    id = new_container_id("test")
    if state != "never there":
        host.create("bash", "-c", "true" if state == "ended" else "sleep 600", id=id)
    if state in ("running", "ended"):
        with host.runtime.wait(id) as pending:
            host.runtime.start(id)
            if state == "ended":
                pending.result(60)
    host.runtime.remove(id)
    host.runtime.remove(id)
    with pytest.raises(ContainerNotFound):
        host.runtime.get(id)


def test_several_may_remove_one_container_at_the_same_time(host: Host) -> None:
    id = host.start("sleep", "600")
    with ThreadPoolExecutor(4) as pool:
        for removal in [pool.submit(host.runtime.remove, id) for _ in range(4)]:
            removal.result(60)
    with pytest.raises(ContainerNotFound):
        host.runtime.get(id)


def test_what_is_gone_is_not_found(runtime: ContainerRuntime) -> None:
    for ask in (runtime.get, runtime.start, runtime.wait, runtime.output):
        with pytest.raises(ContainerNotFound):
            ask("nobody")


def test_a_taken_id_is_refused_and_its_container_unharmed(host: Host) -> None:
    id = host.start("sleep", "600")
    pid = host.runtime.get(id).pid
    with pytest.raises(ContainerExists, match=id):
        host.runtime.create(id, host.spec())
    assert host.runtime.get(id).pid == pid
    assert host.runtime.get(id).state is ContainerState.RUNNING


def test_of_two_workers_creating_one_id_exactly_one_wins(host: Host) -> None:
    id = new_container_id("test")
    host.made.append(id)
    other = host.connect()
    barrier = threading.Barrier(2)

    def create(runtime: ContainerRuntime) -> bool:
        barrier.wait(20)
        try:
            runtime.create(id, host.spec())
        except ContainerExists:
            return False
        return True

    try:
        with ThreadPoolExecutor(2) as pool:
            won = [attempt.result(60) for attempt in [pool.submit(create, one) for one in (host.runtime, other)]]
    finally:
        other.close()
    assert sorted(won) == [False, True]
    host.runtime.start(id)
    assert host.runtime.get(id).state is ContainerState.RUNNING


@pytest.mark.parametrize("id", ["", "a/b", "a__b", "-a", "a-", "ä", "a" * 250, "a b", "../a", "a\n"])
def test_bad_ids_are_refused_everywhere(host: Host, id: str) -> None:
    runtime = host.runtime
    for ask in (runtime.get, runtime.start, runtime.wait, runtime.output, runtime.kill, runtime.remove):
        with pytest.raises(SpecRefused, match="container"):
            ask(id)
    with pytest.raises(SpecRefused, match="container"):
        runtime.create(id, host.spec())


def test_the_longest_id_works(host: Host) -> None:
    id = "a" * 76
    host.create("true", id=id)
    assert host.runtime.get(id).id == id


def test_list_is_by_labels_and_oldest_first(host: Host) -> None:
    ids = [host.create(labels={"io.airflow.dag_id": "sales", "io.airflow.task_id": f"task {n}"}) for n in range(3)]
    host.runtime.start(ids[1])
    found = host.runtime.list({"io.airflow.dag_id": "sales"})
    assert [container.id for container in found] == ids
    assert [container.state.value for container in found] == ["created", "running", "created"]
    only = host.runtime.list({"io.airflow.dag_id": "sales", "io.airflow.task_id": "task 2"})
    assert [container.id for container in only] == ids[2:]
    assert host.runtime.list({"io.airflow.dag_id": "other"}) == ()
    assert dict(found[0].labels) == {"io.airflow.dag_id": "sales", "io.airflow.task_id": "task 0"}


@pytest.mark.parametrize("value", ['quote " and \\', "comma, blank", "späße 🎉", "new\nline", "a=b", "", "~=^$"])
def test_label_values_are_kept_and_found_whatever_they_hold(host: Host, value: str) -> None:
    id = host.create(labels={"io.airflow.run_id": value})
    # containerd drops a label without a value; to whoever asks, it is the same.
    assert [
        (container.id, container.labels.get("io.airflow.run_id", ""))
        for container in host.runtime.list({"io.airflow.run_id": value})
    ] == [(id, value)]


def test_the_list_says_how_containers_ended(host: Host) -> None:
    id = host.create("bash", "-c", "exit 6")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    (container,) = host.runtime.list()
    assert container.state is ContainerState.STOPPED
    assert container.exit_status is not None
    assert container.exit_status.code == 6


def test_another_namespace_sees_nothing_and_harms_nothing(host: Host) -> None:
    id = host.start("sleep", "600")
    with host.connect(namespace="other") as other:
        assert other.list() == ()
        other.kill(id)
        other.remove(id)
        with pytest.raises(ContainerNotFound):
            other.get(id)
    assert host.runtime.get(id).state is ContainerState.RUNNING


def test_stats_count(host: Host) -> None:
    id = host.create(
        "python3",
        "-c",
        "import time; x = b'x' * 30_000_000\nwhile time.process_time() < 0.3: pass\nprint('ready', flush=True); time.sleep(600)",
        resources=Resources(memory=256 * MIB),
    )
    host.runtime.start(id)
    wait_for_output(host, id, b"ready")
    stats = host.runtime.stats([id, "nobody"])
    assert set(stats) == {id}
    one = stats[id]
    assert one.cpu_seconds is not None
    assert one.cpu_seconds >= 0.3
    assert one.memory is not None
    assert one.memory >= 30_000_000
    assert one.memory_limit == 256 * MIB
    assert one.pids is not None
    assert one.pids >= 1


def test_stats_say_the_same_of_the_same_work_whatever_the_backend(host: Host) -> None:
    id = host.create(
        "python3",
        "-c",
        "import time; x = b'x' * 100_000_000\nwhile time.process_time() < 1: pass\ndel x; print('ready', flush=True); time.sleep(600)",
        resources=Resources(memory=256 * MIB, pids=64),
    )
    host.runtime.start(id)
    wait_for_output(host, id, b"ready")
    one = host.runtime.stats([id])[id]
    assert one.cpu_seconds is not None
    assert 1 <= one.cpu_seconds < 30
    assert one.cpu_user is not None
    assert one.cpu_system is not None
    assert one.cpu_user + one.cpu_system == pytest.approx(one.cpu_seconds, abs=0.3)
    assert one.memory_peak is not None
    assert 100_000_000 <= one.memory_peak <= 256 * MIB
    assert (one.oom_kills, one.pids, one.pids_limit) == (0, 1, 64)


def test_stats_count_what_the_kernel_killed_for_memory(host: Host) -> None:
    id = host.create(
        "sh", "-c", "python3 -c \"x = b'x' * 500_000_000\"; echo ready; sleep 600", resources=Resources(memory=64 * MIB)
    )
    host.runtime.start(id)
    wait_for_output(host, id, b"ready")
    one = host.runtime.stats([id])[id]
    assert one.oom_kills == 1
    assert one.memory_peak is not None
    assert 63 * MIB <= one.memory_peak <= 64 * MIB


def test_where_cgroups_can_not_be_seen_the_daemon_counts(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    id = host.start("sleep", "600")
    monkeypatch.setattr(CgroupFiles, "_mounts", CgroupMounts())
    with host.connect() as runtime:
        assert (runtime.stats([id])[id].memory or 0) > 0


def test_a_list_with_use_agrees_with_list_and_stats(host: Host) -> None:
    holds = "import time; x = b'x' * 30_000_000; print('ready', flush=True); time.sleep(600)"
    running, created = (
        host.start("python3", "-c", holds, labels={"of": "this"}),
        host.create("true", labels={"of": "this"}),
    )
    host.start("sleep", "600", labels={"of": "another"})
    wait_for_output(host, running, b"ready")
    wanted = {"of": "this"}
    with host.connect() as runtime:
        listed = runtime.list_with_use(wanted)
        assert tuple(container for container, _ in listed) == runtime.list(wanted)
        used = {container.id: use for container, use in listed}
        now = runtime.stats([running])[running]
    assert used[created] is None
    use = used[running]
    assert use is not None
    assert use.pids == 1
    assert use.memory == pytest.approx(now.memory, rel=0.2)
    assert use.cpu_seconds is not None
    assert 0 < use.cpu_seconds <= (now.cpu_seconds or 0)


def test_where_cgroups_can_not_be_seen_a_list_has_use_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    id = host.start("sleep", "600")
    monkeypatch.setattr(CgroupFiles, "_mounts", CgroupMounts())
    with host.connect() as runtime:
        ((container, use),) = (each for each in runtime.list_with_use() if each[0].id == id)
    assert container.state is ContainerState.RUNNING
    assert use is not None
    assert use.memory


def test_without_a_limit_stats_name_none(host: Host) -> None:
    id = host.start("sleep", "600")
    assert host.runtime.stats([id])[id].memory_limit is None


def test_stats_leave_out_what_does_not_run(host: Host) -> None:
    id = host.create("true")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    assert host.runtime.stats([id, "nobody"]) == {}
    assert host.runtime.stats([]) == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("no-such-program",), "no-such-program"),
        (("/usr/bin/no-such-program",), "python"),
        (("/etc",), "/etc"),
    ],
)
def test_what_is_no_program_is_said_in_words_and_leaves_nothing(host: Host, argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ContainerFailed, match=words) as caught:
        host.start(*argv, id="test-not-a-program")
    assert "conformance:1" in str(caught.value)
    host.runtime.remove("test-not-a-program")


def test_a_program_of_another_machine_ends_with_the_kernels_words(host: Host) -> None:
    # Some releases of runc find out when the container is started, some when it is running.
    try:
        status, said = host.run("/usr/local/bin/not-a-program")
    except ContainerFailed as error:
        code, said = 1, str(error)
    else:
        code = status.code
    assert code != 0
    assert "exec format error" in said


def test_an_image_that_is_not_there_is_not_found(host: Host) -> None:
    with pytest.raises(ImageNotFound, match="localhost/absent:1"):
        host.create(image="localhost/absent:1")


@pytest.mark.parametrize("image", ["", "UPPER/case", "a b", "-", "../x", "x:" + "y" * 200])
def test_what_can_not_be_an_images_name_is_an_image_error(host: Host, image: str) -> None:
    with pytest.raises(IsolationError):
        host.create(image=image)


def test_a_create_that_fails_half_way_leaves_nothing(host: Host, tmp_path: Path) -> None:
    # A directory over a file is found wrong only by runc, when all else has been made.
    with pytest.raises(ContainerFailed):
        host.start(id="test-half-way", mounts=(Mount(source=str(tmp_path), target="/etc/passwd"),))
    host.runtime.remove("test-half-way")


def test_close_may_be_called_twice(host: Host) -> None:
    other = host.connect()
    other.info()
    other.close()
    other.close()


def test_several_threads_may_share_a_runtime(host: Host) -> None:
    def whole_life(number: int) -> int:
        return host.run("bash", "-c", f"exit {number}")[0].code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(whole_life, range(8))) == list(range(8))


def test_the_output_survives_a_json_round_trip(host: Host) -> None:
    assert host.python("import json; print(json.dumps({'a': 'ü'}))") == json.loads('{"a": "ü"}')
