"""DockerRuntime: dockerd, through the docker SDK (the extra ``[docker]``).

Docker has no namespaces: a label stands for one, and a container without it is not there for us. Its container names
are one for all, so an id that is taken in one namespace is taken in each.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import signal
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from airflow_isolation.cgroups import LEAF, CgroupError, slice_name, slices
from airflow_isolation.container_spec import NO_STRINGS
from airflow_isolation.containerd.turn import turn
from airflow_isolation.errors import (
    ContainerExists,
    ContainerFailed,
    ContainerNotFound,
    ContainerRuntimeError,
    ImageInvalid,
    ImageNotFound,
    ImagePullFailed,
    IsolationError,
    RuntimeUnreachable,
    SpecRefused,
)
from airflow_isolation.oci import (
    EtcFiles,
    ImageConfig,
    check_identifier,
    check_mount_source_on_disk,
    container_hostname,
    docker_profile,
    read_host,
    resolve_account,
    write_etc_files,
)
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.change import check_in_use, check_not_ended, limits_refused
from airflow_isolation.runtime.counted import CgroupFiles
from airflow_isolation.runtime.docker_config import ATTEMPT, container_config, docker_limits
from airflow_isolation.runtime.docker_exchange import DockerExchange
from airflow_isolation.runtime.docker_ids import DockerIds
from airflow_isolation.runtime.files import files_of_daemon
from airflow_isolation.runtime.host_trouble import told_by_daemon
from airflow_isolation.runtime.interface import (
    Container,
    ContainerRuntime,
    ContainerState,
    ExitStatus,
    Image,
    PendingExit,
    Progress,
    PullPolicy,
    RuntimeInfo,
    Stats,
    Stray,
)
from airflow_isolation.runtime.pending_exit import UNKNOWN_EXIT, ExitQuestion, WatchedExit
from airflow_isolation.runtime.placement import (
    Placement,
    Placements,
    check_cgroup,
    refuse_what_needs_v2,
    scope_path,
)
from airflow_isolation.runtime.reachability import peer_pid, sees_shims, unreachable
from airflow_isolation.runtime.relabelled import Relabelled
from airflow_isolation.runtime.words import start_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from types import ModuleType

    import docker

    from airflow_isolation.container_spec import ContainerSpec, Resources
    from airflow_isolation.containerd.turn import LastPull
    from airflow_isolation.oci import Account, HostFacts

logger = logging.getLogger(__name__)

# The methods have parameters of the module's name.
KILL = signal.SIGKILL

_STATES = {
    "created": ContainerState.CREATED,
    "running": ContainerState.RUNNING,
    "restarting": ContainerState.RUNNING,
    "removing": ContainerState.STOPPED,
    "paused": ContainerState.PAUSED,
    "exited": ContainerState.STOPPED,
    "dead": ContainerState.STOPPED,
}
# dockerd is asked for several containers' counters at a time; more would only queue there.
_STATS_AT_ONCE = 8
_MAX_ACCOUNT_FILE = 1024 * 1024
# Of the tar in which dockerd sends it.
_TAR_HEADERS = 64 * 1024
_IMPORT_SECONDS = 1800.0
# What the SDK raises for a config.json of an unexpected form; it reads it for every client.
_BROKEN_CONFIG = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
# As its events have them.
_SIGNALS = {str(number.value): number for number in signal.Signals}
_EXIT_CODE = re.compile(r"Exited \((\d+)\)")
# Go's time has nanoseconds, Python's microseconds.
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")
_REMOVAL_PAUSE_SECONDS = 0.02
_UNDO_SECONDS = 20.0
_NO_NETWORK_OF_DOCKER = ("host", "none")
_HOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class DockerRuntime(ContainerRuntime):
    """The containers of one ``namespace`` in the dockerd at ``socket_path``.

    ``state_dir`` holds, in ``containers``, a directory for each container with Docker's id of it and files for its /etc, and
    in ``pulls`` the locks of pulls under way. It is made when it is missing. At ``cgroup_mount_path`` the host's cgroups are
    mounted. ``timeout``, in seconds, is for every call that has no limit of its own.

    :raises ContainerRuntimeError: the docker SDK is not installed.
    """

    def __init__(
        self,
        socket_path: str = "/var/run/docker.sock",
        namespace: str = "airflow",
        state_dir: Path = Path("/run/airflow-isolation"),
        *,
        cgroup_mount_path: str = "/sys/fs/cgroup",
        timeout: float = 60.0,
    ) -> None:
        _sdk()
        self._socket_path = socket_path
        self._namespace = namespace
        self._state_dir = state_dir
        self._all_files = files_of_daemon(state_dir, "docker", socket_path, namespace)
        self._docker_ids = DockerIds(self._all_files)
        self._relabelled = Relabelled(state_dir / "labels")
        self._timeout = timeout
        self._placements = Placements(cgroup_mount_path, state_dir)
        # Where dockerd's two cgroup drivers put a container, unless it was told otherwise.
        self._cgroup_files = CgroupFiles("/docker/{}", "/system.slice/docker-{}.scope")
        self._connecting = threading.Lock()
        self._client: docker.APIClient | None = None
        self._daemon: Mapping[str, Any] = {}
        self._account_files: dict[str, tuple[str | None, str | None]] = {}
        self._filled: dict[str, frozenset[str]] = {}

    def info(self) -> RuntimeInfo:
        return RuntimeInfo(
            backend="docker",
            version=str(self._version()["Version"]),
            socket_path=self._socket_path,
            namespace=self._namespace,
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
            return self._checked(reference, hint="Import it, or set image_pull_policy to if_not_present")
        if policy is PullPolicy.IF_NOT_PRESENT:
            with contextlib.suppress(ImageNotFound):
                return self._checked(reference)
        asked, end = time.time(), time.monotonic() + timeout
        with self._our_turn(reference, end) as last_pull:
            # Somebody else's pull that began after we asked is as good as ours, even when asked for always.
            if last_pull.began() < asked and not (policy is PullPolicy.IF_NOT_PRESENT and self._has_image(reference)):
                began = time.time()
                self._pull(reference, progress, max(end - time.monotonic(), 1.0))
                last_pull.record(began)
        return self._checked(reference)

    def import_image(
        self, archive: Path, *, reference: str = "", progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        # Here and in _pull, because `airflow containers list` has no need of them: they import grpc.
        from airflow_isolation.runtime.docker_archive import opened_archive

        with opened_archive(archive, architecture=self._architecture(), reference=reference) as content:
            if progress is not None:
                for one in content.passed_over:
                    progress(Progress(name=one.name, event=f"passed over ({one.reason})", done=0, total=0))
            before = {image.reference for image in self.list_images()}

            def chunks() -> Iterator[bytes]:
                done = 0
                for chunk in content.chunks():
                    yield chunk
                    done += len(chunk)
                    if progress is not None:
                        progress(Progress(name=archive.name, event="importing", done=done, total=content.size))

            try:
                for document in self._stream(
                    "/images/load?quiet=1",
                    _IMPORT_SECONDS,
                    headers={"Content-Type": "application/x-tar"},
                    body=chunks(),
                ):
                    if document.get("error"):
                        raise ImageInvalid(f"could not import {archive}: {document['error']}")
                return tuple(self._image(name) for name in content.names)
            except BaseException:
                self._forget(content.names, before)
                raise

    def list_images(self) -> tuple[Image, ...]:
        with self._reached("list the images") as api:
            found = api.images()
        images = [
            Image(
                reference=name,
                digest=image["Id"],
                size=image["Size"],
                created_at=datetime.fromtimestamp(image["Created"], timezone.utc) if image["Created"] > 0 else None,
                labels=image["Labels"] or {},
            )
            for image in found
            for name in image["RepoTags"] or ()
            if name != "<none>:<none>"
        ]
        return tuple(sorted(images, key=lambda image: image.reference))

    def remove_image(self, reference: str) -> None:
        with self._reached(f"remove the image {reference}", missing=ImageNotFound) as api:
            # By force, the name goes even while a container uses the content.
            api.remove_image(reference, force=True)

    def create(self, id: str, spec: ContainerSpec) -> Container:
        check_identifier(id)
        for mount in spec.mounts:
            if mount.kind == "bind":
                check_mount_source_on_disk(mount.source)
        self._check_network(spec.network)
        placement, cgroup_parent = self._placed(id, spec)
        image = self._inspect_image(spec.image)
        config = _image_config(image)
        attempt = secrets.token_hex(8)
        # In a network of its own making Docker alone knows who has which address.
        has_our_names = spec.network in _NO_NETWORK_OF_DOCKER
        body = container_config(
            id,
            replace(spec, resources=placement.resources),
            namespace=self._namespace,
            attempt=attempt,
            image=config,
            account=self._account(spec, image["Id"], config.user),
            host=self._host,
            seccomp=docker_profile(
                spec.seccomp,
                architecture=self._host.architecture,
                capabilities=spec.capabilities,
                kernel=self._host.kernel,
                forks_into=spec.forks_into,
            ),
            cgroup_parent=cgroup_parent,
            etc=EtcFiles.within(self._files(id)) if has_our_names else EtcFiles(),
            filled_volumes=self._filled_volumes(spec.image, image["Id"], config.volumes),
        )
        with ExitStack() as undo:
            # Before the call, not after it: when no answer comes, the container may still have been made.
            undo.callback(self._undo, id, attempt)
            hint = partial(start_hint, image=spec.image, program=spec.argv[0])
            with self._reached(
                f"create the container {id}", missing=ImageNotFound, invalid=SpecRefused, hint=hint
            ) as api:
                docker_id = api.create_container_from_config(body, name=id)["Id"]
            # After the record, which leads a later clean-up to them.
            self._docker_ids.note(id, docker_id)
            self._placements.make(placement)
            if has_our_names:
                write_etc_files(self._files(id), hostname=container_hostname(spec, id), network=spec.network)
            container = self.get(id)
            undo.pop_all()
        return container

    def wait(self, id: str) -> PendingExit:
        check_identifier(id)
        container = self._inspect(id)["Id"]
        question = _ContainerExit(
            id,
            exchange=lambda: DockerExchange(self._socket_path, self._timeout),
            path=self._versioned(f"/containers/{container}/wait?condition=next-exit"),
            get=self.get,
        )
        return WatchedExit(id, question).begin()

    def start(self, id: str) -> int:
        check_identifier(id)
        container = self._inspect(id)
        state = container["State"]["Status"]
        if state != "created":
            # To Docker, an ended container may be started again, and a running one be started for nothing.
            raise ContainerFailed(f"could not start the container {id}: it is {state} already")
        program = container["Config"]["Entrypoint"][0]
        hint = partial(start_hint, image=container["Config"]["Image"], program=program)
        with self._reached(f"start the container {id}", invalid=ContainerFailed, hint=hint) as api:
            api.start(container["Id"])
            pid = int(api.inspect_container(container["Id"])["State"]["Pid"])
        parent = container["HostConfig"]["CgroupParent"]
        expected = ""
        if self._placements.is_ours(id, f"{parent}/{LEAF}"):
            expected = f"{parent}/{container['Id']}"
        elif parent.endswith(slices.SUFFIX):
            expected = scope_path(parent, container["Id"])
        if pid and expected:
            try:
                check_cgroup(pid, expected)
            except ContainerFailed:
                self.kill(id)
                raise
        return pid

    def kill(self, id: str, signal: signal.Signals = KILL, *, everyone: bool = False) -> None:
        check_identifier(id)
        try:
            container = self._inspect(id)
        except ContainerNotFound:
            return
        if not container["State"]["Running"]:
            return
        # SIGKILL ends the first process, and with it its pid namespace: everyone.
        if everyone and signal is not KILL:
            self._signal_everyone(container, signal)
            return
        with self._reached(f"send {signal.name} to the container {id}") as api:
            try:
                api.kill(container["Id"], signal.value)
            except _sdk().errors.APIError as error:
                # 404: removed; 409: it ended before the signal reached it.
                if error.status_code not in (404, 409):
                    raise

    def signals_asked_for(self, id: str) -> tuple[signal.Signals, ...]:
        check_identifier(id)
        # By its name: who removes a container by force has it killed, and then it is not there any more.
        of_it = {"container": [id], "event": ["kill"]}
        with self._reached(f"ask who sent signals to the container {id}") as api:
            # With an end to them, dockerd says what it remembers and waits for no more.
            events = list(api.events(since=0, until=time.time(), filters=of_it, decode=True))
        numbers = (str(event.get("Actor", {}).get("Attributes", {}).get("signal", "")) for event in events)
        return tuple(_SIGNALS[number] for number in numbers if number in _SIGNALS)

    def update(self, id: str, resources: Resources) -> None:
        check_identifier(id)
        container = self._inspect(id)
        check_not_ended(_container(container))
        if self._placements.update(id, f"{container['HostConfig']['CgroupParent']}/{LEAF}", resources):
            return
        if (parent := container["HostConfig"]["CgroupParent"]).endswith(slices.SUFFIX) and self._host.cgroup_v2:
            self._placements.check_slice_budget(parent, resources)
        limits = docker_limits(resources, self._host)
        if self._host.cgroup_v2:
            check_in_use(id, resources, self.stats([id]).get(id))
        with limits_refused(id, resources), DockerExchange(self._socket_path, self._timeout) as exchange:
            # Not by the SDK, which knows neither pids nor NanoCpus here.
            path = self._versioned(f"/containers/{container['Id']}/update")
            body = [json.dumps(limits).encode()]
            status = exchange.post(path, headers={"Content-Type": "application/json"}, body=body)
            if status >= 400:
                reason = "".join(str(document.get("message", "")) for document in exchange.documents())
                kind = ContainerNotFound if status == 404 else ContainerFailed
                raise kind(f"could not change the limits of the container {id}: {reason}")

    def relabel(self, id: str, labels: Mapping[str, str]) -> None:
        check_identifier(id)
        self._inspect(id)
        self._relabelled.write(id, labels)

    def remove(self, id: str) -> None:
        check_identifier(id)
        try:
            container = self._inspect(id)
        except ContainerNotFound:
            self._relabelled.forget(id)
            return
        self._dismantle(id, container, self._timeout)
        self._relabelled.forget(id)
        if container["Config"]["Image"] != container["Image"]:
            self._remove_nameless_image(container["Image"])

    def remove_strays(self, *, dry_run: bool = False) -> tuple[Stray, ...]:
        parents = self._placements.parents(self._namespace)
        abandoned = [id for one in parents for id in self._placements.remove_abandoned(one, dry_run=dry_run)]
        named, noted, given_up = self._docker_ids.ids(), self._docker_ids.read(), self._docker_ids.given_up()
        if not named:
            return tuple(Stray(kind="cgroup", id=id) for id in abandoned)
        # Now, after the notes: a container's record is there before its note, and goes before it.
        recorded = self._summaries()
        docker_ids = {summary["Id"] for summary in recorded}
        attempts = {name[1:]: one["Labels"].get(ATTEMPT, "") for one in recorded for name in one["Names"] or ()}
        forgotten = {id: docker_id for id, docker_id in noted.items() if docker_id not in docker_ids}
        return (
            *(Stray(kind="cgroup", id=id) for id in abandoned),
            *self._end_forgotten(forgotten, dry_run=dry_run),
            *self._never_noted(named - noted.keys() - attempts.keys(), dry_run=dry_run),
            *self._unneeded(attempts.items() & given_up.items(), dry_run=dry_run),
        )

    def seen_on_host(self) -> frozenset[str]:
        # What dockerd has forgotten is found by its directory, which goes last.
        return self._docker_ids.ids() if os.geteuid() == 0 else frozenset()

    def get(self, id: str) -> Container:
        check_identifier(id)
        return self._relabelled.applied(_container(self._inspect(id)))

    def list(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[Container, ...]:
        # Docker knows only the labels that a container was made with; those that it was given later are looked at here.
        found = list(self._summaries(NO_STRINGS if self._relabelled else labels))
        found.sort(key=lambda summary: (summary["Created"], summary["Names"]))
        containers = (self._relabelled.applied(_summarised(summary)) for summary in found)
        return tuple(
            container
            for container in containers
            if all(container.labels.get(name) == value for name, value in labels.items())
        )

    def stats(self, ids: Iterable[str]) -> Mapping[str, Stats]:
        wanted = set(ids)
        with self._reached("list the containers") as api:
            running = api.containers(filters={"label": self._label_filters(NO_STRINGS)})
        present = {name: summary["Id"] for summary in running if (name := _name(summary)) in wanted}
        ours = self._placements.stats(frozenset(present), self._namespace)
        elsewhere = {name: docker_id for name, docker_id in present.items() if name not in ours}
        counted_here, unknown = self._cgroup_files.read(elsewhere, self._pid)
        found = {**ours, **counted_here}
        if not unknown:
            return found
        with ThreadPoolExecutor(max_workers=_STATS_AT_ONCE, thread_name_prefix="docker-stats") as pool:
            asked = sorted(unknown)
            counted = zip(asked, pool.map(self._counters, (present[name] for name in asked)), strict=True)
            return {**found, **{name: stats for name, stats in counted if stats is not None}}

    def output(self, id: str, *, limit: int = 65536) -> bytes:
        check_identifier(id)
        container = self._inspect(id)
        with self._reached(f"read the output of the container {id}") as api:
            written: bytes = api.logs(container["Id"], stdout=True, stderr=True, stream=False)
        return written[-limit:] if limit else b""

    def close(self) -> None:
        with self._connecting:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # Below: what the methods above have in common.

    def _connected(self) -> docker.APIClient:
        with self._connecting:
            if self._client is None:
                # "auto" asks the daemon: the SDK's own default is too old for Docker 29, and too new for 20.10.
                try:
                    self._client = _sdk().APIClient(
                        base_url=f"unix://{self._socket_path}", version="auto", timeout=self._timeout
                    )
                except OSError:
                    # requests' errors, of which one is a ValueError too.
                    raise
                except (_sdk().errors.InvalidConfigFile, *_BROKEN_CONFIG) as error:
                    raise ContainerRuntimeError(
                        f"the docker SDK can't read Docker's config.json: {error}",
                        hint="Correct it, or set DOCKER_CONFIG to another directory",
                    ) from error
            return self._client

    @contextlib.contextmanager
    def _reached(
        self,
        doing: str,
        *,
        missing: type[ContainerRuntimeError] = ContainerNotFound,
        invalid: type[IsolationError] = ContainerRuntimeError,
        hint: Callable[[str], str] = lambda _: "",
    ) -> Iterator[Any]:
        """The one place where the SDK's errors become ours. ``doing`` completes "could not …"."""
        requests = importlib.import_module("requests")
        try:
            yield self._connected()
        except _sdk().errors.APIError as error:
            reason = str(error.explanation or error)
            sentence = f"could not {doing}: {reason}"
            if (trouble := told_by_daemon("docker", sentence, reason)) is not None:
                raise trouble from error
            if error.status_code == 404:
                raise missing(sentence, hint=hint(reason)) from error
            if error.status_code == 409 and "is already in use by container" in reason:
                raise ContainerExists(sentence) from error
            if error.status_code == 400:
                raise invalid(sentence, hint=hint(reason)) from error
            kind = invalid if issubclass(invalid, ContainerRuntimeError) else ContainerFailed
            raise kind(sentence, hint=hint(reason)) from error
        except (requests.exceptions.RequestException, _sdk().errors.DockerException, OSError) as error:
            raise unreachable("docker", self._socket_path, _words(error)) from error

    def _version(self) -> Mapping[str, Any]:
        with self._reached("ask for its version", invalid=RuntimeUnreachable) as api:
            version: Mapping[str, Any] = api.version()
        return version

    def _architecture(self) -> str:
        return self._host.architecture

    def _pid(self, id: str) -> int:
        try:
            return self.get(id).pid
        except ContainerNotFound:
            return 0

    @cached_property
    def _host(self) -> HostFacts:
        return read_host(daemon_pid=peer_pid(self._socket_path), daemon_paths=(self._socket_path,))

    @cached_property
    def _cgroup_driver(self) -> tuple[str, str]:
        """``cgroupfs`` or ``systemd`` (``none`` without root), and the version of cgroups; dockerd has them from its start."""
        with self._reached("ask how it makes cgroups") as api:
            found = api.info()
        return found.get("CgroupDriver", ""), found.get("CgroupVersion", "1")

    def _placed(self, id: str, spec: ContainerSpec) -> tuple[Placement, str]:
        """Where the container will be, and its parent in dockerd's words.

        :raises SpecRefused: a limit that can't be, or one that needs a directory of ours where none can be.
        """
        parent = spec.cgroup_parent.strip("/")
        driver, version = self._cgroup_driver
        if (driver, version) == ("cgroupfs", "2"):
            placement = self._placements.plan(id, spec, parent or self._namespace)
            if placement.tree is not None:
                return placement, f"/{placement.tree.workload(placement.level, id)}"
        elif (driver, version) == ("systemd", "2"):
            reason = _driver_refusal(driver, version)
            placement = self._placements.plan_slice(id, spec, parent or self._namespace, reason)
            return placement, placement.slice
        else:
            refuse_what_needs_v2(
                spec.resources, _driver_refusal(driver, version), v1=not self._host.cgroup_v2, budget=spec.budget
            )
            placement = Placement(id=id, cgroups_path="", resources=spec.resources)
        try:
            words = slice_name(parent) if parent and driver == "systemd" else f"/{parent}" if parent else ""
        except CgroupError as error:
            raise SpecRefused(f"cgroup_parent: {error.message}", hint=error.hint) from error
        return placement, words

    def _files(self, id: str) -> Path:
        return self._all_files / id

    def _label_filters(self, wanted: Mapping[str, str]) -> Sequence[str]:
        return [f"{name}={value}" for name, value in {**wanted, labels.NAMESPACE: self._namespace}.items()]

    def _summaries(self, wanted: Mapping[str, str] = NO_STRINGS) -> Sequence[Mapping[str, Any]]:
        """Of our containers that carry all of the labels."""
        with self._reached("list the containers") as api:
            found: Sequence[Mapping[str, Any]] = api.containers(
                all=True, filters={"label": self._label_filters(wanted)}
            )
        return found

    def _inspect(self, id: str) -> Mapping[str, Any]:
        with self._reached(f"look at the container {id}") as api:
            container: Mapping[str, Any] = api.inspect_container(id)
        # Docker also takes the beginning of its own ids, and has containers that are not ours.
        ours = container["Config"]["Labels"].get(labels.NAMESPACE) == self._namespace
        if container["Name"] != f"/{id}" or not ours:
            raise ContainerNotFound(f"there is no container {id} in the namespace {self._namespace}")
        return container

    def _inspect_image(self, reference: str, *, hint: str = "") -> Mapping[str, Any]:
        advice = hint or "Import or pull it first"
        with self._reached(f"use the image {reference}", missing=ImageNotFound, hint=lambda _: advice) as api:
            image: Mapping[str, Any] = api.inspect_image(reference)
        return image

    def _image(self, reference: str) -> Image:
        return _described(self._inspect_image(reference), reference)

    @contextlib.contextmanager
    def _our_turn(self, reference: str, end: float) -> Iterator[LastPull]:
        with ExitStack() as stack:
            try:
                # Two daemons may share a state directory, but not their images.
                key = f"{self._socket_path} {reference}"
                last_pull = stack.enter_context(turn(self._state_dir / "pulls", key, end=end))
            except TimeoutError as error:
                raise ImagePullFailed(
                    f"another process has been pulling {reference} for too long",
                    hint="Look at the network and the registry",
                ) from error
            except OSError as error:
                raise ImagePullFailed(
                    f"could not pull {reference}: its lock {error.filename} can't be made: {error.strerror}",
                    hint="Set state_dir to a directory that this user may write to",
                ) from error
            yield last_pull

    def _has_image(self, reference: str) -> bool:
        try:
            self._inspect_image(reference)
        except ImageNotFound:
            return False
        return True

    def _checked(self, reference: str, *, hint: str = "") -> Image:
        found = self._inspect_image(reference, hint=hint)
        here = self._architecture()
        if (found["Os"], found["Architecture"]) != ("linux", here):
            raise ImageInvalid(
                f"the image {reference} is made for {found['Os']}/{found['Architecture']}, this host is linux/{here}",
                hint="Use an image of this host's platform",
            )
        return _described(found, reference)

    def _pull(self, reference: str, progress: Callable[[Progress], None] | None, timeout: float) -> None:
        from airflow_isolation.runtime.registry_login import registry_login

        repository, tag = _sdk().utils.parse_repository_tag(reference)
        query = urlencode({"fromImage": repository, "tag": tag or "latest"})
        login = registry_login(reference)
        deadline = time.monotonic() + timeout
        try:
            for document in self._stream(f"/images/create?{query}", timeout, headers=login.headers):
                if document.get("error"):
                    raise login.explained(str(document["error"]))
                if progress is not None and document.get("id"):
                    detail = document.get("progressDetail") or {}
                    progress(
                        Progress(
                            name=document["id"],
                            event=str(document.get("status", "")).lower(),
                            done=detail.get("current", 0),
                            total=detail.get("total", 0),
                        )
                    )
        except RuntimeUnreachable as error:
            if time.monotonic() < deadline:
                raise
            raise ImagePullFailed(
                f"pulling {reference} took longer than {timeout:.0f} s", hint="Look at the network and the registry"
            ) from error

    def _stream(
        self, path: str, timeout: float, *, headers: Mapping[str, str], body: Iterable[bytes] | None = None
    ) -> Iterator[Mapping[str, Any]]:
        """The documents of an answer; one that says "error" when the request as a whole failed."""
        with DockerExchange(self._socket_path, timeout) as exchange:
            status = exchange.post(self._versioned(path), headers=headers, body=body)
            for document in exchange.documents():
                yield {"error": document.get("message", status)} if status >= 400 else document

    def _versioned(self, path: str) -> str:
        return f"/v{self._connected().api_version}{path}"

    def _forget(self, names: Collection[str], before: Collection[str]) -> None:
        """Remove the names that a failed import has brought."""
        try:
            for image in self.list_images():
                if image.reference not in before and image.reference in {_tagged(name) for name in names}:
                    self.remove_image(image.reference)
        except IsolationError as error:
            logger.warning("What a failed import left could not be removed: %s", error)

    def _check_network(self, network: str) -> None:
        if network in _NO_NETWORK_OF_DOCKER:
            return
        refused = SpecRefused(
            f"network {network!r} can't be had: Docker has no network of that name",
            hint=f"Make it with `docker network create {network}`, or set network to host or none",
        )
        with self._reached(f"look at the network {network}", invalid=SpecRefused) as api:
            found = api.networks(names=[network])
        # Docker's filter takes parts of names; and "container:x", which would share another's network, is no name.
        if not any(entry["Name"] == network for entry in found):
            raise refused

    def _account(self, spec: ContainerSpec, image_id: str, image_user: str) -> Account:
        user = spec.user or image_user
        passwd, group = self._read_account_files(spec.image, image_id)
        return resolve_account(user, passwd=passwd, group=group, allow_root=spec.allow_root, image=spec.image)

    def _read_account_files(self, reference: str, image_id: str) -> tuple[str | None, str | None]:
        """/etc/passwd and /etc/group of an image, from a container that is made for it and never started."""
        known = self._account_files.get(image_id)
        if known is None:
            with self._never_started(image_id, f"read the accounts of the image {reference}") as name:
                known = (self._read_file(name, "/etc/passwd"), self._read_file(name, "/etc/group"))
            self._account_files[image_id] = known
        return known

    def _filled_volumes(self, reference: str, image_id: str, volumes: Sequence[str]) -> frozenset[str]:
        """Those of an image's VOLUMEs in which it has something."""
        known = self._filled.get(image_id)
        if known is None:
            known = frozenset[str]()
            if volumes:
                with self._never_started(image_id, f"look at the volumes of the image {reference}") as name:
                    known = frozenset(volume for volume in volumes if self._holds_something(name, volume))
            self._filled[image_id] = known
        return known

    @contextlib.contextmanager
    def _never_started(self, image_id: str, doing: str) -> Iterator[str]:
        """A container of an image for the block, in which its files can be read."""
        body = {
            "Image": image_id,
            "Entrypoint": ["-"],
            "NetworkDisabled": True,
            "Labels": {labels.NAMESPACE: self._namespace, labels.OWNER: str(labels.Owner.this_process())},
        }
        name = f"account-files-{secrets.token_hex(8)}"
        with ExitStack() as undo:
            undo.callback(self._remove_quietly, name)
            with self._reached(doing, missing=ImageNotFound) as api:
                api.create_container_from_config(body, name=name)
            yield name

    def _holds_something(self, container: str, path: str) -> bool:
        """Whether a place in a container is anything else than an empty directory."""
        try:
            with self._reached(f"look at {path} of an image") as api:
                chunks, _ = api.get_archive(container, path)
                with contextlib.closing(chunks):
                    content = _at_most(chunks, _TAR_HEADERS)
        except ContainerNotFound:
            return False
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                first = archive.next()
                return first is None or not first.isdir() or archive.next() is not None
        except tarfile.TarError:
            return True  # the second header is longer than any of an empty directory's

    def _read_file(self, container: str, path: str) -> str | None:
        """A file of a container; None when it has none, or one too large. A link is followed once."""
        for _ in range(2):
            try:
                with self._reached(f"read {path} of an image") as api:
                    chunks, status = api.get_archive(container, path)
                    found = _first_file(_at_most(chunks, _MAX_ACCOUNT_FILE + _TAR_HEADERS))
            except ContainerNotFound:
                return None
            if found is not None:
                return found.decode(errors="surrogateescape")
            if not status.get("linkTarget"):
                return None
            path = status["linkTarget"]
        return None

    def _undo(self, id: str, attempt: str) -> None:
        """Undo a create that failed: only when the container of this name is the one that it made."""
        try:
            container = self._inspect(id)
            if container["Config"]["Labels"].get(ATTEMPT) == attempt:
                self._dismantle(id, container, _UNDO_SECONDS)
        except ContainerNotFound:
            return
        except IsolationError as error:
            logger.warning("What is left of the container %s will have to be pruned: %s", id, error)
            self._give_up(id, attempt)

    def _remove_nameless_image(self, id: str) -> None:
        """``remove_image`` could only take the name while a container used the content: the last one takes the rest."""
        with contextlib.suppress(IsolationError), self._reached("remove an image without a name") as api:
            image = api.inspect_image(id)
            if not image["RepoTags"] and not image["RepoDigests"]:
                api.remove_image(id)

    def _remove_quietly(self, name: str) -> None:
        try:
            self._remove(name, time.monotonic() + _UNDO_SECONDS)
        except IsolationError as error:
            logger.warning("The container %s will have to be pruned: %s", name, error)
            self._give_up(name, "")

    def _give_up(self, id: str, attempt: str) -> None:
        """Have the next ``remove_strays`` remove what dockerd did not, although its owner lives."""
        with contextlib.suppress(OSError):
            self._docker_ids.give_up(id, attempt)

    def _dismantle(self, id: str, container: Mapping[str, Any], seconds: float) -> None:
        """First what Docker's record leads to, then the record, then what Docker has forgotten, which our note leads to."""
        deadline = time.monotonic() + seconds
        self._placements.remove(id, f"{container['HostConfig']['CgroupParent']}/{LEAF}", seconds)
        self._remove(container["Id"], deadline)
        if _is_known(container["State"]):
            shutil.rmtree(self._files(id), ignore_errors=True)
        else:
            self._end_forgotten({id: container["Id"]}, dry_run=False)

    def _end_forgotten(self, docker_ids: Mapping[str, str], *, dry_run: bool) -> Iterable[Stray]:
        """Of containers that dockerd has no record of. The note of one that can't be ended stays, for the next time."""
        found: Mapping[str, Sequence[Stray]] = dict.fromkeys(docker_ids, ())
        if docker_ids and sees_shims(self._socket_path):
            from airflow_isolation.runtime.docker_forgotten import remove_forgotten

            found = remove_forgotten(docker_ids, dry_run=dry_run)
        for id in found:
            if not dry_run:
                shutil.rmtree(self._files(id), ignore_errors=True)
        return [stray for strays in found.values() for stray in strays]

    def _never_noted(self, ids: Iterable[str], *, dry_run: bool) -> Iterator[Stray]:
        """Directories of containers that were never started: their maker was killed before."""
        for files in filter(Path.is_dir, map(self._files, sorted(ids))):
            if not dry_run:
                shutil.rmtree(files, ignore_errors=True)
            yield Stray(kind="directory", id=files.name, detail=str(files))

    def _unneeded(self, found: Iterable[tuple[str, str]], *, dry_run: bool) -> Iterator[Stray]:
        """Containers that nobody needs, and which dockerd did not remove when it was asked to: each with its attempt."""
        for id, attempt in sorted(found):
            if not dry_run:
                if attempt:
                    self._undo(id, attempt)
                else:
                    self._remove(id, time.monotonic() + _UNDO_SECONDS)
                    shutil.rmtree(self._files(id), ignore_errors=True)
            yield Stray(kind="container", id=id)

    def _remove(self, name: str, deadline: float) -> None:
        while True:
            try:
                with self._reached(f"remove the container {name}") as api:
                    try:
                        api.remove_container(name, v=True, force=True)
                    except _sdk().errors.APIError as error:
                        # Another remove is under way: gone is when it is done.
                        if error.status_code != 409:
                            raise
            except ContainerNotFound:
                return
            if time.monotonic() > deadline:
                raise RuntimeUnreachable(
                    f"docker did not remove the container {name} in time", hint="Look at dockerd's log"
                )
            time.sleep(_REMOVAL_PAUSE_SECONDS)

    def _signal_everyone(self, container: Mapping[str, Any], number: signal.Signals) -> None:
        """Docker signals first processes only. The host's pids are known, so the kernel does it: root may."""
        with self._reached(f"list the processes of the container {container['Name']}") as api:
            try:
                rows = api.top(container["Id"], "-eo pid")["Processes"]
            except _sdk().errors.APIError as error:
                if error.status_code in (404, 409):
                    return  # Ended meanwhile.
                raise
        home = _pid_namespace(container["State"]["Pid"])
        for (pid,) in rows:
            try:
                held = os.pidfd_open(int(pid))
            except ProcessLookupError:
                continue
            try:
                # Held, the pid can't be given to another process: now it is sure whose it is.
                if home is not None and _pid_namespace(int(pid)) == home:
                    signal.pidfd_send_signal(held, number)
            except ProcessLookupError:
                continue
            except PermissionError as error:
                raise ContainerRuntimeError(
                    f"{number.name} can't be sent to every process of {container['Name'][1:]}: docker signals only the "
                    "first one, and the others are not this user's",
                    hint="Run the worker as root, or use the containerd backend",
                ) from error
            finally:
                os.close(held)

    def _counters(self, id: str) -> Stats | None:
        try:
            with self._reached(f"count for the container {id}") as api:
                counted = api.stats(id, stream=False, one_shot=True)
        except ContainerNotFound:
            return None
        return _stats(counted)


class _ContainerExit(ExitQuestion):
    """``POST /wait``: its head says that dockerd listens from now on, its body comes with the end."""

    def __init__(
        self, id: str, *, exchange: Callable[[], DockerExchange], path: str, get: Callable[[str], Container]
    ) -> None:
        self._id = id
        self._new_exchange = exchange
        self._path = path
        self._get = get
        self._cancelled = threading.Event()
        self._exchange: DockerExchange | None = None
        self._known: ExitStatus | None = None

    def prepare(self) -> None:
        self.close()
        self._exchange = exchange = self._new_exchange()
        if self._cancelled.is_set():
            exchange.cut()
        status = exchange.post(self._path, headers={})
        if status == 404:
            raise ContainerNotFound(f"there is no container {self._id}")
        if status >= 400:
            reason = "".join(str(document.get("message", "")) for document in exchange.documents())
            raise ContainerRuntimeError(f"could not wait for the container {self._id}: {reason}")
        exchange.wait_for_ever()
        # "next-exit" does not tell of an end that was before; now that it is asked, no end can fall in between.
        self._known = self._get(self._id).exit_status

    def answer(self) -> ExitStatus:
        if self._known is not None:
            return self._known
        if self._exchange is None:
            raise ValueError("nothing was asked")
        document = next(self._exchange.documents(), None)
        if document is None:
            raise RuntimeUnreachable("docker ended the wait without an answer")
        with contextlib.suppress(ContainerNotFound, RuntimeUnreachable):
            # It knows the time too, unless the container is away already.
            return self._get(self._id).exit_status or ExitStatus(code=document["StatusCode"])
        return ExitStatus(code=document["StatusCode"])

    def cancel(self) -> None:
        self._cancelled.set()
        if self._exchange is not None:
            self._exchange.cut()

    def close(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None


@cache
def _sdk() -> ModuleType:
    # Here and not above: it takes 0.2 s, and it is an extra.
    try:
        return importlib.import_module("docker")
    except ImportError as error:
        raise ContainerRuntimeError(
            f"the docker backend needs the docker SDK for Python: {error}",
            hint="Install it with: pip install 'airflow-isolation[docker]'",
        ) from error


def _is_known(state: Mapping[str, Any]) -> bool:
    """Whether dockerd has a container's process, or has seen its end. Else it may have been killed at its start, and not know.

    Of a process that it can't find any more it says the code 255, or none of the times.
    """
    seen = state["Status"] == "exited" and state["ExitCode"] != UNKNOWN_EXIT and _time(state["FinishedAt"]) is not None
    return bool(state["Running"]) or seen


def _container(inspected: Mapping[str, Any]) -> Container:
    state = inspected["State"]
    ended = _STATES.get(state["Status"], ContainerState.UNKNOWN)
    return Container(
        id=inspected["Name"][1:],
        state=ended,
        image=inspected["Config"]["Image"],
        pid=state["Pid"],
        created_at=_time(inspected["Created"]),
        labels=_own_labels(inspected["Config"]["Labels"]),
        exit_status=ExitStatus(code=state["ExitCode"], exited_at=_time(state["FinishedAt"]))
        if ended is ContainerState.STOPPED
        else None,
    )


def _summarised(summary: Mapping[str, Any]) -> Container:
    """A container as the list has it: without pid, and without the time of its end."""
    state = _STATES.get(summary["State"], ContainerState.UNKNOWN)
    # Here Docker has the exit code only in the words for people.
    code = _EXIT_CODE.match(summary["Status"])
    return Container(
        id=_name(summary),
        state=state,
        image=summary["Image"],
        created_at=datetime.fromtimestamp(summary["Created"], timezone.utc),
        labels=_own_labels(summary["Labels"]),
        exit_status=ExitStatus(code=int(code[1])) if state is ContainerState.STOPPED and code else None,
    )


def _own_labels(found: Mapping[str, str]) -> Mapping[str, str]:
    return {name: value for name, value in found.items() if name not in (labels.NAMESPACE, ATTEMPT)}


def _name(summary: Mapping[str, Any]) -> str:
    return str(summary["Names"][0])[1:]


def _described(image: Mapping[str, Any], reference: str) -> Image:
    return Image(
        reference=reference,
        digest=image["Id"],
        size=image["Size"],
        created_at=_time(image.get("Created", "")),
        architecture=image["Architecture"],
        user=(image.get("Config") or {}).get("User") or "",
        labels=(image.get("Config") or {}).get("Labels") or {},
        volumes=_image_config(image).volumes,
    )


def _image_config(image: Mapping[str, Any]) -> ImageConfig:
    """The image's configuration, which Docker shows under the names that it has in the image."""
    document = {
        "architecture": image["Architecture"],
        "os": image["Os"],
        "variant": image.get("Variant", ""),
        "config": image.get("Config") or {},
    }
    return ImageConfig.parse(json.dumps(document).encode())


def _stats(counted: Mapping[str, Any]) -> Stats | None:
    memory = counted.get("memory_stats") or {}
    if "usage" not in memory:
        return None  # Not running any more.
    limit = memory.get("limit")
    return Stats(
        cpu_seconds=counted["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9,
        memory=memory["usage"],
        # Without a limit Docker gives the host's memory.
        memory_limit=limit if limit and limit < _HOST_MEMORY else None,
        memory_peak=memory.get("max_usage"),
        pids=(counted.get("pids_stats") or {}).get("current"),
    )


def _at_most(chunks: Iterable[bytes], limit: int) -> bytes:
    """The chunks together, or their beginning when they are more than ``limit`` bytes."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > limit:
            break
    return bytes(content)


def _first_file(content: bytes) -> bytes | None:
    """The file in a tar as dockerd sends it; None when it is none, or not whole."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            member = archive.next()
            file = archive.extractfile(member) if member is not None and member.isreg() else None
            return file.read() if file is not None else None
    except (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError):
        return None


def _driver_refusal(driver: str, version: str) -> CgroupError:
    if version != "2":
        return CgroupError(
            f"dockerd uses cgroup v{version}",
            hint="Start the host with systemd.unified_cgroup_hierarchy=1 on the kernel's command line",
        )
    return CgroupError(
        f"dockerd's cgroup driver is {driver}, which leaves no room for a directory of ours",
        hint='Set "exec-opts": ["native.cgroupdriver=cgroupfs"] in daemon.json, or use the containerd backend',
    )


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _pid_namespace(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except (FileNotFoundError, ProcessLookupError):
        return None


def _time(text: str) -> datetime | None:
    # Go's zero time, the year 1, stands for "not yet".
    found = _TIMESTAMP.fullmatch(text)
    if found is None or text.startswith("0001-"):
        return None
    zone = "+00:00" if found[3] == "Z" else found[3]
    return datetime.fromisoformat(f"{found[1]}.{(found[2] or '0')[:6].ljust(6, '0')}{zone}").astimezone(timezone.utc)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
