"""What an image consists of: index, manifest, configuration, layers. Pure: the caller passes a function that reads blobs.

Sources: OCI image-spec 1.1 (descriptor, image-index, manifest, config) and Docker's image manifest version 2, schema 2.
"""

from __future__ import annotations

import hashlib
import json
import platform as machine
import re
import reprlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd.errors import InvalidImage, WrongPlatform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Read = Callable[["Blob"], bytes]
    """Returns a blob's bytes. It raises its source's own errors."""

JSON_LIMIT = 4 << 20
"""Bytes of an index, manifest or configuration: the size of a manifest that registries take (OCI distribution-spec 1.1)."""
DOCUMENT_COUNT = 2000
"""How many documents are read for one image, or for all images of an archive. An image for twenty platforms has 41."""
DOCUMENT_BYTES = 32 << 20
"""Bytes of these documents together."""

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
LAYER_COUNT = 1000
"""More than any snapshotter mounts, and more than Docker's 127."""
# How many platforms an error lists.
_PLATFORMS_TOLD = 10
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386"}


@dataclass(frozen=True, slots=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def of_this_host(cls) -> Platform:
        name = machine.machine()
        variant = {"armv7l": "v7", "armv6l": "v6"}.get(name, "")
        return cls("linux", _ARCHITECTURES.get(name, name), variant)

    def runs(self, other: Platform) -> bool:
        """Whether this host runs what was made for ``other``. An unnamed variant is taken to be the plain one."""
        same = (self.os, self.architecture) == (other.os, other.architecture)
        # arm's variants are ordered, v6 < v7. amd64's and arm64's only name features of a processor.
        return same and (self.architecture != "arm" or not self.variant or other.variant <= self.variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Blob:
    """A descriptor: the kind of a blob (media type), its digest, and its size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, compare=False)
    platform: Platform | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Layout:
    """One platform's image: the indexes that lead to its manifest (outermost first), and what the manifest names."""

    indexes: tuple[Blob, ...]
    manifest: Blob
    config: Blob
    config_json: bytes
    layers: tuple[Blob, ...]
    diff_ids: tuple[str, ...]

    @property
    def chain_ids(self) -> tuple[str, ...]:
        """The name of each layer's snapshot, which stands for the layer and all below it (OCI image-spec, config.md)."""
        chain: list[str] = []
        for diff_id in self.diff_ids:
            above = f"{chain[-1]} {diff_id}".encode() if chain else b""
            chain.append(f"sha256:{hashlib.sha256(above).hexdigest()}" if chain else diff_id)
        return tuple(chain)

    @property
    def top_chain_id(self) -> str:
        """The last chain id; empty for an image without layers."""
        return self.chain_ids[-1] if self.diff_ids else ""

    @property
    def size(self) -> int:
        """Bytes of its blobs in the content store, compressed as they are."""
        return self.manifest.size + self.config.size + sum(layer.size for layer in self.layers)

    def blobs(self) -> Iterator[Blob]:
        """All blobs, each once. A blob comes before the one that names it."""
        yield from dict.fromkeys((*self.layers, self.config, self.manifest, *reversed(self.indexes)))


class Documents:
    """Indexes, manifests and configurations, read by ``read``. Each is read once.

    Repeated looks count against the bound too: a few indexes that name each other many times would otherwise take very
    many steps.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._texts: dict[str, bytes] = {}
        self._count = 0
        self._bytes = 0

    def __call__(self, blob: Blob) -> bytes:
        """The document's bytes.

        :raises InvalidImage: it is too large, or too much has been looked at already.
        """
        self._count += 1
        if self._count > DOCUMENT_COUNT:
            raise TooMuch(f"more than {DOCUMENT_COUNT} indexes, manifests and configurations belong to it")
        if blob.digest not in self._texts:
            if blob.size > JSON_LIMIT:
                raise InvalidImage(f"{blob.digest} has {blob.size} bytes, an image's document at most {JSON_LIMIT}")
            self._texts[blob.digest] = self._read(blob)
        text = self._texts[blob.digest]
        self._bytes += len(text)
        if self._bytes > DOCUMENT_BYTES:
            raise TooMuch(f"its indexes, manifests and configurations have more than {DOCUMENT_BYTES} bytes")
        return text


class TooMuch(InvalidImage):
    """The bound for a whole image is reached, so the rest is not looked at."""


def resolve(read: Read, target: Blob, platform: Platform) -> Layout:
    """Find ``platform``'s image below ``target``, an index or a manifest. Whatever is no image is passed over.

    If ``read`` is a ``Documents``, its bounds hold for all images read through it; else for this image.

    :raises WrongPlatform: there is none for ``platform``; the error lists the platforms that there are.
    :raises InvalidImage: there is no image (the error has the reason), or ``Documents`` reached a bound.
    """
    documents = read if isinstance(read, Documents) else Documents(read)
    found: Layout | None = None
    others: dict[Platform, None] = {}
    faults: list[InvalidImage] = []
    for candidate in _candidates(documents, target, platform):
        if isinstance(candidate, InvalidImage):
            faults.append(candidate)
        elif isinstance(candidate, Platform):
            others[candidate] = None
        else:
            layout, made_for = candidate
            # Exactly this host's variant wins over an older one; otherwise the first wins, as everywhere.
            if made_for == platform:
                return layout
            found = found or layout
    if found is not None:
        return found
    if others or not faults:
        raise WrongPlatform(f"the image is made for {_listed(others)}, this host is {platform}")
    raise faults[0]


def _candidates(
    documents: Documents, target: Blob, platform: Platform
) -> Iterator[tuple[Layout, Platform] | Platform | InvalidImage]:
    """What is below ``target``, in its order: images that run here, platforms of other images, and reasons why one is
    none.
    """
    waiting: list[tuple[Blob, tuple[Blob, ...]]] = [(target, ())]
    seen: set[str] = set()
    while waiting:
        blob, above = waiting.pop()
        if blob.digest in seen:
            continue
        if blob.platform is not None and not platform.runs(blob.platform):
            yield blob.platform
            continue
        seen.add(blob.digest)
        try:
            document = parse(documents(blob), blob)
            if "manifests" in document and blob.media_type not in MANIFESTS:
                children = descriptors(document, "manifests", blob)
                waiting.extend((child, (*above, blob)) for child in reversed(children))
                continue
            layout, made_for = _manifest(documents, document, blob, above)
        except TooMuch:
            raise
        except InvalidImage as error:
            yield error
            continue
        yield (layout, made_for) if platform.runs(made_for) else made_for


def _listed(platforms: Iterable[Platform]) -> str:
    names = [name if name.isprintable() else repr(name) for name in (str(platform)[:40] for platform in platforms)]
    more = len(names) - _PLATFORMS_TOLD
    return ", ".join(names[:_PLATFORMS_TOLD]) + (f" and {more} more" if more > 0 else "") or "no platform at all"


def _manifest(
    documents: Documents, document: Mapping[str, Any], target: Blob, above: tuple[Blob, ...]
) -> tuple[Layout, Platform]:
    if document.get("schemaVersion") != 2 or "config" not in document:
        raise InvalidImage(f"{target.digest} is neither an image manifest (schema 2) nor an index")
    layers = descriptors(document, "layers", target)
    if len(layers) > LAYER_COUNT:
        raise InvalidImage(f"image {target.digest} has {len(layers)} layers, more than {LAYER_COUNT}")
    config = descriptor(document["config"], target)
    config_json = documents(config)
    configuration = parse(config_json, config)
    if "rootfs" not in configuration:
        raise InvalidImage(f"{target.digest} is no image: its configuration has no rootfs")
    rootfs = configuration["rootfs"]
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in diff_ids):
        raise InvalidImage(f"image configuration {config.digest}: rootfs.diff_ids is not a list of digests")
    if len(diff_ids) != len(layers):
        raise InvalidImage(f"image {target.digest} has {len(layers)} layers, its configuration {len(diff_ids)}")
    made_for = platform_of(configuration)
    if made_for is None:
        raise InvalidImage(f"image configuration {config.digest} does not name os and architecture")
    return Layout(above, target, config, config_json, tuple(layers), tuple(diff_ids)), made_for


def parse(text: bytes, blob: Blob) -> dict[str, Any]:
    """Parse a JSON document that must be an object."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidImage(f"{blob.digest} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidImage(f"{blob.digest} is not a JSON object")
    return document


def descriptors(document: Mapping[str, Any], key: str, blob: Blob) -> list[Blob]:
    values = document.get(key)
    if not isinstance(values, list):
        raise InvalidImage(f"{blob.digest}: {key} is not a list")
    return [descriptor(value, blob) for value in values]


def descriptor(value: Any, blob: Blob) -> Blob:
    if not isinstance(value, dict):
        raise InvalidImage(f"{blob.digest}: a descriptor is not an object")
    media_type, digest, size = value.get("mediaType", ""), value.get("digest"), value.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidImage(f"{blob.digest} names {reprlib.repr(digest)}, which is not a sha256 digest")
    if (
        not isinstance(size, int)
        or isinstance(size, bool)
        or not 0 <= size < 1 << 62
        or not isinstance(media_type, str)
    ):
        raise InvalidImage(f"{blob.digest}: the descriptor of {digest} is not readable")
    annotations = value.get("annotations")
    strings = {str(k): str(v) for k, v in annotations.items()} if isinstance(annotations, dict) else {}
    named = value.get("platform")
    return Blob(media_type, digest, size, strings, platform_of(named) if isinstance(named, dict) else None)


def platform_of(document: Mapping[str, Any]) -> Platform | None:
    os, architecture, variant = (document.get(key, "") for key in ("os", "architecture", "variant"))
    if not (isinstance(os, str) and isinstance(architecture, str) and os and architecture):
        return None
    return Platform(os, architecture, variant if isinstance(variant, str) else "")
