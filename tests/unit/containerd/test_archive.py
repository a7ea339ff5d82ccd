from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from typing import TYPE_CHECKING, Any

import pytest
from tests.containerd.image_archives import (
    OTHER,
    Link,
    OciImage,
    as_json,
    digest,
    docker_files,
    named,
    oci_files,
    tar,
    write,
    write_oci,
    zstd,
)

from airflow_isolation.containerd import archive as archive_module
from airflow_isolation.containerd import layout as layout_module
from airflow_isolation.containerd.archive import Archive
from airflow_isolation.containerd.errors import InvalidArchive, WrongPlatform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from airflow_isolation.containerd.tar_file import Member


def names(path: Path) -> list[tuple[str, ...]]:
    with Archive(path) as archive:
        return [image.names for image in archive.images]


def test_names_of_an_oci_archive_are_made_whole(tmp_path: Path) -> None:
    assert names(write_oci(tmp_path / "a.tar", "alpine")) == [("docker.io/library/alpine:latest",)]


def test_containerd_s_name_wins_over_oci_s(tmp_path: Path) -> None:
    both = {"io.containerd.image.name": "one:1", "org.opencontainers.image.ref.name": "two:2"}
    assert names(write(tmp_path / "a.tar", oci_files((OciImage(), both)))) == [("docker.io/library/one:1",)]


def test_oci_s_name_alone(tmp_path: Path) -> None:
    only = {"org.opencontainers.image.ref.name": "two:2"}
    assert names(write(tmp_path / "a.tar", oci_files((OciImage(), only)))) == [("docker.io/library/two:2",)]


def test_one_image_under_two_names_is_one(tmp_path: Path) -> None:
    assert names(write_oci(tmp_path / "a.tar", "a:1", "b:1")) == [("docker.io/library/a:1", "docker.io/library/b:1")]


def test_names_of_a_docker_archive(tmp_path: Path) -> None:
    assert names(write(tmp_path / "a.tar", docker_files(tags=["a", "h:1/b:2"]))) == [
        ("docker.io/library/a:latest", "h:1/b:2")
    ]


def test_docker_archive_without_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", docker_files(tags=None))
    with pytest.raises(InvalidArchive, match=r"has no name\. Give one at the import"):
        Archive(path)
    with Archive(path, name="given:1") as archive:
        assert [image.names for image in archive.images] == [("docker.io/library/given:1",)]


def test_docker_s_names_are_lent_to_an_oci_archive_that_has_none(tmp_path: Path) -> None:
    image = OciImage()
    files = oci_files((image, {}))
    config = next(name for name in files if b"rootfs" in files[name])
    files["manifest.json"] = as_json([{"Config": config, "RepoTags": ["lent:1"], "Layers": []}])

    assert names(write(tmp_path / "a.tar", files)) == [("docker.io/library/lent:1",)]


def test_paths_may_begin_with_a_dot(tmp_path: Path) -> None:
    files = {f"./{name}": text for name, text in oci_files((OciImage(), named("a:1"))).items()}
    assert names(write(tmp_path / "a.tar", files)) == [("docker.io/library/a:1",)]


def test_chunks_are_the_blob(tmp_path: Path) -> None:
    layer = tar({"big": random.Random(1).randbytes(3_000_000)})
    with Archive(write_oci(tmp_path / "a.tar", layers=(layer,))) as archive:
        assert b"".join(archive.chunks(archive.images[0].layout.layers[0])) == layer


def test_docker_archive_s_manifest_is_made(tmp_path: Path) -> None:
    layer = tar({"a": b"1"})
    with Archive(write(tmp_path / "a.tar", docker_files(tags=["a"], layers=(layer, layer)))) as archive:
        layout = archive.images[0].layout
        assert digest(b"".join(archive.chunks(layout.manifest))) == layout.manifest.digest
        assert [blob.digest for blob in layout.layers] == [digest(layer)] * 2


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archive(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.tar.x"
    path.write_bytes(pack(write_oci(tmp_path / "a.tar", "a:1").read_bytes()))
    assert names(path) == [("docker.io/library/a:1",)]


def test_truncated_compressed_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    packed = gzip.compress(write_oci(tmp_path / "a.tar").read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InvalidArchive, match="is truncated or damaged"):
        Archive(path)


def test_archive_in_zstd_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.zst"
    path.write_bytes(zstd(write_oci(tmp_path / "a.tar").read_bytes()))
    with pytest.raises(InvalidArchive, match="Decompress it first: zstd -d"):
        Archive(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_archive(tmp_path: Path, part: float) -> None:
    whole = write_oci(tmp_path / "a.tar", layers=(tar({"big": b"x" * 300_000}),)).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(InvalidArchive, match="is truncated"):
        Archive(tmp_path / "a.tar")


def test_truncated_between_two_files(tmp_path: Path) -> None:
    files = oci_files((OciImage(), named("a:1")))
    del files["index.json"]
    with pytest.raises(InvalidArchive, match="not an image archive"):
        Archive(write(tmp_path / "a.tar", files))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"hello", "is not a tar archive"), (b"\x7fELF" * 1000, "is not a tar archive")],
)
def test_file_that_is_no_archive(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InvalidArchive, match=words):
        Archive(tmp_path / "a.tar")


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidArchive, match="there is no file"):
        Archive(tmp_path / "absent")
    with pytest.raises(InvalidArchive, match="directory"):
        Archive(tmp_path)


def test_tar_without_an_image(tmp_path: Path) -> None:
    with pytest.raises(InvalidArchive, match="holds neither an OCI layout"):
        Archive(write(tmp_path / "a.tar", {"hello": b"hello"}))
    with pytest.raises(InvalidArchive, match="without an image"):
        Archive(write(tmp_path / "b.tar", oci_files()))


def change(files: dict[str, Any], kind: str) -> None:
    manifest = next(name for name, text in files.items() if b"schemaVersion" in text and name.startswith("blobs/"))
    layer = max((name for name in files if name.startswith("blobs/")), key=lambda name: len(files[name]))
    if kind == "layer missing":
        del files[layer]
    elif kind == "layer of another size":
        files[layer] += b"more"
    elif kind == "manifest damaged":
        files[manifest] = files[manifest].replace(b"2", b"3")
    elif kind == "index deep":
        files["index.json"] = b'{"manifests":' + b"[" * 500_000
    elif kind == "bad name":
        files["index.json"] = files["index.json"].replace(b"test/image:1", b"Test Image 1")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("layer missing", "the blob sha256:.* is missing"),
        ("layer of another size", "instead of"),
        ("manifest damaged", "is damaged"),
        ("index deep", "index.json is not valid JSON"),
        ("bad name", "image name 'Test Image 1'"),
    ],
)
def test_damage_is_named(tmp_path: Path, kind: str, words: str) -> None:
    files = oci_files((OciImage(), named("test/image:1")))
    change(files, kind)
    with pytest.raises(InvalidArchive, match=words):
        Archive(write(tmp_path / "a.tar", files))


def test_docker_manifest_that_names_what_is_not_there(tmp_path: Path) -> None:
    files = docker_files(tags=["a:1"])
    del files["layer0/layer.tar"]
    with pytest.raises(InvalidArchive, match=r"layer0/layer\.tar is missing, which manifest\.json names"):
        Archive(write(tmp_path / "a.tar", files))


def test_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    files = {"manifest.json": Link("gone.json")}
    with pytest.raises(
        InvalidArchive, match=r"manifest\.json is a link to gone\.json, which is no file of the archive"
    ):
        Archive(write(tmp_path / "a.tar", files))


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    files = {"manifest.json": Link("other.json"), "other.json": Link("manifest.json")}
    with pytest.raises(InvalidArchive, match=r"manifest\.json is a link to other\.json"):
        Archive(write(tmp_path / "a.tar", files))


def test_links_of_the_archive_do_not_leave_it(tmp_path: Path) -> None:
    files = docker_files(tags=["a:1"])
    files["layer0/layer.tar"] = Link("../../../../etc/passwd")
    with pytest.raises(InvalidArchive, match="which is no file of the archive"):
        Archive(write(tmp_path / "a.tar", files))


SIGNATURE = {
    "schemaVersion": 2,
    "artifactType": "application/vnd.example.signature",
    "layers": [],
}


def two_entries(kind: str) -> dict[str, Any]:
    """A good image, ``good:1``, and before it an entry that nobody asked for."""
    good = OciImage(layers=(tar({"good": b""}),))
    other = OciImage(architecture=OTHER if kind == "other platform" else good.architecture)
    entry = dict(other.manifest(), annotations={} if kind == "unnamed" else named("other:1"))
    if kind == "signature":
        entry = other.put("", as_json({**SIGNATURE, "config": other.put("", b"{}")}))
    good.blobs.update(other.blobs)
    return oci_files((good, {}), manifests=[entry, dict(good.manifest(), annotations=named("good:1"))])


OTHER_ENTRIES = [
    ("unnamed", "sha256:", "it has no name"),
    ("other platform", "other:1", f"the image is made for linux/{OTHER}, this host is"),
    ("signature", "sha256:", "is no image: its configuration has no rootfs"),
]


@pytest.mark.parametrize(("kind", "name", "reason"), OTHER_ENTRIES)
def test_what_is_not_for_this_host_is_passed_over(tmp_path: Path, kind: str, name: str, reason: str) -> None:
    with Archive(write(tmp_path / "a.tar", two_entries(kind))) as archive:
        assert [image.names for image in archive.images] == [("docker.io/library/good:1",)]
        (other,) = archive.passed_over
    assert other.name.startswith(name)
    assert reason in other.reason


@pytest.mark.parametrize("kind", [kind for kind, _, _ in OTHER_ENTRIES])
def test_a_name_is_given_to_the_one_that_fits(tmp_path: Path, kind: str) -> None:
    with Archive(write(tmp_path / "a.tar", two_entries(kind)), name="mine:1") as archive:
        (image,) = archive.images
        assert image.names == ("docker.io/library/mine:1",)
        assert b"".join(archive.chunks(image.layout.layers[0])) == tar({"good": b""})


def test_a_layer_of_what_is_passed_over_may_be_missing(tmp_path: Path) -> None:
    files = two_entries("unnamed")
    del files[f"blobs/sha256/{digest(tar({'hello': b'hello' + bytes([10])})).removeprefix('sha256:')}"]
    assert names(write(tmp_path / "a.tar", files)) == [("docker.io/library/good:1",)]


def test_two_images_of_a_docker_archive_of_which_one_is_for_another_platform(tmp_path: Path) -> None:
    files, others = docker_files(tags=["good:1"]), docker_files(tags=["other:1"], architecture=OTHER)
    table = [*json.loads(others.pop("manifest.json")), *json.loads(files["manifest.json"])]
    assert names(write(tmp_path / "a.tar", {**files, **others, "manifest.json": as_json(table)})) == [
        ("docker.io/library/good:1",)
    ]


def test_an_archive_of_signatures_alone_is_refused(tmp_path: Path) -> None:
    image = OciImage()
    entry = image.put("", as_json({**SIGNATURE, "config": image.put("", b"{}")}))
    with pytest.raises(InvalidArchive, match="is no image: its configuration has no rootfs"):
        Archive(write(tmp_path / "a.tar", oci_files((image, {}), manifests=[entry])))


def test_a_file_that_is_named_many_times_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = docker_files(tags=["a:1"], layers=[tar({"big": random.Random(1).randbytes(100_000)})])
    (entry,) = json.loads(files["manifest.json"])
    entry["Layers"] *= 500
    files["manifest.json"] = as_json([entry] * 100)
    path = write(tmp_path / "a.tar", files)
    read = 0
    real = Archive._read_chunks

    def counted(archive: Archive, member: Member) -> Iterator[bytes]:
        nonlocal read
        for chunk in real(archive, member):
            read += len(chunk)
            yield chunk

    monkeypatch.setattr(Archive, "_read_chunks", counted)
    with pytest.raises(InvalidArchive, match="has 500 layers, its configuration 1"):
        Archive(path)
    assert read < 3 * path.stat().st_size


def test_documents_of_an_archive_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "DOCUMENT_COUNT", 7)
    images = [(OciImage(layers=(tar({str(number): b""}),)), named(f"a:{number}")) for number in range(4)]
    with pytest.raises(InvalidArchive, match="more than 7 indexes, manifests and configurations belong to it"):
        Archive(write(tmp_path / "a.tar", oci_files(*images)))


def test_damage_of_a_layer_is_seen_when_it_is_read(tmp_path: Path) -> None:
    layer = tar({"big": b"a" * 5000})
    path = write_oci(tmp_path / "a.tar", layers=(layer,))
    path.write_bytes(path.read_bytes().replace(b"a" * 5000, b"a" * 4999 + b"b"))
    with Archive(path) as archive, pytest.raises(InvalidArchive, match=f"{digest(layer)} is damaged: its digest is"):
        list(archive.chunks(archive.images[0].layout.layers[0]))


def test_wrong_architecture(tmp_path: Path) -> None:
    with pytest.raises(WrongPlatform, match=f"made for linux/{OTHER}"):
        Archive(write_oci(tmp_path / "a.tar", architecture=OTHER))


def test_document_over_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "JSON_LIMIT", 100)
    with pytest.raises(InvalidArchive, match=r"index\.json has \d+ bytes"):
        Archive(write_oci(tmp_path / "a.tar"))


@pytest.mark.parametrize("make", [lambda: oci_files((OciImage(), named("a:1"))), lambda: docker_files(tags=["a:1"])])
def test_no_damage_brings_another_error(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    whole = write(tmp_path / "whole.tar", make()).read_bytes()
    chance = random.Random(46)
    path = tmp_path / "a.tar"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.randrange(len(damaged))] if chance.random() < 0.2 else damaged)
        try:
            Archive(path).close()
        except (InvalidArchive, WrongPlatform):
            refused += 1
    assert refused > 50
