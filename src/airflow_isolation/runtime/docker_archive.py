"""Checks image archives before dockerd gets them: they must be whole, have names, and be made for this host.

If an archive is broken, dockerd notices only after it has stored the part before the fault. And dockerd 20.10 doesn't know
OCI archives. So the archive is read and checked here first, as for containerd. dockerd gets a new archive that is made from
it: the blobs of this host's images, and a table of them.

Source: Docker's image specification 1.2 (manifest.json).
"""

from __future__ import annotations

import json
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd.archive import Archive, PassedOver
from airflow_isolation.containerd.errors import ImageError
from airflow_isolation.containerd.layout import Platform
from airflow_isolation.errors import ImageInvalid
from airflow_isolation.oci import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from airflow_isolation.containerd.archive import ArchivedImage
    from airflow_isolation.containerd.layout import Blob


@dataclass(frozen=True, slots=True)
class DockerArchive:
    """The archive for dockerd. ``names`` are as dockerd lists them."""

    names: tuple[str, ...]
    passed_over: tuple[PassedOver, ...]
    _archive: Archive

    @property
    def size(self) -> int:
        """How many bytes ``chunks`` gives in all."""
        files = (*(blob.size for blob in self._blobs()), len(self._table()))
        return sum(tarfile.BLOCKSIZE + size + _padding(size) for size in files) + 2 * tarfile.BLOCKSIZE

    def chunks(self) -> Iterator[bytes]:
        """The archive for dockerd.

        :raises ImageInvalid: a blob is damaged, or became shorter.
        """
        for blob in self._blobs():
            yield _header(_path(blob), blob.size)
            with _ours():
                yield from self._archive.chunks(blob)
            yield bytes(_padding(blob.size))
        table = self._table()
        yield _header("manifest.json", len(table)) + table + bytes(_padding(len(table)) + 2 * tarfile.BLOCKSIZE)

    def _blobs(self) -> Iterator[Blob]:
        layouts = [image.layout for image in self._archive.images]
        yield from dict.fromkeys(blob for layout in layouts for blob in (layout.config, *layout.layers))

    def _table(self) -> bytes:
        return json.dumps([_entry(image) for image in self._archive.images]).encode()


@contextmanager
def opened_archive(path: Path, *, architecture: str, reference: str = "") -> Iterator[DockerArchive]:
    """Read and check a docker or OCI archive; yields what to send to dockerd. ``reference`` replaces the archive's name.

    :raises ImageInvalid: it is no archive, truncated, without a name, over a bound or for another architecture, or a
        document in it is broken.
    """
    with _ours():
        archive = Archive(path, Platform("linux", architecture), name=reference)
    with archive:
        for image in archive.images:
            ImageConfig.parse(image.layout.config_json)
        names = tuple(_familiar(name) for image in archive.images for name in image.names)
        yield DockerArchive(names, archive.passed_over, archive)


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageInvalid(error.detail, hint=error.hint) from error


def _entry(image: ArchivedImage) -> Mapping[str, Any]:
    return {
        "Config": _path(image.layout.config),
        "RepoTags": list(image.names),
        "Layers": [_path(layer) for layer in image.layout.layers],
    }


def _familiar(name: str) -> str:
    """The name as dockerd lists it: ``sales:1`` for ``docker.io/library/sales:1``."""
    path = name.removeprefix("docker.io/")
    short = path.removeprefix("library/")
    return path if path == name or "/" in short else short


def _path(blob: Blob) -> str:
    return f"blobs/{blob.digest.replace(':', '/')}"


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    # The GNU format has room for any size in the header itself.
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
