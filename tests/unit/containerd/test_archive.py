from __future__ import annotations

import bz2
import gzip
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
from airflow_isolation.containerd.archive import Archive
from airflow_isolation.containerd.errors import InvalidArchive, WrongPlatform

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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
    assert names(write(tmp_path / "a.tar", docker_files(tags=None))) == [()]


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
        assert archive.place(layout.manifest) is None


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


def test_links_of_the_archive_do_not_leave_it(tmp_path: Path) -> None:
    files = docker_files(tags=["a:1"])
    files["layer0/layer.tar"] = Link("../../../../etc/passwd")
    with pytest.raises(InvalidArchive, match="is missing"):
        Archive(write(tmp_path / "a.tar", files))


def test_wrong_architecture(tmp_path: Path) -> None:
    with pytest.raises(WrongPlatform, match=f"made for linux/{OTHER}"):
        Archive(write_oci(tmp_path / "a.tar", architecture=OTHER))


def test_document_over_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "JSON_LIMIT", 100)
    with pytest.raises(InvalidArchive, match=r"index\.json has \d+ bytes"):
        Archive(write_oci(tmp_path / "a.tar"))


def test_header_that_claims_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    # A pax header (type x) says how large it is, and tarfile would read that much at once.
    whole = bytearray(tar({"hello": b""}))
    whole[156:157] = b"x"
    whole[124:136] = b"%011o\0" % (1 << 30)
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    (tmp_path / "a.tar").write_bytes(bytes(whole))
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(2 << 30)
    with pytest.raises(InvalidArchive, match="a header of 1073741824 bytes"):
        Archive(tmp_path / "a.tar")


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MEMBER_LIMIT", 3)
    with pytest.raises(InvalidArchive, match="has more than 3 files"):
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
