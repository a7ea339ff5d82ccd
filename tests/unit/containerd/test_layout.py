from __future__ import annotations

import hashlib
from typing import Any

import pytest
from tests.containerd.image_archives import OciImage, as_json, digest, tar

from airflow_isolation.containerd import layout as layout_module
from airflow_isolation.containerd.errors import InvalidImage, WrongPlatform
from airflow_isolation.containerd.layout import Blob, Documents, Platform, resolve

AMD64 = Platform("linux", "amd64")


class Store:
    """Blobs in a dictionary, and which of them were read."""

    def __init__(self, *images: OciImage) -> None:
        self.blobs = {name: text for image in images for name, text in image.blobs.items()}
        self.asked: list[str] = []
        self.documents = Documents(self.read)

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

    layout = resolve(Store(image).documents, target, AMD64)

    first, second, third = map(digest, image.layers)
    two = "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()
    three = "sha256:" + hashlib.sha256(f"{two} {third}".encode()).hexdigest()
    assert layout.chain_ids == (first, two, three)
    assert layout.top_chain_id == three


def test_image_without_layers_has_no_chain() -> None:
    image = OciImage(layers=(), architecture="amd64")

    target = blob_of(image.manifest())

    layout = resolve(Store(image).documents, target, AMD64)

    assert layout.chain_ids == ()
    assert layout.top_chain_id == ""


def test_blobs_come_before_what_names_them_and_once_each() -> None:
    layer = tar({"a": b"1"})
    image = OciImage(layers=(layer, layer), architecture="amd64")
    manifest = image.manifest()
    store = Store(image)
    index = store.put({"schemaVersion": 2, "manifests": [manifest]})

    layout = resolve(store.documents, index, AMD64)

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

    layout = resolve(store.documents, index, AMD64)

    assert layout.manifest.digest == manifests[1]["digest"]
    assert layout.indexes == (index,)
    assert manifests[0]["digest"] not in store.asked


def test_platform_that_only_the_configuration_tells() -> None:
    ours, theirs = OciImage(architecture="amd64"), OciImage(architecture="arm64")
    manifests = [theirs.manifest(), ours.manifest()]
    store = Store(ours, theirs)

    layout = resolve(store.documents, store.put({"schemaVersion": 2, "manifests": manifests}), AMD64)

    assert layout.manifest.digest == manifests[1]["digest"]


def test_wrong_platform_says_what_there_is() -> None:
    images = [OciImage(architecture=name) for name in ("arm64", "s390x")]
    store = Store()
    manifests = [image.manifest() for image in images]
    for image in images:
        store.blobs.update(image.blobs)

    with pytest.raises(WrongPlatform, match="made for linux/arm64, linux/s390x, this host is linux/amd64"):
        resolve(store.documents, store.put({"schemaVersion": 2, "manifests": manifests}), AMD64)


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
        store.documents,
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
        resolve(store.documents, store.put(text), AMD64)


@pytest.mark.parametrize("size", [-1, True, "7", None, 1 << 63])
def test_size_that_is_none(size: object) -> None:
    store = Store()
    index = store.put({"manifests": [{"digest": digest(b""), "size": size}]})
    with pytest.raises(InvalidImage, match=r"descriptor of sha256:.* is not readable"):
        resolve(store.documents, index, AMD64)


def tree(store: Store, children: int, depth: int) -> Blob:
    """An index that names one index so many times, and so on; in the innermost one is nothing."""
    inner = store.put({"manifests": []})
    for _ in range(depth):
        child = {"mediaType": inner.media_type, "digest": inner.digest, "size": inner.size}
        inner = store.put({"manifests": [child] * children})
    return inner


def test_an_index_that_is_named_again_and_again_is_read_once() -> None:
    store = Store()
    target = tree(store, children=1000, depth=30)

    with pytest.raises(WrongPlatform, match="made for no platform at all"):
        resolve(store.documents, target, AMD64)

    assert sorted(store.asked) == sorted(store.blobs)


def test_what_is_looked_at_is_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "DOCUMENT_COUNT", 20)
    store = Store()
    target = tree(store, children=1, depth=1000)

    with pytest.raises(InvalidImage, match="more than 20 indexes, manifests and configurations belong to it"):
        resolve(store.documents, target, AMD64)

    assert len(store.asked) == 20


def test_what_is_looked_at_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    children = [store.put({"manifests": [], "annotations": {"number": str(i) * 1000}}) for i in range(100)]
    listed = [{"digest": child.digest, "size": child.size} for child in children]
    monkeypatch.setattr(layout_module, "DOCUMENT_BYTES", len(as_json({"manifests": listed})) + 5_000)

    with pytest.raises(InvalidImage, match=r"have more than \d+ bytes"):
        resolve(store.documents, store.put({"manifests": listed}), AMD64)

    assert len(store.asked) < 10


def test_the_bound_is_one_for_all_images_of_an_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "DOCUMENT_COUNT", 5)
    image = OciImage(architecture="amd64")
    target = blob_of(image.manifest())
    store = Store(image)
    for _ in range(2):
        resolve(store.documents, target, AMD64)

    with pytest.raises(InvalidImage, match="more than 5"):
        resolve(store.documents, target, AMD64)

    # Looked at again, and not read again.
    assert len(store.asked) == 2


def test_document_that_is_said_to_be_large_is_not_read() -> None:
    store = Store()
    huge = {"digest": digest(b""), "size": layout_module.JSON_LIMIT + 1}
    with pytest.raises(InvalidImage, match="an image's document at most"):
        resolve(store.documents, store.put({"manifests": [huge]}), AMD64)
    assert huge["digest"] not in store.asked


def test_what_is_no_image_in_an_index_is_passed_over() -> None:
    image = OciImage(architecture="amd64")
    signature = as_json({"schemaVersion": 2, "config": image.put("x", b"{}"), "layers": []})
    manifests = [image.put("application/vnd.oci.image.manifest.v1+json", signature), image.manifest()]
    store = Store(image)

    layout = resolve(store.documents, store.put({"manifests": manifests}), AMD64)

    assert layout.manifest.digest == manifests[1]["digest"]


def test_a_thousand_platforms_make_a_short_sentence() -> None:
    store = Store()
    others = [
        {"digest": digest(b""), "size": 0, "platform": {"os": "linux", "architecture": f"{number:x}" * 100}}
        for number in range(1000)
    ]
    with pytest.raises(WrongPlatform, match="and 990 more") as caught:
        resolve(store.documents, store.put({"manifests": others}), AMD64)
    assert len(str(caught.value)) < 1000


def test_a_platform_moves_no_cursor() -> None:
    store = Store()
    other = {"digest": digest(b""), "size": 0, "platform": {"os": "linux", "architecture": "\x1b[2J"}}
    with pytest.raises(WrongPlatform, match=r"made for 'linux/\\x1b\[2J'"):
        resolve(store.documents, store.put({"manifests": [other]}), AMD64)


def test_too_many_layers() -> None:
    image = OciImage(layers=[tar({})] * 1001, architecture="amd64")
    target = blob_of(image.manifest())
    with pytest.raises(InvalidImage, match="has 1001 layers, more than 1000"):
        resolve(Store(image).documents, target, AMD64)


def test_layers_and_diff_ids_must_match() -> None:
    image = OciImage(architecture="amd64", diff_ids=(digest(b"a"), digest(b"b")))
    target = blob_of(image.manifest())
    with pytest.raises(InvalidImage, match="has 1 layers, its configuration 2"):
        resolve(Store(image).documents, target, AMD64)
