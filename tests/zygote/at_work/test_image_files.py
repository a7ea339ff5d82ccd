"""Files of an image are to a task what they are to it without a user namespace; the mounts that do it come and go."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance.archives import derived
from tests.zygote.at_work import stand_ins
from tests.zygote.at_work.conftest import FIRST_UID, NAMESPACE
from tests.zygote.at_work.test_reach import fork_by_hand

from airflow_isolation.bridge.prune import prune
from airflow_isolation.bridge.workload import launch
from airflow_isolation.bridge.zygote import remove_zygote
from airflow_isolation.container_spec import ContainerSpec, UserNamespace
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime.connect import connect
from airflow_isolation.runtime.interface import ImageInNamespace, PullPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Daemon, ImageArchive, ImageName
    from tests.zygote.at_work.conftest import Task, Worker

pytestmark = pytest.mark.root

#: What programs of the image look at: libpq and ssh at owners and modes, git at the owner of a repository.
LOOKING = """
import json, os
home = os.path.expanduser("~")
def seen(path):
    status = os.stat(path)
    return [status.st_uid, status.st_gid, oct(status.st_mode)]
def attempt(action, *arguments):
    try:
        return action(*arguments)
    except OSError as error:
        return error.strerror
print(json.dumps({
    "pgpass": open(f"{home}/.pgpass").read(),
    "mine": [os.stat(f"{home}/{name}").st_uid == os.getuid() for name in (".pgpass", ".ssh/config", "repository/.git")],
    "seen": {path: seen(path) for path in ("/", "/etc", "/etc/shadow", "/usr/bin/su", "/var/tmp", home, f"{home}/.ssh")},
    "shadow": attempt(open, "/etc/shadow"),
    "written": [attempt(os.mkdir, f"{home}/new"), attempt(os.chmod, f"{home}/.pgpass", 0o644)],
}))
"""


def places(worker: Worker) -> list[Path]:
    return sorted(path for path in (worker.state_dir / "roots").glob("*") if path.is_dir())


def mounted(worker: Worker) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if f"{worker.state_dir}/roots/" in line.split()[4]]


def test_a_task_sees_its_image_as_when_it_starts_fresh(worker: Worker) -> None:
    """And its zygote could import what lies in a home that is closed to everybody else."""
    task = worker.task("closed-home", author=True)
    assert task.launch.spec.user_namespace
    forked = worker.start(task, LOOKING)
    assert (forked.start_mode, forked.why_fresh) == ("fork", "")
    found = forked.json()
    assert found["pgpass"] == "db:5432:sales:me:word\n"
    assert found["mine"] == [True, True, True]
    assert found["shadow"] == "Permission denied"
    assert found["written"] == ["Read-only file system", "Read-only file system"]
    fresh = worker.start(worker.task("closed-home", cfg="uid_range = none", author=True), LOOKING)
    assert fresh.workload.start_mode == "fresh"
    assert fresh.json() == found


def test_a_root_that_may_be_written_to_is_written_to_as_without_a_namespace(worker: Worker) -> None:
    program = """
import json, os
home = os.path.expanduser("~")
with open(f"{home}/.pgpass", "a") as file:
    file.write("more")
os.mkdir(f"{home}/new")
made = [[status.st_uid, status.st_gid, oct(status.st_mode)] for status in map(os.stat, (f"{home}/new", f"{home}/.pgpass"))]
try:
    os.mkdir("/etc/new")
except OSError as error:
    print(json.dumps([made, os.listdir(home), error.strerror]))
"""
    cfg = "read_only_root = false"
    forked = worker.start(worker.task("closed-home", cfg=cfg), program)
    assert (forked.start_mode, forked.why_fresh) == ("fork", "")
    fresh = worker.start(worker.task("closed-home", cfg=f"{cfg}\nstart_mode = fresh"), program)
    found = forked.json()
    assert found == fresh.json()
    assert (found[0][0], found[2]) == ([50000, 0, "0o40755"], "Permission denied")
    # Nobody else's, nor the image's.
    assert worker.run(LOOKING, "closed-home").json()["pgpass"] == "db:5432:sales:me:word\n"


def test_layers_are_mounted_once_found_again_and_go_with_the_last_container(worker: Worker) -> None:
    worker.remove_zygotes()
    assert (places(worker), mounted(worker)) == ([], [])
    assert worker.run().finish() == 0
    before = mounted(worker)
    assert len(places(worker)) == 1
    assert len(before) > 1
    socket_path = worker.runtime.info().socket_path
    with connect("containerd", socket_path=socket_path, namespace=NAMESPACE, state_dir=worker.state_dir) as another:
        # A worker that has died left one layer unmounted; what runs needs none of them.
        subprocess.run(["umount", before[-1].split()[4]], check=True)
        task = worker.task()
        workload = launch(another, task.launch, state_dir=worker.state_dir, plan=task.plan)
        assert workload.start_mode == "fork"
        workload.close()
        assert len(mounted(worker)) == len(before)
        # The zygote still needs them.
        assert prune(another, state_dir=worker.state_dir).directories == ()
        assert len(mounted(worker)) == len(before)
        worker.end()
        remove_zygote(another, worker.directory(task), state_dir=worker.state_dir)
        would = prune(another, state_dir=worker.state_dir, dry_run=True).directories
        assert set(places(worker)) <= set(would)
        assert len(mounted(worker)) == len(before)
        assert set(would) <= set(prune(another, state_dir=worker.state_dir).directories)
    assert mounted(worker) == []
    assert not (worker.state_dir / "roots").exists()
    assert worker.run().finish() == 0


def test_where_owners_can_not_be_kept_the_image_is_looked_at_once(
    worker: Worker, image_archive: ImageArchive, tmp_path: Path
) -> None:
    """By a snapshotter that makes no overlays."""
    socket_path = worker.runtime.info().socket_path
    answers = {}
    with connect(
        "containerd", socket_path=socket_path, namespace=NAMESPACE, state_dir=worker.state_dir, snapshotter="native"
    ) as runtime:
        for name, owned in (("closed", stand_ins.CLOSED_HOME), ("open", stand_ins.CLOSED_HOME[4:])):
            archive = derived(
                image_archive("no-python"),
                tmp_path / name,
                name=f"localhost/{name}:1",
                config={"User": "50000:0"},
                files=stand_ins.PRIVATE_FILES,
                owned=owned,
            )
            # containerd's import unpacks for the usual snapshotter alone.
            (imported,) = worker.runtime.import_image(archive)
            image = runtime.ensure_image(imported.reference, PullPolicy.NEVER)
            spec = ContainerSpec(image=image.reference, argv=())
            for user in ("", "1234:1234", "70000"):
                look = partial(runtime.in_user_namespace, replace(spec, user=user), digest=image.digest, ids=65536)
                answers[name, user] = look()
                before = kept(worker)
                assert look() == answers[name, user]
                assert kept(worker) == before
            runtime.remove_image(image.reference)
    closed = (
        "/home/airflow (mode 0700) of the image is closed to others, and users of a user namespace are others, because its "
        "files can't keep their owners there: the snapshotter native makes no overlays. Open it in the image (chmod o+rX), or "
        "leave it as it is"
    )
    beyond = "the user's id 70000 is not among the 65536 ids of a user namespace"
    assert answers == {
        ("closed", ""): ImageInNamespace(obstacle=closed),
        ("closed", "1234:1234"): ImageInNamespace(),
        ("closed", "70000"): ImageInNamespace(obstacle=beyond),
        ("open", ""): ImageInNamespace(),
        ("open", "1234:1234"): ImageInNamespace(),
        ("open", "70000"): ImageInNamespace(obstacle=beyond),
    }


def kept(worker: Worker) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in (worker.state_dir / "accounts").glob("namespace-*")}


def written_in(task: Task, worker: Worker) -> list[Path]:
    """What a hostile zygote has made in the layers of its image."""
    namespace = task.launch.spec.user_namespace
    assert namespace
    (place,) = [path for path in places(worker) if path.name.startswith(f"{namespace.first}-")]
    return list(place.rglob("ai-hostile*"))


def test_a_hostile_zygote_writes_nothing_into_its_image(worker: Worker) -> None:
    """Root in there owns the image's files now: it must not reach them but through an overlay that nobody can write to."""
    task = worker.task("hostile", environment={"AIRFLOW_TEST_CHEAT": "writes_into_its_image"})
    victim = worker.start(task, "print('up', flush=True); requests.recv(1)")
    victim.until(lambda: "up" in victim.stdout)
    assert fork_by_hand(worker, task, victim.workload.container.pid) == {"done": []}
    assert written_in(task, worker) == []
    victim.workload.channels.requests.send(b"x")
    assert victim.finish() == 0
    zygote = worker.zygote(task)
    lines = Path(f"/proc/{zygote.pid}/mountinfo").read_text().splitlines()
    assert not [line for line in lines if "idmapped" in line or str(worker.state_dir / "roots") in line.split()[4]]
    (root,) = [line for line in lines if line.split()[4] == "/"]
    assert "upperdir=" not in root
    assert "ai-hostile" not in Path(f"/proc/{zygote.pid}/root/etc/passwd").read_text()


@pytest.mark.parametrize("version", ["1.6", "1.7"])
def test_older_releases_of_containerd_mount_it_too(
    version: str,
    containerd_of_version: Callable[[str], Daemon],
    image_archive: ImageArchive,
    image_name: ImageName,
    state_dir: Path,
) -> None:
    daemon = containerd_of_version(version)
    place = state_dir / version
    with connect("containerd", socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=place) as runtime:
        runtime.import_image(image_archive("no-python"))
        spec = ContainerSpec(
            image=image_name("no-python"),
            argv=("/bin/busybox", "stat", "-c", "%u:%g", "/bin/busybox"),
            user="50000:0",
            network="none",
            user_namespace=UserNamespace(first=FIRST_UID, keeps_owners=True),
        )
        id = new_container_id("task")
        try:
            runtime.create(id, spec)
            with runtime.wait(id) as pending:
                runtime.start(id)
                assert pending.result(timeout=60).code == 0
            assert runtime.output(id) == b"0:0\n"
        finally:
            runtime.remove(id)
            assert len(runtime.remove_unused_roots()) == 1
