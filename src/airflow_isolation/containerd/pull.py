"""Pulling an image through containerd's Transfer service: ``pull``."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from airflow_isolation.containerd import images, payload
from airflow_isolation.containerd.api import transfer_pb2, transfer_types_pb2, types_pb2
from airflow_isolation.containerd.credentials import credentials_for
from airflow_isolation.containerd.errors import (
    Cancelled,
    ContainerdError,
    CredentialsError,
    DeadlineExceeded,
    InvalidImage,
    NotFound,
    PullFailed,
    PullNotFound,
    PullRefused,
    Unimplemented,
    WrongPlatform,
)
from airflow_isolation.containerd.layout import Platform
from airflow_isolation.containerd.progress import Progress, Report, ignore
from airflow_isolation.containerd.reference import Reference
from airflow_isolation.containerd.stream import Stream
from airflow_isolation.containerd.turn import turn
from airflow_isolation.containerd.unpack import DEFAULT_SNAPSHOTTER, is_unpacked, link, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from airflow_isolation.containerd.client import Client, Leased
    from airflow_isolation.containerd.credentials import Credentials
    from airflow_isolation.containerd.images import Image
    from airflow_isolation.containerd.turn import LastPull

HOST_DIRECTORY = "/etc/containerd/certs.d"


def pull(
    client: Client,
    reference: str,
    *,
    lock_directory: Path,
    always: bool = False,
    snapshotter: str = DEFAULT_SNAPSHOTTER,
    host_directory: str = HOST_DIRECTORY,
    credentials: Callable[[str], Credentials | None] = credentials_for,
    progress: Report = ignore,
    timeout: float = 600.0,
) -> Image:
    """Pull the image unless it is here already (``always``: even then), and unpack it. May be called twice.

    Callers that ask for one image at the same time, in this process or others with the same ``lock_directory``, make one
    pull: the others wait and take its result. ``timeout`` in seconds is for waiting and pulling together.
    ``host_directory`` holds containerd's hosts.toml files; daemons before 1.7.25 don't read it on a pull.

    :raises PullRefused: the registry wants credentials, or other ones.
    :raises PullNotFound: the registry doesn't know the image.
    :raises PullFailed: the pull failed for another reason, or did not end within ``timeout``.
    :raises WrongPlatform: the registry has nothing for this host.
    :raises CredentialsError: there are credentials, but they can't be read.
    :raises Unimplemented: containerd 1.6, which can't pull.
    :raises InvalidReference: ``reference`` is not an image's name.
    """
    whole = Reference.parse(reference)
    name = str(whole)
    asked = time.time()
    end = time.monotonic() + timeout
    if not always and (image := _ready(client, name, snapshotter)) is not None:
        return image
    if not client.has_transfer:
        raise Unimplemented(
            f"can't pull {name}: containerd {client.server_version} has no Transfer service",
            hint="Import the image from an archive, or use containerd 1.7 or later",
        )
    # The lock is per daemon too: two daemons may share a lock directory, but not an image store.
    key = f"{client.address} {client.namespace} {snapshotter} {name}"
    with _our_turn(lock_directory, key, name, end) as last_pull:
        # Another caller's pull that began after we asked is as good as ours, even with ``always``.
        if (not always or last_pull.began() >= asked) and (image := _ready(client, name, snapshotter)) is not None:
            progress(Progress(name, "pulled by another"))
            return image
        began = time.time()
        image = _pull(
            client,
            whole,
            snapshotter=snapshotter,
            host_directory=host_directory,
            credentials=credentials,
            progress=progress,
            end=end,
        )
        last_pull.record(began)
        return image


def _ready(client: Client, name: str, snapshotter: str) -> Image | None:
    try:
        image = images.get(client, name)
        return image if is_unpacked(client, images.resolve(client, image), snapshotter) else None
    except (NotFound, InvalidImage, WrongPlatform):
        return None


@contextmanager
def _our_turn(directory: Path, key: str, name: str, end: float) -> Iterator[LastPull]:
    with ExitStack() as stack:
        try:
            last_pull = stack.enter_context(turn(directory, key, end=end))
        except TimeoutError as error:
            raise PullFailed(
                f"another pull of {name} did not end in time", hint="Allow more time, or look at its log"
            ) from error
        except OSError as error:
            raise PullFailed(
                f"{name} can't be pulled: its lock {error.filename} can't be made: {error.strerror}",
                hint="Choose a directory that this user may write to",
            ) from error
        yield last_pull


# --- the transfer ------------------------------------------------------------------------------------------------


def _pull(
    client: Client,
    reference: Reference,
    *,
    snapshotter: str,
    host_directory: str,
    credentials: Callable[[str], Credentials | None],
    progress: Report,
    end: float,
) -> Image:
    name = str(reference)
    host = Platform.of_this_host()
    platform = types_pb2.Platform(os=host.os, architecture=host.architecture, variant=host.variant)
    store = transfer_types_pb2.ImageStore(
        name=name,
        platforms=[platform],
        unpacks=[transfer_types_pb2.UnpackConfiguration(platform=platform, snapshotter=snapshotter)],
    )
    try:
        before = images.get(client, name)
    except NotFound:
        before = None
    left = max(end - time.monotonic(), 0.1)
    with client.lease(expires=timedelta(seconds=left) + timedelta(minutes=10)) as leased:
        _transfer(
            leased,
            reference,
            store,
            host_directory=host_directory,
            credentials=credentials,
            progress=progress,
            timeout=left,
        )
        # The transfer sets the name. If what follows fails, the name goes back to the image that it had.
        try:
            image = images.get(client, name)
            layout = images.resolve(client, image)
            # A daemon that isn't set up for this platform and snapshotter leaves the layers packed without an error.
            unpack(leased, layout, snapshotter=snapshotter, progress=progress, timeout=max(end - time.monotonic(), 1))
            link(leased, layout, snapshotter)
        except BaseException:
            if before is None:
                images.forget(leased, name)
            else:
                images.record(leased, name, before.target)
            raise
        return image


def _transfer(
    leased: Leased,
    reference: Reference,
    store: transfer_types_pb2.ImageStore,
    *,
    host_directory: str,
    credentials: Callable[[str], Credentials | None],
    progress: Report,
    timeout: float,
) -> None:
    with ExitStack() as stack:
        authorization = stack.enter_context(Stream(leased, "auth", timeout=timeout))
        reports = stack.enter_context(Stream(leased, "progress", timeout=timeout))
        registry = transfer_types_pb2.OCIRegistry(
            reference=str(reference),
            resolver=transfer_types_pb2.RegistryResolver(auth_stream=authorization.id, host_dir=host_directory),
        )
        request = transfer_pb2.TransferRequest(
            source=payload.pack(registry),
            destination=payload.pack(store),
            options=transfer_pb2.TransferOptions(progress_stream=reports.id),
        )
        transfer = leased.transfer.Transfer.future(request, timeout=timeout)
        answering = Answering(authorization, credentials, give_up=transfer.cancel)
        answering.start()
        reporting = threading.Thread(target=_report, args=(reports, progress), name="pull-progress", daemon=True)
        reporting.start()
        try:
            transfer.result()
        except ContainerdError as error:
            if answering.failure is not None:
                raise answering.failure from error
            raise explained(error, reference, answering.asked) from error
        finally:
            transfer.cancel()
            for stream in (authorization, reports):
                stream.cancel()
            answering.join()
            reporting.join()


class Answering(threading.Thread):
    """Answers the daemon's questions for credentials. ``asked`` has the hosts asked for, and whether there were any."""

    def __init__(
        self, stream: Stream, credentials: Callable[[str], Credentials | None], *, give_up: Callable[[], object]
    ) -> None:
        super().__init__(name="pull-credentials", daemon=True)
        self._stream = stream
        self._credentials = credentials
        self._give_up = give_up
        self.asked: dict[str, bool] = {}
        self.failure: CredentialsError | None = None

    def run(self) -> None:
        try:
            for message in self._stream:
                host = payload.unpack(message, transfer_types_pb2.AuthRequest).host
                found = self._credentials(host)
                self.asked[host] = found is not None
                self._stream.send(_answer(found))
        except CredentialsError as error:
            self.failure = error
            self._give_up()
        except ContainerdError:
            # Cancelled with the transfer, or ended by the daemon: the transfer itself reports the error.
            return


def _answer(credentials: Credentials | None) -> transfer_types_pb2.AuthResponse:
    if credentials is None:
        return transfer_types_pb2.AuthResponse(authType=transfer_types_pb2.NONE)
    if not credentials.username:
        return transfer_types_pb2.AuthResponse(authType=transfer_types_pb2.REFRESH, secret=credentials.secret)
    return transfer_types_pb2.AuthResponse(
        authType=transfer_types_pb2.CREDENTIALS, username=credentials.username, secret=credentials.secret
    )


def _report(stream: Stream, progress: Report) -> None:
    try:
        for message in stream:
            step = payload.unpack(message, transfer_types_pb2.Progress)
            progress(Progress(step.desc.digest or step.name, step.event, step.progress, step.total))
    except ContainerdError:
        # As above.
        return


def explained(error: ContainerdError, reference: Reference, asked: dict[str, bool]) -> ContainerdError:
    """The error for a failed pull, chosen by the daemon's words. The words stay in its sentence."""
    name, host, words = str(reference), reference.host, error.detail
    # The image's own name is ignored: it may be team/forbidden.
    below = words.lower().replace(reference.path, "")
    if "no match for platform" in below:
        return WrongPlatform(f"{name} is not made for {Platform.of_this_host()}: {words}")
    if any(sign in below for sign in ("unauthorized", "authorization failed", "access denied", "forbidden")):
        given = (
            "The credentials of the docker config were refused" if any(asked.values()) else "No credentials are known"
        )
        hint = f"{given}: docker login {host}"
        return PullRefused(f"{host} does not let us pull {name}: {words}", hint=hint)
    if isinstance(error, NotFound):
        return PullNotFound(f"{host} does not know {name}: {words}")
    if "http response to https client" in below:
        return PullFailed(
            f"{host} speaks plain http, and containerd expected https, for {name}: {words}",
            hint="containerd 1.7.25 and later use http for loopback, and where a hosts.toml in certs.d says so",
        )
    if "connection refused" in below:
        return PullFailed(f"nobody answers at {host}, for {name}: {words}")
    if isinstance(error, (DeadlineExceeded, Cancelled)):
        return PullFailed(f"{name} was not pulled in time: {words}", hint="Allow more time, or look at the network")
    return PullFailed(f"{name} can't be pulled: {words}")
