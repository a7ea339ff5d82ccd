"""Archives that somebody else made: what of them is sent to dockerd."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from tests.containerd.image_archives import OciImage, as_json, digest, docker_files, named, oci_files, tar, write

from airflow_isolation.containerd import layout
from airflow_isolation.errors import ImageInvalid
from airflow_isolation.runtime.docker_archive import opened_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

LAYER = tar({"file": b"content"})


def oci(*, architecture: str = "amd64", **annotations: str) -> dict[str, Any]:
    return oci_files((OciImage(layers=(LAYER,), architecture=architecture), annotations or named("sales:1")))


def docker(tags: list[str] | None = None) -> dict[str, Any]:
    return docker_files(tags=tags or ["sales:1"], layers=(LAYER, LAYER), architecture="amd64")


def sent(path: Path, **settings: str) -> dict[str, bytes]:
    """What dockerd unpacks."""
    with opened_archive(path, architecture="amd64", **settings) as archive:
        data = b"".join(archive.chunks())
        assert len(data) == archive.size
    with tarfile.open(fileobj=io.BytesIO(data)) as whole:
        return {member.name: whole.extractfile(member).read() for member in whole}  # type: ignore[union-attr]


def table(members: Mapping[str, bytes]) -> dict[str, Any]:
    (entry,) = json.loads(members["manifest.json"])
    return dict(entry)


@pytest.mark.parametrize("make", [oci, docker])
def test_dockerd_gets_the_image_in_its_own_form(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    members = sent(write(tmp_path / "a.tar", make()))

    entry = table(members)
    assert entry["RepoTags"] == ["docker.io/library/sales:1"]
    assert json.loads(members[entry["Config"]])["rootfs"]["diff_ids"] == [digest(LAYER)] * len(entry["Layers"])
    assert [members[name] for name in entry["Layers"]] == [LAYER] * len(entry["Layers"])


def test_dockerd_gets_nothing_else(tmp_path: Path) -> None:
    members = sent(write(tmp_path / "a.tar", {**oci(), "else": b"where", "blobs/sha256/else": b"where"}))
    entry = table(members)
    assert set(members) == {"manifest.json", entry["Config"], *entry["Layers"]}


def test_a_name_given_replaces_the_archives(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", oci())
    assert table(sent(path, reference="other"))["RepoTags"] == ["docker.io/library/other:latest"]


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("sales", "sales:latest"),
        ("team/sales:1", "team/sales:1"),
        ("docker.io/library/sales:1", "sales:1"),
        ("localhost/library/sales:1", "localhost/library/sales:1"),
        ("docker.io/library/team/sales:1", "library/team/sales:1"),
    ],
)
def test_names_are_those_that_dockerd_lists(tmp_path: Path, name: str, listed: str) -> None:
    path = write(tmp_path / "a.tar", oci(**named(name)))
    with opened_archive(path, architecture="amd64") as archive:
        assert archive.names == (listed,)


def test_an_image_below_an_index_that_names_no_platform(tmp_path: Path) -> None:
    image = OciImage(layers=(LAYER,), architecture="amd64")
    index = image.put("application/vnd.oci.image.index.v1+json", as_json({"manifests": [image.manifest()]}))
    listed = [dict(index, annotations=named("sales:1"))]
    entry = table(sent(write(tmp_path / "a.tar", oci_files((image, {}), manifests=listed))))
    assert entry["RepoTags"] == ["docker.io/library/sales:1"]


def test_what_is_for_another_platform_is_passed_over(tmp_path: Path) -> None:
    ours, other = OciImage(layers=(LAYER,), architecture="amd64"), OciImage(architecture="riscv64")
    path = write(tmp_path / "a.tar", oci_files((other, named("other:1")), (ours, named("sales:1"))))
    with opened_archive(path, architecture="amd64") as archive:
        assert archive.names == ("sales:1",)
        assert [one.name for one in archive.passed_over] == ["other:1"]


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({}, "holds neither an OCI layout"),
    ({"manifest.json": b"{"}, "is not valid JSON"),
    (oci(architecture="riscv64"), "made for linux/riscv64, this host is linux/amd64"),
    (oci(**named("Not A Name")), "image name 'Not A Name'"),
    (oci(unnamed="yes"), "has no name"),
]


@pytest.mark.parametrize(("members", "words"), BROKEN)
def test_what_can_not_be_imported_is_invalid(tmp_path: Path, members: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageInvalid, match=words), opened_archive(write(tmp_path / "a", members), architecture="amd64"):
        pass


def test_a_configuration_that_no_container_could_have_is_invalid(tmp_path: Path) -> None:
    files = docker()
    (entry,) = json.loads(files["manifest.json"])
    files[entry["Config"]] = files[entry["Config"]].replace(b"GREETING=hello", b"=hello")
    path = write(tmp_path / "a", files)
    with pytest.raises(ImageInvalid, match="Env holds an entry without a name"):
        sent(path)


def test_what_is_looked_at_is_bounded_as_for_containerd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "DOCUMENT_COUNT", 10)
    image = OciImage(architecture="riscv64")
    inner = image.manifest()
    for _ in range(20):
        index = as_json({"manifests": [inner] * 100})
        inner = image.put("application/vnd.oci.image.index.v1+json", index)
    path = write(tmp_path / "a", oci_files((image, {}), manifests=[dict(inner, annotations=named("sales:1"))]))
    with pytest.raises(ImageInvalid, match="more than 10 indexes, manifests and configurations belong to it"):
        sent(path)


def test_a_damaged_layer_does_not_reach_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", oci())
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT"))
    with pytest.raises(ImageInvalid, match="is damaged: its digest is"):
        sent(path)
