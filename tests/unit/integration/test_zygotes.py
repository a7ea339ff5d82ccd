"""Who may share a zygote: whatever is in it when Python starts and Airflow is imported must be equal, nothing else need be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.settings.conftest import Ini

from airflow_isolation.bridge.start_mode import StartDecision
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.bridge.zygote_plan import zygote_plan
from airflow_isolation.container_spec import Mount, Resources, UserNamespace
from airflow_isolation.integration import local_settings
from airflow_isolation.integration.workload_environment import read_only_mounts
from airflow_isolation.runtime.interface import Image
from airflow_isolation.settings.resolve import resolve
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from airflow_isolation.bridge.zygote import ZygotePlan

NAMESPACE = UserNamespace(first=100_000)
DIRECTORIES: list[Path] = []


@pytest.fixture(autouse=True)
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the local settings and plugins are."""
    monkeypatch.setattr(local_settings, "administrators_directories", lambda: [tmp_path / "config"])
    local_settings._digest.cache_clear()
    DIRECTORIES[:] = [tmp_path / "config"]
    (tmp_path / "config").mkdir()
    (tmp_path / "config/airflow_local_settings.py").write_text("A = 1")
    return tmp_path / "config"


def plan(
    cfg: str = "",
    *,
    backend: Any = "containerd",
    digest: str = "sha256:a",
    namespace: UserNamespace | None = NAMESPACE,
    python: str = "python3",
    environment: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    authors: Mapping[str, Any] | None = None,
    client: str = "",
    **changes: Any,
) -> ZygotePlan:
    """``env`` is of the administrator's section, ``authors`` of the task's executor_config."""
    section = "".join(f"{name} = {value}\n" for name, value in (env or {}).items())
    settings = resolve(
        "task",
        backend,
        configuration=Ini(f"[container_runtime]\nimage = i:1\n{cfg}\n[container_runtime_environment]\n{section}"),
        executor_config={"container": dict(authors)} if authors else None,
    )
    spec = replace(container_spec(settings, argv=(), labels={"io.airflow.purpose": "task"}), **changes)
    launch = Launch(
        id="task-a",
        spec=replace(spec, user_namespace=namespace),
        image=Image(reference="i:1", digest=digest, user="airflow"),
        purpose="task",
        environment={"AIRFLOW__CORE__X": "1", "OF_THE_TASK": "1"},
        airflow="3.3.2",
        python=python,
    )
    decision = StartDecision(mode="fork", why="", user_namespace=namespace)
    return zygote_plan(
        settings,
        launch,
        decision,
        environment={"AIRFLOW__CORE__X": "1", **(environment or {})},
        mounts=read_only_mounts(DIRECTORIES),
        settings_digest=local_settings.local_settings_digest(),
        client=client,
    )


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "sha256:b"},
        {"backend": "docker"},
        {"python": "/opt/python"},
        {"environment": {"AIRFLOW__CORE__X": "2"}},
        {"environment": {"AIRFLOW__CORE__Y": "1"}},
        {"namespace": None},
        {"namespace": UserNamespace(first=200_000)},
        {"user": "50001:0"},
        {"capabilities": frozenset({"NET_RAW"})},
        {"env": {"PYTHONPATH": "/more"}},
        {"env": {"LD_PRELOAD": "/more.so"}},
        {"timezone": "Europe/Berlin"},
    ],
    ids=str,
)
def test_what_an_import_may_see_makes_another_zygote(other: dict[str, Any]) -> None:
    assert plan(**other).key != plan().key


@pytest.mark.parametrize(
    "other",
    [
        {"env": {"REGION": "eu"}},
        {"resources": Resources(memory=10**9)},
        {"mounts": (Mount(source="/srv", target="/srv"),)},
        {"hostname": "named"},
        {"stop_grace_period": 3.0},
        {"labels": {"team": "sales"}},
        {"working_dir": "/opt"},
    ],
    ids=str,
)
def test_what_only_the_task_sees_does_not(other: dict[str, Any]) -> None:
    assert plan(**other).key == plan().key


@pytest.mark.parametrize("namespace", [None, NAMESPACE])
def test_the_host_s_network_makes_another_zygote_in_a_user_namespace(namespace: UserNamespace | None) -> None:
    with_it, without = plan(namespace=namespace, network="host"), plan(namespace=namespace, network="none")
    assert without.launch.spec.network == "none"
    assert with_it.launch.spec.network == ("host" if namespace else "none")
    assert (with_it.key == without.key) == (namespace is None)


def key_of_another_process() -> str:
    local_settings._digest.cache_clear()
    return plan().key


@pytest.mark.parametrize(
    "file",
    ["airflow_local_settings.py", "plugin.py", "rules/__init__.py", "rules/deep/labels.py", "rules/labels.yaml"],
)
def test_changed_local_settings_make_another_zygote_after_a_restart(directories: Path, file: str) -> None:
    (directories / "rules" / "deep").mkdir(parents=True)
    first = key_of_another_process()
    (directories / file).write_text("A = 22")
    assert plan().key == first
    second = key_of_another_process()
    assert second != first
    assert key_of_another_process() == second
    (directories / file).write_text("A = 333")
    assert key_of_another_process() not in {first, second}


def test_what_is_no_settings_file_makes_no_other_zygote(directories: Path) -> None:
    before = key_of_another_process()
    for name in ("__pycache__", ".git"):
        (directories / name).mkdir()
        (directories / name / "labels.py").touch()
    (directories / "audit.log").touch()
    assert key_of_another_process() == before


def test_links_among_the_local_settings_are_followed_and_circles_end(directories: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (directories / "rules").symlink_to(tmp_path / "elsewhere")
    (directories / "circle").symlink_to(directories)
    (directories / "broken.py").symlink_to("nothing.py")
    before = key_of_another_process()
    (tmp_path / "elsewhere" / "labels.py").touch()
    assert key_of_another_process() != before


def test_of_very_many_local_settings_the_first_are_looked_at(
    directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_settings, "MOST_FILES", 3)
    for name in "bc":
        (directories / f"{name}.py").touch()
    before = key_of_another_process()
    (directories / "z.py").touch()
    assert key_of_another_process() == before


@pytest.mark.parametrize(
    ("namespace", "has"), [(None, {"TZ": "UTC"}), (NAMESPACE, {"TZ": "UTC", "PYTHONPATH": "/more"})]
)
def test_an_author_s_variables_reach_no_zygote_with_privilege(
    namespace: UserNamespace | None, has: dict[str, str]
) -> None:
    made = plan(
        namespace=namespace,
        env={"TZ": "UTC", "REGION": "eu"},
        authors={"environment": {"PYTHONPATH": "/more", "REGION": "us"}},
    )
    assert dict(made.launch.spec.env) == has
    assert dict(made.launch.environment) == {"AIRFLOW__CORE__X": "1"}


def test_the_filter_of_a_zygote_is_that_of_its_tasks() -> None:
    made = plan(capabilities=frozenset({"NET_RAW"}), seccomp="/etc/own.json").launch.spec
    assert (made.seccomp, made.forks_into) == ("/etc/own.json", frozenset({"NET_RAW"}))


def test_a_zygote_has_the_capabilities_that_entering_takes_and_its_tasks() -> None:
    entering = frozenset({"SYS_ADMIN", "SYS_CHROOT", "SETUID", "SETGID", "SETPCAP", "NET_RAW"})
    privileged = plan(capabilities=frozenset({"NET_RAW"}), namespace=None)
    assert (privileged.launch.spec.capabilities, privileged.drop) == (entering, frozenset())
    # To find an Airflow that lies in a home which is closed to root; then it is the user, whose home that is.
    looks, more = plan(capabilities=frozenset({"NET_RAW"})), frozenset({"DAC_READ_SEARCH"})
    assert (looks.launch.spec.capabilities, looks.drop) == (entering | more, more)
    assert plan(capabilities=frozenset({"DAC_READ_SEARCH"})).drop == frozenset()


def test_replaced_local_settings_make_another_zygote_even_when_their_files_are_the_same(directories: Path) -> None:
    before = plan().key
    old = directories.rename(directories.with_name("old"))
    directories.mkdir()
    (old / "airflow_local_settings.py").rename(directories / "airflow_local_settings.py")
    assert plan().key != before


def test_a_zygote_has_nothing_of_a_user(directories: Path) -> None:
    made = plan(
        "zygote_memory = 512Mi",
        env={"REGION": "eu", "AIRFLOW_VAR_X": "1"},
        mounts=(Mount(source="/srv", target="/srv", read_only=False),),
        network="none",
        labels={"io.airflow.purpose": "task", "io.airflow.owner": "1:1@h"},
        read_only_root=False,
        resources=Resources(cpus=0.1, memory=10**7),
    )
    spec = made.launch.spec
    assert dict(spec.env) == {"AIRFLOW_VAR_X": "1"}
    assert [mount.target for mount in spec.mounts if mount.kind == "bind"] == [str(directories)]
    assert all(mount.read_only for mount in spec.mounts if mount.kind == "bind")
    assert (spec.network, spec.read_only_root, spec.pid_namespace) == ("none", True, "host")
    assert dict(spec.labels) == {"io.airflow.purpose": "zygote"}
    assert spec.resources == Resources(memory=512 * 1024 * 1024, pids=1024)
    assert made.launch.environment == {"AIRFLOW__CORE__X": "1"}
    assert made.memory == 256 * 1024 * 1024


@pytest.mark.parametrize(
    ("cfg", "authors", "seconds"),
    [("start_timeout = 6", None, 6), ("", {"start_timeout": "1"}, 60), ("", {"start_timeout": "2m"}, 120)],
)
def test_an_author_without_patience_lets_no_zygote_of_others_fail(
    cfg: str, authors: dict[str, str] | None, seconds: float
) -> None:
    assert plan(cfg, authors=authors).launch.start_timeout == seconds
