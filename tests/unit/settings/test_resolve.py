"""The order of the layers, policy, hook and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.container_spec import Resources
from airflow_isolation.errors import PolicyRefused, SettingError
from airflow_isolation.runtime.interface import PullPolicy
from airflow_isolation.settings.effective import Origin, Volume
from airflow_isolation.settings.resolve import (
    dag_parsing_backend,
    default_state_dir,
    resolve,
    resolve_connection,
    task_execution_backend,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.settings.conftest import Bundle, FromCfg, Ini

    from airflow_isolation.settings.effective import Backend, Purpose

IMAGE = "[container_runtime]\nimage = default:1\n"


def test_without_an_image_the_error_says_what_to_write_where(from_cfg: FromCfg) -> None:
    with pytest.raises(SettingError) as caught:
        from_cfg("", dag_id="sales", task_id="load")
    assert str(caught.value) == (
        "[container_runtime] in airflow.cfg, image: no image is configured for the task load of the DAG sales. Write "
        "image = … into [container_runtime] (or [task_execution_containerd_runtime]) of airflow.cfg, for all DAGs, or "
        '"container: {image: …}" into a YAML file beside the DAG file, for that file'
    )


def test_the_hook_is_not_asked_for_an_image_that_is_not_there(from_cfg: FromCfg) -> None:
    with pytest.raises(SettingError, match="no image is configured for this DAG file"):
        from_cfg("", purpose="parse", hook=lambda image: "hook:1")


def test_with_nothing_but_an_image_the_defaults_are_safe(from_cfg: FromCfg) -> None:
    settings = from_cfg(IMAGE)
    assert settings.image == "default:1"
    assert settings.image_pull_policy is PullPolicy.IF_NOT_PRESENT
    assert settings.volumes == ()
    assert settings.environment == settings.labels == {}
    assert settings.run_as_user == ""
    assert not settings.allow_root
    assert settings.network == "host"
    assert settings.resources == Resources(pids=4096)
    assert settings.read_only_root
    assert settings.capabilities == frozenset()
    assert settings.seccomp_profile == "default"
    assert settings.start_timeout == 60
    assert settings.python == "python3"


SECTIONS = (
    "container_runtime",
    "{backend}_runtime",
    "{purpose}_container_runtime",
    "{purpose}_{backend}_runtime",
)


@pytest.mark.parametrize("backend", ["containerd", "docker"])
@pytest.mark.parametrize(("purpose", "prefix"), [("task", "task_execution"), ("parse", "scheduler_dag_parsing")])
@pytest.mark.parametrize("highest", range(4))
def test_each_section_holds_over_those_before_it(
    from_cfg: FromCfg, backend: Backend, purpose: Purpose, prefix: str, highest: int
) -> None:
    names = [name.format(backend=backend, purpose=prefix) for name in SECTIONS[: highest + 1]]
    cfg = "".join(f"[{name}]\nimage = image:{name}\n" for name in reversed(names))
    settings = from_cfg(cfg, backend=backend, purpose=purpose)
    assert settings.image == f"image:{names[-1]}"
    assert settings.origins["image"] == Origin(f"[{names[-1]}] in airflow.cfg", "image")


def test_sections_of_the_other_backend_and_purpose_do_not_hold(from_cfg: FromCfg) -> None:
    others = ("docker_runtime", "scheduler_dag_parsing_container_runtime", "task_execution_docker_runtime")
    cfg = IMAGE + "".join(f"[{name}]\nimage = other:1\n" for name in others)
    assert from_cfg(cfg).image == "default:1"


def test_authors_hold_over_airflow_cfg_and_the_task_over_its_file(bundle: Bundle) -> None:
    bundle.cfg += "cpus = 1\nhostname = a\ntimezone = UTC\n[task_execution_containerd_runtime]\nhostname = b\n"
    bundle.write("container:\n  hostname: c\n  resources: {cpus: 2}\n  tasks: {load: {resources: {cpus: 3}}}\n")
    settings = bundle.resolve(executor_config={"container": {"resources": {"cpus": 4}}, "docker": {"hostname": "d"}})
    assert (settings.timezone, settings.hostname, settings.resources.cpus) == ("UTC", "c", 4)
    assert str(settings.origins["hostname"]) == f"{bundle.path}/sales.yaml:2"
    assert str(settings.origins["cpus"]) == "executor_config"


def test_in_executor_config_the_backend_holds_over_the_common_key(bundle: Bundle) -> None:
    config = {"docker": {"hostname": "d"}, "container": {"hostname": "c"}}
    assert bundle.resolve(executor_config=config, backend="docker").hostname == "d"


def test_environment_and_labels_merge_by_name(bundle: Bundle) -> None:
    bundle.cfg += (
        "[container_runtime_environment]\nregion = eu\nlevel = 1\n[task_execution_container_runtime_environment]\n"
        "Level = 2\n[container_runtime_labels]\napp = airflow\nteam = all\n"
    )
    bundle.write("container: {environment: {LEVEL: 3, http_proxy: p}, labels: {team: sales}}")
    settings = bundle.resolve()
    assert settings.environment == {"REGION": "eu", "LEVEL": "3", "http_proxy": "p"}
    assert settings.labels == {"app": "airflow", "team": "sales"}
    assert settings.origins["environment.REGION"].source == "[container_runtime_environment] in airflow.cfg"


def test_volumes_are_added_and_one_with_the_same_target_is_replaced(bundle: Bundle) -> None:
    volumes = bundle.write("- /srv/a:/a\n- /srv/b:/b:rw\n", "volumes.yaml")
    bundle.cfg += f"volume_mount_yaml = {volumes}\n[container_runtime_policy]\nallowed_mount_sources = /data\n"
    bundle.write("container: {volumes: ['/data/b:/b', '/data/c:/c']}")
    settings = bundle.resolve()
    assert set(settings.volumes) == {
        Volume("/srv/a", "/a"), Volume("/data/b", "/b"), Volume("/data/c", "/c"),
    }  # fmt: skip
    assert str(settings.origins["volumes./a"]) == f"{volumes}:1"


def test_a_later_section_replaces_the_file_of_volumes(bundle: Bundle) -> None:
    first = bundle.write("- /srv/a:/a\n", "first.yaml")
    second = bundle.write("- /srv/b:/b\n", "second.yaml")
    bundle.cfg += f"volume_mount_yaml = {first}\n[containerd_runtime]\nvolume_mount_yaml = {second}\n"
    assert [volume.target for volume in bundle.resolve().volumes] == ["/b"]


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        (None, "[container_runtime] in airflow.cfg, volume_mount_yaml", "No such file"),
        ("a: b\n", "line 1", "a list belongs here, and this is a map"),
        ("- /a:/b\n- [x]\n", "line 2, [1]", "a volume such as"),
        ("- /a:/b:x\n", "line 1, [0]", "neither ro nor rw"),
        ("- [\n", "line 2", "not YAML"),
    ],
)
def test_a_mistake_in_the_file_of_volumes(bundle: Bundle, text: str | None, where: str, reason: str) -> None:
    path = bundle.path / "volumes.yaml"
    if text is not None:
        path.write_text(text)
    bundle.cfg += f"volume_mount_yaml = {path}\n"
    with pytest.raises(SettingError) as caught:
        bundle.resolve()
    assert where in str(caught.value)
    assert reason in str(caught.value)


def test_an_empty_value_is_not_set(from_cfg: FromCfg) -> None:
    settings = from_cfg(IMAGE + "memory = 2Gi\n[containerd_runtime]\nmemory =\nimage =\n")
    assert settings.resources.memory == 2 * 2**30
    assert settings.image == "default:1"


def test_tasks_do_not_hold_for_a_parse_but_their_mistakes_are_told(bundle: Bundle) -> None:
    bundle.write("container: {image: a, tasks: {load: {image: b}}}")
    assert bundle.resolve(purpose="parse", task_id="").image == "a"
    bundle.write("container: {image: a, tasks: {other: {network: secret}}}")
    with pytest.raises(PolicyRefused, match=r"container\.tasks\.other\.network: the network secret is not allowed"):
        bundle.resolve(purpose="parse", task_id="")


def test_the_other_backends_policy_matters_are_not_told(bundle: Bundle) -> None:
    bundle.write("container: {image: a}\ndocker: {network: secret}")
    assert bundle.resolve().image == "a"


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        ("imgae = a", "[container_runtime] in airflow.cfg, imgae: unknown key 'imgae' in [container_runtime]. Did you mean image?"),
        ("IMAGE = a", "Keys are written in small letters: image"),
        ("allow_root = True", "It belongs in [container_runtime_policy]"),
        ("socket_path = /x", "It belongs in [containerd_runtime] or [docker_runtime]"),
        ("environment = A=b", "Write them into the section [container_runtime_environment]"),
        ("labels = a", "Write them into the section [container_runtime_labels]"),
        ("volumes = /a:/b", "its path as volume_mount_yaml"),
        ("memory = 4", "[container_runtime] in airflow.cfg, memory: '4' is below the smallest usable limit"),
        ("cpus = lots", "cpus: 'lots' is not a number of cores"),
        ("read_only_root = maybe", "neither true nor false"),
        ("capabilities = NET_ADMIN, ALL", "'ALL' is not one Linux capability"),
        ("[containerd_runtime]\nstate_dir = /x", "It belongs in [container_runtime]"),
        ("[task_execution_container_runtime]\nsocket_path = /x", "unknown key 'socket_path'"),
        ("[container_runtime_policy]\nmax_memroy = 1Gi", "Did you mean max_memory?"),
        ("[container_runtime_policies]\nmax_memory = 1Gi", "[container_runtime_policies]: this section is not read by anything. Did you mean container_runtime_policy?"),
        ("[Container_Runtime]\nimage = a", "[Container_Runtime]: this section is not read"),
        ("[container_runtime_labels]\nio.airflow.owner = me", "labels that begin with io.airflow."),
        ("[container_runtime_environment]\na b = c", "'A B' is not a name for an environment variable"),
    ],
)  # fmt: skip
def test_a_mistake_in_airflow_cfg_names_section_and_key(from_cfg: FromCfg, cfg: str, reason: str) -> None:
    with pytest.raises(SettingError) as caught:
        from_cfg(IMAGE + cfg + "\n")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("cfg", "container", "reason"),
    [
        ("", {"volumes": ["/data:/data"]}, "mounting /data is not allowed. [container_runtime_policy] allowed_mount_sources is empty"),
        ("allowed_mount_sources = /data", {"volumes": ["/database:/data"]}, "mounting /database is not allowed"),
        ("allowed_mount_sources = /data/a", {"volumes": ["/data:/data"]}, "mounting /data is not allowed"),
        ("", {"network": "sales"}, "the network sales is not allowed. [container_runtime_policy] allowed_networks is host, none"),
        ("allowed_networks = none", {"network": "host"}, "the network host is not allowed"),
        ("", {"capabilities": ["NET_ADMIN"]}, "the capability NET_ADMIN is not allowed"),
        ("max_cpus = 2", {"resources": {"cpus": 2.5}}, "2.5 is more than [container_runtime_policy] max_cpus allows, 2.0"),
        ("max_memory = 1Gi", {"resources": {"memory": "2Gi"}}, "2 GiB is more than [container_runtime_policy] max_memory allows, 1 GiB"),
        ("max_pids = 100", {"resources": {"pids": 101}}, "101 is more than"),
        ("max_cpu_weight = 100", {"resources": {"cpu_weight": 101}}, "101 is more than [container_runtime_policy] max_cpu_weight allows, 100"),
        ("max_memory_request = 1Gi", {"resources": {"memory_request": "2Gi"}}, "2 GiB is more than [container_runtime_policy] max_memory_request"),
        ("max_memory_swap = 0", {"resources": {"memory_swap": "1Gi"}}, "1 GiB is more than [container_runtime_policy] max_memory_swap"),
        ("max_io_weight = 100", {"resources": {"io_weight": 200}}, "200 is more than [container_runtime_policy] max_io_weight"),
        ("max_tmp_size = 1Gi", {"tmp_size": "2Gi"}, "2 GiB is more than [container_runtime_policy] max_tmp_size allows, 1 GiB"),
        ("max_shm_size = 1Gi", {"shm_size": "2Gi"}, "2 GiB is more than [container_runtime_policy] max_shm_size allows, 1 GiB"),
        ("max_stop_grace_period = 1m", {"stop_grace_period": "2m"}, "120 seconds is more than [container_runtime_policy] max_stop_grace_period allows, 60 seconds"),
        ("max_start_timeout = 1m", {"start_timeout": "2m"}, "120 seconds is more than [container_runtime_policy] max_start_timeout"),
        ("max_image_pull_timeout = 1m", {"image_pull_timeout": "2m"}, "120 seconds is more than [container_runtime_policy] max_image_pull_timeout"),
        ("allowed_users = 50000:0", {"run_as_user": "50000"}, "the user 50000 is not allowed. [container_runtime_policy] allowed_users is 50000:0"),
        ("allowed_users = 5000?:*, airflow", {"run_as_user": "60000:0"}, "the user 60000:0 is not allowed"),
        ("max_io = 8:0 rbps=1Mi", {"resources": {"io_max": ["8:0 rbps=2Mi"]}}, "rbps of 8:0 is 2097152, and [container_runtime_policy] max_io allows 1048576"),
        ("max_io = 8:0 rbps=1Mi", {"resources": {"io_max": ["8:0 wbps=1Mi"]}}, "rbps of 8:0 is no limit, and"),
        ("max_io = 8:0 rbps=1Mi, 8:16 wiops=5", {"resources": {"io_max": ["8:0 rbps=1Mi"]}}, "wiops of 8:16 is no limit, and"),
        ("", {"run_as_user": "root"}, "the user root is root, and root is not allowed"),
        ("", {"run_as_user": "0:5"}, "the user 0:5 is root"),
        ("allowed_images = team/*, other/*", {"image": "sales:1"}, "the image sales:1 is not allowed. [container_runtime_policy] allowed_images is team/*, other/*"),
    ],
)  # fmt: skip
def test_what_the_policy_refuses(from_cfg: FromCfg, cfg: str, container: dict[str, Any], reason: str) -> None:
    with pytest.raises(PolicyRefused) as caught:
        from_cfg(f"{IMAGE}[container_runtime_policy]\n{cfg}\n", executor_config={"container": container})
    assert str(caught.value).startswith("executor_config, container.")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("cfg", "container"),
    [
        ("allowed_mount_sources = /data\n  /scratch", {"volumes": ["/data:/data", "/scratch/a:/b"]}),
        ("allowed_mount_sources = /", {"volumes": ["/anything:/b"]}),
        ("", {"network": "none"}),
        ("allowed_networks = sales", {"network": "sales"}),
        ("allowed_capabilities = CAP_NET_ADMIN", {"capabilities": ["NET_ADMIN"]}),
        ("max_memory = 2Gi", {"resources": {"memory": "2g"}}),
        ("max_cpu_weight = 100\nmax_io_weight = 100", {"resources": {"cpu_weight": 100, "io_weight": 1}}),
        ("max_memory_swap = 0", {"resources": {"memory_swap": 0}}),
        ("max_tmp_size = 1Gi\nmax_stop_grace_period = 1m", {"tmp_size": "1Gi", "stop_grace_period": 60}),
        ("allowed_users = 5000?:*, airflow", {"run_as_user": "50000:0"}),
        ("allowed_users = 5000?:*, airflow", {"run_as_user": "airflow"}),
        ("max_io = 8:0 rbps=1Mi", {"resources": {"io_max": ["8:0 rbps=1Mi", "8:16 wbps=9Mi"]}}),
        ("max_io = 8:0 rbps=1Mi", {"resources": {"memory": "1Gi"}}),
        ("allow_root = True", {"run_as_user": "root"}),
        ("allowed_images = registry.example/team/*", {"image": "registry.example/team/deep/sales:1"}),
        ("allowed_images = docker.io/library/*", {"image": "python:3.12"}),
        ("allowed_images = python:*", {"image": "python:3.12"}),
    ],
)
def test_what_the_policy_allows(from_cfg: FromCfg, cfg: str, container: dict[str, Any]) -> None:
    settings = from_cfg(f"{IMAGE}[container_runtime_policy]\n{cfg}\n", executor_config={"container": container})
    assert settings.image


def test_the_administrators_own_word_is_not_held_against_the_policy(bundle: Bundle) -> None:
    volumes = bundle.write("- /etc/ssl:/etc/ssl\n", "volumes.yaml")
    bundle.cfg += (
        f"memory = 8Gi\nnetwork = sales\ncapabilities = NET_ADMIN\nvolume_mount_yaml = {volumes}\n"
        "[container_runtime_policy]\nmax_memory = 1Gi\n"
    )
    settings = bundle.resolve()
    assert (settings.resources.memory, settings.network, len(settings.volumes)) == (8 * 2**30, "sales", 1)


def test_root_needs_allow_root_whoever_asks(from_cfg: FromCfg) -> None:
    with pytest.raises(
        PolicyRefused, match=r"\[container_runtime\] in airflow.cfg, run_as_user: the user root is root"
    ):
        from_cfg(IMAGE + "run_as_user = root\n")
    assert from_cfg(IMAGE + "run_as_user = root\n[container_runtime_policy]\nallow_root = True\n").allow_root


def test_the_administrators_image_must_be_allowed_too(from_cfg: FromCfg) -> None:
    with pytest.raises(PolicyRefused, match="the image default:1 is not allowed"):
        from_cfg(IMAGE + "[container_runtime_policy]\nallowed_images = team/*\n")


def test_the_hook_has_the_last_word(bundle: Bundle) -> None:
    bundle.write("container: {image: 'sales:1'}")
    settings = bundle.resolve(hook=lambda image: f"mirror.example/{image}")
    assert settings.image == "mirror.example/sales:1"
    assert str(settings.origins["image"]) == "get_docker_runtime_image in airflow_local_settings"


def test_an_image_that_the_hook_leaves_as_it_is_keeps_its_origin(bundle: Bundle) -> None:
    bundle.write("container: {image: 'sales:1'}")
    assert str(bundle.resolve(hook=lambda image: image).origins["image"]) == f"{bundle.path}/sales.yaml:1"


def test_the_policy_sees_what_the_hook_returns_and_not_what_it_gets(from_cfg: FromCfg) -> None:
    cfg = IMAGE + "[container_runtime_policy]\nallowed_images = team/*\n"
    assert from_cfg(cfg, hook=lambda image: f"team/{image}").image == "team/default:1"
    with pytest.raises(PolicyRefused, match="get_docker_runtime_image in airflow_local_settings: the image x is not"):
        from_cfg(cfg, hook=lambda image: "x")


def test_rows_tell_every_value_and_where_it_was_written(bundle: Bundle) -> None:
    bundle.cfg += "memory = 1Gi\n[container_runtime_environment]\nA = b\n[containerd_runtime]\nnamespace = team\n"
    rows = {row.key: row for row in bundle.resolve().rows}
    assert rows["image"][1:] == ("default:1", "[container_runtime] in airflow.cfg")
    assert rows["memory"][1:] == ("1073741824", "[container_runtime] in airflow.cfg")
    assert rows["environment.A"][1:] == ("b", "[container_runtime_environment] in airflow.cfg")
    assert rows["namespace"][1:] == ("team", "[containerd_runtime] in airflow.cfg")
    assert rows["image_pull_policy"][1:] == ("if_not_present", "default")
    assert rows["allow_root"][1:] == ("False", "default")
    assert {"state_dir", "socket_path", "snapshotter", "cgroup_mount_path"} <= set(rows)


def test_settings_can_not_be_changed(from_cfg: FromCfg) -> None:
    settings: Any = from_cfg(IMAGE)
    with pytest.raises(AttributeError):
        settings.image = "x"
    with pytest.raises(TypeError):
        settings.environment["A"] = "b"


def test_the_connection_needs_no_image(ini: Callable[..., Ini]) -> None:
    settings = resolve_connection(
        "containerd",
        configuration=ini("[container_runtime]\nstate_dir = /run/a\n[containerd_runtime]\nsocket_path = /run/c.sock\n"),
    )
    assert (settings.backend, settings.socket_path, str(settings.state_dir)) == ("containerd", "/run/c.sock", "/run/a")
    assert (settings.namespace, settings.snapshotter, settings.runtime_binary) == ("airflow", "overlayfs", "")


def test_each_backend_has_its_own_socket(ini: Callable[..., Ini]) -> None:
    assert resolve_connection("docker", configuration=ini()).socket_path == "/var/run/docker.sock"
    assert resolve_connection("containerd", configuration=ini()).socket_path == "/run/containerd/containerd.sock"


def test_resolving_gives_the_same_connection(ini: Callable[..., Ini]) -> None:
    configuration = ini(IMAGE + "state_dir = /run/a\n[docker_runtime]\nnamespace = team\n")
    settings = resolve("task", "docker", configuration=configuration)
    assert settings.connection == resolve_connection("docker", configuration=configuration)


def test_the_state_directory_of_an_ordinary_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_state_dir() == Path("/run/user/1000/airflow-isolation")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert default_state_dir() == Path("/tmp/airflow-isolation-1000")


@pytest.mark.parametrize(("text", "backend"), [("", None), ("containerd", "containerd"), ("docker", "docker")])
def test_the_flags(ini: Callable[..., Ini], text: str, backend: str | None) -> None:
    assert task_execution_backend(ini(f"[core]\ntask_execution_runtime = {text}\n")) == backend
    assert dag_parsing_backend(ini(f"[core]\nscheduler_dag_parsing_runtime = {text}\n")) == backend


def test_flags_that_are_not_there_mean_stock_airflow(ini: Callable[..., Ini]) -> None:
    assert task_execution_backend(ini()) is None
    assert dag_parsing_backend(ini("[core]\ntask_execution_runtime = docker\n")) is None


@pytest.mark.parametrize("text", ["podman", "Docker", "True", "containerd docker"])
def test_any_other_flag_is_refused_with_the_accepted_ones(ini: Callable[..., Ini], text: str) -> None:
    with pytest.raises(SettingError) as caught:
        task_execution_backend(ini(f"[core]\ntask_execution_runtime = {text}\n"))
    assert str(caught.value) == (
        f"[core] in airflow.cfg, task_execution_runtime: {text!r} is not a container runtime. "
        "Write containerd or docker, or leave it empty for stock Airflow"
    )


def test_a_task_runs_as_whom_airflow_would_have_it_become(from_cfg: FromCfg) -> None:
    core = f"[core]\ndefault_impersonation = airflow\n{IMAGE}"
    settings = from_cfg(core)
    assert settings.run_as_user == "airflow"
    assert str(settings.origins["run_as_user"]) == "[core] in airflow.cfg"
    assert from_cfg(core, purpose="parse").run_as_user == ""
    assert from_cfg(f"{core}run_as_user = 50000:0\n").run_as_user == "50000:0"


@pytest.mark.parametrize(("user", "words"), [("root", "root is not allowed"), ("a b", "not a user")])
def test_whom_no_container_can_be_is_refused_by_the_name_of_the_option(
    from_cfg: FromCfg, user: str, words: str
) -> None:
    with pytest.raises(SettingError, match=f"default_impersonation: .*{words}"):
        from_cfg(f"[core]\ndefault_impersonation = {user}\n{IMAGE}")
