"""Image archives made from another: the same base layer, with a small layer and a configuration of the test's own."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

from airflow_isolation.container_spec import NO_STRINGS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

MIB = 1024 * 1024


def derived(
    base: Path,
    output: Path,
    *,
    name: str,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    links: Mapping[str, str] = NO_STRINGS,
    owned: Iterable[tuple[str, int]] = (),
    set_id: Iterable[str] = (),
) -> Path:
    """``base`` (an archive of hack/build-image) with ``files`` and symbolic ``links`` as one more layer and ``config`` over its own.

    ``owned``: of the user airflow, with these modes; a directory where there is no such file. ``set_id``: files that run as
    root, whoever starts them.
    """
    with tarfile.open(base) as source, tarfile.open(output, "w") as archive:
        entry = json.load(_open(source, "manifest.json"))[0]
        document = json.load(_open(source, entry["Config"]))
        layer = _layer(files, links, dict(owned), set(set_id))
        document["config"].update(config)
        document["rootfs"]["diff_ids"].append(_digest(layer))
        document["history"].append({"created_by": "conformance"})
        old = json.load(_open(source, "index.json"))["manifests"][0]
        manifest = json.load(_open(source, _path(old["digest"])))
        below = manifest["layers"]
        blobs = [json.dumps(document).encode(), layer]
        manifest["config"].update(digest=_digest(blobs[0]), size=len(blobs[0]))
        manifest["layers"] = [
            *below,
            {"mediaType": below[0]["mediaType"], "digest": _digest(layer), "size": len(layer)},
        ]
        blobs.append(json.dumps(manifest).encode())
        index = {
            "schemaVersion": 2,
            "manifests": [
                {
                    "mediaType": old["mediaType"],
                    "digest": _digest(blobs[2]),
                    "size": len(blobs[2]),
                    "annotations": {"io.containerd.image.name": name},
                }
            ],
        }
        table = [
            {
                "Config": _path(_digest(blobs[0])),
                "RepoTags": [name],
                "Layers": [_path(layer["digest"]) for layer in manifest["layers"]],
            }
        ]
        _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(archive, "index.json", json.dumps(index).encode())
        _add(archive, "manifest.json", json.dumps(table).encode())
        for blob in blobs:
            _add(archive, _path(_digest(blob)), blob)
        for descriptor in below:
            member = source.getmember(_path(descriptor["digest"]))
            archive.addfile(member, source.extractfile(member))
    return output


def without(base: Path, output: Path, *names: str) -> Path:
    """``base`` lacking the members with these names."""
    with tarfile.open(base) as source, tarfile.open(output, "w") as archive:
        for member in source:
            if member.name not in names:
                archive.addfile(member, source.extractfile(member))
    return output


def merged(one: Path, other: Path, output: Path) -> Path:
    """An OCI archive with the images of both."""
    manifests, seen = [], {"index.json", "manifest.json"}
    with tarfile.open(output, "w") as archive:
        for base in (one, other):
            with tarfile.open(base) as source:
                manifests += json.load(_open(source, "index.json"))["manifests"]
                for member in source:
                    if member.name not in seen:
                        archive.addfile(member, source.extractfile(member))
                        seen.add(member.name)
        _add(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())
    return output


def truncated(base: Path, output: Path, size: int) -> Path:
    """The first ``size`` bytes of ``base``."""
    with base.open("rb") as source:
        output.write_bytes(source.read(size))
    return output


def _layer(
    files: Mapping[str, bytes], links: Mapping[str, str], owned: Mapping[str, int], set_id: Collection[str]
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for name, mode in owned.items():
            if name not in files:
                directory = tarfile.TarInfo(name)
                directory.type, directory.mode, directory.uid, directory.gid = tarfile.DIRTYPE, mode, 50000, 0
                layer.addfile(directory)
        for name, content in files.items():
            mode = 0o4755 if name in set_id else owned.get(name, 0o755)
            _add(layer, name, content, mode=mode, uid=50000 if name in owned else 0)
        for name, leads_to in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, leads_to
            layer.addfile(link)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes, *, mode: int = 0o644, uid: int = 0) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = mode
    member.uid = uid
    archive.addfile(member, io.BytesIO(content))


def _open(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    file = archive.extractfile(name)
    assert file is not None
    return io.BytesIO(file.read())


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"
