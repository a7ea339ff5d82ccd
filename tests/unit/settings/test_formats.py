from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_isolation.settings import formats
from airflow_isolation.settings.effective import Volume

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "reference",
    [
        "python",
        "python:3.12",
        "apache/airflow:3.3.2-python3.11",
        "localhost/airflow-isolation/test:1",
        "localhost:5000/sales",
        "registry.example:5000/team/sales:1.4",
        "[::1]:5000/sales:1",
        "10.0.0.1:5000/sales",
        "sales@sha256:" + "a" * 64,
        "registry.example/a__b/c-d.e:X_1.2",
    ],
)
def test_image_references_are_kept_as_written(reference: str) -> None:
    assert formats.parse_image(reference) == reference


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "Sales",
        "sales:",
        "sales 1",
        "../sales",
        "registry.example/../sales",
        "-v",
        "sales@sha256:abc",
        "a" * 256,
        "docker://sales",
        "sales\n",
        "sales:" + "t" * 129,
    ],
)
def test_what_is_no_image_reference_is_refused(reference: str) -> None:
    with pytest.raises(ValueError, match="not an image reference"):
        formats.parse_image(reference)


@pytest.mark.parametrize(
    ("reference", "full"),
    [
        ("python", "docker.io/library/python:latest"),
        ("team/sales:1", "docker.io/team/sales:1"),
        ("registry.example/sales", "registry.example/sales:latest"),
        ("localhost:5000/sales:1", "localhost:5000/sales:1"),
        ("sales@sha256:" + "a" * 64, "docker.io/library/sales@sha256:" + "a" * 64),
    ],
)
def test_a_reference_in_full(reference: str, full: str) -> None:
    assert formats.qualified_image(reference) == full


def test_a_volume_is_read_only_unless_it_says_rw() -> None:
    assert formats.parse_volume("/data/sales:/data") == Volume("/data/sales", "/data", read_only=True)
    assert formats.parse_volume("/data/sales:/data:ro") == Volume("/data/sales", "/data", read_only=True)
    assert formats.parse_volume("/data/sales/:/data/:rw") == Volume("/data/sales", "/data", read_only=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/data", "not a volume"),
        ("/data:", "not a volume"),
        ("/a:/b:ro:rw", "not a volume"),
        ("/a:/b:rx", "neither ro nor rw"),
        ("data:/b", "not an absolute path"),
        ("/a:b", "not an absolute path"),
        ("/data/../etc:/b", "upwards"),
        ("/a:/", "cover /"),
        ("/a:/proc/sys", "cover /proc"),
        ("/a:/dev", "cover /dev"),
        ("/a\n:/b", "control character"),
    ],
)
def test_what_is_no_volume_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        formats.parse_volume(text)


def test_a_double_slash_at_the_front_is_one_path() -> None:
    # posixpath.normpath keeps exactly two leading slashes.
    assert formats.parse_path("//etc//passwd") == "/etc/passwd"


@pytest.mark.parametrize("user", ["airflow", "50000", "50000:0", "_apt", "0"])
def test_users(user: str) -> None:
    assert formats.parse_user(user) == user


@pytest.mark.parametrize("user", ["", "a:b", "1:2:3", "air flow", "2147483648", "1:2147483648", "-1", "9999999999"])
def test_what_is_no_user_is_refused(user: str) -> None:
    with pytest.raises(ValueError, match=r"not a user|largest user id"):
        formats.parse_user(user)


@pytest.mark.parametrize(
    ("user", "root"),
    [("root", True), ("0", True), ("0:50000", True), ("00", True), ("50000:0", False), ("airflow", False), ("", False)],
)
def test_who_is_root_by_name(user: str, *, root: bool) -> None:
    assert formats.is_root(user) is root


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (formats.parse_network, "container:abc"),
        (formats.parse_network, ""),
        (formats.parse_hostname, "a_b"),
        (formats.parse_hostname, "a" * 64),
        (formats.parse_hostname, "sales\n"),
        (formats.parse_timezone, "Europe/Belin"),
        (formats.parse_timezone, "../../etc/passwd"),
        (formats.parse_timezone, "Europe"),
        (formats.parse_capability, "ALL"),
        (formats.parse_capability, "net bind"),
        (formats.parse_seccomp, "none"),
        (formats.parse_working_dir, "/proc/self/fd/8"),
        (formats.parse_working_dir, "//proc/self/fd/8"),
        (formats.parse_working_dir, "work"),
        (formats.parse_interpreter, "bin/python"),
        (formats.parse_interpreter, "python3 -I"),
        (formats.parse_cgroup_parent, "/"),
        (formats.parse_cgroup_parent, "airflow/../system.slice"),
        (formats.parse_namespace, "a__b"),
        (formats.parse_namespace, "a" * 77),
        (formats.parse_bool, "maybe"),
        (formats.parse_pull_policy, "Always"),
    ],
)
def test_what_is_not_of_the_form_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_a_capability_goes_without_its_prefix() -> None:
    assert formats.parse_capability("cap_net_bind_service") == "NET_BIND_SERVICE"


def test_a_socket_may_be_written_as_a_url() -> None:
    assert formats.parse_socket("unix:///run/docker.sock") == "/run/docker.sock"


def test_a_time_zone_that_exists() -> None:
    assert formats.parse_timezone("Europe/Berlin") == "Europe/Berlin"


@pytest.mark.parametrize(
    "name", ["io.airflow.owner", "containerd.io/gc.root", "io.cri-containerd.kind", "a b", "", ".a"]
)
def test_labels_of_others_and_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"labels that begin with|not a name"):
        formats.check_label(name, "x")


def test_a_label_is_no_longer_than_containerd_takes() -> None:
    formats.check_label("team", "x" * 4092)
    with pytest.raises(ValueError, match="4096"):
        formats.check_label("team", "x" * 4093)


@pytest.mark.parametrize(("name", "value"), [("A=B", "x"), ("", "x"), ("A B", "x"), ("A", "\0"), ("A", "x" * 131072)])
def test_a_variable_that_execve_would_not_take_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        formats.check_environment(name, value)
