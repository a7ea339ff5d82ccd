from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.container_spec import Mount, UserNamespace
from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci.account import Account
from airflow_isolation.oci.etc_files import EtcFiles
from airflow_isolation.oci.mounts import (
    check_led_target,
    check_mount_source,
    check_mount_target,
    runtime_mounts,
    volume_targets,
)

ACCOUNT = Account(uid=50000, gid=7, additional_gids=(7,))
ETC = EtcFiles(hostname="/s/hostname", hosts="/s/hosts", resolv_conf="/s/resolv.conf")


def emitted(
    *mounts: Mount,
    rro: bool = True,
    etc: EtcFiles = ETC,
    tmp_size: int = 1,
    shm_size: int = 2,
    account: Account = ACCOUNT,
    user_namespace: UserNamespace | None = None,
) -> dict[str, dict[str, Any]]:
    entries = runtime_mounts(
        mounts,
        account=account,
        tmp_size=tmp_size,
        shm_size=shm_size,
        etc=etc,
        recursive_read_only=rro,
        user_namespace=user_namespace,
    )
    return {entry["destination"]: entry for entry in entries}


@pytest.mark.parametrize(
    "target", ["/data", "/opt/airflow/dags", "/tmp", "/tmp/x", "/procedures", "/run/other", "/a b"]
)
def test_targets_that_may_be(target: str) -> None:
    check_mount_target(target)


@pytest.mark.parametrize(
    "target",
    [
        *("", "data", "./data", "/data/", "//data", "/data/../etc", "/data/.", "/data//x", "/a\0b", "/" + "a" * 5000),
        *("/", "/proc", "/proc/self", "/sys", "/sys/fs/cgroup", "/dev", "/dev/shm", "/run", "/var/run"),
        *("/run/airflow-isolation", "/run/airflow-isolation/agent.py", "/var/run/airflow-isolation"),
    ],
)
def test_targets_that_may_not_be(target: str) -> None:
    with pytest.raises(SpecRefused, match=r"mount target|over '/'"):
        check_mount_target(target)


def test_our_own_directory_is_for_our_own_mounts() -> None:
    check_mount_target("/run/airflow-isolation/agent.py", ours=True)


def test_even_our_own_mounts_stay_out_of_proc() -> None:
    with pytest.raises(SpecRefused, match="/proc"):
        check_mount_target("/proc/sys", ours=True)


@given(st.text("/.ab", max_size=12))
def test_an_accepted_target_is_clean(target: str) -> None:
    try:
        check_mount_target(target)
    except SpecRefused:
        return
    assert target.startswith("/")
    assert all(part not in {"", ".", ".."} for part in target[1:].split("/"))


@pytest.mark.parametrize("source", ["/data", "/srv/dags", "/run/secrets", "/etc/ssl/certs", "/var/lib/sales", "/usr"])
def test_sources_that_may_be_seen(source: str) -> None:
    check_mount_source(source)


@pytest.mark.parametrize(
    "source",
    [
        *("/", "/proc", "/proc/1", "/sys", "/sys/fs/cgroup", "/dev", "/dev/sda", "/dev/shm"),
        *("/run", "/var/run", "/var", "/var/lib", "/run/docker.sock", "/var/run/docker.sock"),
        *(
            "/run/containerd/containerd.sock",
            "/run/containerd",
            "/var/lib/docker/volumes/x/_data",
            "/var/lib/containerd",
        ),
        *("data", "/data/", "/data/../proc", ""),
    ],
)
def test_sources_that_may_not_be_seen(source: str) -> None:
    with pytest.raises(SpecRefused, match="mount source"):
        check_mount_source(source)


@pytest.mark.parametrize("source", ["/srv/own/c.sock", "/srv/own", "/srv"])
def test_the_daemon_in_use_is_not_shown_wherever_its_socket_is(source: str) -> None:
    check_mount_source(source)
    with pytest.raises(SpecRefused, match=r"give the container /srv/own/c\.sock"):
        check_mount_source(source, daemon_paths=("/srv/own/c.sock",))


def test_a_bind_is_private_and_without_devices_and_suid() -> None:
    entry = emitted(Mount(target="/data", source="/srv/data", read_only=False))["/data"]
    assert entry["source"] == "/srv/data"
    assert set(entry["options"]) == {"rbind", "rw", "rprivate", "nosuid", "nodev"}


def test_a_read_only_bind_is_so_all_the_way_down() -> None:
    entry = emitted(Mount(target="/data", source="/srv/data"))["/data"]
    assert set(entry["options"]) == {"rbind", "ro", "rro", "rprivate", "nosuid", "nodev"}


def test_without_rro_a_read_only_bind_leaves_out_what_is_mounted_below() -> None:
    entry = emitted(Mount(target="/data", source="/srv/data"), rro=False)["/data"]
    assert set(entry["options"]) == {"bind", "ro", "rprivate", "nosuid", "nodev"}


def test_a_tmpfs_belongs_to_the_user() -> None:
    mount = Mount(target="/scratch", kind="tmpfs", read_only=False, size=4096, mode=0o700, executable=True)
    assert emitted(mount)["/scratch"] == {
        "destination": "/scratch",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "nodev", "rw", "exec", "mode=700", "uid=50000", "gid=7", "size=4096"],
    }


def test_a_tmpfs_runs_nothing_unless_it_is_asked_to() -> None:
    assert "noexec" in emitted(Mount(target="/scratch", kind="tmpfs", read_only=False))["/scratch"]["options"]


def test_programs_run_from_tmp_but_not_from_shm_and_run() -> None:
    entries = emitted()
    assert "exec" in entries["/tmp"]["options"]
    for target in ("/dev/shm", "/run", "/dev"):
        assert "noexec" in entries[target]["options"]


def test_sizes() -> None:
    entries = emitted(tmp_size=123, shm_size=456)
    assert "size=123" in entries["/tmp"]["options"]
    assert "size=456" in entries["/dev/shm"]["options"]


@pytest.mark.parametrize(
    ("tmp_size", "shm_size", "words"), [(0, 1, "tmp_size"), (-1, 1, "tmp_size"), (1, 0, "shm_size")]
)
def test_a_size_that_would_mean_unlimited_is_refused(tmp_size: int, shm_size: int, words: str) -> None:
    with pytest.raises(SpecRefused, match=words):
        emitted(tmp_size=tmp_size, shm_size=shm_size)


def test_a_mount_on_tmp_takes_the_place_of_ours() -> None:
    assert emitted(Mount(target="/tmp", source="/srv/tmp"))["/tmp"]["source"] == "/srv/tmp"


def test_the_etc_files_are_read_only() -> None:
    entry = emitted()["/etc/hosts"]
    assert entry["source"] == "/s/hosts"
    assert {"ro", "nosuid", "nodev", "noexec", "rprivate"} < set(entry["options"])


@pytest.mark.parametrize(("target", "left"), [("/etc/hosts", 2), ("/etc", 0), ("/etc/ssl", 3)])
def test_a_mount_on_or_above_an_etc_file_is_stronger(target: str, left: int) -> None:
    entries = emitted(Mount(target=target, source="/srv/x"))
    assert entries[target]["source"] == "/srv/x"
    assert sum(entry["source"].startswith("/s/") for entry in entries.values()) == left


def test_two_mounts_on_one_target_are_refused() -> None:
    with pytest.raises(SpecRefused, match="two mounts have the target '/data'"):
        emitted(Mount(target="/data", source="/a"), Mount(target="/data", source="/b"))


@given(st.lists(st.sampled_from(["/d", "/d/e", "/d/e/f", "/d-x", "/a", "/tmp/x", "/run/x/y"]), unique=True))
def test_parents_come_before_children(targets: list[str]) -> None:
    seen: list[str] = []
    for target in emitted(*(Mount(target=target, source="/srv") for target in targets)):
        assert not any(earlier.startswith(f"{target}/") for earlier in seen)
        seen.append(target)
    assert set(targets) < set(seen)


DATA = Mount(target="/data", source="/srv/data", read_only=False, idmapped=True)


def test_ids_are_mapped_in_a_user_namespace_where_that_is_asked_for() -> None:
    namespace = UserNamespace(first=2_000_000)
    mapped = emitted(DATA, user_namespace=namespace)["/data"]
    assert mapped["options"] == [*emitted(DATA)["/data"]["options"], "ridmap"]
    assert mapped["gidMappings"] == [
        {"containerID": 7, "hostID": 2_000_007, "size": 1},
        {"containerID": 0, "hostID": 0, "size": 7},
        {"containerID": 8, "hostID": 8, "size": 1_999_992},
        {"containerID": 2_065_536, "hostID": 2_065_536, "size": 2**32 - 1 - 2_065_536},
    ]
    one_level = emitted(Mount(target="/in", source="/srv/in", idmapped=True), rro=False, user_namespace=namespace)[
        "/in"
    ]
    assert one_level["options"][-1] == "idmap"


@pytest.mark.parametrize(
    ("mount", "namespace"),
    [
        (DATA, None),
        (Mount(target="/data", source="/srv/data", read_only=False), UserNamespace(first=2_000_000)),
        (Mount(target="/data", kind="tmpfs", idmapped=True), UserNamespace(first=2_000_000)),
    ],
)
def test_elsewhere_no_ids_are_mapped(mount: Mount, namespace: UserNamespace | None) -> None:
    mapped = emitted(mount, user_namespace=namespace)["/data"]
    assert not {"idmap", "ridmap"} & set(mapped["options"])
    assert not {"uidMappings", "gidMappings"} & set(mapped)


@given(
    uid=st.integers(0, 65535),
    gids=st.sets(st.integers(0, 65535), min_size=1, max_size=5),
    first=st.integers(0, 2**31),
    looked_at=st.lists(st.integers(0, 2**32 - 2)),
)
def test_in_the_namespace_nobody_but_the_account_is_anybody_to_the_files(
    uid: int, gids: set[int], first: int, looked_at: list[int]
) -> None:
    account = Account(uid=uid, gid=min(gids), additional_gids=tuple(sorted(gids)))
    namespace = UserNamespace(first=first)
    mapped = emitted(DATA, account=account, user_namespace=namespace)["/data"]
    inside = range(first, first + namespace.size)
    for mappings, own in ((mapped["uidMappings"], {uid}), (mapped["gidMappings"], gids)):
        assert sum(mapping["size"] for mapping in mappings) <= 2**32 - 1
        for begins in ("containerID", "hostID"):
            taken = sorted((mapping[begins], mapping[begins] + mapping["size"]) for mapping in mappings)
            assert all(before[1] <= after[0] for before, after in pairwise(taken))
        for id in {*looked_at, *own, 0, first, first + 1, *inside[-1:]}:
            found = [
                mapping["hostID"] + id - mapping["containerID"]
                for mapping in mappings
                if mapping["containerID"] <= id < mapping["containerID"] + mapping["size"]
            ]
            assert found == ([first + id] if id in own else [] if id in inside else [id])


def test_mounts_that_a_link_may_lead_below_another_come_after_it() -> None:
    order = list(emitted(Mount(target="/data", source="/srv/data"), Mount(target="/a/b", source="/x")))
    assert order.index("/tmp") < order.index("/a/b") < order.index("/data") < order.index("/etc/hostname")
    assert order.index("/dev") < order.index("/dev/shm")
    inside = list(emitted(Mount(target="/a/b", source="/x"), Mount(target="/a", source="/y"), Mount(target="/tmp/c")))
    assert inside.index("/a") < inside.index("/a/b")


BEFORE = emitted(
    Mount(target="/data", source="/srv/data"),
    Mount(target="/run/airflow-isolation", source="/srv/agent"),
    etc=EtcFiles(),
)


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("/more", "/more"),
        ("/more", "/opt/more"),
        ("/data/more", "/data/more"),
        ("/etc/resolv.conf", "/run/systemd/resolve/stub"),
        ("/var/run/more", "/run/more"),
    ],
)
def test_a_link_may_lead_a_mount_into_the_image_or_a_tmpfs(target: str, place: str) -> None:
    check_led_target(target, place, BEFORE)


@pytest.mark.parametrize(
    ("target", "place", "met"),
    [
        ("/etc/hosts", "/data", "/data"),
        ("/etc/hosts", "/data/hosts", "/data"),
        ("/etc/hosts", "/proc/net/pnp", "/proc"),
        ("/etc/hostname", "/sys/power/state", "/sys"),
        ("/data/more", "/more", "/data"),
        ("/more", "/run", "/run"),
        ("/more", "/", "/"),
        ("/more", "/run/airflow-isolation/agent.py", "/run/airflow-isolation"),
        ("/etc/hostname", "/dev/null", "nothing may be mounted"),
    ],
)
def test_a_link_may_not_lead_a_mount_anywhere_else(target: str, place: str, met: str) -> None:
    with pytest.raises(SpecRefused, match=f"leads '{target}' to '{place}'.*{met}"):
        check_led_target(target, place, BEFORE)


def test_two_mounts_that_links_lead_to_one_place_are_refused() -> None:
    before = {"/opt/data": BEFORE["/data"]}
    with pytest.raises(
        SpecRefused, match="leads '/data' to '/opt/data', which would meet what is mounted on '/opt/data'"
    ):
        check_led_target("/opt/data", "/opt/data", before)
    for place in ("/opt/data", "/opt"):
        with pytest.raises(SpecRefused, match="meet what is mounted on '/data'"):
            check_led_target("/other", place, before)
    check_led_target("/data/more", "/opt/data/more", before)


def test_volumes_of_the_image_are_those_that_nothing_else_brings() -> None:
    mounts = (Mount(target="/data", source="/srv/data"), Mount(target="/opt/dags", source="/srv/dags"))
    asked = ("/data", "/data/below", "/opt", "/proc/x", "/run", "/run/x", "/run/airflow-isolation", "/tmp", "/tmp/x")
    assert volume_targets(asked, mounts) == ("/opt", "/run/x", "/tmp/x")


def test_a_volume_of_the_image_is_as_large_as_tmp_and_the_user_s() -> None:
    account = Account(uid=50000, gid=7, additional_gids=())
    entries = runtime_mounts(
        (Mount(target="/opt/dags", source="/srv/dags"),),
        account=account,
        tmp_size=123,
        shm_size=1,
        etc=ETC,
        recursive_read_only=True,
        volumes=("/opt",),
    )
    order = [entry["destination"] for entry in entries]
    assert order.index("/opt") < order.index("/opt/dags")
    options = entries[order.index("/opt")]["options"]
    assert set(options) == {"nosuid", "nodev", "rw", "exec", "mode=755", "uid=50000", "gid=7", "size=123"}
