from __future__ import annotations

import hashlib
from typing import Any

import pytest
from tests.containerd.image_archives import OciImage, as_json, digest, tar

from airflow_isolation.containerd.errors import InvalidImage, WrongPlatform
from airflow_isolation.containerd.layout import Blob, Platform, resolve

AMD64 = Platform("linux", "amd64")


class Store:
    """Blobs in a dictionary, and which of them were read."""

    def __init__(self, *images: OciImage) -> None:
        self.blobs = {name: text for image in images for name, text in image.blobs.items()}
        self.asked: list[str] = []

    def put(self, document: Any, media_type: str = "application/vnd.oci.image.index.v1+json") -> Blob:
        text = document if isinstance(document, bytes) else as_json(document)
        self.blobs[digest(text)] = text
        return Blob(media_type, digest(text), len(text))

    def read(self, blob: Blob) -> bytes:
        self.asked.append(blob.digest)
        return self.blobs[blob.digest]


def blob_of(descriptor: dict[str, Any]) -> Blob:
    return Blob(descriptor["mediaType"], descriptor["digest"], descriptor["size"])


def test_chain_ids_are_the_specification_s() -> None:
    image = OciImage(layers=(tar({"a": b"1"}), tar({"b": b"2"}), tar({"c": b"3"})), architecture="amd64")
    target = blob_of(image.manifest())

    layout = resolve(Store(image).read, target, AMD64)

    first, second, third = map(digest, image.layers)
    two = "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()
    three = "sha256:" + hashlib.sha256(f"{two} {third}".encode()).hexdigest()
    assert layout.chain_ids == (first, two, three)
    assert layout.top_chain_id == three


def test_image_without_layers_has_no_chain() -> None:
    image = OciImage(layers=(), architecture="amd64")

    target = blob_of(image.manifest())

    layout = resolve(Store(image).read, target, AMD64)

    assert layout.chain_ids == ()
    assert layout.top_chain_id == ""


def test_blobs_come_before_what_names_them_and_once_each() -> None:
    layer = tar({"a": b"1"})
    image = OciImage(layers=(layer, layer), architecture="amd64")
    manifest = image.manifest()
    store = Store(image)
    index = store.put({"schemaVersion": 2, "manifests": [manifest]})

    layout = resolve(store.read, index, AMD64)

    assert [blob.digest for blob in layout.blobs()] == [
        digest(layer),
        layout.config.digest,
        manifest["digest"],
        index.digest,
    ]


def test_this_host_s_manifest_is_found_and_the_others_are_not_even_read() -> None:
    ours, theirs = OciImage(architecture="amd64"), OciImage(architecture="arm64")
    manifests = [
        dict(theirs.manifest(), platform={"os": "linux", "architecture": "arm64"}),
        dict(ours.manifest(), platform={"os": "linux", "architecture": "amd64"}),
        # What buildx adds: a provenance document that says it is for nobody.
        dict(ours.manifest(), digest=digest(b"gone"), platform={"os": "unknown", "architecture": "unknown"}),
    ]
    store = Store(ours, theirs)
    index = store.put({"schemaVersion": 2, "manifests": manifests})

    layout = resolve(store.read, index, AMD64)

    assert layout.manifest.digest == manifests[1]["digest"]
    assert layout.indexes == (index,)
    assert manifests[0]["digest"] not in store.asked


def test_platform_that_only_the_configuration_tells() -> None:
    ours, theirs = OciImage(architecture="amd64"), OciImage(architecture="arm64")
    manifests = [theirs.manifest(), ours.manifest()]
    store = Store(ours, theirs)

    layout = resolve(store.read, store.put({"schemaVersion": 2, "manifests": manifests}), AMD64)

    assert layout.manifest.digest == manifests[1]["digest"]


def test_wrong_platform_says_what_there_is() -> None:
    images = [OciImage(architecture=name) for name in ("arm64", "s390x")]
    store = Store()
    manifests = [image.manifest() for image in images]
    for image in images:
        store.blobs.update(image.blobs)

    with pytest.raises(WrongPlatform, match="made for linux/arm64, linux/s390x, this host is linux/amd64"):
        resolve(store.read, store.put({"schemaVersion": 2, "manifests": manifests}), AMD64)


@pytest.mark.parametrize(
    ("host", "image", "runs"),
    [
        ("arm/v7", "arm/v6", True),
        ("arm/v6", "arm/v7", False),
        ("arm64", "arm64/v8", True),
        ("amd64", "386", False),
    ],
)
def test_variants(host: str, image: str, runs: bool) -> None:
    def platform(text: str) -> Platform:
        architecture, _, variant = text.partition("/")
        return Platform("linux", architecture, variant)

    assert platform(host).runs(platform(image)) is runs


def test_exact_variant_wins_over_an_older_one() -> None:
    old, new = OciImage(architecture="arm"), OciImage(architecture="arm", layers=(tar({"new": b""}),))
    manifests = [
        dict(image.manifest(), platform={"os": "linux", "architecture": "arm", "variant": variant})
        for image, variant in ((old, "v6"), (new, "v7"))
    ]
    store = Store()
    # The configuration counts in the end, and it names the variant too.
    for image in (old, new):
        store.blobs.update(image.blobs)
    layout = resolve(
        store.read,
        store.put({"schemaVersion": 2, "manifests": manifests[1:] + manifests[:1]}),
        Platform("linux", "arm", "v7"),
    )
    assert layout.manifest.digest == manifests[1]["digest"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "is neither an image manifest"),
        (b'{"schemaVersion": 1, "config": {}}', "is neither an image manifest"),
        (b'{"manifests": 7}', "manifests is not a list"),
        (b'{"manifests": [7]}', "a descriptor is not an object"),
        (b'{"manifests": [{"digest": "../../etc/passwd", "size": 1}]}', "is not a sha256 digest"),
        (b'{"manifests": []}', "made for no platform at all"),
    ],
)
def test_document_that_is_not_what_it_should_be(text: bytes, words: str) -> None:
    store = Store()
    with pytest.raises((InvalidImage, WrongPlatform), match=words):
        resolve(store.read, store.put(text), AMD64)


@pytest.mark.parametrize("size", [-1, True, "7", None, 1 << 63])
def test_size_that_is_none(size: object) -> None:
    store = Store()
    index = store.put({"manifests": [{"digest": digest(b""), "size": size}]})
    with pytest.raises(InvalidImage, match=r"descriptor of sha256:.* is not readable"):
        resolve(store.read, index, AMD64)


def test_indexes_within_indexes_end() -> None:
    store = Store()
    inner = store.put({"manifests": []})
    for _ in range(10):
        inner = store.put({"manifests": [{"mediaType": inner.media_type, "digest": inner.digest, "size": inner.size}]})
    with pytest.raises(InvalidImage, match="indexes deep"):
        resolve(store.read, inner, AMD64)


def test_layers_and_diff_ids_must_match() -> None:
    image = OciImage(architecture="amd64", diff_ids=(digest(b"a"), digest(b"b")))
    target = blob_of(image.manifest())
    with pytest.raises(InvalidImage, match="has 1 layers, its configuration 2"):
        resolve(Store(image).read, target, AMD64)
