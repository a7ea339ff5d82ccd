"""The emitted JSON: whole, against golden files, and line by line against the checklist of a safe spec.

After a change that is meant, ``UPDATE_GOLDEN=1 pytest tests/unit/oci/test_runtime_spec.py`` writes the golden files
anew; read their diff.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.container_spec import ContainerSpec, Mount, Resources, UserNamespace
from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci import (
    Account,
    EtcFiles,
    HostFacts,
    ImageConfig,
    build_runtime_spec,
    container_hostname,
    linux_limits,
    load_profile,
    process_environment,
    working_directory,
)
from airflow_isolation.oci.confinement import CAPABILITIES

GOLDEN = Path(__file__).parent / "golden"

IMAGE = ImageConfig(
    architecture="amd64",
    env={"PATH": "/home/airflow/.local/bin:/usr/bin", "LANG": "C.UTF-8"},
    working_dir="/opt/airflow",
    user="50000",
)
ACCOUNT = Account(uid=50000, gid=0, additional_gids=(0, 70), name="airflow", home="/home/airflow")
HOST = HostFacts(kernel=(6, 1), cgroup_v2=True, recursive_read_only=True)
SPEC = ContainerSpec(image="team/image:1", argv=("python3", "-c", "pass"))
GIB = 1024**3


def build(
    spec: ContainerSpec = SPEC,
    *,
    image: ImageConfig = IMAGE,
    account: Account = ACCOUNT,
    host: HostFacts = HOST,
    **more: Any,
) -> dict[str, Any]:
    return build_runtime_spec(
        spec, id="task-1", image=image, account=account, host=host, seccomp=load_profile(spec.seccomp), **more
    )


EVERYTHING = replace(
    SPEC,
    env={"LANG": "de_DE.UTF-8", "TEAM": "sales"},
    labels={"io.airflow.dag_id": "sales"},
    mounts=(
        Mount(target="/data", source="/srv/sales"),
        Mount(target="/data/out", source="/srv/out", read_only=False),
        Mount(target="/scratch", kind="tmpfs", read_only=False, size=GIB, mode=0o700, executable=True),
        Mount(target="/run/airflow-isolation/agent.py", source="/opt/agent.py"),
    ),
    working_dir="/data/",
    hostname="sales-1",
    resources=Resources(cpus=1.5, memory=2 * GIB, pids=256),
    network="none",
    capabilities=frozenset({"NET_BIND_SERVICE", "CHOWN"}),
    tmp_size=GIB,
    shm_size=GIB // 2,
    timezone="Europe/Berlin",
    cgroup_parent="/airflow/task_execution",
)
ETC = EtcFiles(hostname="/s/1/hostname", hosts="/s/1/hosts", resolv_conf="/s/1/resolv.conf")
OLD_HOST = HostFacts(kernel=(4, 18), swap_limit=False, open_files=4096)
LSM_HOST = replace(
    HOST,
    apparmor_profile="docker-default",
    masked_paths=("/sys/devices/system/cpu/cpu0/thermal_throttle",),
    daemon_paths=("/srv/c.sock",),
)
OPEN = replace(SPEC, read_only_root=False, no_new_privileges=False, seccomp="unconfined", allow_root=True)
ROOT = Account(uid=0, gid=0, additional_gids=(0,), name="root", home="/root")

VARIATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": {"spec": EVERYTHING, "etc": ETC},
    "old_host": {"spec": EVERYTHING, "host": OLD_HOST},
    "lsm_host": {"host": LSM_HOST},
    "arm64": {"host": replace(HOST, architecture="arm64"), "image": ImageConfig(architecture="arm64")},
    "opened_by_the_administrator": {"spec": OPEN, "account": ROOT},
    "systemd_cgroup": {"cgroups_path": "airflow.slice:task:task-1"},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_golden(name: str) -> None:
    document = build(**VARIATIONS[name])
    # The filter is long and has tests of its own; it stands whole in one golden file of each architecture.
    if name not in {"default", "arm64"} and "seccomp" in document["linux"]:
        document["linux"]["seccomp"] = "as in default.json"
    emitted = json.dumps(document, indent=1) + "\n"
    path = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(emitted)
    assert emitted == path.read_text(), "if this is meant: UPDATE_GOLDEN=1"


def test_every_golden_file_has_its_variation() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(VARIATIONS)


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_same_input_gives_the_same_bytes(name: str) -> None:
    assert json.dumps(build(**VARIATIONS[name])) == json.dumps(build(**VARIATIONS[name]))


def test_the_result_shares_nothing_with_the_next() -> None:
    before = json.dumps(build())
    first = build()
    for part in (*first["process"]["capabilities"].values(), first["mounts"], first["linux"]["maskedPaths"]):
        part.clear()
    assert json.dumps(build()) == before


# The checklist of a safe spec.


def test_no_new_privileges() -> None:
    assert build()["process"]["noNewPrivileges"] is True


def test_no_capabilities() -> None:
    assert build()["process"]["capabilities"] == {
        "bounding": [],
        "effective": [],
        "permitted": [],
        "inheritable": [],
        "ambient": [],
    }


@given(st.frozensets(st.sampled_from(sorted(CAPABILITIES))))
def test_only_the_capabilities_asked_for_and_never_inheritable_or_ambient(capabilities: frozenset[str]) -> None:
    sets = build(replace(SPEC, capabilities=capabilities))["process"]["capabilities"]
    for name in ("bounding", "effective", "permitted"):
        assert sets[name] == sorted(f"CAP_{capability}" for capability in capabilities)
    assert sets["inheritable"] == sets["ambient"] == []


def test_user_groups_and_umask_are_explicit() -> None:
    assert build()["process"]["user"] == {"uid": 50000, "gid": 0, "umask": 0o022, "additionalGids": [0, 70]}


def test_the_root_is_read_only() -> None:
    assert build()["root"] == {"path": "rootfs", "readonly": True}


@pytest.mark.parametrize("target", ["/tmp", "/run", "/dev/shm"])
def test_what_must_be_writable_is_a_tmpfs_with_a_size(target: str) -> None:
    (mount,) = [mount for mount in build()["mounts"] if mount["destination"] == target]
    assert mount["type"] == "tmpfs"
    assert {"nosuid", "nodev"} < set(mount["options"])
    assert any(option.startswith("size=") for option in mount["options"])


@pytest.mark.parametrize(
    ("network", "kinds"),
    [
        ("host", {"pid", "ipc", "uts", "mount", "cgroup"}),
        ("none", {"pid", "ipc", "uts", "mount", "cgroup", "network"}),
        ("team-net", {"pid", "ipc", "uts", "mount", "cgroup", "network"}),
    ],
)
def test_namespaces_are_its_own(network: str, kinds: set[str]) -> None:
    namespaces = build(replace(SPEC, network=network))["linux"]["namespaces"]
    assert {namespace["type"] for namespace in namespaces} == kinds
    assert not any("path" in namespace for namespace in namespaces)


def test_mounts_are_private() -> None:
    document = build(EVERYTHING, etc=ETC)
    assert document["linux"]["rootfsPropagation"] == "rprivate"
    for mount in document["mounts"]:
        if mount["type"] == "bind":
            assert {"rprivate", "nosuid", "nodev"} < set(mount["options"])
        assert not {"shared", "rshared", "slave", "rslave"} & set(mount["options"])


def test_every_mount_is_without_suid() -> None:
    for mount in build(EVERYTHING, etc=ETC)["mounts"]:
        assert "nosuid" in mount["options"]


CONTAINERD_MASKS = (
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi"),
)


def test_masked_and_read_only_paths_are_at_least_those_of_containerd_and_docker() -> None:
    linux = build(host=LSM_HOST)["linux"]
    throttle = "/sys/devices/system/cpu/cpu0/thermal_throttle"
    assert {*CONTAINERD_MASKS, "/proc/interrupts", throttle} <= set(linux["maskedPaths"])
    assert {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} <= set(linux["readonlyPaths"])


def test_the_filter_is_on() -> None:
    assert build()["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"


def test_the_filter_follows_the_capabilities() -> None:
    def names(spec: ContainerSpec) -> set[str]:
        return {name for rule in build(spec)["linux"]["seccomp"]["syscalls"] for name in rule["names"]}

    assert "chroot" not in names(SPEC)
    assert "chroot" in names(replace(SPEC, capabilities=frozenset({"SYS_CHROOT"})))


def test_a_filter_can_t_be_forgotten() -> None:
    with pytest.raises(ValueError, match=r"spec\.seccomp is 'default', but the profile given is none"):
        build_runtime_spec(SPEC, id="task-1", image=IMAGE, account=ACCOUNT, host=HOST, seccomp=None)


@pytest.mark.parametrize("recursive", [False, True])
def test_with_the_host_s_network_a_user_namespace_has_the_host_s_sys_without_what_is_mounted_there(
    recursive: bool,
) -> None:
    def of(network: str) -> tuple[list[str], set[str]]:
        spec = replace(SPEC, network=network, user_namespace=UserNamespace(first=2_000_000))
        document = build(spec, host=replace(HOST, recursive_read_only=recursive))
        (mount,) = (mount for mount in document["mounts"] if mount["destination"] == "/sys")
        return [mount["type"], *mount["options"]], set(document["linux"]["maskedPaths"])

    own, masked = of("none")
    assert (own[0], "ro" in own) == ("sysfs", True)
    bound, more_masked = of("host")
    assert {"bind", "rbind", "ro", "nosuid", "noexec", "nodev"} <= set(bound)
    assert ("rro" in bound) == recursive
    assert {"/sys/kernel/debug", "/sys/fs/bpf"} <= more_masked - masked


def test_files_with_limits_lie_over_the_runtime_s() -> None:
    document = build(limit_files={"memory.max": "/sys/fs/cgroup/airflow/task_execution/task-1/memory.max"})
    targets = [mount["destination"] for mount in document["mounts"]]
    assert targets.index("/sys/fs/cgroup") < targets.index("/sys/fs/cgroup/memory.max")
    (mount,) = (mount for mount in document["mounts"] if mount["destination"] == "/sys/fs/cgroup/memory.max")
    assert mount["source"] == "/sys/fs/cgroup/airflow/task_execution/task-1/memory.max"
    assert {"bind", "ro"} <= set(mount["options"])


def test_apparmor_where_it_is_on() -> None:
    assert build(host=LSM_HOST)["process"]["apparmorProfile"] == "docker-default"
    assert "apparmorProfile" not in build()["process"]
    zygote = replace(SPEC, pid_namespace="host")
    assert "apparmorProfile" not in build(zygote, host=LSM_HOST)["process"]


def test_devices_are_denied_but_for_the_usual_ones() -> None:
    first, *others = build()["linux"]["resources"]["devices"]
    assert first == {"allow": False, "access": "rwm"}
    assert {(rule["type"], rule["major"], rule.get("minor")) for rule in others} == {
        *((("c", 1, minor)) for minor in (3, 5, 7, 8, 9)),
        *(("c", 5, 0), ("c", 5, 2), ("c", 136, None)),
    }


def test_no_device_node_is_added() -> None:
    assert "devices" not in build()["linux"]


def test_limits() -> None:
    resources = build(EVERYTHING)["linux"]["resources"]
    assert resources["memory"] == {"limit": 2 * GIB, "swap": 2 * GIB}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert resources["pids"] == {"limit": 256}


def test_without_limits_there_are_none() -> None:
    assert set(build(host=OLD_HOST)["linux"]["resources"]) == {"devices"}


def test_oom_kills_the_whole_group_where_the_kernel_can() -> None:
    assert build()["linux"]["resources"]["unified"] == {"memory.oom.group": "1"}
    assert "unified" not in build(host=replace(HOST, cgroup_v2=False))["linux"]["resources"]
    alone = replace(SPEC, resources=replace(SPEC.resources, oom_group=False))
    assert "unified" not in build(alone)["linux"]["resources"]


def test_swap_is_limited_where_the_kernel_can() -> None:
    assert build(EVERYTHING, host=OLD_HOST)["linux"]["resources"]["memory"] == {"limit": 2 * GIB}


def test_swap_comes_on_top_of_memory() -> None:
    assert linux_limits(Resources(memory=GIB, memory_swap=GIB), HostFacts())["memory"] == {
        "limit": GIB,
        "swap": 2 * GIB,
    }
    assert "memory" not in linux_limits(Resources(memory_swap=0), OLD_HOST)
    with pytest.raises(SpecRefused, match="memory_swap is set without memory"):
        linux_limits(Resources(memory_swap=GIB), HostFacts())
    with pytest.raises(SpecRefused, match="this kernel does not limit swap"):
        linux_limits(Resources(memory=GIB, memory_swap=GIB), OLD_HOST)


def test_processors_are_shared_and_chosen() -> None:
    assert linux_limits(Resources(cpu_weight=50, cpuset="0-3"), HostFacts()) == {"cpu": {"shares": 512, "cpus": "0-3"}}
    assert linux_limits(Resources(), HostFacts()) == {}


def test_a_workload_goes_before_its_worker() -> None:
    assert build()["process"]["oomScoreAdj"] > 0


def test_rlimits() -> None:
    assert build()["process"]["rlimits"] == [
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524288},
    ]


def test_rlimits_stay_within_what_the_daemon_may_give() -> None:
    (_, files) = build(host=replace(HOST, open_files=512))["process"]["rlimits"]
    assert files == {"type": "RLIMIT_NOFILE", "soft": 512, "hard": 512}


def test_no_terminal() -> None:
    assert build()["process"]["terminal"] is False


def test_labels_and_annotations_stay_out_of_the_spec() -> None:
    assert "annotations" not in build(EVERYTHING)
    assert "io.airflow.dag_id" not in json.dumps(build(EVERYTHING))


@pytest.mark.parametrize(
    "source",
    ["/proc", "/sys", "/dev", "/run", "/var/run", "/", "/run/containerd/containerd.sock", "/srv/c.sock", "/srv"],
)
def test_what_would_give_the_host_away_is_refused(source: str) -> None:
    with pytest.raises(SpecRefused, match="mount source"):
        build(replace(SPEC, mounts=(Mount(target="/x", source=source),)), host=LSM_HOST)


@pytest.mark.parametrize("target", ["/", "/proc/sys", "/dev/x", "/sys", "relative"])
def test_a_mount_s_target_is_checked(target: str) -> None:
    with pytest.raises(SpecRefused):
        build(replace(SPEC, mounts=(Mount(target=target, source="/srv"),)))


# Command, environment, directory, names.


@pytest.mark.parametrize("argv", [(), ("",), ("a\0b",)])
def test_what_is_not_a_command_is_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(SpecRefused, match="argv"):
        build(replace(SPEC, argv=argv))


def environment(
    spec: ContainerSpec = SPEC, *, image: ImageConfig = IMAGE, account: Account = ACCOUNT
) -> dict[str, str]:
    return process_environment(spec, image=image, account=account, hostname="task-1")


def test_env_has_ours_below_the_image_s_below_the_spec_s() -> None:
    image = ImageConfig(architecture="amd64", env={"PATH": "/image", "LANG": "image", "HOME": "/image/home"})
    spec = replace(SPEC, env={"LANG": "spec"})
    assert environment(spec, image=image) == {
        "PATH": "/image",
        "LANG": "spec",
        "HOME": "/image/home",
        "HOSTNAME": "task-1",
    }


def test_home_is_the_account_s() -> None:
    assert environment()["HOME"] == "/home/airflow"


def test_who_has_no_home_has_tmp() -> None:
    assert environment(account=Account(uid=4711, gid=0, additional_gids=(0,)))["HOME"] == "/tmp"


def test_timezone_is_tz_and_env_is_stronger() -> None:
    spec = replace(SPEC, timezone="America/Argentina/Buenos_Aires")
    assert environment(spec)["TZ"] == "America/Argentina/Buenos_Aires"
    assert environment(replace(spec, env={"TZ": "UTC"}))["TZ"] == "UTC"
    assert "TZ" not in environment()


@pytest.mark.parametrize("timezone", ["/etc/shadow", "../x", "Europe//Berlin", "Europe/../x", ":UTC", "a b", "UTC\n"])
def test_what_is_not_a_time_zone_s_name_is_refused(timezone: str) -> None:
    with pytest.raises(SpecRefused, match="timezone"):
        environment(replace(SPEC, timezone=timezone))


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A": "\0"}, {"\0": ""}])
def test_what_is_not_a_variable_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(SpecRefused, match="environment variable"):
        environment(replace(SPEC, env=env))


@pytest.mark.parametrize(
    ("wanted", "of_image", "cwd"),
    [
        ("", "", "/"),
        ("", "/opt/airflow", "/opt/airflow"),
        ("", "opt/airflow/", "/opt/airflow"),
        ("/data", "/opt/airflow", "/data"),
        ("/data/./x/../y//", "", "/data/y"),
        ("//data", "", "/data"),
        ("/processed", "", "/processed"),
    ],
)
def test_working_directory(wanted: str, of_image: str, cwd: str) -> None:
    spec = replace(SPEC, working_dir=wanted)
    assert working_directory(spec, ImageConfig(architecture="amd64", working_dir=of_image)) == cwd


@pytest.mark.parametrize(
    "path", ["/proc", "/proc/self/fd/7", "//proc/self/fd/7", "/x/../proc/self", "/./proc/", "/../proc/1/cwd", "/a\0"]
)
def test_a_working_directory_in_proc_is_refused_wherever_it_comes_from(path: str) -> None:
    for spec, image in ((replace(SPEC, working_dir=path), IMAGE), (SPEC, replace(IMAGE, working_dir=path))):
        with pytest.raises(SpecRefused, match="working directory"):
            build(spec, image=image)


def test_a_relative_working_dir_is_refused() -> None:
    with pytest.raises(SpecRefused, match="'data' is not an absolute path"):
        build(replace(SPEC, working_dir="data"))


@given(st.text("/.procself", max_size=16))
def test_no_spelling_leads_into_proc(path: str) -> None:
    try:
        cwd = working_directory(SPEC, ImageConfig(architecture="amd64", working_dir=path))
    except SpecRefused:
        return
    assert cwd.split("/")[1] != "proc"
    assert cwd == "/" or all(part not in {"", ".", ".."} for part in cwd[1:].split("/"))


def test_the_hostname_is_the_id_unless_given() -> None:
    assert container_hostname(SPEC, "task-1") == "task-1"
    assert container_hostname(replace(SPEC, hostname="sales"), "task-1") == "sales"


def test_a_long_id_is_cut_for_the_hostname() -> None:
    assert container_hostname(SPEC, "a" * 63 + "-" + "b" * 12) == "a" * 63


@pytest.mark.parametrize("hostname", ["-a", "a-", "a b", "ä", "a" * 65, "a/b", "a\n"])
def test_what_is_not_a_hostname_is_refused(hostname: str) -> None:
    with pytest.raises(SpecRefused, match="hostname"):
        build(replace(SPEC, hostname=hostname))


@pytest.mark.parametrize("capability", ["CAP_CHOWN", "chown", "ALL", ""])
def test_what_is_not_a_capability_is_refused(capability: str) -> None:
    with pytest.raises(SpecRefused, match=f"'{capability}' is not a capability"):
        build(replace(SPEC, capabilities=frozenset({capability})))


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(cpus=0), "cpus is 0"),
        (Resources(cpus=0.001), "cpus"),
        (Resources(cpus=float("nan")), "cpus is nan"),
        (Resources(cpus=float("inf")), "cpus is inf"),
        (Resources(cpus=-1), "cpus is -1"),
        (Resources(memory=0), "memory is 0 bytes"),
        (Resources(memory=-1), "memory is -1 bytes"),
        (Resources(memory=1024), "memory is 1024 bytes"),
        (Resources(pids=0), "pids is 0"),
        (Resources(pids=-1), "pids is -1"),
    ],
)
def test_a_limit_that_would_be_none_is_refused(resources: Resources, words: str) -> None:
    with pytest.raises(SpecRefused, match=words):
        build(replace(SPEC, resources=resources))


@pytest.mark.parametrize("cgroup_parent", ["..", "a/../b", "a//b", "/", "a/./b", "a\0"])
def test_a_cgroup_parent_that_leads_elsewhere_is_refused(cgroup_parent: str) -> None:
    with pytest.raises(SpecRefused, match="cgroup_parent"):
        build(replace(SPEC, cgroup_parent=cgroup_parent))


@pytest.mark.parametrize(
    ("cgroup_parent", "path"), [("", "/airflow/task-1"), ("team", "/team/task-1"), ("/team/x/", "/team/x/task-1")]
)
def test_cgroups_path(cgroup_parent: str, path: str) -> None:
    assert build(replace(SPEC, cgroup_parent=cgroup_parent))["linux"]["cgroupsPath"] == path


@pytest.mark.parametrize("image", [replace(IMAGE, architecture="arm64"), replace(IMAGE, os="windows")])
def test_an_image_of_another_platform_is_refused(image: ImageConfig) -> None:
    with pytest.raises(SpecRefused, match=f"{image.os}/{image.architecture}, this host is linux/amd64"):
        build(image=image)


def test_an_id_that_containerd_refuses_is_refused() -> None:
    with pytest.raises(SpecRefused, match="can't be a container's id"):
        build_runtime_spec(SPEC, id="a__b", image=IMAGE, account=ACCOUNT, host=HOST, seccomp=load_profile(SPEC.seccomp))
