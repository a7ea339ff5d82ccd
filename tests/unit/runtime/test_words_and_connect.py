"""Small pure parts: hints, the choice of a backend, reasons why a socket can't be used."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from airflow_isolation.containerd.errors import Unknown
from airflow_isolation.errors import ContainerFailed, ContainerKilled, HostTrouble, ImageInvalid, SettingError
from airflow_isolation.runtime.connect import connect
from airflow_isolation.runtime.containerd_errors import translated
from airflow_isolation.runtime.host_trouble import writing_in
from airflow_isolation.runtime.reachability import unreachable
from airflow_isolation.runtime.words import start_hint


def test_a_missing_program_names_image_and_setting() -> None:
    hint = start_hint('exec: "python3": executable file not found in $PATH', image="sales:1", program="python3")
    assert "sales:1" in hint
    assert "python" in hint


def test_a_program_of_another_machine_is_told_as_such() -> None:
    assert "another processor" in start_hint("exec format error", image="sales:1", program="python3")


@pytest.mark.parametrize(
    ("reason", "place", "setting"),
    [
        (
            'error mounting "/a" to rootfs at "/etc/Group": mount /a:/etc/Group (via /proc/self/fd/6): not a directory',
            "/etc/Group",
            "volume",
        ),
        ("error during container init: mkdir /etc/passwd: not a directory: unknown", "/etc/passwd", "working_dir"),
        ("Cannot mkdir: /etc/passwd is not a directory", "/etc/passwd", "working_dir"),
        ("lstat /d/overlay2/65/merged/etc/passwd/below: not a directory", "/etc/passwd/below", "working_dir"),
    ],
)
def test_a_place_that_can_t_be_made_is_told_with_its_setting(reason: str, place: str, setting: str) -> None:
    hint = start_hint(reason, image="sales:1", program="python3")
    assert f" {place} " in hint
    assert setting in hint


def test_other_reasons_get_no_hint() -> None:
    assert start_hint("no space left on device", image="sales:1", program="python3") == ""


@pytest.mark.parametrize("backend", ["podman", "", "Docker"])
def test_an_unknown_backend_names_the_known_ones(backend: str) -> None:
    with pytest.raises(SettingError, match="containerd, docker"):
        connect(backend)


def test_empty_settings_are_the_backends_defaults(tmp_path: Path) -> None:
    with connect("containerd", socket_path="", namespace="", snapshotter="", state_dir=tmp_path) as runtime:
        assert vars(runtime)["_socket_path"] == "/run/containerd/containerd.sock"
        assert vars(runtime)["_snapshotter"] == "overlayfs"


def test_docker_takes_no_notice_of_containerds_settings(tmp_path: Path) -> None:
    connect("docker", snapshotter="native", hosts_dir="/x", state_dir=tmp_path).close()


def test_reasons_are_told_apart(tmp_path: Path) -> None:
    place = tmp_path / "s"
    assert "there is no socket" in str(unreachable("containerd", str(place), ""))
    assert "not a socket" in str(unreachable("containerd", str(tmp_path), ""))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        assert "nothing listens" in str(unreachable("containerd", str(place), ""))
        listener.listen(1)
        assert "deadline" in str(unreachable("containerd", str(place), "deadline exceeded"))


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("failed to prepare extraction: mkdir /var/lib/containerd/x: no space left on device", HostTrouble),
        ("write /var/lib/containerd/meta.db: disk quota exceeded", HostTrouble),
        ("failed to create shim task: ttrpc: closed", ContainerKilled),
        ("runc did not terminate successfully: signal: killed", ContainerKilled),
        ("exec: python3: executable file not found in $PATH", ContainerFailed),
    ],
)
def test_the_daemons_own_trouble_is_told_from_the_workloads(words: str, kind: type[ContainerFailed]) -> None:
    """A full disk of a daemon and a killed runc are not provoked here: these are their words."""
    with (
        pytest.raises(ContainerFailed, match="could not create the container c") as failed,
        translated("/s", "create the container c"),
    ):
        raise Unknown(words)
    assert type(failed.value) is kind
    assert words in str(failed.value)
    assert bool(failed.value.hint) is (kind is not ContainerFailed)


def test_a_quota_of_keys_is_no_full_disk() -> None:
    """runc's words; findings/runc-session-keys-quota.sh has them from runc."""
    with pytest.raises(HostTrouble) as failed, translated("/s", "start the container c"):
        raise Unknown("unable to join session keyring: unable to create session key: disk quota exceeded")
    assert "kernel.keys.maxkeys" in failed.value.hint
    assert "file system" not in failed.value.hint


def test_a_full_disk_makes_no_image_invalid() -> None:
    with pytest.raises(HostTrouble), translated("/s", "unpack the image i", failed=ImageInvalid):
        raise Unknown("no space left on device")


def test_what_can_not_be_written_in_the_state_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(HostTrouble, match=f"can't write in its state directory {tmp_path}"), writing_in(tmp_path):
        (tmp_path / "missing" / "file").touch()
    full = Path("/dev/full")
    with pytest.raises(HostTrouble) as failed, writing_in(tmp_path):
        full.write_bytes(b"x")
    assert "Make room" in failed.value.hint
