"""The container that a task gets is the one that the settings ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.end_to_end.conftest import START_MODE
from tests.end_to_end.secrets_of_airflow import secrets_of

if TYPE_CHECKING:
    from tests.end_to_end.airflow_processes import Airflow, Run


def surroundings(run: Run, task: str) -> dict[str, Any]:
    assert run.tasks[task].state == "success", run.tasks[task].text
    found: dict[str, Any] = run.xcoms[f"{task}.return_value"]
    return found


@pytest.mark.dag("chosen")
def test_the_yaml_beside_the_dag_file_gives_the_container(run: Run) -> None:
    found = surroundings(run, "plain")
    assert (found["from"], found["hostname"], found["has_cowsay"]) == ("yaml", "from-yaml", False)


@pytest.mark.dag("chosen")
def test_a_pattern_of_the_yaml_gives_its_tasks_another_image(run: Run, images: dict[str, str]) -> None:
    found = surroundings(run, "train_first")
    assert (found["from"], found["has_cowsay"]) == ("pattern", True)
    assert images["extra"] in run.tasks["train_first"].text


@pytest.mark.dag("chosen")
def test_executor_config_is_stronger_than_the_yaml(run: Run) -> None:
    found = surroundings(run, "train_last")
    assert (found["from"], found["has_cowsay"]) == ("executor_config", False)


@pytest.mark.dag("chosen")
def test_an_image_in_the_shape_of_the_official_one_is_as_good(run: Run, images: dict[str, str]) -> None:
    """Airflow lies in a home of mode 0770, and a file in there is for its user alone; the entry point could not run."""
    assert surroundings(run, "train_last")["netrc"] == len("machine registry.example login me password word\n")
    text = run.tasks["train_last"].text
    assert images["closed_home"] in text
    assert f"start_mode={START_MODE}" in text.replace("'", "").replace('"', "").replace(": ", "=")


@pytest.mark.dag("chosen")
def test_the_hook_has_the_last_word_on_the_image(run: Run) -> None:
    assert surroundings(run, "hooked")["has_cowsay"] is True


@pytest.mark.dag("chosen")
def test_without_a_network_there_is_loopback_and_airflow_works(run: Run) -> None:
    assert surroundings(run, "plain")["interfaces"] == ["lo"]


@pytest.mark.dag("chosen")
def test_the_memory_limit_is_in_force_and_seen_from_inside(run: Run) -> None:
    assert surroundings(run, "plain")["memory_limit"] == 512 * 1024 * 1024


@pytest.fixture
def reality(run: Run) -> dict[str, Any]:
    return surroundings(run, "probe")


@pytest.mark.dag("probed")
def test_the_user_is_who_was_declared(reality: dict[str, Any]) -> None:
    assert (set(reality["uid"]), set(reality["gid"])) == ({50000}, {0})


@pytest.mark.dag("probed")
def test_there_are_no_capabilities_and_no_new_privileges(reality: dict[str, Any]) -> None:
    assert set(map(tuple, reality["capabilities"].values())) == {()}
    assert reality["no_new_privileges"] is True
    assert reality["seccomp_mode"] == 2


@pytest.mark.dag("probed")
def test_the_system_calls_that_lead_out_are_refused(reality: dict[str, Any]) -> None:
    assert reality["syscalls"]["clone3"] == "ENOSYS"
    assert {answer for name, answer in reality["syscalls"].items() if name != "clone3"} <= {"EPERM", "ENOSYS"}
    assert reality["socket"]["alg"] != "ok"
    assert reality["socket"]["vsock"] != "ok"


@pytest.mark.dag("probed")
def test_the_namespaces_are_its_own(reality: dict[str, Any]) -> None:
    from pathlib import Path

    for name in ("ipc", "mnt", "net", "pid", "uts"):
        assert reality["namespaces"][name] != Path(f"/proc/self/ns/{name}").stat().st_ino, name
    assert len(reality["processes"]) <= 3


@pytest.mark.dag("probed")
def test_nothing_can_be_written_but_the_scratch_space(reality: dict[str, Any]) -> None:
    assert reality["writable"]["/tmp"] == "ok"
    assert {path for path, answer in reality["writable"].items() if answer == "ok"} <= {"/tmp", "/run", "/dev/shm"}


@pytest.mark.dag("probed")
def test_the_bundle_is_at_its_own_path_and_read_only(reality: dict[str, Any], airflow: Airflow) -> None:
    mounts = {mount["target"]: mount["options"] for mount in reality["mounts"]}
    for directory in ("dags", "config"):
        assert "ro" in mounts[str(airflow.home / directory)], mounts


@pytest.mark.dag("probed")
def test_no_secret_of_the_worker_is_in_reach(reality: dict[str, Any], airflow: Airflow) -> None:
    assert reality["found"] == []
    configuration = str(reality["configuration"])
    assert [secret for secret in secrets_of(airflow) if secret in configuration] == []


@pytest.mark.dag("probed")
def test_the_task_holds_its_four_descriptors_and_no_other_channel(reality: dict[str, Any]) -> None:
    found = sorted({target for target in reality["descriptors"].values() if target.startswith(("socket:", "pipe:"))})
    assert [target.partition(":")[0] for target in found] == ["pipe", "pipe", "socket", "socket"], reality[
        "descriptors"
    ]


@pytest.mark.dag("probed")
def test_more_memory_than_the_limit_is_an_oom_kill(run: Run) -> None:
    assert run.tasks["too_much_memory"].state == "failed"
    assert "Likely out of memory error (OOM)" in run.tasks["too_much_memory"].text
