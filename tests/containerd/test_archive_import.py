"""Importing archives, on each release of containerd."""

from __future__ import annotations

import gzip
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.containerd.conftest import NAMESPACE, leftovers
from tests.containerd.image_archives import (
    HOST,
    OTHER,
    OciImage,
    as_json,
    digest,
    docker_files,
    named,
    oci_files,
    tar,
    write,
    write_oci,
)

from airflow_isolation.containerd import blobs, images
from airflow_isolation.containerd.api import leases_pb2
from airflow_isolation.containerd.archive_import import import_archive
from airflow_isolation.containerd.errors import (
    ContainerdError,
    InvalidArchive,
    InvalidImage,
    InvalidReference,
    NotFound,
    WrongPlatform,
)
from airflow_isolation.containerd.image_files import read_files
from airflow_isolation.containerd.unpack import is_unpacked

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.containerd.client import Client
    from airflow_isolation.containerd.progress import Progress

pytestmark = pytest.mark.root

THREE_LAYERS: dict[str, Any] = {
    "layers": (tar({"one": b"1\n"}), tar({"two": b"2\n"}), tar({"three": b"3\n"})),
    "packing": ("", "gzip", "zstd"),
}


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def test_the_transfer_service_is_seen_where_it_is(client: Client) -> None:
    assert client.has_transfer == (not client.server_version.startswith("1.6"))


def test_import_keeps_the_name_and_unpacks(client: Client, tmp_path: Path) -> None:
    archive = write_oci(tmp_path / "a.tar", "test/image:1", **THREE_LAYERS)

    (image,) = import_archive(client, archive)

    assert image.name == "docker.io/test/image:1"
    layout = images.resolve(client, image)
    assert is_unpacked(client, layout)
    assert b"GREETING=hello" in images.image_config(client, "test/image:1")
    assert read_files(client, layout, ("/one", "/two", "/three")) == {"/one": b"1\n", "/two": b"2\n", "/three": b"3\n"}
    images.remove(client, "test/image:1")


def test_imported_image_survives_garbage_collection(client: Client, tmp_path: Path) -> None:
    (image,) = import_archive(client, write_oci(tmp_path / "a.tar", **THREE_LAYERS))

    kept = leftovers(client)

    layout = images.resolve(client, image)
    assert set(kept["content"]) == {blob.digest for blob in layout.blobs()}
    assert set(kept["snapshots"]) == set(layout.chain_ids)
    assert set(kept) == {"images", "content", "snapshots"}
    images.remove(client, image.name)


def test_docker_archive_with_a_repeated_layer(client: Client, tmp_path: Path) -> None:
    one = tar({"one": b"1\n"})
    files = docker_files(tags=["test/docker:1", "localhost:5000/second"], layers=(one, one))

    first, second = import_archive(client, write(tmp_path / "a.tar", files))

    assert (first.name, second.name) == ("docker.io/test/docker:1", "localhost:5000/second:latest")
    assert first.digest == second.digest
    assert read_files(client, images.resolve(client, first), ("/one",)) == {"/one": b"1\n"}
    images.remove(client, first.name)
    images.remove(client, second.name)


def test_gzipped_archive(client: Client, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(write_oci(tmp_path / "a.tar").read_bytes()))

    (image,) = import_archive(client, archive)

    assert is_unpacked(client, images.resolve(client, image))
    images.remove(client, image.name)


def test_given_name_replaces_the_archive_s(client: Client, tmp_path: Path) -> None:
    (image,) = import_archive(client, write_oci(tmp_path / "a.tar", "test/image:1"), name="other:2")

    assert [image.name for image in images.list_all(client)] == ["docker.io/library/other:2"]
    images.remove(client, image.name)


def test_name_moves_to_the_new_image_and_the_old_one_is_collected(client: Client, tmp_path: Path) -> None:
    (old,) = import_archive(client, write_oci(tmp_path / "a.tar", layers=(tar({"old": b"old"}),)))
    (new,) = import_archive(client, write_oci(tmp_path / "b.tar", layers=(tar({"new": b"new"}),)))

    assert old.name == new.name
    assert old.digest != new.digest
    assert old.digest not in leftovers(client)["content"]
    images.remove(client, new.name)


def test_progress_tells_each_blob_to_its_end(client: Client, tmp_path: Path) -> None:
    seen: list[Progress] = []

    (image,) = import_archive(
        client, write_oci(tmp_path / "a.tar", layers=(tar({"big": noise(3 << 20)}),)), progress=seen.append
    )

    layout = images.resolve(client, image)
    for blob in layout.blobs():
        done = [step.done for step in seen if step.name == blob.digest and step.event == "importing"]
        assert done == sorted(done)
        assert done[-1] == blob.size
    assert {step.total for step in seen if step.name == layout.layers[0].digest} == {layout.layers[0].size}
    images.remove(client, image.name)


def test_only_this_host_s_image_of_several_is_kept(client: Client, tmp_path: Path) -> None:
    ours, theirs = OciImage(), OciImage(architecture=OTHER, layers=(tar({"other": b"x"}),))
    children = [
        dict(image.manifest(), platform={"os": "linux", "architecture": image.architecture}) for image in (theirs, ours)
    ]
    index = as_json({"schemaVersion": 2, "manifests": children})
    ours.blobs.update(theirs.blobs)
    outer = dict(ours.put("application/vnd.oci.image.index.v1+json", index), annotations=named("test/many:1"))

    (image,) = import_archive(client, write(tmp_path / "a.tar", oci_files((ours, {}), manifests=[outer])))

    layout = images.resolve(client, image)
    assert image.digest == digest(index)
    assert layout.manifest.digest == children[1]["digest"]
    assert set(leftovers(client)["content"]) == {blob.digest for blob in layout.blobs()}
    images.remove(client, image.name)


def broken(kind: str, path: Path) -> Path:
    image = OciImage(layers=(tar({"big": noise(200_000)}), tar({"two": b"2\n"})))
    files = oci_files((image, named("test/broken:1")))
    layer = f"blobs/sha256/{digest(image.layers[0]).removeprefix('sha256:')}"
    if kind == "layer damaged":
        files[layer] = files[layer][:-1000] + b"x" * 1000
    elif kind == "layer missing":
        del files[layer]
    elif kind == "layer is another":
        wrong = OciImage(layers=image.layers, diff_ids=(digest(b"a"), digest(b"b")))
        files = oci_files((wrong, named("test/broken:1")))
    elif kind == "layer is no tar":
        files = oci_files((OciImage(layers=(noise(5000),)), named("test/broken:1")))
    elif kind == "wrong architecture":
        files = oci_files((OciImage(architecture=OTHER), named("test/broken:1")))
    elif kind == "no name":
        files = oci_files((image, {}))
    write(path, files)
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "not an archive":
        path.write_bytes(noise(50_000))
    return path


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("truncated", InvalidArchive, "is truncated"),
        ("not an archive", InvalidArchive, "is not a tar archive"),
        ("layer damaged", InvalidArchive, "is damaged"),
        ("layer missing", InvalidArchive, "is missing"),
        ("layer is another", InvalidArchive, "configuration says|wrong diff id"),
        ("layer is no tar", InvalidArchive, "can't be unpacked"),
        ("wrong architecture", WrongPlatform, f"made for linux/{OTHER}, this host is linux/"),
        ("no name", InvalidArchive, "has no name. Give one at the import"),
    ],
)
def test_bad_archive_is_refused_and_leaves_nothing(
    client: Client, tmp_path: Path, kind: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        import_archive(client, broken(kind, tmp_path / "a.tar"))

    assert leftovers(client) == {}


def test_one_name_for_two_images_is_refused(client: Client, tmp_path: Path) -> None:
    two = oci_files((OciImage(), named("a:1")), (OciImage(layers=(tar({"b": b"b"}),)), named("b:1")))

    with pytest.raises(InvalidArchive, match="holds 2 images"):
        import_archive(client, write(tmp_path / "a.tar", two), name="c:1")


def test_bad_name_is_refused_before_the_archive_is_looked_at(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="must be lower case"):
        import_archive(client, tmp_path / "absent", name="Team/Image")


def test_image_that_is_not_there(client: Client) -> None:
    with pytest.raises(NotFound, match=r"test/absent:latest.*Import or pull it first"):
        images.get(client, "test/absent")
    with pytest.raises(NotFound):
        images.remove(client, "test/absent")


def test_what_nobody_asked_for_is_passed_over_and_told(client: Client, tmp_path: Path) -> None:
    good, other, unnamed = OciImage(), OciImage(architecture=OTHER), OciImage(layers=(tar({"old": b"old"}),))
    signature = as_json({"schemaVersion": 2, "config": good.put("", b"{}"), "layers": []})
    listed = [
        dict(other.manifest(), annotations=named("other:1")),
        unnamed.manifest(),
        good.put("application/vnd.oci.image.manifest.v1+json", signature),
        dict(good.manifest(), annotations=named("test/good:1")),
    ]
    good.blobs.update({**other.blobs, **unnamed.blobs})
    seen: list[Progress] = []

    (image,) = import_archive(
        client, write(tmp_path / "a.tar", oci_files((good, {}), manifests=listed)), progress=seen.append
    )

    assert image.name == "docker.io/test/good:1"
    told = {step.name: step.event for step in seen if step.event.startswith("passed over")}
    assert [told[name] for name in ("other:1", listed[1]["digest"], listed[2]["digest"])] == [
        f"passed over (the image is made for linux/{OTHER}, this host is {HOST})",
        "passed over (it has no name)",
        f"passed over ({listed[2]['digest']} is no image: its configuration has no rootfs)",
    ]
    assert set(leftovers(client)["content"]) == {blob.digest for blob in images.resolve(client, image).blobs()}
    images.remove(client, image.name)


def test_document_that_is_larger_than_it_is_said_to_be_is_not_read(client: Client, tmp_path: Path) -> None:
    image = OciImage(layers=(tar({"big": noise(20 << 20)}),))
    (imported,) = import_archive(client, write(tmp_path / "a.tar", oci_files((image, named("a:1")))))
    layer = images.resolve(client, imported).layers[0]

    with pytest.raises(InvalidImage, match="has more than the 100 bytes that are said of it"):
        blobs.read_document(client, replace(layer, size=100))

    images.remove(client, "a:1")


def test_callback_that_fails_ends_the_import_and_leaves_nothing(client: Client, tmp_path: Path) -> None:
    def fail(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_archive(client, write_oci(tmp_path / "a.tar", **THREE_LAYERS), progress=fail)

    assert leftovers(client) == {}


def test_several_at_once_import_the_same(client: Client, tmp_path: Path) -> None:
    archive = write_oci(tmp_path / "a.tar", layers=(tar({"big": noise(1 << 20)}),))
    results: list[object] = []

    def run() -> None:
        try:
            results.append(import_archive(client, archive)[0].digest)
        except ContainerdError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    image = images.get(client, "test/image:1")
    assert results == [image.digest] * 4
    images.remove(client, image.name)


def test_killed_importer_leaves_only_a_lease_that_expires(client: Client, tmp_path: Path) -> None:
    archive = write_oci(tmp_path / "a.tar", layers=(tar({"big": noise(2 << 20)}),))
    program = f"""
import os, signal
from airflow_isolation.containerd.archive_import import import_archive
from airflow_isolation.containerd.client import Client

def die(step):
    if step.event == "importing" and step.done > 1_000_000:
        os.kill(os.getpid(), signal.SIGKILL)

import_archive(Client({str(client.address)!r}, namespace={NAMESPACE!r}), {str(archive)!r}, progress=die)
"""
    died = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL

    (lease,) = client.leases.List(leases_pb2.ListRequest()).leases
    assert "containerd.io/gc.expire" in lease.labels
    # Sooner than it would by itself, which the label has just promised.
    client.leases.Delete(leases_pb2.DeleteRequest(id=lease.id, sync=True))
    assert leftovers(client) == {}
