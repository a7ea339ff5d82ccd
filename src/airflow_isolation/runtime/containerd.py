"""ContainerdRuntime: containerd, through its gRPC API.

containerd's record of a container is made first and deleted last. Who makes the record has the id. The record keeps the
snapshot (the container's file system) from the garbage collector, so no lease is needed. And after a crash, a later
clean-up finds by the record what was left behind.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from airflow_isolation.container_spec import NO_STRINGS
from airflow_isolation.containerd import errors as containerd
from airflow_isolation.containerd import images
from airflow_isolation.containerd.api import (
    containers_pb2,
    leases_pb2,
    runc_options_pb2,
    snapshots_pb2,
    task_types_pb2,
    tasks_pb2,
)
from airflow_isolation.containerd.client import NO_DEADLINE, Client
from airflow_isolation.containerd.file_lock import lock
from airflow_isolation.containerd.image_files import GROUPS, USERS, read_files
from airflow_isolation.containerd.payload import LINUX_RESOURCES, SPEC, pack, pack_json
from airflow_isolation.containerd.progress import ignore
from airflow_isolation.containerd.unpack import is_unpacked, link, unpack
from airflow_isolation.errors import (
    ContainerFailed,
    ContainerNotFound,
    ContainerRuntimeError,
    ImageInvalid,
    ImageNotFound,
    ImagePullFailed,
    RuntimeUnreachable,
    SpecRefused,
)
from airflow_isolation.oci import (
    EtcFiles,
    ImageConfig,
    build_runtime_spec,
    check_identifier,
    check_mount_source_on_disk,
    container_hostname,
    is_container_id,
    linux_limits,
    load_profile,
    needs_account_files,
    read_host,
    resolve_account,
    volume_targets,
    write_etc_files,
)
from airflow_isolation.runtime.change import check_in_use, check_not_ended, limits_refused
from airflow_isolation.runtime.containerd_errors import translated
from airflow_isolation.runtime.containerd_stats import task_stats
from airflow_isolation.runtime.files import files_of_daemon
from airflow_isolation.runtime.host_trouble import writing_in
from airflow_isolation.runtime.interface import (
    COUNTED,
    Container,
    ContainerRuntime,
    ContainerState,
    ExitStatus,
    Image,
    ImageInNamespace,
    PendingExit,
    Progress,
    PullPolicy,
    RuntimeInfo,
    Stats,
    Stray,
)
from airflow_isolation.runtime.kept_output import KeptOutput, output_file, release
from airflow_isolation.runtime.labels import OWNER, Owner
from airflow_isolation.runtime.namespaced_root import NamespacedRoots
from airflow_isolation.runtime.pending_exit import ExitQuestion, WatchedExit
from airflow_isolation.runtime.reachability import peer_pid, sees_shims
from airflow_isolation.runtime.words import start_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    import grpc
    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.protobuf.timestamp_pb2 import Timestamp

    from airflow_isolation.container_spec import ContainerSpec, Resources
    from airflow_isolation.containerd.layout import Layout
    from airflow_isolation.containerd.progress import Report
    from airflow_isolation.oci import Account, HostFacts
    from airflow_isolation.runtime.counted import CgroupFiles
    from airflow_isolation.runtime.placement import Placements
    from airflow_isolation.runtime.shims import Shim

logger = logging.getLogger(__name__)

_SHIM = "io.containerd.runc.v2"
_NETWORKS = ("host", "none")

# Seconds in which a failed create must be undone, and in which a remove must be done.
_UNDO_SECONDS = 20.0
_REMOVE_SECONDS = 60.0
_PAUSE_SECONDS = 0.05
# Seconds to read the rest of an ended container's output, which may take longer only while a child holds its stdout.
_SETTLE_SECONDS = 5.0
_METRICS_AT_ONCE = 25
_LAYOUTS = 64
_UNPACK_LEASE = timedelta(hours=1)

_STATES = {
    task_types_pb2.CREATED: ContainerState.CREATED,
    task_types_pb2.RUNNING: ContainerState.RUNNING,
    task_types_pb2.STOPPED: ContainerState.STOPPED,
    task_types_pb2.PAUSED: ContainerState.PAUSED,
    task_types_pb2.PAUSING: ContainerState.PAUSED,
}


class ContainerdRuntime(ContainerRuntime):
    """The containers and images of one ``namespace`` in the containerd at ``socket_path``.

    Parameters
    ----------
    state_dir:
        the directory of this runtime's own files; made when it is missing. In it, ``containers/<id>`` holds a container's
        output and files for its /etc, ``accounts`` what is known of images' users, ``pulls`` the locks of pulls, and
        ``roots`` images' layers as user namespaces see them.
    snapshotter:
        holds the images and the containers' file systems.
    runtime_binary:
        the OCI runtime that containerd's shim calls; empty is runc.
    hosts_dir:
        containerd's directory of registry settings, for pulls.
    cgroup_mount_path:
        where the host's cgroups are mounted.
    timeout:
        seconds for every call that has no limit of its own.

    It connects at its first call. So an object that was made before a fork may be used by parent or child, but not by both.

    """

    def __init__(
        self,
        socket_path: str = "/run/containerd/containerd.sock",
        namespace: str = "airflow",
        state_dir: Path = Path("/run/airflow-isolation"),
        *,
        snapshotter: str = "overlayfs",
        runtime_binary: str = "",
        hosts_dir: str = "/etc/containerd/certs.d",
        cgroup_mount_path: str = "/sys/fs/cgroup",
        timeout: float = 30.0,
    ) -> None:
        self._socket_path = socket_path
        self._namespace = namespace
        self._state_dir = state_dir
        self._all_files = files_of_daemon(state_dir, "containerd", socket_path, namespace)
        self._snapshotter = snapshotter
        self._runtime_binary = runtime_binary
        self._hosts_dir = hosts_dir
        self._cgroup_mount_path = cgroup_mount_path
        self._timeout = timeout
        self._roots = NamespacedRoots(state_dir, socket_path=socket_path, snapshotter=snapshotter)
        self._connecting = threading.Lock()
        self._client: Client | None = None
        # By digest of the image; a digest's content never changes.
        self._layouts: dict[str, Layout] = {}
        # The outputs that this process is reading.
        self._outputs: WeakValueDictionary[str, KeptOutput] = WeakValueDictionary()

    def info(self) -> RuntimeInfo:
        with self._translated("ask for its version", failed=RuntimeUnreachable):
            version = self._connected().version.Version(Empty()).version
        return RuntimeInfo(
            backend="containerd", version=version, socket_path=self._socket_path, namespace=self._namespace
        )

    def ensure_image(
        self,
        reference: str,
        policy: PullPolicy = PullPolicy.IF_NOT_PRESENT,
        *,
        progress: Callable[[Progress], None] | None = None,
        timeout: float = 600.0,
    ) -> Image:
        if policy is PullPolicy.NEVER:
            return self._unpacked(reference, hint="Import it, or set image_pull_policy to if_not_present")
        if policy is PullPolicy.IF_NOT_PRESENT:
            with suppress(ImageNotFound):
                return self._unpacked(reference)
        # Imported here and in import_image, because `airflow containers list` doesn't need them.
        from airflow_isolation.containerd.pull import pull

        with self._translated(f"pull {reference}", missing=ImageNotFound, failed=ImagePullFailed):
            client = self._connected()
            image = pull(
                client,
                reference,
                lock_directory=self._state_dir / "pulls",
                always=policy is PullPolicy.ALWAYS,
                snapshotter=self._snapshotter,
                host_directory=self._hosts_dir,
                progress=_reporter(progress),
                timeout=timeout,
            )
            return _described(image, images.resolve(client, image))

    def import_image(
        self, archive: Path, *, reference: str = "", progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        from airflow_isolation.containerd.archive_import import import_archive

        with self._translated(f"import {archive}", failed=ImageInvalid):
            client = self._connected()
            imported = import_archive(
                client, archive, name=reference, snapshotter=self._snapshotter, progress=_reporter(progress)
            )
            return tuple(_described(image, images.resolve(client, image)) for image in imported)

    def list_images(self) -> tuple[Image, ...]:
        with self._translated("list the images"):
            client = self._connected()
            found = images.list_all(client)
            return tuple(map(partial(_described_if_whole, client), found))

    def remove_image(self, reference: str) -> None:
        with self._translated(f"remove the image {reference}", missing=ImageNotFound):
            images.remove(self._connected(), reference)

    def in_user_namespace(self, spec: ContainerSpec, *, digest: str, ids: int) -> ImageInNamespace:
        known = (digest, spec.user, spec.allow_root, ids)
        if (found := self._roots.found.get(known)) is None:
            _, layout = self._found(spec.image, seen_before=True)
            account = self._account(spec, layout, ImageConfig.parse(layout.config_json).user)
            with self._translated(f"look at the image {spec.image}", missing=ImageNotFound):
                found = self._roots.found[known] = self._roots.look(self._connected(), layout, account, ids=ids)
        return found

    def create(self, id: str, spec: ContainerSpec) -> Container:
        check_identifier(id)
        _check_network(spec)
        for mount in spec.mounts:
            if mount.kind == "bind":
                check_mount_source_on_disk(mount.source)
        stored, layout = self._found(spec.image, seen_before=True)
        image = ImageConfig.parse(layout.config_json)
        account = self._account(spec, layout, image.user)
        files = self._files(id)
        placement = self._placements.plan(id, spec, self._cgroup_parent(spec.cgroup_parent))
        document = build_runtime_spec(
            replace(spec, resources=placement.resources),
            id=id,
            image=image,
            account=account,
            host=self._host,
            seccomp=load_profile(spec.seccomp, forks_into=spec.forks_into),
            etc=EtcFiles.within(files),
            cgroups_path=placement.cgroups_path,
            limit_files=placement.limit_files,
            volumes=self._empty_volumes(spec, layout, image),
        )
        # Unique, so that a left-over of an earlier container with this id is never taken for ours.
        snapshot_key = f"{id}-{secrets.token_hex(4)}"
        record = containers_pb2.Container(
            id=id,
            labels=spec.labels,
            image=stored.name,
            runtime=containers_pb2.Container.Runtime(name=_SHIM, options=self._runtime_options()),
            spec=pack_json(SPEC, document),
            snapshotter=self._snapshotter,
            snapshot_key=snapshot_key,
        )
        client = self._connected()
        with ExitStack() as undo:
            # Registered before the call: even if no answer comes, the record may have been made.
            undo.callback(self._undo, record)
            with self._translated(f"create the container {id}"):
                record = client.containers.Create(containers_pb2.CreateContainerRequest(container=record)).container
            # Made after the record, by which a later clean-up finds it.
            self._placements.make(placement)
            with self._translated(f"make a file system of the image {spec.image}", missing=ImageNotFound):
                prepare = snapshots_pb2.PrepareSnapshotRequest(
                    snapshotter=self._snapshotter, key=snapshot_key, parent=layout.top_chain_id
                )
                rootfs = client.snapshots.Prepare(prepare).mounts
            with writing_in(self._state_dir):
                files.mkdir(parents=True)
                self._placements.remember(self._cgroup_parent(spec.cgroup_parent))
                # Readable whatever the umask is: the shim and the container may run as other users.
                files.chmod(0o755)
                write_etc_files(files, hostname=container_hostname(spec, id), network=spec.network)
                output = KeptOutput(id, files)
            undo.callback(output.close)
            stdio = str(output.fifo)
            hint = partial(start_hint, image=spec.image, program=spec.argv[0])
            with (
                self._roots.ready(id, rootfs, spec, document["mounts"]) as ready,
                self._translated(f"start the container {id}", failed=ContainerFailed, hint=hint),
            ):
                task = client.tasks.Create(
                    tasks_pb2.CreateTaskRequest(container_id=id, rootfs=ready, stdout=stdio, stderr=stdio)
                )
            # Imported late, like ``_placements``; see there.
            from airflow_isolation.runtime.placement import check_cgroup

            check_cgroup(task.pid, placement.cgroups_path)
            undo.pop_all()
        output.begin()
        self._outputs[id] = output
        return _container(record, None, state=ContainerState.CREATED, pid=task.pid)

    def wait(self, id: str) -> PendingExit:
        check_identifier(id)
        return WatchedExit(id, _TaskExit(id, self._connected, self._socket_path)).begin()

    def start(self, id: str) -> int:
        check_identifier(id)
        with self._translated(f"start the container {id}", failed=ContainerFailed):
            return self._connected().tasks.Start(tasks_pb2.StartRequest(container_id=id)).pid

    def kill(self, id: str, signal: signal.Signals = signal.SIGKILL, *, everyone: bool = False) -> None:
        check_identifier(id)
        request = tasks_pb2.KillRequest(container_id=id, signal=signal, all=everyone)
        with self._translated(f"send {signal.name} to the container {id}"), suppress(containerd.NotFound):
            self._connected().tasks.Kill(request)

    def update(self, id: str, resources: Resources) -> None:
        check_identifier(id)
        with self._translated(f"look at the container {id}"):
            client = self._connected()
            record = client.containers.Get(containers_pb2.GetContainerRequest(id=id)).container
        check_not_ended(self.get(id))
        if self._placements.update(id, _cgroups_path(record), resources):
            return
        limits = linux_limits(resources, self._host)
        if self._host.cgroup_v2:
            check_in_use(id, resources, self.stats([id]).get(id))
        request = tasks_pb2.UpdateTaskRequest(container_id=id, resources=pack_json(LINUX_RESOURCES, limits))
        with (
            limits_refused(id, resources),
            self._translated(f"change the limits of the container {id}", failed=ContainerFailed),
        ):
            client.tasks.Update(request)

    def relabel(self, id: str, labels: Mapping[str, str]) -> None:
        check_identifier(id)
        request = containers_pb2.UpdateContainerRequest(
            container=containers_pb2.Container(id=id, labels=labels), update_mask=FieldMask(paths=["labels"])
        )
        with self._translated(f"give labels to the container {id}"):
            self._connected().containers.Update(request)

    def remove(self, id: str) -> None:
        check_identifier(id)
        with self._translated(f"remove the container {id}"), _one_at_a_time(self._files(id), _REMOVE_SECONDS):
            client = self._connected()
            try:
                record = client.containers.Get(containers_pb2.GetContainerRequest(id=id)).container
            except containerd.NotFound:
                return
            self._dismantle(record, _REMOVE_SECONDS)

    def remove_strays(self, *, dry_run: bool = False) -> tuple[Stray, ...]:
        parents = self._placements.parents(self._cgroup_parent())
        with self._translated("remove what is left of containers"):
            abandoned = [id for one in parents for id in self._placements.remove_abandoned(one, dry_run=dry_run)]
            found = [Stray(kind="cgroup", id=id) for id in abandoned]
            found += self._expired_leases(dry_run=dry_run)
            if sees_shims(self._socket_path):
                from airflow_isolation.runtime import strays

                found += strays.remove_strays(
                    self._placements,
                    parents,
                    files=self._all_files,
                    is_ours=self._is_own_shim,
                    recorded=self._recorded,
                    dry_run=dry_run,
                )
        return tuple(dict.fromkeys(found))

    def seen_on_host(self) -> frozenset[str]:
        if os.geteuid() != 0:
            return frozenset()
        from airflow_isolation.runtime.shims import shims

        parents = self._placements.parents(self._cgroup_parent())
        cgroups = (id for parent in parents for id in self._placements.ids(parent))
        # A shim may be all that is left: containerd forgets one that it was starting when it was killed.
        own = (shim.id for shim in shims() if is_container_id(shim.id) and self._is_own_shim(shim))
        # And its directory may be, which is not removed as long as it is young.
        files = (path.name for path in self._all_files.glob("*") if is_container_id(path.name))
        return frozenset((*cgroups, *own, *files))

    def remove_unused_roots(self, *, dry_run: bool = False) -> tuple[Path, ...]:
        return self._roots.remove_unused(self._first_uids, dry_run=dry_run)

    def get(self, id: str) -> Container:
        check_identifier(id)
        with self._translated(f"look at the container {id}"):
            client = self._connected()
            record = client.containers.Get(containers_pb2.GetContainerRequest(id=id)).container
            try:
                process = client.tasks.Get(tasks_pb2.GetRequest(container_id=id)).process
            except containerd.NotFound:
                process = None
        return _container(record, process)

    def list(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[Container, ...]:
        return tuple(container for container, _ in self._listed(labels, lambda _: {}))

    def list_with_use(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[tuple[Container, Stats | None], ...]:
        listed = self._listed(labels, self._read_use)
        unread = [container.id for container, use in listed if use is None and container.state in COUNTED]
        stats = self.stats(unread) if unread else {}
        # A container that was not started yet has a process too, the runtime's own, and must not count as running.
        return tuple(
            (container, (use or stats.get(container.id)) if container.state in COUNTED else None)
            for container, use in listed
        )

    def _listed(
        self, labels: Mapping[str, str], read_use: Callable[[frozenset[str]], Mapping[str, Stats]]
    ) -> tuple[tuple[Container, Stats | None], ...]:
        # containerd drops a label without a value, and its filters don't find one, so such labels are compared below.
        wanted = ",".join(f"labels.{_quoted(key)}=={_quoted(value)}" for key, value in labels.items() if value)
        request = containers_pb2.ListContainersRequest(filters=[wanted] if wanted else [])
        with self._translated("list the containers"):
            client = self._connected()
            # The daemon asks every shim, which takes time. The rest is done meanwhile.
            processes_asked = client.tasks.List.future(tasks_pb2.ListTasksRequest(), timeout=self._timeout)
            records = [
                record
                for record in _records(client, request)
                if all(record.labels.get(key, "") == value for key, value in labels.items())
            ]
            used = read_use(frozenset(record.id for record in records))
            processes = {process.id: process for process in processes_asked.result().tasks}
        records.sort(key=lambda record: (record.created_at.ToNanoseconds(), record.id))
        return tuple((_container(record, processes.get(record.id)), used.get(record.id)) for record in records)

    def _read_use(self, ids: frozenset[str]) -> Mapping[str, Stats]:
        ours = self._placements.stats(ids, self._cgroup_parent())
        return {**ours, **self._cgroup_files.read_use({one: one for one in ids - ours.keys()})}

    def stats(self, ids: Iterable[str]) -> Mapping[str, Stats]:
        asked = frozenset(check_identifier(one) for one in ids)
        ours = dict(self._placements.stats(asked, self._cgroup_parent()))
        found, unknown = self._cgroup_files.read({one: one for one in asked - ours.keys()}, self._pid)
        ours.update(found)
        wanted = [f"id=={_quoted(one)}" for one in sorted(unknown)]
        if not wanted:
            return ours
        with self._translated("ask for counters"):
            # In one call the daemon asks the shims one after the other, so several calls run at a time.
            parts = [wanted[start : start + _METRICS_AT_ONCE] for start in range(0, len(wanted), _METRICS_AT_ONCE)]
            ask = self._connected().tasks.Metrics.future
            calls = [ask(tasks_pb2.MetricsRequest(filters=part), timeout=self._timeout) for part in parts]
            metrics = [metric for call in calls for metric in call.result().metrics]
        # A task that has ended keeps its cgroup until it is deleted, but no process is in it.
        counted = ((metric.id, task_stats(metric.data)) for metric in metrics)
        return {**ours, **{one: stats for one, stats in counted if stats is not None and stats.pids}}

    def output(self, id: str, *, limit: int = 65536) -> bytes:
        ended = self.get(id).state is ContainerState.STOPPED
        kept = self._outputs.get(id)
        if ended and kept is not None:
            kept.settle(_SETTLE_SECONDS)
        try:
            with output_file(self._files(id)).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
                return file.read(limit)
        except FileNotFoundError:
            return b""

    def close(self) -> None:
        with self._connecting:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # Below: what the methods above have in common.

    def _connected(self) -> Client:
        with self._connecting:
            if self._client is None:
                self._client = Client(
                    self._socket_path,
                    namespace=self._namespace,
                    timeout=self._timeout,
                    lease_labels={OWNER: str(Owner.this_process())},
                )
            return self._client

    def _translated(
        self,
        doing: str,
        *,
        missing: type[ContainerRuntimeError] = ContainerNotFound,
        failed: type[ContainerRuntimeError] = ContainerRuntimeError,
        hint: Callable[[str], str] = lambda _: "",
    ) -> AbstractContextManager[None]:
        return translated(self._socket_path, doing, missing=missing, failed=failed, hint=hint)

    def _first_uids(self) -> frozenset[int]:
        with self._translated("list the containers"):
            records = _records(self._connected(), containers_pb2.ListContainersRequest())
        documents = (json.loads(record.spec.value or b"{}") for record in records)
        mappings = (document.get("linux", {}).get("uidMappings") for document in documents)
        return frozenset(int(mapping[0]["hostID"]) for mapping in mappings if mapping)

    def _is_own_shim(self, shim: Shim) -> bool:
        return shim.is_of(self._socket_path, self._namespace)

    def _recorded(self) -> frozenset[str]:
        return frozenset(record.id for record in _records(self._connected(), containers_pb2.ListContainersRequest()))

    def _expired_leases(self, *, dry_run: bool) -> Iterator[Stray]:
        """Leases of dead workers that were pulling or unpacking.

        They would expire by themselves, but only after an hour or so.
        """
        client = self._connected()
        for lease in client.leases.List(leases_pb2.ListRequest(filters=[f"labels.{_quoted(OWNER)}"])).leases:
            owner = Owner.parse(lease.labels[OWNER])
            if owner is not None and owner.is_gone():
                if not dry_run:
                    with suppress(containerd.NotFound):
                        client.leases.Delete(leases_pb2.DeleteRequest(id=lease.id))
                yield Stray(kind="lease", id=lease.id)

    def _pid(self, id: str) -> int:
        try:
            return self.get(id).pid
        except ContainerNotFound:
            return 0

    # The code for cgroups is imported at its first use: in list_with_use that happens while the daemon asks its shims.

    @cached_property
    def _placements(self) -> Placements:
        from airflow_isolation.runtime.placement import Placements

        return Placements(self._cgroup_mount_path, self._state_dir)

    @cached_property
    def _cgroup_files(self) -> CgroupFiles:
        from airflow_isolation.runtime.counted import CgroupFiles

        return CgroupFiles(f"/{self._cgroup_parent()}/{{}}")

    @cached_property
    def _host(self) -> HostFacts:
        return read_host(
            daemon_pid=peer_pid(self._socket_path),
            daemon_paths=(self._socket_path,),
            runtime=self._runtime_binary or "runc",
        )

    def _found(self, reference: str, *, hint: str = "", seen_before: bool = False) -> tuple[images.Image, Layout]:
        """The image in the store, and its layout for this host. ``seen_before``: documents read earlier may be used.

        :raises ImageNotFound: no image has that name.
        :raises ImageInvalid: it is for other platforms only, or can't be read.
        """
        with self._translated(f"use the image {reference}", missing=ImageNotFound, failed=ImageInvalid):
            client = self._connected()
            try:
                image = images.get(client, reference)
            except containerd.NotFound as error:
                error.hint = hint or error.hint
                raise
            layout = self._layouts.get(image.digest) if seen_before else None
            if layout is None:
                layout = images.resolve(client, image)
                if len(self._layouts) >= _LAYOUTS:
                    self._layouts.clear()
                self._layouts[image.digest] = layout
            return image, layout

    def _account(self, spec: ContainerSpec, layout: Layout, image_user: str) -> Account:
        user = spec.user or image_user
        with self._translated(f"read the accounts of the image {spec.image}", missing=ImageNotFound):
            try:
                files = read_files(
                    self._connected(),
                    layout,
                    snapshotter=self._snapshotter,
                    cache_directory=self._state_dir / "accounts",
                )
            except containerd.PermissionDenied as error:
                if needs_account_files(user):
                    raise SpecRefused(
                        f"the user {user!r} of the image {spec.image} can't be looked up: only root can read the "
                        "image's /etc/passwd through containerd",
                        hint="Set run_as_user to uid:gid in numbers, or run the worker as root",
                    ) from error
                files = {}
        passwd, group = (_text(files.get(path)) for path in (USERS, GROUPS))
        return resolve_account(user, passwd=passwd, group=group, allow_root=spec.allow_root, image=spec.image)

    def _empty_volumes(self, spec: ContainerSpec, layout: Layout, image: ImageConfig) -> tuple[str, ...]:
        """The VOLUMEs that get a tmpfs: those in which the image has no files. The others stay visible, read-only."""
        volumes = volume_targets(image.volumes, spec.mounts) if spec.read_only_root else ()
        if not volumes:
            return ()
        with self._translated(f"look at the volumes of the image {spec.image}", missing=ImageNotFound):
            try:
                found = read_files(
                    self._connected(),
                    layout,
                    volumes,
                    directories=True,
                    snapshotter=self._snapshotter,
                    cache_directory=self._state_dir / "accounts",
                )
            except containerd.PermissionDenied:
                return ()  # only root can look, and no files of the image must be hidden by mistake
        return tuple(volume for volume in volumes if not found[volume])

    def _unpacked(self, reference: str, *, hint: str = "") -> Image:
        image, layout = self._found(reference, hint=hint, seen_before=True)
        with self._translated(f"unpack the image {reference}", missing=ImageNotFound, failed=ImageInvalid):
            client = self._connected()
            if not is_unpacked(client, layout, self._snapshotter):
                # Another program brought the image, unpacked for another snapshotter or not at all.
                with client.lease(expires=_UNPACK_LEASE) as leased:
                    unpack(leased, layout, snapshotter=self._snapshotter)
                    link(leased, layout, self._snapshotter)
        return _described(image, layout)

    def _runtime_options(self) -> AnyMessage | None:
        return pack(runc_options_pb2.Options(binary_name=self._runtime_binary)) if self._runtime_binary else None

    def _cgroup_parent(self, cgroup_parent: str = "") -> str:
        return (cgroup_parent or self._namespace).strip("/")

    def _files(self, id: str) -> Path:
        return self._all_files / id

    def _undo(self, record: containers_pb2.Container) -> None:
        """Undo a create that failed, but only if the record under this id is the one that it made."""
        deadline = time.monotonic() + _UNDO_SECONDS
        try:
            request = containers_pb2.GetContainerRequest(id=record.id)
            current = self._connected().containers.Get(request, timeout=_left(deadline)).container
            if current.snapshot_key == record.snapshot_key:
                self._dismantle(current, _UNDO_SECONDS)
        except containerd.NotFound:
            return
        except (containerd.ContainerdError, ContainerRuntimeError) as error:
            logger.warning("What is left of the container %s will have to be pruned: %s", record.id, error)

    def _dismantle(self, record: containers_pb2.Container, seconds: float) -> None:
        """Release what a container holds, the record last.

        A step may find its work done already, by another process or before.

        :raises DeadlineExceeded: it is not done within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        if not self._end_task(record.id, deadline) and sees_shims(self._socket_path):
            self._end_forgotten_shim(record.id, deadline)
        client = self._connected()
        _unless_gone(
            client.snapshots.Remove,
            snapshots_pb2.RemoveSnapshotRequest(snapshotter=record.snapshotter, key=record.snapshot_key),
            deadline,
        )
        self._placements.remove(record.id, _cgroups_path(record), _left(deadline))
        release(self._files(record.id))
        shutil.rmtree(self._files(record.id), ignore_errors=True)
        _unless_gone(client.containers.Delete, containers_pb2.DeleteContainerRequest(id=record.id), deadline)

    def _end_forgotten_shim(self, id: str, deadline: float) -> None:
        """End a shim that the daemon does not know: it was killed while it started the shim, and what the shim called
        goes on.
        """
        from airflow_isolation.runtime.shims import shims

        for shim in shims():
            if shim.id == id and self._is_own_shim(shim) and not shim.end(_left(deadline)):
                raise containerd.DeadlineExceeded(f"the shim of the container {id} does not end")

    def _end_task(self, id: str, deadline: float) -> bool:
        """Kill and delete the task, in any state it may have, even if shim or daemon fail meanwhile. False: the daemon knew
        no task.
        """
        tasks = self._connected().tasks
        while True:
            try:
                process = tasks.Get(tasks_pb2.GetRequest(container_id=id), timeout=_left(deadline)).process
                if process.status != task_types_pb2.STOPPED:
                    # Kill a task that was never started too: deleted alive, its shim waits ten seconds for the end of
                    # output.
                    kill = tasks_pb2.KillRequest(container_id=id, signal=signal.SIGKILL)
                    with suppress(containerd.NotFound):  # it has ended by itself meanwhile
                        tasks.Kill(kill, timeout=_left(deadline))
                    tasks.Wait(tasks_pb2.WaitRequest(container_id=id), timeout=_left(deadline))
                tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id=id), timeout=_left(deadline))
                return True
            except containerd.NotFound:
                # containerd 2.1 leaves a shim behind when it refused the task because the runtime lacks a feature.
                try:
                    tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id=id), timeout=_left(deadline))
                except containerd.NotFound:
                    return False
                except containerd.DeadlineExceeded:
                    raise
                except containerd.ContainerdError as error:
                    # After a shim was killed, containerd keeps its connection for a moment.
                    reason = error
                else:
                    return True
            except containerd.DeadlineExceeded:
                raise
            except containerd.ContainerdError as error:
                # The shim has just died and containerd has not noticed yet, or containerd restarts.
                reason = error
            if _left(deadline) <= _PAUSE_SECONDS:
                raise containerd.DeadlineExceeded(f"the container {id} does not end: {reason.detail}", call=reason.call)
            logger.debug("Ending the container %s: %s", id, reason)
            time.sleep(_PAUSE_SECONDS)


class _TaskExit(ExitQuestion):
    """Tasks.Wait, without a deadline. containerd may restart meanwhile."""

    def __init__(self, id: str, connected: Callable[[], Client], socket_path: str) -> None:
        self._id = id
        self._connected = connected
        self._socket_path = socket_path
        self._cancelled = threading.Event()
        self._call: grpc.Future[tasks_pb2.WaitResponse] | None = None

    def prepare(self) -> None:
        # The daemon keeps the status until the task is deleted, so no end can be missed once this is asked.
        with translated(self._socket_path, f"wait for the container {self._id}"):
            client = self._connected()
            client.containers.Get(containers_pb2.GetContainerRequest(id=self._id))
            self._call = client.tasks.Wait.future(tasks_pb2.WaitRequest(container_id=self._id), timeout=NO_DEADLINE)
        if self._cancelled.is_set():
            self._call.cancel()

    def answer(self) -> ExitStatus:
        if self._call is None:
            raise ValueError("nothing was asked")
        with translated(self._socket_path, f"wait for the container {self._id}", failed=RuntimeUnreachable):
            response = self._call.result()
        return ExitStatus(code=response.exit_status, exited_at=_time(response.exited_at))

    def cancel(self) -> None:
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        self._call = None


def _cgroups_path(record: containers_pb2.Container) -> str:
    document = json.loads(record.spec.value or b"{}")
    return str(document.get("linux", {}).get("cgroupsPath", ""))


def _records(client: Client, request: containers_pb2.ListContainersRequest) -> Sequence[containers_pb2.Container]:
    try:
        return client.containers.List(request).containers
    except containerd.ResourceExhausted:
        # Each record has its whole spec, so more than a thousand don't fit into one message.
        return [message.container for message in client.containers.ListStream(request)]


def _described(image: images.Image, layout: Layout) -> Image:
    config = ImageConfig.parse(layout.config_json)
    return Image(
        reference=image.name,
        digest=image.digest,
        size=layout.size,
        created_at=config.created,
        architecture=config.architecture,
        user=config.user,
        labels=config.labels,
        volumes=config.volumes,
    )


def _described_if_whole(client: Client, image: images.Image) -> Image:
    """The image with its details; without them if it can't be used here. It is listed all the same, so it can be removed."""
    try:
        return _described(image, images.resolve(client, image))
    except (containerd.ImageError, ImageInvalid):
        return Image(reference=image.name, digest=image.digest, created_at=image.created_at)


def _reporter(progress: Callable[[Progress], None] | None) -> Report:
    if progress is None:
        return ignore
    return lambda step: progress(Progress(name=step.name, event=step.event, done=step.done, total=step.total))


def _check_network(spec: ContainerSpec) -> None:
    if spec.network not in _NETWORKS:
        raise SpecRefused(
            f"network {spec.network!r} can't be had: named (CNI) networks don't work with containerd yet",
            hint="Set network to host or none, or use the docker backend",
        )


def _container(
    record: containers_pb2.Container,
    process: task_types_pb2.Process | None,
    *,
    state: ContainerState = ContainerState.UNKNOWN,
    pid: int = 0,
) -> Container:
    exit_status = None
    if process is not None:
        state = _STATES.get(process.status, ContainerState.UNKNOWN)
        pid = process.pid
        if state is ContainerState.STOPPED:
            exit_status = ExitStatus(code=process.exit_status, exited_at=_time(process.exited_at))
    return Container(
        id=record.id,
        state=state,
        image=record.image,
        pid=0 if state is ContainerState.STOPPED else pid,
        created_at=_time(record.created_at),
        labels=dict(record.labels),
        exit_status=exit_status,
    )


def _text(content: bytes | None) -> str | None:
    return None if content is None else content.decode(errors="surrogateescape")


def _time(stamp: Timestamp) -> datetime | None:
    # Go's zero time, in the year 1, means "not yet".
    return stamp.ToDatetime(timezone.utc) if stamp.seconds > 0 else None


def _quoted(text: str) -> str:
    # containerd's filters take Go's quoting. JSON's is a part of it as long as no character is escaped to surrogates.
    return json.dumps(text, ensure_ascii=False)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), _PAUSE_SECONDS)


@contextmanager
def _one_at_a_time(directory: Path, seconds: float) -> Iterator[None]:
    """Lock a container's directory, so that only one caller deletes its task: after two, containerd 1.7 may forget a live
    shim.

    :raises DeadlineExceeded: another caller holds it for longer than ``seconds``.
    """
    deadline = time.monotonic() + seconds
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        # The directory is not made yet, or removed already, so there is no task.
        yield
        return
    try:
        try:
            lock(descriptor, end=deadline, what=directory.name)
        except TimeoutError:
            raise containerd.DeadlineExceeded(f"somebody else is removing {directory.name}") from None
        yield
    finally:
        os.close(descriptor)


def _unless_gone(call: Callable[..., object], request: object, deadline: float) -> None:
    while True:
        try:
            call(request, timeout=_left(deadline))
            return
        except containerd.NotFound:
            return
        except containerd.Unavailable:
            # The daemon restarts. The call may be repeated: if it was done, the thing is gone, which is success.
            if _left(deadline) <= _PAUSE_SECONDS:
                raise
            time.sleep(_PAUSE_SECONDS)
