"""hack/setup/archive.py: one archive that is an OCI layout and a docker-archive."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAME = "localhost/airflow-isolation/some:1"


@pytest.fixture(scope="module")
def archive_module() -> Any:
    spec = importlib.util.spec_from_file_location("archive", ROOT / "hack/setup/archive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["archive"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(archive_module: Any, tmp_path: Path) -> dict[str, bytes]:
    """What the archive of a two-layer image holds."""
    return contents(build(archive_module, tmp_path, tmp_path / "image.tar"))


def build(archive_module: Any, directory: Path, output: Path) -> Path:
    layers = []
    for name in ("one", "two"):
        path = directory / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
        layers.append(archive_module.layer(path, f"made {name}"))
    archive_module.write_archive(output, NAME, "amd64", layers, {"User": "airflow"})
    return output


def contents(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_blobs_are_named_by_their_digest(files: dict[str, bytes]) -> None:
    blobs = {name: content for name, content in files.items() if name.startswith("blobs/")}
    assert len(blobs) == 4
    assert all(name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}" for name, content in blobs.items())


def test_both_formats_name_the_same_blobs(files: dict[str, bytes]) -> None:
    index = json.loads(files["index.json"])
    manifest = json.loads(files[path_of(index["manifests"][0])])
    docker = json.loads(files["manifest.json"])[0]
    assert docker["Config"] == path_of(manifest["config"])
    assert docker["Layers"] == [path_of(layer) for layer in manifest["layers"]]
    assert docker["RepoTags"] == [NAME]


def test_the_index_carries_the_name_for_containerd(files: dict[str, bytes]) -> None:
    annotations = json.loads(files["index.json"])["manifests"][0]["annotations"]
    assert annotations == {"io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "1"}


def test_diff_ids_are_the_digests_of_the_plain_layers(files: dict[str, bytes]) -> None:
    manifest = json.loads(files[path_of(json.loads(files["index.json"])["manifests"][0])])
    config = json.loads(files[path_of(manifest["config"])])
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert len(config["history"]) == 2
    assert config["config"] == {"User": "airflow"}


def test_the_same_inputs_give_the_same_bytes(archive_module: Any, tmp_path: Path) -> None:
    first = build(archive_module, tmp_path, tmp_path / "first.tar").read_bytes()
    assert build(archive_module, tmp_path, tmp_path / "second.tar").read_bytes() == first


def path_of(descriptor: dict[str, str]) -> str:
    return "blobs/" + descriptor["digest"].replace(":", "/")
