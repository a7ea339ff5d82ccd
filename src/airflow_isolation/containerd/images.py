"""Images of a namespace: finding and listing them, what an image consists of, and removing it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask

from airflow_isolation.containerd import blobs, layout
from airflow_isolation.containerd.api import images_pb2, types_pb2
from airflow_isolation.containerd.errors import AlreadyExists, NotFound
from airflow_isolation.containerd.layout import Blob, Layout, Platform
from airflow_isolation.containerd.reference import normalised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.containerd.client import Services


@dataclass(frozen=True, slots=True)
class Image:
    """A name in the store, and its ``target``: an index or a manifest."""

    name: str
    target: Blob
    labels: Mapping[str, str]
    created_at: datetime

    @property
    def digest(self) -> str:
        return self.target.digest


def get(services: Services, reference: str) -> Image:
    """The image of this name. ``reference`` is as a user writes it.

    :raises NotFound: no image has that name.
    :raises InvalidReference: it can't be an image's name.
    """
    name = normalised(reference)
    try:
        return _image(services.images.Get(images_pb2.GetImageRequest(name=name)).image)
    except NotFound as error:
        error.hint = "Import or pull it first"
        raise


def list_all(services: Services) -> tuple[Image, ...]:
    """All images, sorted by name."""
    images = services.images.List(images_pb2.ListImagesRequest()).images
    return tuple(sorted(map(_image, images), key=lambda image: image.name))


def remove(services: Services, reference: str, *, sync: bool = True) -> None:
    """Remove the name. With ``sync``, return only when the content that nothing else needs is gone from the disk.

    :raises NotFound: no image has that name.
    """
    # The garbage collector deletes the snapshots too, and those of a large image take their time.
    services.images.Delete(images_pb2.DeleteImageRequest(name=normalised(reference), sync=sync), timeout=300)


def resolve(services: Services, image: Image, platform: Platform | None = None) -> Layout:
    """The parts of ``image`` for this host, or for ``platform``: configuration, layers, chain ids.

    :raises WrongPlatform: it holds nothing for the platform.
    :raises InvalidImage: a part is missing or can't be read.
    """
    return layout.resolve(partial(blobs.read_document, services), image.target, platform or Platform.of_this_host())


def image_config(services: Services, reference: str) -> bytes:
    """The configuration's JSON, for this host's platform. For digests and chain ids too, use ``resolve``."""
    return resolve(services, get(services, reference)).config_json


def record(services: Services, name: str, target: Blob) -> bool:
    """Give ``target`` the (normalised) name, and take it from the image that had it. True when none had it."""
    image = images_pb2.Image(
        name=name,
        target=types_pb2.Descriptor(
            media_type=target.media_type, digest=target.digest, size=target.size, annotations=target.annotations
        ),
    )
    try:
        services.images.Create(images_pb2.CreateImageRequest(image=image))
    except AlreadyExists:
        mask = FieldMask(paths=["target"])
        services.images.Update(images_pb2.UpdateImageRequest(image=image, update_mask=mask))
        return False
    return True


def forget(services: Services, name: str) -> None:
    """Remove the name; success if it is gone already. The garbage collector removes its content when it next runs."""
    try:
        services.images.Delete(images_pb2.DeleteImageRequest(name=name))
    except NotFound:
        return


def _image(message: images_pb2.Image) -> Image:
    target = message.target
    return Image(
        message.name,
        Blob(target.media_type, target.digest, target.size, dict(target.annotations)),
        dict(message.labels),
        message.created_at.ToDatetime(timezone.utc),
    )
