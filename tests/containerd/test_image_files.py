"""Reading /etc/passwd of an image that may be hostile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.containerd.conftest import NAMESPACE
from tests.containerd.image_archives import Fifo, Link, tar, write_oci

from airflow_isolation.containerd import image_files, images
from airflow_isolation.containerd.archive_import import import_archive
from airflow_isolation.containerd.errors import InvalidImage, NotFound
from airflow_isolation.containerd.image_files import read_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from airflow_isolation.containerd.client import Client
    from airflow_isolation.containerd.layout import Layout

    Imported = Callable[..., Layout]

pytestmark = pytest.mark.root

USERS = b"airflow:x:50000:0::/home/airflow:/bin/sh\n"


@pytest.fixture(autouse=True)
def _forget() -> None:
    image_files._cache.clear()


@pytest.fixture
def imported(client: Client, tmp_path: Path) -> Iterator[Imported]:
    """An image with the given layers, which goes with the test."""
    names = []

    def make(*layers: dict[str, Any]) -> Layout:
        archive = write_oci(tmp_path / "files.tar", "test/files:1", layers=[tar(layer) for layer in layers])
        (image,) = import_archive(client, archive)
        names.append(image.name)
        return images.resolve(client, image)

    yield make
    for name in names:
        images.remove(client, name)


def test_upper_layer_wins_and_a_missing_file_is_none(client: Client, imported: Imported) -> None:
    layout = imported({"etc/passwd": b"old\n"}, {"etc/passwd": USERS})

    assert read_files(client, layout) == {"/etc/passwd": USERS, "/etc/group": None}


def test_removed_file_is_none(client: Client, imported: Imported) -> None:
    layout = imported({"etc/passwd": USERS, "etc/other": b""}, {"etc/.wh.passwd": b""})

    assert read_files(client, layout)["/etc/passwd"] is None


def test_image_of_one_layer(client: Client, imported: Imported) -> None:
    assert read_files(client, imported({"etc/passwd": USERS}))["/etc/passwd"] == USERS


def test_image_of_more_layers_than_a_page_of_mount_options_holds(client: Client, imported: Imported) -> None:
    layout = imported(*({f"file{number}": b"x"} for number in range(60)), {"etc/passwd": USERS})

    assert read_files(client, layout, ("/etc/passwd", "/file0")) == {"/etc/passwd": USERS, "/file0": b"x"}


@pytest.mark.parametrize("target", ["/secret", "../../../../../../../../secret"])
def test_link_leads_to_the_image_s_file_not_to_the_host_s(
    client: Client, imported: Imported, tmp_path: Path, target: str
) -> None:
    host = tmp_path / "host-secret"
    host.write_bytes(b"secret of the host")
    layout = imported({"etc/passwd": Link(target), "secret": b"the image's own", "etc/group": Link(str(host))})

    assert read_files(client, layout) == {"/etc/passwd": b"the image's own", "/etc/group": None}


def test_linked_directory_stays_inside(client: Client, imported: Imported) -> None:
    layout = imported({"etc": Link("/real"), "real/passwd": USERS})

    assert read_files(client, layout)["/etc/passwd"] == USERS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Fifo(), "is not a regular file"),
        (b"x" * (image_files.FILE_LIMIT + 1), "is larger than"),
        (Link("/etc/passwd"), "can't be opened: Too many levels of symbolic links"),
    ],
)
def test_hostile_file_is_refused(client: Client, imported: Imported, content: Any, words: str) -> None:
    with pytest.raises(InvalidImage, match=words):
        read_files(client, imported({"etc/passwd": content}))


def test_second_read_asks_nobody(client: Client, imported: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = imported({"etc/passwd": USERS})
    first = read_files(client, layout)
    monkeypatch.setattr(image_files, "_from_image", lambda *_: pytest.fail("asked again"))

    assert read_files(client, layout) == first


def test_cache_directory_serves_the_next_process(client: Client, imported: Imported, tmp_path: Path) -> None:
    layout = imported({"etc/passwd": USERS, "etc/group": b"\xff\n"})
    first = read_files(client, layout, cache_directory=tmp_path / "cache")
    image_files._cache.clear()
    (kept,) = (tmp_path / "cache").iterdir()

    assert read_files(client, layout, cache_directory=tmp_path / "cache") == first
    assert kept.stat().st_mode & 0o077 == 0


def test_damaged_cache_is_not_believed(client: Client, imported: Imported, tmp_path: Path) -> None:
    layout = imported({"etc/passwd": USERS})
    read_files(client, layout, cache_directory=tmp_path)
    (kept,) = tmp_path.glob("sha256-*.json")
    image_files._cache.clear()
    kept.write_text(json.dumps({"/etc/passwd": 7}))

    assert read_files(client, layout, cache_directory=tmp_path)["/etc/passwd"] == USERS


def test_image_that_is_gone(client: Client, tmp_path: Path) -> None:
    (image,) = import_archive(client, write_oci(tmp_path / "a.tar", layers=(tar({"gone": b"x"}),)))
    layout = images.resolve(client, image)
    images.remove(client, image.name)

    with pytest.raises(NotFound):
        read_files(client, layout)


def test_ordinary_user_is_told_that_it_needs_root(client: Client, imported: Imported) -> None:
    imported({"etc/passwd": USERS})
    program = f"""
import os
from airflow_isolation.containerd import images
from airflow_isolation.containerd.client import Client
from airflow_isolation.containerd.errors import PermissionDenied
from airflow_isolation.containerd.image_files import read_files

with Client({str(client.address)!r}, namespace={NAMESPACE!r}) as client:
    layout = images.resolve(client, images.get(client, "test/files:1"))
    os.seteuid(65534)
    try:
        read_files(client, layout)
    except PermissionDenied as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert "reading /etc/group and /etc/passwd of an image needs root" in told.stdout
    assert os.geteuid() == 0


def test_of_directories_the_names_are_told(client: Client, imported: Imported, tmp_path: Path) -> None:
    layout = imported({"full/file": b"x", "other": b"y"})
    wanted = ("/full", "/missing", "/other")
    for _ in range(2):
        found = read_files(client, layout, wanted, directories=True, cache_directory=tmp_path / "kept")
        assert found == {"/full": b"file", "/missing": None, "/other": b"/other"}
        image_files._cache.clear()
    assert len(list((tmp_path / "kept").iterdir())) == 1
