"""DockerRuntime: dockerd, through the docker SDK (the extra ``[docker]``).

Docker has no namespaces: a label stands for one, and a container without it is not there for us. Its container names
are one for all, so an id that is taken in one namespace is taken in each.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import signal
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.container_spec import NO_STRINGS
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
from airflow_isolation.oci.account import needs_account_files, resolve_account
from airflow_isolation.oci.identifier import check_identifier
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.docker_archive import read_archive
from airflow_isolation.runtime.docker_config import ATTEMPT, container_config
from airflow_isolation.runtime.docker_exchange import DockerExchange
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
)
from airflow_isolation.runtime.pending_exit import ExitQuestion, WatchedExit
from airflow_isolation.runtime.shared_pull import pull_once
from airflow_isolation.runtime.words import at_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import docker

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
_IMPORT_SECONDS = 1800.0
_EXIT_CODE = re.compile(r"Exited \((\d+)\)")
# Go's time has nanoseconds, Python's microseconds.
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")
_NEVER_KILLED_BY_NAME = 137
_REMOVAL_PAUSE_SECONDS = 0.02


class DockerRuntime(ContainerRuntime):
    """The containers of one ``namespace`` in the dockerd at ``socket_path``.

    ``state_dir`` holds the locks of pulls under way, and is made when it is missing. ``timeout``, in seconds, is for
    every call that has no limit of its own.

    :raises ContainerRuntimeError: the docker SDK is not installed.
    """

    def __init__(
        self,
        socket_path: str = "/var/run/docker.sock",
        namespace: str = "airflow",
        state_dir: Path = Path("/run/airflow-isolation"),
        *,
        timeout: float = 60.0,
    ) -> None:
        _import_sdk()
        self._socket_path = socket_path
        self._namespace = namespace
        self._state_dir = state_dir
        self._timeout = timeout
        self._connecting = threading.Lock()
        self._client: docker.APIClient | None = None
        self._daemon: Mapping[str, Any] = {}
        self._account_files: dict[str, tuple[str | None, str | None]] = {}

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
        self._state_dir.mkdir(parents=True, exist_ok=True)
        pull_once(
            self._state_dir, reference, lambda left: self._pull(reference, progress, left), timeout=timeout
        )
        return self._checked(reference)

    def import_image(
        self, archive: Path, *, reference: str = "", progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        content = read_archive(archive, architecture=self._architecture(), reference=reference)
        names = {name for image in content.images for name in image.names}
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
                "/images/load?quiet=1", _IMPORT_SECONDS, headers={"Content-Type": "application/x-tar"}, body=chunks()
            ):
                if document.get("error"):
                    raise ImageInvalid(f"could not import {archive}: {document['error']}")
            return tuple(self._image(name) for image in content.images for name in image.names)
        except BaseException:
            self._forget(names, before)
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
        image = self._inspect_image(spec.image)
        config = _image_config(image)
        attempt = secrets.token_hex(8)
        body = container_config(
            id,
            spec,
            namespace=self._namespace,
            attempt=attempt,
            image=config,
            account=self._account(spec, image["Id"], config.user),
            host=self._host,
            seccomp=docker_profile(spec.seccomp),
        )
        with ExitStack() as undo:
            # Before the call, not after it: when no answer comes, the container may still have been made.
            undo.callback(self._undo, id, attempt)
            with self._reached(f"create the container {id}", missing=ImageNotFound, invalid=SpecRefused) as api:
                api.create_container_from_config(body, name=id)
            container = self.get(id)
            undo.pop_all()
        return container

    def wait(self, id: str) -> PendingExit:
        check_identifier(id)
        self.get(id)
        return WatchedExit(id, _ContainerExit(self, id)).begin()

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
            return int(api.inspect_container(container["Id"])["State"]["Pid"])

    def kill(self, id: str, signal: signal.Signals = signal.SIGKILL, *, everyone: bool = False) -> None:
        check_identifier(id)
        try:
            container = self._inspect(id)
        except ContainerNotFound:
            return
        if not container["State"]["Running"]:
            return
        # SIGKILL ends the first process, and with it its pid namespace: everyone.
        if everyone and signal is not SIGKILL:
            self._signal_everyone(container, signal)
            return
        with self._reached(f"send {signal.name} to the container {id}") as api:
            try:
                api.kill(container["Id"], signal.value)
            except _sdk().errors.APIError as error:
                # 404: removed; 409: it ended before the signal reached it.
                if error.status_code not in (404, 409):
                    raise

    def remove(self, id: str) -> None:
        check_identifier(id)
        try:
            container = self._inspect(id)
        except ContainerNotFound:
            return
        self._remove(container["Id"], time.monotonic() + self._timeout)

    def get(self, id: str) -> Container:
        check_identifier(id)
        return _container(self._inspect(id))

    def list(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[Container, ...]:
        with self._reached("list the containers") as api:
            found = api.containers(all=True, filters={"label": self._label_filters(labels)})
        found.sort(key=lambda summary: (summary["Created"], summary["Names"]))
        return tuple(_summarised(summary) for summary in found)

    def stats(self, ids: Iterable[str]) -> Mapping[str, Stats]:
        wanted = set(ids)
        with self._reached("list the containers") as api:
            running = api.containers(filters={"label": self._label_filters(NO_STRINGS)})
        present = {name: summary["Id"] for summary in running if (name := _name(summary)) in wanted}
        if not present:
            return {}
        with ThreadPoolExecutor(max_workers=_STATS_AT_ONCE, thread_name_prefix="docker-stats") as pool:
            counted = zip(present, pool.map(self._counters, present.values()), strict=True)
            return {id: stats for id, stats in counted if stats is not None}

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
                client = _sdk().APIClient(
                    base_url=f"unix://{self._socket_path}", version="auto", timeout=self._timeout
                )
                self._client = client
            return self._client

    @contextlib.contextmanager
    def _reached(
        self,
        doing: str,
        *,
        missing: type[ContainerRuntimeError] = ContainerNotFound,
        invalid: type[IsolationError] = ContainerRuntimeError,
        hint: Callable[[str], str] = lambda _: "",
    ) -> Iterator[docker.APIClient]:
        """The one place where the SDK's errors become ours. ``doing`` completes "could not …"."""
        requests = importlib.import_module("requests")
        try:
            yield self._connected()
        except _sdk().errors.APIError as error:
            reason = str(error.explanation or error)
            sentence = f"could not {doing}: {reason}"
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

    @cached_property
    def _host(self) -> HostFacts:
        return read_host(daemon_paths=(self._socket_path,))

    def _label_filters(self, wanted: Mapping[str, str]) -> Sequence[str]:
        return [f"{name}={value}" for name, value in {**wanted, labels.NAMESPACE: self._namespace}.items()]

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
        sdk = _sdk()
        repository, tag = sdk.utils.parse_repository_tag(reference)
        query = urlencode({"fromImage": repository, "tag": tag or "latest"})
        with self._reached(f"pull {reference}", invalid=ImagePullFailed) as api:
            try:
                registry, _ = sdk.auth.resolve_repository_name(repository)
                # config.json and its credential helpers, in the way of the docker command.
                header = sdk.auth.get_config_header(api, registry)
            except (sdk.errors.DockerException, ValueError) as error:
                raise ImagePullFailed(
                    f"could not pull {reference}: its registry credentials can't be read: {error}",
                    hint="Look at Docker's config.json",
                ) from error
        headers = {"X-Registry-Auth": header.decode() if isinstance(header, bytes) else header} if header else {}
        deadline = time.monotonic() + timeout
        try:
            for document in self._stream(f"/images/create?{query}", timeout, headers=headers):
                if document.get("error"):
                    raise _pull_error(reference, str(document["error"]))
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
        if network in ("host", "none"):
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
        if known is not None:
            return known
        body = {
            "Image": image_id,
            "Entrypoint": ["-"],
            "NetworkDisabled": True,
            "Labels": {labels.NAMESPACE: self._namespace, labels.OWNER: str(labels.Owner.this_process())},
        }
        name = f"account-files-{secrets.token_hex(8)}"
        with ExitStack() as undo:
            undo.callback(self._remove_quietly, name)
            with self._reached(f"read the accounts of the image {reference}", missing=ImageNotFound) as api:
                api.create_container_from_config(body, name=name)
            known = (self._read_file(name, "/etc/passwd"), self._read_file(name, "/etc/group"))
        self._account_files[image_id] = known
        return known

    def _read_file(self, container: str, path: str) -> str | None:
        """A file of a container; None when it has none, or one too large. A link is followed once."""
        for _ in range(2):
            try:
                with self._reached(f"read {path} of an image") as api:
                    chunks, status = api.get_archive(container, path)
                    content = io.BytesIO(_at_most(chunks, _MAX_ACCOUNT_FILE))
            except ContainerNotFound:
                return None
            with tarfile.open(fileobj=content) as archive:
                member = archive.next()
                if member is not None and member.isreg():
                    file = archive.extractfile(member)
                    return file.read().decode(errors="surrogateescape") if file else None
            if not status.get("linkTarget"):
                return None
            path = status["linkTarget"]
        return None

    def _undo(self, id: str, attempt: str) -> None:
        """Undo a create that failed: only when the container of this name is the one that it made."""
        try:
            container = self._inspect(id)
            if container["Config"]["Labels"].get(ATTEMPT) == attempt:
                self._remove(container["Id"], time.monotonic() + _UNDO_SECONDS)
        except ContainerNotFound:
            return
        except IsolationError as error:
            logger.warning("What is left of the container %s will have to be pruned: %s", id, error)

    def _remove_quietly(self, name: str) -> None:
        try:
            self._remove(name, time.monotonic() + _UNDO_SECONDS)
        except IsolationError as error:
            logger.warning("The container %s will have to be pruned: %s", name, error)

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

    def __init__(self, runtime: DockerRuntime, id: str) -> None:
        self._runtime = runtime
        self._id = id
        self._cancelled = threading.Event()
        self._exchange: DockerExchange | None = None
