"""Bringing an image archive into the store: ``import_archive``.

Two ways for the bytes, chosen by what the daemon has. The Transfer service (1.7 and later) takes the archive as one
stream and unpacks it; without it (1.6) blobs are written and layers applied one by one. Before and after, both are the
same: the archive is read and checked here first, and names, labels and what is still to be unpacked are seen to here
last. So the store looks the same whichever way the bytes took.

On two cores 300 MB take about 6 s through Transfer, for which messages are small, and 2 to 4 s written as blobs.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from airflow_isolation.containerd import blobs, images, payload
from airflow_isolation.containerd.api import (
    transfer_pb2,
    transfer_types_pb2,
    types_pb2,
)
from airflow_isolation.containerd.archive import Archive
from airflow_isolation.containerd.errors import (
    Cancelled,
    ContainerdError,
    FailedPrecondition,
    InvalidArchive,
    InvalidImage,
)
from airflow_isolation.containerd.layout import Platform
from airflow_isolation.containerd.progress import Progress, Report, ignore
from airflow_isolation.containerd.reference import normalised
from airflow_isolation.containerd.stream import Stream
from airflow_isolation.containerd.unpack import DEFAULT_SNAPSHOTTER, is_damage, link, unpack

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from airflow_isolation.containerd.client import Client, Leased
    from airflow_isolation.containerd.images import Image
    from airflow_isolation.containerd.layout import Blob

# A whole window of containerd's streams (core/transfer/streaming/stream.go): fewer messages, fewer changes of thread.
STREAM_CHUNK = 64 << 10


def import_archive(
    client: Client,
    path: str | os.PathLike[str],
    *,
    name: str = "",
    snapshotter: str = DEFAULT_SNAPSHOTTER,
    progress: Report = ignore,
    timeout: float = 3600.0,
) -> tuple[Image, ...]:
    """Load an OCI or docker archive and unpack it for this host.

    Images keep the names that the archive gives them; ``name`` replaces those of an archive with one image. A name
    that exists moves to the new image. Fails whole: then nothing of the archive stays.

    :raises InvalidArchive: not an archive, truncated, damaged, without a name, or ``name`` for several images.
    :raises WrongPlatform: made for another operating system or processor.
    :raises InvalidReference: ``name`` is not one.
    """
    given = normalised(name) if name else ""
    with Archive(path) as archive:
        named = _named(archive, given)
        with client.lease(expires=timedelta(seconds=timeout) + timedelta(minutes=10)) as leased:
            try:
                if client.has_transfer:
                    _transfer(leased, archive, snapshotter, progress, timeout)
                _write_missing(leased, archive, progress, timeout)
                for image in archive.images:
                    unpack(leased, image.layout, snapshotter=snapshotter, progress=progress, timeout=timeout)
                    link(leased, image.layout, snapshotter)
            except InvalidImage as error:
                raise InvalidArchive(f"{archive.path}: {error.detail}", hint=error.hint) from error
            with ExitStack() as undo:
                for one, target in named:
                    if images.record(leased, one, target):
                        undo.callback(images.forget, leased, one)
                    progress(Progress(one, "saved", target.size, target.size))
                undo.pop_all()
            return tuple(images.get(client, one) for one, _ in named)


def _named(archive: Archive, given: str) -> list[tuple[str, Blob]]:
    if given:
        if len(archive.images) > 1:
            raise InvalidArchive(
                f"{archive.path} holds {len(archive.images)} images, and {given} can name only one of them",
                hint="Import it without a name",
            )
        return [(given, archive.images[0].target)]
    nameless = [image for image in archive.images if not image.names]
    if nameless:
        raise InvalidArchive(
            f"{archive.path}: the image {nameless[0].target.digest} has no name", hint="Give one at the import"
        )
    return [(one, image.target) for image in archive.images for one in image.names]


# --- without the Transfer service --------------------------------------------------------------------------------


def _write_missing(leased: Leased, archive: Archive, progress: Report, timeout: float) -> None:
    """Write what the store does not have. After a transfer that is at most the manifests made from a docker archive."""
    for blob in dict.fromkeys(blob for image in archive.images for blob in image.layout.blobs()):

        def report(done: int, blob: Blob = blob) -> None:
            progress(Progress(blob.digest, "importing", done, blob.size))

        if blobs.keep(leased, blob):
            report(blob.size)
            continue
        try:
            blobs.write(leased, blob, archive.chunks(blob), done=report, timeout=timeout)
        except FailedPrecondition as error:
            raise InvalidArchive(f"{archive.path}: the blob {blob.digest} is damaged: {error.detail}") from error


# --- with it -----------------------------------------------------------------------------------------------------


def _transfer(leased: Leased, archive: Archive, snapshotter: str, progress: Report, timeout: float) -> None:
    """Send the archive; the daemon stores its blobs and unpacks them. It names nothing: names are given afterwards."""
    host = Platform.of_this_host()
    platform = types_pb2.Platform(os=host.os, architecture=host.architecture, variant=host.variant)
    store = transfer_types_pb2.ImageStore(
        platforms=[platform],
        unpacks=[transfer_types_pb2.UnpackConfiguration(platform=platform, snapshotter=snapshotter)],
    )
    with Stream(leased, "import", timeout=timeout) as stream:
        # The media type of a plain tar would be "application/vnd.oci.image.layout.v1.tar"; any but "" spares the
        # daemon the search for a compression.
        source = transfer_types_pb2.ImageImportStream(stream=stream.id, media_type="application/x-tar")
        request = transfer_pb2.TransferRequest(source=payload.pack(source), destination=payload.pack(store))
        transfer = leased.transfer.Transfer.future(request, timeout=timeout)
        # When the transfer fails early the daemon does not always end the stream: then nobody would grant a window.
        transfer.add_done_callback(lambda _: stream.cancel())
        try:
            _send(stream, archive, progress)
        except (Cancelled, StopIteration):
            # Ended by the daemon: the transfer itself says why, or that it had seen enough.
            pass
        except BaseException:
            transfer.cancel()
            raise
        try:
            transfer.result()
        except ContainerdError as error:
            if is_damage(error):
                raise InvalidArchive(f"{archive.path}: a layer can't be unpacked: {error.detail}") from error
            error.detail = f"{archive.path}: {error.detail}"
            raise


def _send(stream: Stream, archive: Archive, progress: Report) -> None:
    window = 0
    grants = iter(stream)
    for chunk in _checked(archive, progress):
        while window <= 0:
            window += payload.unpack(next(grants), transfer_types_pb2.WindowUpdate).update
        stream.send(transfer_types_pb2.Data(data=chunk))
        window -= len(chunk)
    stream.end()
    for _ in grants:
        pass


def _checked(archive: Archive, progress: Report) -> Iterator[bytes]:
    """The archive from its first byte to its last, with the images' blobs checked and reported as they go by.

    The daemon computes digests but does not compare them with the files' names: a damaged blob would be "not found".
    """
    wanted = {blob: archive.place(blob) for image in archive.images for blob in image.layout.blobs()}
    placed = sorted(((place, blob) for blob, place in wanted.items() if place), key=lambda pair: pair[0].offset)
    archive.file.seek(0)
    position = 0
    for place, blob in placed:
        if place.offset < position:
            # Two names for one file.
            continue
        yield from _until(archive, place.offset - position)
        digest = hashlib.sha256()
        done = 0
        for chunk in _until(archive, place.size):
            digest.update(chunk)
            done += len(chunk)
            if done == place.size and f"sha256:{digest.hexdigest()}" != blob.digest:
                raise InvalidArchive(
                    f"{archive.path}: the blob {blob.digest} is damaged: its digest is sha256:{digest.hexdigest()}"
                )
            yield chunk
            progress(Progress(blob.digest, "importing", done, blob.size))
        position = place.offset + place.size
    while chunk := archive.file.read(STREAM_CHUNK):
        yield chunk


def _until(archive: Archive, count: int) -> Iterator[bytes]:
    while count:
        chunk = archive.file.read(min(STREAM_CHUNK, count))
        if not chunk:
            raise InvalidArchive(f"{archive.path} became shorter while it was read")
        count -= len(chunk)
        yield chunk
