"""Tasks of workers that have no privilege, made by the node."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.node.conftest import FIRST_UID, SECONDS, UID, in_namespaces
from tests.processes import wait_until

from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from tests.node.conftest import House

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

LOOK = """
import json, os
print(json.dumps({
    "uid_map": open("/proc/self/uid_map").read().split(),
    "effective": [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")][0],
    "seen": sorted(os.listdir(%r)),
    "own": os.environ.get("OF_THIS_TASK"),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
}))
try:
    open(%r + "/written", "w")
except OSError as error:
    print(error.errno)
"""


def test_a_task_of_an_ordinary_user_is_forked_in_a_user_namespace(host: House) -> None:
    started, ended = host.run(LOOK % (str(host.bundle), str(host.bundle)))
    assert started["start_mode"] == "fork", started
    assert started["uid"] == UID
    assert (ended["code"], ended["stderr"]) == (0, "")
    said, read_only = ended["stdout"].splitlines()
    looked = json.loads(said)
    assert int(looked["uid_map"][1]) >= FIRST_UID
    assert looked["effective"] == "0000000000000000"
    assert looked["seen"] == ["sales.py"]
    assert looked["own"] == "yes"
    assert read_only == "30", "EROFS: the worker's directory can't be written to"
    assert ended["usage"]["memory_peak"] > 0


def test_a_worker_in_namespaces_of_its_own_has_its_paths_and_no_others(host: House) -> None:
    """The bundle is where it is in the worker's mount namespace, and nowhere on the host."""
    inside = in_namespaces(host.place)
    started, ended = host.run(
        LOOK % ("/srv/dags", "/srv/dags"), inside=inside, bundle="/srv/dags", node="/srv/node/node.sock"
    )
    assert started.get("start_mode") == "fork", started
    assert json.loads(ended["stdout"].splitlines()[0])["seen"] == ["sales.py"]
    assert not Path("/srv/dags").exists()


def test_tasks_are_those_of_the_worker_by_label_and_go_when_it_is_killed(host: House) -> None:
    worker = host.work("import time; time.sleep(600)", hold=True)
    id = worker.said()["id"]
    (container,) = host.runtime.list({labels.PURPOSE: "task"})
    assert container.id == id
    assert container.labels[labels.CLIENT] == str(UID)
    assert container.labels[labels.DAG_ID] == "sales"
    worker.process.kill()
    worker.process.wait()
    host.wait_until_nothing_is_left()


def test_a_worker_that_gives_up_has_its_container_removed_at_once(host: House) -> None:
    worker = host.work("import time; time.sleep(600)", hold=True)
    worker.said()
    worker.tell("close")
    host.wait_until_nothing_is_left()


def test_a_worker_with_many_open_files_has_its_tasks(host: House) -> None:
    """select(2) knows no descriptor above 1023."""
    _, ended = host.run("print('done')", descriptors=1100)
    assert ended["stdout"] == "done\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_task(host: House, number: signal.Signals) -> None:
    worker = host.work("import time; time.sleep(600)", hold=True)
    worker.said()
    worker.tell(f"signal {int(number)}")
    assert worker.said()["code"] == -number


def test_memory_that_ran_out_is_told_by_the_node(host: House) -> None:
    _, ended = host.run("x = bytearray(200 * 1024 * 1024)", written={"resources": {"memory": "64Mi"}})
    assert ended["code"] == -signal.SIGKILL
    assert ended["usage"]["oom_kills"] >= 1


def test_the_document_beside_the_dag_file_holds(host: House) -> None:
    started, ended = host.run(
        "import os; print(os.environ['REGION'])",
        document="container:\n  environment: {REGION: eu}\n  stop_grace_period: 1\n",
    )
    assert ended["stdout"].strip() == "eu"
    assert started["grace"] == 1.0


def test_a_mistake_in_the_document_is_told_with_its_place(host: House) -> None:
    failed = host.refused(document="container:\n  imgae: x\n")
    assert failed["kind"] == "SettingError"
    assert failed["failed"].startswith("sales.yaml, line 2, container.imgae:")


def test_spares_serve_workers_of_one_mount_namespace(host: House) -> None:
    """Ordinary users of these tests have one each; root's workers have the node's."""
    # Of a kind that no other test has: theirs may be made at any time.
    kind = {"environment": {"KIND": "of this test"}}
    before = set(host.state_dir.glob("spares/*"))

    def spares() -> set[str]:
        return {record.stem for record in host.state_dir.glob("spares/*/*.json") if record.parent not in before}

    host.run(uid=0, written=kind)
    wait_until(lambda: bool(spares()), SECONDS, "a spare container like this task's")
    waiting = spares()
    started, ended = host.run("print('mine')", uid=0, written=kind)
    assert started["id"] in waiting, host.log
    assert ended["stdout"] == "mine\n"
