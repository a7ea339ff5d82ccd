"""Archives that somebody else made: their table is read before dockerd sees them."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.errors import ImageInvalid
from airflow_isolation.runtime.docker_archive import read_archive

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "architecture": "amd64",
    "os": "linux",
    "config": {},
    "rootfs": {"type": "layers", "diff_ids": []},
}
TABLE: list[dict[str, Any]] = [{"Config": "config.json", "RepoTags": ["sales:1"], "Layers": ["layer.tar"]}]


def archive(path: Path, mode: str = "w", **members: Any) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name.replace("__", "/").replace("_", "."))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sent(path: Path, **settings: str) -> dict[str, bytes]:
    """What dockerd would unpack: a later member takes the place of an earlier one."""
    whole = read_archive(path, architecture="amd64", **settings)
    data = b"".join(whole.chunks())
    assert len(data) == whole.size
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_docker_archive_is_sent_whole(tmp_path: Path, mode: str) -> None:
    members = sent(archive(tmp_path / "a", mode, manifest_json=TABLE, config_json=CONFIG, layer_tar=b"layer"))
    assert members["layer.tar"] == b"layer"
    assert json.loads(members["manifest.json"]) == TABLE


def test_a_name_given_replaces_the_archives(tmp_path: Path) -> None:
    path = archive(tmp_path / "a", manifest_json=TABLE, config_json=CONFIG, layer_tar=b"layer")
    assert json.loads(sent(path, reference="other")["manifest.json"])[0]["RepoTags"] == ["other:latest"]


BROKEN: list[dict[str, Any]] = [
    {},
    {"manifest_json": b"{"},
    {"manifest_json": b"[" * 100_000},
    {"manifest_json": {}},
    {"manifest_json": []},
    {"manifest_json": [1]},
    {"manifest_json": [{"Config": 1}]},
    {"manifest_json": [{**TABLE[0], "RepoTags": None}], "config_json": CONFIG, "layer_tar": b""},
    {"manifest_json": TABLE, "config_json": CONFIG},
    {"manifest_json": TABLE, "layer_tar": b""},
    {"manifest_json": TABLE, "config_json": {**CONFIG, "architecture": "riscv64"}, "layer_tar": b""},
    {"manifest_json": TABLE, "config_json": [], "layer_tar": b""},
    {"index_json": {"manifests": [{"digest": "sha256:../../etc/passwd"}]}},
    {"index_json": {"manifests": 7}},
]


@pytest.mark.parametrize("members", BROKEN)
def test_a_broken_table_is_invalid(tmp_path: Path, members: dict[str, Any]) -> None:
    with pytest.raises(ImageInvalid):
        read_archive(archive(tmp_path / "a", **members), architecture="amd64")
