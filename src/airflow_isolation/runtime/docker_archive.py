"""Image archives before dockerd sees them: whole, nameable, and made for this host.

dockerd writes what it has read of an archive to its store before it meets the archive's fault, and older ones (20.10)
don't know OCI archives. So the archive's table is read here first, and what dockerd needs of it is added to it.

Sources: Docker's image specification 1.2 (manifest.json), OCI image-spec 1.1 (index.json, manifest).
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_isolation.errors import ImageInvalid
from airflow_isolation.oci import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

_MAX_DOCUMENT = 20 * 1024 * 1024
_MAX_MEMBERS = 100_000
_CHUNK = 1024 * 1024
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class ArchiveImage:
    """One image of an archive: its names, and the members that hold its configuration and layers."""

    names: tuple[str, ...]
    config: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Archive:
    """``size`` is of what ``chunks`` sends."""

    images: tuple[ArchiveImage, ...]
    size: int
    chunks: Callable[[], Iterator[bytes]]


def read_archive(path: Path, *, architecture: str, reference: str = "") -> Archive:
    """Read the table of a docker or OCI archive, and say what to send to dockerd.

    :raises ImageInvalid: not an archive, truncated, without a name, for another architecture, or a document is broken.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            members = _members(archive, path)
            end = archive.offset
            images = _images(archive, members, architecture)
    except FileNotFoundError as error:
        raise ImageInvalid(f"there is no archive {path}") from error
    except IsADirectoryError as error:
        raise ImageInvalid(f"{path} is a directory, not an archive", hint="Give a tar file") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ImageInvalid(
            f"{path} is not an image archive, or a truncated one: {error}", hint="Make it or copy it again"
        ) from error
    if reference:
        if len(images) != 1:
            raise ImageInvalid(f"{path} holds {len(images)} images, so none can be given the name {reference}")
        images = (ArchiveImage((reference,), images[0].config, images[0].layers),)
    for image in images:
        if not image.names:
            raise ImageInvalid(f"an image in {path} has no name", hint="Give one with the import")
    table = _member("manifest.json", json.dumps([_table_entry(image) for image in images]).encode())

    def chunks() -> Iterator[bytes]:
        with tarfile.open(path, "r:*") as whole:
            source = whole.fileobj
            if source is None:
                raise ValueError("a tar file without a file")
            source.seek(0)
            left = end
            while left:
                chunk = source.read(min(left, _CHUNK))
                if not chunk:
                    raise ImageInvalid(f"{path} became shorter while it was read")
                left -= len(chunk)
                yield chunk
        # Unpacked last, it takes the place of a manifest.json that is there already.
        yield table + bytes(2 * _BLOCK)

    return Archive(images, end + len(table) + 2 * _BLOCK, chunks)


def _members(archive: tarfile.TarFile, path: Path) -> Mapping[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        if len(members) >= _MAX_MEMBERS:
            raise ImageInvalid(f"{path} holds more than {_MAX_MEMBERS} files")
        members[member.name.removeprefix("./")] = member
    return members


def _images(
    archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], architecture: str
) -> tuple[ArchiveImage, ...]:
    def read(name: str) -> bytes:
        member = members.get(name)
        if member is None:
            raise ImageInvalid(f"the archive has no {name}, which it names", hint="Make it or copy it again")
        if member.size > _MAX_DOCUMENT:
            raise ImageInvalid(f"{name} in the archive has {member.size} bytes: too large for a document")
        file = archive.extractfile(member)
        if file is None:
            raise ImageInvalid(f"{name} in the archive is not a file")
        return file.read()

    if "manifest.json" in members:
        images = _docker_images(_list(_document(read, "manifest.json"), "manifest.json"))
    elif "index.json" in members:
        images = tuple(_oci_images(read, architecture))
    else:
        raise ImageInvalid("the archive holds neither manifest.json nor index.json, so it is no image archive")
    if not images:
        raise ImageInvalid("the archive holds no image")
    for image in images:
        for layer in image.layers:
            if layer not in members:
                raise ImageInvalid(f"the archive lacks the layer {layer}", hint="Make it or copy it again")
        config = ImageConfig.parse(read(image.config))
        if (config.os, config.architecture) != ("linux", architecture):
            raise ImageInvalid(
                f"the image is made for {config.os}/{config.architecture}, this host is linux/{architecture}",
                hint="Use an image of this host's platform",
            )
    return images


def _docker_images(table: Sequence[Any]) -> tuple[ArchiveImage, ...]:
    return tuple(
        ArchiveImage(
            tuple(_texts(entry.get("RepoTags") or [], "RepoTags")),
            _text(entry.get("Config"), "Config"),
            tuple(_texts(entry.get("Layers") or [], "Layers")),
        )
        for entry in (_object(entry, "an entry of manifest.json") for entry in table)
    )


def _oci_images(read: Callable[[str], bytes], architecture: str) -> Iterator[ArchiveImage]:
    index = _object(_document(read, "index.json"), "index.json")
    for descriptor in _list(index.get("manifests"), "index.json"):
        named = _object(descriptor, "a manifest of index.json")
        manifest = _manifest(read, named, architecture)
        annotations = _object(named.get("annotations") or {}, "annotations")
        name = annotations.get("io.containerd.image.name") or annotations.get("org.opencontainers.image.ref.name")
        config = _object(manifest.get("config"), "config")
        yield ArchiveImage(
            (_text(name, "the name"),) if name else (),
            _blob(config),
            tuple(_blob(_object(layer, "a layer")) for layer in _list(manifest.get("layers"), "layers")),
        )


def _manifest(read: Callable[[str], bytes], descriptor: Mapping[str, Any], architecture: str) -> Mapping[str, Any]:
    document = _object(_document(read, _blob(descriptor)), "a manifest")
    if "manifests" not in document:
        return document
    # An index of platforms: one level, as every builder writes it.
    for entry in _list(document["manifests"], "an index"):
        child = _object(entry, "a manifest of an index")
        platform = _object(child.get("platform") or {}, "platform")
        if (platform.get("os"), platform.get("architecture")) == ("linux", architecture):
            return _object(_document(read, _blob(child)), "a manifest")
    raise ImageInvalid(
        f"the archive has no image for linux/{architecture}", hint="Use an image of this host's platform"
    )


def _blob(descriptor: Mapping[str, Any]) -> str:
    algorithm, _, digest = _text(descriptor.get("digest"), "digest").partition(":")
    if not (algorithm.isalnum() and digest.isalnum()):
        raise ImageInvalid("the archive is broken: a digest is none")
    return f"blobs/{algorithm}/{digest}"


def _table_entry(image: ArchiveImage) -> Mapping[str, Any]:
    return {"Config": image.config, "RepoTags": [_familiar(name) for name in image.names], "Layers": list(image.layers)}


def _familiar(name: str) -> str:
    # dockerd takes docker.io/library/x:1 as well, but wants a tag.
    last = name.rpartition("/")[2]
    return name if ":" in last or "@" in last else f"{name}:latest"


def _member(name: str, content: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    buffer = io.BytesIO()
    buffer.write(member.tobuf())
    buffer.write(content)
    buffer.write(bytes(-len(content) % _BLOCK))
    return buffer.getvalue()


def _document(read: Callable[[str], bytes], name: str) -> Any:
    try:
        return json.loads(read(name))
    except (ValueError, RecursionError) as error:
        raise ImageInvalid(f"{name} in the archive is not JSON: {error}") from error


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ImageInvalid(f"the archive is broken: {what} is not an object")
    return value


def _list(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ImageInvalid(f"the archive is broken: {what} holds no list")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ImageInvalid(f"the archive is broken: {what} is not text")
    return value


def _texts(value: Any, what: str) -> Sequence[str]:
    return [_text(entry, what) for entry in _list(value, what)]
