"""Image archives made byte by byte, whole or broken, for tests of whoever reads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd.layout import Platform

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

HOST = Platform.of_this_host()
OTHER = "arm64" if HOST.architecture != "arm64" else "amd64"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True)
class Link:
    """A symbolic link, in a layer or in the archive itself."""

    target: str


@dataclass(frozen=True)
class Fifo:
    """A named pipe in a layer."""


def digest(text: bytes) -> str:
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def tar(files: Mapping[str, bytes | Link | Fifo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode = 0o755
            if isinstance(content, Link):
                entry.type, entry.linkname = tarfile.SYMTYPE, content.target
                archive.addfile(entry)
            elif isinstance(content, Fifo):
                entry.type = tarfile.FIFOTYPE
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def zstd(text: bytes) -> bytes:
    return subprocess.run(["zstd", "-c"], input=text, stdout=subprocess.PIPE, check=True).stdout


PACKERS: Mapping[str, Callable[[bytes], bytes]] = {"": bytes, "gzip": gzip.compress, "zstd": zstd}


@dataclass
class OciImage:
    """An image of an OCI layout: ``layers`` are tar files, each packed as ``packing`` says (the last one repeats)."""

    layers: Sequence[bytes] = (tar({"hello": b"hello\n"}),)
    packing: Sequence[str] = ("",)
    architecture: str = HOST.architecture
    blobs: dict[str, bytes] = field(default_factory=dict)
    diff_ids: Sequence[str] = ()

    def put(self, media_type: str, text: bytes) -> dict[str, Any]:
        self.blobs[digest(text)] = text
        return {"mediaType": media_type, "digest": digest(text), "size": len(text)}

    def manifest(self) -> dict[str, Any]:
        """Its descriptor; the blobs are put."""
        layers = []
        for number, layer in enumerate(self.layers):
            packing = self.packing[min(number, len(self.packing) - 1)]
            layers.append(self.put(f"{OCI_LAYER}+{packing}" if packing else OCI_LAYER, PACKERS[packing](layer)))
        config = {
            "architecture": self.architecture,
            "os": "linux",
            "config": {"Env": ["GREETING=hello"]},
            "rootfs": {"type": "layers", "diff_ids": list(self.diff_ids or map(digest, self.layers))},
        }
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.put("application/vnd.oci.image.config.v1+json", as_json(config)),
            "layers": layers,
        }
        return self.put("application/vnd.oci.image.manifest.v1+json", as_json(document))


def oci_files(
    *images: tuple[OciImage, Mapping[str, str]], manifests: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, bytes]:
    """An OCI layout's files; each image has annotations. ``manifests`` replaces what index.json lists."""
    listed = [dict(image.manifest(), annotations=dict(annotations)) for image, annotations in images]
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}
    for image, _ in images:
        files.update({f"blobs/sha256/{name.removeprefix('sha256:')}": text for name, text in image.blobs.items()})
    index = {"schemaVersion": 2, "manifests": listed if manifests is None else list(manifests)}
    return {**files, "index.json": as_json(index)}


def named(name: str) -> dict[str, str]:
    return {"io.containerd.image.name": name}


def docker_files(*, tags: Sequence[str] | None, layers: Sequence[bytes] = (), architecture: str = "") -> dict[str, Any]:
    """What ``docker save`` wrote before version 25, with a symbolic link for a layer that repeats."""
    chosen = list(layers or (tar({"hello": b"hello\n"}),))
    config = as_json(
        {
            "architecture": architecture or HOST.architecture,
            "os": "linux",
            "config": {"Env": ["GREETING=hello"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in chosen]},
        }
    )
    files: dict[str, Any] = {}
    seen: dict[bytes, str] = {}
    names = []
    for number, layer in enumerate(chosen):
        name = f"layer{number}/layer.tar"
        files[name] = Link(f"../{seen[layer]}") if layer in seen else layer
        seen.setdefault(layer, name)
        names.append(name)
    config_name = f"{digest(config).removeprefix('sha256:')}.json"
    files[config_name] = config
    files["manifest.json"] = as_json([{"Config": config_name, "RepoTags": tags, "Layers": names}])
    return files


def write(path: Path, files: Mapping[str, Any]) -> Path:
    path.write_bytes(tar(files))
    return path


def write_oci(path: Path, *names: str, **image: Any) -> Path:
    """An archive with one image under each name, in the usual form."""
    one = OciImage(**image)
    return write(path, oci_files(*((one, named(name)) for name in names or ("test/image:1",))))
