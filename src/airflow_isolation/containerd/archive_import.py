"""Bringing an image archive into the store: ``import_archive``.

The archive is read and checked here, and the daemon gets only what belongs to this host's images, blob by blob. Its
Transfer service (1.7 and later) would take the archive as one stream, with everything in it. It is also slower, because
its messages are small: on two cores 300 MB take about 6 s through it, and 2 to 4 s written as blobs.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from airflow_isolation.containerd import blobs, images
from airflow_isolation.containerd.archive import Archive
from airflow_isolation.containerd.errors import FailedPrecondition, InvalidArchive, InvalidImage
from airflow_isolation.containerd.progress import Progress, Report, ignore
from airflow_isolation.containerd.unpack import DEFAULT_SNAPSHOTTER, link, unpack

if TYPE_CHECKING:
    import os

    from airflow_isolation.containerd.client import Client, Leased
    from airflow_isolation.containerd.images import Image
    from airflow_isolation.containerd.layout import Blob


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

    Images keep the names that the archive gives them; ``name`` replaces those of an archive with one image. A name that
    exists moves to the new image. What is not for this host is passed over, and ``progress`` is told so. If it fails,
    nothing of the archive stays. May be called twice.

    :raises InvalidArchive: not an archive, truncated, damaged, without a name, or ``name`` for several images.
    :raises WrongPlatform: made for another operating system or processor.
    :raises InvalidReference: ``name`` is not one.
    """
    with Archive(path, name=name) as archive:
        for other in archive.passed_over:
            progress(Progress(other.name, f"passed over ({other.reason})"))
        named = [(one, image.target) for image in archive.images for one in image.names]
        with client.lease(expires=timedelta(seconds=timeout) + timedelta(minutes=10)) as leased:
            try:
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


def _write_missing(leased: Leased, archive: Archive, progress: Report, timeout: float) -> None:
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
