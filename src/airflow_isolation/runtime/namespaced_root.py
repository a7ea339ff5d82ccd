"""Images in user namespaces: finds out whether an image's files keep their owners there, and prepares root file systems."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd.api import types_pb2
from airflow_isolation.containerd.errors import InvalidImage
from airflow_isolation.containerd.image_files import closed_to_others, snapshot
from airflow_isolation.containerd.mapped_layers import MappingError, mapped_layers, unmap_unless, why_not_mapped
from airflow_isolation.containerd.mount_points import (
    HOST_IDS,
    MountPointError,
    dress,
    followed,
    layers_of,
    make_mount_points,
    with_layers,
)
from airflow_isolation.errors import ContainerFailed, ContainerRuntimeError
from airflow_isolation.oci.idmapped import why_no_overlay
from airflow_isolation.oci.mounts import check_led_target
from airflow_isolation.runtime.host_trouble import writing_in
from airflow_isolation.runtime.interface import ImageInNamespace
from airflow_isolation.runtime.reachability import peer_pid

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.containerd.client import Client
    from airflow_isolation.containerd.layout import Layout
    from airflow_isolation.oci import Account

_SECONDS = 30.0
#: Uids for the trial mount; any will do.
_FIRST_TO_TRY = 2**30
_PREFIX = "namespace-"


class NamespacedRoots:
    """The images of one daemon.

    Mounted layers are in ``<state_dir>/roots``, what was found out in ``<state_dir>/accounts``.
    """

    def __init__(self, state_dir: Path, *, socket_path: str, snapshotter: str) -> None:
        self._state_dir = state_dir
        self._place = state_dir.absolute() / "roots"
        self._answers = state_dir / "accounts"
        self._socket_path = socket_path
        self._snapshotter = snapshotter
        #: Answers found before: by digest of the image, user, whether root is allowed, and number of ids.
        self.found: dict[tuple[str, str, bool, int], ImageInNamespace] = {}

    def look(self, client: Client, layout: Layout, account: Account, *, ids: int) -> ImageInNamespace:
        """How the account would see the image in a user namespace of so many ids. The answer is kept.

        :raises ContainerdError: the daemon failed.
        :raises HostTrouble: the answer can't be written.
        """
        highest = max(account.uid, *account.additional_gids)
        if highest >= ids:
            return ImageInNamespace(obstacle=f"the user's id {highest} is not among the {ids} ids of a user namespace")
        kept = self._kept(layout, account)
        try:
            return ImageInNamespace(**json.loads(kept.read_bytes()))
        except (OSError, ValueError, TypeError):
            found = self._found(client, layout, account, ids)
        with writing_in(self._state_dir):
            _write(kept, json.dumps(asdict(found)))
        return found

    @contextmanager
    def ready(
        self, id: str, rootfs: Iterable[types_pb2.Mount], spec: ContainerSpec, mounts: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[types_pb2.Mount, ...]]:
        """Prepare a snapshot for a container: make its mount points. Yields how to mount it; valid until the block ends.

        :raises SpecRefused: the image's links lead a mount to a place that is not allowed.
        :raises ContainerFailed: it can't be prepared.
        """
        namespace = spec.user_namespace
        (mounted,) = rootfs
        if namespace is None:
            self._check(id, mounted, mounts)
            yield (mounted,)
            return
        ids = range(namespace.first, namespace.first + namespace.size) if namespace.keeps_owners else HOST_IDS
        with ExitStack() as held:
            try:
                layers, merged = layers_of(mounted.type, mounted.source, mounted.options)
                _look_at_mount_points(layers, mounts, merged=merged, make=ids)
                if namespace.keeps_owners:
                    own, *images = layers
                    dress(Path(own), Path(images[0]).stat(), ids)
                    shown = held.enter_context(
                        mapped_layers(
                            self._place,
                            images,
                            first=namespace.first,
                            size=namespace.size,
                            pid=peer_pid(self._socket_path),
                            end=time.monotonic() + _SECONDS,
                        )
                    )
                    options = with_layers(mounted.options, shown, writable=not spec.read_only_root)
                    mounted = types_pb2.Mount(type=mounted.type, source=mounted.source, options=options)
            except (MountPointError, MappingError, OSError, ValueError) as error:
                if isinstance(error, MappingError):
                    self._forget()
                raise ContainerFailed(f"the file system of the container {id} can't be made ready: {error}") from error
            yield (mounted,)

    def _check(self, id: str, mounted: types_pb2.Mount, mounts: Iterable[Mapping[str, Any]]) -> None:
        """Without a user namespace the runtime makes missing mount points. So only check where the image's links lead."""
        if os.geteuid() != 0:
            return  # only root sees the layers
        try:
            layers, merged = layers_of(mounted.type, mounted.source, mounted.options)
        except MountPointError:
            return  # another snapshotter, whose layers we can't read; only the runtime checks
        try:
            _look_at_mount_points(layers, mounts, merged=merged)
        except MountPointError as error:
            raise ContainerFailed(f"the file system of the container {id} can't be made ready: {error}") from error

    def remove_unused(self, used: Callable[[], Collection[int]], *, dry_run: bool = False) -> tuple[Path, ...]:
        """Unmount what is mounted for first uids that are not in ``used``, unless it is in use now.

        :raises ContainerRuntimeError: the kernel refused; the error has its reason.
        """
        if not self._place.is_dir():
            return ()
        try:
            return unmap_unless(used().__contains__, self._place, pid=peer_pid(self._socket_path), dry_run=dry_run)
        except (MappingError, OSError) as error:
            raise ContainerRuntimeError(f"layers of images that are mounted in {self._place} stay: {error}") from error

    def _forget(self) -> None:
        """Drop all answers: the kernel refused what it accepted before, so they may be wrong for every image."""
        self.found.clear()
        for kept in self._answers.glob(f"{_PREFIX}*.json"):
            kept.unlink(missing_ok=True)

    def _found(self, client: Client, layout: Layout, account: Account, ids: int) -> ImageInNamespace:
        why_not = why_no_overlay(platform.release()) or self._why_not_mapped(client, layout, ids)
        if not why_not:
            return ImageInNamespace(keeps_owners=True)
        try:
            closed = closed_to_others(
                client, layout, uid=account.uid, gids=account.additional_gids, snapshotter=self._snapshotter
            )
        except InvalidImage as error:
            return ImageInNamespace(obstacle=f"whether others may read all of the image is not known: {error}")
        if not closed:
            return ImageInNamespace()
        return ImageInNamespace(
            obstacle=f"{closed} of the image is closed to others, and users of a user namespace are others, because its "
            f"files can't keep their owners there: {why_not}. Open it in the image (chmod o+rX), or leave it as it is"
        )

    def _why_not_mapped(self, client: Client, layout: Layout, ids: int) -> str:
        with snapshot(client, layout, self._snapshotter, _SECONDS, writable=True) as (mount, *_):
            try:
                layers, merged = layers_of(mount["type"], mount["source"], mount["options"])
            except MountPointError as error:
                return str(error)
            if not merged:
                return f"the snapshotter {self._snapshotter} makes no overlays"
            pid = peer_pid(self._socket_path)
            return why_not_mapped(self._place, layers[1:], first=_FIRST_TO_TRY, size=ids, pid=pid)

    def _kept(self, layout: Layout, account: Account) -> Path:
        of = (layout.top_chain_id, self._snapshotter, account.uid, account.additional_gids, platform.release())
        return self._answers / f"{_PREFIX}{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"


def _look_at_mount_points(
    layers: tuple[str, ...],
    mounts: Iterable[Mapping[str, Any]],
    *,
    merged: bool,
    make: range | None = None,
) -> None:
    """Check where the image's links lead the mounts. With ``make`` (the container's ids), make missing mount points.

    :raises SpecRefused: a mount would be at a place that is not allowed.
    :raises MountPointError: a mount point can't be made.
    """
    before: dict[str, Mapping[str, Any]] = {}
    for mount in mounts:
        place = followed(layers, mount["destination"], elsewhere=before)
        check_led_target(mount["destination"], place, before)
        # A mount point inside another mount is made by the runtime, which may write there.
        inside = any(place.startswith(f"{above}/") and it["type"] != "bind" for above, it in before.items())
        if make is not None and not inside:
            is_directory = mount["type"] != "bind" or Path(mount["source"]).is_dir()
            make_mount_points(layers, [(place, is_directory)], merged=merged, ids=make)
        before[place] = mount


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Written under another name, then renamed: a reader sees a whole file or none.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
