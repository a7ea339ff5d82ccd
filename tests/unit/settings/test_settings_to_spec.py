"""EffectiveSettings into a ContainerSpec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.container_spec import ContainerSpec, Mount, Resources
from airflow_isolation.errors import SettingError
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from tests.unit.settings.conftest import Bundle


def with_volumes(bundle: Bundle, *volumes: str) -> Any:
    bundle.write("".join(f"- {volume}\n" for volume in volumes), "volumes.yaml")
    bundle.cfg += f"volume_mount_yaml = {bundle.path}/volumes.yaml\n"
    return bundle.resolve()


def test_every_field_comes_from_its_setting(bundle: Bundle) -> None:
    bundle.cfg += (
        "run_as_user = 50000\nnetwork = none\ncpus = 2\nmemory = 1Gi\npids = 100\nshm_size = 1Mi\ntmp_size = 2Mi\n"
        "read_only_root = False\ncapabilities = NET_ADMIN,KILL\nseccomp_profile = unconfined\nworking_dir = /srv\n"
        "timezone = UTC\nhostname = h\nstop_grace_period = 3\ncgroup_parent = /airflow/\n"
        "[container_runtime_policy]\nallow_root = True\n"
    )
    spec = container_spec(bundle.resolve(), argv=["python3", "agent.py"])
    assert spec == ContainerSpec(
        image="default:1",
        argv=("python3", "agent.py"),
        user="50000",
        allow_root=True,
        working_dir="/srv",
        hostname="h",
        resources=Resources(cpus=2, memory=2**30, pids=100),
        network="none",
        read_only_root=False,
        capabilities=frozenset({"NET_ADMIN", "KILL"}),
        seccomp="unconfined",
        tmp_size=2 * 2**20,
        shm_size=2**20,
        stop_grace_period=3,
        timezone="UTC",
        cgroup_parent="airflow",
    )


def test_defaults_are_those_of_the_spec_but_for_pids(bundle: Bundle) -> None:
    spec = container_spec(bundle.resolve(), argv=["x"])
    assert spec == ContainerSpec(image="default:1", argv=("x",), resources=Resources(pids=4096))


def test_what_the_bridge_adds_wins(bundle: Bundle) -> None:
    bundle.write("container: {environment: {A: theirs, B: theirs}, labels: {team: theirs}}")
    spec = container_spec(bundle.resolve(), argv=["x"], env={"A": "ours"}, labels={"team": "ours", "io.airflow.a": "b"})
    assert spec.env == {"A": "ours", "B": "theirs"}
    assert spec.labels == {"team": "ours", "io.airflow.a": "b"}


def test_mounts_come_outermost_first(bundle: Bundle) -> None:
    for name in ("a", "b"):
        (bundle.path / name).mkdir()
    settings = with_volumes(bundle, f"{bundle.path}/a:/opt/airflow:rw", f"{bundle.path}/b:/opt/airflow/x/y")
    spec = container_spec(settings, argv=["x"], mounts=[Mount(source="/srv/dags", target="/opt/airflow/dags")])
    assert [mount.target for mount in spec.mounts] == ["/opt/airflow", "/opt/airflow/dags", "/opt/airflow/x/y"]
    assert [mount.read_only for mount in spec.mounts] == [False, True, True]


@pytest.mark.parametrize("target", ["/opt/airflow/dags", "/opt/airflow/dags/sub"])
def test_a_volume_over_what_airflow_needs_is_refused(bundle: Bundle, target: str) -> None:
    settings = with_volumes(bundle, f"{bundle.path}:{target}")
    with pytest.raises(SettingError, match=r"volumes\.yaml, line 1, .*would cover") as caught:
        container_spec(settings, argv=["x"], mounts=[Mount(source="/srv/dags", target="/opt/airflow/dags")])
    assert target in str(caught.value)


def test_a_source_that_is_not_there_is_named_with_its_line(bundle: Bundle) -> None:
    settings = with_volumes(bundle, f"{bundle.path}:/a", f"{bundle.path}/nothing:/b")
    with pytest.raises(SettingError) as caught:
        container_spec(settings, argv=["x"])
    assert str(caught.value) == (
        f"{bundle.path}/volumes.yaml, line 2, [1]: the mount source {bundle.path}/nothing does not exist on this host"
    )


@pytest.mark.parametrize("source", ["link", "link/inner", "dangling"])
def test_a_source_that_is_or_passes_through_a_link_is_refused(bundle: Bundle, source: str) -> None:
    (bundle.path / "real" / "inner").mkdir(parents=True)
    (bundle.path / "link").symlink_to("real")
    (bundle.path / "dangling").symlink_to("gone")
    settings = with_volumes(bundle, f"{bundle.path}/{source}:/a")
    with pytest.raises(SettingError, match="is, or passes through, a symbolic link") as caught:
        container_spec(settings, argv=["x"])
    assert f"Write {Path(bundle.path, source).resolve()}" in str(caught.value)
