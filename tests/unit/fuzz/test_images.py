"""Images, archives, credentials: whatever the bytes are, an error of ours comes out, or nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from tests.containerd.image_archives import OciImage, as_json, docker_files, named, oci_files, tar
from tests.unit.fuzz.inputs import ODD_TEXT, almost, damaged, fuzzed

from airflow_isolation.containerd.archive import Archive
from airflow_isolation.containerd.credentials import credentials_for
from airflow_isolation.containerd.errors import ContainerdError, CredentialsError
from airflow_isolation.containerd.layout import Blob, Documents, Platform, resolve
from airflow_isolation.containerd.reference import Reference
from airflow_isolation.containerd.tar_file import list_members, open_tar
from airflow_isolation.errors import ImageInvalid
from airflow_isolation.oci import ImageConfig
from airflow_isolation.runtime.docker_archive import opened_archive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AMD64 = Platform("linux", "amd64")
LAYER = tar({"file": b"content"})
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "variant": "",
    "created": "2026-01-01T00:00:00.123456789Z",
    "config": {"Env": ["PATH=/bin"], "WorkingDir": "/", "User": "1000:100", "Labels": {"a": "b"}},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]},
}


@st.composite
def images(draw: st.DrawFn) -> tuple[OciImage, Blob]:
    """Index, manifest and configuration, each almost right, with digests that fit."""
    image = OciImage()
    config = image.put("application/vnd.oci.image.config.v1+json", as_json(draw(almost(CONFIG))))
    manifest = {
        "schemaVersion": 2,
        "config": config,
        "layers": [image.put("application/vnd.oci.image.layer.v1.tar", LAYER)],
    }
    listed = image.put("application/vnd.oci.image.manifest.v1+json", as_json(draw(almost(manifest))))
    listed["platform"] = {"os": "linux", "architecture": "amd64"}
    listed["annotations"] = named("fuzzed:1")
    index = image.put(
        "application/vnd.oci.image.index.v1+json", as_json(draw(almost({"schemaVersion": 2, "manifests": [listed]})))
    )
    return image, Blob(index["mediaType"], index["digest"], index["size"])


@fuzzed(images())
def test_an_image_in_a_store(made: tuple[OciImage, Blob]) -> None:
    image, target = made

    def read(blob: Blob) -> bytes:
        if blob.digest not in image.blobs:
            raise ContainerdError("not in this store")
        return image.blobs[blob.digest]

    with suppress(ContainerdError):
        assert resolve(Documents(read), target, AMD64).manifest.digest in image.blobs


@fuzzed(almost(CONFIG).map(as_json) | damaged(as_json(CONFIG)))
def test_an_image_s_configuration(content: bytes) -> None:
    with suppress(ImageInvalid):
        ImageConfig.parse(content)


@st.composite
def oci_archives(draw: st.DrawFn) -> bytes:
    image, _ = draw(images())
    digest, text = list(image.blobs.items())[-1]
    listed = {"mediaType": "", "digest": digest, "size": len(text), "annotations": named("fuzzed:1")}
    files: dict[str, Any] = oci_files((image, {}), manifests=[listed])
    files["index.json"] = as_json(draw(almost(json.loads(files["index.json"]))))
    return draw(damaged(tar(files)))


@st.composite
def docker_archives(draw: st.DrawFn) -> bytes:
    files = docker_files(tags=["fuzzed:1"], layers=[LAYER, LAYER], architecture="amd64")
    files["manifest.json"] = as_json(draw(almost(json.loads(files["manifest.json"]))))
    return draw(damaged(tar(files)))


@pytest.mark.parametrize("archives", [oci_archives, docker_archives])
def test_an_archive(tmp_path: Path, archives: Callable[[], st.SearchStrategy[bytes]]) -> None:
    @fuzzed(archives())
    def property_(content: bytes) -> None:
        (tmp_path / "a.tar").write_bytes(content)
        with suppress(ContainerdError), Archive(tmp_path / "a.tar", AMD64) as archive:
            for image in archive.images:
                for blob in image.layout.blobs():
                    assert sum(map(len, archive.chunks(blob))) == blob.size
        with suppress(ImageInvalid), opened_archive(tmp_path / "a.tar", architecture="amd64") as sent:
            assert sum(map(len, sent.chunks())) == sent.size

    property_()


SPARSE = ("major", "minor", "name", "realsize", "size", "map", "offset", "numbytes")
PAX_KEYS = st.sampled_from(
    ("path", "linkpath", "size", "mtime", "hdrcharset", *(f"GNU.sparse.{key}" for key in SPARSE))
)
PAX_VALUES = st.sampled_from(("", "0", "1", "-1", "1,2", "1,2,3", "BINARY", "a\0b", "9" * 50, "é")) | st.text(
    max_size=5
)


@st.composite
def pax_records(draw: st.DrawFn) -> bytes:
    key, value = draw(PAX_KEYS).encode(), draw(PAX_VALUES).encode("utf-8", "replace")
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length)))) + draw(st.sampled_from((0, 0, 0, -1, 1)))
    return b"%d %s=%s\n" % (length, key, value)


@st.composite
def tar_members(draw: st.DrawFn) -> bytes:
    """A header of any kind with a checksum that fits, and what may belong to it."""
    content = draw(st.lists(pax_records(), max_size=3).map(b"".join) | st.binary(max_size=600))
    entry = tarfile.TarInfo(draw(st.sampled_from(("file", "oci-layout", "index.json", "a/" * 60, ""))))
    entry.linkname = draw(st.sampled_from(("", "file", "index.json", "../..")))
    entry.type = draw(st.sampled_from([bytes([kind]) for kind in b"0\x0012567LKxgXSDVM"]))
    entry.size = draw(st.just(len(content)) | st.sampled_from((0, 1, 512, 1 << 20, 1 << 62, -1)))
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT)[: tarfile.BLOCKSIZE])
    # The maps of sparse files, in the old form.
    block[386:500] = draw(st.binary(min_size=114, max_size=114) | st.just(bytes(114)))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


@fuzzed(st.lists(tar_members(), max_size=5).map(b"".join), examples=150)
def test_headers_of_a_tar_file(content: bytes) -> None:
    with suppress(ContainerdError):
        list_members(io.BytesIO(content + bytes(2 * tarfile.BLOCKSIZE)), "a.tar")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_file(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    @fuzzed(damaged(pack(LAYER)) | damaged(pack(LAYER) * 2))
    def property_(content: bytes) -> None:
        (tmp_path / "a.tar").write_bytes(content)
        with suppress(ContainerdError):
            open_tar(str(tmp_path / "a.tar")).close()

    property_()


@fuzzed(st.text(max_size=40) | ODD_TEXT | st.from_regex(r"[a-z.]+(:[0-9]+)?/[a-z_/.-]+(:[a-z]*)?(@sha256:[0-9a-f]*)?"))
def test_a_name_of_an_image(text: str) -> None:
    with suppress(ContainerdError):
        assert str(Reference.parse(str(Reference.parse(text)))) == str(Reference.parse(text))


# One for each way to have credentials: the first that is found counts.
DOCKER_CONFIGS: tuple[Any, ...] = (
    {"auths": {"h.example": {"auth": "bWU6c2VjcmV0"}}},
    {"auths": {"https://h.example/v1/": {"identitytoken": "token"}}},
    {"auths": {"http://h.example": {"username": "me", "password": "secret"}}},
    {"credHelpers": {"h.example": "helper"}, "credsStore": ""},
    {"credsStore": "helper"},
)


@fuzzed(
    st.sampled_from(DOCKER_CONFIGS).flatmap(almost).map(as_json)
    | st.sampled_from(DOCKER_CONFIGS).map(as_json).flatmap(damaged),
    examples=200,
)
def test_a_docker_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with suppress(CredentialsError):
        # No helper is on this PATH.
        found = credentials_for("h.example", environment={"DOCKER_CONFIG": str(tmp_path), "PATH": str(tmp_path)})
        if found is not None:
            assert f"{found.username}{found.secret}".encode()
