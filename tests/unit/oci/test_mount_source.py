from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci.mount_source import check_mount_source_on_disk, identify_sources


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def test_a_directory_and_a_file_are_fine(place: Path) -> None:
    (place / "file").touch()
    check_mount_source_on_disk(str(place))
    check_mount_source_on_disk(str(place / "file"))


def test_a_missing_source_is_named(place: Path) -> None:
    with pytest.raises(SpecRefused, match=f"mount source '{place}/sales' does not exist"):
        check_mount_source_on_disk(f"{place}/sales")


def test_the_first_missing_part_is_named(place: Path) -> None:
    with pytest.raises(SpecRefused, match=f"there is no '{place}/a'"):
        check_mount_source_on_disk(f"{place}/a/b/c")


def test_a_link_is_refused_with_its_target(place: Path) -> None:
    (place / "link").symlink_to("/etc")
    with pytest.raises(SpecRefused, match="it is a symbolic link to '/etc'"):
        check_mount_source_on_disk(f"{place}/link")


def test_a_link_on_the_way_is_refused_and_named(place: Path) -> None:
    (place / "real/data").mkdir(parents=True)
    (place / "link").symlink_to("real")
    with pytest.raises(SpecRefused, match=f"its part '{place}/link' is a symbolic link to 'real'"):
        check_mount_source_on_disk(f"{place}/link/data")


def test_a_dangling_link_is_a_link(place: Path) -> None:
    (place / "link").symlink_to("nowhere")
    with pytest.raises(SpecRefused, match="symbolic link to 'nowhere'"):
        check_mount_source_on_disk(f"{place}/link")


def test_a_file_on_the_way_is_named(place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(SpecRefused, match=f"'{place}/file/x': Not a directory"):
        check_mount_source_on_disk(f"{place}/file/x")


def test_a_fifo_does_not_hold_the_check_up(place: Path) -> None:
    os.mkfifo(place / "fifo")
    check_mount_source_on_disk(str(place / "fifo"))


def test_a_socket_is_not_connected_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        check_mount_source_on_disk(str(place / "s"))


def test_no_descriptor_stays_open(place: Path) -> None:
    (place / "link").symlink_to("nowhere")
    before = list(Path("/proc/self/fd").iterdir())
    check_mount_source_on_disk(str(place))
    for name in ("link", "missing", "missing/too"):
        with pytest.raises(SpecRefused):
            check_mount_source_on_disk(f"{place}/{name}")
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_another_directory_at_the_same_path_is_told_from_the_first(place: Path) -> None:
    mounts = (Mount(target="/tmp", kind="tmpfs"), Mount(source=str(place / "dags"), target="/dags"))
    (place / "dags").mkdir()
    first = identify_sources(mounts)
    (place / "dags/file").touch()
    assert identify_sources(mounts) == first
    (place / "dags").rename(place / "before")
    with pytest.raises(FileNotFoundError):
        identify_sources(mounts)
    (place / "dags").mkdir()
    assert identify_sources(mounts) != first
