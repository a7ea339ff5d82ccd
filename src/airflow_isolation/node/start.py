"""A request becomes a running workload: settings and image first, mounts and container when it may begin.

All of it blocks, and belongs into a thread.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from airflow_isolation.bridge.ending import Meter
from airflow_isolation.bridge.held import held
from airflow_isolation.bridge.prepared import OfTheWorker, prepared
from airflow_isolation.bridge.started_agent import remove_container
from airflow_isolation.bridge.workload import begin
from airflow_isolation.bridge.zygote import end_stragglers
from airflow_isolation.cgroups.join import own_cgroup_of
from airflow_isolation.errors import ContainerNotFound, HostTrouble, SettingError
from airflow_isolation.node.admission import Demand
from airflow_isolation.node.protocol import Malformed
from airflow_isolation.runtime import labels
from airflow_isolation.settings.dag_metadata import Document
from airflow_isolation.settings.document import MAX_BYTES
from airflow_isolation.settings.hook import image_hook
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from airflow_isolation.bridge.backstage import Backstage
    from airflow_isolation.bridge.workload import Begun
    from airflow_isolation.container_spec import Mount
    from airflow_isolation.node.clients import Client
    from airflow_isolation.node.request import StartRequest
    from airflow_isolation.node.trees import Trees
    from airflow_isolation.runtime.interface import Image, PendingExit
    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import Backend, EffectiveSettings
    from airflow_isolation.settings.hook import ImageHook

_CHANNELS: Final = ("requests", "stdout", "stderr", "logs")
#: linux/fcntl.h; in Python from 3.8 on some platforms only.
_F_GET_SEALS: Final = 1034
#: Elsewhere its user would be somebody on the host, and could read what the worker may not.
_NOT_ROOT: Final = "a worker that is not root on this host gets tasks in a user namespace alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a node has for all of its clients.

    ``spares_requests``: whether this host's kernel can spare the memory that a task requests; elsewhere it is only counted.
    """

    backend: Backend
    configuration: Callable[[], Configuration]
    state_dir: Path
    behind: Backstage
    trees: Trees
    hook: Callable[[], ImageHook | None] = image_hook
    spares_requests: bool = True


@dataclass(frozen=True, slots=True)
class Kept:
    """What a node keeps of a workload while it runs; ``resources`` releases all of it, ``slot`` is as in ``Begun``."""

    id: str
    pending_exit: PendingExit
    meter: Meter
    resources: ExitStack
    slot: ExitStack | None = None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One of a worker's, as a channel: the packet that it came with closes it."""

    number: int

    def fileno(self) -> int:
        return self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A workload that could begin: what holds for it is known, and its image is there.

    Attributes:
        channels, namespace, directories: descriptors, as in ``StartRequest``; not owned.

    """

    request: StartRequest
    client: Client
    settings: EffectiveSettings
    image: Image
    channels: Sequence[int]
    namespace: int
    directories: Sequence[int]
    demand: Demand


def make_ready(host: Host, request: StartRequest, client: Client, descriptors: Sequence[int]) -> Ready:
    """Resolve its settings, and have its image.

    :raises Malformed: the descriptors are not those of the request.
    :raises IsolationError: as ``resolve`` and ``ContainerRuntime.ensure_image``.
    """
    with _host_trouble():
        return _ready(host, request, client, descriptors)


def start(host: Host, ready: Ready) -> Begun:
    """The workload, whose ``resources`` are the caller's.

    :raises IsolationError: as ``launch``.
    """
    with _host_trouble():
        return _started(host, ready)


@contextmanager
def _host_trouble() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostTrouble(f"The node's host failed: {error}", hint="Look at its disks, and its limits") from error


def _ready(host: Host, request: StartRequest, client: Client, descriptors: Sequence[int]) -> Ready:
    if request.backend != host.backend:
        raise SettingError(
            f"the worker's tasks are to run on {request.backend}, and the node has {host.backend}",
            source="[core] in airflow.cfg",
            key="task_execution_runtime",
            hint="Set it to the same for workers and node",
        )
    channels, namespace, directories, document = _sorted(request, descriptors)
    settings = resolve(
        "task",
        host.backend,
        configuration=host.configuration(),
        dag_id=request.dag_id,
        task_id=request.task_id,
        executor_config=request.executor_config,
        hook=host.hook(),
        document=document,
    )
    timeout = min(settings.image_pull_timeout, request.pull_timeout)
    image = host.behind.runtime.ensure_image(settings.image, settings.image_pull_policy, timeout=timeout)
    demand = Demand.of(settings.resources)
    if not host.spares_requests:
        settings = replace(settings, resources=replace(settings.resources, memory_request=None))
    return Ready(
        request=request,
        client=client,
        settings=settings,
        image=image,
        channels=channels,
        namespace=namespace,
        directories=directories,
        demand=demand,
    )


def _started(host: Host, ready: Ready) -> Begun:
    request, client, settings = ready.request, ready.client, ready.settings
    with _shown(host, request, ready.namespace, ready.directories) as (mounts, shared):
        worker = OfTheWorker(
            airflow=request.airflow,
            forwarded=request.forwarded,
            own=request.own,
            mounts=mounts,
            shared_mounts=shared,
            settings_digest=request.settings_digest,
            labels=_labels(request, client, ready.demand),
            client="" if client.is_root_here else str(client.uid),
            why_no_privilege="" if client.is_root_here else _NOT_ROOT,
        )
        task, plan = prepared(settings, worker, runtime=host.behind.runtime, image=ready.image)
        spares = settings.zygote.spare_containers
        return begin(
            host.behind.runtime,
            task,
            tuple(Descriptor(number) for number in ready.channels),
            state_dir=settings.connection.state_dir,
            plan=plan,
            relabel=host.behind.relabel,
            replenish=partial(host.behind.replenish, wanted=spares) if spares else None,
            confined=not client.is_root_here,
        )


def _sorted(
    request: StartRequest, descriptors: Sequence[int]
) -> tuple[Sequence[int], int, Sequence[int], Document | None]:
    """The channels, the mount namespace, the directories, and the DAG metadata."""
    binds = len(request.binds)
    wanted = len(_CHANNELS) + 1 + binds + request.has_document
    if len(descriptors) != wanted:
        raise Malformed(f"the request came with {len(descriptors)} descriptors, and {wanted} belong to it")
    channels = descriptors[: len(_CHANNELS)]
    for name, number in zip(_CHANNELS, channels, strict=True):
        _check_channel(name, number)
    end = len(_CHANNELS) + 1 + binds
    document = Document(_content(descriptors[end]), request.document_source) if request.has_document else None
    return channels, descriptors[len(_CHANNELS)], descriptors[len(_CHANNELS) + 1 : end], document


def _check_channel(name: str, number: int) -> None:
    """:raises Malformed: it is neither a pipe nor a socket of two peers."""
    mode = os.fstat(number).st_mode
    if stat.S_ISFIFO(mode) and name in {"stdout", "stderr"}:
        return
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(number)) as channel:
            if (channel.family, channel.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
                return
    raise Malformed(f"the descriptor for {name} is no channel")


def _content(number: int) -> bytes:
    """Of a file in memory: reading another one could take for ever.

    :raises Malformed: it is none.
    """
    try:
        fcntl.fcntl(number, _F_GET_SEALS)
    except OSError:
        raise Malformed("the DAG metadata are not in a memory file") from None
    return os.pread(number, MAX_BYTES + 1, 0)


@contextmanager
def _shown(
    host: Host, request: StartRequest, namespace: int, directories: Sequence[int]
) -> Iterator[tuple[tuple[Mount, ...], tuple[Mount, ...]]]:
    with host.trees.shown(directories, namespace=namespace) as paths:
        sources = iter(paths)

        def with_sources(mounts: Sequence[Mount]) -> tuple[Mount, ...]:
            return tuple(
                replace(mount, source=str(next(sources))) if mount.kind == "bind" else mount for mount in mounts
            )

        yield with_sources(request.mounts), with_sources(request.shared_mounts)


def _labels(request: StartRequest, client: Client, demand: Demand) -> Mapping[str, str]:
    return {
        labels.PURPOSE: "task",
        **request.labels,
        labels.CLIENT: str(client.uid),
        labels.DEMAND: demand.label(),
        labels.OWNER: str(labels.Owner.of_process(client.pid)),
    }


def resume(host: Host, id: str, client: Client) -> Kept:
    """What a node keeps of a workload that another one has started: for the client that has its other half.

    :raises ContainerNotFound: it is gone, or was not started for this client's user.
    :raises IsolationError: the daemon can't be asked.
    """
    runtime, state_dir = host.behind.runtime, host.state_dir
    container = runtime.get(id)
    if container.labels.get(labels.CLIENT) != str(client.uid) or container.labels.get(labels.PURPOSE) != "task":
        raise ContainerNotFound(f"No task of uid {client.uid} has the container {id}")
    with ExitStack() as undo:
        directory = state_dir / "workloads" / id
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        with suppress(OSError):
            undo.enter_context(held(directory))
        undo.callback(remove_container, runtime, id, state_dir)
        pending_exit = runtime.wait(id)
        undo.callback(pending_exit.close)
        meter = Meter(container.pid)
        undo.callback(meter.close)
        undo.callback(end_stragglers, own_cgroup_of(container.pid))
        return Kept(id, pending_exit, meter, undo.pop_all())
