"""Makes snapshots of an image's layers, from which containers start, and sets the labels that protect them from
collection.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow_isolation.containerd import blobs
from airflow_isolation.containerd.api import diff_pb2, leases_pb2, snapshots_pb2, types_pb2
from airflow_isolation.containerd.errors import AlreadyExists, ContainerdError, InvalidImage, NotFound, Unknown
from airflow_isolation.containerd.progress import Progress, Report, ignore

if TYPE_CHECKING:
    from airflow_isolation.containerd.client import Leased, Services
    from airflow_isolation.containerd.layout import Blob, Layout

DEFAULT_SNAPSHOTTER = "overlayfs"


def is_unpacked(services: Services, layout: Layout, snapshotter: str = DEFAULT_SNAPSHOTTER) -> bool:
    """Whether containers can start from it."""
    return not layout.diff_ids or has_snapshot(services, layout.top_chain_id, snapshotter)


def has_snapshot(services: Services, key: str, snapshotter: str) -> bool:
    try:
        services.snapshots.Stat(snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=key))
    except NotFound:
        return False
    return True


def unpack(
    leased: Leased,
    layout: Layout,
    *,
    snapshotter: str = DEFAULT_SNAPSHOTTER,
    progress: Report = ignore,
    timeout: float = 1800.0,
) -> None:
    """Make a snapshot of each layer that has none yet. ``timeout`` is for one layer. May be called twice.

    :raises InvalidImage: a layer is damaged, or its content is not what the configuration says.
    """
    parent = ""
    for layer, diff_id, chain_id in zip(layout.layers, layout.diff_ids, layout.chain_ids, strict=True):
        # Leased first, looked up second, as in ``blobs.keep``.
        resource = leases_pb2.Resource(id=chain_id, type=f"snapshots/{snapshotter}")
        leased.leases.AddResource(leases_pb2.AddResourceRequest(id=leased.lease_id, resource=resource))
        if not has_snapshot(leased, chain_id, snapshotter):
            progress(Progress(layer.digest, "unpacking", 0, layer.size))
            _apply(
                leased,
                layer,
                diff_id=diff_id,
                chain_id=chain_id,
                parent=parent,
                snapshotter=snapshotter,
                timeout=timeout,
            )
        progress(Progress(layer.digest, "unpacked", layer.size, layer.size))
        # A layer may not have been fetched: its snapshot came from another image, which compresses it in another way.
        with suppress(NotFound):
            blobs.label(leased, layer, {"containerd.io/uncompressed": diff_id})
        parent = chain_id


def _apply(
    leased: Leased, layer: Blob, *, diff_id: str, chain_id: str, parent: str, snapshotter: str, timeout: float
) -> None:
    key = f"extract-{time.time_ns()}-{secrets.token_urlsafe(3)} {chain_id}"
    prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent)
    mounts = leased.snapshots.Prepare(prepare).mounts
    try:
        apply = diff_pb2.ApplyRequest(
            diff=types_pb2.Descriptor(media_type=layer.media_type, digest=layer.digest, size=layer.size), mounts=mounts
        )
        try:
            applied = leased.diff.Apply(apply, timeout=timeout).applied
        except NotFound as error:
            raise InvalidImage(f"layer {layer.digest} is missing from the content store") from error
        except Unknown as error:
            if is_damage(error):
                raise InvalidImage(f"layer {layer.digest} can't be unpacked: {error.detail}") from error
            raise
        if applied.digest != diff_id:
            raise InvalidImage(
                f"layer {layer.digest} unpacks to {applied.digest}, but the image's configuration says {diff_id}"
            )
        leased.snapshots.Commit(
            snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, name=chain_id, key=key), timeout=timeout
        )
    except AlreadyExists:
        # Another process unpacked the same layer meanwhile. Its snapshot is as good.
        remove_snapshot(leased, key, snapshotter)
    except BaseException:
        remove_snapshot(leased, key, snapshotter)
        raise


def is_damage(error: ContainerdError) -> bool:
    """Whether the layer is the cause, not the disk or the daemon. Go's decoders begin their errors with their names."""
    signs = ("archive/tar:", "gzip:", "zstd:", "flate:", "unexpected EOF", "wrong diff id")
    return any(sign in error.detail for sign in signs)


def remove_snapshot(services: Services, key: str, snapshotter: str) -> None:
    try:
        services.snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key))
    except ContainerdError:
        # It is gone, or the daemon is: then the end of the lease removes it.
        return


def link(services: Services, layout: Layout, snapshotter: str = DEFAULT_SNAPSHOTTER) -> None:
    """Label the blobs so that the garbage collector finds, from the image's record, everything that belongs to it.

    Labels as containerd's own clients set them (docs/garbage-collection.md). May be called twice.
    """
    way = (*layout.indexes, layout.manifest)
    for index, child in zip(layout.indexes, way[1:], strict=True):
        blobs.label(services, index, {"containerd.io/gc.ref.content.m.0": child.digest})
    below = {f"containerd.io/gc.ref.content.l.{i}": layer.digest for i, layer in enumerate(layout.layers)}
    blobs.label(services, layout.manifest, {"containerd.io/gc.ref.content.config": layout.config.digest, **below})
    if layout.diff_ids:
        snapshot = {f"containerd.io/gc.ref.snapshot.{snapshotter}": layout.top_chain_id}
        blobs.label(services, layout.config, snapshot)
