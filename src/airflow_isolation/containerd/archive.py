"""Reading an image archive: an OCI layout in a tar file, or what ``docker save`` writes.

Nothing is unpacked and nothing is trusted: sizes are bounded, digests are checked, and all parts of an image are known
to be there before a daemon gets any. If an archive has both an OCI index and a docker manifest (docker 25 and later), the
OCI index is used, as in containerd, and the docker manifest gives only names.

Whatever else an archive holds is passed over: images of other platforms, signatures and the like, and images without a
name beside named ones, which skopeo leaves behind when a tag has moved.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd import blobs, layout
from airflow_isolation.containerd.errors import InvalidArchive, InvalidImage, InvalidReference, WrongPlatform
from airflow_isolation.containerd.layout import JSON_LIMIT, Blob, Documents, Layout, Platform
from airflow_isolation.containerd.reference import normalised
from airflow_isolation.containerd.tar_file import Member, list_members, open_tar, truncated

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

CONTAINERD_NAME = "io.containerd.image.name"
OCI_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """``names`` are full names; ``target`` is the index or manifest to store under them; ``layout`` is this host's image
    in it.
    """

    names: tuple[str, ...]
    target: Blob
    layout: Layout


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Something in the archive that is not imported: its name or digest, and the reason."""

    name: str
    reason: str


class Archive:
    """An open archive. ``images`` is what it holds for ``platform``, and ``passed_over`` is the rest.

    ``name`` is given to the only image, instead of those that it has in the archive.

    :raises InvalidArchive: not an archive, truncated, damaged, over a bound, without an image, or without a name for
        it; or there are several for ``name``.
    :raises WrongPlatform: it holds nothing for ``platform``.
    :raises InvalidReference: ``name`` is not one.
    """

    def __init__(self, path: str | os.PathLike[str], platform: Platform | None = None, *, name: str = "") -> None:
        given = normalised(name) if name else ""
        self.path = str(path)
        self._platform = platform or Platform.of_this_host()
        # Manifests that are not in the archive but are made from it, by digest.
        self._made: dict[str, bytes] = {}
        self._places: dict[str, Member] = {}
        self._digests: dict[Member, str] = {}
        self._documents = Documents(self._read_blob)
        self._passed_over: list[PassedOver] = []
        with ExitStack() as undo:
            self.file = undo.enter_context(open_tar(self.path))
            try:
                self._members = list_members(self.file, self.path)
                self.images = self._named(self._find_images(), given)
                for blob in dict.fromkeys(blob for image in self.images for blob in image.layout.blobs()):
                    if blob.digest not in self._made:
                        self._find_blob(blob)
            except OSError as error:
                raise InvalidArchive(f"{self.path} can't be read: {error.strerror or error}") from error
            self._undo = undo.pop_all()

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        return tuple(self._passed_over)

    def chunks(self, blob: Blob) -> Iterator[bytes]:
        """A blob's bytes.

        :raises InvalidArchive: they don't match its digest, or some are missing.
        """
        if blob.digest in self._made:
            yield self._made[blob.digest]
            return
        digest = hashlib.sha256()
        for chunk in self._read_chunks(self._find_blob(blob)):
            digest.update(chunk)
            yield chunk
        if f"sha256:{digest.hexdigest()}" != blob.digest:
            raise self._damaged(blob, f"sha256:{digest.hexdigest()}")

    def close(self) -> None:
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the images --------------------------------------------------------------------------------------------

    def _find_images(self) -> Sequence[ArchivedImage]:
        """The images for this host, with or without names."""
        try:
            if self._has("oci-layout") and self._has("index.json"):
                found = self._oci_images()
            elif self._has("manifest.json"):
                found = self._docker_images()
            else:
                raise InvalidArchive(
                    f"{self.path} is a tar file, but not an image archive: it holds neither an OCI layout "
                    "(oci-layout, index.json) nor docker's manifest.json"
                )
        except InvalidImage as error:
            raise InvalidArchive(f"{self.path}: {error.detail}") from error
        return found

    def _oci_images(self) -> Sequence[ArchivedImage]:
        index = self._parsed("index.json")
        tags = self._docker_tags()
        images: dict[Blob, ArchivedImage] = {}
        faults: list[InvalidImage | WrongPlatform] = []
        for target in layout.descriptors(index, "manifests", Blob("", "index.json", 0)):
            known = images.get(target)
            image = known.layout if known else self._resolved(target, annotated_name(target), faults)
            if image is None:
                continue
            names = self._annotated_names(target) or tags.get(image.config.digest, ())
            before = known.names if known else ()
            # The names go into the store's record, so the annotations are not kept.
            plain = Blob(target.media_type or image.manifest.media_type, target.digest, target.size)
            images[target] = ArchivedImage(tuple(dict.fromkeys((*before, *names))), plain, image)
        return self._some(tuple(images.values()), faults)

    def _annotated_names(self, target: Blob) -> tuple[str, ...]:
        name = annotated_name(target)
        return (self._name(name),) if name else ()

    def _docker_tags(self) -> dict[str, tuple[str, ...]]:
        """The names that docker's manifest.json gives, by the digest of the image's configuration."""
        if not self._has("manifest.json"):
            return {}
        tags = {}
        for entry in self._docker_manifest():
            config = entry.get("Config")
            if isinstance(config, str) and self._has(config):
                digest = self._digest_of(self._existing(config))
                tags[digest] = tuple(map(self._name, strings(entry.get("RepoTags"))))
        return tags

    def _docker_images(self) -> Sequence[ArchivedImage]:
        images = []
        faults: list[InvalidImage | WrongPlatform] = []
        for entry in self._docker_manifest():
            config_name = entry.get("Config")
            if not isinstance(config_name, str):
                raise InvalidArchive(f"{self.path}: manifest.json names no configuration")
            names = strings(entry.get("RepoTags"))
            config = self._placed(layout.DOCKER_CONFIG, config_name)
            layers = [self._docker_layer(name) for name in strings(entry.get("Layers"))]
            manifest = self._make_manifest(config, layers)
            image = self._resolved(manifest, next(iter(names), ""), faults)
            if image is not None:
                images.append(ArchivedImage(tuple(map(self._name, names)), manifest, image))
        return self._some(images, faults)

    def _resolved(self, target: Blob, name: str, faults: list[InvalidImage | WrongPlatform]) -> Layout | None:
        """This host's image below ``target``. If there is none: None, and the reason is added to ``faults``."""
        try:
            return layout.resolve(self._documents, target, self._platform)
        except layout.TooMuch:
            raise
        except (InvalidImage, WrongPlatform) as error:
            faults.append(error)
            # A text that is no valid name is not shown: it may hold anything.
            self._passed_over.append(PassedOver(name if is_name(name) else target.digest, error.detail))
            return None

    def _some(
        self, images: Sequence[ArchivedImage], faults: Sequence[InvalidImage | WrongPlatform]
    ) -> Sequence[ArchivedImage]:
        if images:
            return images
        for fault in sorted(faults, key=lambda fault: not isinstance(fault, WrongPlatform)):
            raise type(fault)(f"{self.path}: {fault.detail}")
        raise InvalidArchive(f"{self.path} is an image archive without an image")

    def _named(self, images: Sequence[ArchivedImage], given: str) -> tuple[ArchivedImage, ...]:
        named = tuple(image for image in images if image.names)
        if named:
            nameless = (image.target.digest for image in images if not image.names)
            self._passed_over += (PassedOver(digest, "it has no name") for digest in nameless)
        fitting = named or images
        if given:
            if len(fitting) > 1:
                raise InvalidArchive(
                    f"{self.path} holds {len(fitting)} images, and {given} can name only one of them",
                    hint="Import it without a name",
                )
            return (replace(fitting[0], names=(given,)),)
        if not named:
            raise InvalidArchive(
                f"{self.path}: the image {images[0].target.digest} has no name", hint="Give one at the import"
            )
        return named

    def _docker_manifest(self) -> list[dict[str, Any]]:
        manifest = self._parsed("manifest.json", kind=list)
        if not all(isinstance(entry, dict) for entry in manifest):
            raise InvalidArchive(f"{self.path}: manifest.json is not a list of objects")
        return list(manifest)

    def _docker_layer(self, name: str) -> Blob:
        self.file.seek(self._existing(name).offset)
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

    # --- its files ---------------------------------------------------------------------------------------------

    def _placed(self, media_type: str, name: str) -> Blob:
        """The file as a blob. Its digest is computed, because docker's file names don't tell it."""
        member = self._existing(name)
        digest = self._digest_of(member)
        self._places[digest] = member
        return Blob(media_type, digest, member.size)

    def _digest_of(self, member: Member) -> str:
        # Once each: a small manifest.json may name the same large file many times.
        if member not in self._digests:
            digest = hashlib.sha256()
            for chunk in self._read_chunks(member):
                digest.update(chunk)
            self._digests[member] = f"sha256:{digest.hexdigest()}"
        return self._digests[member]

    def _read_chunks(self, member: Member) -> Iterator[bytes]:
        done = 0
        while done < member.size:
            # Seek each time, because others read from the same file in between.
            self.file.seek(member.offset + done)
            chunk = self.file.read(min(blobs.CHUNK, member.size - done))
            if not chunk:
                raise truncated(self.path)
            done += len(chunk)
            yield chunk

    def _find_blob(self, blob: Blob) -> Member:
        algorithm, _, encoded = blob.digest.partition(":")
        member = self._places.get(blob.digest) or self._members.files.get(f"blobs/{algorithm}/{encoded}")
        if member is None:
            raise InvalidArchive(f"{self.path}: the blob {blob.digest} is missing")
        if member.size != blob.size:
            raise InvalidArchive(f"{self.path}: the blob {blob.digest} has {member.size} bytes instead of {blob.size}")
        return member

    def _read_blob(self, blob: Blob) -> bytes:
        """An index, manifest or configuration, checked against its digest."""
        if blob.digest in self._made:
            return self._made[blob.digest]
        text = b"".join(self._read_chunks(self._find_blob(blob)))
        if sha256(text) != blob.digest:
            raise self._damaged(blob, sha256(text))
        return text

    def _damaged(self, blob: Blob, digest: str) -> InvalidArchive:
        return InvalidArchive(f"{self.path}: the blob {blob.digest} is damaged: its digest is {digest}")

    def _has(self, name: str) -> bool:
        """:raises InvalidArchive: a link of this name leads to nothing."""
        path = posixpath.normpath(name)
        if path in self._members.broken_links:
            target = self._members.broken_links[path]
            raise InvalidArchive(f"{self.path}: {name} is a link to {target}, which is no file of the archive")
        return path in self._members.files

    def _existing(self, name: str) -> Member:
        if not self._has(name):
            raise InvalidArchive(f"{self.path}: {name} is missing, which manifest.json names")
        return self._members.files[posixpath.normpath(name)]

    def _parsed(self, name: str, kind: type[Any] = dict) -> Any:
        member = self._members.files[name]
        if member.size > JSON_LIMIT:
            raise InvalidArchive(f"{self.path}: {name} has {member.size} bytes, more than such a document may have")
        try:
            document = json.loads(b"".join(self._read_chunks(member)))
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


def annotated_name(target: Blob) -> str:
    return target.annotations.get(CONTAINERD_NAME) or target.annotations.get(OCI_NAME, "")


def is_name(text: str) -> bool:
    try:
        normalised(text)
    except InvalidReference:
        return False
    return True


def sha256(text: bytes) -> str:
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def strings(value: Any) -> list[str]:
    """The strings of a JSON list; docker writes null for an empty one."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
