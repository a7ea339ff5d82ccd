"""The YAML beside a DAG file, read from disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.errors import PolicyRefused, SettingError
from airflow_isolation.settings.dag_metadata import executor_config_metadata, read_dag_metadata

if TYPE_CHECKING:
    from tests.unit.settings.conftest import Bundle


def values(bundle: Bundle, task_id: str | None = "load", **more: Any) -> dict[str, Any]:
    metadata = read_dag_metadata(Path("sales.py"), bundle.path)
    assert metadata is not None
    found: dict[str, Any] = {}
    for layer in metadata.for_backend(more.get("backend", "containerd"), task_id):
        found.update({name: assignment.value for name, assignment in layer.items()})
    return found


def mistake(bundle: Bundle, text: str) -> SettingError:
    path = bundle.write(text)
    with pytest.raises(SettingError) as caught:
        read_dag_metadata(Path("sales.py"), bundle.path)
    assert caught.value.source == str(path)
    return caught.value


def test_without_a_file_there_is_no_metadata(bundle: Bundle) -> None:
    assert read_dag_metadata(Path("sales.py"), bundle.path) is None


@pytest.mark.parametrize("name", ["sales.yaml", "sales.yml"])
def test_the_file_has_the_name_of_the_dag_file(bundle: Bundle, name: str) -> None:
    bundle.write("container: {image: a}", name)
    assert values(bundle) == {"image": "a"}


def test_a_dotted_name_loses_its_last_part_alone(bundle: Bundle) -> None:
    bundle.write("container: {image: a}", "sales.v2.yaml")
    assert read_dag_metadata(Path("sales.v2.py"), bundle.path) is not None
    assert read_dag_metadata(Path("sales.py"), bundle.path) is None


def test_two_files_for_one_dag_file_are_refused(bundle: Bundle) -> None:
    bundle.write("container: {image: a}", "sales.yaml")
    bundle.write("container: {image: b}", "sales.yml")
    with pytest.raises(SettingError, match=r"sales\.yml stands beside it"):
        read_dag_metadata(Path("sales.py"), bundle.path)


def test_the_dags_of_a_zip_share_the_file_beside_the_zip(bundle: Bundle) -> None:
    (bundle.path / "foo.zip").write_bytes(b"PK")
    bundle.write("container: {image: a}", "foo.zip.yaml")
    bundle.write("container: {image: b}", "foo.yaml")
    for dag_file in ("foo.zip", "foo.zip/inner.py", "foo.zip/deep/inner.py"):
        metadata = read_dag_metadata(Path(dag_file), bundle.path)
        assert metadata is not None
        assert metadata.layers["container"]["image"].value == "a"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "columns: [a, b]\n",
        "containers: {image: a}\n",
        "x:\n  container: {image: a}\n",
        "{{ template }}\n  container: [\n",
        "{% set container = 1 %}: [",
        "a: *nowhere\n",
        "a: 1\n---\nb: 2\n",
        "- container\n",
        "Resources: !Sub {a: 1}\n",
        "\0\0\0",
        "[" * 100_000,
        "x: " + "y" * 3_000_000,
    ],
)
def test_a_file_without_our_keys_is_left_alone(bundle: Bundle, text: str) -> None:
    bundle.write(text)
    assert read_dag_metadata(Path("sales.py"), bundle.path) is None


@pytest.mark.parametrize(
    "text",
    [
        "container:\n  image: a\n",
        '"container":\n  image: a\n',
        "container : {image: a}\n",
        "{container: {image: a}}",
        '{"x": 1,\n "container": {"image": "a"}}',
        "---\n{container: {image: a}}",
        "\ufeffcontainer: {image: a}",
        "x: !Sub {a: 1, a: 2}\ncontainer: {image: a}\n",
        "base: &base {image: a}\ncontainer: *base\n",
    ],
)
def test_a_file_with_our_key_is_ours_in_every_way_to_write_it(bundle: Bundle, text: str) -> None:
    bundle.write(text)
    assert values(bundle) == {"image": "a"}


def test_every_key_of_an_author(bundle: Bundle) -> None:
    bundle.write("""
container:
  image: team/sales:1.4
  image_pull_policy: always
  image_pull_timeout: 5m
  volumes: ["/data/sales:/data", "/scratch:/scratch:rw"]
  environment: {region: eu, EMPTY: ""}
  labels: {team: sales}
  run_as_user: 50000:0
  resources: {cpus: 500m, memory: 2Gi, pids: 256}
  network: none
  shm_size: 1Gi
  tmp_size: 2g
  capabilities: [NET_BIND_SERVICE]
  working_dir: /srv
  timezone: UTC
  hostname: sales
  stop_grace_period: 0
  start_timeout: 90
  python: /opt/venv/bin/python
""")
    found = values(bundle)
    assert found.pop("image_pull_policy").value == "always"
    assert [str(found.pop(f"volumes.{target}")) for target in ("/data", "/scratch")] == [
        "/data/sales:/data:ro",
        "/scratch:/scratch:rw",
    ]
    assert found == {
        "image": "team/sales:1.4",
        "image_pull_timeout": 300.0,
        "environment.region": "eu",
        "environment.EMPTY": "",
        "labels.team": "sales",
        "run_as_user": "50000:0",
        "cpus": 0.5,
        "memory": 2 * 2**30,
        "pids": 256,
        "network": "none",
        "shm_size": 2**30,
        "tmp_size": 2 * 2**30,
        "capabilities": ("NET_BIND_SERVICE",),
        "working_dir": "/srv",
        "timezone": "UTC",
        "hostname": "sales",
        "stop_grace_period": 0.0,
        "start_timeout": 90.0,
        "python": "/opt/venv/bin/python",
    }


LAYERED = """
container:
  network: none
  image: common:1
  tasks:
    "train_*": {image: train:1}
    train_big: {image: big:1, resources: {memory: 8Gi}}
docker:
  image: docker:1
  tasks:
    train_big: {image: docker-big:1}
containerd:
  network: host
"""


@pytest.mark.parametrize(
    ("backend", "task_id", "image"),
    [
        ("containerd", "load", "common:1"),
        ("containerd", "train_a", "train:1"),
        ("containerd", "train_big", "big:1"),
        ("containerd", "group.train_a", "common:1"),
        ("containerd", None, "common:1"),
        ("docker", "load", "docker:1"),
        ("docker", "train_a", "train:1"),
        ("docker", "train_big", "docker-big:1"),
        ("docker", None, "docker:1"),
    ],
)
def test_backend_over_common_and_tasks_in_order_over_both(
    bundle: Bundle, backend: str, task_id: str | None, image: str
) -> None:
    bundle.write(LAYERED)
    assert values(bundle, task_id, backend=backend)["image"] == image


def test_the_other_backends_key_does_not_hold(bundle: Bundle) -> None:
    bundle.write(LAYERED)
    assert values(bundle, backend="docker")["network"] == "none"
    assert values(bundle, backend="containerd")["network"] == "host"


@pytest.mark.parametrize(
    ("text", "line", "key", "reason"),
    [
        ("container:\n  imgae: a\n", 2, "container.imgae", "unknown key 'imgae'. Did you mean image?"),
        ("container:\n  zzz: a\n", 2, "container.zzz", "Known are:"),
        ("container: [a]\n", 1, "container", "a map belongs here, and this is a list"),
        ("container:\n", 1, "container", "a map belongs here, and this is nothing"),
        ("container:\n  image: [a]\n", 2, "container.image", "a single value belongs here"),
        ("container:\n  image:\n", 2, "container.image", "there is no value"),
        ("container:\n  image: A B\n", 2, "container.image", "not an image reference"),
        ("container:\n  volumes: /a:/b\n", 2, "container.volumes", "a list belongs here"),
        ("container:\n  volumes:\n  - /a:/b\n  - b\n", 4, "container.volumes[1]", "'b' is not a volume"),
        ("container:\n  environment: [A=b]\n", 2, "container.environment", "a map belongs here, and this is a list"),
        ("container:\n  environment:\n    A:\n", 3, "container.environment.A", 'For empty text write ""'),
        ("container:\n  environment:\n    A: [b]\n", 3, "container.environment.A", "text belongs here"),
        (
            "container:\n  labels: {io.airflow.owner: me}\n",
            2,
            "container.labels.io.airflow.owner",
            "begin with io.airflow.",
        ),
        ("container:\n  resources: 2\n", 2, "container.resources", "a map belongs here"),
        ("container:\n  resources:\n    memory: 2XB\n", 3, "container.resources.memory", "unknown unit 'XB'"),
        ("container:\n  resources: {memory: 4}\n", 2, "container.resources.memory", "Did you mean 4Gi?"),
        ("container:\n  resources: {cpus: true}\n", 2, "container.resources.cpus", "not a number of cores"),
        ("container:\n  resources: {memroy: 4Gi}\n", 2, "container.resources.memroy", "Did you mean memory?"),
        ("container:\n  memory: 4Gi\n", 2, "container.memory", "Write it as resources: {memory: …}"),
        ("container:\n  tasks: [a]\n", 2, "container.tasks", "a map belongs here"),
        ("container:\n  tasks:\n    a: b\n", 3, "container.tasks.a", "a map belongs here"),
        ("container:\n  tasks:\n    a:\n      imge: b\n", 4, "container.tasks.a.imge", "Did you mean image?"),
        ("container:\n  tasks: {a: {tasks: {b: {}}}}\n", 2, "container.tasks.a.tasks", "unknown key 'tasks'"),
        ("container:\n  image: a\n  image: b\n", 3, "container.image", "a second time"),
        ("container: {}\nx: 1\ncontainer: {}\n", 3, "container", "a second time"),
        ("docker:\n  network: a b\n", 2, "docker.network", "not a network"),
        ("container:\n  image: !env IMAGE\n", 2, "container.image", "the tag !env has no meaning here"),
        ("container:\n  <<: {image: a}\n", 2, "container.<<", "unknown key '<<'"),
        ("container:\n  image: 'a\n", 3, "", "not YAML"),
        ("container: {}\n---\na: 1\n", 2, "", "second document"),
        ("container:\n  x: " + "[" * 1_000_000, 2, "", "nested deeper than 32 levels"),
    ],
)
def test_a_mistake_names_file_line_and_key(bundle: Bundle, text: str, line: int, key: str, reason: str) -> None:
    error = mistake(bundle, text)
    assert reason in str(error)
    assert error.key == key
    assert error.line == line


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("seccomp_profile", "[container_runtime]"),
        ("read_only_root", "[container_runtime]"),
        ("cgroup_parent", "[container_runtime]"),
        ("volume_mount_yaml", "[container_runtime]"),
        ("state_dir", "[container_runtime]"),
        ("socket_path", "[containerd_runtime] or [docker_runtime]"),
        ("hosts_dir", "[containerd_runtime]"),
        ("allow_root", "[container_runtime_policy]"),
        ("allowed_images", "[container_runtime_policy]"),
    ],
)
def test_a_key_of_the_administrator_is_refused_by_name(bundle: Bundle, name: str, section: str) -> None:
    error = mistake(bundle, f"container:\n  {name}: x\n")
    assert isinstance(error, PolicyRefused)
    assert f"only the administrator can set {name}, in airflow.cfg, {section}" in str(error)
    assert error.line == 2


def test_a_file_of_ours_is_at_most_a_mebibyte(bundle: Bundle) -> None:
    bundle.write("container: {image: a}\n#".ljust(2**20, "x"))
    assert values(bundle) == {"image": "a"}
    assert "larger than 1024 KiB" in str(mistake(bundle, "container: {image: a}\n#".ljust(2**20 + 1, "x")))


def test_text_that_is_not_utf8_is_refused(bundle: Bundle) -> None:
    (bundle.path / "sales.yaml").write_bytes(b"container: {hostname: \xff}")
    with pytest.raises(SettingError, match="not UTF-8"):
        read_dag_metadata(Path("sales.py"), bundle.path)


def test_a_changed_file_is_read_again(bundle: Bundle) -> None:
    path = bundle.write("container: {image: a}")
    times = path.stat()
    assert values(bundle) == {"image": "a"}
    bundle.write("container: {image: b}")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert values(bundle) == {"image": "b"}


def test_a_link_within_the_bundle_is_followed(bundle: Bundle) -> None:
    bundle.write("container: {image: a}", "common.yaml")
    (bundle.path / "sales.yaml").symlink_to("common.yaml")
    assert values(bundle) == {"image": "a"}


def test_a_bundle_behind_a_link_is_as_good(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle.write("container: {image: a}")
    link = tmp_path_factory.mktemp("links") / "current"
    link.symlink_to(bundle.path)
    assert read_dag_metadata(Path("sales.py"), link) is not None


def test_a_link_out_of_the_bundle_is_refused(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.yaml"
    outside.write_text("container: {image: a}")
    (bundle.path / "sales.yaml").symlink_to(outside)
    with pytest.raises(SettingError, match="leads out of the bundle"):
        read_dag_metadata(Path("sales.py"), bundle.path)


def test_a_dag_file_outside_of_its_bundle_gives_nothing_away(bundle: Bundle) -> None:
    inner = bundle.path / "inner"
    inner.mkdir()
    bundle.write("container: {image: a}")
    with pytest.raises(SettingError, match="leads out of the bundle"):
        read_dag_metadata(Path("../sales.py"), inner)


@pytest.mark.parametrize("kind", ["loop", "dangling", "fifo", "directory"])
def test_what_is_no_file_is_refused_and_blocks_nobody(bundle: Bundle, kind: str) -> None:
    path = bundle.path / "sales.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("sales.yaml" if kind == "loop" else "nothing.yaml")
    with pytest.raises(SettingError, match=r"can't be read|not a regular file"):
        read_dag_metadata(Path("sales.py"), bundle.path)


def test_executor_config_has_the_same_grammar() -> None:
    metadata = executor_config_metadata(
        {"container": {"environment": {"A": 1, "B": True}, "resources": {"cpus": 0.5}}, "pod_override": object()}
    )
    assert metadata is not None
    assert {name: found.value for name, found in metadata.layers["container"].items()} == {
        "environment.A": "1", "environment.B": "true", "cpus": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("config", [None, {}, {"KubernetesExecutor": {"image": "a"}}])
def test_an_executor_config_of_others_is_left_alone(config: dict[str, object] | None) -> None:
    assert executor_config_metadata(config) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"container": "sales:1"}, "executor_config, container: a map belongs here"),
        (7, "executor_config: a map belongs here, and this is int"),
        (0, "executor_config: a map belongs here, and this is int"),
        ("container", "executor_config: a map belongs here, and this is str"),
        (["container"], "executor_config: a map belongs here, and this is list"),
        ({"container": None}, "executor_config, container: a map belongs here, and this is nothing"),
        ({"container": {"tasks": {}}}, "executor_config, container.tasks: unknown key 'tasks'"),
        ({"docker": {"imag": "a"}}, "executor_config, docker.imag: unknown key 'imag'. Did you mean image?"),
        ({"container": {"resources": {"cpus": float("nan")}}}, "'nan' is not a number of cores"),
        ({"container": {"image": object()}}, "executor_config, container.image: the type object can't be a setting"),
        ({"container": {"socket_path": "/x"}}, "only the administrator can set socket_path"),
    ],
)
def test_a_mistake_in_executor_config_names_the_key(config: object, reason: str) -> None:
    with pytest.raises(SettingError) as caught:
        executor_config_metadata(config)
    assert reason in str(caught.value)
