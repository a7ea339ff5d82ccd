"""Reading an image archive: an OCI layout in a tar file, or what ``docker save`` writes.

Nothing is unpacked and nothing is trusted: sizes are bounded, digests are checked, and what an image needs is known
to be there before a daemon hears of it. Of an archive with both an OCI index and a docker manifest (docker 25 and
later) the OCI side counts, as in containerd; the docker side then only lends its names.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from airflow_isolation.containerd import blobs, layout
from airflow_isolation.containerd.errors import InvalidArchive, InvalidImage, InvalidReference
from airflow_isolation.containerd.layout import JSON_LIMIT, Blob, Layout, Platform
from airflow_isolation.containerd.reference import normalised

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

CONTAINERD_NAME = "io.containerd.image.name"
OCI_NAME = "org.opencontainers.image.ref.name"

# A tar header of more than this is an attack: pax headers hold a path and a few times.
HEADER_LIMIT = 1 << 20
MEMBER_LIMIT = 100_000

_OPENERS: Mapping[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """``names`` are whole ones; ``target`` is what they shall stand for; ``layout`` is this host's image in it."""

    names: tuple[str, ...]
    target: Blob
    layout: Layout


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies in the archive."""

    offset: int
    size: int


class Archive:
    """An open archive. ``images`` is what it holds for ``platform``.

    :raises InvalidArchive: not an archive, truncated, damaged, or without an image.
    :raises WrongPlatform: it holds nothing for ``platform``.
    """

    def __init__(self, path: str | os.PathLike[str], platform: Platform | None = None) -> None:
        self.path = str(path)
        self._platform = platform or Platform.of_this_host()
        # Documents that are not in the archive but follow from it, by digest.
        self._made: dict[str, bytes] = {}
        self._places: dict[str, Member] = {}
        with ExitStack() as undo:
            self.file = undo.enter_context(self._open())
            self._members = self._list_members()
            self.images = self._find_images()
            self._undo = undo.pop_all()

    def chunks(self, blob: Blob) -> Iterator[bytes]:
        """A blob's bytes.

        :raises InvalidArchive: fewer than there should be.
        """
        if blob.digest in self._made:
            yield self._made[blob.digest]
            return
        member = self._places[blob.digest]
        self.file.seek(member.offset)
        left = member.size
        while left:
            chunk = self.file.read(min(blobs.CHUNK, left))
            if not chunk:
                raise self._truncated()
            left -= len(chunk)
            yield chunk

    def made(self) -> Mapping[str, bytes]:
        """Documents by digest that the images need and the archive does not hold: a docker archive has no manifests."""
        return self._made

    def place(self, blob: Blob) -> Member | None:
        """Where the blob lies, None for one that is ``made``."""
        return self._places.get(blob.digest)

    def close(self) -> None:
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the tar file ------------------------------------------------------------------------------------------

    def _open(self) -> IO[bytes]:
        """The tar file itself; a compressed one is decompressed into a nameless file first."""
        try:
            file = open(self.path, "rb")  # noqa: PTH123, SIM115
        except FileNotFoundError as error:
            raise InvalidArchive(f"there is no file {self.path}") from error
        except OSError as error:
            raise InvalidArchive(f"{self.path} can't be read: {error.strerror}") from error
        with ExitStack() as undo:
            undo.callback(file.close)
            try:
                magic = file.read(8)
            except IsADirectoryError as error:
                raise InvalidArchive(f"{self.path} is a directory", hint="Give a tar file") from error
            file.seek(0)
            if not magic:
                raise InvalidArchive(f"{self.path} is empty")
            if magic.startswith(_ZSTD):
                raise InvalidArchive(f"{self.path} is compressed with zstd", hint="Decompress it first: zstd -d")
            opener = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
            if opener is None:
                undo.pop_all()
                return file
            plain = undo.enter_context(tempfile.TemporaryFile())
            try:
                with opener(file) as decompressed:
                    shutil.copyfileobj(decompressed, plain, blobs.CHUNK)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
                raise InvalidArchive(f"{self.path} is truncated or damaged: {error}") from error
            plain.seek(0)
            undo.pop_all()
            file.close()
            return plain

    def _list_members(self) -> dict[str, Member]:
        """Every file by its normalised path; links inside the archive are followed (docker save before 1.10)."""
        members: dict[str, Member] = {}
        links: dict[str, str] = {}
        if len(self.file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise InvalidArchive(f"{self.path} is not a tar archive: it is too short for one")
        self.file.seek(0)
        try:
            with tarfile.open(fileobj=cast("IO[bytes]", BoundedReader(self.file)), mode="r:") as tar:
                for count, entry in enumerate(tar):
                    if count >= MEMBER_LIMIT:
                        raise InvalidArchive(f"{self.path} has more than {MEMBER_LIMIT} files: not an image archive")
                    name = posixpath.normpath(entry.name)
                    if entry.issym():
                        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.linkname))
                    elif entry.islnk():
                        links[name] = posixpath.normpath(entry.linkname)
                    elif entry.isreg() and not entry.issparse():
                        members[name] = Member(entry.offset_data, entry.size)
        except tarfile.ReadError as error:
            if "unexpected end" in str(error) or "truncated" in str(error):
                raise self._truncated() from error
            raise InvalidArchive(f"{self.path} is not a tar archive: {error}") from error
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise InvalidArchive(f"{self.path} is not a readable tar archive: {error}") from error
        self.file.seek(0, 2)
        end = self.file.tell()
        if any(member.offset + member.size > end for member in members.values()):
            raise self._truncated()
        for name, target in links.items():
            if target in members:
                members.setdefault(name, members[target])
        return members

    def _truncated(self) -> InvalidArchive:
        return InvalidArchive(f"{self.path} is truncated", hint="Copy or build the archive again")

    def _read_member(self, name: str) -> bytes:
        member = self._members[name]
        if member.size > JSON_LIMIT:
            raise InvalidArchive(f"{self.path}: {name} has {member.size} bytes, more than such a document may have")
        self.file.seek(member.offset)
        text = self.file.read(member.size)
        if len(text) != member.size:
            raise self._truncated()
        return text

    # --- the images --------------------------------------------------------------------------------------------

    def _find_images(self) -> tuple[ArchivedImage, ...]:
        try:
            if "oci-layout" in self._members and "index.json" in self._members:
                return self._oci_images()
            if "manifest.json" in self._members:
                return self._docker_images()
        except InvalidImage as error:
            raise InvalidArchive(f"{self.path}: {error.detail}") from error
        raise InvalidArchive(
            f"{self.path} is a tar file, but not an image archive: it holds neither an OCI layout "
            "(oci-layout, index.json) nor docker's manifest.json"
        )

    def _oci_images(self) -> tuple[ArchivedImage, ...]:
        index = self._parsed("index.json")
        tags = self._docker_tags()
        images: dict[Blob, ArchivedImage] = {}
        for target in layout.descriptors(index, "manifests", Blob("", "index.json", 0)):
            image = layout.resolve(self._read_blob, target, self._platform)
            for layer in image.layers:
                self._find_blob(layer)
            names = self._annotated_names(target) or tags.get(image.config.digest, ())
            before = images[target].names if target in images else ()
            # The names are the record's; the annotations have done their work.
            plain = Blob(target.media_type or image.manifest.media_type, target.digest, target.size)
            images[target] = ArchivedImage(tuple(dict.fromkeys((*before, *names))), plain, image)
        return self._some(tuple(images.values()))

    def _annotated_names(self, target: Blob) -> tuple[str, ...]:
        for key in (CONTAINERD_NAME, OCI_NAME):
            if target.annotations.get(key):
                return (self._name(target.annotations[key]),)
        return ()

    def _docker_tags(self) -> dict[str, tuple[str, ...]]:
        """The names that docker's manifest.json gives, by the digest of the image's configuration."""
        if "manifest.json" not in self._members:
            return {}
        tags = {}
        for entry in self._docker_manifest():
            config = entry.get("Config")
            if isinstance(config, str) and posixpath.normpath(config) in self._members:
                digest = sha256(self._read_member(posixpath.normpath(config)))
                tags[digest] = tuple(map(self._name, strings(entry.get("RepoTags"))))
        return tags

    def _docker_images(self) -> tuple[ArchivedImage, ...]:
        images = []
        for entry in self._docker_manifest():
            config_name = entry.get("Config")
            if not isinstance(config_name, str):
                raise InvalidArchive(f"{self.path}: manifest.json names no configuration")
            config = self._placed(layout.DOCKER_CONFIG, self._existing(config_name))
            layers = [self._docker_layer(self._existing(name)) for name in strings(entry.get("Layers"))]
            manifest = self._make_manifest(config, layers)
            image = layout.resolve(self._read_blob, manifest, self._platform)
            images.append(ArchivedImage(tuple(map(self._name, strings(entry.get("RepoTags")))), manifest, image))
        return self._some(tuple(images))

    def _docker_manifest(self) -> list[dict[str, Any]]:
        manifest = self._parsed("manifest.json", kind=list)
        if not all(isinstance(entry, dict) for entry in manifest):
            raise InvalidArchive(f"{self.path}: manifest.json is not a list of objects")
        return list(manifest)

    def _docker_layer(self, name: str) -> Blob:
        member = self._members[name]
        self.file.seek(member.offset)
        packed = self.file.read(2) == b"\x1f\x8b"
        return self._placed(layout.DOCKER_LAYER_GZIP if packed else layout.DOCKER_LAYER, name)

    def _make_manifest(self, config: Blob, layers: Sequence[Blob]) -> Blob:
        def as_descriptor(blob: Blob) -> dict[str, Any]:
            return {"mediaType": blob.media_type, "size": blob.size, "digest": blob.digest}

        text = blobs.as_json(
            {
                "schemaVersion": 2,
                "mediaType": layout.DOCKER_MANIFEST,
                "config": as_descriptor(config),
                "layers": [as_descriptor(layer) for layer in layers],
            }
        )
        digest = sha256(text)
        self._made[digest] = text
        return Blob(layout.DOCKER_MANIFEST, digest, len(text))

    def _placed(self, media_type: str, name: str) -> Blob:
        """The file as a blob; its digest has to be computed, docker's file names don't tell."""
        member = self._members[name]
        self.file.seek(member.offset)
        digest = hashlib.sha256()
        left = member.size
        while left:
            chunk = self.file.read(min(blobs.CHUNK, left))
            if not chunk:
                raise self._truncated()
            digest.update(chunk)
            left -= len(chunk)
        name = f"sha256:{digest.hexdigest()}"
        self._places[name] = member
        return Blob(media_type, name, member.size)

    def _find_blob(self, blob: Blob) -> Member:
        algorithm, _, encoded = blob.digest.partition(":")
        member = self._members.get(f"blobs/{algorithm}/{encoded}")
        if member is None:
            raise InvalidArchive(f"{self.path}: the blob {blob.digest} is missing")
        if member.size != blob.size:
            raise InvalidArchive(f"{self.path}: the blob {blob.digest} has {member.size} bytes instead of {blob.size}")
        self._places[blob.digest] = member
        return member

    def _read_blob(self, blob: Blob) -> bytes:
        """An index, manifest or configuration, checked against its digest."""
        if blob.digest in self._made:
            return self._made[blob.digest]
        member = self._places.get(blob.digest) or self._find_blob(blob)
        if member.size > JSON_LIMIT:
            raise InvalidArchive(f"{self.path}: {blob.digest} has {member.size} bytes, too large for a document")
        self.file.seek(member.offset)
        text = self.file.read(member.size)
        if sha256(text) != blob.digest:
            raise InvalidArchive(f"{self.path}: the blob {blob.digest} is damaged: its digest is {sha256(text)}")
        return text

    def _existing(self, name: str) -> str:
        path = posixpath.normpath(name)
        if path not in self._members:
            raise InvalidArchive(f"{self.path}: {name} is missing, which manifest.json names")
        return path

    def _parsed(self, name: str, kind: type[Any] = dict) -> Any:
        try:
            document = json.loads(self._read_member(name))
        except (ValueError, RecursionError) as error:
            raise InvalidArchive(f"{self.path}: {name} is not valid JSON: {error}") from error
        if not isinstance(document, kind):
            raise InvalidArchive(f"{self.path}: {name} is not a JSON {'list' if kind is list else 'object'}")
        return document

    def _name(self, name: str) -> str:
        try:
            return normalised(name)
        except InvalidReference as error:
            raise InvalidArchive(f"{self.path}: {error.detail}") from error

    def _some(self, images: tuple[ArchivedImage, ...]) -> tuple[ArchivedImage, ...]:
        if not images:
            raise InvalidArchive(f"{self.path} is an image archive without an image")
        return images


class BoundedReader:
    """What tarfile reads headers through. It takes a header's own word for its size, and reads that much at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def sha256(text: bytes) -> str:
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def strings(value: Any) -> list[str]:
    """The strings of a JSON list; docker writes null for an empty one."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
