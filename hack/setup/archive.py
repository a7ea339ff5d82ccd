"""An archive that is an OCI image layout and a docker-archive at once, over the same blobs.

containerd reads oci-layout and index.json (https://github.com/opencontainers/image-spec/blob/main/image-layout.md);
`docker load` reads manifest.json, whose paths may point anywhere, and so point into blobs/. Layers are plain tar files:
importing is then a copy and a hash, without inflating. The same layers and configuration give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# Every time in images and layers: fixed, so that the same inputs give the same digest.
EPOCH = 1767225600
CREATED = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class Layer:
    """An uncompressed tar file. ``digest`` is ``sha256:…`` of its bytes, and thus its diff id too."""

    path: Path
    created_by: str
    digest: str
    size: int


def layer(path: Path, created_by: str) -> Layer:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            hasher.update(chunk)
    return Layer(path, created_by, f"sha256:{hasher.hexdigest()}", path.stat().st_size)


def blob_path(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def write_archive(
    output: Path, name: str, architecture: str, layers: Sequence[Layer], config: Mapping[str, Any]
) -> None:
    """Writes the archive of one image, ``name`` with its tag, to ``output``. ``config`` is the image's own: User, Env, …"""
    platform = {"architecture": architecture, "os": "linux"}
    configuration = document(
        {
            **platform,
            "created": CREATED,
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
            "history": [{"created": CREATED, "created_by": layer.created_by} for layer in layers],
        }
    )
    manifest = document(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor(configuration, "application/vnd.oci.image.config.v1+json"),
            "layers": [
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar",
                    "digest": layer.digest,
                    "size": layer.size,
                }
                for layer in layers
            ],
        }
    )
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                **descriptor(manifest, "application/vnd.oci.image.manifest.v1+json"),
                "platform": platform,
                "annotations": {
                    "io.containerd.image.name": name,
                    "org.opencontainers.image.ref.name": name.rpartition(":")[2],
                },
            }
        ],
    }
    docker = [
        {
            "Config": blob_path(digest_of(configuration)),
            "RepoTags": [name],
            "Layers": [blob_path(layer.digest) for layer in layers],
        }
    ]
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        add(archive, "oci-layout", document({"imageLayoutVersion": "1.0.0"}))
        add(archive, "index.json", document(index))
        add(archive, "manifest.json", document(docker))
        add(archive, blob_path(digest_of(manifest)), manifest)
        add(archive, blob_path(digest_of(configuration)), configuration)
        for layer in layers:
            with layer.path.open("rb") as file:
                add_stream(archive, blob_path(layer.digest), file, layer.size)


def document(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def digest_of(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def descriptor(blob: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(blob), "size": len(blob)}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    add_stream(archive, name, io.BytesIO(content), len(content))


def add_stream(archive: tarfile.TarFile, name: str, content: BinaryIO, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mtime = EPOCH
    archive.addfile(member, content)
